"""Logits -> nll per token, and the one place that chooses a backend.

Nothing here knows of evaluate, datasets or transformers.
"""

import functools
import logging
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from . import nll_torch, nll_triton
from .nll_gradients import LogitsNll, attached, need_gradient
from .nll_outputs import NO_PROBABILITY, OUT_OF_RANGE, UNNORMALISED, TokenStats
from .nll_threads import use_one_thread_after_fork
from .nll_transform import IDENTITY, LogitTransform
from .tensors import (
    IGNORE_INDEX,
    as_tensor,
    check_backend,
    check_types,
    is_scored,
    reduction_dtype,
    to_host,
)

logger = logging.getLogger(__name__)

# Set once Triton has failed, so that "auto" does not try it again for every batch.
_triton_failed = False


class TargetOutOfRangeError(ValueError):
    """A scored target outside the vocabulary; `place` is its index in the targets."""

    def __init__(self, place: tuple[int, ...], target: int, vocab_size: int):
        self.place, self.target, self.vocab_size = place, target, vocab_size
        super().__init__(self.message("targets", place))

    def message(self, name: str, place: tuple[int, ...]) -> str:
        """The error for a caller who has another name and place for the target."""
        return (
            f"{name}{list(place)} is {self.target}, outside the vocabulary of {self.vocab_size} "
            f"ids [0, {self.vocab_size}). If it marks a position that is not to be scored, pass "
            f"ignore_index={self.target}."
        )


def token_nll(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int | Sequence[int] | None = IGNORE_INDEX,
    from_logits: bool = True,
    dtype: str | torch.dtype = torch.float32,
    backend: str = "auto",
) -> torch.Tensor:
    """Negative log-likelihood of each target, in nats.

        nll = logsumexp(logits, -1) - logits[target]            from_logits=True
        nll = log(sum(p, -1)) - log(p[target])                  from_logits=False

    It equals `F.cross_entropy(logits.float(), targets, reduction="none")`, without a second tensor
    of the size of the logits. On CUDA each logit is read once, by a Triton kernel; elsewhere blocks
    of rows pass through a buffer.

    Logits that require a gradient get one, block by block and rounded once; a row has none where it
    is ignored or its nll has weight 0, and NaN where its nll is NaN. It cannot be differentiated
    again.

    Args:
        logits: (..., vocab_size), any float dtype, device and strides; an array or nested list is
            converted. With `from_logits=False`: probabilities, divided by their row sum.
        targets: (...), integer ids; moved to the device of the logits.
        ignore_index: the id or ids that are not scored, None for none.
        from_logits: whether `logits` are scores before softmax (log-probabilities are such scores).
        dtype: float32 or float64, the precision of the reduction; float64 logits take float64.
        backend: "triton", "torch", or "auto" for Triton on CUDA, where it is installed and the
            reduction is in float32, and else torch.

    Returns:
        nll, the shape of `targets`, float32 or float64, on the device of the logits; 0 where
        ignored, inf where the target has probability 0, NaN where its row holds NaN or +inf or has
        no probability anywhere.

    Raises:
        TypeError: logits that are not floating point, targets that are not integers.
        ValueError: shapes that do not fit, a scored target outside [0, vocab_size), with
            `from_logits=False` a negative or non-finite value in a scored row, and with
            `backend="triton"` a device or dtype that it does not run on.
    """
    given = logits
    logits, targets = _checked(logits, targets)
    scored = is_scored(targets, ignore_index)
    options = {"from_logits": from_logits, "dtype": dtype, "backend": backend}
    nll = launch(logits, targets, scored, **options).result().nll
    given = attached(given, logits)
    if need_gradient(given):
        return LogitsNll.apply(given, nll, targets, scored, from_logits)
    return nll


def token_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int | Sequence[int] | None = IGNORE_INDEX,
    dtype: str | torch.dtype = torch.float32,
    backend: str = "auto",
) -> TokenStats:
    """nll, and what the same pass over the logits gives besides.

        lse     = logsumexp(logits, -1)                                 of each row
        entropy = -sum(p log p, -1) with p = softmax(logits, -1)        nats, of the prediction
        rank    = 1 + sum(logits > logits[target], -1)                  1 where it is the argmax

    Where a row holds NaN, its order is undefined and the rank means nothing.

    Args, Raises: as `token_nll`.

    Returns:
        nll, lse, entropy and rank, each of the shape of `targets`; 0 where ignored.
    """
    logits, targets = _checked(logits, targets)
    scored = is_scored(targets, ignore_index)
    return launch(logits, targets, scored, dtype=dtype, backend=backend, with_all=True).result()


def _checked(logits, targets) -> tuple[torch.Tensor, torch.Tensor]:
    logits, targets = as_tensor(logits, "logits"), as_tensor(targets, "targets")
    check_types(logits, targets, "logits", "targets")
    if logits.dim() == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits must be (..., vocab_size) and targets (...), got {tuple(logits.shape)} "
            f"and {tuple(targets.shape)}."
        )
    return logits, targets


