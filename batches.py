"""What a user passes -> sums of nll and weight for each sequence.

Here the kinds and shapes of input are told apart and checked; `nll.py` does the arithmetic.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .nll import TargetOutOfRangeError, launch, use_one_thread_after_fork
from .options import Options
from .reduction import ROW_SUM_TOLERANCE
from .tensors import as_tensor, check_kind, check_types, is_scored, to_device, to_host


@dataclass(frozen=True)
class SequenceSums:
    """Per sequence d of a batch: S_d = sum_t w_t nll_t in nats and W_d = sum_t w_t, float64."""

    nll_sums: np.ndarray  # (batch,)
    weight_sums: np.ndarray  # (batch,)
    num_tokens: int  # scored tokens of the batch
    nan_place: tuple[int, int] | None  # the first (sequence, position) whose nll is NaN


def reduce_batch(predictions, references, sample_weight, options: Options) -> SequenceSums:
    """Reduce the logits of a batch to sums, on the device that they are on.

    Args:
        predictions: (B, T, V) tensor or array, or B sequences of shape (T_i, V).
        references: (B, T) integer ids, or B sequences of shape (T_i,).
        sample_weight: None, (B,) or (B, T), or B sequences of shape (T_i,); finite, >= 0. With
            `options.shift` a weight belongs to the reference of the same place.
        options: what is scored, and how.

    Raises:
        TypeError, ValueError: input of the wrong type, shape or range, named.
    """
    use_one_thread_after_fork()
    batch = (_listed(value) for value in (predictions, references, sample_weight))
    parts = [_reduce(*part, options) for part in _parts(*batch, options)]
    nan_places = [part.nan_place for part in parts if part.nan_place is not None]
    return SequenceSums(
        nll_sums=np.concatenate([part.nll_sums for part in parts] or [np.zeros(0)]),
        weight_sums=np.concatenate([part.weight_sums for part in parts] or [np.zeros(0)]),
        num_tokens=sum(part.num_tokens for part in parts),
        nan_place=nan_places[0] if nan_places else None,
    )


def _listed(value):
    """A nested or jagged tensor as the list of its sequences; anything else as it is."""
    is_nested = isinstance(value, torch.Tensor) and value.is_nested
    return list(value.unbind()) if is_nested else value


def _parts(
    predictions, references, sample_weight, options: Options
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None, str]]:
    """(number of the first sequence, logits (B, T, V), targets (B, T), weights (B, T), name of the
    weights) of each part of the input that is one tensor: all of it, or each sequence of a list."""
    for name, value in (("predictions", predictions), ("references", references)):
        if value is None:
            raise ValueError(f"{name} is missing: predictions and references go together.")
        if isinstance(value, (str, Mapping)):
            raise TypeError(
                f"{name} must be tensors, arrays or lists of numbers, got {type(value).__name__}."
                + (" Pass its .logits." if hasattr(value, "logits") else "")
            )
        check_kind(value, name)
    check_kind(sample_weight, "sample_weight")

    logits = _as_one_array(predictions)
    if logits is not None:
        logits, targets = as_tensor(logits, "predictions"), as_tensor(references, "references")
        _check_shapes(logits, targets, "", "B, ", options)
        weights = _weights(sample_weight, targets.shape, "sample_weight")
        yield 0, logits, targets, weights, "sample_weight"
        return

    lists = {"predictions": list(predictions), "references": list(references)}
    if sample_weight is not None:
        lists["sample_weight"] = list(sample_weight)
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(f"Every sequence needs its own entry in each argument, got {lengths}.")
    for i in range(len(lists["predictions"])):
        place = f"[{i}]"
        logits = as_tensor(lists["predictions"][i], f"predictions{place}")
        targets = as_tensor(lists["references"][i], f"references{place}")
        _check_shapes(logits, targets, place, "", options)
        weights = None if sample_weight is None else lists["sample_weight"][i]
        name = f"sample_weight{place}"
        weights = _weights(weights, targets.shape, name)
        yield i, logits[None], targets[None], None if weights is None else weights[None], name


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
        return
    message = (
        f"{predictions} must have the shape ({batch}T, V) and {references} ({batch}T), "
        f"got {tuple(logits.shape)} and {tuple(targets.shape)}."
    )
    if logits.dim() == 2 and batch:
        message += " A single sequence goes to add(prediction=, reference=)."
    elif logits.dim() == targets.dim() + 1 and abs(logits.shape[-2] - targets.shape[-1]) == 1:
        message += (
            " With shift=True, pass the logits of all T positions and all T ids."
            if options.shift
            else " For the input ids of a causal model pass logits and ids of equal length and "
            "shift=True: position t is then scored against id t+1."
        )
    raise ValueError(message)


def _weights(sample_weight, shape: torch.Size, name: str) -> torch.Tensor | None:
    """Weights of the shape of the targets, where they are; one per sequence is spread."""
    if sample_weight is None:
        return None
    weights = as_tensor(sample_weight, name)
    if weights.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {weights.dtype}.")
    if weights.shape == shape[:-1]:
        weights = weights[..., None].expand(shape)
    if weights.shape != shape:
        raise ValueError(
            f"{name} must have the shape {tuple(shape)} of the references, or "
            f"{tuple(shape[:-1])} with one weight per sequence, got {tuple(weights.shape)}."
        )
    return weights


def _reduce(
    first_sequence: int,
    logits: torch.Tensor,  # (B, T, V)
    targets: torch.Tensor,  # (B, T)
    weights: torch.Tensor | None,  # (B, T), None for 1
    weights_name: str,
    options: Options,
) -> SequenceSums:
    scored = is_scored(targets, options.unscored_ids)
    if weights is None:
        weights = torch.ones((), dtype=torch.float64, device="cpu").expand(targets.shape)
    else:
        # float32 has no weights below 1e-45, and some other types cannot be compared.
        comparable = weights if weights.dtype == torch.float64 else weights.float()
        scored &= to_device(comparable > 0, scored.device)
    if options.shift:
        # The targets move, not the logits, whose rows then stay one block of memory. The last
        # position has no next token; what wraps around to it is not scored.
        targets, weights, scored = (part.roll(-1, 1) for part in (targets, weights, scored))
        scored[:, -1:] = False
    launched = launch(
        logits,
        targets,
        scored,
        from_logits=options.from_logits,
        dtype=options.dtype,
        backend=options.backend,
    )
    # Until here nothing has waited for an accelerator; this does, once.
    nll, faults, weights, scored = to_host(launched.stats.nll, launched.faults, weights, scored)
    weights = weights.double()
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(f"{weights_name} must be finite and not negative.")
    try:
        launched.check(int(faults))
    except TargetOutOfRangeError as error:
        sequence, position = error.place
        place = (first_sequence + sequence, position + options.shift)
        raise ValueError(error.message("references", place)) from None
    nll = nll.double()
    if options.from_logits and _look_like_probabilities(logits, scored, nll):
        warnings.warn(
            "predictions look like probabilities: every value lies in [0, 1] and rows sum to 1. "
            "They were taken for logits, as asked; for probabilities pass from_logits=False.",
            stacklevel=2,
        )
    nan_places = (nll.isnan() & scored).nonzero()
    nan_place = None
    if len(nan_places) > 0:
        sequence, position = nan_places[0].tolist()
        nan_place = (first_sequence + sequence, position)
    weights = weights.where(scored, 0)
    return SequenceSums(
        # An unscored nll is 0 and never inf, so that the product with weight 0 is 0.
        nll_sums=(nll * weights).sum(1).numpy(),
        weight_sums=weights.sum(1).numpy(),
        num_tokens=int(scored.sum()),
        nan_place=nan_place,
    )


def _look_like_probabilities(logits: torch.Tensor, scored: torch.Tensor, nll: torch.Tensor) -> bool:
    """Judged by the first scored rows; for logits the first of them settles it.

    Of V values p in [0, 1] that sum to 1, log(sum(exp p)) lies between log V and log(V + 2), so
    that the nll, which is on the host, mostly rules it out, and no row has to be looked at.
    """
    places = scored.nonzero()[:16]
    log_vocab_size = math.log(max(logits.shape[-1], 1))
    first_nll = nll[tuple(places.T)]
    if not ((first_nll > log_vocab_size - 1.1) & (first_nll < log_vocab_size + 1.2)).all():
        return False
    rows = (logits[b, t].cpu().double() for b, t in places.tolist())
    return len(places) > 0 and all(
        row.min() >= 0 and row.max() <= 1 and abs(row.sum() - 1) <= ROW_SUM_TOLERANCE
        for row in rows
    )
