"""Which process scores which texts when: portions, shares and batches, from lengths alone."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ppleval.texts.inputs import num_characters
from ppleval.texts.score import Draft
from ppleval.texts.windows import Window

# A process sorts and packs one portion at a time. It is large enough for batches of equal length,
# and small enough to stream, and to lose when a run is interrupted. 2^18 characters are about
# 65,000 tokens. The first portions are smaller, so a slow model soon has something to show.
TEXTS_AT_ONCE = 2048
CHARACTERS_AT_ONCE = 2**18
CHARACTERS_AT_FIRST = 2**12

Portion = list[tuple[Any, str | None]]  # texts or conversations, each with its context


class Job(NamedTuple):
    """A window to score, and the draft that takes its result."""

    draft: Draft
    window: Window
    num_inputs: int  # that the model reads


class Plan(NamedTuple):
    """Texts to score, and the batches of windows in which this is done."""

    drafts: list[Draft]
    batches: list[list[Job]]
    num_tokens: int  # that are scored


def portions(pairs: Iterator[tuple[Any, str | None]], num_processes: int = 1) -> Iterator[Portion]:
    """Lists of consecutive texts with their contexts.

    For each process a portion has TEXTS_AT_ONCE texts at most. It ends with the text that fills a
    number of characters, which doubles from CHARACTERS_AT_FIRST to CHARACTERS_AT_ONCE.
    """
    portion: Portion = []
    characters, limit = 0, CHARACTERS_AT_FIRST
    for text, context in pairs:
        portion.append((text, context))
        characters += num_characters(text)
        if len(portion) == TEXTS_AT_ONCE * num_processes or characters >= limit * num_processes:
            yield portion
            portion, characters = [], 0
            limit = min(2 * limit, CHARACTERS_AT_ONCE)
    if portion:
        yield portion


def shares(lengths: Sequence[int], num_processes: int) -> list[list[int]]:
    """The texts of each process: the longest first, each to the process with the least so far.

    (Graham, Bounds on multiprocessing timing anomalies, 1969: at most 4/3 of the best makespan.)
    """
    found: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [(0, process) for process in range(num_processes)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, process = loads[0]
        found[process].append(i)
        heapq.heapreplace(loads, (load + lengths[i] + 1, process))
    return found


def batches(
    jobs: list[Job],
    most_tokens: int,
    batch_size: int | None,
    key: Callable[[int], object],
) -> Iterator[list[Job]]:
    """Batches of consecutive windows, at least one in each.

    Args:
        jobs: the windows, the longest first.
        most_tokens: the most tokens of a batch, padding included.
        batch_size: the most windows of a batch; None for any number.
        key: windows whose lengths have different keys do not share a batch.
    """
    first = 0
    for i, (_, _, length) in enumerate(jobs):
        size, longest = i - first, jobs[first].num_inputs
        full = (size + 1) * longest > most_tokens or size == batch_size
        if size > 0 and (full or key(length) != key(longest)):
            yield jobs[first:i]
            first = i
    if jobs:
        yield jobs[first:]
