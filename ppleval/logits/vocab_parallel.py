"""Logits of which each process has a part -> nll; no logit leaves its process.

Each process reduces the columns of the vocabulary that it has, to three numbers for each scored
row: its largest score, the sum of exp(score - largest), and the target's score if it has that. They
are merged as the tiles of tiles.py are, by two all-reduces: one of the maxima, one of the sums
and target scores. Before that all processes tell each other in a few bytes whether they can: so an
error on one of them ends the call on all, and none waits.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from ppleval.distributed import Attempt, Processes
from ppleval.logits.dtensors import Part
from ppleval.logits.gradients import need_gradient
from ppleval.logits.kernels import Reduction, launch
from ppleval.logits.outputs import (
    IDENTITY,
    NO_PROBABILITY,
    OUT_OF_RANGE,
    ROW_SUM_TOLERANCE,
    UNNORMALISED,
    LogitTransform,
    TokenStats,
)
from ppleval.logits.product import Product
from ppleval.logits.tensors import check_backend, reduction_dtype, to_device
from ppleval.logits.threads import use_one_thread_after_fork
from ppleval.logits.tiles import ProductScores, sums_of_rows
from ppleval.logits.torch_kernel import over_blocks


class ColumnSums(Protocol):
    """What a process's columns give of each scored row."""

    def merged(self, groups: Sequence[Processes]) -> tuple[TokenStats, torch.Tensor]:
        """The statistics (n,) of whole rows, and their faults; a collective of each group."""
        ...


@dataclass(frozen=True)
class PartWork:
    """What a process has to do for `reduce_part`."""

    targets: torch.Tensor  # (...), integers; of all rows, equal on all processes
    scored: torch.Tensor  # (...), bool, as well
    num_columns: int  # of the vocabulary, here
    settings: tuple  # what else has to be equal on all processes
    # Targets as numbers of columns, outside of [0, num_columns) where another process has them, and
    # whether they are scored: of the rows here.
    reduce: Callable[[torch.Tensor, torch.Tensor], ColumnSums]
    weights: torch.Tensor | None = None  # (N,), of all rows; only compared


def reduce_part(part: Part, mine: Attempt[PartWork]) -> Reduction:
    """Reduce the rows that this process has columns of.

    Args:
        part: what it has, and which processes have the rest. All of them call this.
        mine: the work, attempted by `part.attempt`.

    Returns:
        The statistics of the rows here; its targets are those of all rows.

    Raises:
        Exception: the error of this process's attempt.
        ValueError: the processes have different targets or settings, or their columns leave gaps or
            overlap.
        ConnectionError: another process failed or is gone.
    """
    reduced = part.attempt(_reduced, part, mine)
    met = reduced.then(
        lambda own: (own[1], {(part.vocab_start, part.vocab_start + mine.value.num_columns)})
    )
    for processes in part.groups:
        met = processes.attempt(_met, processes, met)
    vocab_size = _vocab_size(met.value[1])
    sums, work = reduced.value[0], mine.value
    targets, scored = work.targets, work.scored
    if (scored & ((targets < 0) | (targets >= vocab_size))).any():  # and so on every process
        stats = TokenStats(torch.zeros(scored[part.rows].shape, device="cpu"))
        faults = torch.tensor([OUT_OF_RANGE], dtype=torch.int32, device="cpu")
        return Reduction(stats, faults, targets, scored, vocab_size)
    stats, faults = sums.merged(part.column_groups)
    faults = _over(part.row_groups, faults, "max")
    here = to_device(scored[part.rows], stats.nll.device)
    places = here.flatten().nonzero().squeeze(1)
    columns = [v.new_zeros(here.numel()).index_copy(0, places, v) for v in stats.tensors]
    return Reduction(
        stats.with_tensors(columns).view(here.shape), faults, targets, scored, vocab_size
    )


def work_on_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scored: torch.Tensor,
    *,
    from_logits: bool = True,
    dtype: str | torch.dtype,
    backend: str,
    with_all: bool = False,
) -> PartWork:
    """The work for `reduce_part`.

    Args:
        logits: (..., num_columns), those here.
        targets, scored: of all rows.
        from_logits, dtype, backend, with_all: as for `kernels.launch`.
    """

    def reduce(own_targets: torch.Tensor, own_scored: torch.Tensor) -> ColumnSums:
        own = logits, own_targets, own_scored
        if not from_logits:
            return ProbabilitySums.of_probabilities(*own, dtype)
        return LogitSums.of_logits(*own, dtype=dtype, backend=backend, with_all=with_all)

    is_double = logits.dtype == torch.float64
    settings = (from_logits, with_all, torch.float64 if is_double else reduction_dtype(dtype))
    return PartWork(targets, scored, logits.shape[-1], settings, reduce)


