"""Results -> what the demo shows: sentences and tables. No Gradio here."""

import html
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from demo.settings import HeldOut
from ppleval.stats.pairs import token_pair_result
from ppleval.stats.texts import TextTotals
from ppleval.stats.totals import NllTotals, student_t_95

if TYPE_CHECKING:
    from ppleval.stats.totals import Result, TextSums
    from ppleval.texts.compare import TextComparison
    from ppleval.texts.score import TextScore

# `compute` gives no interval for one text, so the demo uses the spread of its consecutive parts. A
# part has at least about eight tokens.
BYTES_PER_PART = 32
MOST_PARTS, FEWEST_PARTS = 30, 8
BITS_OF_A_BYTE = 8
ONE_SAMPLE = "One text is one sample: on another it may be otherwise."


@dataclass(frozen=True)
class OneOfTwo:
    """What a `TextComparison` holds of one of its models, named as in a `TextScore`."""

    text: str
    offsets: list[tuple[int, int]] | None
    nll: list[float]
    sums: "TextSums"


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a text under a model, and the label of the model."""

    label: str
    score: "TextScore | OneOfTwo"

    @property
    def bits_per_byte(self) -> float:
        """The bits per byte of the scored text; NaN if nothing was scored."""
        return TextTotals.of([self.score.sums]).result()["bits_per_byte"]

    @cached_property
    def parts(self) -> "Parts | None":
        """Sums of the text's parts, for an interval; None if it is too short."""
        return parts_of(self.score)


@dataclass(frozen=True)
class LabelledScore(Side):
    """A text's score, the label of the model that gave it, and all settings in one line."""

    score: "TextScore"
    signature: str
    positions: "Result"  # by context, of `positions.position_results`

    @property
    def turns(self) -> list[tuple[int, int]] | None:
        """[first, stop) of the tokens of each scored turn of a conversation; None for a text."""
        return None


@dataclass(frozen=True)
class LabelledConversation(LabelledScore):
    """The score of a conversation, in which what the assistant says is scored."""

    special: frozenset[str]  # tokens that stand for no text, such as that of the end of a turn

    @cached_property
    def parts(self) -> "Parts | None":
        """Sums of the parts of what the assistant says; None if that is too short."""
        tokens = np.array(self.score.tokens)
        is_said = ~np.isnan(self.score.nll) & ~np.isin(tokens, list(self.special))
        return parts_of(self.score, is_said)

    @property
    def turns(self) -> list[tuple[int, int]]:
        """[first, stop) of the tokens of each turn of the assistant, with the one that ends it."""
        is_scored = ~np.isnan(self.score.nll)
        borders = np.flatnonzero(np.diff(is_scored, prepend=False, append=False))
        return [(int(first), int(stop)) for first, stop in borders.reshape(-1, 2)]


@dataclass(frozen=True)
class LabelledComparison:
    """A text under models A and B with the same tokens, and the labels of the models."""

    label_a: str
    label_b: str
    comparison: "TextComparison"  # of B, with A as the base

    @cached_property
    def a(self) -> Side:
        """The text under model A."""
        found = self.comparison
        return Side(
            self.label_a,
            OneOfTwo(found.text, found.offsets, found.base_nll, found.sums.base),
        )

    @cached_property
    def b(self) -> Side:
        """The text under model B."""
        found = self.comparison
        return Side(self.label_b, OneOfTwo(found.text, found.offsets, found.nll, found.sums))


@dataclass(frozen=True)
class Parts:
    """Sums over consecutive parts of a text, each of shape (parts,)."""

    nll: np.ndarray  # nats
    num_tokens: np.ndarray
    num_bytes: np.ndarray  # of the scored tokens


