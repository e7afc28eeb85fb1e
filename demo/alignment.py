"""Two scored texts -> the pieces in which they can be compared.

A piece is a range of tokens on each side that stands for the same text on both. No Gradio here, and
nothing of what a page shows.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import regex
from rapidfuzz.distance import LCSseq

from ppleval.show import heatmap

if TYPE_CHECKING:
    from ppleval.texts.score import TextScore

# As Unicode has words (UAX 29): "don't" and "3.14" are one, so is a mark, or a Chinese character.
# Flags come first, as in a heatmap, because many would take long.
WORD = regex.compile(r"\p{RI}{2}[\p{M}\p{Cf}]*|.+?\b", regex.DOTALL | regex.WORD)


@dataclass(frozen=True)
class AlignedPiece:
    """A text that both sides have, or what one side alone has."""

    a: range | None  # numbers of tokens; None: only B has this
    b: range | None  # None: only A has this
    difference: float  # surprisal of B less that of A, bits; NaN if they cannot be compared


def align(a: "TextScore", b: "TextScore") -> list[AlignedPiece] | None:
    """The finest pieces at whose ends both sides have a border between tokens, in the order of the
    texts; each token is in one piece. No grapheme is torn.

    Two texts are aligned by the longest common subsequence of their words; what is in none of them
    is a piece of one side. Where the words are the same, white space makes no difference: a border
    in front of the space between two words and one behind it are one border. So GPT-2's " the"
    meets a "the" without its space, and a ".⏎" that takes the line end with it a "." that does not.

    None if the place of tokens in a text is not known (a slow tokenizer), unless both sides have
    the same tokens.

    The difference of a piece is that of the sums of its tokens. It is NaN for a piece of one side,
    and where one side has not scored what the other has, such as the first token of a text.
    """
    if a.offsets is None or b.offsets is None:
        if a.tokens != b.tokens:
            return None
        ranges = [range(i, i + 1) for i in range(len(a.tokens))]
        pairs: Iterable[tuple[range | None, range | None]] = zip(ranges, ranges, strict=True)
    else:
        pairs = _pairs(_Borders(a), _Borders(b), list(_common_stretches(a.text, b.text)))
    return [AlignedPiece(own, other, _difference(a, own, b, other)) for own, other in pairs]


@dataclass(frozen=True)
class _Stretch:
    """What two texts have in common but for white space; places count letters, which are all
    characters but white space."""

    first_a: int
    first_b: int
    size: int


def _common_stretches(a: str, b: str) -> Iterator[_Stretch]:
    """The stretches in order; one of all letters if the texts are the same."""
    if a == b:
        yield _Stretch(0, 0, len(_letters(a)))
        return
    words_a, words_b = _words(a), _words(b)
    # Numbers, because the library would take two words with the same hash for one.
    numbers = {word: i for i, word in enumerate(dict.fromkeys([*words_a, *words_b]))}
    ends_a, ends_b = (
        list(itertools.accumulate(map(len, words), initial=0)) for words in (words_a, words_b)
    )
    found = LCSseq.opcodes([numbers[word] for word in words_a], [numbers[word] for word in words_b])
    for step in found:
        if step.tag == "equal":
            first_a, stop_a = ends_a[step.src_start], ends_a[step.src_end]
            yield _Stretch(first_a, ends_b[step.dest_start], stop_a - first_a)


def _words(text: str) -> list[str]:
    """The words and marks, without white space."""
    words = map(_letters, WORD.findall(text))
    return [word for word in words if word]


def _letters(text: str) -> str:
    return "".join(text.split())


class _Borders:
    """Where the pieces of a text begin, and where the last one ends.

    A place is told by the letters in front of it, and the white space behind the last of these.
    """

    def __init__(self, score: "TextScore"):
        assert score.offsets is not None  # from a fast tokenizer
        self.pieces = [tokens for _, tokens in heatmap.pieces(score)]
        starts = [score.offsets[tokens.start][0] for tokens in self.pieces]
        letters = spaces = before = 0
        self._at: dict[int, list[_Border]] = {}
        for number, place in enumerate([*starts, score.offsets[-1][1] if starts else 0]):
            between = score.text[before:place]
            own, trailing = len(_letters(between)), len(between) - len(between.rstrip())
            letters, spaces = letters + own, trailing + (0 if own else spaces)
            found = self._at.setdefault(letters, [])
            if not found or found[-1].spaces < spaces:  # else a token without text is in front
                found.append(_Border(spaces, number))
            before = place
        self._letters = list(self._at)

    def at(self, letters: int, first: int) -> list["_Border"]:
        """The borders behind this many letters, from the border of piece `first` on."""
        return [border for border in self._at.get(letters, []) if border.piece >= first]

    def within(self, first: int, last: int) -> list[int]:
        """The numbers of letters, from `first` to `last`, behind which there is a border."""
        begin, end = bisect.bisect_left(self._letters, first), bisect.bisect(self._letters, last)
        return self._letters[begin:end]

    def tokens(self, first: int, stop: int) -> range:
        """The tokens of the pieces [first, stop)."""
        return range(self.pieces[first].start, self.pieces[stop - 1].stop)


class _Border(NamedTuple):
    spaces: int
    piece: int  # the number of the piece behind it


class _Cut(NamedTuple):
    """A border that both sides have: the numbers of the pieces behind it."""

    stretch: _Stretch | None  # where it is, or the end of one; None: the end of both texts
    a: int
    b: int


def _cuts(a: _Borders, b: _Borders, stretches: Iterable[_Stretch]) -> Iterator[_Cut]:
    """The cuts in order."""
    last = _Cut(None, 0, 0)
    for stretch in stretches:
        for letters in a.within(stretch.first_a, stretch.first_a + stretch.size):
            own = a.at(letters, last.a)
            other = b.at(letters - stretch.first_a + stretch.first_b, last.b)
            piece_of = {border.spaces: border.piece for border in other}
            same = [
                (border.piece, piece_of[border.spaces])
                for border in own
                if border.spaces in piece_of
            ]
            if not same and own and other:  # of two that differ in white space only
                same = [(own[0].piece, other[0].piece)]
            for pieces in same:
                last = _Cut(stretch, *pieces)
                yield last


def _pairs(
    a: _Borders, b: _Borders, stretches: Iterable[_Stretch]
) -> Iterator[tuple[range | None, range | None]]:
    """The tokens of each piece on both sides."""
    last = _Cut(None, 0, 0)
    for cut in [*_cuts(a, b, stretches), _Cut(None, len(a.pieces), len(b.pieces))]:
        if cut.stretch is not None and cut.stretch is last.stretch:
            yield a.tokens(last.a, cut.a), b.tokens(last.b, cut.b)
        else:
            yield from ((tokens, None) for tokens in a.pieces[last.a : cut.a])
            yield from ((None, tokens) for tokens in b.pieces[last.b : cut.b])
        last = cut


def _difference(a: "TextScore", of_a: range | None, b: "TextScore", of_b: range | None) -> float:
    """How many more bits the tokens of B have than those of A."""
    if of_a is None or of_b is None or _unscored(a, of_a) != _unscored(b, of_b):
        return math.nan
    nll_a, nll_b = heatmap.scored_sum(a.nll, of_a), heatmap.scored_sum(b.nll, of_b)
    return 0.0 if nll_a == nll_b else (nll_b - nll_a) / math.log(2)  # inf - inf is NaN


def _unscored(score: "TextScore", tokens: range) -> str:
    """The text of the tokens that are not scored, without white space."""
    unscored = [i for i in tokens if math.isnan(score.nll[i])]
    if score.offsets is None:
        return "".join(score.tokens[i] for i in unscored)
    return _letters("".join(score.text[slice(*score.offsets[i])] for i in unscored))
