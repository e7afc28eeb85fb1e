"""Does the metric give the numbers of a plain float64 loop for random logits, in any form?

A seed makes options, batches of random shapes, dtypes, masks and weights, and a way to hand them
over: add, add_batch, a call, merge, reset, and bad input in between, which must change nothing.
The last call is `compute`. Expected is the loop of `scored_by_loop` below: one token at a time.

    python benchmarks/fuzz_logits.py --calls 1000 --seed 0     # three minutes
    python benchmarks/fuzz_logits.py --only 17                 # one seed, with its traceback

Exit status 1 where a call was wrong or crashed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# isort: off
from fuzz_runs import Calls, RefusedByLoopError, WrongError, main, state_of_metric

# isort: on
import evaluate
import numpy as np
import torch
from fuzz_inputs import (
    fingerprint,
    forms_of,
    ids_in_form,
    in_form,
    is_float64,
    rounded,
    weights_in_form,
)
from fuzz_oracle import (
    LARGEST_WEIGHT,
    Scored,
    is_between,
    mean_nll,
    wrong_groups,
    wrong_numbers,
)
from report import ROOT

# Of the nll of a token, relative to max(1, nll).
TOLERANCES = {"float32": 1e-6, "float64": 1e-12}
FLOAT32_MAX = float(np.finfo(np.float32).max)


@functools.cache
def metric_class() -> type:
    """The class of the metric, loaded once as users load it."""
    return type(evaluate.load(str(ROOT / "perplexity.py")))


@dataclass(frozen=True)
class Sequence_:
    """One sequence: the numbers of the loop."""

    logits: np.ndarray  # (T, V) float64; probabilities under from_logits=False
    ids: np.ndarray  # (T,) int64
    weights: np.ndarray | None  # (T,) float64
    group: str | None = None


@dataclass
class Batch:
    """Sequences, and how they are passed."""

    sequences: list[Sequence_]
    dtype: str
    form: str
    passed: dict[str, Any]  # by the names of add_batch's arguments


@dataclass
class Added:
    """What the metric holds, as the loop has it."""

    scored: list[Scored] = field(default_factory=list)  # of each sequence
    groups: list[str | None] = field(default_factory=list)
    tolerance: float = TOLERANCES["float64"]  # of the least precise batch
    num_batches: int = 0

    def add(self, batch: Batch, options: dict) -> None:
        """Add a batch that was taken."""
        precision = precision_of(batch, options)
        in_float32 = precision == "float32"
        self.scored += [scored_by_loop(each, options, in_float32) for each in batch.sequences]
        self.groups += [sequence.group for sequence in batch.sequences]
        self.tolerance = max(self.tolerance, TOLERANCES[precision])
        self.num_batches += 1

    def add_all(self, other: "Added") -> None:
        """Add what another one holds."""
        self.scored += other.scored
        self.groups += other.groups
        self.tolerance = max(self.tolerance, other.tolerance)
        self.num_batches += other.num_batches


def precision_of(batch: Batch, options: dict) -> str:
    """The dtype in which a batch is reduced."""
    in_float64 = is_float64(batch.dtype, batch.form) or options["dtype"] == "float64"
    return "float64" if in_float64 else "float32"


# --- the loop ---


def nll_of(row: np.ndarray, target: int, from_logits: bool, in_float32: bool) -> float:
    """-log p(target) in nats, of one row of logits or probabilities (V,).

    Raises:
        RefusedByLoopError: an id outside of the vocabulary, or what is no probability.
    """
    if not 0 <= target < len(row):
        raise RefusedByLoopError("an id outside of the vocabulary")
    if not from_logits:
        if not np.isfinite(row).all() or (row < 0).any():
            raise RefusedByLoopError("no probabilities")
        total = math.fsum(row)
        if total == 0:
            return math.nan
        return math.log(total) - math.log(row[target]) if row[target] > 0 else math.inf
    largest = max(row.tolist(), key=lambda value: math.inf if math.isnan(value) else value)
    if math.isnan(largest) or math.isinf(largest):  # +inf, or no finite logit at all
        return math.nan
    lse = math.log(math.fsum(math.exp(value - largest) for value in row))
    nll = lse + (largest - float(row[target]))
    return math.inf if in_float32 and nll > FLOAT32_MAX else nll


def scored_by_loop(sequence: Sequence_, options: dict, in_float32: bool) -> Scored:
    """The scored tokens of a sequence, one at a time.

    Raises:
        RefusedByLoopError: a weight that is none, or as `nll_of`.
    """
    unscored = {*_as_tuple(options["ignore_index"]), *_as_tuple(options["mask_token_id"])}
    length = len(sequence.ids)
    weights = np.ones(length) if sequence.weights is None else sequence.weights
    if any(not 0 <= weight <= LARGEST_WEIGHT for weight in weights):
        raise RefusedByLoopError("a weight that is negative, not finite or too large")
    found: list[tuple[float, float]] = []
    for place in range(1 if options["shift"] else 0, length):
        target, weight = int(sequence.ids[place]), float(weights[place])
        if target in unscored or weight == 0:
            continue
        row = sequence.logits[place - 1 if options["shift"] else place]
        found.append((nll_of(row, target, options["from_logits"], in_float32), weight))
    return Scored([nll for nll, _ in found], [weight for _, weight in found])


def _as_tuple(ids) -> tuple:
    return () if ids is None else tuple(np.ravel(ids).tolist())


def is_refused_by_loop(batch: Batch, options: dict) -> bool:
    """Whether the loop refuses one of the sequences, or the backend the dtype."""
    if options["backend"] == "triton" and precision_of(batch, options) == "float64":
        return True
    try:
        for sequence in batch.sequences:
            scored_by_loop(sequence, options, in_float32=False)
    except RefusedByLoopError:
        return True
    return False


# --- what is random ---


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
    ignored = _as_tuple(options["ignore_index"])
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
        Sequence_(
            logits[i],
            ids[i],
            None if weights is None else weights[i],
            None if groups is None else groups[i],
        )
        for i in range(size)
    ]
    return Batch(sequences, dtype if size else "float64", form, passed)


# --- bad input ---


def _more(array: Any, axis: int) -> np.ndarray:
    array = np.asarray(array)
    return np.concatenate([array, array.take([0], axis)], axis)


# Each makes bad input of a batch of 2 sequences of 3 tokens and 5 ids, all scored.
BAD_INPUT: dict[str, Callable[[dict], dict]] = {
    "float ids": lambda b: b | {"references": b["references"].astype(float)},
    "bool ids": lambda b: b | {"references": b["references"] > 0},
    "ids as strings": lambda b: b | {"references": b["references"].astype(str)},
    "integer logits": lambda b: b | {"predictions": b["predictions"].astype(int)},
    "complex logits": lambda b: b | {"predictions": b["predictions"] * 1j},
    "logits as strings": lambda b: b | {"predictions": b["predictions"].astype(str).tolist()},
    "a dict": lambda b: b | {"predictions": {"logits": b["predictions"]}},
    "one string": lambda b: b | {"predictions": "text"},
    "a number": lambda b: b | {"predictions": 3.0},
    "a number for ids": lambda b: b | {"references": 3},
    "a number for ids of a list": lambda b: b | {"predictions": [*b["predictions"]], "references": 3},
    "an array without an axis": lambda b: b | {"predictions": np.array(0.5)},
    "such an array for ids": lambda b: {
        "predictions": [*b["predictions"]], "references": np.array(3)
    },
    "a dict of weights of a list": lambda b: b | {
        "predictions": [*b["predictions"]], "sample_weight": {0: 1.0, 1: 2.0}
    },
    "None among listed weights": lambda b: b | {
        "predictions": [*b["predictions"]], "sample_weight": [None, 1.0]
    },
    "such a tensor for ids": lambda b: {
        "predictions": [*b["predictions"]], "references": torch.tensor(3)
    },
    "bytes": lambda b: b | {"predictions": b"text"},
    "an object": lambda b: b | {"predictions": object()},
    "a set of ids": lambda b: b | {"references": {0, 1, 2}},
    "no ids": lambda b: b | {"references": None},
    "no logits": lambda b: b | {"predictions": None},
    "a position more": lambda b: b | {"predictions": _more(b["predictions"], 1)},
    "a label more": lambda b: b | {"references": _more(b["references"], 1)},
    "a sequence more": lambda b: b | {"predictions": _more(b["predictions"], 0)},
    "a list more": lambda b: b | {"references": _more(b["references"], 0).tolist()},
    "flat logits": lambda b: b | {"predictions": b["predictions"][0]},
    "an axis more": lambda b: b | {"predictions": b["predictions"][None]},
    "flat ids": lambda b: b | {"references": b["references"].ravel()},
    "torn rows": lambda b: b | {"predictions": [[[0.0, 1.0], [0.0]], [[0.0, 1.0], [1.0, 0.0]]]},
    "strings among arrays": lambda b: b | {"predictions": [b["predictions"][0], "text"]},
    "None among arrays": lambda b: b | {"predictions": [b["predictions"][0], None]},
    "ids of other lengths": lambda b: b | {"references": [[0, 1, 2], [0, 1]]},
    "a masked array": lambda b: b | {"predictions": np.ma.masked_array(b["predictions"])},
    "a sparse tensor": lambda b: b | {"predictions": torch.tensor(b["predictions"]).to_sparse()},
    "a tensor without numbers": lambda b: b | {"predictions": torch.zeros(2, 3, 5, device="meta")},
    "a vocabulary of one": lambda b: {
        "predictions": b["predictions"][..., :1], "references": 0 * b["references"]
    },
    "an id too large": lambda b: b | {"references": b["references"] + 5},
    "weights of another shape": lambda b: b | {"sample_weight": np.ones((2, 4))},
    "a number for weights": lambda b: b | {"sample_weight": 2.0},
    "a number for weights of a list": lambda b: b | {
        "predictions": [*b["predictions"]], "sample_weight": 2.0
    },
    "a dict of weights": lambda b: b | {"sample_weight": {"a": 1.0, "b": 2.0}},
    "weights in a string": lambda b: b | {"sample_weight": "12"},
    "too many weights": lambda b: b | {"sample_weight": [1.0, 1.0, 1.0]},
    "a negative weight": lambda b: b | {"sample_weight": [1.0, -1.0]},
    "a NaN for a weight": lambda b: b | {"sample_weight": [math.nan, 1.0]},
    "weights as strings": lambda b: b | {"sample_weight": ["1", "2"]},
    "complex weights": lambda b: b | {"sample_weight": np.ones(2) * 1j},
    "None among weights": lambda b: b | {"sample_weight": [None, 1.0]},
    "too few groups": lambda b: b | {"groups": ["a"]},
    "one group for all": lambda b: b | {"groups": "ab"},
    "a fraction for a group": lambda b: b | {"groups": ["a", 1.5]},
    "None for a group": lambda b: b | {"groups": ["a", None]},
}  # fmt: skip

# Options that none of the calls may take.
BAD_OPTIONS: dict[str, dict] = {
    "ignore_index": {"ignore_index": 1.5},
    "ignore_index as string": {"ignore_index": "-100"},
    "a bool among ids": {"ignore_index": (0, True)},
    "ids beyond 64 bits": {"ignore_index": 2**70},
    "several mask tokens": {"mask_token_id": [1]},
    "shift": {"shift": "yes"},
    "from_logits": {"from_logits": 1},
    "dtype": {"dtype": "float16"},
    "backend": {"backend": "cuda"},
    "an unknown option": {"ignore_indices": -100},
    "contexts without a model": {"contexts": ["a", "b"]},
    "a batch size without a model": {"batch_size": 2},
}


def plain_batch(rng: np.random.Generator, options: dict) -> dict:
    """Arguments that are right: 2 sequences of 3 tokens and 5 ids, none of them ignored."""
    unscored = {*_as_tuple(options["ignore_index"]), *_as_tuple(options["mask_token_id"])}
    scored = [i for i in range(5) if not {i, i + 5} & unscored]
    values = rng.random((2, 3, 5))
    return {
        "predictions": (values / values.sum(-1, keepdims=True)).astype(np.float32),
        "references": rng.choice(scored, (2, 3)),
    }


def make_bad_call(rng: np.random.Generator, calls: Calls, metric, options: dict) -> None:
    """One call with bad input or a bad option; it has to be refused, and to change nothing."""
    passed = plain_batch(rng, options)
    pending = functools.partial(state_of_metric, metric)
    kind = rng.random()
    if kind < 0.7:
        name = str(rng.choice(list(BAD_INPUT)))
        bad = BAD_INPUT[name](passed)
        calls.make_refused(lambda: metric.add_batch(**bad), f"add_batch with {name}", pending)
    elif kind < 0.9:
        name = str(rng.choice(list(BAD_OPTIONS)))
        bad = passed | BAD_OPTIONS[name]
        calls.make_refused(lambda: metric.compute(**bad), f"compute with {name}", pending)
    else:
        other = type(metric)(**options | {"shift": not options["shift"]})
        wrong = other if kind < 0.95 else "a metric"
        calls.make_refused(lambda: metric.merge(wrong), "merge with another", pending)


# --- the calls of a seed ---


def take(calls: Calls, added: Added, options: dict, batch: Batch, call: Callable, metric) -> Any:
    """Make a call with a batch: taken, or refused where the loop refuses it. None where refused."""
    before = fingerprint(list(batch.passed.values()))
    what = f"{batch.dtype} {batch.form} of {[row.logits.shape for row in batch.sequences]}"
    if is_refused_by_loop(batch, options):
        calls.make_refused(call, what, functools.partial(state_of_metric, metric))
        result = None
    else:
        result = calls.make(call, what)
        added.add(batch, options)
    if fingerprint(list(batch.passed.values())) != before:
        raise WrongError(f"{what} was changed by the call")
    return result


def one_sequence(batch: Batch) -> dict[str, Any]:
    """The arguments of `add` for a batch of one sequence."""
    passed = {"prediction": batch.passed["predictions"][0], "reference": batch.sequences[0].ids}
    (sequence,) = batch.sequences
    if sequence.weights is not None:
        passed["sample_weight"] = sequence.weights
    return passed if sequence.group is None else passed | {"group": sequence.group}


def add_by_chance(rng, calls: Calls, metric, added: Added, options: dict, new_batch) -> None:
    """One of the ways to add to a metric, with a random batch."""
    kind = rng.random()
    if kind < 0.5:
        batch = new_batch()
        take(calls, added, options, batch, lambda: metric.add_batch(**batch.passed), metric)
    elif kind < 0.65:
        batch = new_batch(size=1)
        arguments = one_sequence(batch)
        take(calls, added, options, batch, lambda: metric.add(**arguments), metric)
    elif kind < 0.8:
        batch = new_batch()
        own = Added()
        grouped = batch.passed.get("groups") is not None
        call = metric.add_batch if grouped else metric
        value = take(calls, own, options, batch, lambda: call(**batch.passed), metric)
        added.add_all(own)
        if value is not None:
            check_value(value, own)
    else:
        other, batch = type(metric)(**options), new_batch()
        own = Added()
        take(calls, own, options, batch, lambda: other.add_batch(**batch.passed), other)
        before = state_of_metric(other)
        calls.make(lambda: metric.merge(other), "merge")
        if state_of_metric(other) != before:
            raise WrongError("merge changed the other metric")
        added.add_all(own)


def check_value(value: float, own: Added) -> None:
    """Raises WrongError unless the value of a call is the perplexity of its batch."""
    mean = mean_nll(own.scored)
    allowed = own.tolerance * (1 + mean) if math.isfinite(mean) else 0.0
    if not is_between(value, mean - allowed, mean + allowed):
        raise WrongError(f"the value of a call is {value}, not exp({mean})")


def one_call(seed: int, calls: Calls) -> bool:
    """Make the calls of a seed; whether the last one, `compute`, was answered."""
    rng = np.random.default_rng(seed)
    vocab_size = random_vocab_size(rng)
    options = random_options(rng, vocab_size)
    grouped = bool(rng.random() < 0.25)
    # Options may also come with `compute` alone, where nothing was added before.
    late = bool(rng.random() < 0.15)
    metric, added = metric_class()(**({} if late else options)), Added()
    new_batch = functools.partial(random_batch, rng, vocab_size, options, grouped)
    for _ in range(0 if late else rng.integers(4)):
        add_by_chance(rng, calls, metric, added, options, new_batch)
        if rng.random() < 0.3:
            make_bad_call(rng, calls, metric, options)
        if rng.random() < 0.05:
            calls.make(metric.reset, "reset")
            added = Added()
    if late or rng.random() < 0.5 or added.num_batches == 0:
        batch = new_batch()
        call = functools.partial(metric.compute, **batch.passed, **(options if late else {}))
        result = take(calls, added, options, batch, call, metric)
    else:
        result = calls.make(metric.compute, "compute")
    if result is None:
        return False
    check_result(result, added, options, grouped)
    if len(metric) != 0:
        raise WrongError(f"{len(metric)} sequences are left after compute")
    return True


def check_result(result: dict, added: Added, options: dict, grouped: bool) -> None:
    """Raises WrongError unless the result is that of the loop."""
    wrong = wrong_numbers(result, added.scored, added.tolerance)
    if grouped and added.scored:
        groups = list(map(str, added.groups))
        wrong += wrong_groups(result, added.scored, groups, added.tolerance)
    if wrong:
        raise WrongError(f"{'; '.join(wrong)} ({options})")


if __name__ == "__main__":
    main(one_call, __doc__.splitlines()[0])
