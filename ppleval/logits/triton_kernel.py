"""The CUDA kernels behind `nll.py`, in Triton: each logit is read from memory once.

The kernel cuts a row of logits into blocks of 16 KiB. It keeps each block's maximum and its sum of
exp(logit - maximum), and merges all of them at the end. One program reads all blocks of a row;
where rows are few, several programs share them. Either way, and for any number of rows, the result
is the same to the last bit. (Only where rows do not begin at multiples of 16 bytes, as with a
vocabulary of 50257, may a row's last bit depend on its place.)

Nothing here waits for the device. Without Triton this module can be imported, and says that it
cannot run.
"""

# A type checker cannot follow Triton: kernels are annotated with `tl.constexpr` and launched as
# kernel[grid](...). Where `triton` is None, `why_not` keeps callers from the code that uses it.
# pyright: reportInvalidTypeForm=false, reportIndexIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ppleval.logits.outputs import IDENTITY, ROW_SUM_TOLERANCE, LogitTransform, TokenStats
from ppleval.logits.tensors import to_device

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs and for macOS comes without it
    triton = tl = None

BLOCK_BYTES = 16384
NUM_WARPS = 8  # of 32 threads, each of which then has four loads of 16 bytes under way
VECTOR_BYTES = 16  # the widest load of a thread, and what it has to be aligned to
# Registers per thread, at most: four programs then share a multiprocessor, with enough loads under
# way to keep the memory busy. AMD's compiler takes no such bound.
REGISTERS = {} if torch.version.hip else {"maxnreg": 64}
# With fewer rows than this, several programs share each row: the largest cards have some 130
# multiprocessors, and each runs about four programs at once.
NUM_PROGRAMS = 528

# The kernels read these and convert them to float32 at once.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _jit(kernel):
    return kernel if triton is None else triton.jit(kernel)


