"""How fast do the CUDA kernels reduce logits, and an output layer, next to everybody else's?

First every method is checked against float64; then all are timed, on the same inputs, on one card:
torch, `torch.compile`, torchmetrics, Liger, QuACK and cut-cross-entropy, as far as they can be
imported. A method that fails stands in the tables with its error.

    python benchmarks/bench_gpu.py [--quick]

It needs torch with CUDA and Triton, but neither evaluate nor transformers.
"""

import argparse
import functools
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from report import ROOT, environment, table, write_section

sys.path.insert(0, str(ROOT))  # the machine with the card may have a clone and no installation

from ppleval.logits import kernels, output_layer, triton_kernel

DEVICE = "cuda"
VOCAB_SIZES = (32000, 32768, 50257, 128256, 151936, 262144)
NUM_ROWS = (1, 16, 256, 4096, 16384)
DTYPES = (torch.bfloat16, torch.float32)
# Inputs are taken in turn from so many bytes: many times the cache of any card.
POOL_BYTES = 2**30
SAMPLES = 21
HIDDEN_SIZE, LINEAR_VOCAB_SIZE, LINEAR_ROWS = 4096, 131072, 8192
TOLERANCE = {"nll": 1e-5, "linear": 1e-4}  # nats, of this module against float64
THIS = "this module"


def launched(logits, targets, backend="triton", with_all=False):
    scored = torch.ones_like(targets, dtype=torch.bool)
    return kernels.launch(logits, targets, scored, backend=backend, with_all=with_all).stats.nll


def one_program_per_row(logits, targets):
    programs, triton_kernel.NUM_PROGRAMS = triton_kernel.NUM_PROGRAMS, 1
    try:
        return launched(logits, targets)
    finally:
        triton_kernel.NUM_PROGRAMS = programs


@functools.cache
def compiled():
    @torch.compile
    def token_nll(logits, targets):
        logits = logits.float()
        return torch.logsumexp(logits, -1) - logits.gather(1, targets[:, None]).squeeze(1)

    return token_nll


def torchmetrics(logits, targets):
    from torchmetrics.functional.text import perplexity

    return perplexity(logits[None], targets[None]).log()[None]


def liger(logits, targets):
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, targets, reduction="none")


def quack(logits, targets):
    from quack.cross_entropy import cross_entropy_fwd

    return cross_entropy_fwd(logits, targets)


# Logits (N, V) and targets (N,) -> nll (N,), or its mean (1,).
LOGIT_METHODS: dict[str, Callable] = {
    THIS: launched,
    "this module, one program per row": one_program_per_row,
    "this module, with lse, entropy and rank": functools.partial(launched, with_all=True),
    "this module, backend torch": functools.partial(launched, backend="torch"),
    "F.cross_entropy(x.float())": lambda x, y: F.cross_entropy(x.float(), y, reduction="none"),
    "F.cross_entropy(x)": lambda x, y: F.cross_entropy(x, y, reduction="none"),
    "torch.compile(logsumexp - x[y])": lambda x, y: compiled()(x, y),
    "torchmetrics": torchmetrics,
    "Liger": liger,
    "QuACK": quack,
}


