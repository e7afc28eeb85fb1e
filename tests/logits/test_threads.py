"""Blocks over threads: who does what, errors, forks, and that no result depends on it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from support import PYTHONPATH, random_rows

from ppleval.logits import nll
from ppleval.logits import threads as nll_threads


@pytest.fixture
def num_threads():
    """Sets the number of torch's threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_every_part_is_done_once(threads, count, num_threads):
    num_threads(threads)
    done = []
    nll_threads.over_threads(done.extend, count)
    assert sorted(done) == list(range(count))


def test_a_slow_thread_takes_fewer_parts(num_threads):
    num_threads(2)
    barrier = threading.Barrier(2)
    others_are_done = threading.Event()
    by_thread = []

    def work(parts):
        own = []
        is_slow = barrier.wait(timeout=60) == 0
        for part in parts:
            own.append(part)
            if is_slow:
                others_are_done.wait(timeout=60)
        by_thread.append(own)
        others_are_done.set()

    nll_threads.over_threads(work, 30)
    assert sum(map(len, by_thread)) == 30
    assert len(by_thread[-1]) <= 1  # the slow one had one part, while the other did the rest


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_use_one_core_each_and_others_keep_theirs(threads, num_threads):
    num_threads(threads)
    seen = []
    barrier = threading.Barrier(threads)

    def work(parts):
        barrier.wait(timeout=60)  # as many threads as torch would take
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))

    nll_threads.over_threads(work, 1)
    assert seen == [(1, True)] * threads
    assert torch.get_num_threads() == threads
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen[-1] == threads


def test_an_error_stops_the_other_threads(num_threads):
    num_threads(2)
    done = []

    def work(parts):
        for part in parts:
            if part == 3:
                raise ValueError("three")
            done.append(part)
            time.sleep(0.01)

    with pytest.raises(ValueError, match="three"):
        nll_threads.over_threads(work, 1000)
    assert len(done) < 100
    nll_threads.over_threads(done.extend, 10)
    assert done[-10:] == list(range(10))


def test_two_callers_at_once(num_threads):
    num_threads(2)
    logits, targets = random_rows(60, 50257)
    expected = nll.token_nll(logits, targets)
    found = [None] * 6

    def call(i):
        found[i] = all(torch.equal(nll.token_nll(logits, targets), expected) for _ in range(5))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
    assert found == [True] * 6


# 70000: wider than a piece that is added up in one go. 50 rows of 50257: several blocks.
@pytest.mark.parametrize("shape", [(1, 40000), (7, 70000), (50, 50257), (3000, 30)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_number_of_threads_changes_no_bit(shape, dtype, num_threads):
    logits, targets = random_rows(*shape, dtype)
    if len(targets) > 1:
        targets[len(targets) // 2] = -100
    found = []
    for threads in (1, 2, 4):
        num_threads(threads)
        stats = nll.token_stats(logits, targets)
        only = nll.token_nll(logits, targets)
        probabilities = logits.softmax(-1)
        found.append(
            [*stats.tensors, only, nll.token_nll(probabilities, targets, from_logits=False)]
        )
    for others in found[1:]:
        for values, expected in zip(others, found[0], strict=True):
            assert torch.equal(values, expected)


# Without the rest of the metric, whose imports take many seconds on a busy machine.
PROGRAM = """
import atexit, multiprocessing, os, signal, sys, threading, time
import torch
from support import random_rows

from ppleval.logits import nll
logits, targets = random_rows(60, 50257)


def reduce():
    return nll.token_nll(logits, targets)


def tell(connection):
    connection.send(reduce().tolist())


def in_process(method):
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=tell, args=(theirs,))
    process.start()
    assert ours.recv() == expected.tolist()
    process.join()
    assert process.exitcode == 0


def at_exit():
    assert torch.equal(reduce(), expected)
    print("reduced at exit")


if __name__ == "__main__":
    torch.set_num_threads(2)
    expected = reduce()
    atexit.register(at_exit)
    in_process("fork")
    in_process("spawn")
"""


INTERRUPTED = """
import os, signal, sys, time
import torch
from ppleval.logits import threads

def work(parts):
    for part in parts:
        if part == 5:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
torch.set_num_threads(2)
threads.over_threads(work, 100_000)
"""


def run_program(tmp_path, program: str) -> subprocess.CompletedProcess:
    path = tmp_path / "program.py"  # a process that is spawned reads it again
    path.write_text(program)
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    return subprocess.run(
        [sys.executable, path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_processes_that_fork_spawn_and_end(tmp_path):
    finished = run_program(tmp_path, PROGRAM)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "reduced at exit"


def test_an_interrupt_ends_the_process_soon(tmp_path):
    finished = run_program(tmp_path, INTERRUPTED)  # all parts would take 500 s
    assert finished.returncode in (130, -signal.SIGINT)
    assert "KeyboardInterrupt" in finished.stderr
