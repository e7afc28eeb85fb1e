"""A slice of the fuzzers of benchmarks/, which are run by hand for many calls each.

The seeds are fixed, so that the same calls are made in each run; another slice is other seeds.
"""

import fuzz_files
import fuzz_logits
import fuzz_texts
import numpy as np
import pytest
import torch
from fuzz_oracle import student_t_95
from fuzz_runs import Calls, CrashedError, WrongError, failures, kind_of

from ppleval.stats import totals as stats_totals

# They take about five, ten, and twice five seconds on one core.
LOGIT_SEEDS = range(120)
TEXT_SEEDS = range(60)
FILE_SEEDS = range(16)


@pytest.fixture
def one_thread():
    """Of tiny matrices more threads make slower work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_random_logits_equal_the_loop_or_are_refused(one_thread):
    assert failures(fuzz_logits.one_call, LOGIT_SEEDS) == []


def test_random_texts_equal_the_loop_or_are_refused(one_thread):
    assert failures(fuzz_texts.one_call, TEXT_SEEDS) == []


@pytest.mark.parametrize("one_call", [fuzz_files.one_base, fuzz_files.one_file])
def test_changed_files_give_the_right_number_or_are_refused(one_thread, one_call):
    assert failures(one_call, FILE_SEEDS) == []


def test_a_wrong_number_is_found(monkeypatch):
    """A metric whose mean nll is off by 4e-6 is wrong in float32."""
    totals = stats_totals.NllTotals
    right = totals.result

    def off(self):
        result = right(self)
        return result | {"mean_nll": result["mean_nll"] + 4e-6 * (1 + result["mean_nll"])}

    monkeypatch.setattr(totals, "result", off)
    found = failures(fuzz_logits.one_call, range(10))
    assert len(found) > 5
    assert all("mean_nll is" in outcome.what for outcome in found)


def test_what_a_call_leaves_behind_is_found():
    generator = np.random.default_rng(0)
    with pytest.raises(WrongError, match="the call changed torch's random state"):
        Calls().make(lambda: torch.rand(1), "the call")
    state = {"the state": 1}
    with pytest.raises(WrongError, match="the call changed the state"):
        Calls(lambda: dict(state)).make(lambda: state.update({"the state": 2}), "the call")
    with pytest.raises(WrongError, match="was not refused, but gave 3"):
        Calls().make_refused(lambda: 3, "the call")
    with pytest.raises(CrashedError, match="the call: ValueError: a cannot be empty"):
        Calls().make(lambda: generator.choice([], 1, p=[1]), "the call")


def test_the_fuzzers_have_a_quantile_of_their_own():
    from ppleval.stats.totals import student_t_95 as own

    for degrees in (1, 1.3, 2, 7.5, 40, 1000):
        assert student_t_95(degrees) == pytest.approx(own(degrees), rel=1e-8)


def test_sentences_of_one_kind_count_together():
    one = "references[0, 1] is 7, outside the vocabulary of 5 ids [0, 5)."
    other = "references[2, 0] is -3, outside the vocabulary of 11 ids [0, 11)."
    assert kind_of(one) == kind_of(other) != kind_of("shift must be True or False, got 'yes'.")
