"""Random batches of logits for fuzz_logits.py: shapes, dtypes, masks, weights, and their form."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from fuzz_inputs import forms_of, ids_in_form, in_form, rounded, weights_in_form
from fuzz_logit_loop import FLOAT32_MAX, Batch, SequenceRows, as_tuple


def random_options(rng: np.random.Generator, vocab_size: int) -> dict[str, Any]:
    """Options of a metric."""
    some_id = int(rng.integers(vocab_size))
    ignored = [-100, -100, -100, None, some_id, (-100, some_id), [-1, -100, vocab_size], ()]
    return {
        "from_logits": bool(rng.random() < 0.75),
        "ignore_index": ignored[rng.integers(len(ignored))],
        "mask_token_id": None if rng.random() < 0.8 else int(rng.integers(vocab_size)),
        "shift": bool(rng.random() < 0.4),
        "dtype": "float64" if rng.random() < 0.25 else "float32",
        "backend": str(rng.choice(["auto", "torch", "triton"], p=[0.5, 0.47, 0.03])),
    }


def random_vocab_size(rng: np.random.Generator) -> int:
    """Mostly small; at times beyond what is added up in one go."""
    if rng.random() < 0.02:
        return int(rng.integers(60_000, 70_000))
    return int(rng.integers(2, 14)) if rng.random() < 0.8 else int(rng.integers(14, 2000))


def random_logits(
    rng: np.random.Generator, length: int, vocab_size: int, from_logits: bool, dtype: str
) -> np.ndarray:
    """(T, V) float64, as `dtype` holds it: ordinary, or with masks, NaN or huge values."""
    values = rng.normal(0, rng.choice([0.1, 3.0, 20.0]), (length, vocab_size))
    if not from_logits:
        values = np.exp(values - values.max(-1, keepdims=True, initial=-math.inf))
        if rng.random() < 0.7:
            values /= values.sum(-1, keepdims=True)
        if rng.random() < 0.2:
            values[rng.random(values.shape) < 0.2] = 0
        return rounded(values, dtype)
    if rng.random() < 0.2:  # log-probabilities
        values -= np.log(np.exp(values).sum(-1, keepdims=True))
    if rng.random() < 0.1:
        limits = {"float16": 6e4, "float32": FLOAT32_MAX, "bfloat16": 3e38, "float64": 1e30}
        values *= rng.choice([1e3, limits[dtype] / max(1.0, np.abs(values).max(initial=1.0))])
        values = np.clip(values, -limits[dtype], limits[dtype])
    if rng.random() < 0.1:  # softmax does not see it
        values += rng.choice([-1000.0, 1000.0])
    return rounded(values, dtype)


def with_faults(rng: np.random.Generator, logits: np.ndarray) -> np.ndarray:
    """The logits with a masked vocabulary, or NaN or infinity in a few places."""
    logits, kind = logits.copy(), rng.random()
    if kind < 0.4:
        logits[:, rng.random(logits.shape[1]) < 0.4] = -math.inf
    elif kind < 0.6:
        logits[:, : rng.integers(1, logits.shape[1] + 1)] = -math.inf
    else:
        logits[rng.random(logits.shape) < 0.03] = rng.choice([math.nan, math.inf, -math.inf])
    return logits


def random_ids(rng: np.random.Generator, length: int, vocab_size: int, options: dict) -> np.ndarray:
    """Ids (T,), some of them ignored; rarely one that the vocabulary does not have."""
    ids = rng.integers(vocab_size, size=length)
    ignored = as_tuple(options["ignore_index"])
    if ignored and rng.random() < 0.6:
        ids[rng.random(length) < rng.choice([0.2, 0.5, 1.0])] = rng.choice(ignored)
    if length and rng.random() < 0.02:
        ids[rng.integers(length)] = rng.choice([vocab_size, vocab_size + 7, -1, -100])
    return ids


def random_weights(rng: np.random.Generator, lengths: Sequence[int]) -> tuple[list | None, bool]:
    """Weights (T_i,) of each sequence, or None; and whether each sequence has one for all."""
    kind = rng.random()
    if kind < 0.5:
        return None, False
    by_sequence = bool(rng.random() < 0.3)
    rows = []
    for length in lengths:
        row = rng.integers(0, 9, 1 if by_sequence else length) / 4
        row *= rng.choice([1.0, 0.1, 1e90, 1e-90], p=[0.85, 0.05, 0.05, 0.05])
        if len(row) and rng.random() < 0.02:
            row[rng.integers(len(row))] = rng.choice([-0.5, math.nan, math.inf, 1e101])
        rows.append(np.broadcast_to(row, (length,)).copy() if by_sequence else row)
    return rows, by_sequence


def random_batch(
    rng: np.random.Generator, vocab_size: int, options: dict, grouped: bool, size: int | None = None
) -> Batch:
    """A batch in a form and a dtype by chance; of `size` sequences, if given."""
    dtype = str(rng.choice(["float64", "float32", "float16", "bfloat16"], p=[0.2, 0.5, 0.15, 0.15]))
    largest = 6 if vocab_size < 2000 else 2
    size = int(rng.integers(0 if rng.random() < 0.1 else 1, largest)) if size is None else size
    lengths = rng.integers(0 if rng.random() < 0.2 else 1, largest + 3, size).tolist()
    if rng.random() < 0.6:
        lengths = lengths[:1] * size
    logits = [
        random_logits(rng, length, vocab_size, options["from_logits"], dtype) for length in lengths
    ]
    if rng.random() < 0.15:
        logits = [with_faults(rng, rows) for rows in logits]
    if len(set(lengths)) == 1 and rng.random() < 0.05:  # for expanded tensors
        logits = logits[:1] * size
    ids = [random_ids(rng, length, vocab_size, options) for length in lengths]
    weights, by_sequence = random_weights(rng, lengths)
    groups = [str(rng.choice(["a", "b", "7"])) for _ in lengths] if grouped else None
    names = forms_of(logits, dtype)
    form = names[rng.integers(len(names))]
    passed = {
        "predictions": in_form(logits, dtype, form) if size else np.zeros((0, 3, vocab_size)),
        "references": ids_in_form(rng, ids) if size else np.zeros((0, 3), np.int64),
    }
    if weights is not None and size:
        passed["sample_weight"] = weights_in_form(rng, weights, by_sequence)
    if groups is not None:
        passed["groups"] = [int(name) if name == "7" else name for name in groups]
    sequences = [
        SequenceRows(
            logits[i],
            ids[i],
            None if weights is None else weights[i],
            None if groups is None else groups[i],
        )
        for i in range(size)
    ]
    return Batch(sequences, dtype if size else "float64", form, passed)
