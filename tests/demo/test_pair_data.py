"""The JSON of a comparison, against what the metric gives."""

import itertools
import json
import math
from dataclasses import replace

import pytest
from other_models import make_tokenizer
from support import ROOT
from transformers import GPT2Config, GPT2LMHeadModel

from demo import pair_data, views
from ppleval import Perplexity
from ppleval.texts import score as texts_score

LN2 = math.log(2)
TINY = str(ROOT / "tiny_model")
TEXTS = {
    "prose": "Return the number of items in the list.\n\n\tIf it is empty, the result is zero.",
    "graphemes": "naïve 漢字 e\u0301 👨‍👩‍👧 שלום تعيد \x07",
    "one token": "x",
}


def labelled(score, label="tiny"):
    return views.LabelledScore(label, score, "signature", {})


def through_json(data):
    """As a program gets it."""
    return json.loads(json.dumps(data, allow_nan=False))


def number(value):
    return math.nan if value is None else float(value)


def close(nats):
    return pytest.approx([n / LN2 for n in nats], rel=1e-5, abs=1e-6, nan_ok=True)


def check_pieces(data):
    """Each token is in one piece, and differences are those of the tokens' bits."""
    for side in ("a", "b"):
        ranges = [piece[side] for piece in data["pieces"] if piece[side] is not None]
        stops = [0, *(stop for _, stop in ranges)]
        assert [first for first, _ in ranges] == stops[:-1]
        assert stops[-1] == len(data[side]["tokens"])
    for piece in data["pieces"]:
        if piece["a"] is None or piece["b"] is None:
            assert piece["difference"] is None
        if piece["difference"] is not None:
            a, b = (
                sum(number(token["bits"]) for token in data[side]["tokens"][slice(*piece[side])])
                for side in ("a", "b")
            )
            assert piece["difference"] == pytest.approx(b - a, rel=1e-4, abs=1e-4)


def bundled_in_two_precisions(text):
    (found,) = Perplexity().compare_tokens(
        [text], model_id=TINY, model_kwargs={"dtype": "bfloat16"}, base_id=TINY, base_kwargs={}
    )
    return views.LabelledComparison("full", "rounded", found)


@pytest.mark.parametrize("name", TEXTS)
def test_two_models_with_the_same_tokens(name):
    pair = bundled_in_two_precisions(TEXTS[name])
    found = pair.comparison
    data = through_json(pair_data.same_tokens_data(pair))
    assert (data["a"]["model"], data["b"]["model"]) == ("full", "rounded")
    sides = (data["a"], found.base_nll, found.base_top), (data["b"], found.nll, found.top)
    for side, nll, top in sides:
        assert side["text"] == TEXTS[name]
        tokens = side["tokens"]
        assert [token["token"] for token in tokens] == found.tokens
        assert [(token["start"], token["end"]) for token in tokens] == found.offsets
        assert [number(token["bits"]) for token in tokens] == close(nll)
        assert [token["top"] or "" for token in tokens] == top
        assert set(tokens[0]) == {"token", "start", "end", "bits", "top"}
        assert side["pieces"] == [piece["a"] for piece in data["pieces"]]
        assert side["pieces"] == [piece["b"] for piece in data["pieces"]]
    assert [number(bits) for bits in data["kl"]] == close(found.kl)
    check_pieces(data)
    scored = [i for i, nll in enumerate(found.nll) if not math.isnan(nll)]
    total = sum(number(piece["difference"]) for piece in data["pieces"] if piece["difference"])
    assert total == pytest.approx(
        sum(found.nll[i] - found.base_nll[i] for i in scored) / LN2, abs=1e-3
    )


def test_graphemes_are_whole():
    data = pair_data.same_tokens_data(bundled_in_two_precisions(TEXTS["graphemes"]))
    ends = [data["a"]["tokens"][piece["a"][1] - 1]["end"] for piece in data["pieces"]]
    shown = {TEXTS["graphemes"][i:j].strip() for i, j in itertools.pairwise([0, *ends])}
    assert {"👨‍👩‍👧", "e\u0301", "漢", "字"} <= shown


