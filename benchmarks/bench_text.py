"""How fast, and with how much memory, do texts and a model become a perplexity on a CPU?

This module, the classic metric of evaluate, and lm-eval's HFLM.loglikelihood_rolling, on one local
model and the same 200 texts of very unequal length. Each runs in a process of its own, in turn; the
time is that of the call, the memory the peak of the whole process. Then lm-eval and this module
with preset="lm-eval" on the bundled model, whose held-out texts are longer than its context.

    python benchmarks/bench_text.py --classic path/to/the/classic/perplexity.py

Without --classic the classic metric comes from the Hub.
"""

import argparse
import functools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import evaluate
import numpy as np
import torch
from report import ROOT, environment, interleaved, table, write_section
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

NUM_TEXTS, NUM_TOKENS = 200, 32_000
VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS = 50257, 512, 6
# Multiplications and additions of the matrix products for one token: 12 H^2 weights in a layer of
# this shape, and the output layer. Attention, which depends on the context, is left out.
FLOP_PER_TOKEN = 2 * (12 * HIDDEN_SIZE**2 * NUM_LAYERS + HIDDEN_SIZE * VOCAB_SIZE)
BATCH_SIZE = 16  # the classic metric's default; this module packs by tokens


def make_model(directory: Path) -> None:
    """45 million parameters in the shape of GPT-2, random; the bundled tokenizer, which can pad."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_model")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=HIDDEN_SIZE,
        n_layer=NUM_LAYERS,
        n_head=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(directory)


def held_out() -> list[str]:
    """The documents that the bundled model was not trained on."""
    lines = (ROOT / "tiny_model" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def make_texts() -> list[str]:
    """Pieces of prose whose lengths in tokens are log-normal, 3 to 1000, in random order."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_model")
    prose = tokenizer("\n\n".join(held_out()), add_special_tokens=False, verbose=False).input_ids
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(0.0, 1.2, NUM_TEXTS)
    lengths = np.clip(lengths * NUM_TOKENS / lengths.sum(), 3, 1000).astype(int)
    starts = rng.integers(0, len(prose) - 1000, NUM_TEXTS)
    return [tokenizer.decode(prose[s : s + n]) for s, n in zip(starts, lengths, strict=True)]


# Each takes a model's directory, texts, and the path of the classic metric, and gives
# (seconds, sum of nll in nats).


def run_this(model: str, texts: list[str], classic: str, **options) -> tuple[float, float]:
    """This module."""
    ppl = evaluate.load(str(ROOT / "perplexity.py"))
    start = time.perf_counter()
    result = ppl.compute(predictions=texts, model_id=model, **options)
    return time.perf_counter() - start, result["mean_nll"] * result["num_tokens"]


def run_classic(model: str, texts: list[str], classic: str) -> tuple[float, float]:
    """The classic metric. It reports perplexities; the sum follows from them and the lengths."""
    metric = evaluate.load(classic, module_type="metric")
    start = time.perf_counter()
    result = metric.compute(predictions=texts, model_id=model, batch_size=BATCH_SIZE)
    seconds = time.perf_counter() - start
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    pairs = zip(lengths, result["perplexities"], strict=True)
    return seconds, sum(length * math.log(perplexity) for length, perplexity in pairs)


def run_lm_eval(model: str, texts: list[str], classic: str) -> tuple[float, float]:
    """lm-eval. Unlike the others it has the model loaded before the clock starts."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, device="cpu", batch_size=BATCH_SIZE)
    metadata = (None, None, None)
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), i, metadata) for i, text in enumerate(texts)
    ]
    start = time.perf_counter()
    logliks = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    return time.perf_counter() - start, -sum(logliks)


THIS = "this module"
METHODS = {
    THIS: run_this,
    'this module, preset="lm-eval"': functools.partial(run_this, preset="lm-eval"),
    "classic evaluate metric": run_classic,
    "lm-eval loglikelihood_rolling": run_lm_eval,
}


def best_product_rate() -> float:
    """The most operations a second that torch.mm reaches here, over shapes that suit it."""
    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (2048, 512, 2048), (1024, 512, 4096)):
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        out = torch.empty(rows, columns)
        seconds = interleaved({"mm": functools.partial(torch.mm, a, b, out=out)}, 20)["mm"]
        best = max(best, 2 * rows * inner * columns / min(seconds))
    return best


def in_own_process(name: str, model: Path, texts: Path, classic: str) -> dict | None:
    """What a method took and gave in a process of its own, None where it cannot run here."""
    command = [sys.executable, __file__, "--run", name, "--model", model, "--texts", texts]
    done = subprocess.run(
        [*command, "--classic", classic], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        print(f"{name} did not run: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def bench_speed(directory: Path, classic: str, rounds: int) -> str:
    model, texts_file = directory / "gpt2-45m", directory / "texts.json"
    make_model(model)
    texts = make_texts()
    texts_file.write_text(json.dumps(texts))
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    runs: dict[str, list[dict]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        for name, found in runs.items():
            run = in_own_process(name, model, texts_file, classic)
            if run is not None:
                found.append(run)
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
        if found
    }
    rows = [
        [
            name,
            f"{sum(lengths) / run['seconds']:,.0f}",
            f"{run['seconds'] / medians[THIS]['seconds']:.2f}",
            f"{FLOP_PER_TOKEN * sum(lengths) / run['seconds'] / run['product_rate']:.2f}",
            f"{run['peak_mb']:,.0f}",
            f"{run['peak_mb'] / medians[THIS]['peak_mb']:.2f}",
            f"{run['nll_sum']:.3f}",
        ]
        for name, run in medians.items()
    ]
    header = ["", "tokens/s", "time / this module's", "share of the best torch.mm"]
    header += ["peak MB", "peak / this module's", "nll sum"]
    return (
        f"### {len(texts)} texts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in "
        f"all; GPT-2 shape, 45 M parameters, V = 50257\n\nMedians of {rounds} rounds.\n\n"
        f"{table(header, rows)}\nlm-eval and its preset also count the BOS that the bundled "
        "tokenizer puts in front of a text."
    )


def compare_with_lm_eval(directory: Path, classic: str) -> str:
    texts_file = directory / "held_out.json"
    texts_file.write_text(json.dumps(held_out()))
    rows = []
    for name in list(METHODS)[1::2]:
        run = in_own_process(name, ROOT / "tiny_model", texts_file, classic)
        if run is not None:
            rows.append([name, f"{run['nll_sum']:.6f}"])
    return "### The bundled model on its held-out text\n\n" + table(["", "nll sum"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classic", default="perplexity", help="path of the classic metric [Hub]")
    parser.add_argument("--rounds", type=int, default=3)
    for hidden in ("--run", "--model", "--texts"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        texts = json.loads(Path(args.texts).read_text())
        seconds, nll_sum = METHODS[args.run](args.model, texts, args.classic)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        found = {"seconds": seconds, "nll_sum": nll_sum, "peak_mb": peak_mb}
        print(json.dumps(found | {"product_rate": best_product_rate()}))
        return
    with tempfile.TemporaryDirectory() as directory:
        parts = [
            environment(["torch", "transformers", "evaluate", "lm_eval"]),
            bench_speed(Path(directory), args.classic, args.rounds),
            compare_with_lm_eval(Path(directory), args.classic),
        ]
    write_section("Texts and a model on a CPU (bench_text.py)", "\n\n".join(parts))


if __name__ == "__main__":
    main()
