"""What the driver of a Ray run learns of each batch of texts, and keeps: a dozen numbers.

An `Answer` crosses processes in a row of a data set; `CorpusTotals` adds the answers up.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ppleval.stats.groups import by_group, grouped
from ppleval.stats.texts import TextReport, TextTotals
from ppleval.stats.totals import TextSums

if TYPE_CHECKING:
    from ray.data import Dataset

    from ppleval.stats.totals import Result


@dataclass(frozen=True)
class Answer:
    """The totals of a batch of texts, or the error that ends the run.

    place: the number of a file and of its row, by which groups are put in order.
    settings: those of `settings_of`.
    num_finished: how many of the texts an earlier run has scored.
    """

    place: tuple[int, int] = (0, 0)
    totals: TextTotals | None = None
    groups: dict[str, TextTotals] | None = None
    settings: dict = field(default_factory=dict)
    num_finished: int = 0
    error: str | None = None

    @classmethod
    def of(
        cls,
        sums: "Sequence[TextSums]",
        groups: Sequence[str] | None,
        settings: dict,
        place: tuple[int, int],
        num_finished: int,
    ) -> "Answer":
        """The answer for texts with these sums and, if any, groups; the others are its fields."""
        totals = None
        if groups is not None:
            by_name = by_group(sums, groups)
            totals = {name: TextTotals.of(own) for name, own in by_name.items()}
        return cls(place, TextTotals.of(sums), totals, settings, num_finished)

    def packed(self) -> dict[str, bytes]:
        """The answer as a row of a data set."""
        return {"answer": pickle.dumps(self)}


@dataclass
class CorpusTotals:
    """The totals of all texts and of each group, and the settings that they were scored with."""

    texts: "TextTotals"
    groups: dict[str, TextTotals] | None = None
    settings: dict | None = None
    num_finished: int = 0
    num_answers: int = 0
    # Where each group appears first: the place of an answer, and the number within it.
    _first: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, answers: "Dataset") -> "CorpusTotals":
        """The sum of the answers of a data set, which is run.

        Raises:
            ValueError: the error of an answer, or answers of different settings.
        """
        totals = cls(TextTotals())
        for row in answers.iter_rows():
            totals.add(pickle.loads(row["answer"]))
        return totals

    def add(self, answer: Answer) -> None:
        """Add an answer; they come in any order.

        Raises:
            ValueError: as `of`.
        """
        if answer.totals is None:
            raise ValueError(answer.error)
        if self.settings not in (None, answer.settings):
            raise ValueError(
                f"Texts were scored with different settings: {self.settings} and {answer.settings}."
            )
        self.settings = answer.settings
        self.num_answers += 1
        self.num_finished += answer.num_finished
        self.texts += answer.totals
        if answer.groups is not None:
            self._add_groups(answer.groups, answer.place)

    def _add_groups(self, groups: "dict[str, TextTotals]", place: tuple[int, int]) -> None:
        self.groups = self.groups or {}
        for number, (name, totals) in enumerate(groups.items()):
            self.groups[name] = totals + self.groups[name] if name in self.groups else totals
            first = *place, number
            self._first[name] = min(first, self._first.get(name, first))

    def result(self) -> "Result":
        """The result of `compute`, without lists of perplexities.

        Raises:
            ValueError: there is no answer.
        """
        if self.settings is None:
            raise ValueError("There are no texts.")
        settings = dict(self.settings)
        signature = settings.pop("signature")
        report = TextReport(**settings)
        result = report.result(self.texts)
        if self.groups is not None:
            names = sorted(self.groups, key=lambda name: self._first[name])
            groups = {name: self.groups[name] for name in names}
            result |= grouped(groups, report.result)
        return {**result, "signature": signature}
