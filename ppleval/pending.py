"""What a metric has accumulated since its last result: the sums of batches, or texts.

Threads may add at once. A batch is reduced before the lock is taken, so no thread waits for
another's reduction. Whether the batch fits is checked before, which saves the reduction, and again
under the lock, because another thread may have added something in between.
"""

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ppleval.distributed import Attempt, Processes
from ppleval.logits.inputs import reduce_batch
from ppleval.logits.options import Options
from ppleval.logits.tensors import is_dtensor
from ppleval.stats.groups import add_groups, check_number, checked_groups
from ppleval.stats.runs import Run, SequenceSums
from ppleval.texts.inputs import are_texts, is_conversation
from ppleval.user_warnings import warn_user


class Batch(NamedTuple):
    """A batch as the user passes it."""

    predictions: Any
    references: Any
    sample_weight: Any
    groups: Any = None

    @property
    def is_given(self) -> bool:
        """Whether the user passed one."""
        return self.predictions is not None or self.references is not None

    @property
    def is_shared(self) -> bool:
        """Whether several processes share the logits, so that all have to meet where they are
        reduced, whatever else is wrong on one of them."""
        return is_dtensor(self.predictions)

    @property
    def holds_texts(self) -> bool:
        """Whether the predictions are texts, which have no references."""
        return self.references is None and are_texts(self.predictions)