def refuse_gradient(*tensors) -> None:
    """Raises ValueError if a backward pass may ask for a gradient of one of these."""
    if need_gradient(*(t for t in tensors if isinstance(t, torch.Tensor))):
        raise ValueError(
            "The nll of logits that several processes share has no gradient: call it under "
            "torch.no_grad(), or pass .detach()."
        )


def with_all_rows(reduction: Reduction, part: Part) -> Reduction:
    """The statistics of all rows (N,), on every process, of those that each has."""
    columns = []
    for values in reduction.stats.tensors:
        if part.row_groups:
            whole = values.new_zeros(reduction.targets.shape)
            whole[part.rows] = values
            values = _over(part.row_groups, whole, "sum")
        columns.append(values.flatten())
    targets, scored = reduction.targets.flatten(), reduction.scored.flatten()
    stats = reduction.stats.with_tensors(columns)
    return replace(reduction, stats=stats, targets=targets, scored=scored)


def _reduced(part: Part, mine: Attempt[PartWork]) -> tuple[ColumnSums, str]:
    """The sums of the columns here, and a hash of what has to be equal on all processes."""
    work = mine.value
    targets, scored = work.targets.to(torch.int64), work.scored
    compared = [targets, scored] if work.weights is None else [targets, scored, work.weights]
    parts = [tensor.contiguous().cpu().numpy().tobytes() for tensor in compared]
    whole = None if part.whole is None else tuple(part.whole.shape)
    equal = repr((whole, tuple(targets.shape), work.settings)).encode()
    digest = hashlib.sha256(b"|".join([equal, *parts])).hexdigest()
    with torch.no_grad():
        sums = work.reduce(targets[part.rows] - part.vocab_start, scored[part.rows])
    return sums, digest


def _met(processes: Processes, mine: Attempt[tuple[str, set]]) -> tuple[str, set]:
    """The hash, which is that of all, and the columns of all."""
    everyone = processes.gather(mine)
    if len({digest for digest, _ in everyone}) > 1:
        raise ValueError(
            "The processes that share these logits were given different targets, weights or "
            "settings: each needs those of all rows, equal to those of the others."
        )
    return everyone[0][0], set().union(*(columns for _, columns in everyone))


def _vocab_size(columns: set[tuple[int, int]]) -> int:
    """The end of columns that follow each other from 0."""
    ordered = sorted(columns)
    end = 0
    for first, after in ordered:
        if first != end:
            parts = ", ".join(f"{a} to {b}" for a, b in ordered)
            raise ValueError(
                f"vocab_start: the columns of the processes, {parts}, must follow each other from "
                "0, without a gap and without overlap."
            )
        end = after
    return end


def _over(
    groups: Sequence[Processes], values: torch.Tensor, kind: Literal["sum", "max"]
) -> torch.Tensor:
    return functools.reduce(lambda so_far, group: group.all_reduce(so_far, kind), groups, values)


