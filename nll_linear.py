"""Hidden states and an output layer -> nll per token, without the logits of all rows.

A few rows at a time pass through one buffer: the product with the weight, and the reduction of
`nll.py`. A kernel that does both, as Liger and cut-cross-entropy have it, was not built: whether it
is faster can only be told on a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .nll_gradients import attached, need_gradient
from .nll_launch import Reduction, launch
from .nll_linear_gradients import LinearNll
from .nll_outputs import OUT_OF_RANGE, TokenStats
from .nll_product import Product
from .nll_tiles import product_nll
from .nll_transform import LogitTransform
from .tensors import IGNORE_INDEX, as_tensor, check_backend, check_types, is_scored, reduction_dtype

# Elements of the buffer. On a CPU, 32 MB of float32: more gains nothing. Elsewhere, just below 256
# MiB, which at the largest vocabularies are still rows enough to keep the matrix units busy.
LOGITS_ON_CPU = 2**23
LOGITS_ELSEWHERE = 2**26 - 2**20
# What can be multiplied.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Rows that fill the tiles of a matrix product on a GPU.
ROWS_OF_TILE = 128
# Rows whose hidden states are gathered at once where the product is made in tiles.
TILED_AT_ONCE = 2048


@dataclass(frozen=True)
class OutputRows:
    """What a model has computed of some positions, up to its output layer."""

    rows: torch.Tensor  # (N, ...), from which logits are made
    positions: torch.Tensor  # (n,) int64 of those to reduce, on the device of the rows
    targets: torch.Tensor  # (n,) integers, there too
    to_logits: Callable[[torch.Tensor], torch.Tensor]  # rows (k, ...) -> logits (k, vocab_size)
    transform: LogitTransform  # what makes scores of the logits
    vocab_size: int

    @property
    def is_tiled(self) -> bool:
        """Whether the logits are a product that is made tile by tile."""
        return isinstance(self.to_logits, Product) and self.rows.device.type == "cpu"


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
    targets are left out of the product, and logits exist for a few rows at a time, also where they
    are made again for the gradients of hidden, weight and bias (as `token_nll` says).

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
    given = hidden, weight, bias
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
        outputs = OutputRows(
            hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None],
            positions.to(hidden.device),
            targets.flatten()[positions],
            Product(weight, bias),
            transform,
            len(weight),
        )
        found = launch_rows(outputs, dtype=dtype, backend=backend)
        nll = torch.zeros(targets.numel(), dtype=found.stats.nll.dtype, device=hidden.device)
        nll[positions.to(hidden.device)] = found.stats.nll
        stats = TokenStats(nll.view(targets.shape))
    nll = Reduction(stats, found.faults, targets, scored, len(weight)).result().nll
    sources = [attached(*pair) for pair in zip(given, (hidden, weight, bias), strict=True)]
    if need_gradient(*sources):
        return LinearNll.apply(*sources, nll, targets, scored, transform)
    return nll


def launch_rows(
    outputs: OutputRows,
    *,
    dtype: str | torch.dtype,
    backend: str,
    with_all: bool = False,
    top_k: int = 0,
) -> Reduction:
    """Start to reduce logits that exist for some rows at a time.

    Args:
        outputs: the rows.
        dtype, backend, with_all, top_k: as for `nll.launch`.

    Raises:
        ValueError: as `nll.launch`.
    """
    check_backend(backend)
    tiled = None
    if outputs.is_tiled and backend != "triton":
        tiled = _launch_tiles(outputs, dtype)
        if not with_all:
            return tiled
    options = {"transform": outputs.transform, "dtype": dtype, "backend": backend}
    options |= {"with_all": with_all, "top_k": top_k}
    at_once = rows_at_once(outputs.vocab_size, outputs.rows.device)
    scored = torch.ones_like(outputs.targets, dtype=torch.bool)
    columns = (values.split(at_once) for values in (outputs.positions, outputs.targets, scored))
    parts = [
        launch(outputs.to_logits(outputs.rows[block]), *these, **options)
        for block, *these in zip(*columns, strict=True)
    ]
    stats = TokenStats.cat([part.stats for part in parts])
    if tiled is not None:  # no bit of the nll depends on what else is asked for
        stats = replace(stats, nll=tiled.stats.nll)
    faults = torch.cat([part.faults for part in parts])
    return Reduction(stats, faults, outputs.targets, scored, outputs.vocab_size)


def _launch_tiles(outputs: OutputRows, dtype: str | torch.dtype) -> Reduction:
    product, vocab_size = outputs.to_logits, outputs.vocab_size
    assert isinstance(product, Product)  # as is_tiled says
    dtype = torch.promote_types(product.dtype, reduction_dtype(dtype))
    targets = outputs.targets.to(torch.int64)
    nll = torch.empty(len(targets), dtype=dtype, device=outputs.rows.device)
    faults = torch.zeros(1, dtype=torch.int32, device=outputs.rows.device)
    if ((targets < 0) | (targets >= vocab_size)).any():
        faults.fill_(OUT_OF_RANGE)
    else:
        columns = (values.split(TILED_AT_ONCE) for values in (nll, outputs.positions, targets))
        for out, block, block_targets in zip(*columns, strict=True):
            rows = outputs.rows[block]
            out.copy_(product_nll(rows, product, block_targets, outputs.transform, dtype))
    return Reduction(
        TokenStats(nll), faults, targets, torch.ones_like(targets, dtype=torch.bool), vocab_size
    )


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """For how many rows logits are made at once."""
    vocab_size = max(1, vocab_size)
    if device.type == "cpu":
        return max(1, LOGITS_ON_CPU // vocab_size)
    num_rows = LOGITS_ELSEWHERE // vocab_size
    return max(1, num_rows - num_rows % ROWS_OF_TILE if num_rows > ROWS_OF_TILE else num_rows)
