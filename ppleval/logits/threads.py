"""Work on a CPU, shared out over threads of one core each: a slow thread takes less of it.

torch's own parallel regions give every thread an equal part and wait for the last one. Beside
another busy process that one is late, block after block; benchmarks/bench_nll.py measures it.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

# The executor starts a thread only when none is idle, so this bound costs nothing.
MOST_THREADS = 256

_IMPORTED_IN = os.getpid()
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def over_threads(work: Callable[[Iterator[int]], None], count: int) -> None:
    """Do the parts 0 to count - 1 of a job on as many threads as torch would take.

    Args:
        work: is called once in each thread, with an iterator that all threads draw from; it does
            the parts that it gets. What a part gives must not depend on who does it.

    Raises: what `work` raises; the other threads then stop behind their current part.
    """
    num_threads = torch.get_num_threads()
    parts = iter(range(count))
    if num_threads == 1:
        work(parts)
        return
    futures: list[Future] = []
    try:
        try:
            for _ in range(num_threads):
                futures.append(_threads().submit(_run, work, parts))
        except RuntimeError:  # the interpreter is ending, or there are no more threads to be had
            if not futures:
                work(parts)
        for future in futures:
            future.result()
    finally:
        _exhaust(parts)  # after Ctrl-C, too
        wait(futures)


def use_one_thread_after_fork() -> None:
    """Keep a forked process, such as one of `datasets.map(num_proc=2)`, from hanging.

    The threads of torch's OpenMP pool do not survive a fork, so a parallel region would wait for
    them forever. Several processes have the cores busy anyway. torch's DataLoader does the same.
    """
    if os.getpid() != _IMPORTED_IN:
        torch.set_num_threads(1)


def _threads() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(MOST_THREADS, "perplexity", initializer=_take_one_core)
        return _pool


def _run(work: Callable[[Iterator[int]], None], parts: Iterator[int]) -> None:
    try:
        with torch.inference_mode():  # a thread does not inherit the mode of its caller
            work(parts)
    finally:
        _exhaust(parts)  # after an error there is nothing left for the other threads


def _exhaust(parts: Iterator[int]) -> None:
    for _ in parts:
        pass


def _take_one_core() -> None:
    """Let torch use one core in this thread, and leave other threads as they are.

    `torch.set_num_threads` sets the number of the calling thread, and that with which new threads
    begin. The latter is put back, by a thread that ends at once.
    """
    with _lock:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        other = threading.Thread(target=torch.set_num_threads, args=(num_threads,))
        other.start()
        other.join()


def _forget_threads() -> None:
    """A forked process has none of the threads, and the lock may be held by one."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
