"""What tests share: an offline environment, random batches, oracles, and processes to start."""

import contextlib
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Before evaluate and transformers are imported, which read these once. The caches of the person
# who runs the tests are neither read nor written.
WITH_NETWORK = "PERPLEXITY_TEST_NETWORK" in os.environ
os.environ["HF_HUB_OFFLINE"] = "0" if WITH_NETWORK else "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
os.environ["MPLBACKEND"] = "agg"  # no windows
_CACHE = tempfile.TemporaryDirectory(prefix="perplexity-tests-")
os.environ["HF_HOME"] = _CACHE.name

import torch

if not torch.cuda.is_available():
    # Before Triton is imported, as evaluate does: its kernels then run in NumPy.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(ROOT / "perplexity.py")
# Programs of tests/workers/ find what pytest finds: the modules of the root, and this one.
PYTHONPATH = os.pathsep.join(sys.path)


def load(**options):
    """The metric, as `evaluate.load` gives it with these options."""
    import evaluate

    return evaluate.load(SCRIPT, **options)


def random_rows(num_rows, vocab_size, dtype=torch.float32, seed=0, scale=3.0):
    """Logits (N, V) and targets (N,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_rows, vocab_size, generator=generator)
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    return logits.to(dtype), targets


def random_batch(batch=3, length=7, vocab_size=11, seed=0, dtype=torch.float32):
    """Logits (B, T, V) and targets (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, length, vocab_size, generator=generator)
    targets = torch.randint(vocab_size, (batch, length), generator=generator)
    return logits.to(dtype), targets


def reference_nll(logits, targets) -> torch.Tensor:
    """Oracle: torch's cross entropy of float64 logits, nats, shape of the targets."""
    flat = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, -2), targets.flatten(), reduction="none"
    )
    return flat.view(targets.shape)


def reference_perplexity(logits, targets, weights=None) -> float:
    nll = reference_nll(logits, targets).numpy()
    weights = np.ones_like(nll) if weights is None else np.broadcast_to(weights, nll.shape)
    return float(np.exp((nll * weights).sum() / weights.sum()))


def flat(values: dict, names=()) -> dict:
    """Nested values by the path to them, as `pytest.approx` takes them; None is NaN."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, (*names, name))
        elif not isinstance(value, str | list):
            found[*names, name] = math.nan if value is None else value
    return found


def as_objects(arrays) -> np.ndarray:
    """An array of arrays, as a column of a table is."""
    box = np.empty(len(arrays), dtype=object)
    box[:] = arrays
    return box


def kill_when(is_time: Callable[[], bool], command: list) -> None:
    """Start a command, and end it by SIGKILL as soon as it is time, while it still runs."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    try:
        while not is_time():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes fail, as on a full disk, when a file would be larger than this many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environments(num_ranks: int) -> list[dict[str, str]]:
    """What torchrun would set for each rank."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(num_ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def start_ranks(num_ranks: int, *command) -> list[subprocess.Popen]:
    """Start `python *command` as torchrun would, each rank in a process group of its own."""
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for environment in environments(num_ranks)
    ]


def finish_ranks(ranks: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
    """(exit status, standard output, standard error) of each; none is left running."""
    try:
        outputs = [rank.communicate(timeout=timeout) for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()
    return [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]
