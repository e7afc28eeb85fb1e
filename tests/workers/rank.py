"""A program as one of several ranks, in a process that has already imported what takes seconds.

`CONTEXT` forks each from one server, which is started once and imports for all of them.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["evaluate", "transformers.models.llama.modeling_llama", "torch.distributed"]
)


def run(command: list[str], environment: dict[str, str], directory: Path) -> None:
    """`python *command` as this process, which writes to files `stdout` and `stderr`."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(directory / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ |= environment
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # which torch has read already
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
