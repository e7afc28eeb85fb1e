"""Two scored texts meet in the pieces that both have."""

import itertools
import math
import random
import time
from types import SimpleNamespace

import pytest
import regex
import transformers
from hypothesis import given
from hypothesis import strategies as st
from other_models import make_tokenizer
from support import ROOT
from transformers import GPT2Config, GPT2LMHeadModel

from demo.alignment import align
from ppleval import Perplexity

NAN, INF = math.nan, math.inf
TINY = str(ROOT / "tiny_model")
PROSE = (
    "The unhappy child can't sleep, and the dog\nwas playing.\n\n  A naïve façade — they're 3.14!"
)


def made(tokens, bits=None, **more):
    """A score of tokens that are parts of the text, 1 bit each."""
    ends = [0, *itertools.accumulate(map(len, tokens))]
    bits = [1.0] * len(tokens) if bits is None else bits
    defaults = {
        "text": "".join(tokens),
        "tokens": list(tokens),
        "offsets": list(itertools.pairwise(ends)),
        "nll": [value * math.log(2) for value in bits],
    }
    return SimpleNamespace(**(defaults | more))


def shown(score, tokens):
    return None if tokens is None else "".join(score.tokens[i] for i in tokens)


def pairs(a, b):
    """The text of each piece on both sides."""
    return [(shown(a, piece.a), shown(b, piece.b)) for piece in align(a, b)]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("The| cat| sat", "The| cat| sat", ["The", " cat", " sat"]),
        ("un|happy| cat", "unh|app|y| c|at", ["unhappy", " cat"]),
        ("ab|cd|ef", "a|bc|de|f", ["abcdef"]),
        ("one|two|three", "onetwo|three", ["onetwo", "three"]),
        ("a|\n|\n|    |b", "a|\n\n|    |b", ["a", "\n\n", "    ", "b"]),
        ("x", "x", ["x"]),
        ("  |a|  ", "  |a|  ", ["  ", "a", "  "]),
    ],
)
def test_one_text_is_cut_where_both_have_a_border(a, b, expected):
    a, b = made(a.split("|")), made(b.split("|"))
    assert pairs(a, b) == [(piece, piece) for piece in expected]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # The space is in front of a word in one vocabulary, and behind it in the other.
        ("The| cat| sat", "The |cat |sat", [("The", "The "), (" cat", "cat "), (" sat", "sat")]),
        # So is a line end; here it belongs to the full stop.
        ("it.\n\n|Next", "it|.|\n\nNext", [("it.\n\n", "it."), ("Next", "\n\nNext")]),
        # Where one border is the same for both, it is that one.
        ("the| |mat", "the| mat", [("the", "the"), (" mat", " mat")]),
        ("the| |mat", "the |mat", [("the ", "the "), ("mat", "mat")]),
        # Not at the ends of the text, which both have.
        (" |the| ", " the ", [(" the ", " the ")]),
    ],
)
def test_white_space_between_words_belongs_to_either(a, b, expected):
    assert pairs(made(a.split("|")), made(b.split("|"))) == expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # A revision: one word more, one other word, another mark.
        (
            "The| cat| sat| here|.",
            "The| black| cat| s|lept| here|!",
            [
                ("The", "The"), (None, " black"), (" cat", " cat"), (" sat", None), (None, " s"),
                (None, "lept"), (" here", " here"), (".", None), (None, "!"),
            ],
        ),
        # The same words in other tokens, and with other white space.
        ("a|  tall| dog", "a| t|all|\n|dog", [("a", "a"), ("  tall", " tall"), (" dog", "\ndog")]),
        # A token that reaches into what is another word can be compared with nothing.
        ("is| (x|)).", "is| (x|)|!", [("is", "is"), (" (x", " (x"), (")).", None), (None, ")"),
                                      (None, "!")]),
        # Nothing in common.
        ("yes| yes", "no", [("yes", None), (" yes", None), (None, "no")]),
        # A word at the start of one text, and in the middle of the other.
        ("So| it| is", "it| is", [("So", None), (" it", "it"), (" is", " is")]),
        # Words are whole: "art" is none of "cart".
        ("c|art", "art", [("c", None), ("art", None), (None, "art")]),
        # White space that is taken is not there for the next word.
        ("a| | |X| |b", "a|  |b", [("a", "a"), ("  ", "  "), ("X", None), (" b", "b")]),
    ],
)  # fmt: skip
def test_two_texts_are_aligned_by_their_words(a, b, expected):
    assert pairs(made(a.split("|")), made(b.split("|"))) == expected


