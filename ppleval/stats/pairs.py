"""Sums of two models on the same texts -> how far apart they are, with paired intervals.

A text is one sample, as in totals.py. Each interval is that of the texts' differences, so what
makes a text hard for both models cancels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ppleval.stats.positions import bucket_labels
from ppleval.stats.texts import TextTotals
from ppleval.stats.totals import NllTotals, Result, TextSums, exp_or_inf, student_t_95

# In percent; the maximum stands beside them.
KL_QUANTILES = {"median": 50, "p90": 90, "p95": 95, "p99": 99, "p999": 99.9}
DELTA_P_QUANTILES = {"p1": 1, "p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "p99": 99}
# Those that llama.cpp prints besides.
MORE_KL_QUANTILES = {"min": 0, "p0_1": 0.1, "p1": 1, "p5": 5, "p10": 10}
MORE_DELTA_P_QUANTILES = {"min": 0, "p0_1": 0.1, "p10": 10, "p90": 90, "p999": 99.9, "max": 100}


@dataclass(frozen=True)
class PairSums(TextSums):
    """The sums of one text under a model, and those under the base."""

    base: TextSums


@dataclass(frozen=True)
class TokenPairSums(PairSums):
    """The sums of one text whose tokens are the same for both models.

    The arrays hold one number for each token with a positive weight; quantiles need them all.
    """

    kl_sum: float  # nats, weighted
    reverse_kl_sum: float  # nats, weighted
    same_top_sum: float  # weight of the tokens at which both expect the same one most
    nll_product_sum: float  # nats^2, of nll times base nll, unweighted
    kl: np.ndarray  # nats, float32
    delta_p: np.ndarray  # q(y) - p(y), float32


def pair_result(texts: Sequence[PairSums]) -> Result:
    """What can be said of any two models, whatever their tokens: numbers per byte.

        bits_per_byte_difference = bits_per_byte - base_bits_per_byte

    with a paired 95% interval.
    """
    result, base = (TextTotals.of(side).result() for side in (texts, [text.base for text in texts]))
    per_byte = 1 / math.log(2)
    bits = [
        [(each.unweighted_nll_sum * per_byte, each.num_bytes) for each in side]
        for side in (texts, [text.base for text in texts])
    ]
    names = ("perplexity", "mean_nll", "bits_per_byte")
    found = {name: result[name] for name in names}
    found |= {f"base_{name}": base[name] for name in names}
    found |= _with_interval("bits_per_byte_difference", *paired_difference(*bits))
    counts = {name: result[name] for name in ("num_tokens", "num_sequences", "num_bytes")}
    return found | counts | {"base_num_tokens": base["num_tokens"]}


def token_pair_result(texts: Sequence[TokenPairSums]) -> Result:
    """What can be said of two models that read the same tokens.

        mean_nll_difference = mean_nll - base_mean_nll
        perplexity_ratio    = exp(mean_nll_difference)
        mean_kl             = mean of sum_v p ln(p / q) over the scored tokens
        same_top            = share of the tokens with the same argmax
        delta_p             = q(y) - p(y) of the token y that came

    with p the base and q the model, and with paired 95% intervals. A quantile is that of single
    tokens, linear between two, as numpy's.
    """
    result = pair_result(texts)
    del result["base_num_tokens"]  # the same
    result |= paired_nll(
        *(
            [(each.nll_sum, each.weight_sum) for each in side]
            for side in (texts, [text.base for text in texts])
        )
    )
    kl, delta_p = (
        np.concatenate([getattr(text, name) for text in texts]) for name in ("kl", "delta_p")
    )
    result |= _with_interval("mean_kl", *_mean(texts, lambda text: text.kl_sum))
    result["mean_reverse_kl"], *_ = _mean(texts, lambda text: text.reverse_kl_sum)
    result |= _quantiles("kl", kl, KL_QUANTILES | {"max": 100})
    result["num_infinite_kl"] = int(np.isposinf(kl).sum())
    result |= _with_interval("same_top", *_mean(texts, lambda text: text.same_top_sum, most=1))
    delta_p = delta_p.astype(np.float64)
    result["mean_delta_p"] = float(delta_p.mean()) if len(delta_p) else math.nan
    result["rms_delta_p"] = math.sqrt(np.square(delta_p).mean()) if len(delta_p) else math.nan
    return result | _quantiles("delta_p", delta_p, DELTA_P_QUANTILES)


def token_pair_errors(texts: Sequence[TokenPairSums]) -> dict[str, float]:
    """What llama-perplexity --kl-divergence prints besides: standard errors and more quantiles.

    Its errors take tokens as independent, so they are too small.
    (tools/perplexity/perplexity.cpp in ggml-org/llama.cpp.)
    """
    count = sum(text.num_tokens for text in texts)
    kl, delta_p = (
        np.concatenate([getattr(text, name) for text in texts]).astype(np.float64)
        for name in ("kl", "delta_p")
    )
    found = _quantiles("kl", kl, MORE_KL_QUANTILES)
    found |= _quantiles("delta_p", delta_p, MORE_DELTA_P_QUANTILES)
    if count < 2:
        return found
    mean, base_mean = (
        sum(text.unweighted_nll_sum for text in side) / count
        for side in (texts, [text.base for text in texts])
    )
    product = sum(text.nll_product_sum for text in texts) / count
    error, base_error = (
        TextTotals.of(side).standard_error_of_tokens
        for side in (texts, [text.base for text in texts])
    )
    covariance = (product - mean * base_mean) / (count - 1)
    found |= ratio_errors(mean, error, base_mean, base_error, covariance)
    same = sum(text.same_top_sum for text in texts) / count
    rms = math.sqrt(np.square(delta_p).mean())
    return found | {
        "mean_kl_standard_error": _error_of_mean(kl),
        "mean_delta_p_standard_error": _error_of_mean(delta_p),
        "rms_delta_p_standard_error": (
            0.5 / rms * _error_of_mean(np.square(delta_p)) if rms > 0 else 0.0
        ),
        "same_top_standard_error": math.sqrt(max(same * (1 - same), 0) / (count - 1)),
    }


def ratio_errors(
    mean: float, error: float, base_mean: float, base_error: float, covariance: float
) -> dict[str, float]:
    """Standard errors of what is computed from two mean nll, whose own ones and covariance these
    are, by propagation."""
    perplexity, base_perplexity = exp_or_inf(mean), exp_or_inf(base_mean)
    both = error * base_error
    difference_error = math.sqrt(max(error**2 + base_error**2 - 2 * covariance, 0.0))
    perplexity_variance = (
        (perplexity * error) ** 2
        + (base_perplexity * base_error) ** 2
        - 2 * perplexity * base_perplexity * covariance
    )
    return {
        "perplexity_standard_error": perplexity * error,
        "base_perplexity_standard_error": base_perplexity * base_error,
        "nll_correlation": covariance / both if both > 0 else math.nan,
        "mean_nll_difference_standard_error": difference_error,
        "perplexity_ratio_standard_error": exp_or_inf(mean - base_mean) * difference_error,
        "perplexity_difference": perplexity - base_perplexity,
        "perplexity_difference_standard_error": math.sqrt(max(perplexity_variance, 0.0)),
    }


def paired_nll(sums: Sequence[tuple[float, ...]], base_sums: Sequence[tuple[float, ...]]) -> Result:
    """The perplexities of two models and their ratio, from (nll_sum, weight_sum, ...) of each text.

    The weights of both are the same.
    """
    sums, base_sums = ([(row[0], row[1]) for row in side] for side in (sums, base_sums))
    found: Result = {}
    for side, rows in (("", sums), ("base_", base_sums)):
        totals = NllTotals.from_sequences([s for s, _ in rows], [w for _, w in rows], 0)
        found |= {f"{side}perplexity": totals.perplexity, f"{side}mean_nll": totals.mean_nll}
    mean, low, high = paired_difference(sums, base_sums)
    found |= _with_interval("mean_nll_difference", mean, low, high)
    ratio = [exp_or_inf(value) for value in (mean, low, high)]
    return found | _with_interval("perplexity_ratio", *ratio)


def paired_difference(
    sums: Sequence[tuple[float, float]], base_sums: Sequence[tuple[float, float]]
) -> tuple[float, float, float]:
    """The difference of two ratios over the same texts, and its 95% interval.

    With S_d, W_d the sums of text d, R = sum S_d / sum W_d, and S'_d, W'_d, R' those of the base:

        difference = R - R'
        r_d        = (S_d - R W_d) / sum W - (S'_d - R' W'_d) / sum W'
        se         = sqrt(D / (D - 1) sum r_d^2)

    the linearised standard error of a difference of ratios, with Student's t at the effective
    number of texts less one (Cochran, Sampling Techniques, 3rd ed. 1977, section 6.19; totals.py).
    Texts count in which both have a positive weight. NaN without any, and the interval for fewer
    than two effective ones.
    """
    rows = np.array([[*own, *base] for own, base in zip(sums, base_sums, strict=True)])
    rows = rows.reshape(-1, 4)
    rows = rows[(rows[:, 1] > 0) & (rows[:, 3] > 0)]
    if len(rows) == 0:
        return math.nan, math.nan, math.nan
    total, weight, base_total, base_weight = rows.sum(0).tolist()
    difference = total / weight - base_total / base_weight
    if weight == base_weight:  # exactly 0 for a model against itself
        difference = (total - base_total) / weight
    if len(rows) < 2 or not math.isfinite(difference):
        return difference, math.nan, math.nan
    nll, weights, base_nll, base_weights = rows.T
    residuals = (nll - total / weight * weights) / weight
    residuals -= (base_nll - base_total / base_weight * base_weights) / base_weight
    error = math.sqrt(len(rows) / (len(rows) - 1) * float(residuals @ residuals))
    effective = min(float(w.sum() ** 2 / (w @ w)) for w in (weights, base_weights))
    margin = student_t_95(effective - 1) * error
    return difference, difference - margin, difference + margin


def _mean(
    texts: Sequence[TokenPairSums], value: Callable[[TokenPairSums], float], most: float = math.inf
) -> tuple[float, float, float]:
    """The mean over tokens of what `value` sums up in a text, and its 95% interval; of no token is
    it below 0 or above `most`, so the interval ends there."""
    totals = NllTotals.from_sequences(
        [value(text) for text in texts], [text.weight_sum for text in texts], 0
    )
    ends = totals.mean_nll - totals.margin, totals.mean_nll + totals.margin
    low, high = np.clip(ends, 0, most).tolist()
    return totals.mean_nll, low, high


def _with_interval(name: str, mean: float, low: float, high: float) -> dict[str, float]:
    return {name: mean, f"{name}_ci_low": low, f"{name}_ci_high": high}


def _quantiles(name: str, values: np.ndarray, percent: Mapping[str, float]) -> dict[str, float]:
    """Linear between the two neighbours; NaN if any value is, and without values."""
    ordered = np.sort(values.astype(np.float64))  # NaN comes last
    found = {}
    for label, part in percent.items():
        found[f"{name}_{label}"] = math.nan
        if len(ordered) > 0 and not math.isnan(ordered[-1]):
            place = part / 100 * (len(ordered) - 1)
            low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
            # subtle: between two infinite values, numpy's rule would give NaN.
            between = 0.0 if low == high else (high - low) * (place - math.floor(place))
            found[f"{name}_{label}"] = float(low + between)
    return found


def _error_of_mean(values: np.ndarray) -> float:
    """Standard error of the mean of independent values."""
    if not np.isfinite(values).all():
        return math.nan
    return float(np.sqrt(max(np.square(values).mean() - values.mean() ** 2, 0) / (len(values) - 1)))


def position_pair_results(texts: Sequence[PairSums], edges: Sequence[int], window: int) -> Result:
    """The comparison of two models in each bucket, by its label."""
    sums, base_sums = (
        np.stack([each.positions for each in side], axis=2)
        for side in (texts, [text.base for text in texts])
    )
    return {
        label: paired_nll(part.T, base_part.T) | {"num_tokens": int(part[2].sum())}
        for label, part, base_part in zip(
            bucket_labels(edges, window), sums, base_sums, strict=True
        )
    }
