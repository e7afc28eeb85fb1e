"""A program as one of several ranks, in a process that has already imported what takes seconds.

`CONTEXT` forks each from one server, which is started once and imports for all of them.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["ppleval.metric", "transformers.models.llama.modeling_llama", "torch.distributed"]
)


def run(command: list[str], environment: dict[str, str], directory: Path) -> None:
    """`python *command` as this process, which writes to files `stdout` and `stderr`."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(directory / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ |= environment
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # which torch has read already
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def finish(
    command: list, environments: list[dict[str, str]], timeout: float
) -> list[tuple[int | None, str, str]]:
    """(exit status, standard output, standard error) of `python *command` in each environment; none
    is left running."""
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(tempfile.mkdtemp(dir=directory)) for _ in environments]
        ranks = [
            CONTEXT.Process(target=run, args=(list(map(str, command)), environment, output))
            for environment, output in zip(environments, outputs, strict=True)
        ]
        for process in ranks:
            process.start()
        try:
            for process in ranks:
                process.join(timeout=timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [
            (
                process.exitcode,
                (output / "stdout").read_text(encoding="utf-8"),
                (output / "stderr").read_text(encoding="utf-8"),
            )
            for process, output in zip(ranks, outputs, strict=True)
        ]
