"""The backward pass of `linear_token_nll`; the nll itself is not made here.

    G = d nll / d logits of some rows, whose logits are made again      (n, V), nll_gradients.py
    d nll / d hidden = G weight      d nll / d weight = G^T hidden      d nll / d bias = G^T 1

The gradients of weight and bias are summed over all rows in the precision of the product, float32
or float64, and rounded once.
"""

from collections.abc import Iterator

import torch

from .nll_gradients import (
    gradient_of_logits,
    has_gradient,
    of_rows,
    refuse_second_derivative,
    write_gradient,
)
from .nll_product import UPCAST_AT_ONCE
from .nll_threads import share
from .nll_tiles import Tiles
from .nll_transform import LogitTransform

# Elements of the logits that exist at once. On a CPU 64 MB of float32: for each part of the rows
# the weight's gradient is read and written once, and half of it took longer for that.
LOGITS_ON_CPU = 2**24
LOGITS_ELSEWHERE = 2**26
# The widest tile of a product on a CPU: a narrow one, too, has tiles for several threads.
MOST_COLUMNS = 256


class LinearNll(torch.autograd.Function):
    """Gives an nll (...) its gradient for hidden states (..., H), weight (V, H) and bias (V,)."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, nll, targets, scored, transform):
        ctx.save_for_backward(hidden, weight, bias, targets, scored)
        ctx.transform = transform
        return nll.clone()

    @staticmethod
    def backward(ctx, *grad_outputs):
        refuse_second_derivative()
        hidden, weight, bias, targets, scored = ctx.saved_tensors
        (grad_nll,) = grad_outputs
        layer = _LayerGradients(weight, bias, ctx.transform, ctx.needs_input_grad[:3])
        rows = hidden.detach().reshape(scored.numel(), weight.shape[1])
        grad_rows = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        places = has_gradient(scored, grad_nll).nonzero().squeeze(1)
        for block in places.split(layer.rows_at_once) if len(places) > 0 else ():
            own = of_rows(block, targets, grad_nll)
            grad_rows[block] = layer.add(rows[block], *own).to(rows.dtype)
        return grad_rows.view(hidden.shape), *layer.rounded(), None, None, None, None


class _LayerGradients:
    """The gradients of an output layer, added up over blocks of rows."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transform: LogitTransform,
        wanted: tuple[bool, bool, bool],  # of hidden, weight and bias
    ):
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._transform = transform
        self._of_hidden, of_weight, of_bias = wanted
        # As the product of the forward pass.
        self._dtype = torch.promote_types(weight.dtype, torch.float32)
        self._of_weight = self._zeros(weight.shape) if of_weight else None
        self._of_bias = self._zeros((len(weight), 1)) if of_bias else None
        at_once = LOGITS_ON_CPU if weight.device.type == "cpu" else LOGITS_ELSEWHERE
        self.rows_at_once = max(1, at_once // max(1, len(weight)))

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._weight.device)

    def add(
        self, hidden: torch.Tensor, targets: torch.Tensor, grad_nll: torch.Tensor
    ) -> torch.Tensor:
        """Add the gradients of some rows; returns that of hidden (n, H), 0 if it is not wanted."""
        hidden = hidden.to(self._dtype)
        logits = self._logits(hidden)
        kept = torch.ones(len(hidden), dtype=torch.bool, device="cpu")
        write_gradient(
            logits,
            kept,
            targets,
            grad_nll.to(self._dtype),
            logits,
            formula=gradient_of_logits,
            transform=self._transform,
        )
        of_hidden = torch.zeros_like(hidden)
        for part, weight in self._parts():
            gradient = logits[:, part]
            if self._of_hidden:
                _add_product(of_hidden, gradient, weight)
            if self._of_weight is not None:
                _add_product(self._of_weight[part], gradient.t(), hidden)
            if self._of_bias is not None:
                _add_product(self._of_bias[part], gradient.t(), hidden.new_ones(len(hidden), 1))
        return of_hidden

    def rounded(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradients of weight and bias in their dtypes."""
        of_weight = None if self._of_weight is None else self._of_weight.to(self._weight.dtype)
        if self._of_bias is None or self._bias is None:
            return of_weight, None
        return of_weight, self._of_bias.squeeze(1).to(self._bias.dtype)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._zeros((len(hidden), len(self._weight)))
        if self._bias is not None:
            logits += self._bias
        for part, weight in self._parts():
            _add_product(logits[:, part], hidden, weight.t())
        return logits

    def _parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some rows of the weight at a time, as they are multiplied."""
        at_once = max(1, UPCAST_AT_ONCE // max(1, self._weight.shape[1]))
        for first in range(0, len(self._weight), at_once):
            part = slice(first, first + at_once)
            yield part, self._weight[part].to(self._dtype)


def _add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out (n, m) += left (n, k) right (k, m).

    On a CPU each thread makes tiles of `out`: BLAS itself would share a product out by the number
    of threads, and its last bits would depend on it.
    """
    if out.numel() == 0:
        return
    if out.device.type != "cpu":
        out.addmm_(left, right)
        return
    num_rows, num_columns = out.shape
    tiles = Tiles(num_rows, num_columns, MOST_COLUMNS)

    def work(numbers: Iterator[int]) -> None:
        for number in numbers:
            _, columns, rows = tiles.place(number)
            out[rows, columns].addmm_(left[rows], right[:, columns])

    share(work, tiles.count)
