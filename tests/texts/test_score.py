"""The score of a text: what a caller gets of it, and how windows add up to it."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from text_oracles import TEXTS, TINY, ids_of, ignore_empty
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from ppleval.logits import outputs
from ppleval.stats import texts
from ppleval.texts import encoding, presets
from ppleval.texts import score as texts_score
from ppleval.texts import windows as texts_windows


def test_score_gives_every_token_its_place(ppl):
    scores = ppl.score(TEXTS, model_id=TINY, top_k=5)
    result = ppl.compute(predictions=TEXTS, model_id=TINY)
    assert [score.perplexity for score in scores] == result["perplexities"]
    for text, score, perplexity in zip(TEXTS, scores, result["perplexities"], strict=True):
        assert score.text == text
        assert len(score.tokens) == len(score.offsets) == len(score.nll) == len(score.expected)
        assert "".join(text[a:b] for a, b in score.offsets) == text
        assert math.exp(np.mean(score.nll)) == pytest.approx(perplexity, rel=1e-6)
        for token, nll, expected in zip(score.tokens, score.nll, score.expected, strict=True):
            assert len(expected) == 5
            values = [value for _, value in expected]
            assert values == sorted(values)
            assert nll >= values[0] - 1e-4
            if nll < values[-1] - 1e-4:
                assert token in [name for name, _ in expected]


@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_score_gives_rank_and_entropy_among_all_tokens(ppl, models, name):
    model, tokenizer = models[name]
    text = "Hello there, Hello there, you"
    (score,) = ppl.score([text], model=model, tokenizer=tokenizer, add_start_token=False)
    ids = ids_of(tokenizer, text, start=False)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    # Gemma's cap makes equals of the likeliest: all of them have rank 1.
    expected = [1 + (row > row[token]).sum() for row, token in zip(logits, ids[1:], strict=True)]
    assert score.ranks == [0, *expected]
    assert max(expected) > 2
    log_probs = logits.double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    assert math.isnan(score.entropy[0])
    assert score.entropy[1:] == pytest.approx(entropy.tolist(), rel=1e-4)
    assert score.expected is None


def test_score_marks_what_is_not_scored(ppl, models):
    model, tokenizer = models["qwen"]
    (score,) = ppl.score(["Hello there"], model=model, tokenizer=tokenizer, top_k=2)
    assert [math.isnan(nll) for nll in score.nll] == [True] + [False] * (len(score.nll) - 1)
    assert score.expected[0] == []
    (plain,) = ppl.score(["Hello there"], model=model, tokenizer=tokenizer)
    assert plain.expected is None
    assert plain.nll[1:] == pytest.approx(score.nll[1:])


def test_offsets_with_a_special_token_at_the_end(ppl, models):
    """A tokenizer puts special tokens at (0, 0), also those behind the text."""
    model, _ = models["llama"]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    (score,) = ppl.score(["Hello there"], model=model, tokenizer=tokenizer, preset="lm-eval")
    assert score.tokens[-1] == "<|eos|>"
    assert all(0 <= a <= b <= len(score.text) for a, b in score.offsets)
    assert "".join(score.text[a:b] for a, b in score.offsets) == score.text


@ignore_empty
@pytest.mark.parametrize("options", [{}, {"max_length": 12}, {"preset": "hf-docs"}])
def test_a_score_brings_the_sums_that_compute_uses(ppl, models, options):
    model, tokenizer = models["qwen"]
    scores = ppl.score(TEXTS, model=model, tokenizer=tokenizer, **options)
    expected = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer, **options)
    found = texts.TextTotals.of(score.sums for score in scores).result()
    for name in set(found) & set(expected):
        assert found[name] == pytest.approx(expected[name], nan_ok=True)
    assert [score.perplexity for score in scores] == pytest.approx(
        expected["perplexities"], nan_ok=True
    )


def test_sums_alone_make_no_tokens(ppl, monkeypatch):
    scorer = ppl.text_scorer(model_id=TINY)
    expected = [(score.text, score.sums) for score in scorer.score(TEXTS)]
    monkeypatch.setattr(type(scorer.model.tokenizer), "decode", None)
    assert list(scorer.sums(TEXTS)) == expected


def draft_of(text: str, windows, **more):
    """Each character is an id, and ends where it stands; the first is a start token."""
    package = encoding
    ends = np.arange(len(text) + 1)
    encoded = package.EncodedText(
        text, list(range(len(text) + 1)), 1, package.Places(lambda: (ends, ends)), **more
    )
    return texts_score.Draft(0, encoded, windows, 0, 0)


def test_windows_are_filled_in_any_order():
    """Ids 1 to 3 of 4; the second window has half a weight, and its nll are 3 and 5 nats."""
    window, span = texts_windows.Window, outputs.TokenStats
    windows = [window(0, 2, 1), window(1, 4, 2, weight=0.5)]
    draft = draft_of("abcd", windows)
    for number, nll in ((1, [3.0, 5.0]), (0, [1.0])):
        assert not draft.is_complete
        draft.fill(windows[number], span(torch.tensor(nll)))
    assert draft.is_complete
    sums = draft.sums()
    assert (sums.nll_sum, sums.weight_sum, sums.num_tokens) == (1 + 1.5 + 2.5, 2.0, 3)
    assert (sums.unweighted_nll_sum, sums.token_nll_sq_sum) == (9, 1 + 9 + 25)
    assert sums.perplexity == math.exp(2.5)
    score = draft.score("_abcd".__getitem__, with_expected=False)
    assert score.tokens == ["a", "b", "c", "d"]
    assert score.offsets == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert score.nll[:3] == [1, 3, 5]
    assert math.isnan(score.nll[3])


@pytest.mark.parametrize(
    ("edges", "places", "truncated", "expected"),
    [
        ([], True, False, (0, 0)),
        ([(1, 8)], True, False, (7, 2)),  # all of "ab cdef"
        ([(1, 5), (5, 8)], True, False, (7, 2)),  # no word ends between the windows
        ([(1, 3)], True, False, (2, 1)),  # "ab"
        ([(2, 3), (4, 8)], True, False, (5, 2)),  # "b", "cdef"
        ([(1, 3), (3, 5)], True, True, (4, 2)),  # "ab c", cut behind it
        ([(2, 3)], False, False, (4, 1)),  # what the tokenizer decodes
    ],
)
def test_bytes_and_words_are_those_of_the_scored_parts(edges, places, truncated, expected):
    window, rules = texts_windows.Window, presets.Preset()
    windows = [window(first - 1, stop, first) for first, stop in edges]
    encoded = draft_of("ab cdef", windows, truncated=truncated).encoded
    if not places:
        encoded = dataclasses.replace(encoded, places=None)
    tokenizer = SimpleNamespace(decode=lambda ids: "four")
    count = texts_score.count_scored
    assert count(encoded, windows, rules, tokenizer) == expected