def parts_of(score: "TextScore | OneOfTwo", has_bytes: np.ndarray | bool = True) -> Parts | None:
    """The text in parts of equal bytes, which are the same for all models.

    Tokens of one text are not independent, but parts of it nearly are: the method of batch means
    (Law, Simulation Modeling and Analysis). None if the text is too short for FEWEST_PARTS.

    Args:
        has_bytes: (tokens,), whether the bytes of a token count. The first token of a text counts
            even where it is not scored, so that all models have the same parts.
    """
    if score.offsets is None:
        return None
    sizes = np.array([len(score.text[start:end].encode()) for start, end in score.offsets])
    sizes = np.where(has_bytes, sizes, 0)
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
    result = TextTotals.of([labelled.score.sums]).result()
    for name in ("num_truncated", "num_truncated_contexts", "num_dropped_tokens"):
        del result[name]
    low, high = perplexity_interval(labelled)
    parts = labelled.parts
    return {
        **result,
        "parts_ci_low": low,
        "parts_ci_high": high,
        "num_parts": 0 if parts is None else len(parts.nll),
        "signature": labelled.signature,
    }


def perplexity_interval(side: Side) -> tuple[float, float]:
    """95% interval of the perplexity, from the parts of the text; NaN if it is too short."""
    parts = side.parts
    if parts is None:
        return math.nan, math.nan
    of_parts = NllTotals.from_sequences(parts.nll, parts.num_tokens, parts.num_tokens.sum())
    return of_parts.perplexity_interval


def verdict(result: dict, held_out: HeldOut | None = None) -> str:
    """Markdown for the result of a text, from `figures`: what it means, and then the figures.

    Args:
        held_out: what the model was measured on, to compare with.
    """
    if result["num_tokens"] == 0:
        return "**Nothing to score:** a single token has nothing in front of it."
    low, high = result["parts_ci_low"], result["parts_ci_high"]
    interval = "too short for a 95% interval"
    if not math.isnan(low):
        interval = f"95% interval {number(low)} to {number(high)}"
    return (
        f"{_meaning(result, held_out)}\n\n{interval} · "
        f"{result['bits_per_byte']:.2f} bits per byte · {result['num_tokens']:,} tokens"
    )


def _meaning(result: dict, held_out: HeldOut | None) -> str:
    """What the perplexity of a text means, in one or two sentences."""
    perplexity, headline = result["perplexity"], f"**Perplexity {number(result['perplexity'])}**"
    if result["bits_per_byte"] > BITS_OF_A_BYTE:
        return (
            f"{headline}: worse than guessing bytes, which takes {BITS_OF_A_BYTE} bits per byte. "
            "The model does not know this kind of text."
        )
    if math.isnan(perplexity):
        return f"{headline}: the model gave no numbers."
    choices = f"{perplexity:,.0f}" if perplexity >= 10 else f"{perplexity:.1f}"
    line = f"{headline}: as uncertain as a choice among {choices} equally likely tokens."
    if held_out is not None:
        line += (
            f" On {held_out.texts} that it was not trained on, this model has "
            f"{held_out.perplexity:,.0f}."
        )
    return line


@dataclass(frozen=True)
class Difference:
    """Bits per byte of side B less those of side A, with a 95% interval or NaN."""

    bits_per_byte: float
    low: float
    high: float


def difference(a: Side, b: Side) -> Difference:
    """The difference of two sides, B less A.

    The same text under two models is compared part by part, which cancels what makes a part hard
    for both models. Different texts count as independent.
    """
    value = b.bits_per_byte - a.bits_per_byte
    parts_a, parts_b = a.parts, b.parts
    if parts_a is None or parts_b is None:
        return Difference(value, math.nan, math.nan)
    if a.score.text == b.score.text:
        num_bytes = np.maximum(parts_a.num_bytes, parts_b.num_bytes)
        pairs = NllTotals.from_sequences(parts_b.nll - parts_a.nll, num_bytes, 0)
        margin = pairs.margin / math.log(2)
    else:
        both = [
            NllTotals.from_sequences(parts.nll, parts.num_bytes, 0) for parts in (parts_a, parts_b)
        ]
        error = math.hypot(*(one.standard_error for one in both))
        # The smaller number of degrees of freedom, because it gives the wider interval.
        degrees = min(one.effective_sequences for one in both) - 1
        margin = student_t_95(degrees) * error / math.log(2)
    return Difference(value, value - margin, value + margin)


