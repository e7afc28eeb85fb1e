"""How fast, and with how much memory, do logits become a perplexity on a CPU?

This module through `ppl.compute`, against what people write by hand and against the metrics of
torchmetrics and torcheval, on the same logits, interleaved in one process; and against an
evaluate.Metric that lets its logits pass through Arrow, as evaluate's own do.

    python benchmarks/bench_nll.py
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys

os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
import torcheval.metrics.functional
import torchmetrics.functional.text
from report import (
    ROOT,
    busy_machine,
    environment,
    interleaved,
    peak_mb_since_start,
    start_of_peak_mb,
    table,
    write_section,
)

BUSY_ROUNDS = 11
ELEMENTS = 50_000_000  # logits of one timing: 200 MB in float32, far beyond any cache
REPEATS = 15
MEMORY_ROWS = 5_000  # x 50257 x 4 bytes = 1.005 GB
ARROW_ROWS = 100  # x 50257: about a second, and 230 MB


@functools.cache
def metric() -> evaluate.Metric:
    return evaluate.load(str(ROOT / "perplexity.py"))


@functools.cache
def compiled():
    @torch.compile(dynamic=True)
    def nll(logits, targets):
        logits = logits.float()
        taken = logits.gather(1, targets[:, None]).squeeze(1)
        return (torch.logsumexp(logits, -1) - taken).mean()

    return nll


# Each takes logits (N, V) and targets (N,) and gives the perplexity.
METHODS = {
    "perplexity (this module)": lambda x, y: metric().compute(
        predictions=x[None], references=y[None]
    )["perplexity"],
    "F.cross_entropy(x)": lambda x, y: F.cross_entropy(x, y).exp().item(),
    "F.cross_entropy(x.float())": lambda x, y: F.cross_entropy(x.float(), y).exp().item(),
    "torch.compile(logsumexp - x[y])": lambda x, y: compiled()(x, y).exp().item(),
    "torchmetrics": lambda x, y: torchmetrics.functional.text.perplexity(x[None], y[None]).item(),
    "torcheval": lambda x, y: torcheval.metrics.functional.perplexity(x[None], y[None]).item(),
}
READ_LIMIT = "x.sum(), the read limit"
THIS = next(iter(METHODS))


class ArrowPerplexity(evaluate.Metric):
    """The usual way to write an evaluate metric: what is passed is stored in Arrow."""

    def _info(self):
        logits = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        references = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="",
            citation="",
            features=datasets.Features({"predictions": logits, "references": references}),
        )

    def _compute(self, predictions, references):
        x, y = torch.tensor(np.array(predictions)), torch.tensor(np.array(references))
        return {"perplexity": F.cross_entropy(x.flatten(0, 1), y.flatten()).exp().item()}


def random_logits(num_rows: int, vocab_size: int, dtype: torch.dtype):
    torch.manual_seed(0)
    logits = torch.randn(num_rows, vocab_size).to(dtype)
    return logits, torch.randint(vocab_size, (num_rows,))


def bench_speed(dtype: torch.dtype, vocab_size: int, num_rows: int) -> str:
    logits, targets = random_logits(num_rows, vocab_size, dtype)
    truth = F.cross_entropy(logits.double(), targets).item()
    errors = {
        name: abs(float(np.log(method(logits, targets))) - truth)
        for name, method in METHODS.items()
    }
    calls = {name: functools.partial(method, logits, targets) for name, method in METHODS.items()}
    seconds = interleaved({**calls, READ_LIMIT: logits.sum}, REPEATS)
    num_bytes = logits.numel() * logits.element_size()  # every logit read once
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio = median / statistics.median(seconds[THIS])
        rows.append(
            [
                name,
                f"{median * 1e3:.1f}",
                f"{min(values) * 1e3:.1f} to {max(values) * 1e3:.1f}",
                f"{num_bytes / median / 1e9:.1f}",
                f"{ratio:.2f}",
                f"{errors[name]:.0e}" if name in errors else "",
            ]
        )
    header = ["", "median ms", "range", "GB/s", "time / this module's", "error of the mean, nats"]
    name = str(dtype).removeprefix("torch.")
    return f"### {name}, {num_rows} x {vocab_size}\n\n{table(header, rows)}"


def bench_busy(dtype: torch.dtype) -> str:
    """Beside processes that keep one core busy each, as data loaders and other jobs do."""
    logits, targets = random_logits(1000, 50257, dtype)
    calls = {
        name: functools.partial(method, logits, targets)
        for name, method in METHODS.items()
        if name not in ("torchmetrics", "torcheval")
    }
    columns = []
    for num_processes in (0, 1, 2):
        with busy_machine(num_processes):
            seconds = interleaved(calls, BUSY_ROUNDS)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        columns.append(
            {name: f"{m * 1e3:.0f} ({m / medians[THIS]:.2f})" for name, m in medians.items()}
        )
    rows = [[name, *(column[name] for column in columns)] for name in calls]
    header = ["median ms (time / this module's)", "alone", "beside 1", "beside 2"]
    name = str(dtype).removeprefix("torch.")
    return f"### Beside busy processes, {name}, 1000 x 50257\n\n{table(header, rows)}"


def bench_arrow() -> str:
    logits, targets = random_logits(1000, 50257, torch.float32)
    large = {"predictions": logits[None], "references": targets[None]}
    small = {name: value[:, :ARROW_ROWS] for name, value in large.items()}
    arrays = {name: value.numpy() for name, value in small.items()}
    lists = {name: value.tolist() for name, value in small.items()}
    arrow = ArrowPerplexity()
    this = "this module, tensor of 1000 rows"
    inputs = {
        this: (metric(), large),
        f"this module, tensor of {ARROW_ROWS} rows": (metric(), small),
        f"through Arrow, tensor of {ARROW_ROWS} rows": (arrow, small),
        f"through Arrow, array of {ARROW_ROWS} rows": (arrow, arrays),
        f"through Arrow, nested lists of {ARROW_ROWS} rows": (arrow, lists),
    }
    methods = {
        name: functools.partial(module.compute, **data) for name, (module, data) in inputs.items()
    }
    per_logit = {
        name: statistics.median(values) / np.asarray(inputs[name][1]["predictions"]).size
        for name, values in interleaved(methods, 7).items()
    }
    rows = [
        [name, f"{seconds * 1e9:.2f}", f"{seconds / per_logit[this]:.0f}"]
        for name, seconds in per_logit.items()
    ]
    header = ["", "ns per logit", "relative"]
    return f"### A plain evaluate.Metric, float32, V = 50257\n\n{table(header, rows)}"


def peak_extra_mb(name: str, dtype: torch.dtype) -> float:
    """Run as a process of its own: how far the peak rises above the logits, in MB (10^6 bytes)."""
    small = random_logits(8, 50257, dtype)
    METHODS[name](*small)  # imports, thread pools and compilation are not what is measured
    logits, targets = random_logits(MEMORY_ROWS, 50257, dtype)
    before = start_of_peak_mb()
    METHODS[name](logits, targets)
    return peak_mb_since_start() - before


def bench_memory() -> str:
    rows = []
    for name in METHODS:
        figures = []
        for dtype in ("float32", "bfloat16"):
            command = [sys.executable, __file__, "--memory-of", name, "--dtype", dtype]
            figures.append(subprocess.run(command, check=True, capture_output=True, text=True))
        rows.append([name, *(f"{json.loads(f.stdout.splitlines()[-1]):.0f}" for f in figures)])
    header = ["", "float32 logits (1005 MB)", "bfloat16 logits (503 MB)"]
    return f"### Peak extra memory in MB, {MEMORY_ROWS} x 50257\n\n{table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of is not None:
        print(json.dumps(peak_extra_mb(args.memory_of, getattr(torch, args.dtype))))
        return
    parts = [environment(["torch", "evaluate", "datasets", "torchmetrics", "torcheval"])]
    parts.append(
        "Medians of 15 interleaved rounds, 11 beside busy processes. The machine is shared:"
    )
    parts[-1] += " compare ratios."
    for dtype in (torch.float32, torch.bfloat16):
        parts.append(bench_speed(dtype, 50257, 1000))
        for vocab_size in (32000, 151936):
            parts.append(bench_speed(dtype, vocab_size, ELEMENTS // vocab_size))
    parts += [bench_busy(dtype) for dtype in (torch.float32, torch.bfloat16)]
    parts += [bench_arrow(), bench_memory()]
    write_section("Logits to perplexity on a CPU (bench_nll.py)", "\n\n".join(parts))


if __name__ == "__main__":
    main()
