"""What a user passes -> sums of nll and weight for each sequence.

This file tells the kinds of input apart and checks their shapes; `nll.py` does the arithmetic.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import torch

from ppleval.logits.dtensors import part_of, whole_of
from ppleval.logits.kernels import Reduction, TargetOutOfRangeError, launch
from ppleval.logits.options import Options
from ppleval.logits.outputs import ROW_SUM_TOLERANCE
from ppleval.logits.tensors import (
    as_tensor,
    check_kind,
    check_types,
    is_dtensor,
    is_scored,
    of_dlpack,
    to_device,
)
from ppleval.logits.threads import use_one_thread_after_fork
from ppleval.logits.vocab_parallel import PartWork, reduce_part, with_all_rows, work_on_logits
from ppleval.stats.runs import SequenceSums
from ppleval.user_warnings import warn_user

# Short sequences are copied together and reduced at once, up to this many logits: 4 MB of float32.
# A reduction of its own takes longer than this copy.
TOGETHER = 2**20
# The interval needs squares of sums of weights, which end at 1e308.
LARGEST_WEIGHT = 1e100


@dataclass(slots=True)
class _Chunk:
    """Sequences whose logits are one tensor; it is reduced at once."""

    first_sequence: int  # its number in the batch
    lengths: list[int]  # of the sequences; their sum is N
    logits: torch.Tensor  # (..., V), N rows in all
    targets: torch.Tensor  # (N,) int64
    weights: torch.Tensor | None  # (N,), None for 1

    def ends(self) -> np.ndarray:
        """For each sequence, the number of the row after its last one."""
        return np.cumsum(self.lengths, dtype=np.int64)

    def place_of(self, row: int) -> tuple[int, int]:
        """The number of its sequence in the batch, and the position there."""
        ends = self.ends()
        i = int(np.searchsorted(ends, row, side="right"))
        return self.first_sequence + i, row - int(ends[i]) + self.lengths[i]

    def sums(self, values: torch.Tensor) -> np.ndarray:
        """The sum of the values (N,) of each sequence; 0 of an empty one."""
        lengths = np.array(self.lengths, dtype=np.int64)
        some = lengths > 0
        sums = np.zeros(len(lengths), dtype=values.numpy().dtype)
        # subtle: for an empty sequence reduceat gives the value after it.
        sums[some] = np.add.reduceat(values.numpy(), (self.ends() - lengths)[some])
        return sums


def reduce_batch(predictions, references, sample_weight, options: Options) -> SequenceSums:
    """Reduce the logits of a batch to sums, on the device that they are on.

    Args:
        predictions: (B, T, V) tensor or array, or B sequences of shape (T_i, V). Of a DTensor every
            process gets the sums of the whole.
        references: (B, T) integer ids, or B sequences of shape (T_i,).
        sample_weight: None, (B,) or (B, T), or B sequences of shape (T_i,); 0 to 1e100. With
            `options.shift` a weight belongs to the reference of the same place.
        options: what is scored, and how.

    Raises:
        TypeError, ValueError: input of the wrong type, shape or range, named.
        ConnectionError: another process that shares a DTensor failed, or is gone.
    """
    if is_dtensor(predictions):
        return _reduce_shared(predictions, references, sample_weight, options)
    use_one_thread_after_fork()
    predictions = _listed(predictions, "predictions")
    references = _listed(references, "references")
    sample_weight = _listed(sample_weight, "sample_weight")
    sums = []
    for chunk in _chunks(predictions, references, sample_weight, options):
        targets, scored, weights = _aligned(chunk, options)
        reduction = launch(
            chunk.logits,
            targets,
            scored,
            from_logits=options.from_logits,
            dtype=options.dtype,
            backend=options.backend,
        )
        sums.append(_sums(chunk, reduction, weights, options))
    return sums[0] if len(sums) == 1 else _concatenated(sums)


def _listed(value, name: str):
    """What can be iterated by sequence: of a nested or jagged tensor the list of its sequences, of
    a table or a buffer the array; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return list(value.unbind()) if value.is_nested else value
    # A table gives its columns' names, a buffer of two dimensions nothing.
    is_table = hasattr(value, "__array__") and hasattr(value, "columns")
    return (
        np.asarray(value) if is_table or isinstance(value, memoryview) else of_dlpack(value, name)
    )


def _chunks(predictions, references, sample_weight, options: Options) -> Iterable[_Chunk]:
    """The input, checked: all of it if it is one tensor, else sequence by sequence or several."""
    _check_kinds(predictions, references, sample_weight)
    logits = _as_one_array(predictions)
    if logits is not None:
        logits = as_tensor(logits, "predictions")
        return [_chunk_of_tensor(logits, references, sample_weight, options)]
    return _together(_sequences(predictions, references, sample_weight, options))


