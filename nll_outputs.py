"""What the reduction of logits gives, whichever backend does it, and what it may find wrong."""

from dataclasses import dataclass

import torch

# Bits of what is wrong with the scored rows. The kernels of nll_triton.py name them by number.
OUT_OF_RANGE = 1  # a target is no id of the vocabulary
NO_PROBABILITY = 2  # a row of probabilities holds a negative or non-finite value
UNNORMALISED = 4  # a row of probabilities does not sum to 1

# Probabilities whose rows are further than this from 1 in sum are normalised with a warning.
# bfloat16 keeps 8 bits: each probability is off by up to 2^-9, and so is their sum.
ROW_SUM_TOLERANCE = 0.01


@dataclass(frozen=True)
class TokenStats:
    """Of each token its nll and, where they were asked for, what else one pass over its row gives.

    All have one shape, and are 0 where the token is not scored.
    """

    nll: torch.Tensor  # nats, float32 or float64
    lse: torch.Tensor | None = None  # logsumexp of the row, of the dtype of nll
    entropy: torch.Tensor | None = None  # of the prediction, nats, of the dtype of nll
    rank: torch.Tensor | None = None  # int32, 1 + the number of logits above that of the target

    @classmethod
    def empty(
        cls, size: int, dtype: torch.dtype, device: torch.device, *, with_all: bool
    ) -> "TokenStats":
        """Memory for `size` tokens."""
        dtypes = [dtype, dtype, dtype, torch.int32] if with_all else [dtype]
        return cls(*(torch.empty(size, dtype=dtype, device=device) for dtype in dtypes))

    def view(self, shape: torch.Size) -> "TokenStats":
        """The same in another shape."""
        return TokenStats(*(None if v is None else v.view(shape) for v in vars(self).values()))

    def __getitem__(self, tokens: slice) -> "TokenStats":
        """Views of some of the tokens."""
        return TokenStats(*(None if v is None else v[tokens] for v in vars(self).values()))