def test_texts_without_spaces_and_from_right_to_left():
    a = made(["日本", "語の", "本"])
    b = made(["日", "本", "語", "で", "本"])
    assert pairs(a, b) == [
        ("日本", "日本"),
        ("語の", None),
        (None, "語"),
        (None, "で"),
        ("本", "本"),
    ]
    a, b = made(["الك", "تاب", " كبير"]), made(["الكتاب", " جميل", " كبير"])
    assert pairs(a, b) == [("الكتاب", "الكتاب"), (None, " جميل"), (" كبير", " كبير")]


def test_no_grapheme_is_torn():
    """Both have a border in front of the accent, and between the parts of a family."""
    a = made(["caf", "e", "\u0301", " 👨", "\u200d👩"])
    b = made(["cafe", "\u0301", " ", "👨", "\u200d👩"])
    assert pairs(a, b) == [("cafe\u0301", "cafe\u0301"), (" 👨\u200d👩", " 👨\u200d👩")]


def test_the_difference_is_that_of_the_sums():
    a = made(["un", "happy", " cat", "!"], [1, 2, 4, INF])
    b = made(["unhappy", " c", "at", "!"], [2.5, 8, INF, INF])
    assert [piece.difference for piece in align(a, b)] == pytest.approx([-0.5, INF, 0])
    assert [piece.difference for piece in align(b, a)] == pytest.approx([0.5, -INF, 0])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([NAN, 2, 4], [8, 4], [NAN, 0]),  # "un" is not scored, so that "unhappy" is half scored
        ([NAN, 2, 4], [NAN, 5], [NAN, 1]),
        ([1, 2, NAN], [8, 4], [5, NAN]),
        ([NAN, NAN, NAN], [NAN, NAN], [NAN, NAN]),
    ],
)
def test_what_one_side_has_not_scored_has_no_difference(a, b, expected):
    found = align(made(["un", "happy", " cat"], a), made(["unhappy", " cat"], b))
    assert [piece.difference for piece in found] == pytest.approx(expected, nan_ok=True)


def test_the_same_tokens_may_be_unscored_on_both_sides():
    """The bytes of one character are one piece, in which the first is not scored."""
    text = {"text": "é", "offsets": [(0, 1), (1, 1)]}
    a, b = made(["\ufffd"] * 2, [NAN, 3], **text), made(["\ufffd"] * 2, [NAN, 1], **text)
    assert [piece.difference for piece in align(a, b)] == pytest.approx([-2])


def test_a_token_without_text_belongs_to_what_follows():
    """Such as a mark in front of the text that the tokenizer added, which is not scored."""
    a = made(["▁", "the", " cat"], [NAN, 2, 3], text="the cat", offsets=[(0, 0), (0, 3), (3, 7)])
    found = align(a, made(["the", " cat"]))
    assert [(piece.a, piece.b) for piece in found] == [
        (range(2), range(1)),
        (range(2, 3), range(1, 2)),
    ]
    assert [piece.difference for piece in found] == pytest.approx([-1, -2])


def test_a_side_without_tokens():
    nothing = made([], text="the cat")
    assert pairs(made(["the", " cat"]), nothing) == [("the", None), (" cat", None)]
    assert pairs(nothing, made(["the cat"])) == [(None, "the cat")]
    assert pairs(nothing, nothing) == []


def test_tokens_whose_places_are_not_known():
    a, b = (made(["the", " cat"], bits, offsets=None) for bits in ([NAN, 1], [NAN, 3]))
    assert pairs(a, b) == [("the", "the"), (" cat", " cat")]
    assert [piece.difference for piece in align(a, b)] == pytest.approx([NAN, 2], nan_ok=True)
    assert align(a, made(["the", " ca", "t"], offsets=None)) is None
    assert align(a, made(["the", " ca", "t"])) is None


TEXTS = st.text("ab' \n.é日\u0301👨\u200d🇫ب", max_size=12)


@st.composite
def scores(draw, text=TEXTS):
    text = draw(text)
    ends = draw(st.sets(st.integers(1, max(1, len(text) - 1))))
    ends = [0, *sorted(end for end in ends if end < len(text)), len(text)] if text else [0]
    return made([text[start:end] for start, end in itertools.pairwise(ends)])


@st.composite
def scores_of_one_text(draw):
    text = st.just(draw(TEXTS))
    return draw(scores(text)), draw(scores(text))


