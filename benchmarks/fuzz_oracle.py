"""The plain loops that the fuzzers compare with: sums of sequences -> a result, in float64.

They follow the definitions of the documentation (docs/results.md, docs/edge_cases.md), token by
token, and share no code with the metric.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LARGEST_WEIGHT = 1e100
# Below 1e-8 of a sum of squares its rounding shows in the interval.
ROUNDING_OF_INTERVAL = 2e-8


@dataclass(frozen=True)
class Scored:
    """The scored tokens of one sequence: the nll of each in nats, and its weight, above 0."""

    nll: Sequence[float]
    weights: Sequence[float]

    @property
    def nll_sum(self) -> float:
        """Nats, weighted."""
        return math.fsum(w * nll for w, nll in zip(self.weights, self.nll, strict=True))

    @property
    def weight_sum(self) -> float:
        """The sum of the weights."""
        return math.fsum(self.weights)


def exp_or_inf(exponent: float) -> float:
    """exp, and inf beyond the range of a float."""
    return math.exp(exponent) if not exponent > 709 else math.inf


@functools.cache
def student_t_95(degrees: float) -> float:
    """Two-sided 95% quantile of Student's t, by Simpson's rule on its density and bisection."""
    log_c = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    log_c -= math.log(degrees * math.pi) / 2

    def probability(t: float) -> float:
        at = np.linspace(0, t, 2001)
        density = np.exp(log_c - (degrees + 1) / 2 * np.log1p(at * at / degrees))
        return 2 * t / 6000 * (density[0] + density[-1] + 4 * density[1::2].sum()
                               + 2 * density[2:-1:2].sum())  # fmt: skip

    low, high = 1.9, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < 0.95 else (low, middle)
    return low


def margin(sequences: Sequence[Scored]) -> float:
    """Half the width of the 95% interval of the mean nll, nats; NaN where there is none."""
    scored = [sequence for sequence in sequences if len(sequence.nll) > 0]
    total = math.fsum(sequence.nll_sum for sequence in scored)
    if len(scored) < 2 or not math.isfinite(total):
        return math.nan
    weight = math.fsum(sequence.weight_sum for sequence in scored)
    effective = weight**2 / math.fsum(sequence.weight_sum**2 for sequence in scored)
    if effective < 2 - 1e-9:
        return math.nan
    residuals = [each.nll_sum - total / weight * each.weight_sum for each in scored]
    spread = math.sqrt(math.fsum(residual**2 for residual in residuals))
    error = math.sqrt(len(scored) / (len(scored) - 1)) * spread / weight
    return student_t_95(max(effective - 1, 1.0)) * error


def mean_nll(sequences: Sequence[Scored]) -> float:
    """sum w nll / sum w, nats per token; NaN where nothing was scored."""
    scored = [sequence for sequence in sequences if len(sequence.nll) > 0]
    if not scored:
        return math.nan
    total = math.fsum(sequence.nll_sum for sequence in scored)
    return total / math.fsum(sequence.weight_sum for sequence in scored)


def wrong_numbers(result: dict, sequences: Sequence[Scored], tolerance: float) -> list[str]:
    """What in a result is not that of these sequences.

    `tolerance` is that of the nll of a token, relative to max(1, nll).
    """
    mean = mean_nll(sequences)
    largest = max((nll for each in sequences for nll in each.nll), default=0.0)
    allowed = tolerance * (1 + mean)
    wrong = []
    if not is_near(result["mean_nll"], mean, allowed):
        wrong.append(f"mean_nll is {result['mean_nll']}, not {mean}")
    own = result["mean_nll"]
    for name, value in (("perplexity", exp_or_inf(own)), ("bits_per_token", own / math.log(2))):
        if not is_near(result[name], value, 1e-12 * abs(value)):
            wrong.append(f"{name} is {result[name]}, not {value}")
    half = margin(sequences)
    allowed = 20 * max(tolerance, ROUNDING_OF_INTERVAL) * max(1.0, largest)
    for name, bound in (
        ("perplexity_ci_low", max(0.0, mean - half) if half == half else math.nan),
        ("perplexity_ci_high", mean + half),
    ):
        if not is_between(result[name], bound - allowed, bound + allowed):
            wrong.append(f"{name} is {result[name]}, not {exp_or_inf(bound)}")
    for name, number in (
        ("num_tokens", sum(len(each.nll) for each in sequences)),
        ("num_sequences", sum(len(each.nll) > 0 for each in sequences)),
    ):
        if result[name] != number or type(result[name]) is not int:
            wrong.append(f"{name} is {result[name]!r}, not {number}")
    return wrong


def wrong_groups(
    result: dict, sequences: Sequence[Scored], groups: Sequence[str], tolerance: float
) -> list[str]:
    """What in the groups of a result is not that of the sequences of each."""
    found = result.get("groups")
    names = list(dict.fromkeys(groups))
    if found is None or list(found) != names:
        return [f"the groups are {found and list(found)}, not {names}"]
    wrong, means = [], []
    for name in names:
        own = [each for each, group in zip(sequences, groups, strict=True) if group == name]
        wrong += [
            f"in group {name!r} {what}" for what in wrong_numbers(found[name], own, tolerance)
        ]
        means += [mean_nll(own)] if any(len(each.nll) > 0 for each in own) else []
    macro = sum(means) / len(means) if means else math.nan
    if not is_near(result["macro_mean_nll"], macro, tolerance * (1 + macro)):
        wrong.append(f"macro_mean_nll is {result['macro_mean_nll']}, not {macro}")
    return wrong


def is_near(value: float, expected: float, allowed: float) -> bool:
    """Whether a value is the expected one, NaN and infinity included."""
    if not math.isfinite(expected):
        return value == expected or (math.isnan(value) and math.isnan(expected))
    return abs(value - expected) <= allowed


def is_between(value: float, low: float, high: float) -> bool:
    """Whether a bound of a perplexity lies between exp(low) and exp(high), and is at least 1."""
    if math.isnan(low):
        return math.isnan(value)
    return max(1.0, exp_or_inf(low)) <= value <= max(1.0, exp_or_inf(high))
