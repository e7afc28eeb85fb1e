"""Results -> what the demo shows: sentences, tables, points of a chart. No Gradio here."""

import html
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

import metric_package

if TYPE_CHECKING:
    from text_score import TextScore

totals = metric_package.sibling("totals")
# `compute` gives no interval for one text, so the demo uses the spread of its consecutive parts. A
# part has at least about eight tokens.
BYTES_PER_PART = 32
MOST_PARTS, FEWEST_PARTS = 30, 8


@dataclass(frozen=True)
class LabelledScore:
    """A text's score, the label of the model that gave it, and all settings in one line."""

    label: str
    score: "TextScore"
    signature: str

    @property
    def bits_per_byte(self) -> float:
        """Of the scored text; NaN if nothing was scored."""
        return totals.text_result([self.score.sums])["bits_per_byte"]

    @cached_property
    def parts(self) -> "Parts | None":
        """Sums of the text's parts, for an interval; None if it is too short."""
        return parts_of(self.score)


@dataclass(frozen=True)
class Parts:
    """Sums over consecutive parts of a text, each of shape (parts,)."""

    nll: np.ndarray  # nats
    num_tokens: np.ndarray
    num_bytes: np.ndarray  # of the scored tokens


def parts_of(score: "TextScore") -> Parts | None:
    """The text in parts of equal bytes, which are the same for all models.

    Tokens of one text are not independent, but parts of it nearly are: the method of batch means
    (Law, Simulation Modeling and Analysis). None if the text is too short for FEWEST_PARTS.
    """
    if score.offsets is None:
        return None
    sizes = np.array([len(score.text[start:end].encode()) for start, end in score.offsets])
    count = int(min(MOST_PARTS, sizes.sum() // BYTES_PER_PART))
    if count < FEWEST_PARTS:
        return None
    first_byte = np.cumsum(sizes) - sizes
    part = np.minimum(first_byte * count // sizes.sum(), count - 1)
    nll = np.array(score.nll)
    is_scored = ~np.isnan(nll)

    def sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(part[is_scored], weights=values[is_scored], minlength=count)

    return Parts(sums(nll), sums(np.ones(len(nll))), sums(sizes))


def figures(labelled: LabelledScore) -> dict:
    """The result of `compute` for this text, with the interval from its parts."""
    result = totals.text_result([labelled.score.sums])
    del result["num_truncated"], result["num_truncated_contexts"]
    parts = labelled.parts
    low, high = math.nan, math.nan
    if parts is not None:
        of_parts = totals.NllTotals.from_sequences(
            parts.nll, parts.num_tokens, parts.num_tokens.sum()
        )
        low, high = of_parts.perplexity_interval
    return {
        **result,
        "parts_ci_low": low,
        "parts_ci_high": high,
        "num_parts": 0 if parts is None else len(parts.nll),
        "signature": labelled.signature,
    }


def verdict(result: dict) -> str:
    """One line of Markdown for the result of a text, from `figures`."""
    if result["num_tokens"] == 0:
        return "**Nothing to score:** a single token has nothing in front of it."
    low, high = result["parts_ci_low"], result["parts_ci_high"]
    interval = "too short for an interval"
    if not math.isnan(low):
        interval = f"95% interval {number(low)} to {number(high)}"
    return (
        f"**Perplexity {number(result['perplexity'])}** ({interval}) · "
        f"**{result['bits_per_byte']:.2f} bits per byte** · {result['num_tokens']:,} tokens"
    )


def chart(score: "TextScore") -> pd.DataFrame:
    """Surprisal along the text: a row for each scored token."""
    nll = np.array(score.nll, dtype=float)
    scored = np.flatnonzero(~np.isnan(nll))
    return pd.DataFrame({"token": scored + 1, "bits": nll[scored] / math.log(2)})


@dataclass(frozen=True)
class Difference:
    """Bits per byte of one text minus those of another, with a 95% interval or NaN."""

    bits_per_byte: float
    low: float
    high: float


def difference(a: LabelledScore, b: LabelledScore) -> Difference:
    """a minus b.

    The same text under two models is compared part by part, which cancels what makes a part hard
    for both models. Different texts count as independent.
    """
    value = a.bits_per_byte - b.bits_per_byte
    parts_a, parts_b = a.parts, b.parts
    if parts_a is None or parts_b is None:
        return Difference(value, math.nan, math.nan)
    if a.score.text == b.score.text:
        num_bytes = np.maximum(parts_a.num_bytes, parts_b.num_bytes)
        pairs = totals.NllTotals.from_sequences(parts_a.nll - parts_b.nll, num_bytes, 0)
        margin = pairs.margin / math.log(2)
    else:
        both = [
            totals.NllTotals.from_sequences(parts.nll, parts.num_bytes, 0)
            for parts in (parts_a, parts_b)
        ]
        error = math.hypot(*(one.standard_error for one in both))
        # The smaller number of degrees of freedom, because it gives the wider interval.
        degrees = min(one.effective_sequences for one in both) - 1
        margin = totals.student_t_95(degrees) * error / math.log(2)
    return Difference(value, value - margin, value + margin)


def comparison(a: LabelledScore, b: LabelledScore) -> str:
    """One line of Markdown that says which of A and B surprises less."""
    if (a.label, a.score.text) == (b.label, b.score.text):
        return "**A and B are the same text under the same model.**"
    found = difference(a, b)
    if math.isnan(found.bits_per_byte):
        return "**Nothing to compare:** one of the texts has no token to score."
    line = (
        f"**A {a.bits_per_byte:.2f}, B {b.bits_per_byte:.2f} bits per byte:** "
        f"a difference of {found.bits_per_byte:+.2f} "
    )
    if math.isnan(found.low):
        return line + "(too short for an interval)."
    line += f"(95% interval {found.low:+.2f} to {found.high:+.2f}), "
    if found.low <= 0 <= found.high:
        return line + "which may be chance."
    return line + f"so {'A' if found.bits_per_byte < 0 else 'B'} surprises its model less."


MEANINGS = {
    "perplexity": "exp(mean nll), over all scored tokens",
    "mean_nll": "nats per token",
    "bits_per_token": "mean nll / ln 2",
    "perplexity_ci_low": "95% interval, from",
    "perplexity_ci_high": "95% interval, to",
    "num_tokens": "tokens scored",
    "num_sequences": "sequences with a scored token",
}


def logits_table(result: dict, notes: list[str]) -> str:
    """Markdown: the result of a file of logits, and the warnings about it."""
    values = {name: result[name] for name in MEANINGS}
    shown = {
        name: f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else number(value)
        for name, value in values.items()
    }
    rows = [f"| {name} | {shown[name]} | {meaning} |" for name, meaning in MEANINGS.items()]
    lines = ["| result | value | meaning |", "|:--|--:|:--|", *rows, "", f"`{result['signature']}`"]
    return "\n".join([*(f"⚠ {html.escape(note)}\n" for note in notes), *lines])


def number(value: float) -> str:
    """The value for people: three significant digits, commas between thousands."""
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "infinite"
    if value == 0 or 0.001 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 3 - len(str(int(abs(value)))))}f}"
    return f"{value:.3g}"
