"""The scale, the cap or both that a model applies to its last layer's output before softmax."""

import math
import numbers
from dataclasses import dataclass
from typing import TypeGuard

import torch


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
