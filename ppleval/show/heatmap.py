"""A text as HTML, each token coloured and with a tooltip. No scripts.

The demo uses it, and notebooks show a `TextScore` and a `TextComparison` this way. A surprisal is
one hue that grows stronger with it, so it can be read in print and by people who do not tell hues
apart. A difference of two is blue or red, and has a line below or above the token as well.
"""

import html
import itertools
import math
import unicodedata
from collections.abc import Iterable

import regex

from ppleval.shown import shown

# Where the colour ends: a probability of 1 in 65,536. Fixed, so that pictures can be compared. The
# strength is the square root of the bits, because most tokens of ordinary prose have less than 4.
SCALE_BITS = 16
SCALE_STEPS = (0, 1, 4, 9, 16)
# The same for a difference: 16 times as likely, or as unlikely. A model that was quantised well
# differs by a few tenths of a bit from what it was.
DIFFERENCE_BITS = 4
DIFFERENCE_STEPS = {
    -4: "−4+", -1: "−1", -0.25: "−¼", 0: "0", 0.25: "+¼", 1: "+1", 4: "+4+"
}  # fmt: skip

UNSCORED = 'class="unscored"'
NOT_SCORED = "not scored: it only conditions what follows"

# One character as people see it. Flags come first: to know where one begins, \X looks at all those
# in front, so that many would take a time that grows with their square.
GRAPHEME = regex.compile(r"\p{RI}{2}[\p{GCB=EX}\p{GCB=ZWJ}\p{GCB=SM}]*|\X")

# Of a word in its tooltip: a language without spaces has long ones.
MOST_TOKENS = 12

_STYLE = """
.surprisal { --paper: #ffffff; --ink: #1f1f1f; --grey: #6f6f6f; --hot: #ee8a22; --line: #c9c9c9;
  --less: #58a6e8; --more: #f2806f;
  color: var(--ink); font: 15px/1.9 system-ui, sans-serif; }
@media not print {
  .dark .surprisal, [data-jp-theme-light="false"] .surprisal, [data-theme="dark"] .surprisal {
    --paper: #16181d; --ink: #f4f4f4; --grey: #989ba3; --hot: #b3480a; --line: #4a4d55;
    --less: #1f6db3; --more: #b5382b; } }
.surprisal p { margin: 0 0 .6em; }
.surprisal .steps { display: inline-flex; border: 1px solid var(--line); }
.surprisal i { font-style: normal; width: 2.8em; text-align: center; line-height: 1.5; }
.surprisal i, .surprisal b { color: var(--ink);
  print-color-adjust: exact; forced-color-adjust: none;
  background: color-mix(in oklab, var(--hot) calc(var(--s) * 1%), var(--paper)); }
.surprisal .text { padding: .8em; border: 1px solid var(--line); border-radius: 8px;
  background: var(--paper); white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30em;
  overflow-y: auto; unicode-bidi: plaintext; }
.surprisal b { font-weight: inherit; border-radius: 3px; padding: .12em 0;
  box-shadow: inset -1px 0 var(--paper); cursor: help; }
.surprisal b.unscored { background: var(--paper); color: var(--grey); }
.surprisal .less { --hot: var(--less); --edge: -.035px; }
.surprisal .more { --hot: var(--more); --edge: .035px; }
.surprisal :is(.less, .more) {
  box-shadow: inset -1px 0 var(--paper), inset 0 calc(max(0, var(--s) - 25) * var(--edge))
    color-mix(in oklab, var(--hot) 60%, var(--ink)); }
.surprisal b:hover, .surprisal b:focus, .surprisal b.pinned {
  outline: 2px solid var(--ink); outline-offset: -1px;
  anchor-name: --surprisal-token; }
.surprisal b.pinned:not(:hover):not(:focus) { anchor-name: none; }
TIP {
  content: attr(data-tip); position: fixed; z-index: 1000; inset: auto 8px 8px 8px;
  padding: .6em .9em; border-radius: 8px; background: #22242b; color: #ffffff; text-align: left;
  font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; direction: ltr;
  border: solid transparent; border-width: 4px 0; background-clip: padding-box; }
@media (min-width: 640px) { @supports (position-area: bottom) {
  TIP {
    inset: auto; min-width: 20em; max-width: 30em; position-anchor: --surprisal-token;
    position-area: top span-right;
    position-try-fallbacks: flip-inline, flip-block, flip-block flip-inline; } } }
@media print {
  .surprisal .text { max-height: none; print-color-adjust: exact; }
  .surprisal b::after { display: none; } }
@media (forced-colors: active) { .surprisal b:focus { outline-color: Highlight; } }
"""


