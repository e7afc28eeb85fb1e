"""What does it cost that a Trainer reports a perplexity: time, and peak memory?

Evaluation of a small GPT-2 with a vocabulary of 50257, on rows of 256 tokens: by itself (the loss
only), with this module's hooks, and with a stock compute_metrics on the logits that Trainer gathers
and keeps. Each runs in a process of its own, in turn; memory is the peak of the whole process. The
stock way runs on fewer rows, because its memory grows with each of them.

    python benchmarks/bench_trainer.py
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import evaluate
import numpy as np
import torch
from report import ROOT, environment, table, write_section
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

VOCAB_SIZE, LENGTH, BATCH_SIZE = 50257, 256, 8
NUM_ROWS = 512
STOCK_ROWS = (16, 32)


def stock_compute_metrics(prediction) -> dict[str, float]:
    """As tutorials have it: cross-entropy over all logits, shifted."""
    logits = torch.from_numpy(prediction.predictions[:, :-1]).flatten(0, 1)
    labels = torch.from_numpy(prediction.label_ids[:, 1:]).flatten()
    return {"perplexity": torch.nn.functional.cross_entropy(logits, labels).exp().item()}


HOOKS = {
    "the loss only": dict,
    "with the hooks": lambda: evaluate.load(str(ROOT / "perplexity.py")).trainer_hooks(),
    "stock compute_metrics": lambda: {"compute_metrics": stock_compute_metrics},
}


def run(name: str, num_rows: int) -> dict:
    """One evaluation in this process."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=2, n_positions=LENGTH)
    )
    ids = np.random.default_rng(0).integers(VOCAB_SIZE, size=(num_rows, LENGTH))
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            per_device_eval_batch_size=BATCH_SIZE,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, **HOOKS[name]())
        start = time.perf_counter()
        metrics = trainer.evaluate(rows)
        seconds = time.perf_counter() - start
    perplexity = metrics.get("eval_perplexity", math.exp(metrics["eval_loss"]))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"seconds": seconds, "peak_mb": peak_mb, "perplexity": perplexity}


def in_own_process(name: str, num_rows: int) -> dict:
    command = [sys.executable, __file__, "--run", name, "--rows", str(num_rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        print(json.dumps(run(args.run, args.rows)))
        return
    base, hooks, stock = HOOKS
    cases = [(base, NUM_ROWS), (hooks, NUM_ROWS)]
    cases += [(name, num_rows) for num_rows in STOCK_ROWS for name in (base, stock)]
    runs: dict[tuple[str, int], list[dict]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case, found in runs.items():
            found.append(in_own_process(*case))
    medians = {
        case: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for case, found in runs.items()
    }
    rows = [
        [
            name,
            str(num_rows),
            f"{run['seconds'] / medians[base, num_rows]['seconds']:.2f}",
            f"{run['peak_mb']:,.0f}",
            f"{run['peak_mb'] - medians[base, num_rows]['peak_mb']:+,.0f}",
            f"{run['perplexity']:.2f}",
        ]
        for (name, num_rows), run in medians.items()
    ]
    few, many = (medians[stock, num_rows]["peak_mb"] for num_rows in STOCK_ROWS)
    mb_per_row = (many - few) / (STOCK_ROWS[1] - STOCK_ROWS[0])
    header = ["", "rows", "time / the loss only", "peak MB", "MB on top", "perplexity"]
    write_section(
        "Evaluation with a Trainer on a CPU (bench_trainer.py)",
        f"{environment(['torch', 'transformers', 'accelerate', 'evaluate'])}\n"
        f"Rows of {LENGTH} tokens, V = {VOCAB_SIZE}, {BATCH_SIZE} rows a batch; medians of "
        f"{args.rounds} rounds.\n\n{table(header, rows)}\n"
        f"The stock way takes {mb_per_row:,.0f} MB more for each row, from which follow "
        f"{mb_per_row * NUM_ROWS / 1000:,.0f} GB for {NUM_ROWS} rows.",
    )


if __name__ == "__main__":
    main()
