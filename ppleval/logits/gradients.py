"""The backward pass of `token_nll`, in blocks of rows; the nll itself is not made here.

    d nll / d logits        = softmax(logits) - onehot(target)              from_logits=True
    d nll / d probabilities = 1 / sum(p) - onehot(target) / p[target]       from_logits=False

Each block passes through a buffer, so that no second tensor of the size of the logits exists beside
the gradient. Rows that are not scored, or whose nll gets the gradient 0, are not read.
"""

from collections.abc import Callable, Iterator

import torch

from ppleval.logits.outputs import IDENTITY, LogitTransform
from ppleval.logits.product import UPCAST_AT_ONCE
from ppleval.logits.threads import over_threads
from ppleval.logits.tiles import Tiles
from ppleval.logits.torch_kernel import over_blocks


def attached(value, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The caller's `value` with its graph if it is a tensor, else the tensor made of it."""
    return value if isinstance(value, torch.Tensor) else tensor


def need_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward pass may ask for the gradient of one of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class LogitsNll(torch.autograd.Function):
    """Gives an nll (...) that is known its gradient for logits or probabilities (..., V)."""

    @staticmethod
    def forward(ctx, logits, nll, targets, scored, from_logits):
        ctx.save_for_backward(logits, targets, scored)
        ctx.formula = gradient_of_logits if from_logits else _gradient_of_probabilities
        return nll.clone()

    @staticmethod
    def backward(ctx, *grad_outputs):
        refuse_second_derivative()
        logits, targets, scored = ctx.saved_tensors
        logits, (grad_nll,) = logits.detach(), grad_outputs
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        rows = gradient.view(scored.numel(), logits.shape[-1])
        kept = has_gradient(scored, grad_nll).cpu()
        rows.index_fill_(0, (~kept).nonzero().squeeze(1).to(rows.device), 0)
        own = of_rows(kept.nonzero().squeeze(1), targets, grad_nll)
        write_gradient(logits, kept, *own, rows, formula=ctx.formula)
        return gradient, None, None, None, None


def refuse_second_derivative() -> None:
    """Raises NotImplementedError in a backward pass that is to be differentiated itself."""
    # torch's once_differentiable gives silent zeros where the loss is a plain sum.
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "The gradient of token_nll and linear_token_nll cannot be differentiated again, as "
            "create_graph=True asks for; F.cross_entropy's can."
        )


def has_gradient(scored: torch.Tensor, grad_nll: torch.Tensor) -> torch.Tensor:
    """Whether a row has a gradient at all, (N,) bool."""
    # subtle: without a weight in the loss, a row of NaN must not reach it by NaN * 0.
    return scored.to(grad_nll.device).flatten() & (grad_nll.flatten() != 0)


def of_rows(
    places: torch.Tensor, targets: torch.Tensor, grad_nll: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """targets and grad_nll (...) of some rows, (n, 1) each, on the device of grad_nll."""
    targets, grad_nll = (v.flatten()[places.to(v.device), None] for v in (targets, grad_nll))
    return targets.to(grad_nll.device, torch.int64), grad_nll


def write_gradient(
    logits: torch.Tensor,
    kept: torch.Tensor,
    targets: torch.Tensor,
    grad_nll: torch.Tensor,
    out: torch.Tensor,
    *,
    formula: Callable,
    transform: LogitTransform = IDENTITY,
) -> None:
    """Write the gradient of the rows of logits (..., V) that are kept.

    Args:
        logits: of any float dtype, device and strides.
        kept: (N,) bool, on the CPU.
        targets, grad_nll: (n, 1), of the kept rows; the gradient is computed in the dtype of the
            latter, and rounded once.
        out: (N, V); may be the logits themselves.
        formula: `gradient_of_logits` or `_gradient_of_probabilities`.
        transform: what makes scores of the logits.
    """
    places = kept.nonzero().squeeze(1)

    def write(scores: torch.Tensor, here: slice, buffer: torch.Tensor) -> None:
        slopes = transform.slopes(scores)  # first, because the buffer may be the scores
        formula(scores, targets[here], grad_nll[here], buffer)
        if not transform.is_identity:
            buffer.mul_(slopes)
        own = places[here]
        first, last = int(own[0]), int(own[-1])
        if last - first + 1 == len(own):
            out[first : last + 1] = buffer
        else:
            out.index_copy_(0, own.to(out.device), buffer.to(out.dtype))

    over_blocks(logits, kept, len(places), grad_nll.dtype, transform, write)


def gradient_of_logits(
    scores: torch.Tensor, targets: torch.Tensor, grad_nll: torch.Tensor, out: torch.Tensor
) -> None:
    """grad_nll (softmax(scores) - onehot(targets)) of a block; `out` may be the scores."""
    torch.softmax(scores, -1, out=out)
    taken, others = _set_apart(out, targets)
    # torch adds up a row in one go, so its softmax is off by 5e-5 of itself at 262144 columns.
    factors = grad_nll / (others + taken)
    out.mul_(factors).scatter_(1, targets, -others * factors)


def _gradient_of_probabilities(
    probabilities: torch.Tensor, targets: torch.Tensor, grad_nll: torch.Tensor, out: torch.Tensor
) -> None:
    """grad_nll (1 / sum(p) - onehot(targets) / p[target]) of a block; `out` may be p."""
    if out is not probabilities:
        out.copy_(probabilities)
    taken, others = _set_apart(out, targets)
    totals = others + taken
    factors = grad_nll / totals.where(totals > 0, torch.nan)  # a row of zeros has an nll of NaN
    out.copy_(factors.expand_as(out)).scatter_(1, targets, -others / taken * factors)


def _set_apart(values: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values of the targets, sums of the others), (n, 1) each; the former become 0.

    The sum of the others is 1 - p[target] also where the latter is nearly 1.
    """
    taken = values.gather(1, targets)
    return taken, values.scatter_(1, targets, 0).sum(1, keepdim=True)


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

    over_threads(work, tiles.count)
