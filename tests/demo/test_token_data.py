"""The JSON of a score, compared with the score that `ppl.score` gives."""

import json
import math
from dataclasses import replace

import pytest
from demo_models import LABEL, loaded, settings_with

from demo import token_data, views
from ppleval import Perplexity
from ppleval.show import heatmap

LN2 = math.log(2)
TEXTS = {
    "prose": "Return the number of items in the list. If it is empty, the result is zero.\n\n\tEnd",
    "graphemes": "naïve 漢字 e\u0301 👨‍👩‍👧 שלום تعيد \x07",
    "long": "The list is not changed. " * 150,  # several windows
    "one token": "x",
    "markup": "<b>A \\u003c</b> & <script>",
}


@pytest.fixture(scope="module")
def metrics():
    return loaded(settings_with())


def data_of(metrics, text):
    """As a program gets it, which reads JSON."""
    labelled = metrics.score(text, LABEL, lambda *_: None)
    text = token_data.json_text(token_data.score_data(labelled, views.figures(labelled)))
    assert "<" not in text
    return json.loads(text)


def number(value):
    return math.nan if value is None else float(value)


@pytest.mark.parametrize("name", TEXTS)
def test_the_json_has_the_numbers_of_score(metrics, settings, name):
    text = TEXTS[name]
    tiny = settings.models[0].source
    (expected,) = Perplexity().score([text], model_id=tiny, top_k=5, corrected=True)
    data = data_of(metrics, text)
    assert (data["text"], data["model"]) == (text, LABEL)
    tokens = data["tokens"]
    assert [token["token"] for token in tokens] == expected.tokens
    assert [(token["start"], token["end"]) for token in tokens] == expected.offsets
    close = lambda nats: pytest.approx([n / LN2 for n in nats], rel=1e-5, abs=1e-6, nan_ok=True)  # noqa: E731
    assert [number(token["bits"]) for token in tokens] == close(expected.nll)
    assert [number(token["entropy"]) for token in tokens] == close(expected.entropy)
    assert [token["rank"] or 0 for token in tokens] == expected.ranks
    for token, likeliest in zip(tokens, expected.expected, strict=True):
        assert [each["token"] for each in token["expected"]] == [name for name, _ in likeliest]
        assert [each["bits"] for each in token["expected"]] == close([nll for _, nll in likeliest])
    words = data["words"]
    assert [(w["start"], w["end"]) for w in words] == [(w.start, w.end) for w in expected.words]
    assert [range(w["first"], w["stop"]) for w in words] == [w.tokens for w in expected.words]
    assert [number(w["bits"]) for w in words] == close([w.nll for w in expected.words])
    corrected = [w.corrected_nll for w in expected.words]
    assert [number(w["corrected_bits"]) for w in words] == close(corrected)
    result = Perplexity().compute(predictions=[text], model_id=tiny, positions=True)
    for key in ("perplexity", "bits_per_byte", "num_tokens"):
        assert number(data["result"][key]) == pytest.approx(result[key], rel=1e-6, nan_ok=True)
    shown = {label: r for label, r in result["positions"].items() if r["num_tokens"]}
    assert list(data["positions"]) == list(shown)
    for label, bucket in data["positions"].items():
        assert bucket["num_tokens"] == shown[label]["num_tokens"]
        assert bucket["bits"] == pytest.approx(shown[label]["mean_nll"] / LN2, rel=1e-5)


@pytest.fixture(scope="module")
def settings():
    return settings_with()


def test_no_grapheme_is_divided(metrics):
    data = data_of(metrics, TEXTS["graphemes"])
    characters = data["text"]
    tokens = data["tokens"]
    shown = [
        characters[tokens[first]["start"] : tokens[stop - 1]["end"]]
        for first, stop in data["pieces"]
    ]
    assert "".join(shown) == characters
    assert {"漢", "字", "e\u0301", "👨‍👩‍👧"} <= {piece.strip() for piece in shown}
    assert [first for first, _ in data["pieces"][1:]] == [stop for _, stop in data["pieces"][:-1]]


def test_a_conversation_has_turns(metrics):
    talk = "User: What?\nAssistant: The list.\nUser: And?\nAssistant: It is empty."
    labelled = metrics.converse(talk, LABEL, lambda *_: None)
    data = token_data.score_data(labelled, {})
    said = ["".join(t["token"] for t in data["tokens"][slice(*turn)]) for turn in data["turns"]]
    assert [turn.split("<")[0].strip() for turn in said] == ["The list.", "It is empty."]
    assert data_of(metrics, "A text.")["turns"] is None


def test_what_json_lacks(metrics):
    """NaN and infinity, and tokens without places."""
    labelled = metrics.score("The list.", LABEL, lambda *_: None)
    nll = [math.nan, math.inf, *labelled.score.nll[2:]]
    score = replace(labelled.score, nll=nll, offsets=None, expected=None)
    data = token_data.score_data(replace(labelled, score=score), {"low": -math.inf})
    assert [token["bits"] for token in data["tokens"][:2]] == [None, "Infinity"]
    assert data["tokens"][0] == data["tokens"][0] | {"start": None, "end": None, "expected": []}
    assert (data["words"], data["result"]) == (None, {"low": "-Infinity"})
    assert heatmap.pieces(score) == [(t, range(i, i + 1)) for i, t in enumerate(score.tokens)]