def style(tipped: str) -> str:
    """The style sheet of heatmaps.

    Args:
        tipped: a selector of the tokens whose tooltip is shown.
    """
    return _STYLE.replace("TIP", f"{tipped}::after")


# That of the focus, or of another one under the mouse.
STYLE = style(".surprisal b:is(:hover, :focus:not(:has(~ b:hover)):not(b:hover ~ b))")


def heatmap(score, words: bool = False) -> str:
    """The HTML of a `TextScore`: a legend in bits, and the text with a tooltip for each token.

    Tokens that are parts of one grapheme, such as the bytes of an emoji, are one piece: their
    surprisals add up.

    A tooltip holds the token, its surprisal -log2 p in bits, its probability p, its rank, the
    entropy of the prediction (the surprisal that the model expected) and, with `top_k`, the
    likeliest tokens. The tab key moves the focus to the first token. Everything that comes from the
    text or the model is escaped.

    Args:
        words: show each word in place of each token. Its tooltip holds its surprisal, the corrected
            one if the score has it, and its tokens. White space belongs to the word behind it.

    Raises:
        ValueError: `words` of a score without offsets.
    """
    legend = "".join(
        f"<i {_colour(bits * math.log(2))}>{bits}{'+' if bits == SCALE_BITS else ''}</i>"
        for bits in SCALE_STEPS
    )
    if words:
        spans = _words(score)
    else:
        spans = [
            _span(
                piece,
                _colour(scored_sum(score.nll, tokens)),
                tooltip(score, tokens),
                tokens[0] == 0,
            )
            for piece, tokens in pieces(score)
        ]
    label = f"Surprisal of each {'word' if words else 'token'}"
    return _section(label, "Surprisal in bits", legend, "".join(spans))


def difference_heatmap(comparison, base: str = "the base", model: str = "the model") -> str:
    """The HTML of a `TextComparison`: each token coloured by how much less (blue) or more (red) it
    surprises the model than the base.

    A tooltip holds both surprisals and their difference in bits, the KL divergence of the base's
    prediction from the model's, and what each expected most. All else is as in `heatmap`.

    Args:
        base, model: what the two are called.
    """
    base, model = shown(base), shown(model)
    legend = "".join(
        f"<i {_difference_colour(bits)}>{label}</i>" for bits, label in DIFFERENCE_STEPS.items()
    )
    spans = [
        _span(
            piece,
            _difference_colour(difference_bits(comparison, tokens)),
            difference_tooltip(comparison, tokens, base, model),
            tokens[0] == 0,
        )
        for piece, tokens in pieces(comparison)
    ]
    base, model = html.escape(base), html.escape(model)
    return _section(
        f"How much less or more each token surprises {model} than {base}",
        f"Bits by which {model} is less (blue) or more (red) surprised than {base}",
        legend,
        "".join(spans),
    )


def _section(label: str, title: str, steps: str, tokens: str) -> str:
    """A legend, of a title and its steps, and the tokens of a text, as HTML."""
    return (
        f'<style>{STYLE}</style><article class="surprisal" aria-label="{label}">'
        f'<p>{title}: <span class="steps">{steps}</span></p>'
        f'<div class="text" dir="auto">{tokens}</div></article>'
    )


