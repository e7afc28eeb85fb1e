"""Sums of two models -> divergence, ratio, paired intervals: by hand, by numpy, by simulation."""

import math

import numpy as np
import pytest

from ppleval.stats import pairs as pair_totals
from ppleval.stats import totals

TextSums, TokenPairSums = totals.TextSums, pair_totals.TokenPairSums


def text_sums(nll, num_bytes=None):
    nll = np.asarray(nll, dtype=np.float64)
    return TextSums(
        nll_sum=float(nll.sum()),
        weight_sum=float(len(nll)),
        unweighted_nll_sum=float(nll.sum()),
        token_nll_sq_sum=float(nll @ nll),
        num_tokens=len(nll),
        num_bytes=4 * len(nll) if num_bytes is None else num_bytes,
        num_words=len(nll),
        truncated=False,
        context_truncated=False,
        positions=totals.NO_POSITIONS,
    )


def pair(nll, base_nll, kl=None, same=None):
    nll, base_nll = np.asarray(nll, dtype=np.float64), np.asarray(base_nll, dtype=np.float64)
    kl = np.zeros(len(nll)) if kl is None else np.asarray(kl)
    return TokenPairSums(
        **vars(text_sums(nll)),
        base=text_sums(base_nll),
        kl_sum=float(kl.sum()),
        reverse_kl_sum=0.0,
        same_top_sum=float(len(nll) if same is None else same),
        nll_product_sum=float(nll @ base_nll),
        kl=kl.astype(np.float32),
        delta_p=(np.exp(-nll) - np.exp(-base_nll)).astype(np.float32),
    )


def test_by_hand():
    """Two texts of two tokens: differences 0.5 and 0.25 of mean nll, so se = |0.25| / 2."""
    texts = [pair([1.0, 2.0], [0.5, 1.5]), pair([3.0, 1.0], [2.5, 1.0])]
    result = pair_totals.token_pair_result(texts)
    assert result["mean_nll_difference"] == pytest.approx(0.375)
    assert result["perplexity_ratio"] == pytest.approx(math.exp(0.375))
    margin = 12.7062047 * 0.125  # Student's t at one degree of freedom
    assert result["mean_nll_difference_ci_low"] == pytest.approx(0.375 - margin, rel=1e-6)
    assert result["perplexity_ratio_ci_high"] == pytest.approx(math.exp(0.375 + margin), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(7 / 4))
    assert result["base_perplexity"] == pytest.approx(math.exp(5.5 / 4))
    assert result["bits_per_byte_difference"] == pytest.approx(1.5 / 16 / math.log(2))


def test_a_model_against_itself():
    rng = np.random.default_rng(0)
    texts = [pair(nll, nll) for nll in (rng.exponential(2, n) for n in (3, 10, 9, 1))]
    result = pair_totals.token_pair_result(texts)
    for name, value in {"mean_nll_difference": 0, "perplexity_ratio": 1, "same_top": 1}.items():
        for suffix in ("", "_ci_low", "_ci_high"):
            assert result[name + suffix] == value
    assert result["bits_per_byte_difference"] == result["bits_per_byte_difference_ci_high"] == 0
    assert result["mean_kl"] == result["kl_max"] == result["rms_delta_p"] == 0


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1001])
def test_quantiles_are_those_of_numpy(size):
    kl = np.random.default_rng(size).exponential(1, size).astype(np.float32)
    result = pair_totals.token_pair_result([pair(np.ones(size), np.full(size, 2.0), kl)])
    percent = {"median": 50, "p90": 90, "p95": 95, "p99": 99, "p999": 99.9, "max": 100}
    for name, part in percent.items():
        expected = np.percentile(kl.astype(np.float64), part)
        assert result[f"kl_{name}"] == pytest.approx(expected, rel=1e-12)
    difference = math.exp(-1) - math.exp(-2)
    for name in ("mean_delta_p", "rms_delta_p", "delta_p_p5", "delta_p_median", "delta_p_p75"):
        assert result[name] == pytest.approx(difference, rel=1e-6)


def test_infinite_divergence_is_counted():
    result = pair_totals.token_pair_result(
        [pair([1.0] * 4, [1.0] * 4, [0.1, math.inf, math.inf, 0.2])]
    )
    assert (result["num_infinite_kl"], result["mean_kl"], result["kl_max"]) == (
        2,
        math.inf,
        math.inf,
    )
    assert result["kl_p90"] == math.inf
    assert math.isnan(result["mean_kl_ci_low"])


def test_intervals_end_where_the_quantities_do():
    """KL divergences of 0 and 2 over two texts: mean 1, se 1, and half the texts agree."""
    texts = [pair([1.0], [1.0], [0.0], same=1), pair([1.0], [1.0], [2.0], same=0)]
    result = pair_totals.token_pair_result(texts)
    assert (result["mean_kl"], result["mean_kl_ci_low"]) == (1, 0)
    assert result["mean_kl_ci_high"] == pytest.approx(1 + 12.7062047, rel=1e-6)
    assert [result[f"same_top{end}"] for end in ("_ci_low", "", "_ci_high")] == [0, 0.5, 1]


def test_nothing_scored():
    result = pair_totals.token_pair_result([pair([], [])])
    assert (result["num_tokens"], result["num_infinite_kl"]) == (0, 0)
    for name in ("perplexity_ratio", "mean_kl", "kl_median", "same_top", "rms_delta_p"):
        assert math.isnan(result[name])