def comparison(a: Side, b: Side) -> str:
    """A line of Markdown that says which of A and B is less surprised, and by how much."""
    is_one_text = a.score.text == b.score.text
    if is_one_text and a.label == b.label:
        return "**A and B are the same text under the same model.**"
    found = difference(a, b)
    if math.isnan(found.bits_per_byte):
        return "**Nothing to compare:** one of the texts has no token to score."
    if found.bits_per_byte == 0:
        return "**A and B are equally surprising to their models.**"
    letter, winner = ("B", b) if found.bits_per_byte < 0 else ("A", a)
    who = f"Text {letter} surprises its model less"
    if is_one_text:
        who = f"Model {letter}, {html.escape(winner.label)}, is less surprised"
    who = f"{who}, by {_digits(abs(found.bits_per_byte))} bits per byte"
    what = "95% interval over parts of the text"
    if math.isnan(found.low):
        line = f"**{who}** (the text is too short for an interval)."
    elif found.low <= 0 <= found.high:
        interval = f"{_signed(found.low)} to {_signed(found.high)}"
        line = f"**No clear difference.** {who}, which may be chance (B − A, {what}: {interval})."
    else:
        low, high = sorted((abs(found.low), abs(found.high)))
        line = f"**{who}** ({what}: {_digits(low)} to {_digits(high)})."
    return f"{line} {ONE_SAMPLE}" if is_one_text else line


def comparison_table(a: Side, b: Side, pair: LabelledComparison | None = None) -> str:
    """HTML: the statistics of A and B; with `pair`, those of single tokens too.

    Empty if there is nothing to compare.
    """
    bits = [side.bits_per_byte for side in (a, b)]
    difference_bits = bits[1] - bits[0]
    if math.isnan(difference_bits):
        return ""
    results = [TextTotals.of([side.score.sums]).result() for side in (a, b)]
    perplexities = [result["perplexity"] for result in results]
    ratio = "not comparable"
    if pair is not None or a.label == b.label:
        ratio = f"× {number(perplexities[1] / perplexities[0])}"
    rows = [
        _row("Perplexity", *map(number, perplexities), ratio),
        _row("Bits per byte", *map(_fixed, bits), _signed(difference_bits)),
    ]
    if pair is None:
        rows.insert(1, _row("95% interval", *map(_perplexity_range, (a, b)), ""))
        rows.append(_row("Tokens", *(number(result["num_tokens"]) for result in results), ""))
    else:
        found = token_pair_result([pair.comparison.sums])
        kl = f"{_digits(found['mean_kl'] / math.log(2))} bits per token"
        same = f"{100 * found['same_top']:.0f}% of {found['num_tokens']:,} tokens"
        rows.append(f'<tr><th>Mean KL(A‖B)</th><td colspan="3">{kl}</td></tr>')
        rows.append(f'<tr><th>Same top token</th><td colspan="3">{same}</td></tr>')
    names = ["", _name("A", a), _name("B", b), "B against A"]
    head = "".join(f"<th>{name}</th>" if name else "<td></td>" for name in names)
    return f'<table class="statistics"><tr>{head}</tr>{"".join(rows)}</table>'


def _name(letter: str, side: Side) -> str:
    return f"<b>{letter}</b> {html.escape(side.label)}"


def _row(name: str, *cells: str) -> str:
    return f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _perplexity_range(side: Side) -> str:
    low, high = perplexity_interval(side)
    return "too short" if math.isnan(low) else f"{number(low)} to {number(high)}"


def _digits(value: float) -> str:
    """The number with two significant digits, without an exponent."""
    return np.format_float_positional(value, precision=2, unique=False, fractional=False, trim="-")


def _signed(value: float) -> str:
    """The number with two significant digits and a sign, which zero lacks."""
    sign = "−" if value < 0 else "+" if value > 0 else ""
    return sign + _digits(abs(value))


def _fixed(value: float) -> str:
    """The number with three decimals."""
    return f"{value:.3f}" if math.isfinite(value) else number(value)


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
    if 1e6 <= abs(value) < 1e12:
        return f"{float(f'{value:.3g}'):,.0f}"
    if value == 0 or 0.001 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 3 - len(str(int(abs(value)))))}f}"
    return f"{value:.3g}"