def _check_kinds(predictions, references, sample_weight) -> None:
    for name, value in (("predictions", predictions), ("references", references)):
        if value is None:
            raise ValueError(f"{name} is missing: predictions and references go together.")
        if isinstance(value, (str, Mapping)):
            raise TypeError(
                f"{name} must be tensors, arrays or lists of numbers, got {type(value).__name__}."
                + _remedy(value)
            )
        check_kind(value, name)
    check_kind(sample_weight, "sample_weight")


def _remedy(value: str | Mapping) -> str:
    """What to pass in place of a string or a dict, as a sentence behind a blank."""
    if isinstance(value, str):
        return " One text goes into a list, without references: [text]."
    if hasattr(value, "logits"):
        return " Pass its .logits."
    if "input_ids" in value:
        return " These are the inputs of a model; pass its logits: model(**inputs).logits."
    return ""


def _chunk_of_tensor(logits: torch.Tensor, references, sample_weight, options: Options) -> _Chunk:
    """All sequences, whose logits are one tensor."""
    targets = as_tensor(references, "references")
    _check_shapes(logits, targets, "", "B, ", options)
    weights = None
    if sample_weight is not None:
        weights = as_tensor(sample_weight, "sample_weight")
        weights = _weights(weights, targets.shape, "sample_weight").flatten()
    batch, length = targets.shape
    return _Chunk(0, [length] * batch, logits, targets.to(torch.int64).flatten(), weights)


def _sequences(predictions, references, sample_weight, options: Options) -> Iterator[_Chunk]:
    """Each sequence of a list."""
    given = {"predictions": predictions, "references": references}
    if sample_weight is not None:
        given["sample_weight"] = sample_weight
    lists = {name: _entries(values, name) for name, values in given.items()}
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(
            f"Every sequence needs its own entry in each argument, got {lengths}."
            + _hint_at_steps(lists["predictions"], lists["references"])
        )
    for i in range(len(lists["predictions"])):
        place = f"[{i}]"
        if isinstance(lists["predictions"][i], str):
            raise TypeError(
                f"predictions{place} must hold numbers, got a text. Texts go without references, "
                "and with a model: compute(predictions=texts, model_id=...)."
            )
        logits = as_tensor(lists["predictions"][i], f"predictions{place}")
        targets = as_tensor(lists["references"][i], f"references{place}")
        _check_shapes(logits, targets, place, "", options)
        weights = None
        if sample_weight is not None:  # None for one of several is refused
            entry = as_tensor(lists["sample_weight"][i], f"sample_weight{place}")
            weights = _weights(entry, targets.shape, f"sample_weight{place}")
        if targets.dtype != torch.int64:
            targets = targets.to(torch.int64)
        yield _Chunk(i, [targets.shape[0]], logits, targets, weights)


def _hint_at_steps(predictions: list, references: list) -> str:
    """A sentence behind a blank, if the predictions are those of the steps of `generate`."""
    shapes = [getattr(step, "shape", ()) for step in predictions]
    if len(shapes[0]) != 2 or len(set(shapes)) > 1 or shapes[0][0] != len(references):
        return ""
    steps, (batch, vocab_size) = len(shapes), shapes[0]
    return (
        f" The predictions look like the scores of generate, one tensor {(batch, vocab_size)} for "
        f"each of {steps} steps: pass torch.stack(scores, dim=1), of the shape "
        f"{(batch, steps, vocab_size)}, with the ids that were generated: sequences[:, -{steps}:]."
    )


def _entries(values, name: str) -> list:
    """What a list has for each sequence.

    Raises:
        TypeError: a number, or a collection whose order says nothing of the sequences.
    """
    try:
        entries = None if isinstance(values, (str, bytes, Mapping, Set)) else iter(values)
    except TypeError:  # of a number, and of an array without axes
        entries = None
    if entries is None:
        raise TypeError(
            f"{name} must be a list with one entry for each sequence, got {type(values).__name__}."
        )
    return list(entries)


def _together(sequences: Iterator[_Chunk]) -> Iterator[_Chunk]:
    """The sequences; neighbours that are short and alike are joined.

    Each reduction costs some hundred microseconds, however few its rows.
    """
    near, size, kind_of_near = [], 0, None
    for chunk in sequences:
        size_of_chunk, kind = chunk.logits.numel(), _kind(chunk)
        if near and (size + size_of_chunk > TOGETHER or kind != kind_of_near):
            yield _joined(near)
            near, size = [], 0
        near.append(chunk)
        size, kind_of_near = size + size_of_chunk, kind
    if near:
        yield _joined(near)


def _kind(chunk: _Chunk) -> tuple:
    """Chunks of equal kind can be joined."""
    logits, weights = chunk.logits, chunk.weights
    device_of_weights = None if weights is None else weights.device
    return logits.dtype, logits.device, logits.shape[-1], chunk.targets.device, device_of_weights