class Pending:
    """The texts, or the sums of the batches, that wait for `compute`; never both.

    A call that raises changes nothing.
    """

    def __init__(self, options: Options):
        self._options = options  # those of every batch added
        self._lock = threading.RLock()  # held while anything below changes
        self._computing: set[int] = set()  # the threads that read texts or batches for `compute`
        self.clear()

    def __getstate__(self) -> dict:
        with self._lock:
            own = ("_lock", "_computing")
            return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.RLock(), _computing=set())

    def clear(self) -> None:
        """Drop everything.

        Raises:
            ValueError: as every method, in an iterable that `compute` reads.
        """
        self._check_not_computing()
        with self._lock:
            self._texts: list[str] = []
            self._groups: list[str] = []  # none, or one for each text
            self._run = Run()  # of the batches
            self._is_synced = False  # whether it is that of all processes
            self._warned_of_nan = False

    def __len__(self) -> int:
        """Number of sequences and texts."""
        return self._run.num_sequences + len(self._texts)

    def add_texts(self, texts: list[str], groups: list[str] | None) -> None:
        """Add texts, and their groups if they have any.

        Raises:
            ValueError: batches are pending, groups of another number than texts, or only some texts
                have groups.
        """
        if groups is not None:
            check_number(groups, len(texts))
        self._check_not_computing()
        with self._lock:
            self._check_takes_texts()
            if self._texts and texts:
                _check_all_or_none(bool(self._groups), groups is not None)
                if is_conversation(self._texts[0]) != is_conversation(texts[0]):
                    raise ValueError("All are texts, or all are conversations; call reset first.")
            self._texts += texts
            self._groups += groups or []

    def add_batch(self, batch: Batch) -> Run:
        """Add a batch, and return its own run.

        Raises:
            TypeError, ValueError: texts are pending, `sync` was called, or as `reduce_batch`.
        """
        self._check_not_computing()
        if not batch.is_shared:
            self._check_takes_batches()
        # First, because processes that share the logits meet there.
        sums = reduce_batch(batch.predictions, batch.references, batch.sample_weight, self._options)
        run = self._run_of(sums, batch.groups)
        self._add_run(run)
        return run

    def merge(self, other: "Pending") -> None:
        """Add what `other` holds, and leave it there.

        Raises:
            ValueError: its options differ, `sync` was called on one of the two, or one holds texts
                and one batches.
        """
        if other._options != self._options:
            raise ValueError(
                "merge takes a metric with the same options; these are "
                f"{self._options.signature}, those of the other {other._options.signature}."
            )
        for each in (self, other):
            each._check_not_computing()
        # One lock after the other: held at once, they would be held in two orders.
        with other._lock:
            other._check_not_synced()
            run, texts, groups = other._run, list(other._texts), list(other._groups)
        with self._lock:
            self._check_not_synced()
            if texts:
                self.add_texts(texts, groups or None)
            if run.num_batches > 0:
                self._add_run(run)

    def sync(self, processes: Processes) -> None:
        """Replace the sums by those of all these processes.

        Raises:
            ValueError: texts are pending, or `sync` was called before.
            ConnectionError: another process failed or is gone.
        """
        with self._lock:
            mine = processes.attempt(self._run_to_sync)
            self._run = _sum_over(processes, mine, self._options)
            self._is_synced = True

    @contextmanager
    def all_texts(
        self, more: Iterable[str] | None, groups: list[str] | None
    ) -> Iterator[tuple[Iterable[str], list[str] | None]]:
        """The texts, and then `more`; their groups, or None. A block that ends without an error
        uses them up.

        Raises:
            ValueError: batches are pending, or only some texts have groups.
        """
        self._check_not_computing()
        with self._lock:
            self._check_takes_texts()
            if self._texts and more is not None:
                _check_all_or_none(bool(self._groups), groups is not None)
            texts: Iterable[str] = list(self._texts) if more is None else more
            if self._texts and more is not None:
                texts = itertools.chain(self._texts, more)
            has_groups = bool(self._groups) or groups is not None
            with self._reading():
                yield texts, [*self._groups, *(groups or [])] if has_groups else None
            self.clear()

    @contextmanager
    def all_batches(self, batch: Batch, options: Options) -> Iterator[Run]:
        """The run of all batches, and of this one. A block that ends without an error uses it up.

        Args:
            batch: reduced here; its fields are None where there is none.
            options: those of the batch; they have to be those of the batches added.

        Raises:
            TypeError, ValueError, ConnectionError: as `add_batch`, or the options differ.
        """
        run = self._reduced(batch, options, sync=False)
        with self._lock:
            yield self._with_run(run, batch, options, sync=False)
            self.clear()

    @contextmanager
    def all_batches_of(self, processes: Processes, batch: Batch, options: Options) -> Iterator[Run]:
        """The run of all batches of these processes; on each of them as `all_batches`.

        Raises:
            TypeError, ValueError, ConnectionError: as `all_batches` and `sync`.
        """
        mine = processes.attempt(self._reduced, batch, options, True)
        with self._lock:
            runs = processes.attempt(
                lambda: self._with_run(mine.value, batch, options, sync=True).to_sync
            )
            yield _sum_over(processes, runs, options)
            self.clear()

    def _reduced(self, batch: Batch, options: Options, sync: bool) -> Run:
        """The run of a batch that is given to `compute`; an empty one where none is."""
        self._check_not_computing()
        if not batch.is_shared:
            self._check_computes(batch, options, sync)
        if not batch.is_given:
            return Run()
        with self._reading():
            # First, because processes that share the logits meet there.
            sums = reduce_batch(batch.predictions, batch.references, batch.sample_weight, options)
            return self._run_of(sums, batch.groups)

    def _with_run(self, run: Run, batch: Batch, options: Options, sync: bool) -> Run:
        """The run of what was added and of a batch, which still fits."""
        self._check_computes(batch, options, sync)
        if self._run.num_batches == 0:
            return run
        _check_all_or_none(self._run.is_grouped, run.is_grouped)
        return self._run + run

    def _run_to_sync(self) -> Run:
        self._check_not_computing()
        self._check_takes_batches()
        return self._run.to_sync

    def _add_run(self, run: Run) -> None:
        with self._lock:
            self._check_takes_batches()
            _check_all_or_none(self._run.is_grouped, run.is_grouped)
            self._run += run

    def _run_of(self, sums: SequenceSums, groups: Iterable | None) -> Run:
        """The run of a batch; the user is warned of the first NaN."""
        if groups is not None:
            groups = checked_groups(groups)
            check_number(groups, len(sums.nll_sums))
        if sums.nan_place is not None and not self._warned_of_nan:
            self._warned_of_nan = True
            sequence, position = sums.nan_place
            warn_user(
                f"predictions[{sequence}, {position}] holds NaN or +inf, or no probability at all: "
                "its nll is NaN, and so is the perplexity."
            )
        return Run.of_batch(sums, groups)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """While this thread reads what the user passes to `compute`, which may be a generator."""
        thread = threading.get_ident()
        self._computing.add(thread)
        try:
            yield
        finally:
            self._computing.discard(thread)

    def _check_not_computing(self) -> None:
        # The lock does not keep a generator out, which runs in the thread that holds it.
        if threading.get_ident() in self._computing:
            raise ValueError(
                "This metric is computing, and what it reads for that uses the metric itself: what "
                "is pending would count twice, or be lost. Use a second one there, from another "
                "evaluate.load."
            )

    def _check_takes_texts(self) -> None:
        if self._run.num_batches > 0:
            raise ValueError(
                "Batches of logits are pending, and texts do not mix with them; call compute or "
                "reset."
            )

    def _check_takes_batches(self) -> None:
        if self._texts:
            raise ValueError(
                "Texts are pending, and logits do not mix with them; call compute or reset."
            )
        self._check_not_synced()

    def _check_not_synced(self) -> None:
        if self._is_synced:
            raise ValueError(
                "sync was called, and these are the sums of all processes: added to others, they "
                "would count more than once. Call compute or reset first."
            )

    def _check_computes(self, batch: Batch, options: Options, sync: bool) -> None:
        if self._texts or batch.holds_texts:
            raise ValueError(
                "Texts need a model: pass model_id=, or model= and tokenizer=. Logits go with "
                "references=."
            )
        if self._run.num_batches > 0 and options != self._options:
            raise ValueError(
                f"compute was given other options ({options.signature}) than the batches added "
                f"before it ({self._options.signature}). Give the options to evaluate.load, or "
                "call reset() first."
            )
        if self._is_synced and (sync or batch.is_given):
            self._check_not_synced()


def _sum_over(processes: Processes, mine: Attempt[Run], options: Options) -> Run:
    """The runs of all processes, added up."""
    if processes.size == 1:
        return mine.value
    rows: Attempt[Sequence[float]] = mine.then(lambda run: [*run.numbers(), len(run.groups)])
    *sums, num_groups = processes.sum(rows, len(Run().numbers()) + 1, options.signature)
    groups = {}
    if num_groups > 0:  # only then, because it takes a collective of its own
        for is_grouped, others in processes.gather(mine.then(lambda r: (r.is_grouped, r.groups))):
            _check_all_or_none(is_grouped, True)
            groups = add_groups(groups, others)
    return Run.of(sums, groups)


def _check_all_or_none(is_grouped: bool | None, other: bool | None) -> None:
    """Raises ValueError if of two runs, or lists of texts, one has groups and one has none."""
    if is_grouped is not None and other is not None and is_grouped != other:
        raise ValueError("groups must go with every batch and text, or with none.")
