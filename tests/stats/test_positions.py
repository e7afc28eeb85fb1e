"""Results by how many tokens the model could see, against a loop over tokens."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
from support import ROOT
from text_oracles import CONTEXT, TEXTS, TINY, ids_of, plain_nll

from ppleval.stats import positions


def contexts_of(num_ids, context, stride):
    """Oracle: (number of an id, how many ids the model sees before it), one id at a time."""
    stop = min(num_ids, context + 1)
    for i in range(1, num_ids):
        while i >= stop:
            stop = min(num_ids, stop + stride)
        yield i, i - max(0, stop - context - 1)


def expected_buckets(model, tokenizer, stride, label_of):
    found = defaultdict(list)
    for text in TEXTS:
        ids = ids_of(tokenizer, text)
        for i, seen in contexts_of(len(ids), CONTEXT, stride):
            found[label_of(seen)] += plain_nll(model, ids, i, i + 1, i - seen)
    return found


def power_label(seen):
    if seen < 2:
        return str(seen)
    low = 2 ** int(math.log2(seen))
    return f"{low}-{min(2 * low - 1, CONTEXT)}"


@pytest.mark.parametrize("stride", [1, 12, CONTEXT])
def test_equals_a_loop(ppl, models, stride):
    model, tokenizer = models["llama"]
    result = ppl.compute(
        predictions=TEXTS, model=model, tokenizer=tokenizer, stride=stride, positions=True
    )
    expected = expected_buckets(model, tokenizer, stride, power_label)
    found = result["positions"]
    assert list(found) == ["0", "1", "2-3", "4-7", "8-15", "16-24"]
    for label, bucket in found.items():
        assert bucket["num_tokens"] == len(expected[label])
        if expected[label]:
            assert bucket["mean_nll"] == pytest.approx(np.mean(expected[label]), rel=2e-5)
            assert bucket["perplexity"] == pytest.approx(math.exp(bucket["mean_nll"]))
    assert found["0"]["num_tokens"] == 0


@pytest.mark.parametrize("preset", [None, "hf-docs", "lm-eval"])
def test_the_buckets_add_up_to_the_total(ppl, preset):
    lines = (ROOT / "tiny_model" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"][:1500] for line in lines[:4]]
    options = {"model_id": TINY, "preset": preset, "window": 100}
    result = ppl.compute(predictions=texts, positions=True, **options)
    buckets = [bucket for bucket in result["positions"].values() if bucket["num_tokens"]]
    assert sum(bucket["num_tokens"] for bucket in buckets) == result["num_tokens"]
    scorer = ppl.text_scorer(positions=True, **options)
    sums = [sums for _, sums in scorer.sums(texts)]
    whole = sum(text.nll_sum for text in sums), sum(text.weight_sum for text in sums)
    parts = sum(text.positions for text in sums).sum(axis=0)
    assert parts[:2] == pytest.approx(whole, rel=1e-12)
    without = ppl.compute(predictions=texts, **options)
    assert "positions" not in without
    del result["positions"]
    assert json.dumps(result) == json.dumps(without)  # whose NaN are equal


def test_edges(ppl):
    result = ppl.compute(predictions=TEXTS, model_id=TINY, positions=(0, 3, 10))
    assert list(result["positions"]) == ["0-2", "3-9", "10-512"]
    assert positions.bucket_labels([0, 600], 512) == ["0-599", "600"]
    counts = [bucket["num_tokens"] for bucket in result["positions"].values()]
    assert sum(counts) == result["num_tokens"]


@pytest.mark.parametrize(
    ("edges", "error"),
    [((1, 2), ValueError), ((0, 2, 2), ValueError), ((), ValueError), ((0, 0.5), ValueError),
     ((0, -1), ValueError), ("all", TypeError), (3, TypeError)],
)  # fmt: skip
def test_bad_edges_are_refused(ppl, edges, error):
    with pytest.raises(error, match="positions"):
        ppl.compute(predictions=TEXTS, model_id=TINY, positions=edges)


def test_a_comparison(ppl):
    options = {"model_id": TINY, "base_id": TINY, "model_kwargs": {"dtype": "bfloat16"}}
    result = ppl.compare(TEXTS, positions=(0, 4), batch_size=1, **options)
    own = ppl.compute(
        predictions=TEXTS,
        positions=(0, 4),
        batch_size=1,
        model_id=TINY,
        model_kwargs=options["model_kwargs"],
    )
    base = ppl.compute(predictions=TEXTS, positions=(0, 4), batch_size=1, model_id=TINY)
    for label, found in result["positions"].items():
        assert found["mean_nll"] == pytest.approx(own["positions"][label]["mean_nll"], rel=1e-5)
        expected = base["positions"][label]
        assert found["base_mean_nll"] == pytest.approx(expected["mean_nll"], rel=1e-5)
        assert found["num_tokens"] == expected["num_tokens"]
        difference = found["mean_nll"] - found["base_mean_nll"]
        assert found["perplexity_ratio"] == pytest.approx(math.exp(difference))


def test_positions_and_groups(ppl):
    names = ["a", "b"] * 3 + ["a"]
    result = ppl.compute(predictions=TEXTS, model_id=TINY, positions=True, groups=names)
    for label, bucket in result["positions"].items():
        parts = [group["positions"][label]["num_tokens"] for group in result["groups"].values()]
        assert sum(parts) == bucket["num_tokens"]


def test_logits_have_no_positions(ppl):
    with pytest.raises(ValueError, match="positions= goes with texts"):
        ppl.compute(predictions=np.zeros((1, 2, 4)), references=[[0, 1]], positions=True)