def _joined(chunks: list[_Chunk]) -> _Chunk:
    """The chunks one after the other. A single chunk is not copied."""
    if len(chunks) == 1:
        return chunks[0]
    weights = [chunk.weights for chunk in chunks if chunk.weights is not None]  # of all, or of none
    return _Chunk(
        chunks[0].first_sequence,
        [length for chunk in chunks for length in chunk.lengths],
        torch.cat([chunk.logits for chunk in chunks]),
        torch.cat([chunk.targets for chunk in chunks]),
        torch.cat(weights) if weights else None,
    )


def _as_one_array(value) -> torch.Tensor | np.ndarray | None:
    """The batch as one tensor or array; None for a collection of sequences."""
    if isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "__array__"):  # NumPy, JAX, TensorFlow
        array = np.asarray(value)
        return array if array.dtype != object else None
    return None


def _check_shapes(
    logits: torch.Tensor, targets: torch.Tensor, place: str, batch: str, options: Options
) -> None:
    predictions, references = f"predictions{place}", f"references{place}"
    check_types(logits, targets, predictions, references)
    if logits.dim() == (3 if batch else 2) and logits.shape[:-1] == targets.shape:
        if logits.shape[-1] == 1:
            raise ValueError(
                f"{predictions} has the shape {tuple(logits.shape)}, a vocabulary of one: these "
                "are no logits, and every perplexity would be 1. Pass the logits or "
                "log-probabilities of the whole vocabulary. Of the log-probabilities of the "
                "references alone the perplexity is exp(-mean)."
            )
        return
    message = (
        f"{predictions} must have the shape ({batch}T, V) and {references} ({batch}T), "
        f"got {tuple(logits.shape)} and {tuple(targets.shape)}."
    )
    if logits.dim() == 2 and batch:
        message += " A single sequence goes to add(prediction=, reference=)."
    elif logits.dim() == 3 and not batch:
        message += " A batch of sequences goes to add_batch(predictions=, references=)."
    elif logits.dim() == targets.dim() + 1 and abs(logits.shape[-2] - targets.shape[-1]) == 1:
        message += (
            " With shift=True, pass the logits of all T positions and all T ids."
            if options.shift
            else " For the input ids of a causal model pass logits and ids of equal length and "
            "shift=True: position t is then scored against id t+1."
        )
    elif logits.dim() == 3 and logits.shape[::2] == targets.shape:
        message += " Logits as F.cross_entropy takes them, (B, V, T), go as .transpose(1, 2)."
    raise ValueError(message)


def _weights(weights: torch.Tensor, shape: torch.Size, name: str) -> torch.Tensor:
    """Weights of the shape of the targets. One weight per sequence is spread over its tokens."""
    if weights.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {weights.dtype}.")
    # One type for all. MPS has no float64.
    weights = weights.float() if weights.device.type == "mps" else weights.double()
    if weights.shape == shape[:-1]:
        weights = weights[..., None].expand(shape)
    if weights.shape != shape:
        raise ValueError(
            f"{name} must have the shape {tuple(shape)} of the references, or "
            f"{tuple(shape[:-1])} with one weight per sequence, got {tuple(weights.shape)}."
        )
    return weights


