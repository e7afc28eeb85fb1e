"""Windows: by hand, and as counts that hold for every length, context and stride."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppleval.texts import windows


def spans(found):
    return [(w.start, w.stop, w.first) for w in found]


def test_sliding_by_hand():
    # 11 ids, a context of 4, steps of 2: the model reads 4 ids and so predicts up to the fifth.
    found = windows.sliding_windows(11, context=4, stride=2)
    assert spans(found) == [(0, 5, 1), (2, 7, 5), (4, 9, 7), (6, 11, 9)]


def test_the_last_window_has_its_full_context():
    found = windows.sliding_windows(8, context=4, stride=4)
    assert spans(found) == [(0, 5, 1), (3, 8, 5)]


def test_what_comes_before_first_only_conditions():
    assert spans(windows.sliding_windows(4, 4, 2, first=3)) == [(0, 4, 3)]
    assert spans(windows.sliding_windows(10, 4, 2, first=7)) == [(4, 9, 7), (5, 10, 9)]


def test_recipe_by_hand():
    # Steps of 2 with a context of 4 over 7 ids: the second window has two new ids and is counted
    # as one, the third is cut to three ids, of which one is new: it is counted as none.
    found = list(windows.recipe_windows(7, context=4, stride=2))
    assert spans(found) == [(0, 4, 1), (2, 6, 4), (4, 7, 6)]
    assert [w.weight for w in found] == [1.0, 0.5, 0.0]


def test_recipe_without_overlap_loses_the_first_id_of_each_window():
    found = list(windows.recipe_windows(8, context=4, stride=4))
    assert spans(found) == [(0, 4, 1), (4, 8, 5)]
    assert [w.weight for w in found] == [1.0, 1.0]


def test_chunk_windows_by_hand():
    assert spans(windows.chunk_windows(19, context=8, first=5)) == [(0, 8, 5), (8, 16, 13)]


@given(st.integers(0, 300), st.integers(1, 40), st.data())
def test_sliding_scores_every_id_once_within_the_context(num_ids, context, data):
    stride = data.draw(st.integers(1, context))
    first = data.draw(st.integers(1, 60))
    found = list(windows.sliding_windows(num_ids, context, stride, first))
    scored = [i for w in found for i in range(w.first, w.stop)]
    assert scored == list(range(first, num_ids))
    for w in found:
        assert 0 <= w.start < w.first < w.stop <= num_ids
        assert w.num_inputs <= context
        # Never less context than a stride of this kind can give.
        assert w.first - w.start >= min(w.first, context + 1 - stride)


@given(st.integers(0, 300), st.integers(2, 40), st.data())
def test_recipe_scores_no_id_twice(num_ids, context, data):
    stride = data.draw(st.integers(1, context))
    found = list(windows.recipe_windows(num_ids, context, stride))
    scored = [i for w in found for i in range(w.first, w.stop)]
    assert len(set(scored)) == len(scored)
    if stride < context:
        assert scored == list(range(1, num_ids))
    assert all(w.stop - w.start <= context for w in found)


@pytest.mark.parametrize(
    ("context", "stride", "match"),
    [
        (4, 5, "stride must be between 1 and the window of 4 tokens, got 5"),
        (4, 0, "stride must be between 1"),
        (0, 1, "window must be at least 1 token, got 0"),
    ],
)
def test_impossible_windows_are_named(context, stride, match):
    with pytest.raises(ValueError, match=match):
        list(windows.sliding_windows(10, context, stride))
    with pytest.raises(ValueError, match=match):
        list(windows.recipe_windows(10, context, stride))


def test_half_of_a_tiny_window_is_nothing():
    with pytest.raises(ValueError, match="a window of 2 tokens has nothing to score"):
        list(windows.chunk_windows(10, 2, 2))


def to_the_end(found, num_ids, context, key=lambda num_inputs: 0):
    found = windows.windows_to_the_end(list(found), num_ids, context, key)
    return [(*span, w.reads_end, w.num_inputs) for w, span in zip(found, spans(found), strict=True)]


def test_the_end_is_read_with_the_last_window_or_after_it():
    # 4 ids: the model reads three, and a context of 4 has room for the last.
    short = list(windows.sliding_windows(4, 4, 2))
    assert to_the_end(short, 4, 4) == [(0, 4, 1, True, 4)]
    # 5 ids: it reads four already.
    full = list(windows.sliding_windows(5, 4, 2))
    assert to_the_end(full, 5, 4) == [(0, 5, 1, False, 4), (1, 5, 5, True, 4)]
    # Four ids are read otherwise than three, as LongRoPE does.
    apart = to_the_end(short, 4, 8, key=lambda num_inputs: num_inputs > 3)
    assert apart == [(0, 4, 1, False, 3), (0, 4, 4, True, 4)]


def test_no_end_where_nothing_before_it_is_scored():
    assert to_the_end([], 1, 4) == []
    dropped = windows.chunk_windows(19, context=8, first=5)
    assert to_the_end(dropped, 19, 8) == [(0, 8, 5, False, 7), (8, 16, 13, False, 7)]