def check(a, b):
    """Each token is in one piece, in order; the pieces of both sides have the same letters."""
    found = align(a, b)
    for score, ranges in ((a, [p.a for p in found]), (b, [p.b for p in found])):
        numbers = itertools.chain.from_iterable(tokens for tokens in ranges if tokens is not None)
        assert list(numbers) == list(range(len(score.tokens)))
    for piece in found:
        if piece.a is None or piece.b is None:
            assert math.isnan(piece.difference)
        else:
            assert letters(shown(a, piece.a)) == letters(shown(b, piece.b))
            assert piece.difference == pytest.approx(len(piece.b) - len(piece.a))
    return found


def letters(text):
    return "".join(text.split())


@given(scores(), scores())
def test_any_two_texts(a, b):
    check(a, b)


@given(scores_of_one_text())
def test_any_one_text_in_two_ways(both):
    a, b = both
    found = check(a, b)
    # Nothing is on one side only, and each border that both have is one of the pieces.
    assert all(piece.a is not None and piece.b is not None for piece in found)
    graphemes = {match.start() for match in regex.finditer(r"\X", a.text)}
    of_a, of_b = ({start for start, _ in score.offsets} for score in both)
    assert of_a & of_b & graphemes <= {a.offsets[piece.a.start][0] for piece in found}


@given(scores())
def test_a_text_meets_itself_piece_by_piece(score):
    assert all(piece.a == piece.b and piece.difference == 0 for piece in align(score, score))


def small(tokenizer):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=128)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5"])
@pytest.mark.parametrize("text", [PROSE, "سلام على من قرأ الكتاب 👩🏽‍💻 🇫🇷🇩🇪 日本語"])
def test_a_text_under_models_with_different_tokens(kind, text):
    """WordPiece without spaces, bytes, and sentencepiece: every word meets itself."""
    tokenizer = make_tokenizer(kind, around="$A")
    (a,) = Perplexity().score([text], model_id=TINY)
    (b,) = Perplexity().score(
        [text], model=small(tokenizer), tokenizer=tokenizer, add_start_token=False
    )
    found = align(a, b)
    assert all(piece.a is not None and piece.b is not None for piece in found)
    assert len(found) >= 0.9 * len(text.split())
    assert math.isnan(found[0].difference)  # the first token of B is not scored
    behind_a, behind_b = sum(a.nll[found[0].a.stop :]), sum(b.nll[found[0].b.stop :])
    differences = sum(piece.difference for piece in found[1:])
    assert differences == pytest.approx((behind_b - behind_a) / math.log(2), rel=1e-6)


def test_a_revision_under_one_model():
    text = f"It is late. {PROSE}"
    revised = text.replace("unhappy", "happy and warm").replace("was playing", "slept")
    a, b = Perplexity().score([text, revised], model_id=TINY)
    found = align(a, b)
    only_a = "".join(shown(a, piece.a) for piece in found if piece.b is None)
    only_b = "".join(shown(b, piece.b) for piece in found if piece.a is None)
    assert letters(only_a) == "unhappywasplaying"
    assert letters(only_b) == "happyandwarmslept"
    # What stands before the first change surprises the same model equally.
    assert found[1].difference == pytest.approx(0, abs=1e-4)


def test_a_slow_tokenizer():
    slow = transformers.ByT5Tokenizer()
    (a,) = Perplexity().score(["a b"], model=small(slow), tokenizer=slow, add_start_token=1)
    assert a.offsets is None
    assert [piece.difference for piece in align(a, a)] == [0, 0, 0]
    assert align(a, Perplexity().score(["a b"], model_id=TINY)[0]) is None


HOSTILE = {
    "marks": [".!?;:-()[]"[i % 10] for i in random.Random(0).choices(range(10), k=6000)],
    "words": [f" {i}" for i in random.Random(1).choices(range(300), k=6000)],
    "flags": ["🇫🇷🇩🇪"] * 5000,
    "accents": ["e", *["\u0301"] * 5999],
    "spaces": [" \n "] * 6000,
    "no text": ["x" * 14000, *[""] * 5999],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_takes_long(name):
    """6,000 tokens, or 20,000 characters, on each side."""
    a, b = made(HOSTILE[name]), made(HOSTILE[name][::-1])
    b.text = f"{b.text} "  # another text, so that words are compared
    begin = time.process_time()
    found = align(a, b)
    assert time.process_time() - begin < 3
    assert found
