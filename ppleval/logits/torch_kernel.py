"""The torch backend of `nll.py`: blocks of rows pass through a buffer that is used again and again.

It runs on every device. On a CPU each thread takes blocks that stay in its cache, with their
buffer; benchmarks/RESULTS.md has what was tried.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ppleval.logits.outputs import (
    IDENTITY,
    NO_PROBABILITY,
    OUT_OF_RANGE,
    ROW_SUM_TOLERANCE,
    UNNORMALISED,
    LogitTransform,
    TokenStats,
)
from ppleval.logits.threads import over_threads

# Elements of a block, at most. On a CPU: 2 MB of float32 in each thread. Elsewhere a launch costs
# more than a cache gives: 64 MB.
BLOCK_ON_CPU = 2**19
BLOCK_ELSEWHERE = 2**24
# On a CPU, blocks for each thread at least, so that a slow one can take fewer.
BLOCKS_PER_THREAD = 4
# Below this many elements torch itself takes one thread.
FEW_ELEMENTS = 2**15

# Columns that are added up in one go.
WIDEST_PIECE = 2**16


def reduce(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scored: torch.Tensor,
    out: TokenStats,
    *,
    from_logits: bool,
    transform: LogitTransform = IDENTITY,
) -> int:
    """Reduce logits (..., V) to `out`, as `triton_kernel.reduce` does.

    Args:
        logits: (..., V) of any float dtype, device and strides.
        targets, scored: (N,) int64 and bool, on any device; rows that are not scored are not read.
        out: where to write, (N,) on the device of the logits, of the dtype to reduce in.
        from_logits: False for probabilities, of which nll is the only output.
        transform: what makes scores of the logits.

    Returns:
        The bits of outputs.py that hold. If there is any but UNNORMALISED, `out` is not complete.
    """
    vocab_size = logits.shape[-1]
    # Decided on the host, once for all blocks: which rows are read at all.
    host_targets, host_scored = targets.cpu(), scored.cpu()
    if (host_scored & ((host_targets < 0) | (host_targets >= vocab_size))).any():
        return OUT_OF_RANGE
    everywhere = host_scored.nonzero().squeeze(1).to(logits.device)
    scored_targets = targets.to(logits.device)[everywhere]
    with_all = out.rank is not None
    stats = TokenStats.empty(len(everywhere), out.nll.dtype, logits.device, with_all=with_all)
    faults: list[int] = []
    if not from_logits:
        do = functools.partial(_reduce_probabilities, faults=faults)
    else:
        do = _write_all if with_all else _write_nll
    do = functools.partial(do, targets=scored_targets, out=stats)
    over_blocks(logits, host_scored, len(everywhere), out.nll.dtype, transform, do)
    for values, outputs in zip(stats.tensors, out.tensors, strict=True):
        outputs.zero_()[everywhere] = values
    return functools.reduce(operator.or_, faults, 0)


def over_blocks(
    logits: torch.Tensor,
    scored: torch.Tensor,
    num_scored: int,
    dtype: torch.dtype,
    transform: LogitTransform,
    do: Callable[[torch.Tensor, slice, torch.Tensor], object],
) -> None:
    """Do something with each block of scored rows, in threads where they are on a CPU.

    Args:
        logits: (..., V) of any float dtype, device and strides; rows that are not scored are not
            read.
        scored: (N,) bool, on the CPU.
        num_scored: how many rows of it are True.
        dtype: of the scores.
        transform: what makes scores of the logits.
        do: gets the scores (n, V) of a block, its place among all scored rows, and memory (n, V) to
            write to. Either the scores are this memory, or they may be the caller's logits.
    """
    vocab_size = logits.shape[-1]
    num_rows = _block_rows(logits, num_scored)
    blocks = list(_blocks(logits, scored.view(logits.shape[:-1]), num_rows))

    def work(numbers: Iterator[int]) -> None:
        reader = _Reader((num_rows, vocab_size), logits, dtype, transform)
        for number in numbers:
            block = blocks[number]
            do(reader.read(block), block.here, reader.buffer[: len(block.places)])

    on_threads = logits.device.type == "cpu" and num_scored * vocab_size > FEW_ELEMENTS
    if on_threads:
        over_threads(work, len(blocks))
    else:
        work(iter(range(len(blocks))))


@dataclass(frozen=True)
class _Block:
    """Scored rows that are reduced at once."""

    rows: torch.Tensor  # (N, V), a view of logits
    places: torch.Tensor  # (n,) of its rows, in order
    here: slice  # of all scored rows


def _blocks(logits: torch.Tensor, scored: torch.Tensor, num_rows: int) -> Iterator[_Block]:
    """The scored rows of logits (..., V), `num_rows` at a time; scored: (...)."""
    done = 0
    for rows, row_is_scored in _row_views(logits, scored):
        positions = row_is_scored.nonzero().squeeze(1)
        for places in positions.split(num_rows) if len(positions) > 0 else ():
            yield _Block(rows, places, slice(done, done + len(places)))
            done += len(places)


def _row_views(
    logits: torch.Tensor, scored: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """logits (..., V) and scored (...) as views (N, V) and (N,), in order.

    One pair, unless the strides of the logits (those of a slice, say) forbid it.
    """
    try:
        rows = logits.view(scored.numel(), logits.shape[-1])
    except RuntimeError:
        for logits_part, scored_part in zip(logits, scored, strict=True):
            yield from _row_views(logits_part, scored_part)
    else:
        yield rows, scored.view(-1)


class _Reader:
    """Makes blocks of rows to scores before softmax, in the dtype of the reduction."""

    def __init__(
        self,
        shape: tuple[int, int],
        logits: torch.Tensor,
        dtype: torch.dtype,
        transform: LogitTransform,
    ):
        # One for all blocks: to allocate for each would cost more than the arithmetic.
        self.buffer = torch.empty(shape, dtype=dtype, device=logits.device)
        self._transform = transform
        self._gathered: torch.Tensor | None = None  # rows apart from each other, of another dtype

    def read(self, block: _Block) -> torch.Tensor:
        """The scores of a block: a view of its rows where no copy is needed, else of the buffer."""
        rows, places = block.rows, block.places
        n, first, last = len(places), int(places[0]), int(places[-1])
        buffer = self.buffer[:n]
        if last - first + 1 == n:
            scores = rows[first : last + 1]
        elif rows.dtype == buffer.dtype:
            scores = torch.index_select(rows, 0, places.to(rows.device), out=buffer)
        else:
            if self._gathered is None:
                self._gathered = torch.empty_like(self.buffer, dtype=rows.dtype)
            gathered = self._gathered[:n]
            scores = torch.index_select(rows, 0, places.to(rows.device), out=gathered)
        if scores is buffer or (scores.dtype == buffer.dtype and self._transform.is_identity):
            return self._transform.apply_(scores)
        return self._transform.apply_(buffer.copy_(scores))


def _block_rows(logits: torch.Tensor, num_scored: int) -> int:
    """How many rows are reduced at once: few enough for a cache and for all threads to have some,
    many enough to pay for the calls."""
    vocab_size = max(logits.shape[-1], 1)
    if logits.device.type != "cpu":
        return max(1, min(BLOCK_ELSEWHERE // vocab_size, num_scored))
    share_of_thread = num_scored // (BLOCKS_PER_THREAD * torch.get_num_threads())
    least = FEW_ELEMENTS // vocab_size
    return max(1, min(BLOCK_ON_CPU // vocab_size, max(share_of_thread, least), num_scored))


def _write_all(
    scores: torch.Tensor,
    here: slice,
    buffer: torch.Tensor,
    *,
    targets: torch.Tensor,
    out: TokenStats,
) -> None:
    """Write all statistics of a block of rows; arguments as of `_write_nll`."""
    assert out.lse is not None
    assert out.entropy is not None
    assert out.rank is not None
    # What needs the scores comes before the buffer is written.
    target_scores = scores.gather(1, targets[here, None])
    torch.sum(scores > target_scores, -1, dtype=torch.int32, out=out.rank[here]).add_(1)
    peaks = scores.amax(-1)
    log_probs, shifts = _write_nll(scores, here, buffer, targets=targets, out=out)
    if shifts is not None:
        log_probs.view(*shifts.shape, -1).sub_(shifts[:, :, None])
    # Of a row of nothing but -inf, log_softmax is NaN.
    torch.sub(peaks, log_probs.amax(-1).where(peaks > -torch.inf, 0), out=out.lse[here])
    probabilities = log_probs.exp()
    # Their sum is 1 but for the error of all log_probs, which the entropy would have ten times.
    totals = probabilities.sum(-1)
    # 0 log 0 = 0, and not 0 * -inf.
    log_probs.clamp_(min=torch.finfo(log_probs.dtype).min)
    moments = probabilities.mul_(log_probs).sum(-1)
    torch.sub(totals.log(), moments.div_(totals), out=out.entropy[here]).clamp_(min=0)


def _write_nll(
    scores: torch.Tensor,
    here: slice,
    buffer: torch.Tensor,
    *,
    targets: torch.Tensor,
    out: TokenStats,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Write the nll of a block of rows.

    Args:
        scores: (n, V).
        here: the block's place among the scored rows.
        buffer: memory (n, V) to write to; may be the scores themselves.
        targets, out: of all scored rows.

    Returns: as `_log_softmax`.
    """
    targets, nll = targets[here], out.nll[here]
    log_probs, shifts = _log_softmax(scores, buffer)
    torch.gather(log_probs, 1, targets[:, None], out=nll[:, None])
    torch.sub(0, nll, out=nll)  # not neg(), which gives -0.0
    if shifts is not None:
        width = scores.shape[-1] // shifts.shape[-1]
        nll.add_(shifts.gather(1, targets[:, None] // width).squeeze(1))
    return log_probs, shifts


def _log_softmax(
    scores: torch.Tensor, buffer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log_softmax (n, V), and None; or that of k equal pieces of each row by itself, and what is
    still to be subtracted from each piece, (n, k).

    torch adds up a row in one go, so that in float32 its error grows with the row: to 5e-5 nats at
    262144. Pieces that are views cost next to nothing. Where there are none, float64 does.
    """
    num_rows, vocab_size = scores.shape
    if vocab_size <= WIDEST_PIECE or scores.dtype == torch.float64:
        return torch.log_softmax(scores, -1, out=buffer), None
    width = _piece_width(vocab_size)
    if width is not None and scores.is_contiguous():
        pieces, out = scores.view(-1, width), buffer.view(-1, width)
        peaks = pieces.amax(-1).view(num_rows, -1)  # first: buffer may be the scores
        if peaks.isfinite().all():
            log_probs = torch.log_softmax(pieces, -1, out=out)
            # Above the peak of the row, because large scores would swallow it.
            lse = peaks - peaks.amax(1, keepdim=True) - log_probs.amax(-1).view(num_rows, -1)
            return buffer, lse.logsumexp(1, keepdim=True) - lse
    return buffer.copy_(torch.log_softmax(scores.double(), -1)), None


@functools.cache
def _piece_width(vocab_size: int) -> int | None:
    """The width of the fewest equal pieces that are narrow enough; None if these are not few."""
    for num_pieces in range(2, 64):
        if vocab_size % num_pieces == 0 and vocab_size // num_pieces <= WIDEST_PIECE:
            return vocab_size // num_pieces
    return None


def _reduce_probabilities(
    probabilities: torch.Tensor,
    here: slice,
    buffer: torch.Tensor,
    *,
    targets: torch.Tensor,
    out: TokenStats,
    faults: list[int],
) -> None:
    """Write the nll of a block of rows of probabilities, and add what is wrong with them to
    `faults`; other arguments as of `_write_nll`."""
    row_sums = probabilities.sum(-1)
    # A sum that is not finite has a value that is not.
    if not (row_sums.isfinite() & (probabilities.amin(-1) >= 0)).all():
        faults.append(NO_PROBABILITY)
        return
    target_probabilities = probabilities.gather(1, targets[here, None]).squeeze(1)
    torch.sub(row_sums.log(), target_probabilities.log(), out=out.nll[here])
    if ((row_sums - 1).abs() > ROW_SUM_TOLERANCE).any():
        faults.append(UNNORMALISED)
