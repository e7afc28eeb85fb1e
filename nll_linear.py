"""Hidden states and an output layer -> nll per token, without the logits of all rows.

A few rows at a time pass through one buffer: the product with the weight, and the reduction of
`nll.py`. A kernel that does both, as Liger and cut-cross-entropy have it, was not built: whether it
is faster can only be told on a GPU.
"""

from collections.abc import Callable, Sequence

import torch

from .nll import Reduction, launch
from .nll_outputs import TokenStats
from .nll_transform import LogitTransform
from .tensors import IGNORE_INDEX, as_tensor, check_types, is_scored

# Elements of the buffer. On a CPU, 32 MB of float32: more gains nothing. Elsewhere, just below 256
# MiB, which at the largest vocabularies are still rows enough to keep the matrix units busy.
LOGITS_ON_CPU = 2**23
LOGITS_ELSEWHERE = 2**26 - 2**20
# What can be multiplied.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Rows that fill the tiles of a matrix product on a GPU.
ROWS_OF_TILE = 128
# Elements of a weight that are turned into float32 at once: 16 MB.
UPCAST_AT_ONCE = 2**22


def linear_token_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int | Sequence[int] | None = IGNORE_INDEX,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dtype: str | torch.dtype = torch.float32,
    backend: str = "auto",
) -> torch.Tensor:
    """Negative log-likelihood of each target under an output layer, in nats.

        logits = logit_scale (hidden weight^T + bias)
        logits = softcap tanh(logits / softcap)                 where there is a softcap (Gemma 2)
        nll    = logsumexp(logits, -1) - logits[target]

    It equals `token_nll` of these logits, in float32 also where hidden and weight are not: products
    of float16 and bfloat16 are summed and kept in float32, not rounded back. The rows of ignored
    targets are left out of the product, and logits exist for a few rows at a time.

    Args:
        hidden: (..., hidden_size), floating point: what the output layer gets.
        weight: (vocab_size, hidden_size), floating point, as `torch.nn.Linear` has it, on the
            device of `hidden`.
        targets: (...), integer ids.
        bias: (vocab_size,) or None.
        softcap, logit_scale: as above; a softcap is positive.
        ignore_index, backend: as for `token_nll`.
        dtype: the precision of the reduction; the product is made in that of the weight, but at
            least in float32.

    Returns:
        nll, the shape of `targets`, float32 or float64, on the device of `hidden`; 0 where ignored.

    Raises:
        TypeError: hidden, weight or bias that are not float16, bfloat16, float32 or float64;
            targets that are not integers.
        ValueError: shapes that do not fit, a softcap or scale that is not positive, and as
            `token_nll`.
    """
    hidden, weight = as_tensor(hidden, "hidden"), as_tensor(weight, "weight")
    targets = as_tensor(targets, "targets")
    bias = None if bias is None else as_tensor(bias, "bias")
    check_types(hidden, targets, "hidden", "targets")
    fits = hidden.dim() > 0 and weight.dim() == 2 and hidden.shape[-1] == weight.shape[1]
    if not fits or hidden.shape[:-1] != targets.shape:
        raise ValueError(
            "hidden must be (..., hidden_size), weight (vocab_size, hidden_size) and targets "
            f"(...), got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be (vocab_size,), here {tuple(weight.shape[:1])}, got {tuple(bias.shape)}."
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOATS:
            names = "float16, bfloat16, float32 or float64"
            raise TypeError(f"{name} must be {names}, got {tensor.dtype}.")
    transform = LogitTransform(logit_scale, softcap)
    with torch.no_grad():
        scored = is_scored(targets, ignore_index)
        positions = scored.flatten().nonzero().squeeze(1)
        buffer = LogitsBuffer()
        found = launch_rows(
            hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None],
            positions.to(hidden.device),
            targets.flatten()[positions],
            lambda rows: buffer.product(rows, weight, bias),
            len(weight),
            transform=transform,
            dtype=dtype,
            backend=backend,
        )
        nll = torch.zeros(targets.numel(), dtype=found.stats.nll.dtype, device=hidden.device)
        nll[positions.to(hidden.device)] = found.stats.nll
        stats = TokenStats(nll.view(targets.shape))
    return Reduction(stats, found.faults, targets, scored, len(weight)).result().nll


