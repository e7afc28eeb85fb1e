"""What a metric has accumulated of batches: totals, also of each group. Runs merge by addition."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np

from ppleval.stats.groups import add_groups, by_group, grouped
from ppleval.stats.totals import REASONS_OF_LOGITS, NllTotals, Result, guessing_remark


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

    @classmethod
    def from_sequences(
        cls,
        nll_sums: np.ndarray,
        weight_sums: np.ndarray,
        num_tokens: np.ndarray,
        groups: Sequence[str] | None,
        guess_nll_sum: float,
        dtypes: Collection[str] = (),
    ) -> "Run":
        """The run of a batch, from the sums of its sequences, each (batch,), their groups, the sum
        of a uniform guess, and the dtypes in which its logits were reduced."""
        columns = nll_sums, weight_sums, num_tokens
        parts = {} if groups is None else by_group(range(len(nll_sums)), groups)
        return cls(
            NllTotals.from_sequences(*columns),
            num_batches=1,
            num_sequences=len(nll_sums),
            guess_nll_sum=guess_nll_sum,
            num_float32=int("float32" in dtypes),
            num_float64=int("float64" in dtypes),
            groups={
                name: NllTotals.from_sequences(*(column[rows] for column in columns))
                for name, rows in parts.items()
            },
        )

    def __add__(self, other: "Run") -> "Run":
        if not isinstance(other, Run):
            return NotImplemented
        return Run(
            self.totals + other.totals,
            self.num_batches + other.num_batches,
            self.num_sequences + other.num_sequences,
            self.guess_nll_sum + other.guess_nll_sum,
            self.num_float32 + other.num_float32,
            self.num_float64 + other.num_float64,
            add_groups(self.groups, other.groups),
        )

    @property
    def is_grouped(self) -> bool | None:
        """Whether its sequences have groups; None if there are no sequences."""
        return bool(self.groups) if self.num_sequences > 0 else None

    @property
    def dtypes(self) -> list[str]:
        """In which its logits were reduced."""
        found = {"float32": self.num_float32, "float64": self.num_float64}
        return [name for name, count in found.items() if count > 0]

    def numbers(self) -> list[float | int]:
        """All fields but the groups in one row, as it crosses processes."""
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
