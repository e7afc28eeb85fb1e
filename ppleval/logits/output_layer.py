"""Hidden states and an output layer -> nll per token, without the logits of all rows.

A few rows at a time pass through one buffer: the product with the weight, and the reduction of
`nll.py`. A kernel that does both, as Liger and cut-cross-entropy have it, was not built: whether it
is faster can only be told on a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ppleval.logits.dtensors import Part, part_of, whole_of
from ppleval.logits.gradients import LinearNll, attached, need_gradient
from ppleval.logits.kernels import Reduction, launch
from ppleval.logits.outputs import OUT_OF_RANGE, LogitTransform, TokenStats
from ppleval.logits.product import Product
from ppleval.logits.tensors import (
    IGNORE_INDEX,
    as_tensor,
    check_backend,
    check_types,
    is_scored,
    reduction_dtype,
)
from ppleval.logits.tiles import product_nll
from ppleval.logits.vocab_parallel import LogitSums, PartWork, reduce_part, refuse_gradient

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
    vocab_start: int | None = None,
    process_group=None,
) -> torch.Tensor:
    """Negative log-likelihood of each target under an output layer, in nats.

        logits = logit_scale (hidden weight^T + bias)
        logits = softcap tanh(logits / softcap)                 where there is a softcap (Gemma 2)
        nll    = logsumexp(logits, -1) - logits[target]

    It equals `token_nll` of these logits, in float32 also where hidden and weight are not: products
    of float16 and bfloat16 are summed and kept in float32, not rounded back. The rows of ignored
    targets are left out of the product, and logits exist for a few rows at a time, also where they
    are made again for the gradients of hidden, weight and bias (as `token_nll` says).

    A weight of which each process has some rows of the vocabulary need not be gathered: pass a
    DTensor, or the local rows with `vocab_start` and `process_group`, on every process of it, with
    the same hidden states and targets. What passes is what `token_nll` says. No gradient then.

    Args:
        hidden: (..., hidden_size), floating point: what the output layer gets. With a DTensor as
            weight also a DTensor that is replicated.
        weight: (vocab_size, hidden_size), floating point, as `torch.nn.Linear` has it, on the
            device of `hidden`. A DTensor with Shard(0) and Replicate.
        targets: (...), integer ids.
        bias: (vocab_size,) or None; of the rows that `weight` has here, or a DTensor, too.
        softcap, logit_scale: as above; a softcap is positive.
        ignore_index, backend: as for `token_nll`.
        dtype: the precision of the reduction; the product is made in that of the weight, but at
            least in float32.
        vocab_start, process_group: as for `token_nll`.

    Returns:
        nll, the shape of `targets`, float32 or float64, on the device of `hidden`; 0 where ignored;
        all of it on every process that has a part of the weight.

    Raises:
        TypeError: hidden, weight or bias that are not float16, bfloat16, float32 or float64;
            targets that are not integers.
        ValueError: shapes that do not fit, a softcap or scale that is not positive, and as
            `token_nll`.
    """
    part = part_of(weight, "weight", vocab_start, process_group, vocab_dim=0)
    given = hidden, weight, bias
    if part is not None:
        options = {"softcap": softcap, "logit_scale": logit_scale, "ignore_index": ignore_index}
        options |= {"dtype": dtype, "backend": backend}
        return _nll_of_part(part, hidden, targets, bias, **options).result().nll
    hidden, weight, targets, bias = _checked(hidden, weight, targets, bias)
    transform = LogitTransform(logit_scale, softcap)
    with torch.no_grad():
        scored = is_scored(targets, ignore_index)
        outputs = _outputs(hidden, weight, targets, bias, scored, transform)
        reduction = launch_rows(outputs, dtype=dtype, backend=backend)
        nll = torch.zeros(targets.numel(), dtype=reduction.stats.nll.dtype, device=hidden.device)
        nll[outputs.positions] = reduction.stats.nll
        stats = TokenStats(nll.view(targets.shape))
    nll = Reduction(stats, reduction.faults, targets, scored, len(weight)).result().nll
    sources = [attached(*pair) for pair in zip(given, (hidden, weight, bias), strict=True)]
    if need_gradient(*sources):
        return LinearNll.apply(*sources, nll, targets, scored, transform)
    return nll


def _checked(hidden, weight, targets, bias) -> tuple:
    """All four as tensors, whose shapes and dtypes fit."""
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
    return hidden, weight, targets, bias


def _outputs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scored: torch.Tensor,
    transform: LogitTransform,
) -> OutputRows:
    positions = scored.flatten().nonzero().squeeze(1)
    return OutputRows(
        hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None],
        positions.to(hidden.device),
        targets.flatten()[positions],
        Product(weight, bias),
        transform,
        len(weight),
    )


def _hidden_of_part(hidden):
    """The hidden states of all rows; the local ones of a DTensor that is replicated."""
    part = part_of(hidden, "hidden", None, None)
    if part is None:
        return hidden
    if part.row_groups or part.column_groups:
        raise TypeError(
            "hidden is a DTensor that is sharded, and so is the vocabulary of weight; pass "
            ".redistribute(placements=) with Replicate only."
        )
    return part.local


def _bias_of_part(part: Part, bias):
    """The bias of the columns here."""
    bias_part = part_of(bias, "bias", None, None)
    if bias_part is None and part.whole is None:
        return bias
    value, start = (bias, 0) if bias_part is None else (bias_part.local, bias_part.vocab_start)
    first = part.vocab_start - start
    return as_tensor(value, "bias")[first : first + len(part.local)]


def _nll_of_part(
    part: Part, hidden, targets, bias, *, softcap, logit_scale, ignore_index, dtype, backend
) -> Reduction:
    """The reduction of an output layer that several processes share."""
    if part.row_groups:
        raise TypeError(
            "weight is a DTensor that is sharded along hidden_size; pass "
            ".redistribute(placements=) with Shard(0) and Replicate only."
        )
    own_hidden, targets = _hidden_of_part(hidden), whole_of(targets)

    def work() -> PartWork:
        refuse_gradient(hidden, part.given, bias)
        part.check_shape("weight")
        own_bias = None if bias is None else _bias_of_part(part, bias)
        rows, weight, ids, own_bias = _checked(own_hidden, part.local, targets, own_bias)
        transform = LogitTransform(logit_scale, softcap)
        scored = is_scored(ids, ignore_index)

        def reduce(own_targets: torch.Tensor, own_scored: torch.Tensor) -> LogitSums:
            outputs = _outputs(rows, weight, own_targets, own_bias, own_scored, transform)
            return _sums_of_rows(outputs, dtype, backend)

        precision = torch.promote_types(weight.dtype, reduction_dtype(dtype))
        settings = (precision, transform, tuple(rows.shape), own_bias is None)
        return PartWork(ids, scored, len(weight), settings, reduce)

    return reduce_part(replace(part, rows=()), part.attempt(work))


def _sums_of_rows(outputs: OutputRows, dtype: str | torch.dtype, backend: str) -> LogitSums:
    """What the columns here give of the logits, which exist for some rows at a time."""
    check_backend(backend)
    product, device = outputs.to_logits, outputs.rows.device
    assert isinstance(product, Product)  # because processes share its weight
    is_tiled = outputs.is_tiled and backend != "triton"
    at_once = TILED_AT_ONCE if is_tiled else rows_at_once(outputs.vocab_size, device)
    parts = []
    for block, targets in zip(
        outputs.positions.split(at_once), outputs.targets.split(at_once), strict=True
    ):
        rows, options = outputs.rows[block], {"transform": outputs.transform, "dtype": dtype}
        if is_tiled:
            parts.append(LogitSums.of_product(rows, product, targets, **options))
        else:
            scored = torch.ones_like(targets, dtype=torch.bool)
            given = product(rows), targets, scored
            parts.append(LogitSums.of_logits(*given, **options, backend=backend))
    return LogitSums.cat(parts)


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
        dtype, backend, with_all, top_k: as for `kernels.launch`.

    Raises:
        ValueError: as `kernels.launch`.
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