def test_a_kl_divergence_is_not_negative():
    pair = bundled_in_two_precisions(TEXTS["prose"])
    kl = [math.nan, -1e-9, math.inf, *pair.comparison.kl[3:]]
    pair = replace(pair, comparison=replace(pair.comparison, kl=kl))
    assert pair_data.same_tokens_data(pair)["kl"][:3] == [None, 0, "Infinity"]


@pytest.mark.parametrize("name", TEXTS)
def test_two_models_with_other_tokens(name):
    tokenizer = make_tokenizer("roberta", around="$A")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2)
    (a,) = Perplexity().score([TEXTS[name]], model_id=TINY, top_k=3)
    (b,) = Perplexity().score(
        [TEXTS[name]], model=GPT2LMHeadModel(config), tokenizer=tokenizer, add_start_token=False
    )
    data = through_json(pair_data.pair_data(labelled(a), labelled(b, "other")))
    assert data["b"]["model"] == "other"
    assert data["kl"] is None
    for side, score in ((data["a"], a), (data["b"], b)):
        tokens = side["tokens"]
        assert [number(token["bits"]) for token in tokens] == close(score.nll)
        assert [number(token["entropy"]) for token in tokens] == close(score.entropy)
        assert [token["rank"] or 0 for token in tokens] == score.ranks
    expected = [[each["token"] for each in token["expected"]] for token in data["a"]["tokens"]]
    assert expected == [[name for name, _ in row] for row in a.expected]
    assert all(token["expected"] == [] for token in data["b"]["tokens"])
    check_pieces(data)
    assert data["pieces"][0]["difference"] is None  # B has nothing in front of its first token
    assert all(piece["a"] and piece["b"] for piece in data["pieces"])


def test_two_texts():
    revised = TEXTS["prose"].replace("empty", "quite empty")
    a, b = map(labelled, Perplexity().score([TEXTS["prose"], revised], model_id=TINY))
    data = through_json(pair_data.pair_data(a, b))
    check_pieces(data)
    only_b = [piece["b"] for piece in data["pieces"] if piece["a"] is None]
    added = "".join(data["b"]["tokens"][i]["token"] for run in only_b for i in range(*run))
    assert added == " quite"
    assert all(piece["b"] is not None for piece in data["pieces"])


def test_infinities_are_texts():
    (score,) = Perplexity().score([TEXTS["prose"]], model_id=TINY)
    worse = replace(score, nll=[math.inf] * len(score.nll))
    data = through_json(pair_data.pair_data(labelled(score), labelled(worse)))
    assert data["b"]["tokens"][1]["bits"] == "Infinity"
    assert {piece["difference"] for piece in data["pieces"]} == {"Infinity"}
    data = through_json(pair_data.pair_data(labelled(worse), labelled(score)))
    assert {piece["difference"] for piece in data["pieces"]} == {"-Infinity"}


def test_no_place_and_no_tokens():
    (score,) = Perplexity().score([TEXTS["prose"]], model_id=TINY)
    slow = replace(score, offsets=None)
    data = through_json(pair_data.pair_data(labelled(slow), labelled(slow)))
    assert data["a"]["tokens"][0]["start"] is None
    assert [piece["difference"] for piece in data["pieces"]] == [0] * len(score.tokens)
    other = replace(slow, tokens=[*slow.tokens[:-1], "!"])
    assert pair_data.pair_data(labelled(slow), labelled(other))["pieces"] is None
    empty = texts_score.TextScore("", [], [], [], [], [], None, score.sums)
    data = through_json(pair_data.pair_data(labelled(empty), labelled(empty)))
    assert (data["a"]["tokens"], data["a"]["pieces"], data["pieces"]) == ([], [], [])