def liger_linear(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def cut(hidden, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, reduction="none")


# Hidden states (N, H), weight (V, H) and targets (N,) -> nll (N,).
LINEAR_METHODS: dict[str, Callable] = {
    THIS: lambda h, w, y: output_layer.linear_token_nll(h, w, y),
    "this module, backend torch": lambda h, w, y: output_layer.linear_token_nll(
        h, w, y, backend="torch"
    ),
    "F.cross_entropy(F.linear(h, w))": lambda h, w, y: F.cross_entropy(
        F.linear(h, w), y, reduction="none"
    ),
    "F.linear_cross_entropy": lambda h, w, y: F.linear_cross_entropy(h, w, y, reduction="none"),
    "Liger": liger_linear,
    "cut-cross-entropy": cut,
}


def pool(num_rows: int, vocab_size: int, dtype: torch.dtype) -> list[tuple]:
    """Random logits and targets, POOL_BYTES of them or one batch that is larger."""
    size = max(1, POOL_BYTES // (num_rows * vocab_size * dtype.itemsize))
    logits = torch.randn(size * num_rows, vocab_size, dtype=dtype, device=DEVICE)
    targets = torch.randint(vocab_size, (size * num_rows,), device=DEVICE)
    return list(zip(logits.split(num_rows), targets.split(num_rows), strict=True))


def device_ms(call: Callable, inputs: list[tuple]) -> list[float]:
    """Milliseconds that the device works on a call, once for each sample.

    A pause on the device lets the host queue the whole call before its time begins, so that the
    time of launching is not in it.
    """
    times = []
    for i in range(-3, SAMPLES):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(2_000_000)  # cycles: about 1 ms
        events[0].record()
        call(*inputs[i % len(inputs)])
        events[1].record()
        torch.cuda.synchronize()
        if i >= 0:
            times.append(events[0].elapsed_time(events[1]))
    return times


def host_us(call: Callable, inputs: list[tuple]) -> float:
    """Median microseconds until a call returns, which for a few rows are all that counts."""
    times = []
    for i in range(SAMPLES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(*inputs[i % len(inputs)])
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def peak_extra_mib(call: Callable, arguments: tuple) -> float:
    """How far a call raises the memory in use above its arguments, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(*arguments)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.randn(2**30, device=DEVICE)
    target = torch.empty_like(source)
    times = device_ms(lambda s: target.copy_(s), [(source,)])
    return 2 * source.nbytes / (statistics.median(times) / 1e3)


def errors_of(methods: dict[str, Callable], arguments: tuple, expected: torch.Tensor) -> dict:
    """The largest error of each method in nats against float64, or what went wrong with it."""
    errors = {}
    for name, method in methods.items():
        before = [argument.clone() for argument in arguments]
        try:
            found = method(*arguments).double()
        except Exception as error:  # whatever it is, it belongs into the table
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:60]
            continue
        changed = any(not torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
        if changed:
            errors[name] = "changes its input"
            for argument, value in zip(arguments, before, strict=True):
                argument.copy_(value)
            continue
        truth = expected.mean() if found.numel() == 1 else expected
        errors[name] = float((found - truth).abs().max())
    return errors


def check(errors: dict, tolerance: float, what: str) -> None:
    """Stop where this module is wrong, before anything is timed."""
    for name, error in errors.items():
        if name.startswith(THIS) and not (isinstance(error, float) and error <= tolerance):
            raise SystemExit(f"{what}: the error of {name} is {error}, not below {tolerance} nats.")


def shown(error) -> str:
    return f"{error:.0e}" if isinstance(error, float) else error


def bench_logits(dtype: torch.dtype, vocab_size: int, num_rows: int, bandwidth: float) -> list:
    inputs = pool(num_rows, vocab_size, dtype)
    logits, targets = inputs[0]
    expected = torch.cat(  # a few rows at a time: float64 of all would not fit
        [
            F.cross_entropy(x.double(), y, reduction="none")
            for x, y in zip(logits.split(256), targets.split(256), strict=True)
        ]
    )
    errors = errors_of(LOGIT_METHODS, (logits, targets), expected)
    check(errors, TOLERANCE["nll"], f"{dtype}, {num_rows} x {vocab_size}")
    num_bytes = num_rows * vocab_size * dtype.itemsize  # every logit read once
    rows, this_ms = [], None
    for name, method in LOGIT_METHODS.items():
        if not isinstance(errors[name], float):
            rows.append([name, "", "", "", "", "", errors[name]])
            continue
        times = device_ms(method, inputs)
        median = statistics.median(times)
        this_ms = this_ms or median  # this module is the first
        rate = num_bytes / (median / 1e3)
        rows.append(
            [
                name,
                f"{median * 1e3:.1f}",
                f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}",
                f"{host_us(method, inputs):.0f}",
                f"{rate / 1e9:.0f} ({rate / bandwidth:.0%})",
                f"{median / this_ms:.2f}",
                shown(errors[name]),
            ]
        )
    return rows


def bench_linear(num_rows: int, vocab_size: int, hidden_size: int) -> str:
    hidden = torch.randn(num_rows, hidden_size, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocab_size, hidden_size, device=DEVICE) / hidden_size**0.5
    weight = (3 * weight).bfloat16()
    targets = torch.randint(vocab_size, (num_rows,), device=DEVICE)
    expected = torch.cat(  # float32 products: float64 ones take minutes
        [
            F.cross_entropy((h.float() @ weight.float().t()).double(), y, reduction="none")
            for h, y in zip(hidden.split(256), targets.split(256), strict=True)
        ]
    )
    arguments = (hidden, weight, targets)
    errors = errors_of(LINEAR_METHODS, arguments, expected)
    check(errors, TOLERANCE["linear"], f"{num_rows} x {hidden_size} x {vocab_size}")
    logits = torch.empty(num_rows, vocab_size, dtype=torch.bfloat16, device=DEVICE)
    bare = "torch.mm alone, bfloat16 logits"
    methods = {bare: lambda h, w, y: torch.mm(h, w.t(), out=logits), **LINEAR_METHODS}
    flops = 2 * num_rows * vocab_size * hidden_size
    rows, bare_ms = [], None
    for name, method in methods.items():
        error = errors.get(name, "")
        if error != "" and not isinstance(error, float):
            rows.append([name, "", "", "", "", error])
            continue
        median = statistics.median(device_ms(method, [arguments]))
        bare_ms = bare_ms or median
        rows.append(
            [
                name,
                f"{median:.2f}",
                f"{flops / (median / 1e3) / 1e12:.0f}",
                f"{median / bare_ms:.2f}",
                "" if name == bare else f"{peak_extra_mib(method, arguments):.0f}",
                shown(error),
            ]
        )
    header = ["", "median ms", "TFLOP/s", "time / torch.mm", "extra MiB", "largest error, nats"]
    title = f"### Output layer, bfloat16, {num_rows} x {hidden_size} x {vocab_size}"
    return f"{title}\n\n{table(header, rows)}"


def versions() -> list[str]:
    names = ["torch", "triton", "torchmetrics", "liger-kernel", "quack-kernels"]
    names.append("cut-cross-entropy")
    found = []
    for name in names:
        try:
            importlib.metadata.version(name)
            found.append(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three vocabularies, and fewer rows")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu.py needs a CUDA device.")
    torch.manual_seed(0)
    vocab_sizes = (32000, 50257, 151936) if args.quick else VOCAB_SIZES
    num_rows = (1, 256, 4096) if args.quick else NUM_ROWS
    card = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth()
    parts = [
        environment(versions()),
        f"- card: {card.name}, {card.multi_processor_count} multiprocessors; a copy reads and "
        f"writes {bandwidth / 1e9:.0f} GB/s\n",
        f"Medians of {SAMPLES} calls on inputs taken in turn from {POOL_BYTES / 2**30:.0f} GiB; "
        "the time is that of the device, host µs are until the call returns. GB/s count each logit "
        "once, with their share of the bandwidth of the copy.",
    ]
    header = ["", "median µs", "range", "host µs", "GB/s", "time / this", "largest error, nats"]
    for dtype in DTYPES:
        for vocab_size in vocab_sizes:
            for rows in num_rows:
                figures = table(header, bench_logits(dtype, vocab_size, rows, bandwidth))
                name = str(dtype).removeprefix("torch.")
                parts.append(f"### {name}, {rows} x {vocab_size}\n\n{figures}")
                print(parts[-1], flush=True)
                torch.cuda.empty_cache()
    parts.append(bench_linear(LINEAR_ROWS, LINEAR_VOCAB_SIZE, HIDDEN_SIZE))
    write_section("Logits to nll on a GPU (bench_gpu.py)", "\n\n".join(parts))


if __name__ == "__main__":
    main()