@dataclass(frozen=True)
class Reduction:
    """A reduction that may still be running on the device of the logits.

    Only `result` and `on_host` wait for the device, once.
    """

    stats: TokenStats  # not checked yet; `result` and `on_host` check them
    faults: torch.Tensor  # (n,) int32: bits of nll_outputs.py
    targets: torch.Tensor
    scored: torch.Tensor  # bool, of the shape of targets
    vocab_size: int

    def result(self) -> TokenStats:
        """The statistics, on the device of the logits.

        Raises:
            TargetOutOfRangeError: a scored target outside [0, vocab_size).
            ValueError: probabilities that are negative or not finite.
        """
        self._check(self.faults.tolist())
        return self.stats

    def on_host(self, *others: torch.Tensor) -> tuple[TokenStats, *tuple[torch.Tensor, ...]]:
        """The statistics on the CPU, and other tensors with them, in one copy from each device.

        Raises: as `result`.
        """
        faults, *copies = to_host(self.faults, *others, *self.stats.tensors)
        self._check(faults.tolist())
        stats = self.stats.with_tensors(copies[len(others) :])
        return stats, *copies[: len(others)]

    def _check(self, faults: list[int]) -> None:
        found = functools.reduce(operator.or_, faults, 0)
        if found & OUT_OF_RANGE:
            targets = self.targets.cpu()
            outside = self.scored.cpu() & ((targets < 0) | (targets >= self.vocab_size))
            place = tuple(outside.nonzero()[0].tolist())
            raise TargetOutOfRangeError(place, int(targets[place]), self.vocab_size)
        if found & NO_PROBABILITY:
            raise ValueError(
                "from_logits=False takes probabilities, got a negative or non-finite value. "
                "For logits or log-probabilities pass from_logits=True."
            )
        if found & UNNORMALISED:
            warnings.warn(
                "With from_logits=False, some rows of probabilities do not sum to 1; "
                "each row is divided by its sum.",
                stacklevel=4,
            )


def launch(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scored: torch.Tensor,
    *,
    from_logits: bool = True,
    transform: LogitTransform = IDENTITY,
    dtype: str | torch.dtype = torch.float32,
    backend: str = "auto",
    with_all: bool = False,
    top_k: int = 0,
) -> Reduction:
    """Start a reduction; with Triton, nothing here waits for the device.

    Args:
        logits: (..., vocab_size), floating point.
        targets: (...), integers.
        scored: (...), bool.
        from_logits, dtype, backend: as for `token_nll`.
        transform: logits -> scores.
        with_all: also lse, entropy and rank; not of probabilities.
        top_k: also the likeliest ids of each row, at most this many; needs `with_all`.

    Raises:
        ValueError: an unknown dtype or backend, or one that cannot run here.
    """
    assert from_logits or not with_all
    assert with_all or top_k == 0
    use_one_thread_after_fork()
    dtype = torch.float64 if logits.dtype == torch.float64 else reduction_dtype(dtype)
    flat_targets = targets.to(torch.int64).flatten()
    flat_scored = scored.flatten()
    stats = TokenStats.empty(targets.numel(), dtype, logits.device, with_all=with_all)
    arguments = (logits, flat_targets, flat_scored, stats)
    options = {"from_logits": from_logits, "transform": transform}
    with torch.no_grad():
        faults = None
        if _takes_triton(logits, dtype, backend):
            faults = _by_triton(*arguments, **options, may_fail=backend == "auto")
        if faults is None:
            faults = nll_torch.reduce(*arguments, **options)
        stats = stats.view(targets.shape)
        if top_k > 0:
            assert stats.lse is not None  # because of with_all
            # A transform does not change the order.
            values, ids = logits.topk(min(top_k, logits.shape[-1]), -1)
            expected_nll = stats.lse[..., None] - transform(values.to(dtype))
            stats = replace(stats, expected_ids=ids, expected_nll=expected_nll)
    return Reduction(stats, faults, targets, scored, logits.shape[-1])


def _takes_triton(logits: torch.Tensor, dtype: torch.dtype, backend: str) -> bool:
    check_backend(backend)
    if backend == "torch":
        return False
    reason = nll_triton.why_not(logits, dtype)
    if backend == "auto":
        can = reason is None and not nll_triton.INTERPRETED and not _triton_failed
        return logits.device.type == "cuda" and can
    if reason is not None:
        raise ValueError(f'backend="triton" cannot run: {reason}. backend="auto" finds another.')
    return True


def _by_triton(*arguments, may_fail: bool, **options) -> torch.Tensor | None:
    """The faults; None if Triton failed and `may_fail`."""
    global _triton_failed
    try:
        return nll_triton.reduce(*arguments, **options)
    except torch.cuda.OutOfMemoryError:  # torch would need more
        raise
    # A compiler can fail on a user's machine in any way: no C compiler, a card too old.
    except Exception as error:
        if not may_fail:
            raise
        _triton_failed = True
        logger.warning("Triton failed, so torch reduces the logits from now on: %s", error)
        return None