def why_not(logits: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot reduce these logits in `dtype`; None if they can."""
    if triton is None:
        return "Triton is not installed (pip install triton)"
    if logits.device.type != "cuda" and not INTERPRETED:
        return (
            f"the logits are on the device {logits.device.type!r}, and it needs CUDA, or on a CPU "
            "TRITON_INTERPRET=1 in the environment before the first import"
        )
    if logits.dtype not in DTYPES or dtype != torch.float32:
        return (
            "it reduces float32, float16 and bfloat16 in float32, and was asked to reduce "
            f"{logits.dtype} in {dtype}".replace("torch.", "")
            + " (lists and NumPy's arrays are float64 by default)"
        )
    return None


def reduce(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scored: torch.Tensor,
    out: TokenStats,
    *,
    from_logits: bool,
    transform: LogitTransform = IDENTITY,
) -> torch.Tensor:
    """Reduce logits (..., V) to `out`, as `torch_kernel.reduce` does, without waiting for it.

    Args:
        logits: (..., V), float32, float16 or bfloat16, of any strides.
        targets, scored: (N,) int64 and bool, on any device; rows that are not scored are not read.
        out: where to write, (N,) float32, on the device of the logits.
        from_logits: False for probabilities; nll is then the only output.
        transform: logits -> scores.

    Returns:
        The faults, bits of outputs.py, as one int32 on the device of the logits. The nll of an
        OUT_OF_RANGE target is NaN.
    """
    device = logits.device
    targets, scored = (to_device(part, device).contiguous() for part in (targets, scored))
    faults = torch.zeros(1, dtype=torch.int32, device=device)
    for begin, rows in _grouped(logits):
        here = slice(begin, begin + rows.shape[0] * rows.shape[1])
        _launch(rows, targets[here], scored[here], out[here], faults, from_logits, transform)
    return faults


def _grouped(logits: torch.Tensor, begin: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
    """Views (groups, rows, V) of logits (..., V), in order, each with the number of its first row.

    One view, unless the strides of more than three dimensions forbid it.
    """
    *leading, vocab_size = logits.shape
    if len(leading) == 2:
        yield begin, logits
        return
    try:
        yield begin, logits.view(1, math.prod(leading), vocab_size)
    except RuntimeError:
        for i, part in enumerate(logits):
            yield from _grouped(part, begin + i * math.prod(leading[1:]))


def _launch(
    logits: torch.Tensor,  # (groups, rows, V)
    targets: torch.Tensor,
    scored: torch.Tensor,
    out: TokenStats,
    faults: torch.Tensor,
    from_logits: bool,
    transform: LogitTransform,
) -> None:
    num_groups, rows_per_group, vocab_size = logits.shape
    num_rows = num_groups * rows_per_group
    if num_rows == 0:
        return
    # The stride of a dimension of size 1 is never taken, so it does not matter for alignment.
    group_stride, row_stride, col_stride = (
        stride if size > 1 else last
        for stride, size, last in zip(logits.stride(), logits.shape, (0, 0, 1), strict=True)
    )
    item_size = logits.element_size()
    block_size = min(BLOCK_BYTES // item_size, triton.next_power_of_2(max(vocab_size, 1)))
    num_blocks = max(int(triton.cdiv(vocab_size, block_size)), 1)
    blocks_per_program = triton.cdiv(num_blocks, triton.cdiv(NUM_PROGRAMS, num_rows))
    num_programs = triton.cdiv(num_blocks, blocks_per_program)

    vector = VECTOR_BYTES // item_size
    if col_stride != 1 or vocab_size < vector:
        vector = 1
    misaligned = logits.data_ptr() % VECTOR_BYTES // item_size
    aligned = (misaligned % vector, group_stride % vector, row_stride % vector) == (0, 0, 0)
    with_all = out.rank is not None
    outputs = out.tensors if with_all else [out.nll] * 4
    # A program that has the whole row stores nothing in between.
    shape = (num_rows, 4, num_blocks) if num_programs > 1 else (1,)
    partials = torch.empty(shape, dtype=torch.float32, device=logits.device)
    tensors = (targets, scored, *outputs, faults, partials)
    sizes = (vocab_size, num_blocks)
    options = {
        "NUM_BLOCKS": triton.next_power_of_2(num_blocks),
        "FROM_LOGITS": from_logits,
        "WITH_ALL": with_all,
        # The same for both kernels, so that their sums round alike.
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }
    with torch.cuda.device_of(logits):  # the kernels run on torch's current device
        _row_kernel[(num_rows, num_programs)](
            logits,
            *tensors,
            *sizes,
            rows_per_group,
            group_stride,
            row_stride,
            col_stride,
            misaligned,
            blocks_per_program,
            ROW_SUM_TOLERANCE,
            float(transform.logit_scale),
            float(1 if transform.softcap is None else transform.softcap),
            SCALED=transform.logit_scale != 1,
            SOFTCAP=transform.softcap is not None,
            BLOCK_SIZE=block_size,
            VECTOR=vector,
            ALIGNED=aligned,
            SHARED=num_programs > 1,
            **({} if with_all else REGISTERS),
            **options,
        )
        if num_programs > 1:
            _merge_kernel[(num_rows,)](*tensors, *sizes, ROW_SUM_TOLERANCE, **options)


@_jit
def _row_kernel(
    # pointers
    logits_ptr,
    targets_ptr,
    scored_ptr,
    nll_ptr,
    lse_ptr,
    entropy_ptr,
    rank_ptr,
    faults_ptr,
    partials_ptr,  # (rows, 4, n_blocks)
    # shapes
    n_cols,
    n_blocks,
    rows_per_group,
    # strides, in elements
    group_stride,
    row_stride,
    col_stride,
    # how a row is cut
    misaligned,  # elements from a boundary of VECTOR elements to logits_ptr
    blocks_per_program,
    # numbers
    row_sum_tolerance,
    logit_scale,
    softcap,
    # what is compiled
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VECTOR: tl.constexpr,  # elements of the widest load; 1 where the columns lie apart
    ALIGNED: tl.constexpr,  # every row begins at a boundary of VECTOR elements
    SHARED: tl.constexpr,  # several programs share a row, and _merge_kernel ends it
    NUM_BLOCKS: tl.constexpr,  # n_blocks, rounded up to a power of 2
    FROM_LOGITS: tl.constexpr,
    WITH_ALL: tl.constexpr,
):
    """Reduce one row, or some blocks of it."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    is_scored = tl.load(scored_ptr + row) != 0
    in_range = (target >= 0) & (target < n_cols)
    first = tl.program_id(1) * blocks_per_program
    if not (is_scored & in_range):
        if first == 0:
            tl.store(nll_ptr + row, tl.where(is_scored, float("nan"), 0.0))
            if WITH_ALL:
                tl.store(lse_ptr + row, 0.0)
                tl.store(entropy_ptr + row, 0.0)
                tl.store(rank_ptr + row, 0)
            if is_scored:
                tl.atomic_or(faults_ptr, 1)  # OUT_OF_RANGE
        return

    start = (row // rows_per_group) * group_stride + (row % rows_per_group) * row_stride
    row_ptr = logits_ptr + start
    target_score = _score(
        tl.load(row_ptr + target * col_stride), logit_scale, softcap, SCALED, SOFTCAP
    )
    lanes = tl.arange(0, BLOCK_SIZE)
    ids = tl.arange(0, NUM_BLOCKS)
    stop = tl.minimum(first + blocks_per_program, n_blocks)
    padding = float("-inf") if FROM_LOGITS else 0.0
    # One entry for each block; see _add_block.
    peaks = tl.full([NUM_BLOCKS], padding, tl.float32)
    sums = tl.zeros([NUM_BLOCKS], tl.float32)
    moments = tl.zeros([NUM_BLOCKS], tl.float32)
    counts = tl.zeros([NUM_BLOCKS], tl.float32)

    # Blocks begin at the first boundary in the row, so that a thread can load VECTOR elements at
    # once. The columns before it come last, after those at the end of the row.
    head = 0 if ALIGNED else ((VECTOR - (misaligned + start) % VECTOR) % VECTOR).to(tl.int32)
    num_whole = tl.maximum(n_cols - head, 0) // BLOCK_SIZE if VECTOR > 1 else 0
    for block in range(first, tl.minimum(stop, num_whole)):
        block_ptr = tl.multiple_of(row_ptr + (head + block * BLOCK_SIZE), 16)
        scores = _score(tl.load(block_ptr + lanes), logit_scale, softcap, SCALED, SOFTCAP)
        known = (ids == block, peaks, sums, moments, counts)
        peaks, sums, moments, counts = _add_block(
            scores, target_score, *known, FROM_LOGITS, WITH_ALL
        )
    for block in range(tl.maximum(first, num_whole), stop):
        places = block * BLOCK_SIZE + lanes
        inside = places < n_cols
        cols = places + head
        if not ALIGNED:
            cols = tl.where(cols < n_cols, cols, cols - n_cols)
        if VECTOR == 1:
            cols = cols.to(tl.int64) * col_stride
        logits = tl.load(row_ptr + cols, mask=inside, other=0.0)
        scores = tl.where(inside, _score(logits, logit_scale, softcap, SCALED, SOFTCAP), padding)
        known = (ids == block, peaks, sums, moments, counts)
        peaks, sums, moments, counts = _add_block(
            scores, target_score, *known, FROM_LOGITS, WITH_ALL
        )

    if SHARED:
        own = (ids >= first) & (ids < stop)
        ptrs = partials_ptr + row * (4 * n_blocks) + ids
        tl.store(ptrs, peaks, mask=own)
        tl.store(ptrs + n_blocks, sums, mask=own)
        if WITH_ALL:
            tl.store(ptrs + 2 * n_blocks, moments, mask=own)
            tl.store(ptrs + 3 * n_blocks, counts, mask=own)
        if first == 0:
            tl.store(nll_ptr + row, target_score)  # where _merge_kernel looks for it
    else:
        _finish_row(
            row,
            target_score,
            peaks,
            sums,
            moments,
            counts,
            nll_ptr,
            lse_ptr,
            entropy_ptr,
            rank_ptr,
            faults_ptr,
            row_sum_tolerance,
            FROM_LOGITS,
            WITH_ALL,
        )


@_jit
def _merge_kernel(
    # pointers
    targets_ptr,
    scored_ptr,
    nll_ptr,  # holds the score of the target
    lse_ptr,
    entropy_ptr,
    rank_ptr,
    faults_ptr,
    partials_ptr,  # (rows, 4, n_blocks)
    # shapes
    n_cols,
    n_blocks,
    # numbers
    row_sum_tolerance,
    # what is compiled
    NUM_BLOCKS: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    WITH_ALL: tl.constexpr,
):
    """Merge the blocks of a row that several programs shared."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    is_scored = tl.load(scored_ptr + row) != 0
    if not (is_scored & (target >= 0) & (target < n_cols)):
        return
    ids = tl.arange(0, NUM_BLOCKS)
    inside = ids < n_blocks
    ptrs = partials_ptr + row * (4 * n_blocks) + ids
    padding = float("-inf") if FROM_LOGITS else 0.0
    peaks = tl.load(ptrs, mask=inside, other=padding)
    sums = tl.load(ptrs + n_blocks, mask=inside, other=0.0)
    moments = tl.zeros([NUM_BLOCKS], tl.float32)
    counts = tl.zeros([NUM_BLOCKS], tl.float32)
    if WITH_ALL:
        moments = tl.load(ptrs + 2 * n_blocks, mask=inside, other=0.0)
        counts = tl.load(ptrs + 3 * n_blocks, mask=inside, other=0.0)
    _finish_row(
        row,
        tl.load(nll_ptr + row),
        peaks,
        sums,
        moments,
        counts,
        nll_ptr,
        lse_ptr,
        entropy_ptr,
        rank_ptr,
        faults_ptr,
        row_sum_tolerance,
        FROM_LOGITS,
        WITH_ALL,
    )


@_jit
def _score(logits, logit_scale, softcap, SCALED: tl.constexpr, SOFTCAP: tl.constexpr):
    """The loaded logits as scores before softmax, in float32."""
    scores = logits.to(tl.float32)
    if SCALED:
        scores *= logit_scale
    if SOFTCAP:
        scores = softcap * _tanh(scores / softcap)
    return scores


@_jit
def _tanh(z):
    """tanh to a few units in the last place; Triton's interpreter has none."""
    # Far from 0: (1 - t) / (1 + t) with t = exp(-2 |z|), of the sign of z. Near 0, where 1 - t
    # would cancel: z - z^3/3 + 2 z^5/15 - 17 z^7/315 + 62 z^9/2835, off by less than 1e-8 of it.
    t = _exp(-2 * tl.abs(z))
    far = (1 - t) / (1 + t)
    square = z * z
    series = -17 / 315 + square * (62 / 2835)
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * series))
    return tl.where(tl.abs(z) < 0.25, z * series, tl.where(z < 0, -far, far))


