"""Two models' scores of the same rows -> how far apart their predictions are, without their logits.

The scores of both pass tile by tile (tiles.py). What a tile gives is in the precision of the
reduction, and is merged in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ppleval.logits.output_layer import TILED_AT_ONCE, OutputRows, rows_at_once
from ppleval.logits.outputs import TokenStats
from ppleval.logits.product import Product
from ppleval.logits.tensors import reduction_dtype
from ppleval.logits.threads import over_threads
from ppleval.logits.tiles import LogitScores, ProductScores, Tiles, peak_of

# Four tiles have to stay in the cache here, so they are smaller than those of one model.
MOST_COLUMNS = 512
# Below a peak that is not larger no difference of two float32 numbers overflows.
_LARGE = torch.finfo(torch.float32).max * torch.finfo(torch.float32).eps / 4


@dataclass(frozen=True, kw_only=True)
class PairStats(TokenStats):
    """What two models predict for the same tokens; nll is that of the model, q, p is the base's.

    Each has the shape of nll.
    """

    base_nll: torch.Tensor  # nats, of the dtype of nll
    kl: torch.Tensor  # sum p ln(p / q), nats, float64; inf where q is 0 and p is not
    reverse_kl: torch.Tensor  # sum q ln(q / p), nats, float64
    top: torch.Tensor  # int64, the likeliest id; the first of several
    base_top: torch.Tensor  # int64


def compare_rows(model: OutputRows, base: OutputRows, dtype: str | torch.dtype) -> PairStats:
    """Compare the predictions of two models for the same targets.

    Args:
        model, base: what they have computed for the same positions. Where one has more ids than the
            other, the probabilities are those among the ids that both have.
        dtype: "float32" or "float64", the precision of the reduction.
    """
    num_columns = min(model.vocab_size, base.vocab_size)
    dtype = reduction_dtype(dtype)
    if torch.float64 in (model.rows.dtype, base.rows.dtype):
        dtype = torch.float64
    at_once = TILED_AT_ONCE
    for outputs in (model, base):
        if not outputs.is_tiled:
            # Both models' logits have to fit, and what is computed from them.
            at_once = min(at_once, max(1, rows_at_once(num_columns, outputs.rows.device) // 4))
    device = model.rows.device
    parts = []
    for first in range(0, len(model.positions), at_once):
        block = slice(first, first + at_once)
        scores, base_scores = (_scores(outputs, block, dtype, device) for outputs in (model, base))
        parts.append(_pair_stats(scores, base_scores, num_columns))
    return PairStats.cat(parts)


def _scores(
    outputs: OutputRows, block: slice, dtype: torch.dtype, device: torch.device
) -> ProductScores | LogitScores:
    """The scores of some rows, for a reduction on `device`."""
    rows, targets = outputs.rows[outputs.positions[block]], outputs.targets[block]
    if isinstance(outputs.to_logits, Product) and rows.device.type == device.type == "cpu":
        return ProductScores(rows, outputs.to_logits, targets, outputs.transform, dtype)
    logits = outputs.to_logits(rows).to(device)
    return LogitScores(logits, targets.to(device), outputs.transform, dtype)


class _Partials:
    """Of each tile and row, what one model's side of the comparison gives."""

    def __init__(self, tiles: Tiles, like: torch.Tensor):
        shape = tiles.num_column_blocks, tiles.num_rows
        self.peaks = like.new_empty(shape)
        self.sums = torch.empty_like(self.peaks)  # of exp(score - peak)
        # Of exp(score - peak) times the score above its peak, less that of the other model.
        self.gaps = like.new_empty(shape, dtype=torch.float64)
        self.tops = like.new_empty(shape, dtype=torch.int64)

    def note_top(
        self, scores: torch.Tensor, block: int, columns: slice, rows: slice
    ) -> torch.Tensor:
        """Keep the likeliest id of each row of a tile, and its score, which is returned (n, 1)."""
        torch.add(scores.argmax(1), columns.start, out=self.tops[block, rows])
        return peak_of(scores, out=self.peaks[block, rows])[:, None]

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(the peak of each row, the logarithm of its sum), float64."""
        peaks = self.peaks.double()
        peak = peaks.amax(0)
        return peak, (self.sums * (peaks - peak).exp()).sum(0).log()

    def top(self) -> torch.Tensor:
        """The likeliest id of each row."""
        return self.tops.gather(0, self.peaks.argmax(0, keepdim=True)).squeeze(0)

    def divergence(self, other: "_Partials") -> torch.Tensor:
        """KL(self || other) of each row, nats, float64.

        With scores above the peak of their row and weights w = exp(score - lse):
        sum w (score - other score) - lse + other lse.
        """
        (peak, log_total), (other_peak, other_log_total) = self.merged(), other.merged()
        heights, other_heights = self.peaks.double() - peak, other.peaks.double() - other_peak
        weights = (heights - log_total).exp()
        # The distance between the two models' peaks is left out: it cancels, and may be large
        # enough for everything else to vanish beside it.
        means = (weights * (self.gaps + (heights - other_heights) * self.sums)).sum(0)
        divergence = (means - log_total) + other_log_total
        # subtle: a weight may be too small for a float, and 0 inf is NaN.
        has_infinite = (self.gaps == torch.inf).any(0)
        # By rounding a hair below 0, for models that hardly differ.
        return torch.where(has_infinite, torch.inf, divergence.clamp(min=0))


def _pair_stats(
    model: ProductScores | LogitScores, base: ProductScores | LogitScores, num_columns: int
) -> PairStats:
    """The statistics of rows, whose scores are on one device."""
    most_columns = min(MOST_COLUMNS, model.most_columns, base.most_columns)
    tiles = Tiles(len(model.targets), num_columns, most_columns)
    sides = _Partials(tiles, model.target_scores), _Partials(tiles, base.target_scores)

    def work(numbers: Iterator[int]) -> None:
        readers = model.reader(tiles), base.reader(tiles)
        scratch = model.target_scores.new_empty(2, tiles.size)
        for number in numbers:
            block, columns, rows = tiles.place(number)
            scores = [reader.read(rows, columns) for reader in readers]
            peaks = [
                side.note_top(values, block, columns, rows)
                for values, side in zip(scores, sides, strict=True)
            ]
            free = [part[: scores[0].numel()].view_as(scores[0]) for part in scratch]
            if any((peak > _LARGE).any() for peak in peaks):
                scores, free = ([part.double() for part in parts] for parts in (scores, free))
            for values, peak in zip(scores, peaks, strict=True):
                values.sub_(peak)
            for values, other, side in zip(scores, reversed(scores), sides, strict=True):
                weights = torch.exp(values, out=free[0])
                side.sums[block, rows] = weights.sum(1)
                gaps = weights.mul_(torch.sub(values, other, out=free[1])).sum(1)
                if not gaps.isfinite().all():
                    gaps = _gaps_with_infinities(values, other)
                side.gaps[block, rows] = gaps

    if model.target_scores.device.type == "cpu":
        over_threads(work, tiles.count)
    else:
        work(iter(range(tiles.count)))
    side, base_side = sides
    return PairStats(
        nll=model.nll(*side.merged()),
        base_nll=base.nll(*base_side.merged()),
        kl=base_side.divergence(side),
        reverse_kl=side.divergence(base_side),
        top=side.top(),
        base_top=base_side.top(),
    )


def _gaps_with_infinities(values: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """sum exp(v) (v - o) of each row, with 0 for v = -inf, and inf for o = -inf elsewhere; float64,
    in which no sum of finite float32 numbers overflows."""
    values, other = values.double(), other.double()
    gaps = values.exp().mul_(values - other)
    # First, because exp(v) may be 0 by underflow, and 0 inf is NaN.
    gaps.masked_fill_(other == -torch.inf, torch.inf)
    return gaps.masked_fill_(values == -torch.inf, 0).sum(1)