@dataclass(frozen=True)
class LogitSums:
    """Of each scored row, what some columns give; each (n,), in the precision of the reduction."""

    peaks: torch.Tensor  # the largest score; NaN and infinities as they are
    log_totals: torch.Tensor  # log sum exp(score - peak)
    target_scores: torch.Tensor  # 0 where another process has the target
    exact_scores: torch.Tensor | None = None  # the same in more precision, as in ProductScores
    entropy: torch.Tensor | None = None  # of the prediction among these columns, nats
    # How many scores are above these (n,) numbers.
    count_above: Callable[[torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def of_logits(
        cls,
        logits: torch.Tensor,
        targets: torch.Tensor,
        scored: torch.Tensor,
        *,
        transform: LogitTransform = IDENTITY,
        dtype: str | torch.dtype,
        backend: str,
        with_all: bool = False,
    ) -> "LogitSums":
        """The sums of logits (..., num_columns); arguments as of `launch` and `PartWork`."""
        dtype = torch.float64 if logits.dtype == torch.float64 else reduction_dtype(dtype)
        targets, scored = (to_device(values, logits.device) for values in (targets, scored))
        places = scored.flatten().nonzero().squeeze(1)
        num_columns = logits.shape[-1]
        if num_columns == 0:
            return cls._nothing(len(places), dtype, logits.device, with_all=with_all)
        is_here = (targets >= 0) & (targets < num_columns)
        own = logits.gather(-1, targets.clamp(0, num_columns - 1)[..., None]).squeeze(-1)

        def of_scored(values: torch.Tensor) -> torch.Tensor:
            return values.flatten()[places]

        def count_above(scores: torch.Tensor) -> torch.Tensor:
            counts = torch.empty_like(scores)

            def count(block: torch.Tensor, here: slice, buffer: torch.Tensor) -> None:
                counts[here] = (block > scores[here, None]).sum(-1)

            on_host = scored.flatten().cpu()
            over_blocks(logits, on_host, len(places), dtype, transform, count)
            return counts

        target_scores = transform.apply_(of_scored(own).to(dtype)).where(of_scored(is_here), 0)
        if logits.device.type == "cpu" and backend != "triton" and not with_all:
            check_backend(backend)
            return cls(*_log_sums(logits, scored, len(places), transform, dtype), target_scores)
        # The nll of the largest logit is the log of the sum that is asked for.
        peaks, tops = logits.max(-1)
        options = {"transform": transform, "dtype": dtype, "backend": backend}
        stats = launch(logits, tops, scored, **options, with_all=with_all).stats
        return cls(
            transform.apply_(of_scored(peaks).to(dtype)),
            of_scored(stats.nll),
            target_scores,
            entropy=None if stats.entropy is None else of_scored(stats.entropy),
            count_above=count_above if with_all else None,
        )

    @classmethod
    def of_product(
        cls,
        hidden: torch.Tensor,
        product: Product,
        targets: torch.Tensor,
        *,
        transform: LogitTransform,
        dtype: str | torch.dtype,
    ) -> "LogitSums":
        """The sums of an output layer with some columns; arguments as of `tiles.product_nll`,
        and targets (n,) as of `PartWork`."""
        precision = torch.promote_types(product.dtype, reduction_dtype(dtype))
        if len(hidden) == 0 or len(product.weight) == 0:
            return cls._nothing(len(hidden), precision, hidden.device, with_all=False)
        layer = ProductScores(hidden, product, targets.to(torch.int64), transform, precision)
        sums = sums_of_rows(layer)
        is_here = (layer.targets >= 0) & (layer.targets < len(product.weight))
        target_scores, exact_scores = (
            scores.where(is_here, 0) for scores in (layer.target_scores, layer.exact_scores)
        )
        return cls(*sums, target_scores, exact_scores)

    @classmethod
    def _nothing(
        cls, num_rows: int, dtype: torch.dtype, device: torch.device, *, with_all: bool
    ) -> "LogitSums":
        """The sums of no columns."""
        nothing = torch.full((num_rows,), -torch.inf, dtype=dtype, device=device)
        zeros = torch.zeros_like(nothing)
        if not with_all:
            return cls(nothing, nothing, zeros)
        return cls(nothing, nothing, zeros, entropy=zeros, count_above=lambda scores: zeros)

    @classmethod
    def cat(cls, parts: Sequence["LogitSums"]) -> "LogitSums":
        """The parts of nll only, one after the other. There is at least one."""
        exact = [part.exact_scores for part in parts if part.exact_scores is not None]
        return cls(
            torch.cat([part.peaks for part in parts]),
            torch.cat([part.log_totals for part in parts]),
            torch.cat([part.target_scores for part in parts]),
            torch.cat(exact) if exact else None,  # of all, or of none
        )

    def merged(self, groups: Sequence[Processes]) -> tuple[TokenStats, torch.Tensor]:
        """The statistics (n,) of whole rows, and their faults; 3 numbers of each row pass, and 5
        with entropy and rank."""
        # Whether a backend takes NaN for the maximum does not matter: the sum of its row is NaN.
        peak = _over(groups, self.peaks, "max")
        gaps = self.peaks - peak
        # Columns of -inf only have no sum of their own, which is NaN, but add 0 to that of others.
        is_empty = self.peaks == -torch.inf
        totals = (gaps + self.log_totals).exp().where(~is_empty, 0)
        targets = self.target_scores
        if self.exact_scores is not None:
            # As ProductScores.nll, by what is known before the sums are.
            is_far = peak - targets > math.log(2)
            targets = torch.where(is_far, self.exact_scores, targets).to(targets.dtype)
        total, target = _over(groups, torch.stack([totals, targets]), "sum")
        log_total = total.log()
        nll = (peak - target) + log_total
        faults = torch.zeros(1, dtype=torch.int32, device=nll.device)
        if self.entropy is None or self.count_above is None:
            return TokenStats(nll), faults
        # With shares s of the probability: H = sum s H_of_columns - sum s log s.
        log_shares = gaps + self.log_totals - log_total
        shares = log_shares.exp()
        entropy = (shares * (self.entropy - log_shares)).where(~is_empty & (shares != 0), 0)
        parts = torch.stack([entropy, self.count_above(target)])
        entropy, num_above = _over(groups, parts, "sum")
        rank = num_above.to(torch.int32) + 1
        stats = TokenStats(nll, peak + log_total, entropy.clamp(min=0).where(total > 0, nll), rank)
        return stats, faults


def _log_sums(
    logits: torch.Tensor,
    scored: torch.Tensor,
    num_scored: int,
    transform: LogitTransform,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each scored row of logits on a CPU, the largest score and log sum exp(score - largest).

    The place of the largest, which `launch` would need, takes a CPU longer than all of this.
    """
    use_one_thread_after_fork()
    peaks = torch.empty(num_scored, dtype=dtype, device=logits.device)
    log_totals = torch.empty_like(peaks)

    def add_up(scores: torch.Tensor, here: slice, buffer: torch.Tensor) -> None:
        torch.amax(scores, -1, out=peaks[here])
        torch.sub(scores, peaks[here, None], out=buffer).exp_()
        torch.sum(buffer, -1, out=log_totals[here]).log_()

    over_blocks(logits, scored.flatten(), num_scored, dtype, transform, add_up)
    return peaks, log_totals


@dataclass(frozen=True)
class ProbabilitySums:
    """Of each scored row, the sum of the probabilities in some columns; each (n,)."""

    totals: torch.Tensor  # NaN where one is negative or not finite
    target_probabilities: torch.Tensor  # 0 where another process has the target

    @classmethod
    def of_probabilities(
        cls,
        probabilities: torch.Tensor,
        targets: torch.Tensor,
        scored: torch.Tensor,
        dtype: str | torch.dtype,
    ) -> "ProbabilitySums":
        """The sums of probabilities (..., num_columns); arguments as of `PartWork`."""
        is_double = probabilities.dtype == torch.float64
        dtype = torch.float64 if is_double else reduction_dtype(dtype)
        targets, scored = (to_device(v, probabilities.device).flatten() for v in (targets, scored))
        places, num_columns = scored.nonzero().squeeze(1), probabilities.shape[-1]
        own_targets = targets[places]
        totals = torch.zeros(len(places), dtype=dtype, device=probabilities.device)
        of_targets = torch.zeros_like(totals)

        def add(block: torch.Tensor, here: slice, buffer: torch.Tensor) -> None:
            row_sums = block.sum(-1)
            is_good = row_sums.isfinite() & (block.amin(-1) >= 0)
            totals[here] = row_sums.where(is_good, torch.nan)
            columns = own_targets[here]
            own = block.gather(1, columns.clamp(0, num_columns - 1)[:, None]).squeeze(1)
            of_targets[here] = own.where((columns >= 0) & (columns < num_columns), 0)

        if num_columns > 0:
            over_blocks(probabilities, scored.cpu(), len(places), dtype, IDENTITY, add)
        return cls(totals, of_targets)

    def merged(self, groups: Sequence[Processes]) -> tuple[TokenStats, torch.Tensor]:
        """The statistics (n,) of whole rows, and their faults; 2 numbers of each row pass."""
        parts = torch.stack([self.totals, self.target_probabilities])
        total, target = _over(groups, parts, "sum")
        wrong = {
            NO_PROBABILITY: ~total.isfinite(),
            UNNORMALISED: (total - 1).abs() > ROW_SUM_TOLERANCE,
        }
        # One place for each bit, so that the maxima over processes are those that any has.
        faults = torch.stack([rows.any().to(torch.int32) * bit for bit, rows in wrong.items()])
        return TokenStats(total.log() - target.log()), faults