@_jit
def _exp(x):
    """exp in two instructions; tl.exp takes three more, for results that are denormal."""
    return tl.exp2(x * 1.4426950408889634)  # log2(e)


@_jit
def _add_block(
    scores,  # (BLOCK_SIZE,)
    target_score,
    here,  # (NUM_BLOCKS,), whether it is this block
    peaks,
    sums,
    moments,
    counts,  # (NUM_BLOCKS,) each
    FROM_LOGITS: tl.constexpr,
    WITH_ALL: tl.constexpr,
):
    """Add one block to the peaks, sums, moments and counts of a row's blocks.

    For scores s: their maximum m, sum e, sum e (s - m) with e = exp(s - m), and the count of s
    above the target's. For probabilities p: their minimum and sum p.
    """
    moment = 0.0
    count = 0.0
    if FROM_LOGITS:
        peak = tl.max(scores, 0)
        # subtle: in a block of -inf only, -inf - -inf would be NaN.
        shifted = scores - tl.where(peak == float("-inf"), 0.0, peak)
        exps = _exp(shifted)
        total = tl.sum(exps, 0)
        if WITH_ALL:
            moment = tl.sum(tl.where(exps == 0, 0.0, exps * shifted), 0)
            count = tl.sum((scores > target_score).to(tl.float32), 0)
    else:
        peak = tl.min(scores, 0)
        total = tl.sum(scores, 0)
    peaks = tl.where(here, peak, peaks)
    sums = tl.where(here, total, sums)
    moments = tl.where(here, moment, moments)
    counts = tl.where(here, count, counts)
    return peaks, sums, moments, counts


