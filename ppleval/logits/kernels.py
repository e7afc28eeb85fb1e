"""The one place that chooses a backend, and a reduction that may still be running on its device.

Nothing here knows of evaluate, datasets or transformers.
"""

import functools
import logging
import operator
from dataclasses import dataclass, replace

import torch

from ppleval.logits import torch_kernel, triton_kernel
from ppleval.logits.outputs import (
    IDENTITY,
    NO_PROBABILITY,
    OUT_OF_RANGE,
    UNNORMALISED,
    LogitTransform,
    TokenStats,
)
from ppleval.logits.tensors import check_backend, reduction_dtype, to_host
from ppleval.logits.threads import use_one_thread_after_fork
from ppleval.user_warnings import warn_user

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


@dataclass(frozen=True)
class Reduction:
    """A reduction that may still be running on the device of the logits.

    Only `result` and `on_host` wait for the device, once.
    """

    stats: TokenStats  # not checked yet; `result` and `on_host` check them
    faults: torch.Tensor  # (n,) int32: bits of outputs.py
    targets: torch.Tensor
    scored: torch.Tensor  # bool, of the shape of targets
    vocab_size: int

    def result(self) -> TokenStats:
        """The statistics, on the device of the logits.

        Raises:
            TargetOutOfRangeError: a scored target outside [0, vocab_size).
            ValueError: probabilities, or their sum, that are negative or not finite.
        """
        if any(faults := self.faults.tolist()):
            self._tell(faults)
        return self.stats

    def on_host(self, *others: torch.Tensor) -> tuple[TokenStats, *tuple[torch.Tensor, ...]]:
        """The statistics on the CPU, and other tensors with them, in one copy from each device.

        Raises: as `result`.
        """
        faults, *copies = to_host(self.faults, *others, *self.stats.tensors)
        if any(bits := faults.tolist()):
            self._tell(bits)
        stats = self.stats.with_tensors(copies[len(others) :])
        return stats, *copies[: len(others)]

    def _tell(self, faults: list[int]) -> None:
        """Raise, or warn of, what is wrong."""
        bits = functools.reduce(operator.or_, faults, 0)
        if bits & OUT_OF_RANGE:
            targets = self.targets.cpu()
            outside = self.scored.cpu() & ((targets < 0) | (targets >= self.vocab_size))
            place = tuple(outside.nonzero()[0].tolist())
            raise TargetOutOfRangeError(place, int(targets[place]), self.vocab_size)
        if bits & NO_PROBABILITY:
            raise ValueError(
                "from_logits=False takes probabilities, got a negative or non-finite value, or a "
                "row whose sum overflows. For logits or log-probabilities pass from_logits=True."
            )
        if bits & UNNORMALISED:
            warn_user(
                "With from_logits=False, some rows of probabilities do not sum to 1; "
                "each row is divided by its sum."
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
            bits = torch_kernel.reduce(*arguments, **options)
            faults = torch.tensor([bits], dtype=torch.int32, device="cpu")
        if targets.dim() != 1:
            stats = stats.view(targets.shape)
        if top_k > 0:
            assert stats.lse is not None  # because of with_all
            # A transform does not change the order.
            values, ids = logits.topk(min(top_k, logits.shape[-1]), -1)
            expected_nll = stats.lse[..., None] - transform(values.to(dtype))
            stats = replace(stats, expected_ids=ids, expected_nll=expected_nll)
    return Reduction(stats, faults, targets, scored, logits.shape[-1])


def _takes_triton(logits: torch.Tensor, dtype: torch.dtype, backend: str) -> bool:
    if backend == "auto":
        may = logits.device.type == "cuda" and not triton_kernel.INTERPRETED and not _triton_failed
        return may and triton_kernel.why_not(logits, dtype) is None
    check_backend(backend)
    if backend == "torch":
        return False
    reason = triton_kernel.why_not(logits, dtype)
    if reason is not None:
        raise ValueError(f'backend="triton" cannot run: {reason}. backend="auto" finds another.')
    return True


def _by_triton(*arguments, may_fail: bool, **options) -> torch.Tensor | None:
    """The faults; None if Triton failed and `may_fail`."""
    global _triton_failed
    try:
        return triton_kernel.reduce(*arguments, **options)
    except torch.cuda.OutOfMemoryError:  # torch would need more
        raise
    # A compiler can fail on a user's machine in any way: no C compiler, a card too old.
    except Exception as error:
        if not may_fail:
            raise
        _triton_failed = True
        logger.warning("Triton failed, so torch reduces the logits from now on: %s", error)
        return None
