"""What does a short text cost beside the model's own work, on a CPU, and how much of it is kept?

100,000 texts of five words go through `compute`, as a list and as a generator, with a small random
Llama and the bundled tokenizer. Microseconds per text are those of the whole call, without its
forward passes and without the output layer and its reduction. Bytes per text are what the peak of
Python's memory grows by for each text of a generator.

    python benchmarks/bench_short_texts.py --before path/to/another/checkout

Each run has a process of its own, those of the two checkouts in turn.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import evaluate
import torch
from report import ROOT, environment, table, write_section
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

NUM_TEXTS = 100_000
NUM_WORDS = 5


def make_texts(num_texts: int) -> list[str]:
    """Words of the bundled model's held-out documents, drawn at random."""
    lines = (ROOT / "tiny_model" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["text"] for line in lines).split()
    rng = random.Random(0)
    return [" ".join(rng.choices(words, k=NUM_WORDS)) for _ in range(num_texts)]


def load(checkout: Path) -> tuple[evaluate.Metric, dict]:
    """The metric of a checkout, and the model to call it with."""
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    ppl = evaluate.load(str(checkout / "perplexity.py"))
    return ppl, {"model": LlamaForCausalLM(config), "tokenizer": tokenizer}


class Clock:
    """Seconds spent in the functions that it wraps."""

    def __init__(self):
        self.seconds = 0.0

    def wrap(self, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def microseconds_per_text(checkout: Path, num_texts: int, as_generator: bool) -> dict[str, float]:
    """Of the model, and of all else in the call."""
    ppl, model = load(checkout)
    texts = make_texts(num_texts)
    ppl.compute(predictions=texts[:100], **model)
    clock = Clock()
    from ppleval.models import language_model  # of the library that the checkout led to

    for name in ("run", "launch_rows"):
        setattr(language_model, name, clock.wrap(getattr(language_model, name)))
    predictions = (text for text in texts) if as_generator else texts
    start = time.perf_counter()
    ppl.compute(predictions=predictions, **model)
    seconds = time.perf_counter() - start
    return {
        "model": clock.seconds / num_texts * 1e6,
        "else": (seconds - clock.seconds) / num_texts * 1e6,
    }


def bytes_per_text(checkout: Path, num_texts: int) -> float:
    """How much the peak of Python's memory grows with each text of a generator."""
    ppl, model = load(checkout)
    some = make_texts(1000)

    def peak(num_texts: int) -> int:
        tracemalloc.start()
        ppl.compute(predictions=_repeated(some, num_texts), **model)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few = num_texts // 5
    peak(few)  # warm up
    return (peak(num_texts) - peak(few)) / (num_texts - few)


def _repeated(some: list[str], num_texts: int) -> Iterator[str]:
    """Each text is a new string: one that is kept shows in the memory."""
    return (some[i % len(some)] + "." for i in range(num_texts))


RUNS = {
    "list": lambda checkout, num: microseconds_per_text(checkout, num, as_generator=False),
    "generator": lambda checkout, num: microseconds_per_text(checkout, num, as_generator=True),
    "bytes": bytes_per_text,
}


def in_own_process(name: str, checkout: Path, num_texts: int) -> dict[str, float] | float:
    command = [sys.executable, __file__, "--run", name, "--before", checkout]
    command += ["--texts", str(num_texts)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def bench(checkouts: dict[str, Path], num_texts: int, rounds: int) -> str:
    runs: dict[tuple[str, str], list] = {(of, name): [] for name in RUNS for of in checkouts}
    for round_number in range(rounds):
        for (of, name), found in runs.items():
            if name != "bytes" or round_number == 0:  # the same each time
                found.append(in_own_process(name, checkouts[of], num_texts))
    rows = []
    for of in checkouts:
        row = [of]
        for name in ("list", "generator"):
            seconds = [run["else"] for run in runs[of, name]]
            row.append(f"{statistics.median(seconds):.1f} ({min(seconds):.1f}-{max(seconds):.1f})")
        row.append(f"{statistics.median(run['model'] for run in runs[of, 'list']):.1f}")
        rows.append([*row, f"{runs[of, 'bytes'][0]:,.0f}"])
    header = ["", "list, µs per text", "generator, µs per text", "model, µs per text"]
    return (
        f"{num_texts:,} texts of {NUM_WORDS} words. Medians of {rounds} rounds and their range, "
        "without the model's own time, which stands in a column of its own.\n\n"
        f"{table([*header, 'bytes kept per text'], rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--texts", type=int, default=NUM_TEXTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        print(json.dumps(RUNS[args.run](args.before, args.texts)))
        return
    checkouts = {"this module": ROOT} | ({"before": args.before} if args.before else {})
    body = environment(["torch", "transformers"]) + "\n"
    body += bench(checkouts, args.texts, args.rounds)
    write_section("Many short texts (bench_short_texts.py)", body)


if __name__ == "__main__":
    main()
