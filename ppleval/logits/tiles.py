"""Scores tile by tile, so that they need not exist as a whole; on a CPU their nll.

A tile is the product of some rows with some columns of the vocabulary. It stays in the cache until
its maximum and its sum of exp(logit - maximum) are known. In the end these are merged, as in
triton_kernel.py. Tiles do not depend on the number of threads, so neither does the result.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch

from ppleval.logits.outputs import LogitTransform
from ppleval.logits.product import UPCAST_AT_ONCE, Product
from ppleval.logits.threads import over_threads

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
    layer = ProductScores(hidden, product, targets, transform, dtype)
    return layer.nll(*sums_of_rows(layer))


def sums_of_rows(layer: "ProductScores") -> tuple[torch.Tensor, torch.Tensor]:
    """Read every tile; of each row the largest score, and log sum exp(score - largest).

    There is at least one row, and one column.
    """
    hidden = layer.hidden
    tiles = Tiles(len(hidden), len(layer.weight), layer.most_columns)
    # Of each tile its maximum and its sum of exp(score - maximum).
    peaks = hidden.new_empty(tiles.num_column_blocks, len(hidden), dtype=layer.dtype)
    sums = torch.empty_like(peaks)

    def work(numbers: Iterator[int]) -> None:
        reader = layer.reader(tiles)
        for number in numbers:
            block, columns, rows = tiles.place(number)
            scores = reader.read(rows, columns)
            peak = peak_of(scores, out=peaks[block, rows])
            torch.sum(scores.sub_(peak[:, None]).exp_(), 1, out=sums[block, rows])

    over_threads(work, tiles.count)
    peak = peaks.amax(0)
    total = sums.mul_(peaks.sub_(peak).exp_()).sum(0)
    return peak, total.log_()


def peak_of(scores: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The maximum of each row, written to `out`; the least number for a row of -inf."""
    # subtle: in a tile of -inf only, -inf - -inf would be NaN.
    return torch.clamp(scores.amax(1), min=torch.finfo(scores.dtype).min, out=out)


