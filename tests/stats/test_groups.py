"""Results by group, from texts and from logits, against the results of each group alone."""

import json
import math
import pickle

import numpy as np
import pytest
from support import load, random_batch
from text_oracles import TEXTS, TINY

from ppleval import Perplexity
from ppleval.stats import groups as stats_groups

NAMES = ["code", "prose", "code", "prose", "code", "prose", "code"]


def of_group(values, name):
    return [value for value, group in zip(values, NAMES, strict=True) if group == name]


def assert_same(found, expected, rel=1e-6):
    for name, value in found.items():
        if not isinstance(value, str):
            assert value == pytest.approx(expected[name], rel=rel, nan_ok=True), name


def text_of(result):
    """All digits, so that results with NaN can be compared."""
    return json.dumps(result)


def test_texts(ppl):
    result = ppl.compute(predictions=TEXTS, model_id=TINY, groups=NAMES)
    assert list(result["groups"]) == ["code", "prose"]
    for name, found in result["groups"].items():
        expected = ppl.compute(predictions=of_group(TEXTS, name), model_id=TINY)
        assert set(found) == set(expected) - {"signature"}
        assert_same(found, expected)
    means = [found["mean_nll"] for found in result["groups"].values()]
    assert result["macro_mean_nll"] == pytest.approx(np.mean(means), rel=1e-12)
    assert result["macro_perplexity"] == pytest.approx(np.exp(np.mean(means)), rel=1e-12)
    whole = ppl.compute(predictions=TEXTS, model_id=TINY)
    assert_same(whole, result)
    assert sum(found["num_tokens"] for found in result["groups"].values()) == whole["num_tokens"]


def test_logits_in_batches(ppl):
    logits, labels = random_batch(batch=7)
    labels[2, 3:] = -100
    weights = np.linspace(0, 1, 49).reshape(7, 7)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
        ppl.add_batch(
            predictions=logits[rows],
            references=labels[rows],
            sample_weight=weights[rows],
            groups=NAMES[rows],
        )
    result = ppl.compute()
    for name, found in result["groups"].items():
        rows = of_group(range(7), name)
        expected = Perplexity().compute(
            predictions=logits[rows], references=labels[rows], sample_weight=weights[rows]
        )
        assert_same(found, expected, rel=1e-12)
        assert found["num_tokens"] == expected["num_tokens"]
    expected = Perplexity().compute(predictions=logits, references=labels, sample_weight=weights)
    assert_same(expected, result, rel=1e-12)


def test_sequences_of_unequal_length_and_add(ppl):
    logits, labels = random_batch(batch=3)
    rows = [(logits[i, :n], labels[i, :n]) for i, n in enumerate((7, 2, 5))]
    found = ppl.compute(
        predictions=[row for row, _ in rows],
        references=[ids for _, ids in rows],
        groups=["a", "b", "a"],
    )
    for (row, ids), name in zip(rows, "aba", strict=True):
        ppl.add(prediction=row, reference=ids, group=name)
    assert text_of(ppl.compute()) == text_of(found)
    assert found["groups"]["b"]["num_tokens"] == 2


def test_whole_numbers_are_names_and_order_is_kept(ppl):
    logits, labels = random_batch(batch=3)
    result = ppl.compute(predictions=logits, references=labels, groups=np.array([2, 1, 2]))
    assert list(result["groups"]) == ["2", "1"]


def test_texts_that_wait_keep_their_groups(ppl):
    ppl.add_batch(predictions=TEXTS[:3], groups=NAMES[:3])
    ppl.add(prediction=TEXTS[3], group=NAMES[3])
    result = ppl.compute(predictions=TEXTS[4:], groups=NAMES[4:], model_id=TINY)
    expected = ppl.compute(predictions=TEXTS, groups=NAMES, model_id=TINY)
    assert text_of(result) == text_of(expected)


