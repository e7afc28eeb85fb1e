"""Number of token ids -> windows, and the ids that each window scores.

Counting only: no model, no torch. A window is a span of a text's ids. The model reads all of them
but the last and predicts each next id. The ids from `first` on are scored, each given the ids
before it in the window. A masked model reads all, and one of them is scored.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

# (ids of a text, window, stride, first id to score) -> windows
CutIntoWindows = Callable[[int, int, int, int], Iterable["Window"]]


@dataclass(frozen=True)
class Window:
    """ids[start:stop] of a text; ids[first:stop] are scored.

    start < first < stop; one that only `reads_end` scores nothing, first == stop.
    """

    start: int
    stop: int
    first: int
    weight: float = 1.0  # of each scored id
    reads_end: bool = False  # the model also reads the last id, and so predicts the one behind it

    @property
    def num_inputs(self) -> int:
        """How many ids the model reads."""
        return self.stop - self.start - (not self.reads_end)

    @property
    def ranges(self) -> Sequence[tuple[int, int]]:
        """The scored ids as ranges [first, stop), ascending."""
        return [(self.first, self.stop)]

    @property
    def scored(self) -> Sequence[int]:
        """The numbers of the scored ids, ascending."""
        return range(self.first, self.stop)


@dataclass(frozen=True)
class SparseWindow(Window):
    """A window that scores ids between `first` and `stop` only in some ranges."""

    scored_ranges: tuple[tuple[int, int], ...] = ()

    @property
    def ranges(self) -> Sequence[tuple[int, int]]:
        """The scored ids as ranges [first, stop), ascending."""
        return self.scored_ranges

    @property
    def scored(self) -> Sequence[int]:
        """The numbers of the scored ids, ascending."""
        return [place for first, stop in self.scored_ranges for place in range(first, stop)]


@dataclass(frozen=True)
class MaskedWindow(Window):
    """ids[start:stop] of a text; the model reads all of them, and only ids[first] is scored."""

    @property
    def num_inputs(self) -> int:
        """How many ids the model reads."""
        return self.stop - self.start

    @property
    def ranges(self) -> Sequence[tuple[int, int]]:
        """The scored ids as ranges [first, stop), ascending."""
        return [(self.first, self.first + 1)]

    @property
    def scored(self) -> Sequence[int]:
        """The numbers of the scored ids, ascending."""
        return range(self.first, self.first + 1)


def only_scoring(
    ranges: Sequence[tuple[int, int]], windows: Iterable[Window], begin: int
) -> Iterator[SparseWindow]:
    """Windows of the ids from `begin` on, which score only what lies in ranges of all ids.

    Those with nothing to score are left out, and none reads on behind its last scored id.
    """
    for window in windows:
        first, stop = begin + window.first, begin + window.stop
        parts = tuple((max(a, first), min(b, stop)) for a, b in ranges if a < stop and first < b)
        if parts:
            start = begin + window.start
            bounds = start, parts[-1][1], parts[0][0]
            yield SparseWindow(*bounds, window.weight, scored_ranges=parts)


def sliding_windows(num_ids: int, context: int, stride: int, first: int = 1) -> Iterator[Window]:
    """Windows that score every id from `first` on exactly once, with a full context if possible.

    The first window scores all that fits. Each later one moves on by `stride` ids, and the last
    ends with the text, so all but the first read a full context. With stride == context, neighbours
    share one id, as in lm-eval's loglikelihood_rolling.

    Args:
        num_ids: ids of the text, start token and prompt included.
        context: the most ids that the model reads at once.
        stride: how many ids each window after the first scores, 1 to `context`.
        first: the first scored id, at least 1. The ids before it only condition.
    """
    check_window(context, stride)
    size = context + 1
    stop = min(num_ids, size if first < size else first + stride)
    while first < num_ids:
        yield Window(max(0, stop - size), stop, first)
        first, stop = stop, min(num_ids, stop + stride)


def recipe_windows(num_ids: int, context: int, stride: int) -> Iterator[Window]:
    """The sliding-window recipe of the transformers documentation, with its weights.

    Windows begin at multiples of `stride` and hold `context` ids. The recipe weighs a window's mean
    nll by the number of its new ids minus one. That is right for the first window, whose first id
    is not predicted. In a later window that overlaps it is one too few, which a weight below 1
    reproduces (https://huggingface.co/docs/transformers/perplexity).
    """
    check_window(context, stride)
    previous = 0
    for start in range(0, num_ids, stride):
        stop = min(start + context, num_ids)
        first = max(previous, start + 1)
        if first < stop:
            yield Window(start, stop, first, weight=(stop - previous - 1) / (stop - first))
        if stop == num_ids:
            return
        previous = stop


def chunk_windows(num_ids: int, context: int, first: int) -> Iterator[Window]:
    """Disjoint chunks of `context` ids. Each scores its ids from number `first` (1 or more) on.

    An incomplete last chunk is dropped.
    """
    if first >= context:
        raise ValueError(
            f"a window of {context} tokens has nothing to score behind its first {first}."
        )
    for start in range(0, num_ids - context + 1, context):
        yield Window(start, start + context, start + first)


def windows_to_the_end(
    windows: list[Window], num_ids: int, context: int, key: Callable[[int], object]
) -> list[Window]:
    """The windows of a text, one of which also reads its last id; none where none scores that.

    The last window does if it has room; else one more, which scores nothing and reads the last ids.

    Args:
        num_ids, context: as for `sliding_windows`.
        key: of a number of ids that the model reads at once; with another, it may score otherwise.
    """
    if not windows or windows[-1].stop < num_ids:
        return windows
    last = replace(windows[-1], reads_end=True)
    if last.num_inputs <= context and key(last.num_inputs) == key(windows[-1].num_inputs):
        return [*windows[:-1], last]
    return [*windows, Window(max(0, num_ids - context), num_ids, num_ids, reads_end=True)]


def centred_windows(num_ids: int, size: int, first: int) -> Iterator[MaskedWindow]:
    """One window for each id from `first` on, with that id in its middle.

    Near the ends of a text a window is moved, so that it holds `size` ids, or all that there are.
    An even size has one id more in front than behind.
    """
    size = min(size, num_ids)
    for at in range(first, num_ids):
        start = min(max(0, at - size // 2), num_ids - size)
        yield MaskedWindow(start, start + size, at)


def check_window(context: int, stride: int) -> None:
    """Raises ValueError unless 1 <= stride <= context."""
    if context < 1:
        raise ValueError(f"window must be at least 1 token, got {context}.")
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride must be between 1 and the window of {context} tokens, got {stride}."
        )