def pieces(found) -> list[tuple[str, range]]:
    """The text of a `TextScore` or a `TextComparison` in pieces, each with its tokens.

    A piece is one token, or as many as stand in one grapheme, which people see as one character: a
    letter with its accents, a flag, a family of emoji, or one letter that takes several bytes.
    """
    if found.offsets is None:
        return [(token, range(i, i + 1)) for i, token in enumerate(found.tokens)]
    begins = {match.start() for match in GRAPHEME.finditer(found.text)}
    firsts = [
        i
        for i, (start, end) in enumerate(found.offsets)
        if i == 0 or (start < end and start in begins)
    ]
    return [
        (found.text[found.offsets[first][0] : found.offsets[stop - 1][1]], range(first, stop))
        for first, stop in itertools.pairwise([*firsts, len(found.offsets)])
    ]


def _words(score) -> list[str]:
    """The words of a `TextScore` as HTML."""
    words = score.words
    # The white space behind the last word is a part of it.
    ends = [word.end for word in words[:-1]] + [score.offsets[-1][1] for _ in words[-1:]]
    return [
        _span(score.text[start:end], _colour(word.nll), word_tooltip(score, word), start == 0)
        for word, start, end in zip(words, [0, *ends], ends, strict=False)
    ]


def _span(piece: str, colour: str, tip: str, is_first: bool) -> str:
    """A piece of a text as HTML."""
    # Spaces have no colour: they would hang out of a line at its end.
    inked = piece.strip(" ") or piece
    before, _, after = piece.partition(inked) if inked else ("", "", "")
    shown = html.escape(visible(inked)) or "·"  # a token without a place in the text
    tip, tab = html.escape(tip), 0 if is_first else -1
    return f'{before}<b {colour} tabindex="{tab}" data-tip="{tip}">{shown}</b>{after}'


def tooltip(score, tokens: Iterable[int]) -> str:
    """A token, or the tokens of one grapheme, in a few lines of text."""
    first, *others = tokens
    if others:
        return _grapheme_tooltip(score, [first, *others])
    lines = [f"“{visible(score.tokens[first], line_ends=False)}”"]
    if math.isnan(score.nll[first]):
        return "\n".join([*lines, NOT_SCORED])
    lines[0] += f"  {score.nll[first] / math.log(2):.2f} bits"
    lines.append(f"probability {probability(score.nll[first])}, rank {score.ranks[first]:,}")
    lines.append(f"entropy of the prediction {score.entropy[first] / math.log(2):.2f} bits")
    if score.expected is not None:
        lines.append("expected:")
        lines += [
            f"  {probability(nll):>7}  “{visible(token, line_ends=False)}”"
            for token, nll in score.expected[first]
        ]
    return "\n".join(lines)


def _grapheme_tooltip(score, tokens: list[int]) -> str:
    piece = score.text[score.offsets[tokens[0]][0] : score.offsets[tokens[-1]][1]]
    lines = [f"“{visible(piece, line_ends=False)}”"]
    nll = scored_sum(score.nll, tokens)
    if math.isnan(nll):
        return "\n".join([*lines, NOT_SCORED])
    lines[0] += f"  {nll / math.log(2):.2f} bits"
    lines.append(f"probability {probability(nll)}, {len(tokens)} tokens:")
    lines += [
        f"  {score.nll[i] / math.log(2):6.2f} bits, rank {score.ranks[i]:,}"
        for i in tokens[:MOST_TOKENS]
    ]
    return "\n".join(lines + ["  …"] * (len(tokens) > MOST_TOKENS))


def word_tooltip(score, word) -> str:
    """A word of a `TextScore` in a few lines of text."""
    lines = [f"“{visible(word.text, line_ends=False)}”"]
    if math.isnan(word.nll):
        lines.append(NOT_SCORED)
    else:
        lines[0] += f"  {word.nll / math.log(2):.2f} bits"
    if word.corrected_nll is not None and not math.isnan(word.corrected_nll):
        lines.append(f"corrected for where words end: {word.corrected_nll / math.log(2):.2f} bits")
    tokens = [visible(score.tokens[i], line_ends=False) for i in word.tokens]
    shown = " ".join(f"“{token}”" for token in tokens[:MOST_TOKENS])
    more = " …" if len(tokens) > MOST_TOKENS else ""
    lines.append(f"{len(tokens)} token{'s' if len(tokens) > 1 else ''}: {shown}{more}")
    return "\n".join(lines)