def test_the_ratio_of_unequal_texts_is_the_ratio_estimator():
    """Equal weights on both sides: the interval of `NllTotals` for the differences themselves."""
    rng = np.random.default_rng(1)
    sums = [(rng.normal(size), rng.normal(size), float(size)) for size in (5, 50, 20, 7, 3, 90)]
    found = pair_totals.paired_difference(
        [(own, weight) for own, _, weight in sums], [(base, weight) for _, base, weight in sums]
    )
    run = totals.NllTotals.from_sequences(
        [own - base for own, base, _ in sums], [weight for *_, weight in sums], 175
    )
    expected = run.mean_nll, run.mean_nll - run.margin, run.mean_nll + run.margin
    assert found == pytest.approx(expected, rel=1e-9)


def test_different_tokens_and_bytes():
    """The difference of two ratios, by the jackknife, which approaches the linearised error."""
    rng = np.random.default_rng(2)
    count = 400
    weights = rng.integers(50, 150, (count, 2)).astype(float)
    hard = rng.normal(2, 0.5, count)
    sums = np.stack([hard + rng.normal(0, 0.1, count) for _ in range(2)], 1) * weights
    rows = [list(zip(sums[:, i].tolist(), weights[:, i].tolist(), strict=True)) for i in (0, 1)]
    difference, low, high = pair_totals.paired_difference(*rows)

    def ratio_difference(keep):
        own, base = sums[keep].sum(0) / weights[keep].sum(0)
        return own - base

    everything = np.ones(count, dtype=bool)
    assert difference == pytest.approx(ratio_difference(everything), rel=1e-9)
    left_out = []
    for i in range(count):
        keep = everything.copy()
        keep[i] = False
        left_out.append(ratio_difference(keep))
    error = math.sqrt((count - 1) * np.var(left_out))
    assert (high - low) / 2 == pytest.approx(1.967 * error, rel=0.01)


def test_the_paired_interval_covers_the_truth_and_the_unpaired_one_is_wider():
    """40 texts whose difficulty both models share; interval_coverage.py has more runs."""
    rng = np.random.default_rng(3)
    covered, widths, unpaired = 0, [], []
    for _ in range(200):
        texts = []
        for _ in range(40):
            size = int(rng.lognormal(4, 0.5)) + 1
            base = rng.normal(3, 0.7) + rng.normal(0, 0.5, size)
            nll = base + 0.05 + rng.normal(0, 0.05) + rng.normal(0, 0.2, size)
            texts.append(pair(nll, base))
        result = pair_totals.token_pair_result(texts)
        low, high = (result[f"mean_nll_difference_ci_{end}"] for end in ("low", "high"))
        covered += low < 0.05 < high
        widths.append(high - low)
        runs = [
            totals.NllTotals.from_sequences(
                [t.nll_sum for t in side], [t.weight_sum for t in side], 1
            )
            for side in (texts, [t.base for t in texts])
        ]
        unpaired.append(2 * math.hypot(*(run.margin for run in runs)))
    assert 0.91 < covered / 200 < 0.99
    assert np.mean(unpaired) > 5 * np.mean(widths)


# --- llama.cpp ------------------------------------------------------------------------------------


def test_the_table_of_llama_cpp():
    """Pull request 12557 of ggml-org/llama.cpp: 10.910139 +- 0.080259, 10.517647 +- 0.077374 and a
    correlation of 99.20% give ln 0.036638 +- 0.000930 and 1.037318 +- 0.000965."""
    model, base = 10.910139, 10.517647
    error, base_error = 0.080259 / model, 0.077374 / base
    found = pair_totals.ratio_errors(
        math.log(model), error, math.log(base), base_error, 0.9920 * error * base_error
    )
    assert math.log(model / base) == pytest.approx(0.036638, abs=5e-7)
    assert model / base == pytest.approx(1.037318, abs=1e-6)
    assert found["nll_correlation"] == pytest.approx(0.9920)
    assert found["mean_nll_difference_standard_error"] == pytest.approx(0.000930, abs=1e-6)
    assert found["perplexity_ratio_standard_error"] == pytest.approx(0.000965, abs=1e-6)
    assert found["perplexity_standard_error"] == pytest.approx(0.080259, abs=1e-6)


def test_errors_of_tokens_are_those_of_independent_ones():
    rng = np.random.default_rng(4)
    nll, kl = rng.exponential(2, 500), rng.exponential(0.1, 500).astype(np.float32)
    base = nll + rng.normal(0, 0.1, 500)
    texts = [pair(nll[:200], base[:200], kl[:200], 150), pair(nll[200:], base[200:], kl[200:], 250)]
    found = pair_totals.token_pair_errors(texts)

    def error(values):
        return float(np.std(values) / math.sqrt(len(values) - 1))

    delta_p = np.exp(-nll) - np.exp(-base)
    rms = math.sqrt(np.mean(delta_p**2))
    expected = {
        "mean_nll_difference_standard_error": error(nll - base),
        "nll_correlation": np.corrcoef(nll, base)[0, 1],
        "mean_kl_standard_error": error(kl.astype(np.float64)),
        "mean_delta_p_standard_error": error(delta_p),
        "rms_delta_p_standard_error": 0.5 / rms * error(delta_p**2),
        "same_top_standard_error": math.sqrt(0.8 * 0.2 / 499),
        "kl_p0_1": np.percentile(kl.astype(np.float64), 0.1),
        "kl_min": kl.min(),
        "delta_p_p999": np.percentile(delta_p, 99.9),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
