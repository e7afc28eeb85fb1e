"""What the demo says follows from the numbers; no page is needed for that."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from support import ROOT

from demo import views
from demo.settings import HeldOut
from ppleval import Perplexity
from ppleval.stats import totals
from ppleval.texts import score as texts_score

TINY = str(ROOT / "tiny_model")
PROSE = "Return the number of items in the list, or zero if it is empty. " * 10


@pytest.fixture(scope="module")
def scorer():
    return Perplexity().text_scorer(model_id=TINY)


def score(scorer, text):
    return views.LabelledScore("tiny", *scorer.score([text]), "signature", {})


def made(nll, bytes_per_token=8, label="made"):
    """A text of tokens of the same length, with these nll in nats."""
    text = "x" * (bytes_per_token * len(nll))
    ends = range(0, len(text) + 1, bytes_per_token)
    offsets = list(itertools.pairwise(ends))
    total = float(np.nansum(nll))
    count = int(np.sum(~np.isnan(nll)))
    counts = count, bytes_per_token * count, 1
    no_positions = totals.NO_POSITIONS
    sums = totals.TextSums(total, count, total, math.nan, *counts, False, False, no_positions)
    tokens = [text[start:end] for start, end in offsets]
    nothing = [math.nan] * len(nll)
    score = texts_score.TextScore(
        text, tokens, offsets, list(nll), nothing, [0] * len(nll), None, sums
    )
    return views.LabelledScore(label, score, "", {})


def test_the_figures_are_those_of_compute(scorer):
    result = views.figures(score(scorer, PROSE))
    expected = Perplexity().compute(predictions=[PROSE], model_id=TINY)
    for name, value in expected.items():
        if name not in ("signature", "perplexities"):  # for one text, the perplexity
            assert result[name] == pytest.approx(value, rel=1e-6, nan_ok=True)
    assert result["parts_ci_low"] < result["perplexity"] < result["parts_ci_high"]


def test_parts_are_consecutive_and_lose_nothing(scorer):
    labelled = score(scorer, PROSE)
    parts, sums = views.parts_of(labelled.score), labelled.score.sums
    assert len(parts.nll) == len(PROSE) // 32
    assert parts.nll.sum() == pytest.approx(sums.nll_sum)
    assert parts.num_tokens.sum() == sums.num_tokens
    assert parts.num_bytes.sum() == sums.num_bytes == len(PROSE)


def test_parts_by_hand():
    """40 tokens of 8 bytes are 10 parts of 4 tokens, whose means here are 0, 1, 2, ... 9."""
    labelled = made(np.repeat(np.arange(10.0), 4))
    parts = views.parts_of(labelled.score)
    assert parts.nll.tolist() == [4.0 * i for i in range(10)]
    result = views.figures(labelled)
    margin = 2.26215716 * np.std(np.arange(10), ddof=1) / math.sqrt(10)
    assert math.log(result["parts_ci_high"]) == pytest.approx(4.5 + margin, rel=1e-6)
    assert math.log(result["parts_ci_low"]) == pytest.approx(4.5 - margin, rel=1e-6)
    assert result["num_parts"] == 10


def test_a_text_of_long_characters_is_cut_by_bytes(scorer):
    text = "漢字です。" * 30
    parts = views.parts_of(score(scorer, text).score)
    assert parts.num_bytes.sum() == len(text.encode())
    assert len(parts.nll) == len(text.encode()) // 32


def conversation(score, special=()):
    return views.LabelledConversation("tiny", score, "signature", {}, frozenset(special))


def test_the_parts_of_a_conversation_by_hand():
    """Turns of 20 tokens, 8 bytes each, every other one scored: 10 parts as in a text of 40."""
    nll = np.repeat(np.arange(10.0), 4)
    asked = np.full(20, math.nan)
    talk = made(np.concatenate([asked, nll[:20], asked, nll[20:], asked])).score
    assert conversation(talk).turns == [(20, 40), (60, 80)]
    parts = conversation(talk).parts
    assert parts.nll.tolist() == [4.0 * i for i in range(10)]
    assert parts.num_bytes.tolist() == [32] * 10
    tokens = ["said"] * 100
    tokens[39] = "<end>"
    parts = conversation(replace(talk, tokens=tokens), ["<end>"]).parts
    assert (parts.num_tokens.sum(), parts.num_bytes.sum()) == (40, 39 * 8)
    assert conversation(replace(talk, tokens=tokens), ["<end>", "said"]).parts is None


def test_no_interval_for_a_short_text_or_without_places(scorer):
    assert views.parts_of(score(scorer, "Return the list.").score) is None
    without_places = replace(made(np.ones(40)).score, offsets=None)
    assert views.parts_of(without_places) is None


def test_the_verdict(scorer):
    line = views.verdict(views.figures(score(scorer, PROSE)))
    result = Perplexity().compute(predictions=[PROSE], model_id=TINY)
    meaning, figures = line.split("\n\n")
    choices = f"a choice among {result['perplexity']:.0f} equally likely tokens."
    assert meaning == f"**Perplexity {result['perplexity']:.1f}**: as uncertain as {choices}"
    assert figures.startswith("95% interval ")
    assert f"{result['bits_per_byte']:.2f} bits per byte" in figures
    assert f"{result['num_tokens']} tokens" in figures
    short = views.verdict(views.figures(score(scorer, "Return the list.")))
    assert "too short for a 95% interval" in short
    nothing = views.verdict(views.figures(made(np.array([math.nan]))))
    assert nothing.startswith("**Nothing to score:**")


@pytest.mark.parametrize(
    ("perplexity", "bytes_per_token", "meaning"),
    [
        (1234.4, 8, "**: as uncertain as a choice among 1,234 equally likely tokens. On news that"),
        (1.26, 8, "**Perplexity 1.26**: as uncertain as a choice among 1.3 equally likely tokens."),
        (1.26, 8, " On news that it was not trained on, this model has 71."),
        (2**8, 1, "**Perplexity 256**: as uncertain as a choice among 256 equally likely tokens."),
        (2**9, 1, "**Perplexity 512**: worse than guessing bytes, which takes 8 bits per byte."),
        (math.inf, 1, "**Perplexity infinite**: worse than guessing bytes"),
    ],
)
def test_what_a_perplexity_means(perplexity, bytes_per_token, meaning):
    """Of a token of 8 bytes, or of 1, whose bits are then those per byte."""
    result = views.figures(made(np.full(9, math.log(perplexity)), bytes_per_token))
    assert meaning in views.verdict(result, HeldOut("news", 70.96))


def test_a_model_that_gives_no_number():
    result = views.figures(made(np.ones(9))) | {"perplexity": math.nan, "bits_per_byte": math.nan}
    assert views.verdict(result).startswith("**Perplexity undefined**: the model gave no numbers.")


def test_one_text_under_two_models_is_compared_in_pairs():
    """What is hard for both leaves no doubt about which is better."""
    rng = np.random.default_rng(0)
    hard = np.repeat(rng.uniform(0, 9, 20), 4)
    small = rng.uniform(0, 0.2, 80)
    a, b = made(hard), made(hard + 0.5 + small, label="other")
    found = views.difference(a, b)
    per_part = (0.5 + small).reshape(20, 4).sum(1) / math.log(2)
    error = np.std(per_part, ddof=1) / math.sqrt(20) / 32
    assert found.bits_per_byte == pytest.approx(per_part.mean() / 32)
    assert found.high - found.bits_per_byte == pytest.approx(2.09302405 * error, rel=1e-6)
    assert found.low > 0
    line = (
        f"is less surprised, by {found.bits_per_byte:.2g} bits per byte** (95% interval over "
        f"parts of the text: {found.low:.2g} to {found.high:.2g}). One text is one sample"
    )
    assert f"**Model A, made, {line}" in views.comparison(a, b)
    assert f"**Model B, made, {line}" in views.comparison(b, a)


def test_two_texts_are_independent():
    rng = np.random.default_rng(1)
    a, b = made(np.repeat(rng.uniform(0, 9, 20), 4)), made(np.repeat(rng.uniform(0, 9, 10), 4))
    found = views.difference(a, b)
    errors = []
    for labelled, count in ((a, 20), (b, 10)):
        per_part = np.reshape(labelled.score.nll, (count, 4)).sum(1) / math.log(2) / 32
        errors.append(np.std(per_part, ddof=1) / math.sqrt(count))
    assert found.bits_per_byte == pytest.approx(b.bits_per_byte - a.bits_per_byte)
    assert found.high - found.bits_per_byte == pytest.approx(
        2.26215716 * math.hypot(*errors), rel=1e-6
    )
    line = views.comparison(a, b)
    assert line.startswith("**No clear difference.** Text A surprises its model less, by 0.24 bits")
    assert ", which may be chance (B − A, 95% interval over parts of the text: −" in line
    assert "one sample" not in line


def test_a_text_compared_with_itself():
    a = made(np.ones(80))
    assert "same text under the same model" in views.comparison(a, a)
    assert "equally surprising" in views.comparison(a, replace(a, label="other"))


def test_a_comparison_without_an_interval():
    assert "too short for an interval" in views.comparison(made(np.ones(3)), made(np.zeros(4)))
    nothing = made(np.array([math.nan]))
    assert "Nothing to compare" in views.comparison(nothing, made(np.ones(4)))
    assert views.comparison_table(nothing, made(np.ones(4))) == ""


@pytest.fixture(scope="module")
def pair():
    """The bundled model in two precisions, one text."""
    (found,) = Perplexity().compare_tokens(
        [PROSE], model_id=TINY, model_kwargs={"dtype": "bfloat16"}, base_id=TINY, base_kwargs={}
    )
    return views.LabelledComparison("<A|>", "B&", found)


def cells(table):
    """The rows of an HTML table, without tags."""
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [
        [re.sub("<.*?>", "", cell) for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in rows
    ]


def test_a_comparison_has_two_sides(scorer, pair):
    alone = score(scorer, PROSE)
    assert pair.a.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-5)
    assert pair.a.parts.nll == pytest.approx(alone.parts.nll, rel=1e-4)
    assert pair.b.parts.nll.sum() == pytest.approx(pair.comparison.sums.nll_sum)


def test_the_table_of_two_models_that_read_the_same_tokens(pair):
    expected = Perplexity().compare(
        [PROSE], model_id=TINY, model_kwargs={"dtype": "bfloat16"}, base_id=TINY, base_kwargs={}
    )
    table = views.comparison_table(pair.a, pair.b, pair)
    assert cells(table) == [
        ["", "A &lt;A|&gt;", "B B&amp;", "B against A"],
        [
            "Perplexity",
            views.number(expected["base_perplexity"]),
            views.number(expected["perplexity"]),
            f"× {expected['perplexity_ratio']:.2f}",
        ],
        [
            "Bits per byte",
            f"{expected['base_bits_per_byte']:.3f}",
            f"{expected['bits_per_byte']:.3f}",
            f"{expected['bits_per_byte_difference']:+.5f}".replace("-", "−"),
        ],
        ["Mean KL(A‖B)", f"{expected['mean_kl'] / math.log(2):.6f} bits per token"],
        [
            "Same top token",
            f"{100 * expected['same_top']:.0f}% of {expected['num_tokens']} tokens",
        ],
    ]


def test_perplexities_are_compared_only_under_one_model():
    a, b = made(np.full(40, math.log(8))), made(np.full(20, math.log(4)), label="other")
    table = cells(views.comparison_table(a, b))
    assert table[1] == ["Perplexity", "8.00", "4.00", "not comparable"]
    assert table[2] == ["95% interval", "8.00 to 8.00", "too short", ""]
    assert table[3] == ["Bits per byte", "0.375", "0.250", "−0.12"]
    assert table[4] == ["Tokens", "40", "20", ""]
    same = cells(views.comparison_table(a, replace(b, label="made")))
    assert same[1][3] == "× 0.50"


def test_the_table_of_logits():
    result = Perplexity().compute(predictions=np.zeros((2, 3, 4)), references=np.zeros((2, 3), int))
    table = views.logits_table(result, ["Mind this."])
    assert table.startswith("⚠ Mind this.")
    assert "| perplexity | 4 | exp(mean nll), over all scored tokens |" in table
    assert "| num_tokens | 6 | tokens scored |" in table
    assert result["signature"] in table
    undefined = dict.fromkeys(result, math.nan) | {"num_tokens": 0, "signature": ""}
    assert "| perplexity | undefined |" in views.logits_table(undefined, [])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (18.4567, "18.5"),
        (1.2345, "1.23"),
        (405.4, "405"),
        (12345.6, "12,346"),
        (1234567, "1,234,567"),
        (46_973_212.3, "47,000,000"),
        (1.5e12, "1.5e+12"),
        (0.00012, "0.00012"),
        (math.inf, "infinite"),
        (math.nan, "undefined"),
        (0.0, "0.00"),
    ],
)
def test_numbers_for_people(value, shown):
    assert views.number(value) == shown