def test_merge_and_pickle(ppl):
    logits, labels = random_batch(batch=4)
    other = Perplexity()
    ppl.add_batch(predictions=logits[:2], references=labels[:2], groups=["a", "b"])
    other.add_batch(predictions=logits[2:], references=labels[2:], groups=["b", "c"])
    ppl.merge(pickle.loads(pickle.dumps(other)))
    expected = Perplexity().compute(
        predictions=logits, references=labels, groups=["a", "b", "b", "c"]
    )
    found = ppl.compute()
    assert list(found["groups"]) == ["a", "b", "c"]
    for name, result in found["groups"].items():
        assert_same(result, expected["groups"][name], rel=1e-12)


def test_an_empty_group_has_no_part_in_the_mean(ppl):
    logits, labels = random_batch(batch=2)
    labels[1] = -100
    result = ppl.compute(predictions=logits, references=labels, groups=["a", "b"])
    assert math.isnan(result["groups"]["b"]["perplexity"])
    assert result["macro_mean_nll"] == result["groups"]["a"]["mean_nll"]


def test_a_comparison(ppl):
    options = {"model_id": TINY, "base_id": TINY, "model_kwargs": {"dtype": "bfloat16"}}
    result = ppl.compare(TEXTS, groups=NAMES, batch_size=1, **options)
    for name, found in result["groups"].items():
        expected = ppl.compare(of_group(TEXTS, name), batch_size=1, **options)
        assert set(found) == set(expected) - {"signature"}
        assert_same(found, expected)
    bases = [found["base_mean_nll"] for found in result["groups"].values()]
    assert result["base_macro_mean_nll"] == pytest.approx(np.mean(bases))


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (["a"], ValueError, "groups must hold one name for each text or sequence, got 1 names for"),
        ("ab", TypeError, "groups must be a list with one name for each text or sequence, got str"),
        (["a", None], TypeError, r"groups\[1\] must be a string or a whole number, got None"),
        (["a", True], TypeError, r"groups\[1\] must be a string or a whole number, got True"),
        (3, TypeError, "groups must be a list with one name for each text or sequence, got int"),
    ],
)
def test_bad_groups_change_nothing(ppl, groups, error, message):
    logits, labels = random_batch(batch=2)
    ppl.add_batch(predictions=logits, references=labels, groups=["a", "b"])
    for call in (ppl.add_batch, ppl.compute):
        with pytest.raises(error, match=message):
            call(predictions=logits, references=labels, groups=groups)
    with pytest.raises(error, match=message):
        Perplexity().compute(predictions=TEXTS[:2], model_id=TINY, groups=groups)
    expected = Perplexity().compute(predictions=logits, references=labels, groups=["a", "b"])
    assert text_of(ppl.compute()) == text_of(expected)


def test_all_have_groups_or_none(ppl):
    logits, labels = random_batch(batch=2)
    batch = {"predictions": logits, "references": labels}
    ppl.add_batch(**batch, groups=["a", "b"])
    match = "groups must go with every batch and text, or with none"
    for call in (ppl.add_batch, ppl.compute):
        with pytest.raises(ValueError, match=match):
            call(**batch)
    other = Perplexity()
    other.add_batch(**batch)
    with pytest.raises(ValueError, match=match):
        ppl.merge(other)
    assert ppl.compute()["num_sequences"] == 2
    texts = Perplexity()
    texts.add_batch(predictions=TEXTS[:2])
    with pytest.raises(ValueError, match=match):
        texts.compute(predictions=TEXTS[2:], groups=NAMES[2:], model_id=TINY)


def test_joined_texts_have_no_groups(ppl):
    with pytest.raises(ValueError, match='preset="hf-docs" joins all texts, so it has no groups'):
        ppl.compute(predictions=TEXTS, model_id=TINY, preset="hf-docs", groups=NAMES)


def test_evaluate_s_own_processes_have_no_groups():
    logits, labels = random_batch(batch=2)
    ppl = load(num_process=2, process_id=1, experiment_id="groups")
    with pytest.raises(ValueError, match="groups go with one process or with sync=True"):
        ppl.compute(predictions=logits, references=labels, groups=["a", "b"])


def test_by_group_keeps_the_order():
    by_group = stats_groups.by_group
    assert by_group([1, 2, 3, 4], ["b", "a", "b", "c"]) == {"b": [1, 3], "a": [2], "c": [4]}
