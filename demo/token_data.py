"""A scored text -> JSON: what the page draws, what programs get, and what is saved to a file.

Surprisals and entropies are in bits. NaN is null and infinity the text "Infinity", because JSON has
neither. No Gradio here.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import orjson

from ppleval.show import heatmap

if TYPE_CHECKING:
    from demo.views import LabelledScore
    from ppleval.texts.compare import TextComparison
    from ppleval.texts.score import TextScore

DIGITS = 7  # float32, which models compute in, has no more


def score_data(labelled: "LabelledScore", result: dict) -> dict:
    """The JSON of a text under a model.

    Keys:
        model: its label.
        text: what was scored.
        tokens: a list of objects; see `scored_token`.
        pieces: [first, stop) of the tokens in each grapheme: what people see as one character is
            not divided, even if it has several tokens.
        words: a list of objects; see `_word`. null for a model that does not tell where its tokens
            stand.
        turns: of a conversation, [first, stop) of the tokens of each scored turn; null for a text.
        positions: by the number of tokens that the model could see before, such as "4-7": objects
            with the mean `bits` and `num_tokens`. Empty if that is not known.
        result: that of `compute`.

    Args:
        result: of `views.figures`.
    """
    score = labelled.score
    return {
        "model": labelled.label,
        "text": score.text,
        "tokens": [scored_token(score, i) for i in range(len(score.tokens))],
        "pieces": [[piece.start, piece.stop] for _, piece in heatmap.pieces(score)],
        "words": None if score.offsets is None else [_word(word) for word in score.words],
        "turns": labelled.turns,
        "positions": {
            label: {"bits": bits(found["mean_nll"]), "num_tokens": found["num_tokens"]}
            for label, found in labelled.positions.items()
            if found["num_tokens"]
        },
        "result": {name: as_json(value) for name, value in result.items()},
    }


def json_text(data: dict) -> str:
    """The JSON as one text, without `<`, so that it can hold no markup.

    Gradio would go through each of 25,000 objects, in the server and again in the browser: with a
    text of 2000 words that takes longer than to score it.
    """
    return orjson.dumps(data).decode().replace("<", "\\u003c")


def as_json(value: Any) -> Any:
    """A number, or anything else, as JSON has it."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def scored_token(score: "TextScore", i: int) -> dict:
    """`token` as the tokenizer writes it; `start` and `end`, its characters [start, end) in the
    text, null if not known; `bits`, `rank`, `entropy` of the prediction, null where nothing was
    scored; `expected`, the likeliest tokens, each with its `token` and `bits`."""
    return {
        **token(score, score.nll, i),
        "rank": score.ranks[i] or None,
        "entropy": bits(score.entropy[i]),
        "expected": _expected(score.expected[i] if score.expected else []),
    }


def token(found: "TextScore | TextComparison", nll: Sequence[float], i: int) -> dict:
    """Of a `scored_token`, what is known under each of two models."""
    start, end = (None, None) if found.offsets is None else found.offsets[i]
    return {"token": found.tokens[i], "start": start, "end": end, "bits": bits(nll[i])}


def _expected(likeliest: Sequence[tuple[str, float]]) -> list[dict]:
    return [{"token": name, "bits": bits(nll)} for name, nll in likeliest]


def _word(word) -> dict:
    """`first` and `stop` of its tokens; `start` and `end` of its characters; `bits`, and
    `corrected_bits` for where words end, null if not known."""
    return {
        "first": word.tokens.start,
        "stop": word.tokens.stop,
        "start": word.start,
        "end": word.end,
        "bits": bits(word.nll),
        "corrected_bits": bits(math.nan if word.corrected_nll is None else word.corrected_nll),
    }


def bits(nats: float) -> float | str | None:
    """nats -> bits, as JSON."""
    return rounded(nats / math.log(2))


def rounded(value: float) -> float | str | None:
    """A number as JSON, with as many digits as a model computes."""
    return as_json(float(f"{value:.{DIGITS}g}"))