def launch_rows(
    rows: torch.Tensor,
    positions: torch.Tensor,
    targets: torch.Tensor,
    to_logits: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    *,
    transform: LogitTransform,
    dtype: str | torch.dtype,
    backend: str,
    with_all: bool = False,
    top_k: int = 0,
) -> Reduction:
    """Start to reduce logits that exist for some rows at a time.

    Args:
        rows: (N, ...), from which logits are made.
        positions: (n,) of those to reduce, on the device of the rows.
        targets: (n,) integers.
        to_logits: logits (k, vocab_size) of rows (k, ...).
        transform, dtype, backend, with_all, top_k: as for `nll.launch`.

    Raises:
        ValueError: as `nll.launch`.
    """
    options = {"transform": transform, "dtype": dtype, "backend": backend}
    options |= {"with_all": with_all, "top_k": top_k}
    at_once = rows_at_once(vocab_size, rows.device)
    scored = torch.ones_like(targets, dtype=torch.bool)
    columns = (values.split(at_once) for values in (positions, targets, scored))
    parts = [
        launch(to_logits(rows[block]), *these, **options)
        for block, *these in zip(*columns, strict=True)
    ]
    stats = TokenStats.cat([part.stats for part in parts])
    faults = torch.cat([part.faults for part in parts])
    return Reduction(stats, faults, targets, scored, vocab_size)


class LogitsBuffer:
    """The memory through which the logits of an output layer pass, part after part."""

    def __init__(self):
        self._logits: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None  # a part of it, in float32

    def product(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits (n, V) = hidden (n, H) weight^T + bias; the next product overwrites them.

        They are float32, or float64 for float64 weights; n is at most `rows_at_once`.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        size = len(hidden) * len(weight)
        # Kept, because allocating 32 MB for each product costs a CPU about as much as the product.
        self._logits = _memory(self._logits, size, dtype, hidden.device)
        logits = self._logits[:size].view(len(hidden), len(weight))
        if hidden.dtype == weight.dtype == dtype:
            torch.mm(hidden, weight.t(), out=logits)
        elif hidden.dtype == weight.dtype and _keeps_float32(hidden.device):
            torch.mm(hidden, weight.t(), dtype, out=logits)
        else:
            self._upcast_product(hidden.to(dtype), weight, logits)
        return logits if bias is None else logits.add_(bias)

    def _upcast_product(
        self, hidden: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """The product where it cannot be had in float32 from the types that there are."""
        at_once = max(1, UPCAST_AT_ONCE // max(1, weight.shape[1]))
        size = min(at_once, len(weight)) * weight.shape[1]
        self._weight = _memory(self._weight, size, logits.dtype, weight.device)
        for first in range(0, len(weight), at_once):
            part = weight[first : first + at_once]
            upcast = self._weight[: part.numel()].view(part.shape).copy_(part)
            torch.mm(hidden, upcast.t(), out=logits[:, first : first + len(part)])


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """For how many rows logits are made at once."""
    vocab_size = max(1, vocab_size)
    if device.type == "cpu":
        return max(1, LOGITS_ON_CPU // vocab_size)
    num_rows = LOGITS_ELSEWHERE // vocab_size
    return max(1, num_rows - num_rows % ROWS_OF_TILE if num_rows > ROWS_OF_TILE else num_rows)


def _memory(
    kept: torch.Tensor | None, size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`kept` if it will do, else new memory."""
    if kept is not None and (kept.dtype, kept.device) == (dtype, device) and len(kept) >= size:
        return kept
    return torch.empty(size, dtype=dtype, device=device)


def _keeps_float32(device: torch.device) -> bool:
    """Whether torch multiplies two matrices of 16 bits into one of 32."""
    return device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")
