"""What a metric has accumulated of batches: totals, also of each group. Runs merge by addition."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np

from .groups import add_groups, by_group, grouped
from .totals import NllTotals, Result


@dataclass(frozen=True)
class Run:
    """Accumulated totals, and how many batches and sequences they hold. Runs merge by addition."""

    totals: NllTotals = field(default_factory=NllTotals)
    num_batches: int = 0  # tells an empty run from one in which nothing was scored
    num_sequences: int = 0  # also those in which nothing was scored
    groups: Mapping[str, NllTotals] = field(default_factory=dict)  # none, or of all sequences

    @classmethod
    def from_sequences(
        cls,
        nll_sums: np.ndarray,
        weight_sums: np.ndarray,
        num_tokens: np.ndarray,
        groups: Sequence[str] | None,
    ) -> "Run":
        """The run of a batch, from the sums of its sequences, each (batch,), and their groups."""
        columns = nll_sums, weight_sums, num_tokens
        parts = {} if groups is None else by_group(range(len(nll_sums)), groups)
        return cls(
            NllTotals.from_sequences(*columns),
            num_batches=1,
            num_sequences=len(nll_sums),
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
            add_groups(self.groups, other.groups),
        )

    @property
    def is_grouped(self) -> bool | None:
        """Whether its sequences have groups; None if there are no sequences."""
        return bool(self.groups) if self.num_sequences > 0 else None

    def numbers(self) -> list[float | int]:
        """All fields but the groups in one row, as it crosses processes."""
        return [*astuple(self.totals), self.num_batches, self.num_sequences]

    @classmethod
    def of(cls, numbers: Sequence[float], groups: Mapping[str, NllTotals] | None = None) -> "Run":
        """The run of a row of `numbers`, or of a sum of rows, whose counts may be floats."""
        *totals, num_batches, num_sequences = numbers
        return cls(NllTotals.of(totals), int(num_batches), int(num_sequences), groups or {})

    def result(self) -> Result:
        """The result that users get, without the signature."""
        result: Result = self.totals.result()
        return result | grouped(self.groups, NllTotals.result) if self.groups else result
