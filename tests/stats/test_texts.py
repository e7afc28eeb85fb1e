"""The totals of texts: parts add up to the whole, and give its result."""

import dataclasses
import json
import math

import pytest
from support import ROOT, flat

from ppleval import Perplexity
from ppleval.stats import totals as stats_totals
from ppleval.stats.texts import TextTotals

TINY = str(ROOT / "tiny_model")


def held_out() -> list[str]:
    """Pieces of the bundled texts, of unequal lengths."""
    lines = (ROOT / "tiny_model" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[:3]]
    return [text[i : i + 50 + 7 * i] for text in texts for i in range(0, 200, 50)]


@pytest.mark.parametrize(
    "options", [{}, {"positions": True, "max_length": 20}, {"preset": "llama.cpp", "window": 64}]
)
def test_parts_add_up_to_the_result_of_compute(options):
    metric, texts = Perplexity(), held_out()
    scorer = metric.text_scorer(model_id=TINY, **options)
    whole = metric.compute(predictions=texts, model_id=TINY, **options)
    sums = [sums for _, sums in scorer.sums(texts)]
    assert len(sums) == (1 if scorer.rules.joint is not None else len(texts))
    totals = TextTotals()
    for first in range(0, len(sums), 5):
        totals += TextTotals.of(sums[first : first + 5])
    found = scorer.report(with_contexts=False).result(totals)
    expected = {name: whole[name] for name in whole if name not in ("perplexities", "signature")}
    assert found.keys() == expected.keys()
    assert flat(found) == pytest.approx(flat(expected), rel=1e-12, nan_ok=True)


def test_worked_by_hand():
    """Two texts of 2 and 1 tokens, of 2 and 3 nats each, and one in which nothing was scored."""
    totals_module = stats_totals
    rest = {"truncated": True, "context_truncated": False, "positions": totals_module.NO_POSITIONS}
    texts = [
        totals_module.TextSums(4.0, 2.0, 4.0, 8.0, 2, 10, 2, **rest),
        totals_module.TextSums(3.0, 1.0, 3.0, 9.0, 1, 4, 1, **rest),
        totals_module.TextSums(0.0, 0.0, 0.0, 0.0, 0, 0, 0, **rest),
    ]
    totals = TextTotals.of(texts)
    assert (totals.num_texts, totals.num_empty, totals.num_truncated) == (3, 1, 3)
    result = totals.result()
    assert result["perplexity"] == pytest.approx(math.exp(7 / 3))
    assert result["mean_perplexity"] == pytest.approx((math.exp(2) + math.exp(3)) / 2)
    assert result["bits_per_byte"] == pytest.approx(7 / 14 / math.log(2))
    assert result["word_perplexity"] == pytest.approx(math.exp(7 / 3))
    # Of three tokens with mean 7/3 and mean square 17/3.
    error = math.sqrt((17 / 3 - 49 / 9) / 2)
    assert totals.standard_error_of_tokens == pytest.approx(error)


def test_nothing_is_the_zero_of_addition():
    nothing = TextTotals()
    assert TextTotals.of([]) == nothing
    assert math.isnan(nothing.result()["mean_perplexity"])
    assert math.isnan(nothing.standard_error_of_tokens)
    some = dataclasses.replace(nothing, num_texts=2, positions=(stats_totals.NllTotals(),))
    assert some + nothing == nothing + some == some
    with pytest.raises(TypeError):
        some + 1
