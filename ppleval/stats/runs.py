"""Sums of the sequences of a batch -> what a metric has accumulated of batches, also by group."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np

from ppleval.stats.groups import add_groups, by_group, grouped
from ppleval.stats.totals import REASONS_OF_LOGITS, NllTotals, Result, guessing_remark


@dataclass(frozen=True)
class SequenceSums:
    """Per sequence d of a batch: S_d = sum_t w_t nll_t in nats and W_d = sum_t w_t, float64."""

    nll_sums: np.ndarray  # (batch,)
    weight_sums: np.ndarray  # (batch,)
    num_tokens: np.ndarray  # (batch,) int64, scored tokens
    guess_nll_sum: float  # nats, sum w_t log V: what a uniform guess over V ids would give
    nan_place: tuple[int, int] | None = None  # the first (sequence, position) whose nll is NaN
    # Whether this process counts them where processes are added up: one of those that share logits.
    is_counted_here: bool = True
    dtypes: frozenset[str] = frozenset()  # in which the logits were reduced


@dataclass(frozen=True)
class Run:
    """Accumulated totals, and how many batches and sequences they hold. Runs merge by addition."""

    totals: NllTotals = field(default_factory=NllTotals)
    num_batches: int = 0  # tells an empty run from one in which nothing was scored
    num_sequences: int = 0  # also those in which nothing was scored
    guess_nll_sum: float = 0.0  # nats, weighted: what uniform guesses would give
    num_float32: int = 0  # batches with logits that were reduced in float32
    num_float64: int = 0
    groups: Mapping[str, NllTotals] = field(default_factory=dict)  # none, or of all sequences
    # The part of it that this process counts where processes are added up: of logits that processes
    # share, each has the sums of the whole, and one counts them. None for all of it.
    counted_here: "Run | None" = None

    @classmethod
    def of_batch(cls, sums: SequenceSums, groups: Sequence[str] | None) -> "Run":
        """The run of one batch, from the sums of its sequences and the group of each."""
        columns = sums.nll_sums, sums.weight_sums, sums.num_tokens
        return cls(
            NllTotals.from_sequences(*columns),
            num_batches=1,
            num_sequences=len(sums.nll_sums),
            guess_nll_sum=sums.guess_nll_sum,
            num_float32=int("float32" in sums.dtypes),
            num_float64=int("float64" in sums.dtypes),
            groups={} if groups is None else _totals_by_group(columns, groups),
            counted_here=None if sums.is_counted_here else cls(),
        )

    def __add__(self, other: "Run") -> "Run":
        if not isinstance(other, Run):
            return NotImplemented
        are_shared = self.counted_here is not None or other.counted_here is not None
        return Run(
            self.totals + other.totals,
            self.num_batches + other.num_batches,
            self.num_sequences + other.num_sequences,
            self.guess_nll_sum + other.guess_nll_sum,
            self.num_float32 + other.num_float32,
            self.num_float64 + other.num_float64,
            add_groups(self.groups, other.groups),
            self.to_sync + other.to_sync if are_shared else None,
        )

    @property
    def to_sync(self) -> "Run":
        """What this process brings where processes are added up."""
        return self if self.counted_here is None else self.counted_here

    @property
    def is_grouped(self) -> bool | None:
        """Whether its sequences have groups; None if there are no sequences."""
        return bool(self.groups) if self.num_sequences > 0 else None

    @property
    def dtypes(self) -> list[str]:
        """In which its logits were reduced."""
        counts = {"float32": self.num_float32, "float64": self.num_float64}
        return [name for name, count in counts.items() if count > 0]

    def numbers(self) -> list[float | int]:
        """The totals and counts in one row, as it crosses processes."""
        counts = self.num_batches, self.num_sequences
        dtypes = self.num_float32, self.num_float64
        return [*astuple(self.totals), *counts, self.guess_nll_sum, *dtypes]

    @classmethod
    def of(cls, numbers: Sequence[float], groups: Mapping[str, NllTotals] | None = None) -> "Run":
        """The run of a row of `numbers`, or of a sum of rows, whose counts may be floats."""
        *totals, num_batches, num_sequences, guess_nll_sum, num_float32, num_float64 = numbers
        counts, dtypes = (
            (int(num_batches), int(num_sequences)),
            (int(num_float32), int(num_float64)),
        )
        return cls(NllTotals.of(totals), *counts, guess_nll_sum, *dtypes, groups or {})

    def remark(self) -> str | None:
        """What a user should be told of the result, if anything."""
        totals = self.totals
        if totals.num_tokens == 0:
            return (
                "No token was scored, so the perplexity is NaN: every reference is ignored or has "
                "weight 0."
            )
        guess_nll = self.guess_nll_sum / totals.weight_sum
        return guessing_remark("perplexity", totals.mean_nll, guess_nll, REASONS_OF_LOGITS)

    def result(self) -> Result:
        """The result that users get, without the signature."""
        result: Result = self.totals.result()
        return result | grouped(self.groups, NllTotals.result) if self.groups else result


def _totals_by_group(
    columns: tuple[np.ndarray, ...], groups: Sequence[str]
) -> dict[str, NllTotals]:
    """The totals of each group, from columns of `SequenceSums` and the group of each sequence."""
    return {
        name: NllTotals.from_sequences(*(column[rows] for column in columns))
        for name, rows in by_group(range(len(groups)), groups).items()
    }