def difference_tooltip(comparison, tokens: Iterable[int], base: str, model: str) -> str:
    """A token, or the tokens of one grapheme, under both models, in a few lines of text."""
    first, *others = tokens
    piece = comparison.tokens[first]
    if others:
        start, end = comparison.offsets[first][0], comparison.offsets[others[-1]][1]
        piece = comparison.text[start:end]
    lines = [f"“{visible(piece, line_ends=False)}”"]
    bits = difference_bits(comparison, [first, *others])
    base_nll = scored_sum(comparison.base_nll, [first, *others])
    nll = scored_sum(comparison.nll, [first, *others])
    if math.isnan(nll):
        return "\n".join([*lines, NOT_SCORED])
    lines[0] += f"  {abs(bits):.2f} bits {'more' if bits > 0 else 'less'} under {model}"
    width = max(len(base), len(model))
    for name, value, tops in ((base, base_nll, comparison.base_top), (model, nll, comparison.top)):
        line = f"{name:<{width}} {value / math.log(2):6.2f} bits"
        if not others:
            line += f", expected “{visible(tops[first], line_ends=False)}” most"
        lines.append(line)
    kl = abs(scored_sum(comparison.kl, [first, *others]))
    lines.append(f"KL divergence {kl / math.log(2):.2f} bits")
    if others:
        lines.append(f"{1 + len(others)} tokens")
    return "\n".join(lines)


def difference_bits(comparison, tokens: Iterable[int]) -> float:
    """The surprisal of tokens under the model less that under the base; NaN if not scored."""
    nll, base_nll = scored_sum(comparison.nll, tokens), scored_sum(comparison.base_nll, tokens)
    return 0.0 if nll == base_nll else (nll - base_nll) / math.log(2)  # inf - inf is NaN


def scored_sum(values: list[float], tokens: Iterable[int]) -> float:
    """The sum over the tokens that are scored; NaN if none is."""
    scored = [values[i] for i in tokens if not math.isnan(values[i])]
    return sum(scored) if scored else math.nan


def probability(nll: float) -> str:
    """exp(-nll) in per cent, with two significant digits; nll in nats."""
    percent = 100 * math.exp(-nll)
    if percent >= 10:
        return f"{percent:.0f}%"
    return f"{percent:.2g}%" if percent >= 0.001 else f"{percent:.0e}%"


def visible(text: str, line_ends: bool = True) -> str:
    """The text with its control characters made visible and harmless.

    A line end is shown as an arrow, and with `line_ends` also ends the line.
    """
    shown = []
    for character in text:
        kind = unicodedata.category(character)
        if character == "\n":
            shown.append("↵\n" if line_ends else "↵")
        elif character == "\t":
            shown.append("⇥\t" if line_ends else "⇥")
        elif ord(character) < 32:
            shown.append(chr(0x2400 + ord(character)))  # the pictures of control characters
        # Format characters are invisible, or change the direction of the text. The two joiners
        # are parts of scripts and emoji.
        elif kind in ("Cc", "Cf", "Co", "Cs") and character not in "\u200c\u200d":
            shown.append(f"[U+{ord(character):04X}]")
        else:
            shown.append(character)
    return "".join(shown)


def _colour(nll: float) -> str:
    """The attribute that colours a token by its nll in nats."""
    if math.isnan(nll):
        return UNSCORED
    return f'style="--s:{_strength(nll / math.log(2), SCALE_BITS)}"'


def _difference_colour(bits: float) -> str:
    """The attribute that colours a token by a difference in bits."""
    if math.isnan(bits):
        return UNSCORED
    strength = _strength(abs(bits), DIFFERENCE_BITS)
    return f'class="{"more" if bits > 0 else "less"}" style="--s:{strength}"'


def _strength(bits: float, most: float) -> int:
    """The strength of a colour, from 0 to 100."""
    return round(100 * math.sqrt(min(bits / most, 1)))