@_jit
def _finish_row(
    row,
    target_score,
    peaks,
    sums,
    moments,
    counts,  # (NUM_BLOCKS,) each
    nll_ptr,
    lse_ptr,
    entropy_ptr,
    rank_ptr,
    faults_ptr,
    row_sum_tolerance,
    FROM_LOGITS: tl.constexpr,
    WITH_ALL: tl.constexpr,
):
    """Merge the blocks of a row, and store its outputs."""
    if FROM_LOGITS:
        peak = tl.max(peaks, 0)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        weights = _exp(peaks - peak)
        total = tl.sum(sums * weights, 0)
        log_total = tl.log(total)
        # Two terms that are not negative, so that rounding cannot make the nll so.
        tl.store(nll_ptr + row, log_total + (peak - target_score))
        if WITH_ALL:
            # Moments about the maximum of the row. Where weights are 0, peaks may be -inf.
            shifts = tl.where(weights == 0, 0.0, peaks - peak)
            moment = tl.sum((moments + sums * shifts) * weights, 0)
            tl.store(lse_ptr + row, peak + log_total)
            # Here, too, no term is negative.
            tl.store(entropy_ptr + row, log_total - moment / total)
            tl.store(rank_ptr + row, 1 + tl.sum(counts, 0).to(tl.int32))
    else:
        total = tl.sum(sums, 0)
        tl.store(nll_ptr + row, tl.log(total) - tl.log(target_score))
        # subtle: inf - inf and NaN - NaN are not 0, so this finds values that are not finite.
        if (tl.min(peaks, 0) < 0) | (total - total != 0):
            tl.atomic_or(faults_ptr, 2)  # NO_PROBABILITY
        if tl.abs(total - 1) > row_sum_tolerance:
            tl.atomic_or(faults_ptr, 4)  # UNNORMALISED


# Whether the kernels run in NumPy, for tests.
INTERPRETED = triton is not None and not isinstance(_row_kernel, triton.JITFunction)
