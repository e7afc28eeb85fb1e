"""The sums: worked by hand, against the definition, and as a group under addition."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppleval.stats.runs import Run
from ppleval.stats.totals import NllTotals, student_t_95

# Two-sided 95% quantiles by degrees of freedom: of 1, 2 and 4 from their closed forms, of the
# others from printed tables, the fraction by integrating the density in 50 digits.
STUDENT_T = {
    1: math.tan(0.475 * math.pi),
    5 / 3: 5.2422651306,
    2: 0.95 * math.sqrt(2 / (1 - 0.95**2)),
    7: 2.36462425,
    9: 2.26215716,
    29: 2.04522964,
    100: 1.98397152,
    1e12: 1.95996398,
}


def test_worked_by_hand():
    # Three sequences with S = 2, 6, 4 nats over W = 1, 2, 1: mean 12/4 = 3, residuals
    # 2 - 3 = -1, 6 - 6 = 0, 4 - 3 = 1, so se = sqrt(3/2 * 2) / 4 = sqrt(3) / 4.
    totals = NllTotals.from_sequences([2, 6, 4], [1, 2, 1], num_tokens=4)
    assert totals.mean_nll == 3
    assert totals.perplexity == math.exp(3)
    assert totals.bits_per_token == pytest.approx(3 / math.log(2))
    assert totals.standard_error == pytest.approx(math.sqrt(3) / 4)
    # Their weights are those of 16 / 6 equal sequences, so t has 5 / 3 degrees of freedom.
    assert totals.effective_sequences == pytest.approx(8 / 3)
    low, high = totals.perplexity_interval
    margin = STUDENT_T[5 / 3] * math.sqrt(3) / 4
    assert low == pytest.approx(math.exp(3 - margin), rel=1e-6)
    assert high == pytest.approx(math.exp(3 + margin), rel=1e-6)
    assert (totals.num_tokens, totals.num_sequences) == (4, 3)


def test_nothing_scored_is_nan():
    for totals in (NllTotals(), NllTotals.from_sequences([0.0, 0.0], [0.0, 0.0], 0)):
        assert totals == NllTotals()
        assert math.isnan(totals.perplexity)
        assert all(math.isnan(bound) for bound in totals.perplexity_interval)


def test_one_sequence_has_no_interval():
    low, high = NllTotals.from_sequences([1.0], [1.0], 1).perplexity_interval
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize(("degrees", "quantile"), STUDENT_T.items())
def test_the_quantile_of_student(degrees, quantile):
    assert student_t_95(degrees) == pytest.approx(quantile, rel=2e-6)


@pytest.mark.parametrize("degrees", [0.99, 0.0, -1.0, math.nan])
def test_there_is_no_quantile_below_one_degree(degrees):
    assert math.isnan(student_t_95(degrees))


def test_two_equal_sequences_have_the_interval_of_one_degree():
    for weight in (1.0, 0.1, 7.0, 1 / 3):  # squares of some are rounded
        totals = NllTotals.from_sequences([weight, 3 * weight], [weight, weight], 2)
        assert totals.standard_error == pytest.approx(1.0)
        assert totals.margin == pytest.approx(STUDENT_T[1], rel=1e-6)


def test_sequences_that_count_as_fewer_than_two_have_no_interval():
    totals = NllTotals.from_sequences([1.0, 2.0, 90.0], [1.0, 1.0, 30.0], 32)
    assert totals.effective_sequences == pytest.approx(32**2 / 902)
    assert math.isnan(totals.margin)
    assert all(math.isnan(bound) for bound in totals.perplexity_interval)


def test_the_interval_covers_what_it_says():
    """Of 2000 corpora of 5 texts; with 1.96 in place of t it was 87%."""
    rng = np.random.default_rng(0)
    covered = 0
    for means in rng.normal(4.0, 1.0, size=(2000, 5)):
        low, high = NllTotals.from_sequences(20 * means, [20.0] * 5, 100).perplexity_interval
        covered += low < math.exp(4.0) < high
    assert 0.93 < covered / 2000 < 0.97


def test_a_sequence_without_weight_does_not_count():
    one = NllTotals.from_sequences([1.0, math.nan, 2.0], [1.0, 0.0, 1.0], 2)
    assert one == NllTotals.from_sequences([1.0, 2.0], [1.0, 1.0], 2)


def test_equal_sequences_have_an_interval_of_no_width():
    totals = NllTotals.from_sequences([0.1] * 1000, [0.3] * 1000, 1000)
    assert totals.standard_error < 1e-7


def test_the_interval_of_two_short_texts_ends_at_1():
    # S = 1 and 7 over W = 2 each: mean 2, residuals -3 and 3, se = sqrt(2 * 18) / 4 = 1.5.
    totals = NllTotals.from_sequences([1.0, 7.0], [2.0, 2.0], 4)
    low, high = totals.perplexity_interval
    assert low == 1
    assert high == pytest.approx(math.exp(2 + 1.5 * STUDENT_T[1]), rel=1e-6)
    assert totals.result()["perplexity_ci_low"] == 1


def test_overflow_and_infinity_never_raise():
    assert NllTotals.from_sequences([800.0, 900.0], [1.0, 1.0], 2).perplexity == math.inf
    infinite = NllTotals.from_sequences([math.inf, 1.0], [1.0, 1.0], 2)
    assert infinite.perplexity == math.inf
    assert math.isnan(infinite.perplexity_interval[0])


def test_runs_add_up_also_as_rows_of_floats():
    run = Run(NllTotals.from_sequences([2.0, 6.0], [1.0, 2.0], 3), num_batches=2, num_sequences=5)
    assert run + Run() == Run() + run == run
    rows = np.array([run.numbers(), run.numbers()], dtype=np.float64)
    twice = Run.of(rows.sum(0).tolist())
    assert twice == run + run
    assert (twice.totals.num_tokens, twice.num_batches, twice.num_sequences) == (6, 4, 10)
    assert [type(number) for number in twice.numbers()] == [type(n) for n in run.numbers()]
    with pytest.raises(TypeError):
        run + NllTotals()


def test_only_totals_add():
    with pytest.raises(TypeError):
        NllTotals() + 1


def test_the_interval_covers_the_truth_19_times_in_20():
    # 200 documents whose tokens share a document effect, so that tokens are far from independent.
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        effects, lengths = rng.normal(3.0, 0.5, 200), rng.integers(5, 50, 200)
        totals = NllTotals.from_sequences(effects * lengths, lengths, int(lengths.sum()))
        low, high = totals.perplexity_interval
        covered += low <= math.exp(3.0) <= high
    # 400 draws at 95 %: within three standard deviations, 1.1 percentage points each.
    assert 0.917 <= covered / 400 <= 0.983


sequences = st.lists(
    st.tuples(st.floats(0, 1e4), st.floats(0, 1e3), st.integers(0, 100)), max_size=8
)


def totals_of(rows):
    s, w, n = zip(*rows, strict=True) if rows else ((), (), ())
    return NllTotals.from_sequences(s, w, sum(n))


@given(sequences, sequences)
def test_parts_add_up_to_the_whole(first, second):
    merged, whole = totals_of(first) + totals_of(second), totals_of(first + second)
    for name in ("nll_sum", "weight_sum", "nll_sum_sq", "weight_sum_sq", "nll_weight_sum"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert merged.num_tokens == whole.num_tokens
    assert merged.num_sequences == whole.num_sequences
    assert merged == totals_of(second) + totals_of(first)
    assert NllTotals() + merged == merged


# Squares of numbers below 1e-150 vanish.
nll_sums = st.just(0.0) | st.floats(1e-100, 100)


@given(st.lists(st.tuples(nll_sums, st.floats(0.01, 100)), min_size=2, max_size=20))
def test_standard_error_equals_its_definition(rows):
    s, w = np.array(rows).T
    mean = s.sum() / w.sum()
    expected = math.sqrt(len(s) / (len(s) - 1) * ((s - mean * w) ** 2).sum()) / w.sum()
    totals = NllTotals.from_sequences(s, w, len(s))
    # The expanded square loses what the residuals are smaller than the sums: sqrt(eps) of them.
    scale = math.sqrt((s**2).sum() + mean**2 * (w**2).sum()) / w.sum()
    assert totals.standard_error == pytest.approx(expected, rel=1e-6, abs=1e-7 * scale)
