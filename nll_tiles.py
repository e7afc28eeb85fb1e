"""The output layer on a CPU, tile by tile: hidden states and a weight -> nll, without logits.

A tile is the product of some rows with some columns of the vocabulary. It stays in the cache until
its maximum and its sum of exp(logit - maximum) are known. In the end these are merged, as in
nll_triton.py. Tiles do not depend on the number of threads, so neither does the result.
"""

import math
from collections.abc import Iterator

import torch

from .nll_product import UPCAST_AT_ONCE, Product
from .nll_threads import share
from .nll_transform import LogitTransform

# A tile of 2 MB of float32, about a core's cache. Half of it and 1024 rows took as long.
TILE_ROWS = 512
TILE_ELEMENTS = 2**19
MOST_COLUMNS = 8192


def product_nll(
    hidden: torch.Tensor,
    product: Product,
    targets: torch.Tensor,
    transform: LogitTransform,
    dtype: torch.dtype,
) -> torch.Tensor:
    """nll (n,) in nats of targets under an output layer; all on the CPU.

    Args:
        hidden: (n, H), floating point.
        product: the output layer.
        targets: (n,) int64, 0 to V - 1.
        transform: what makes scores of the logits.
        dtype: float32 or float64, the precision of the reduction.
    """
    if len(hidden) == 0:
        return hidden.new_empty(0, dtype=dtype)
    hidden, weight, bias = hidden.to(product.dtype), product.weight, product.bias
    tiles = _Tiles(hidden, weight)
    # Of each tile its maximum and its sum of exp(score - maximum).
    peaks = hidden.new_empty(tiles.num_column_blocks, len(hidden), dtype=dtype)
    sums = torch.empty_like(peaks)
    target_scores = hidden.new_empty(len(hidden), dtype=dtype)
    exact_scores = hidden.new_empty(len(hidden), dtype=torch.float64)

    def work(numbers: Iterator[int]) -> None:
        buffer = _Buffer(tiles, hidden, weight)
        for number in numbers:
            block, columns, rows = tiles.place(number)
            logits = buffer.product(rows, columns)
            if bias is not None:
                logits += bias[columns]
            scores = transform.apply_(logits).to(dtype)
            # Each target is in one tile only, so no two threads write to the same place.
            own = targets[rows] - columns.start
            here = ((own >= 0) & (own < scores.shape[1])).nonzero().squeeze(1)
            target_scores[rows][here] = scores[here, own[here]]
            exact = hidden[rows][here].double() * weight[columns][own[here]].double()
            exact = exact.sum(1) if bias is None else exact.sum(1) + bias[targets[rows][here]]
            exact_scores[rows][here] = transform.apply_(exact)
            # subtle: in a tile of -inf only, -inf - -inf would be NaN.
            least = torch.finfo(dtype).min
            peak = torch.clamp(scores.amax(1), min=least, out=peaks[block, rows])
            torch.sum(scores.sub_(peak[:, None]).exp_(), 1, out=sums[block, rows])

    share(work, tiles.num_column_blocks * tiles.num_row_blocks)
    peak = peaks.amax(0)
    total = sums.mul_(peaks.sub_(peak).exp_()).sum(0)
    log_total = total.log_()
    nll = (peak - target_scores) + log_total
    # Most of the error is the rounding of the target's own product. Where the target has most of
    # the probability `total` has that error, too, and both cancel, so that no nll is negative.
    exact_nll = (peak - exact_scores) + log_total
    return torch.where(nll > math.log(2), exact_nll, nll).to(dtype)


class _Tiles:
    """How a product (n, H) x (H, V) is cut: column by column, and in each row by row."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor):
        (self.num_rows, hidden_size), self.vocab_size = hidden.shape, len(weight)
        self.rows_at_once = min(self.num_rows, TILE_ROWS)
        at_once = min(MOST_COLUMNS, TILE_ELEMENTS // self.rows_at_once)
        if weight.dtype != hidden.dtype:
            at_once = min(at_once, max(1, UPCAST_AT_ONCE // max(hidden_size, 1)))
        self.columns_at_once = min(self.vocab_size, at_once)
        self.num_row_blocks = -(-self.num_rows // self.rows_at_once)
        self.num_column_blocks = -(-self.vocab_size // self.columns_at_once)

    def place(self, number: int) -> tuple[int, slice, slice]:
        """(number of the block of columns, columns, rows) of a tile."""
        block, row_block = divmod(number, self.num_row_blocks)
        first_row, first_column = row_block * self.rows_at_once, block * self.columns_at_once
        columns = slice(first_column, min(first_column + self.columns_at_once, self.vocab_size))
        return block, columns, slice(first_row, min(first_row + self.rows_at_once, self.num_rows))


class _Buffer:
    """The memory of one thread: a tile, and where it is upcast the part of the weight."""

    def __init__(self, tiles: _Tiles, hidden: torch.Tensor, weight: torch.Tensor):
        self._tile = hidden.new_empty(tiles.rows_at_once * tiles.columns_at_once)
        self._hidden, self._weight = hidden, weight
        self._upcast = None
        if weight.dtype != hidden.dtype:
            self._upcast = hidden.new_empty(tiles.columns_at_once, weight.shape[1])
        self._upcast_columns: slice | None = None

    def product(self, rows: slice, columns: slice) -> torch.Tensor:
        """Logits of a tile, without bias; the next product overwrites them."""
        hidden, weight = self._hidden[rows], self._weight[columns]
        if self._upcast is not None:
            # Tiles of the same columns follow each other, so this is done once for some of them.
            if columns != self._upcast_columns:
                self._upcast[: len(weight)].copy_(weight)
                self._upcast_columns = columns
            weight = self._upcast[: len(weight)]
        tile = self._tile[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        return torch.mm(hidden, weight.t(), out=tile)
