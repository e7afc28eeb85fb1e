"""Sums -> corpus perplexity and its error bar. Knows nothing of torch or evaluate.

A run of any length is seven numbers. They merge by addition, so batches, processes and machines
add up in any order. The exponential is taken once, at the end.
"""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

# What users get.
Result = dict[str, Any]  # numbers and strings; lists of them, and with groups more results

# Beyond this many degrees of freedom Student's t has the first six digits of the normal quantile.
MOST_DEGREES = 1e6
# A mean nll that is further above that of a uniform guess, nats, is not by rounding.
GUESS_TOLERANCE = 1e-5
# Squares of weights below 1e-150 lose their digits, and with them the interval.
SMALLEST_SQUARE = 1e-300


@dataclass(frozen=True)
class NllTotals:
    """Sums over sequences d, with S_d = sum_t w_t nll_t (nats) and W_d = sum_t w_t.

    Only sequences with W_d > 0 count. The empty object, `NllTotals()`, is the zero of `+`.
    """

    nll_sum: float = 0.0  # sum S_d, nats
    weight_sum: float = 0.0  # sum W_d
    nll_sum_sq: float = 0.0  # sum S_d^2
    weight_sum_sq: float = 0.0  # sum W_d^2
    nll_weight_sum: float = 0.0  # sum S_d W_d
    num_tokens: int = 0  # tokens with a positive weight
    num_sequences: int = 0  # sequences with W_d > 0

    @classmethod
    def from_sequences(
        cls, nll_sums: ArrayLike, weight_sums: ArrayLike, num_tokens: ArrayLike
    ) -> "NllTotals":
        """Totals of a batch, from S_d, W_d and the tokens of its sequences, each (batch,)."""
        nll_sums = np.asarray(nll_sums, dtype=np.float64)
        weight_sums = np.asarray(weight_sums, dtype=np.float64)
        counted = weight_sums > 0
        nll_sums, weight_sums = nll_sums[counted], weight_sums[counted]
        return cls(
            nll_sum=float(nll_sums.sum()),
            weight_sum=float(weight_sums.sum()),
            nll_sum_sq=float(nll_sums @ nll_sums),
            weight_sum_sq=float(weight_sums @ weight_sums),
            nll_weight_sum=float(nll_sums @ weight_sums),
            num_tokens=int(np.sum(num_tokens)),
            num_sequences=int(counted.sum()),
        )

    @classmethod
    def of(cls, numbers: Iterable[float]) -> "NllTotals":
        """Totals from a row of their fields, or from a sum of rows, whose counts may be floats."""
        kinds = map(type, astuple(cls()))
        return cls(*(kind(number) for kind, number in zip(kinds, numbers, strict=True)))

    def __add__(self, other: "NllTotals") -> "NllTotals":
        if not isinstance(other, NllTotals):
            return NotImplemented
        return NllTotals(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def mean_nll(self) -> float:
        """sum w_t nll_t / sum w_t, nats per token; NaN when nothing was scored."""
        return self.nll_sum / self.weight_sum if self.weight_sum > 0 else math.nan

    @property
    def perplexity(self) -> float:
        """exp(mean_nll); NaN when nothing was scored, inf beyond the range of a float."""
        return exp_or_inf(self.mean_nll)

    @property
    def bits_per_token(self) -> float:
        """mean_nll / ln 2."""
        return self.mean_nll / math.log(2)

    @property
    def standard_error(self) -> float:
        """Standard error of mean_nll, nats; NaN for fewer than two sequences.

        se = sqrt(D/(D-1) sum_d (S_d - mu W_d)^2) / sum_d W_d: the linearised standard error of a
        ratio, with the sequence as the sampling unit, because the tokens of one text are not
        independent (Cochran, Sampling Techniques, 3rd ed. 1977, section 6.3).
        """
        if self.num_sequences < 2 or not math.isfinite(self.nll_sum):
            return math.nan
        mean = self.mean_nll
        residual_sq = (
            self.nll_sum_sq - 2 * mean * self.nll_weight_sum + mean * mean * self.weight_sum_sq
        )
        # Sequences that all agree leave rounding errors of either sign.
        residual_sq = max(residual_sq, 0.0)
        correction = self.num_sequences / (self.num_sequences - 1)
        return math.sqrt(correction * residual_sq) / self.weight_sum

    @property
    def effective_sequences(self) -> float:
        """(sum W_d)^2 / sum W_d^2: this many sequences of equal weight vary as much; 0 for none.

        (Kish, Survey Sampling, 1965, section 8.2.)
        """
        if not self.weight_sum_sq > SMALLEST_SQUARE:
            return 0.0
        return self.weight_sum**2 / self.weight_sum_sq

    @property
    def margin(self) -> float:
        """Half the width of the 95% confidence interval of mean_nll, nats: t se.

        t is the quantile of Student's t at `effective_sequences` - 1 degrees of freedom, because
        few or unequal sequences make 1.96 too small. NaN for fewer than two effective sequences.
        """
        return student_t_95(self.effective_sequences - 1) * self.standard_error

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """95% confidence interval of the perplexity, exp(mean_nll -+ margin), its lower end at
        least 1: no nll is negative."""
        mean, margin = self.mean_nll, self.margin
        low = float(np.maximum(mean - margin, 0.0))  # of NaN: NaN
        return exp_or_inf(low), exp_or_inf(mean + margin)

    def result(self) -> dict[str, float | int]:
        """The result that users get, as plain numbers."""
        ci_low, ci_high = self.perplexity_interval
        return {
            "perplexity": self.perplexity,
            "mean_nll": self.mean_nll,
            "bits_per_token": self.bits_per_token,
            "perplexity_ci_low": ci_low,
            "perplexity_ci_high": ci_high,
            "num_tokens": self.num_tokens,
            "num_sequences": self.num_sequences,
        }


# Why a model's logits and the labels may fit worse than guesses, for `guessing_remark`.
REASONS_OF_LOGITS = (
    "labels that are not shifted (the input ids of a causal model need shift=True), labels that "
    "are shifted twice, padding that is scored (give its labels an id of ignore_index), or an "
    "untrained model"
)

NO_POSITIONS = np.zeros((0, 3))


@dataclass(frozen=True)
class TextSums:
    """The sums of one text; texts.py makes the result of a corpus from those of its texts."""

    nll_sum: float  # nats, weighted
    weight_sum: float  # the number of scored tokens, except under weights
    unweighted_nll_sum: float  # nats; for bits per byte, because bytes have no weights
    token_nll_sq_sum: float  # nats^2, of single tokens, unweighted
    num_tokens: int
    num_bytes: int  # UTF-8, of the scored text
    num_words: int  # of the scored text
    truncated: bool  # whether tokens were cut off
    context_truncated: bool  # whether the first scored token sees only a part of its context
    # (buckets, 3): weighted nll in nats, weight and number of the tokens by position; (0, 3) if not
    # asked for.
    positions: np.ndarray
    # Behind the last whole chunk, where the preset drops them. Last and with a default, because
    # texts are also continued that were scored before it was counted.
    num_dropped_tokens: int = field(default=0, kw_only=True)

    @property
    def perplexity(self) -> float:
        """exp(nll_sum / weight_sum); NaN when nothing was scored."""
        return exp_or_inf(self.nll_sum / self.weight_sum) if self.weight_sum > 0 else math.nan


def student_t_95(degrees: float) -> float:
    """Two-sided 95% quantile of Student's t; NaN below 1 degree of freedom, fractions allowed.

    With t = sqrt(degrees) tan(angle), P(|T| < t) = 2 c integral_0^angle cos(x)^(degrees-1) dx and
    c = Gamma((degrees+1)/2) / (Gamma(degrees/2) sqrt(pi)). The integrand is smooth, so 32
    Gauss-Legendre nodes give 9 digits.
    """
    if not degrees > 1 - 1e-9:  # two equal weights give 1 or, by rounding, a hair less
        return math.nan
    degrees = min(degrees, MOST_DEGREES)
    nodes, weights = np.polynomial.legendre.leggauss(32)
    log_c = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(math.pi) / 2

    def probability(t: float) -> float:
        angle = math.atan(t / math.sqrt(degrees))
        density = np.cos(angle * (nodes + 1) / 2) ** (degrees - 1)
        return math.exp(log_c) * angle * float(weights @ density)

    low, high = 1.9, 12.8  # the quantiles of infinitely many degrees and of one lie between
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < 0.95 else (low, middle)
    return low


def exp_or_inf(exponent: float) -> float:
    """exp, and inf beyond the range of a float."""
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf


def guessing_remark(name: str, mean_nll: float, guess_nll: float, reasons: str) -> str | None:
    """What to tell of a perplexity above the size of the vocabulary; None of any other.

    Args:
        name: which perplexity.
        mean_nll: its logarithm. An infinite one is of a token that the model rules out, and NaN
            tells nothing.
        guess_nll: that of a uniform guess, log of the size of the vocabulary.
        reasons: the usual ones.
    """
    if not math.isfinite(mean_nll) or mean_nll <= guess_nll + GUESS_TOLERANCE:
        return None
    return (
        f"The {name} of {exp_or_inf(mean_nll):.6g} is above the size of the vocabulary, "
        f"{exp_or_inf(guess_nll):.6g}: worse than guessing. The usual reasons: {reasons}."
    )
