"""How fast, and with how much memory, do token_nll and linear_token_nll train on a CPU?

A forward and a backward pass against F.cross_entropy's on the same tensors, interleaved in one
process; the peak memory of each in a process of its own; and the loss of a model of the bundled
model's shape after some steps with each.

    python benchmarks/bench_gradients.py
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")

import evaluate
import torch
import torch.nn.functional as F
from report import (
    ROOT,
    environment,
    interleaved,
    peak_mb_since_start,
    start_of_peak_mb,
    table,
    write_section,
)
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

NUM_ROWS, VOCAB_SIZE = 5000, 50257  # 1.005 GB of float32
LAYER_ROWS, HIDDEN_SIZE = 2048, 512
REPEATS = 3
STEPS, BATCH_SIZE, LENGTH = 60, 8, 128

ppl = functools.cache(lambda: evaluate.load(str(ROOT / "perplexity.py")))


def cross_entropy_of_layer(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets)


# Each takes the tensors of its kind of input and gives the mean nll.
OF_LOGITS = {
    "token_nll": lambda x, y: ppl().token_nll(x, y).mean(),
    "F.cross_entropy(x)": F.cross_entropy,
    "F.cross_entropy(x.float())": lambda x, y: F.cross_entropy(x.float(), y),
}
OF_LAYER = {
    "linear_token_nll": lambda h, w, y: ppl().linear_token_nll(h, w, y).mean(),
    "F.cross_entropy(F.linear(h, w))": cross_entropy_of_layer,
}
METHODS = {"float32": OF_LOGITS, "bfloat16": OF_LOGITS, "layer": OF_LAYER}
TITLES = {
    "float32": f"float32 logits, {NUM_ROWS} x {VOCAB_SIZE}",
    "bfloat16": f"bfloat16 logits, {NUM_ROWS} x {VOCAB_SIZE}",
    "layer": f"Hidden states {LAYER_ROWS} x {HIDDEN_SIZE}, weight {VOCAB_SIZE} x {HIDDEN_SIZE}",
}


def inputs_of(kind: str, num_rows: int) -> list[torch.Tensor]:
    """The tensors that require gradients, and the targets."""
    torch.manual_seed(0)
    targets = torch.randint(VOCAB_SIZE, (num_rows,))
    if kind == "layer":
        weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE) / HIDDEN_SIZE**0.5
        return [
            torch.randn(num_rows, HIDDEN_SIZE).requires_grad_(),
            weight.requires_grad_(),
            targets,
        ]
    return [torch.randn(num_rows, VOCAB_SIZE).to(getattr(torch, kind)).requires_grad_(), targets]


def both_passes(method: Callable, inputs: list[torch.Tensor]) -> None:
    method(*inputs).backward()
    for tensor in inputs:
        tensor.grad = None


def bench_kind(kind: str) -> str:
    """A table of times, of errors against float64, and of memory."""
    inputs = inputs_of(kind, LAYER_ROWS if kind == "layer" else NUM_ROWS)
    calls = {}
    for name, method in METHODS[kind].items():
        calls[name, "forward"] = functools.partial(method, *inputs)
        calls[name, "both"] = functools.partial(both_passes, method, inputs)
    medians = {key: statistics.median(v) for key, v in interleaved(calls, REPEATS).items()}
    del inputs, calls
    first = next(iter(METHODS[kind]))
    rows = [
        [
            name,
            f"{medians[name, 'forward'] * 1e3:.0f}",
            f"{medians[name, 'both'] * 1e3:.0f}",
            f"{medians[name, 'both'] / medians[first, 'both']:.2f}",
            f"{error_of(kind, name):.0e}",
            f"{memory_of(kind, name):.0f}",
        ]
        for name in METHODS[kind]
    ]
    header = ["", "forward ms", "forward and backward ms", "both / this module's"]
    header += ["largest error / largest gradient", "peak MB above the inputs"]
    return f"### {TITLES[kind]}\n\n{table(header, rows)}"


def error_of(kind: str, name: str) -> float:
    """Of the first input's gradient, for a few rows, against float64."""
    *inputs, targets = inputs_of(kind, 64)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    METHODS[kind][name](*inputs, targets).backward()
    reference = cross_entropy_of_layer if kind == "layer" else F.cross_entropy
    reference(*exact, targets).backward()
    error = (inputs[0].grad.double() - exact[0].grad).abs().max()
    return (error / exact[0].grad.abs().max()).item()


def memory_of(kind: str, name: str) -> float:
    command = [sys.executable, __file__, "--memory-of", name, "--kind", kind]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def peak_mb(kind: str, name: str) -> float:
    """Run as a process of its own: how far the peak rises above the inputs, in MB (10^6 bytes)."""
    method = METHODS[kind][name]
    both_passes(method, inputs_of(kind, 8))  # imports and thread pools are not what is measured
    inputs = inputs_of(kind, LAYER_ROWS if kind == "layer" else NUM_ROWS)
    before = start_of_peak_mb()
    method(*inputs).backward()
    return peak_mb_since_start() - before


def training_losses(loss_of: Callable) -> list[float]:
    """The loss of each step; loss_of: hidden, weight, targets -> mean nll."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(ROOT / "tiny_model"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_model")
    lines = (ROOT / "tiny_model" / "held_out.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    stream = torch.tensor([i for ids in tokenizer(texts, verbose=False).input_ids for i in ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(STEPS):
        offsets = torch.randint(len(stream) - LENGTH - 1, (BATCH_SIZE,))
        ids = torch.stack([stream[i : i + LENGTH + 1] for i in offsets.tolist()])
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        loss = loss_of(hidden.flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def bench_training() -> str:
    losses = {name: training_losses(method) for name, method in OF_LAYER.items()}
    shown = [0, STEPS // 2 - 1, STEPS - 1]
    rows = [[name, *(f"{values[i]:.6f}" for i in shown)] for name, values in losses.items()]
    ours, other = losses.values()
    largest = max(abs(a - b) for a, b in zip(ours, other, strict=True))
    header = ["", *(f"loss of step {i + 1}" for i in shown)]
    return (
        f"### A model of the bundled model's shape, {STEPS} steps of {BATCH_SIZE} x {LENGTH}\n\n"
        f"{table(header, rows)}\nLargest difference of any step: {largest:.0e} nats.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of is not None:
        print(json.dumps(peak_mb(args.kind, args.memory_of)))
        return
    parts = [environment(["torch", "evaluate", "transformers"])]
    parts.append(
        f"Medians of {REPEATS} interleaved rounds. The machine is shared: compare ratios. The "
        "peak above the inputs has the gradients themselves in it."
    )
    parts += [bench_kind(kind) for kind in METHODS]
    parts.append(bench_training())
    write_section("Gradients on a CPU (bench_gradients.py)", "\n\n".join(parts))


if __name__ == "__main__":
    main()
