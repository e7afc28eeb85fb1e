"""What each backend's reduction of logits returns: statistics of tokens, and bits of faults."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeGuard

import torch

# Faults of the scored rows, one bit each. The kernels of triton_kernel.py name them by number.
OUT_OF_RANGE = 1  # a target is outside the vocabulary
NO_PROBABILITY = 2  # a row of probabilities holds a negative or non-finite value, or its sum is
UNNORMALISED = 4  # a row of probabilities does not sum to 1

# A warning tells of rows of probabilities whose sum is further than this from 1.
# bfloat16 keeps 8 bits: each probability is off by up to 2^-9, and so is their sum.
ROW_SUM_TOLERANCE = 0.01


@dataclass(frozen=True)
class TokenStats:
    """The nll of each token and, if asked for, more statistics of its row of logits.

    The shape of each begins with that of nll. Values are 0 where the token is not scored.
    """

    nll: torch.Tensor  # nats, float32 or float64
    lse: torch.Tensor | None = None  # logsumexp of the row, of the dtype of nll
    entropy: torch.Tensor | None = None  # of the prediction, nats, of the dtype of nll
    rank: torch.Tensor | None = None  # int32, 1 + the number of logits above that of the target
    expected_ids: torch.Tensor | None = None  # (..., k) int64, the k likeliest ids
    expected_nll: torch.Tensor | None = None  # (..., k) nats, of the dtype of nll
    share_nll: torch.Tensor | None = None  # of some ids together, nats, as mass.py has it

    @classmethod
    def empty(
        cls, size: int, dtype: torch.dtype, device: torch.device, *, with_all: bool
    ) -> "TokenStats":
        """Memory for `size` tokens; `with_all` adds lse, entropy and rank."""
        nll = torch.empty(size, dtype=dtype, device=device)
        if not with_all:
            return cls(nll)
        rank = torch.empty(size, dtype=torch.int32, device=device)
        return cls(nll, torch.empty_like(nll), torch.empty_like(nll), rank)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The parts, one after the other. There is at least one; all have the same statistics."""
        columns = zip(*(part.tensors for part in parts), strict=True)
        return parts[0].with_tensors([torch.cat(column) for column in columns])

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The statistics that were asked for."""
        return [value for value in vars(self).values() if value is not None]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Self:
        """These statistics with other values, in the order of `tensors`."""
        names = [name for name, value in vars(self).items() if value is not None]
        return type(self)(**dict(zip(names, tensors, strict=True)))

    def view(self, shape: torch.Size) -> Self:
        """The statistics with tokens of another shape."""
        return self.with_tensors([v.view((*shape, *v.shape[1:])) for v in self.tensors])

    def split(self, sizes: Sequence[int]) -> list[Self]:
        """Views of consecutive tokens, one for each size."""
        columns = zip(*(value.split(sizes) for value in self.tensors), strict=True)
        return [self.with_tensors(values) for values in columns]

    def __getitem__(self, tokens: slice) -> Self:
        """Views of some of the tokens."""
        return self.with_tensors([value[tokens] for value in self.tensors])


@dataclass(frozen=True)
class LogitTransform:
    """score = softcap tanh(logit_scale logit / softcap); without softcap: logit_scale logit.

    Raises:
        ValueError: a scale or softcap that is not a positive and finite number.
    """

    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not is_positive(self.softcap):
            raise ValueError(f"softcap must be a positive number or None, got {self.softcap!r}.")
        if not is_positive(self.logit_scale):
            raise ValueError(f"logit_scale must be a positive number, got {self.logit_scale!r}.")

    @property
    def is_identity(self) -> bool:
        """Whether scores are the logits themselves."""
        return self.logit_scale == 1 and self.softcap is None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The scores, in new memory. Their order is that of the logits."""
        return self.apply_(logits.clone())

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """The scores, in place of the logits."""
        if self.softcap is not None:
            return logits.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap)
        return logits if self.logit_scale == 1 else logits.mul_(self.logit_scale)

    def slopes(self, scores: torch.Tensor) -> torch.Tensor | float:
        """d score / d logit at these scores; a number where it is the same everywhere."""
        if self.softcap is None:
            return self.logit_scale
        # The derivative of tanh is 1 - tanh^2.
        return (scores / self.softcap).square_().neg_().add_(1).mul_(self.logit_scale)


def is_positive(value) -> TypeGuard[numbers.Real]:
    """Whether it is a positive and finite number."""
    # typeshed's Real has no __gt__.
    return isinstance(value, numbers.Real) and 0 < value < math.inf  # pyright: ignore[reportOperatorIssue]


IDENTITY = LogitTransform()
