"""What the benchmarks share: times in turn, where and with what they ran, tables, RESULTS.md."""

import contextlib
import datetime
import importlib.metadata
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"


def environment(packages: list[str]) -> str:
    """Machine, versions, date and command, as lines of Markdown."""
    import torch

    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in packages]
    script = Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix()
    command = " ".join(["python", script, *sys.argv[1:]])
    return (
        f"- machine: {_cpu_name()}, {torch.get_num_threads()} threads\n"
        f"- versions: {', '.join(versions)}\n"
        f"- date: {datetime.date.today()}\n"
        f"- command: `{command}`\n"
    )


def _cpu_name() -> str:
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def start_of_peak_mb() -> float:
    """Start the peak of memory anew; what the process holds now, in MB (10^6 bytes); on Linux."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _status_mb("VmRSS")


def peak_mb_since_start() -> float:
    """The most that the process has held since `start_of_peak_mb`, in MB (10^6 bytes)."""
    return _status_mb("VmHWM")


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {key}; memory is measured on Linux only.")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def interleaved(
    methods: dict[str, Callable], repeats: int, between: Callable | None = None
) -> dict[str, list[float]]:
    """Seconds of each method in each round; a first round warms up and is not counted.

    `between`, if given, runs before each method, and outside of its time.
    """
    seconds = {name: [] for name in methods}
    for round_number in range(repeats + 1):
        for name, method in methods.items():
            if between is not None:
                between()
            start = time.perf_counter()
            method()
            if round_number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextlib.contextmanager
def busy_machine(num_processes: int) -> Iterator[None]:
    """Processes that compute all the time, each on one core: a data loader, another job."""
    command = [sys.executable, "-c", "while True: sum(range(10_000))"]
    processes = [subprocess.Popen(command) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def write_section(title: str, body: str) -> None:
    """Print the section and put it into RESULTS.md, in the place of the one of the same title."""
    section = f"## {title}\n\n{body.strip()}\n"
    print(section)
    text = RESULTS.read_text() if RESULTS.exists() else "# Measured figures\n"
    sections = re.split(r"(?m)^(?=## )", text)
    for i, old in enumerate(sections):
        if old.startswith(f"## {title}\n"):
            sections[i] = section
            break
    else:
        sections.append(section)
    RESULTS.write_text("\n".join(s.rstrip() + "\n" for s in sections))
