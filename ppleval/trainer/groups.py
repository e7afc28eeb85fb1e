"""Results by group in a Trainer: whose example a gathered row is, and what a Trainer can log."""

import math
from collections.abc import Sequence

import numpy as np
from torch.utils.data import SequentialSampler

from ppleval.stats.groups import by_group, grouped
from ppleval.stats.totals import NllTotals
from ppleval.trainer.batches import EvalBatch
from ppleval.trainer.documents import may_share_rows
from ppleval.user_warnings import warn_user


class EvaluatedGroups:
    """The rows of one evaluation, and the group of each.

    A row brings the place of its example in the evaluation set across processes, so that what
    Trainer has gathered shows by itself whether each example has come once.

    Args:
        names: of the groups, one for each example of the evaluation set, in its order.
    """

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._rows: list[np.ndarray] = []
        self._doubt: str | None = None

    def places(self, batch: EvalBatch, num_rows: int) -> list[float]:
        """The place of each row's example; NaN if unknown, beyond the end if it is a repeat."""
        doubt = _doubt(batch, num_rows, len(self._names))
        if doubt is None and batch.examples is not None:
            return [float(place) for place in batch.examples]
        self._doubt = self._doubt or doubt
        return [math.nan] * num_rows

    def add(self, rows: np.ndarray) -> None:
        """Gathered rows (N, 8): the fields of NllTotals and the place of the example."""
        self._rows.append(rows)

    def result(self) -> dict[str, float]:
        """perplexity_<name> and mean_nll_<name> of each group, macro_mean_nll, macro_perplexity.

        Empty, after a warning, unless each example of the evaluation set has come once.
        """
        rows = np.concatenate(self._rows)
        rows = rows[rows[:, -1] < len(self._names)]
        rows = rows[rows[:, -1].argsort()]
        if not np.array_equal(rows[:, -1], np.arange(len(self._names))):
            doubt = self._doubt or "not every example of the evaluation set has come exactly once."
            warn_user(f"The result has no groups: {doubt}")
            return {}
        sums = by_group(list(rows[:, :-1]), self._names)
        totals = {name: NllTotals.of(np.sum(part, axis=0)) for name, part in sums.items()}
        found = grouped(totals, NllTotals.result)
        groups = found.pop("groups")
        for field in ("perplexity", "mean_nll"):
            found |= {f"{field}_{name}": result[field] for name, result in groups.items()}
        return found


def check_loggable(names: Sequence[str]) -> None:
    """Raises ValueError if what a Trainer logs of a group would replace a number of the whole."""
    taken = {f"perplexity_{name}" for name in names} & NllTotals().result().keys()
    if taken:
        raise ValueError(
            f"groups must not give {min(taken)!r}, which is a number of the whole result: rename "
            f"the group {min(taken).removeprefix('perplexity_')!r}."
        )


def _doubt(batch: EvalBatch, num_rows: int, num_names: int) -> str | None:
    """Why the examples of a batch's rows are unknown; None if they are known."""
    if batch.dataloader is None or batch.may_be_read_by_all:
        return "accelerate has not prepared the evaluation dataloader."
    sampler = batch.sampler
    # A subclass may read in an order of its own.
    if sampler is None or type(sampler.sampler) is not SequentialSampler:
        outer = getattr(batch.dataloader, "batch_sampler", None)
        read_by = outer if sampler is None else sampler.sampler
        return (
            f"{type(read_by).__name__} may not read the evaluation set in its order, as with a "
            'stream or train_sampling_strategy="group_by_length".'
        )
    if len(sampler.sampler) != num_names:
        return (
            f"groups has {num_names} names, and this evaluation set {len(sampler.sampler)} "
            "examples."
        )
    if batch.examples is None:
        return "one process reads the batches for all, and tells no size of the last."
    if num_rows != len(batch.examples) or may_share_rows(batch, num_rows):
        return (
            f"rows are not examples: the collator made {num_rows} of {len(batch.examples)}, or "
            "packed several documents into one."
        )
    if (num_dropped := batch.num_dropped(num_rows)) > 0:
        return (
            f"Trainer passes on {num_rows - num_dropped} of {num_rows} rows, as another dataloader "
            "of accelerate is at its end. Return accelerator.prepare(dataloader) from "
            "get_eval_dataloader."
        )
    return None
