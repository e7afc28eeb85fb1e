"""exp(eval_loss) of a Trainer against the perplexity of the corpus, on one process and on two.

    python examples/eval_loss_is_not_perplexity.py

Two small models: GPT-2, with random weights, on rows of equal length and without padding, and the
bundled Llama on paragraphs that it was not trained on. Trainer averages the means of the batches,
however many rows and tokens each of them has, so that the one row of a last batch counts as much as
all rows of a full one. For GPT-2, transformers 5.23 moreover divides by the number of all labels,
though nothing predicts the first of each row. What the hooks report depends on the tokens only.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GPT2Config,
    Trainer,
    TrainingArguments,
)

from ppleval import Perplexity

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE = 4


def gpt2_on_equal_rows() -> tuple:
    """(model, rows): six rows of 16 random ids, which fill a batch of four and half of another.

    The ids of special tokens are left out: the collator does not score what looks like padding.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        GPT2Config(
            vocab_size=256,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=32,
            initializer_range=0.35,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    return model, torch.randint(16, 256, (6, 16)).tolist()


def llama_on_paragraphs() -> tuple:
    """(model, rows): the bundled model, and 22 held-out paragraphs of 8 to 400 tokens."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny_model")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_model")
    lines = (ROOT / "tiny_model" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    paragraphs = [p for line in lines for p in json.loads(line)["text"].split("\n\n")]
    rows = [tokenizer(paragraph, verbose=False).input_ids for paragraph in paragraphs]
    return model, [row for row in rows if 8 <= len(row) <= 400][:22]


CASES = {
    "GPT-2, rows of equal length": gpt2_on_equal_rows,
    "Llama, rows of unequal length": llama_on_paragraphs,
}


@torch.no_grad()
def true_perplexity(model, rows: list[list[int]]) -> float:
    """Row by row, in float64: exp(sum of nll / number of predicted tokens)."""
    nll_sum, num_tokens = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1].double()
        nll_sum += torch.nn.functional.cross_entropy(
            logits, torch.tensor(row[1:]), reduction="sum"
        ).item()
        num_tokens += len(row) - 1
    return math.exp(nll_sum / num_tokens)


def evaluate_with_trainer(model, rows: list[list[int]], directory: str) -> dict:
    """What a Trainer reports that has been given the hooks."""
    ppl = Perplexity()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_model")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=directory,
            per_device_eval_batch_size=BATCH_SIZE,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        eval_dataset=[{"input_ids": row} for row in rows],
        **ppl.trainer_hooks(),
    )
    return trainer.evaluate()


def measure(out: Path) -> None:
    """Under torchrun, on each process; the first writes (case, true, exp(eval_loss), hooks)."""
    found = []
    for name, make in CASES.items():
        model, rows = make()
        model.eval()
        with tempfile.TemporaryDirectory() as directory:
            metrics = evaluate_with_trainer(model, rows, directory)
        exp_loss = math.exp(metrics["eval_loss"])
        found.append((name, true_perplexity(model, rows), exp_loss, metrics["eval_perplexity"]))
    if int(os.environ["RANK"]) == 0:
        out.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.measure)
        return
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for num_processes in (1, 2):
            out = Path(directory) / str(num_processes)
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command = [*launcher, "--nproc_per_node", str(num_processes), __file__]
            subprocess.run([*command, "--measure", out], check=True, stdout=subprocess.DEVNULL)
            found[num_processes] = json.loads(out.read_text())
    print("| | processes | true perplexity | `exp(eval_loss)` | this module |")
    print("|---|---:|---:|---:|---:|")
    for i, name in enumerate(CASES):
        for num_processes, rows in found.items():
            figures = " | ".join(f"{value:.2f}" for value in rows[i][1:])
            print(f"| {name} | {num_processes} | {figures} |")


if __name__ == "__main__":
    main()