class Tiles:
    """How scores (num_rows, num_columns) are cut: column by column, and in each row by row."""

    def __init__(self, num_rows: int, num_columns: int, most_columns: int = MOST_COLUMNS):
        self.num_rows, self.num_columns = num_rows, num_columns
        self.rows_at_once = min(num_rows, TILE_ROWS)
        at_once = min(MOST_COLUMNS, most_columns, TILE_ELEMENTS // self.rows_at_once)
        self.columns_at_once = min(num_columns, at_once)
        self.num_row_blocks = -(-num_rows // self.rows_at_once)
        self.num_column_blocks = -(-num_columns // self.columns_at_once)

    @property
    def count(self) -> int:
        """The number of tiles."""
        return self.num_column_blocks * self.num_row_blocks

    @property
    def size(self) -> int:
        """The elements of a full tile."""
        return self.rows_at_once * self.columns_at_once

    def place(self, number: int) -> tuple[int, slice, slice]:
        """(number of the block of columns, columns, rows) of a tile."""
        block, row_block = divmod(number, self.num_row_blocks)
        first_row, first_column = row_block * self.rows_at_once, block * self.columns_at_once
        columns = slice(first_column, min(first_column + self.columns_at_once, self.num_columns))
        return block, columns, slice(first_row, min(first_row + self.rows_at_once, self.num_rows))


class TileReader(Protocol):
    """What reads the tiles of one thread."""

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        """The scores of a tile, in memory that may be written to; the next tile overwrites it."""
        ...


class ProductScores:
    """The scores of an output layer, which exist only tile by tile.

    Every tile is read once. Then the nll of the targets is known.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        product: Product,
        targets: torch.Tensor,
        transform: LogitTransform,
        dtype: torch.dtype,
    ):
        self.hidden, self.weight, self.bias = hidden.to(product.dtype), product.weight, product.bias
        self.targets, self.transform, self.dtype = targets, transform, dtype
        self.target_scores = hidden.new_empty(len(hidden), dtype=dtype)
        self.exact_scores = hidden.new_empty(len(hidden), dtype=torch.float64)

    @property
    def is_upcast(self) -> bool:
        """Whether the weight has another dtype than the product."""
        return self.weight.dtype != self.hidden.dtype

    @property
    def most_columns(self) -> int:
        """The most columns of a tile, of which the weight may have to be upcast."""
        if not self.is_upcast:
            return MOST_COLUMNS
        return max(1, UPCAST_AT_ONCE // max(self.weight.shape[1], 1))

    def reader(self, tiles: Tiles) -> TileReader:
        """A reader of these tiles, for one thread."""
        return _ProductReader(self, tiles)

    def note_targets(self, scores: torch.Tensor, rows: slice, columns: slice) -> None:
        """Keep the scores of the targets that lie in a tile."""
        # Each target is in one tile only, so no two threads write to the same place.
        own = self.targets[rows] - columns.start
        here = ((own >= 0) & (own < scores.shape[1])).nonzero().squeeze(1)
        self.target_scores[rows][here] = scores[here, own[here]]
        weight = self.weight[columns][own[here]]
        exact = (self.hidden[rows][here].double() * weight.double()).sum(1)
        exact = exact if self.bias is None else exact + self.bias[self.targets[rows][here]]
        self.exact_scores[rows][here] = self.transform.apply_(exact)

    def nll(self, peak: torch.Tensor, log_total: torch.Tensor) -> torch.Tensor:
        """nll (n,) of the targets; the logsumexp of each row is peak + log_total."""
        nll = (peak - self.target_scores) + log_total
        # Most of the error is the rounding of the target's own product. Where the target has most
        # of the probability `log_total` has that error, too, and both cancel, so that no nll is
        # negative.
        exact_nll = (peak - self.exact_scores) + log_total
        return torch.where(nll > math.log(2), exact_nll, nll).to(self.dtype)


class _ProductReader:
    """The memory of one thread: a tile, and where it is upcast the part of the weight."""

    def __init__(self, layer: ProductScores, tiles: Tiles):
        self._layer = layer
        hidden, weight = layer.hidden, layer.weight
        self._tile = hidden.new_empty(tiles.size)
        self._upcast = None
        if layer.is_upcast:
            self._upcast = hidden.new_empty(tiles.columns_at_once, weight.shape[1])
        self._upcast_columns: slice | None = None

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        layer = self._layer
        logits = self._product(layer.hidden[rows], columns)
        if layer.bias is not None:
            logits += layer.bias[columns]
        scores = layer.transform.apply_(logits).to(layer.dtype)
        layer.note_targets(scores, rows, columns)
        return scores

    def _product(self, hidden: torch.Tensor, columns: slice) -> torch.Tensor:
        weight = self._layer.weight[columns]
        if self._upcast is not None:
            # Tiles of the same columns follow each other, so this is done once for some of them.
            if columns != self._upcast_columns:
                self._upcast[: len(weight)].copy_(weight)
                self._upcast_columns = columns
            weight = self._upcast[: len(weight)]
        tile = self._tile[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        return torch.mm(hidden, weight.t(), out=tile)


class LogitScores:
    """The scores of logits that exist; read tile by tile as `ProductScores`."""

    most_columns = MOST_COLUMNS

    def __init__(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        transform: LogitTransform,
        dtype: torch.dtype,
    ):
        self.logits, self.targets, self.transform, self.dtype = logits, targets, transform, dtype
        self.target_scores = transform(logits.gather(1, targets[:, None]).squeeze(1).to(dtype))

    def reader(self, tiles: Tiles) -> TileReader:
        """A reader of these tiles, for one thread."""
        return _LogitReader(self, tiles)

    def nll(self, peak: torch.Tensor, log_total: torch.Tensor) -> torch.Tensor:
        """nll (n,) of the targets; the logsumexp of each row is peak + log_total."""
        return ((peak - self.target_scores) + log_total).to(self.dtype)


class _LogitReader:
    """The memory of one thread: a tile."""

    def __init__(self, source: LogitScores, tiles: Tiles):
        self._source = source
        self._tile = torch.empty(tiles.size, dtype=source.dtype, device=source.logits.device)

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        logits = self._source.logits[rows, columns]
        return self._source.transform.apply_(
            self._tile[: logits.numel()].view(logits.shape).copy_(logits)
        )
