"""The plain loop that fuzz_logits.py compares with: one row of logits at a time, in float64.

It follows docs/logits.md and docs/edge_cases.md.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from fuzz_runs import RefusedByLoopError

# isort: split
import numpy as np
from fuzz_inputs import is_float64
from fuzz_oracle import LARGEST_WEIGHT, Scored

# Of the nll of a token, relative to max(1, nll).
TOLERANCES = {"float32": 1e-6, "float64": 1e-12}
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class SequenceRows:
    """One sequence: the numbers of the loop."""

    logits: np.ndarray  # (T, V) float64; probabilities under from_logits=False
    ids: np.ndarray  # (T,) int64
    weights: np.ndarray | None  # (T,) float64
    group: str | None = None


@dataclass
class Batch:
    """Sequences, and how they are passed."""

    sequences: list[SequenceRows]
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


def scored_by_loop(sequence: SequenceRows, options: dict, in_float32: bool) -> Scored:
    """The scored tokens of a sequence, one at a time.

    Raises:
        RefusedByLoopError: a weight that is none, or as `nll_of`.
    """
    unscored = {*as_tuple(options["ignore_index"]), *as_tuple(options["mask_token_id"])}
    length = len(sequence.ids)
    weights = np.ones(length) if sequence.weights is None else sequence.weights
    found: list[tuple[float, float]] = []
    for place in range(1 if options["shift"] else 0, length):
        target, weight = int(sequence.ids[place]), float(weights[place])
        if target in unscored:
            continue
        if not 0 <= weight <= LARGEST_WEIGHT:
            raise RefusedByLoopError("a weight that is negative, not finite or too large")
        if weight == 0:
            continue
        row = sequence.logits[place - 1 if options["shift"] else place]
        found.append((nll_of(row, target, options["from_logits"], in_float32), weight))
    return Scored([nll for nll, _ in found], [weight for _, weight in found])


def as_tuple(ids) -> tuple:
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
