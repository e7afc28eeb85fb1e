"""Heatmaps show each token with a tooltip, and nothing of the text becomes markup."""

import html
import html.parser
import itertools
import math
import time
from types import SimpleNamespace

import pytest
from support import ROOT

from ppleval import Perplexity
from ppleval.show import heatmap
from ppleval.texts import words as texts_words

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


def make_comparison(pieces, base_bits, bits, **more):
    score = make_score(pieces, bits)
    defaults = {
        "base_nll": [b * LN2 for b in base_bits],
        "kl": [0.125 * LN2] * len(pieces),
        "top": [" list"] * len(pieces),
        "base_top": [" number"] * len(pieces),
    }
    return SimpleNamespace(**(vars(score) | defaults | more))


class Tokens(html.parser.HTMLParser):
    """The <b> elements: their attributes, and the text in them; every kind of element; and all
    that the <div> shows."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.kinds, self._open = [], set(), False
        self.text = None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.kinds.add(tag)
        if tag == "div":
            self.text = ""
        if tag == "b":
            self.found.append((dict(attributes), ""))
            self._open = True

    def handle_endtag(self, tag):
        self._open = self._open and tag != "b"

    def handle_data(self, data):
        if self.text is not None:
            self.text += data
        if self._open:
            attributes, text = self.found[-1]
            self.found[-1] = attributes, text + data


def tokens_of(score):
    return _tokens_in(heatmap.heatmap(score))


def compared_tokens_of(comparison, *names):
    return _tokens_in(heatmap.difference_heatmap(comparison, *names))


def _tokens_in(html_page):
    page = Tokens(html_page)
    assert page.kinds | {"b"} == {"style", "article", "p", "span", "i", "div", "b"}
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
    assert first["style"] == "--s:50"  # the root of 4 of 16 bits
    assert second["style"] == "--s:100"  # beyond the end of the scale
    assert first["data-tip"] == (
        "“The”  4.00 bits\nprobability 6.2%, rank 3\nentropy of the prediction 2.50 bits\n"
        "expected:\n      50%  “A”\n     6.2%  “The”"
    )
    assert "rank 1,200" in second["data-tip"]
    assert [first["tabindex"], second["tabindex"]] == ["0", "-1"]


def test_what_is_not_scored_or_not_known():
    score = make_score(["a", "b"], [math.nan, math.inf])
    (first, _), (second, _) = tokens_of(score)
    assert first["class"] == "unscored"
    assert "not scored" in first["data-tip"]
    assert second["style"] == "--s:100"
    assert second["data-tip"] == (
        "“b”  inf bits\nprobability 0e+00%, rank 1\nentropy of the prediction 2.50 bits"
    )


EVIL = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "</b></div></article><h1>",
    "&lt;script&gt;",
]


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_of_the_text_becomes_markup(evil):
    score = make_score([evil, "x"], [1, 1], expected=[[(evil, 1.0)], [(evil, 1.0)]])
    (attributes, shown), _ = tokens_of(score)
    assert shown == evil
    assert set(attributes) == {"style", "tabindex", "data-tip"}
    assert attributes["data-tip"].count(evil) == 2


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
    assert heatmap.visible(text) == shown


FAMILY = "👨\u200d👩\u200d👧"
GRAPHEMES = [
    # tokens, how the text is shown
    (["🎉", "", "", "!"], ["🎉", "!"]),
    ([*"🇩🇪🇫🇷"], ["🇩🇪", "🇫🇷"]),
    ([*"🇩🇪🇫\u0301x"], ["🇩🇪", "🇫\u0301", "x"]),
    ([*FAMILY, " x"], [FAMILY, "x"]),
    (["a", "e", "\u0301", "t"], ["a", "e\u0301", "t"]),
    (["ت", "", "ع", "", " ي"], ["ت", "ع", "ي"]),
    (["न", "म", "स", "्", "ते"], ["न", "म", "स्ते"]),
    (["ab", "c"], ["ab", "c"]),
]


@pytest.mark.parametrize(("pieces", "shown"), GRAPHEMES)
def test_no_grapheme_is_torn(pieces, shown):
    """What people see as one character is one piece, whatever its tokens."""
    assert [text for _, text in tokens_of(make_score(pieces, [1] * len(pieces)))] == shown
    comparison = make_comparison(pieces, [1] * len(pieces), [2] * len(pieces))
    assert [text for _, text in compared_tokens_of(comparison)] == shown


def test_a_text_of_flags_takes_no_longer_than_others():
    def seconds(num_flags):
        score = make_score(["🇩🇪"] * num_flags, [1] * num_flags)
        begin = time.thread_time()
        assert len(heatmap.pieces(score)) == num_flags
        return time.thread_time() - begin

    assert seconds(10000) < 40 * min(seconds(1000) for _ in range(3))  # not 100 times


def test_the_tooltip_of_a_grapheme():
    score = make_score(["é", "", " x"], [5, 2.5, 1], ranks=[7, 1200, 1])
    (first, _), (second, _) = tokens_of(score)
    assert first["style"] == "--s:68"  # the root of 7.5 of 16 bits
    assert first["data-tip"] == (
        "“é”  7.50 bits\nprobability 0.55%, 2 tokens:\n"
        "    5.00 bits, rank 7\n    2.50 bits, rank 1,200"
    )
    assert second["data-tip"].startswith("“ x”  1.00 bits\nprobability 50%, rank 1")
    many = make_score(["é", *[""] * 12], [1] * 13)
    assert tokens_of(many)[0][0]["data-tip"].endswith("  1.00 bits, rank 1\n  …")
    grey = make_score(["é", ""], [math.nan] * 2)
    assert tokens_of(grey)[0][0]["data-tip"] == "“é”\nnot scored: it only conditions what follows"


def test_the_tooltip_of_a_compared_grapheme():
    comparison = make_comparison(["é", "", " x"], [5, 2.5, 1], [3, 1, 1])
    (first, _), _ = compared_tokens_of(comparison)
    assert first["class"] == "less"
    assert first["data-tip"] == (
        "“é”  3.50 bits less under the model\nthe base    7.50 bits\nthe model   4.00 bits\n"
        "KL divergence 0.25 bits\n2 tokens"
    )


def test_without_offsets_the_tokens_are_shown():
    score = make_score(["a", " b"], [1, 2], offsets=None, text="a b")
    assert [shown for _, shown in tokens_of(score)] == ["a", "b"]


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
    assert heatmap.probability(nll) == shown


def test_a_notebook_shows_the_heatmap():
    text = "Return <b>the</b> list."
    (score,) = Perplexity().score([text], model_id=TINY, top_k=2)
    page = score._repr_html_()
    assert page == heatmap.heatmap(score)
    assert Tokens(page).text == text
    assert html.escape("expected:") in page


def test_spaces_have_no_colour():
    """They would hang out of a line at its end. Only a token of nothing else shows them."""
    page = heatmap.heatmap(make_score(["a ", " b", "  ", "\n c"], [1, 2, 3, 4]))
    assert [shown for _, shown in Tokens(page).found] == ["a", "b", "  ", "↵\n c"]
    assert Tokens(page).text == "a  b  ↵\n c"


def test_an_empty_text():
    assert tokens_of(make_score([], [])) == []


@pytest.mark.parametrize(
    ("base_bits", "bits", "colour", "strength"),
    [
        (5, 4, "less", 50),  # the root of 1 / 4
        (4, 5, "more", 50),
        (2, 2.25, "more", 25),
        (3, 3, "less", 0),
        (20, 2, "less", 100),  # beyond the end of the scale
        (2, math.inf, "more", 100),
        (math.inf, 2, "less", 100),
        (math.inf, math.inf, "less", 0),
    ],
)
def test_a_difference_is_blue_or_red(base_bits, bits, colour, strength):
    ((attributes, _),) = compared_tokens_of(make_comparison(["a"], [base_bits], [bits]))
    assert attributes["class"] == colour
    assert attributes["style"] == f"--s:{strength}"


def test_the_tooltip_of_a_difference():
    comparison = make_comparison([" item", "s"], [11.5, 2], [4.25, 3])
    (first, shown), (second, _) = compared_tokens_of(comparison, "A", "B2")
    assert shown == "item"
    assert first["data-tip"] == (
        "“ item”  7.25 bits less under B2\n"
        "A   11.50 bits, expected “ number” most\n"
        "B2   4.25 bits, expected “ list” most\n"
        "KL divergence 0.12 bits"
    )
    assert second["data-tip"].startswith("“s”  1.00 bits more under B2")
    assert [first["tabindex"], second["tabindex"]] == ["0", "-1"]


def test_the_legend_of_a_difference_is_the_scale_of_the_tokens():
    steps = {-16: "−4+", -1: "−1", -0.25: "−¼", 0: "0", 0.25: "+¼", 1: "+1", 16: "+4+"}
    page = heatmap.difference_heatmap(make_comparison([], [], []))
    for bits, label in steps.items():
        ((token, _),) = compared_tokens_of(make_comparison(["a"], [20], [20 + bits]))
        assert f'<i class="{token["class"]}" style="{token["style"]}">{label}</i>' in page


def test_a_token_that_is_not_compared():
    nan = math.nan
    (first, _), _ = compared_tokens_of(make_comparison(["a", "b"], [nan, 1], [nan, 2], kl=[nan, 0]))
    assert first["class"] == "unscored"
    assert first["data-tip"] == "“a”\nnot scored: it only conditions what follows"


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_of_a_comparison_becomes_markup(evil):
    comparison = make_comparison([evil, "x"], [1, 1], [2, 2], top=[evil] * 2, base_top=[evil] * 2)
    (attributes, shown), _ = compared_tokens_of(comparison, evil, evil)
    assert shown == evil
    assert set(attributes) == {"class", "style", "tabindex", "data-tip"}
    assert attributes["data-tip"].count(evil) == 6  # token, winner, two names, two expected


def test_names_of_models_are_shown_as_escapes():
    comparison = make_comparison(["a"], [1], [2])
    page = heatmap.difference_heatmap(comparison, "base\x1b\0", "model\u202e" + "l" * 10_000)
    assert r"base\x1b\x00" in page
    assert r"model\u202elll" in page
    assert not {"\x1b", "\0", "\u202e"} & set(page)
    assert "l" * 200 not in page


def test_a_notebook_shows_the_difference():
    text = "Return <b>the</b> list."
    (comparison,) = Perplexity().compare_tokens([text], model_id=TINY, base_id=TINY)
    page = comparison._repr_html_()
    assert page == heatmap.difference_heatmap(comparison)
    assert Tokens(page).text == text


# Words


def make_words(score, *places, corrected=None):
    """A score with words: (first token, first token of the next word) of each."""
    words = []
    for i, (first, stop) in enumerate(places):
        start, end = score.offsets[first][0], score.offsets[stop - 1][1]
        text = score.text[start:end]
        start += len(text) - len(text.lstrip())
        end -= len(text) - len(text.rstrip())
        word = texts_words.Word(
            text.strip(),
            start,
            end,
            range(first, stop),
            sum(score.nll[first:stop]),
            None if corrected is None else corrected[i] * LN2,
        )
        words.append(word)
    score.words = words
    return score


def words_in(score):
    return _tokens_in(heatmap.heatmap(score, words=True))


def test_colour_and_tooltip_of_each_word():
    score = make_score(["The", " c", "at", "\n"], [4, 3, 5, 0])
    (the, shown), (cat, shown_cat) = words_in(
        make_words(score, (0, 1), (1, 4), corrected=[4.5, 7.25])
    )
    assert (shown, shown_cat) == ("The", "cat↵\n")
    assert [the["style"], cat["style"]] == ["--s:50", "--s:71"]  # the roots of 4 and 8 of 16 bits
    assert the["data-tip"] == (
        "“The”  4.00 bits\ncorrected for where words end: 4.50 bits\n1 token: “The”"
    )
    assert cat["data-tip"] == (
        "“cat”  8.00 bits\ncorrected for where words end: 7.25 bits\n3 tokens: “ c” “at” “↵”"
    )
    assert [the["tabindex"], cat["tabindex"]] == ["0", "-1"]
    page = heatmap.heatmap(score, words=True)
    assert Tokens(page).text == "The cat↵\n"  # nothing of the text is lost
    assert 'aria-label="Surprisal of each word"' in page
    assert 'aria-label="Surprisal of each token"' in heatmap.heatmap(score)


def test_words_without_a_correction_or_a_score():
    score = make_score(["a", " b", " c"], [math.nan, 1, 1])
    (first, _), (second, _), (third, _) = words_in(make_words(score, (0, 1), (1, 2), (2, 3)))
    assert first["class"] == "unscored"
    assert first["data-tip"] == ("“a”\nnot scored: it only conditions what follows\n1 token: “a”")
    assert second["data-tip"] == "“b”  1.00 bits\n1 token: “ b”"
    make_words(score, (0, 1), (1, 2), (2, 3), corrected=[math.nan, math.nan, 2])
    _, (second, _), (third, _) = words_in(score)
    assert "corrected" not in second["data-tip"]
    assert "2.00 bits" in third["data-tip"]


def test_a_word_of_many_tokens_and_no_words():
    score = make_score(["x"] * 13, [1] * 13)
    ((word, _),) = words_in(make_words(score, (0, 13)))
    assert word["data-tip"].endswith("13 tokens: " + "“x” " * 12 + "…")
    assert words_in(make_words(make_score([" "], [1]))) == []


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_of_a_word_becomes_markup(evil):
    score = make_score([evil, " x"], [1, 1])
    (shown, _) = words_in(make_words(score, (0, 1), (1, 2)))
    assert shown[1] == evil
    assert evil in shown[0]["data-tip"]


def test_words_of_the_bundled_model():
    scores = Perplexity().score(["Return the cat.\n", "  \n", ""], model_id=TINY, corrected=True)
    for score in scores:
        shown = Tokens(heatmap.heatmap(score, words=True)).text
        assert shown.replace("↵", "") == (score.text if score.words else "")
