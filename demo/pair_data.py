"""Two scored texts -> JSON: what the page draws of a comparison, and what programs get.

All is in bits. NaN is null and infinity the text "Infinity" or "-Infinity", because JSON has
neither. No Gradio here.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import metric_package
from demo.alignment import AlignedPiece, align

if TYPE_CHECKING:
    from demo.views import LabelledComparison, LabelledScore
    from text_score import TextScore

heatmap = metric_package.sibling("heatmap")
DIGITS = 7  # float32, which models compute in, has no more


def pair_data(a: "LabelledScore", b: "LabelledScore") -> dict:
    """The JSON of two scored texts.

    Keys:
        a, b: the two sides, each with the label of its `model`, its `text`, its `tokens`, and its
            `pieces`, [first, stop) of the tokens in each grapheme. Of a token there are the
            `token` as the tokenizer writes it; `start` and `end`, its characters [start, end),
            null if not known; `bits`, `rank` and `entropy` of the prediction, null where not
            scored; and `expected`, the likeliest tokens, each with its `token` and `bits`.
        pieces: what can be compared, in the order of the texts, as `align` finds it. Each has its
            tokens [first, stop) on either side as `a` and `b`, null where only the other side has
            it, and the `difference`, bits of B less those of A, null where they cannot be compared.
            null if it is not known where the tokens of a model stand.
        kl: null.
    """
    sides = {}
    for name, labelled in (("a", a), ("b", b)):
        score = labelled.score
        tokens = [{**_token(score, score.nll, i), **_prediction(score, i)} for i in _numbers(score)]
        sides[name] = _side(labelled.label, score, tokens)
    return {**sides, "pieces": _pieces(align(a.score, b.score)), "kl": None}


def same_tokens_data(pair: "LabelledComparison") -> dict:
    """The JSON of a text under two models with the same tokens.

    As that of two texts, but of its prediction a token has `top` alone, the token that the model
    expected most in its place, null where not scored; and `kl` is the KL divergence of A's
    prediction from B's at each token.
    """
    found = pair.comparison
    sides = {}
    for name, label, nll, top in (
        ("a", pair.label_a, found.base_nll, found.base_top),
        ("b", pair.label_b, found.nll, found.top),
    ):
        tokens = [{**_token(found, nll, i), "top": top[i] or None} for i in _numbers(found)]
        sides[name] = _side(label, found, tokens)
    pieces = [
        AlignedPiece(tokens, tokens, heatmap.difference_bits(found, tokens))
        for _, tokens in heatmap.pieces(found)
    ]
    kl = [_bits(max(nats, 0.0)) for nats in found.kl]  # rounding may make it less
    return {**sides, "pieces": _pieces(pieces), "kl": kl}


def _numbers(found) -> range:
    return range(len(found.tokens))


def _side(label: str, found, tokens: list[dict]) -> dict:
    pieces = [_range(piece) for _, piece in heatmap.pieces(found)]
    return {"model": label, "text": found.text, "tokens": tokens, "pieces": pieces}


def _token(found, nll: Sequence[float], i: int) -> dict:
    start, end = (None, None) if found.offsets is None else found.offsets[i]
    return {"token": found.tokens[i], "start": start, "end": end, "bits": _bits(nll[i])}


def _prediction(score: "TextScore", i: int) -> dict:
    expected = score.expected[i] if score.expected else []
    return {
        "rank": score.ranks[i] or None,
        "entropy": _bits(score.entropy[i]),
        "expected": [{"token": token, "bits": _bits(nll)} for token, nll in expected],
    }


def _pieces(pieces: Iterable[AlignedPiece] | None) -> list[dict] | None:
    if pieces is None:
        return None
    return [
        {"a": _range(piece.a), "b": _range(piece.b), "difference": _rounded(piece.difference)}
        for piece in pieces
    ]


def _range(tokens: range | None) -> list[int] | None:
    return None if tokens is None else [tokens.start, tokens.stop]


def _bits(nats: float) -> float | str | None:
    return _rounded(nats / math.log(2))


def _rounded(value: float) -> float | str | None:
    """As JSON has it."""
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(f"{value:.{DIGITS}g}")
