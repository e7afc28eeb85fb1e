"""Which operations of torch reduce a block of logits fastest on a CPU, without a compiler?

What `ppleval/logits/torch_kernel.py` is made of, next to what was tried and not kept. The raw
operations only; what they cost in the module is in bench_nll.py.

    python benchmarks/bench_cpu_kernel.py
"""

import functools
import statistics
from collections.abc import Callable

import torch
from report import environment, interleaved, table, write_section

NUM_ROWS, VOCAB_SIZE = 1000, 50257
WIDE_ROWS, WIDE_VOCAB_SIZE, WIDTH = 190, 262144, 65536
BLOCK = 20  # rows of the narrow one: 4 MB of float32
REPEATS = 11
CALLS = 100  # of what takes microseconds
KEPT = torch.empty(2**24)
SECOND = torch.empty(2**24)
# Read between any two measurements, so that no logits are left in a cache.
OTHER_DATA = torch.ones(2**26)


def buffer_like(block: torch.Tensor, memory: torch.Tensor = KEPT) -> torch.Tensor:
    return memory[: block.numel()].view(block.shape)


def kept(block):
    torch.log_softmax(block, -1, out=buffer_like(block))


def fresh(block, memory):
    torch.log_softmax(block, -1, out=memory[: len(block)])


def upcast_in_place(block):
    upcast = buffer_like(block).copy_(block)
    torch.log_softmax(upcast, -1, out=upcast)


def upcast_into_another(block):
    upcast = buffer_like(block).copy_(block)
    torch.log_softmax(upcast, -1, out=buffer_like(block, SECOND))


def by_hand(block):
    buffer = buffer_like(block)
    torch.sub(block, block.amax(-1, keepdim=True), out=buffer)
    buffer.exp_().sum(-1).log_()


def without_maximum(block):
    torch.exp(block, out=buffer_like(block)).sum(-1).log_()


def mkldnn(block):
    torch.softmax(block.to_mkldnn(), -1)


def in_pieces(block, width=WIDTH):
    pieces = block.view(-1, width)
    log_probs = torch.log_softmax(pieces, -1, out=buffer_like(pieces))
    (pieces[:, 0] - log_probs[:, 0]).view(len(block), -1).logsumexp(-1)


def in_tiles(block):
    lse = []
    for tile in block.split(WIDTH, -1):
        copied = buffer_like(tile).copy_(tile)
        first = copied[:, 0].clone()
        lse.append(first - torch.log_softmax(copied, -1, out=copied)[:, 0])
    torch.stack(lse, -1).logsumexp(-1)


def over_blocks(function: Callable, logits: torch.Tensor, num_rows: int) -> None:
    for block in logits.split(num_rows):
        function(block)


def with_fresh_memory(logits: torch.Tensor) -> None:
    memory = torch.empty(BLOCK, VOCAB_SIZE)
    over_blocks(functools.partial(fresh, memory=memory), logits, BLOCK)


def in_halves(row: torch.Tensor) -> None:
    in_pieces(row, row.shape[-1] // 2)


def over_and_over(function: Callable, row: torch.Tensor) -> None:
    for _ in range(CALLS):
        function(row)


def measure(title: str, methods: dict[str, Callable], calls: int = 1) -> str:
    """A table of the median times of a call, where a method makes so many calls."""
    seconds = {
        name: [value / calls for value in values]
        for name, values in interleaved(methods, REPEATS, between=OTHER_DATA.sum).items()
    }
    first = statistics.median(next(iter(seconds.values())))
    rows = [
        [
            name,
            f"{statistics.median(values) * 1e3:.3g}",
            f"{min(values) * 1e3:.3g} to {max(values) * 1e3:.3g}",
            f"{statistics.median(values) / first:.2f}",
        ]
        for name, values in seconds.items()
    ]
    return f"### {title}\n\n{table(['', 'median ms', 'range', 'relative'], rows)}"


def main() -> None:
    torch.manual_seed(0)
    logits = torch.randn(NUM_ROWS, VOCAB_SIZE)
    half = logits.bfloat16()
    wide = torch.randn(WIDE_ROWS, WIDE_VOCAB_SIZE)
    run = functools.partial
    narrow = {
        "log_softmax into one buffer (torch_kernel.py)": run(with_fresh_memory, logits),
        "the same, the buffer kept from call to call": run(over_blocks, kept, logits, BLOCK),
        "the same, 2 rows at a time": run(over_blocks, kept, logits, 2),
        "the same, 8 rows": run(over_blocks, kept, logits, 8),
        "the same, 64 rows": run(over_blocks, kept, logits, 64),
        "amax, sub, exp, sum": run(over_blocks, by_hand, logits, BLOCK),
        "exp, sum, without the maximum": run(over_blocks, without_maximum, logits, BLOCK),
        "oneDNN's softmax": run(over_blocks, mkldnn, logits, BLOCK),
        "x.sum(), the read limit": logits.sum,
    }
    low = {
        "upcast, log_softmax in place (torch_kernel.py)": run(
            over_blocks, upcast_in_place, half, BLOCK
        ),
        "into a second buffer": run(over_blocks, upcast_into_another, half, BLOCK),
        "x.sum(), the read limit": half.sum,
    }
    wider = {
        "pieces of 65536, 16 rows at a time (torch_kernel.py)": run(
            over_blocks, in_pieces, wide, 16
        ),
        "the same, 4 rows at a time": run(over_blocks, in_pieces, wide, 4),
        "whole rows, errors of 2e-5 to 5e-5 nats, not 1e-6": run(over_blocks, kept, wide, 4),
        "copied tiles of 65536": run(over_blocks, in_tiles, wide, 16),
    }
    row = wide[:1].clone()
    short = row[:, :50258].clone()
    one = {
        "a row of 50258 on one core": run(over_and_over, kept, short),
        "the same, halves on two cores": run(over_and_over, in_halves, short),
        "a row of 262144 on one core": run(over_and_over, kept, row),
        "the same, halves on two cores (torch_kernel.py: quarters)": run(
            over_and_over, in_halves, wide[:1].clone()
        ),
    }
    parts = [
        environment(["torch"]),
        f"Medians of {REPEATS} interleaved rounds. The machine is shared: compare ratios.",
        measure(f"float32, {NUM_ROWS} x {VOCAB_SIZE}", narrow),
        measure(f"bfloat16, {NUM_ROWS} x {VOCAB_SIZE}", low),
        measure(f"float32, {WIDE_ROWS} x {WIDE_VOCAB_SIZE}", wider),
        measure("float32, a single row, of which the cache keeps a copy", one, CALLS),
    ]
    write_section("Blocks of logits on a CPU (bench_cpu_kernel.py)", "\n\n".join(parts))


if __name__ == "__main__":
    main()
