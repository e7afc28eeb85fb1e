"""What each backend's reduction of logits returns: statistics of tokens, and bits of faults."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

# Faults of the scored rows, one bit each. The kernels of nll_triton.py name them by number.
OUT_OF_RANGE = 1  # a target is outside the vocabulary
NO_PROBABILITY = 2  # a row of probabilities holds a negative or non-finite value
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
    share_nll: torch.Tensor | None = None  # of some ids together, nats, as nll_share.py has it

    @classmethod
    def empty(
        cls, size: int, dtype: torch.dtype, device: torch.device, *, with_all: bool
    ) -> "TokenStats":
        """Memory for `size` tokens; `with_all` adds lse, entropy and rank."""
        dtypes = [dtype, dtype, dtype, torch.int32] if with_all else [dtype]
        return cls(*(torch.empty(size, dtype=dtype, device=device) for dtype in dtypes))

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
        """The same statistics, with these values in the order of `tensors`."""
        names = [name for name, value in vars(self).items() if value is not None]
        return type(self)(**dict(zip(names, tensors, strict=True)))

    def view(self, shape: torch.Size) -> Self:
        """The same for tokens of another shape."""
        return self.with_tensors([v.view((*shape, *v.shape[1:])) for v in self.tensors])

    def split(self, sizes: Sequence[int]) -> list[Self]:
        """Views of consecutive tokens, one for each size."""
        columns = zip(*(value.split(sizes) for value in self.tensors), strict=True)
        return [self.with_tensors(values) for values in columns]

    def __getitem__(self, tokens: slice) -> Self:
        """Views of some of the tokens."""
        return self.with_tensors([value[tokens] for value in self.tensors])