def _aligned(chunk: _Chunk, options: Options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row (N,): its target, whether it is scored, and its weight."""
    targets, weights = chunk.targets, chunk.weights
    scored = is_scored(targets, options.unscored_ids)
    if weights is None:
        weights = torch.ones((), dtype=torch.float64, device="cpu").expand(targets.shape)
    else:
        # Only a weight of 0 takes a token out. Wrong ones, NaN among them, are refused where there
        # is something to score, once they are on the host.
        scored &= to_device(weights != 0, scored.device)
    if options.shift:
        # The targets move, so that the logits stay one block of memory. The last position of a
        # sequence has no next token; the target that rolls in from elsewhere is not scored.
        targets, weights, scored = (values.roll(-1) for values in (targets, weights, scored))
        last = torch.from_numpy(chunk.ends()[np.array(chunk.lengths) > 0] - 1)
        scored.index_fill_(0, to_device(last, scored.device), False)
    return targets, scored, weights


def _sums(
    chunk: _Chunk, reduction: Reduction, weights: torch.Tensor, options: Options
) -> SequenceSums:
    """The sums of each sequence of a chunk."""
    # The only wait for an accelerator.
    try:
        stats, weights, scored = reduction.on_host(weights, reduction.scored)
    except TargetOutOfRangeError as error:
        (row,) = error.place
        message = error.message("references", chunk.place_of(row + options.shift))
        # Hidden states have a multiple of 8 numbers, and few vocabularies.
        if error.target >= error.vocab_size and error.vocab_size % 8 == 0:
            message += (
                " If the model has more ids than that, these are hidden states in place of logits: "
                "pass .logits of a model with a language-model head."
            )
        raise ValueError(message) from None
    weights = weights.double()
    bad_rows = (scored & ~((weights >= 0) & (weights <= LARGEST_WEIGHT))).nonzero()
    if len(bad_rows) > 0:
        row = int(bad_rows[0])
        sequence, _ = chunk.place_of((row + options.shift) % len(weights))
        raise ValueError(
            f"sample_weight[{sequence}] must be finite, not negative and at most "
            f"{LARGEST_WEIGHT:.0e}, got {weights[row]}. Only the ratios of weights matter: divide "
            "them by their largest."
        )
    nll = stats.nll.double()
    # Rows of a DTensor are spread over processes.
    can_judge = options.from_logits and not is_dtensor(chunk.logits)
    if can_judge and _look_like_probabilities(chunk.logits, scored, nll):
        warn_user(
            "predictions look like probabilities: every value lies in [0, 1] and rows sum to 1. "
            "They were taken for logits, as asked; for probabilities pass from_logits=False."
        )
    nan_rows = (nll.isnan() & scored).nonzero()
    weights = weights.where(scored, 0)
    return SequenceSums(
        # An unscored nll is 0 and never inf, so that the product with weight 0 is 0.
        nll_sums=chunk.sums(nll * weights),
        weight_sums=chunk.sums(weights),
        num_tokens=chunk.sums(scored.to(torch.int64)),
        guess_nll_sum=weights.sum().item() * math.log(max(chunk.logits.shape[-1], 1)),
        nan_place=chunk.place_of(int(nan_rows[0])) if len(nan_rows) > 0 else None,
        dtypes=frozenset(["float64" if chunk.logits.dtype == torch.float64 else options.dtype]),
    )


def _look_like_probabilities(logits: torch.Tensor, scored: torch.Tensor, nll: torch.Tensor) -> bool:
    """Judge by the first scored rows.

    For V values p in [0, 1] that sum to 1, log(sum(exp p)) lies between log V and log(V + 2). The
    nll, which is on the host, mostly rules that out without reading a row of logits.
    """
    numbers = scored.nonzero()[:16, 0]
    log_vocab_size = math.log(max(logits.shape[-1], 1))
    first_nll = nll[numbers]
    if not ((first_nll > log_vocab_size - 1.1) & (first_nll < log_vocab_size + 1.2)).all():
        return False
    places = zip(*np.unravel_index(numbers.numpy(), logits.shape[:-1]), strict=True)
    rows = (logits[place].cpu().double() for place in places)
    return len(numbers) > 0 and all(
        row.min() >= 0 and row.max() <= 1 and abs(row.sum() - 1) <= ROW_SUM_TOLERANCE
        for row in rows
    )


def _concatenated(sums: Sequence[SequenceSums]) -> SequenceSums:
    """The sums of all sequences of chunks, which follow each other; there may be none."""
    if not sums:
        return SequenceSums(np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64), 0.0)
    return SequenceSums(
        nll_sums=np.concatenate([each.nll_sums for each in sums]),
        weight_sums=np.concatenate([each.weight_sums for each in sums]),
        num_tokens=np.concatenate([each.num_tokens for each in sums]),
        guess_nll_sum=sum(each.guess_nll_sum for each in sums),
        nan_place=next((each.nan_place for each in sums if each.nan_place is not None), None),
        dtypes=frozenset().union(*(each.dtypes for each in sums)),
    )


def _reduce_shared(predictions, references, sample_weight, options: Options) -> SequenceSums:
    """The sums of all sequences of a DTensor, on every process that shares it.

    Raises: as `reduce_part`.
    """
    shared = part_of(predictions, "predictions", None, None)
    assert shared is not None  # because of a DTensor
    references, sample_weight = whole_of(references), whole_of(sample_weight)

    def checked() -> tuple[_Chunk, PartWork, torch.Tensor]:
        _check_kinds(shared.local, references, sample_weight)
        shared.check_shape("predictions")
        chunk = _chunk_of_tensor(predictions, references, sample_weight, options)
        *flat, weights = _aligned(chunk, options)
        rows = (values.view(predictions.shape[:-1]) for values in flat)
        logits = as_tensor(shared.local, "predictions")
        work = work_on_logits(
            logits,
            *rows,
            from_logits=options.from_logits,
            dtype=options.dtype,
            backend=options.backend,
        )
        return chunk, replace(work, weights=weights), weights

    mine = shared.attempt(checked)
    reduction = with_all_rows(reduce_part(shared, mine.then(lambda own: own[1])), shared)
    chunk, _, weights = mine.value
    sums = _sums(chunk, reduction, weights, options)
    return replace(sums, is_counted_here=shared.is_first)
