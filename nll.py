"""Logits -> nll per token: the torch kernel, and the one place that chooses a backend.

Nothing here knows of evaluate, datasets or transformers.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch

# Hugging Face's and torch's label of a position that is not scored.
IGNORE_INDEX = -100

BACKENDS = ("auto", "torch")

# Probabilities whose rows are further than this from 1 in sum are normalised with a warning.
# bfloat16 keeps 8 bits: each probability is off by up to 2^-9, and so is their sum.
ROW_SUM_TOLERANCE = 0.01

_IMPORTED_IN = os.getpid()


class TargetOutOfRangeError(ValueError):
    """A scored target that is no id of the vocabulary; `place` is its index in the targets."""

    def __init__(self, place: tuple[int, ...], target: int, vocab_size: int):
        self.place, self.target, self.vocab_size = place, target, vocab_size
        super().__init__(self.message("targets", place))

    def message(self, name: str, place: tuple[int, ...]) -> str:
        """The error in the words of a caller who has another name and place for the target."""
        return (
            f"{name}{list(place)} is {self.target}, outside the vocabulary of {self.vocab_size} "
            f"ids [0, {self.vocab_size}). If it marks a position that is not to be scored, pass "
            f"ignore_index={self.target}."
        )


def token_nll(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int | Sequence[int] | None = IGNORE_INDEX,
    from_logits: bool = True,
    dtype: str | torch.dtype = torch.float32,
    backend: str = "auto",
) -> torch.Tensor:
    """Negative log-likelihood of each target, in nats.

        nll = logsumexp(logits, -1) - logits[target]            from_logits=True
        nll = log(sum(p, -1)) - log(p[target])                  from_logits=False

    It equals `F.cross_entropy(logits.float(), targets, reduction="none")`, without a second tensor
    of the size of the logits: blocks of rows pass through a few reused buffers.

    Args:
        logits: (..., vocab_size), any float dtype, device and strides; an array or nested list is
            converted. With `from_logits=False`: probabilities, divided by their row sum.
        targets: (...), integer ids; moved to the device of the logits.
        ignore_index: the id or ids that are not scored, None for none.
        from_logits: whether `logits` are scores before softmax (log-probabilities are such scores).
        dtype: float32 or float64, the precision of the reduction; float64 logits take float64.
        backend: "torch", or "auto" for the best that runs here.

    Returns:
        nll, the shape of `targets`, float32 or float64, on the device of the logits; 0 where
        ignored, inf where the target has probability 0, NaN where its row holds NaN or +inf or has
        no probability anywhere.

    Raises:
        TypeError: logits that are not floating point, targets that are not integers.
        ValueError: shapes that do not fit, a scored target outside [0, vocab_size), and with
            `from_logits=False` a negative or non-finite value in a scored row.
    """
    use_one_thread_after_fork()
    logits, targets = as_tensor(logits, "logits"), as_tensor(targets, "targets")
    check_types(logits, targets, "logits", "targets")
    if logits.dim() == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits must be (..., vocab_size) and targets (...), got {tuple(logits.shape)} "
            f"and {tuple(targets.shape)}."
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")
    dtype = torch.float64 if logits.dtype == torch.float64 else reduction_dtype(dtype)
    vocab_size = logits.shape[-1]

    # Decided on the host, once for all blocks: which rows are read at all.
    host_targets = targets.to("cpu", torch.int64)
    scored = is_scored(host_targets, ignore_index)
    outside = scored & ((host_targets < 0) | (host_targets >= vocab_size))
    if outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        raise TargetOutOfRangeError(place, int(host_targets[place]), vocab_size)

    with torch.no_grad():
        scored_nll = torch.empty(int(scored.sum()), dtype=dtype, device=logits.device)
        everywhere = scored.view(-1).nonzero().squeeze(1).to(logits.device)
        scored_targets = targets.to(logits.device, torch.int64).reshape(-1)[everywhere]
        buffers = _Buffers(_block_rows(logits, len(scored_nll)), logits, dtype)
        reduce_block = _nll_of_logits if from_logits else _nll_of_probabilities
        done, normalised = 0, False
        for rows, row_is_scored in _row_views(logits, scored):
            positions = row_is_scored.nonzero().squeeze(1)
            for block in positions.split(buffers.num_rows) if len(positions) > 0 else ():
                here = slice(done, done + len(block))
                normalised |= reduce_block(
                    buffers.read(rows, block), scored_targets[here], buffers, out=scored_nll[here]
                )
                done += len(block)
        nll = torch.zeros(targets.numel(), dtype=dtype, device=logits.device)
        nll[everywhere] = scored_nll
    if normalised:
        warnings.warn(
            "With from_logits=False, some rows of probabilities do not sum to 1; "
            "each row is divided by its sum.",
            stacklevel=2,
        )
    return nll.view(targets.shape)


def use_one_thread_after_fork() -> None:
    """Keep a forked process, such as one of `datasets.map(num_proc=2)`, from hanging.

    The threads of torch's OpenMP pool do not survive a fork, so a parallel region would wait for
    them forever. Several processes have the cores busy anyway. torch's DataLoader does the same.
    """
    if os.getpid() != _IMPORTED_IN:
        torch.set_num_threads(1)


def is_scored(targets: torch.Tensor, ignore_index: int | Sequence[int] | None) -> torch.Tensor:
    """Bool tensor, True where the target is none of the ignored ids."""
    scored = torch.ones(targets.shape, dtype=torch.bool, device=targets.device)
    for ignored_id in ignored_ids(ignore_index):
        scored &= targets != ignored_id
    return scored


def ignored_ids(ignore_index: int | Sequence[int] | None) -> tuple[int, ...]:
    """`ignore_index` as a tuple of ids.

    Raises:
        TypeError: anything but an integer, a sequence of integers or None.
        ValueError: an integer that no tensor can hold.
    """
    if ignore_index is None:
        return ()
    ids = [ignore_index] if np.ndim(ignore_index) == 0 else list(ignore_index)
    if not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in ids):
        raise TypeError(
            f"ignore_index must be an integer, several integers or None, got {ignore_index!r}."
        )
    for i in ids:
        if not -(2**63) <= i < 2**63:
            raise ValueError(f"ignore_index must fit into 64 bits, got {i}.")
    return tuple(int(i) for i in ids)


def reduction_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """torch.float32 or torch.float64, from its name or itself.

    Raises:
        ValueError: any other dtype.
    """
    for allowed in (torch.float32, torch.float64):
        if dtype == allowed or dtype == str(allowed).removeprefix("torch."):
            return allowed
    raise ValueError(f'dtype must be "float32" or "float64", got {dtype!r}.')


def as_tensor(value, name: str) -> torch.Tensor:
    """A tensor that shares the memory of `value` where that is possible, cut off from autograd.

    Raises:
        TypeError: strings and other things that are no numbers.
        ValueError: nested lists of unequal lengths.
    """
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be lost; use ignore_index or weight 0."
        )
    if _holds_tensors(value):
        parts = [as_tensor(part, name) for part in value]
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"{name} must be rectangular, got tensors of unequal shapes.")
        return torch.stack(parts)
    try:
        array = np.asarray(value)
        if array.dtype == object and array.ndim == 1:  # an array or a column of arrays
            array = np.asarray(list(array))
    except ValueError as error:
        raise ValueError(
            f"{name} must be rectangular, got nested sequences of unequal lengths."
        ) from error
    if array.dtype.name == "bfloat16":  # JAX's, which torch does not know from NumPy
        return as_tensor(array.view(np.uint16), name).view(torch.bfloat16)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold numbers, got {type(value).__name__} of {array.dtype}.")
    if not array.dtype.isnative or min(array.strides, default=0) < 0:  # torch takes neither
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        # torch warns that writing to a read-only array is undefined; nothing here writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _holds_tensors(value) -> bool:
    """Whether the first thing in nested lists is a tensor, which NumPy may not be able to read."""
    while isinstance(value, (list, tuple)) and len(value) > 0:
        value = value[0]
    return isinstance(value, torch.Tensor)


def check_types(
    logits: torch.Tensor, targets: torch.Tensor, logits_name: str, targets_name: str
) -> None:
    """Raises TypeError unless logits are floating point and targets are integers."""
    if not logits.is_floating_point():
        raise TypeError(
            f"{logits_name} must be floating-point logits or probabilities, got {logits.dtype}. "
            f"Token ids belong into {targets_name}."
        )
    if targets.numel() == 0:
        return  # an empty list has no type of its own
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"{targets_name} must be integer token ids, got {targets.dtype}.")


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


def _block_rows(logits: torch.Tensor, num_scored: int) -> int:
    """How many rows are reduced at once.

    On a CPU: few enough to stay in its cache, many enough to pay for the call (half a million
    elements per thread measured best), a multiple of the threads, and at most 16 MB of float32.
    Elsewhere a launch costs more than the cache gives: 64 MB.
    """
    vocab_size = max(logits.shape[-1], 1)
    if logits.device.type == "cpu":
        threads = torch.get_num_threads()
        num_rows = min(threads * 2**19, 2**22) // vocab_size
        if num_rows > threads:
            num_rows -= num_rows % threads
    else:
        num_rows = 2**24 // vocab_size
    return max(1, min(num_rows, num_scored))


class _Buffers:
    """Memory that all blocks reuse: allocating for each would cost more than the arithmetic."""

    def __init__(self, num_rows: int, logits: torch.Tensor, dtype: torch.dtype):
        self.num_rows = num_rows
        self._logits, self._dtype = logits, dtype

    def _empty(self, dtype: torch.dtype) -> torch.Tensor:
        shape = (self.num_rows, self._logits.shape[-1])
        return torch.empty(shape, dtype=dtype, device=self._logits.device)

    @cached_property
    def log_probs(self) -> torch.Tensor:
        return self._empty(self._dtype)

    @cached_property
    def _upcast(self) -> torch.Tensor:
        return self._empty(self._dtype)

    @cached_property
    def _gathered(self) -> torch.Tensor:
        return self._empty(self._logits.dtype)

    def read(self, rows: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """rows[block] in the dtype of the reduction; a view where that needs no copy."""
        n, first, last = len(block), int(block[0]), int(block[-1])
        if last - first + 1 == n:
            rows = rows[first : last + 1]
        else:
            rows = torch.index_select(rows, 0, block.to(rows.device), out=self._gathered[:n])
        return rows if rows.dtype == self._dtype else self._upcast[:n].copy_(rows)


def _nll_of_logits(
    logits: torch.Tensor, targets: torch.Tensor, buffers: _Buffers, out: torch.Tensor
) -> bool:
    """Write the nll of a block into `out`; False, as nothing had to be normalised."""
    log_probs = torch.log_softmax(logits, -1, out=buffers.log_probs[: len(logits)])
    torch.gather(log_probs, 1, targets[:, None], out=out[:, None])
    torch.sub(0, out, out=out)  # not neg(), which gives -0.0
    return False


def _nll_of_probabilities(
    probabilities: torch.Tensor, targets: torch.Tensor, buffers: _Buffers, out: torch.Tensor
) -> bool:
    """The same of probabilities; True if a row did not sum to 1."""
    row_sums = probabilities.sum(-1)
    # A sum that is not finite has a value that is not.
    if not (row_sums.isfinite() & (probabilities.amin(-1) >= 0)).all():
        raise ValueError(
            "from_logits=False takes probabilities, got a negative or non-finite value. "
            "For logits or log-probabilities pass from_logits=True."
        )
    target_probabilities = probabilities.gather(1, targets[:, None]).squeeze(1)
    torch.sub(row_sums.log(), target_probabilities.log(), out=out)
    return bool(((row_sums - 1).abs() > ROW_SUM_TOLERANCE).any())
