"""Two scored texts -> JSON: what the page draws of a comparison, and what programs get.

All is in bits, as token_data.py writes it. No Gradio here.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from demo.alignment import AlignedPiece, align
from demo.token_data import bits, rounded, scored_token, token
from ppleval.show import heatmap

if TYPE_CHECKING:
    from demo.views import LabelledComparison, LabelledScore


def pair_data(a: "LabelledScore", b: "LabelledScore") -> dict:
    """The JSON of two scored texts.

    Keys:
        a, b: the two sides, each with the label of its `model`, its `text`, its `tokens` and its
            `pieces`, as in `token_data.score_data`.
        pieces: what can be compared, in the order of the texts, as `align` finds it. Each has its
            tokens [first, stop) on either side as `a` and `b`, null where only the other side has
            it, and the `difference`, bits of B less those of A, null where they cannot be compared.
            null if it is not known where the tokens of a model stand.
        kl: null.
    """
    sides = {
        name: _side(
            labelled.label,
            labelled.score,
            [scored_token(labelled.score, i) for i in range(len(labelled.score.tokens))],
        )
        for name, labelled in (("a", a), ("b", b))
    }
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
        tokens = [{**token(found, nll, i), "top": top[i] or None} for i in range(len(found.tokens))]
        sides[name] = _side(label, found, tokens)
    pieces = [
        AlignedPiece(piece, piece, heatmap.difference_bits(found, piece))
        for _, piece in heatmap.pieces(found)
    ]
    kl = [bits(max(nats, 0.0)) for nats in found.kl]  # rounding may make it less
    return {**sides, "pieces": _pieces(pieces), "kl": kl}


def _side(label: str, found, tokens: list[dict]) -> dict:
    pieces = [_range(piece) for _, piece in heatmap.pieces(found)]
    return {"model": label, "text": found.text, "tokens": tokens, "pieces": pieces}


def _pieces(pieces: Iterable[AlignedPiece] | None) -> list[dict] | None:
    if pieces is None:
        return None
    return [
        {"a": _range(piece.a), "b": _range(piece.b), "difference": rounded(piece.difference)}
        for piece in pieces
    ]


def _range(tokens: range | None) -> list[int] | None:
    return None if tokens is None else [tokens.start, tokens.stop]
