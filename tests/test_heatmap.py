"""The heatmap shows each token with a tooltip, and nothing of the text becomes markup."""

import html
import html.parser
import itertools
import math
from types import SimpleNamespace

import pytest
from conftest import ROOT, load, sibling

TINY = str(ROOT / "tiny_model")
LN2 = math.log(2)


def make_score(pieces, bits, **more):
    text = "".join(pieces)
    ends = [len("".join(pieces[: i + 1])) for i in range(len(pieces))]
    defaults = {
        "text": text,
        "tokens": pieces,
        "offsets": list(itertools.pairwise([0, *ends])),
        "nll": [b * LN2 for b in bits],
        "entropy": [2.5 * LN2] * len(pieces),
        "ranks": [1] * len(pieces),
        "expected": None,
    }
    return SimpleNamespace(**(defaults | more))


class Tokens(html.parser.HTMLParser):
    """The <b> elements: their attributes, and the text in them; and every kind of element."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.kinds, self._open = [], set(), False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.kinds.add(tag)
        if tag == "b":
            self.found.append((dict(attributes), ""))
            self._open = True

    def handle_endtag(self, tag):
        self._open = self._open and tag != "b"

    def handle_data(self, data):
        if self._open:
            attributes, text = self.found[-1]
            self.found[-1] = attributes, text + data


def tokens_of(score):
    page = Tokens(sibling("heatmap").heatmap(score))
    assert page.kinds | {"b"} == {"style", "section", "p", "span", "i", "div", "b"}
    return page.found


def test_colour_and_tooltip_of_each_token():
    score = make_score(
        ["The", " cat"],
        [4, 20],
        ranks=[3, 1200],
        expected=[[("A", 1 * LN2), ("The", 4 * LN2)], [(" dog", 0.1)]],
    )
    (first, shown), (second, _) = tokens_of(score)
    assert shown == "The"
    assert first["style"] == "--s:25"  # 4 of 16 bits
    assert second["style"] == "--s:100"  # beyond the end of the scale
    assert first["aria-label"] == (
        "“The”  4.00 bits\nprobability 6.2%, rank 3\nentropy of the prediction 2.50 bits\n"
        "expected:\n      50%  “A”\n     6.2%  “The”"
    )
    assert "rank 1,200" in second["aria-label"]
    assert [first["tabindex"], second["tabindex"]] == ["0", "-1"]


def test_what_is_not_scored_or_not_known():
    score = make_score(["a", "b"], [math.nan, math.inf])
    (first, _), (second, _) = tokens_of(score)
    assert first["class"] == "unscored"
    assert "not scored" in first["aria-label"]
    assert second["style"] == "--s:100"
    assert second["aria-label"] == (
        "“b”  inf bits\nprobability 0e+00%, rank 1\nentropy of the prediction 2.50 bits"
    )


@pytest.mark.parametrize(
    "evil",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        '" onmouseover="alert(1)',
        "</b></div></section><h1>",
        "&lt;script&gt;",
    ],
)
def test_nothing_of_the_text_becomes_markup(evil):
    score = make_score([evil, "x"], [1, 1], expected=[[(evil, 1.0)], [(evil, 1.0)]])
    (attributes, shown), _ = tokens_of(score)
    assert shown == evil
    assert set(attributes) == {"style", "tabindex", "role", "aria-label"}
    assert attributes["aria-label"].count(evil) == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a↵\nb"),
        ("\t", "⇥\t"),
        ("\x07\x1b[31m", "␇␛[31m"),
        ("abc\u202edef", "abc[U+202E]def"),
        ("\ufeff\u200b", "[U+FEFF][U+200B]"),
        ("\x85\x7f", "[U+0085][U+007F]"),
        ("e\u0301 שלום 👩\u200d💻", "e\u0301 שלום 👩\u200d💻"),
    ],
)
def test_control_characters_are_seen_and_do_nothing(text, shown):
    assert sibling("heatmap").visible(text) == shown


def test_characters_of_several_tokens_stand_with_the_first():
    score = make_score(["🎉", "", ""], [1, 2, 3], tokens=["\ufffd", "\ufffd", "\ufffd"])
    assert [shown for _, shown in tokens_of(score)] == ["🎉", "·", "·"]


def test_without_offsets_the_tokens_are_shown():
    score = make_score(["a", " b"], [1, 2], offsets=None, text="a b")
    assert [shown for _, shown in tokens_of(score)] == ["a", " b"]


@pytest.mark.parametrize(
    ("nll", "shown"),
    [
        (0.0, "100%"),
        (math.log(9), "11%"),
        (math.log(40), "2.5%"),
        (math.log(30_000), "0.0033%"),
        (math.log(1e9), "1e-07%"),
    ],
)
def test_probabilities_for_people(nll, shown):
    assert sibling("heatmap").probability(nll) == shown


def test_a_notebook_shows_the_heatmap():
    text = "Return <b>the</b> list."
    (score,) = load().score([text], model_id=TINY, top_k=2)
    page = score._repr_html_()
    assert page == sibling("heatmap").heatmap(score)
    shown = [shown for _, shown in Tokens(page).found]
    assert "".join(shown) == text
    assert html.escape("expected:") in page


def test_an_empty_text():
    assert tokens_of(make_score([], [])) == []
