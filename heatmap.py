"""A scored text as HTML: each token coloured by its surprisal, with a tooltip. No scripts.

The demo uses it, and notebooks show a `TextScore` this way. The colour is one hue that grows
stronger with the surprisal, so it can be read in print and by people who do not tell hues apart.
"""

import html
import math
import unicodedata

# Where the colour ends: a probability of 1 in 65,536. Fixed, so that pictures can be compared.
SCALE_BITS = 16

STYLE = """
.surprisal { --paper: #ffffff; --ink: #1f1f1f; --hot: #ee8a22; --line: #c9c9c9;
  color: var(--ink); font: 15px/1.9 system-ui, sans-serif; }
.dark .surprisal, [data-jp-theme-light="false"] .surprisal, [data-theme="dark"] .surprisal {
  --paper: #16181d; --ink: #f4f4f4; --hot: #b3480a; --line: #4a4d55; }
.surprisal p { margin: 0 0 .6em; }
.surprisal span { display: inline-flex; border: 1px solid var(--line); }
.surprisal i { font-style: normal; width: 2.8em; text-align: center; line-height: 1.5; }
.surprisal i, .surprisal b {
  background: color-mix(in oklab, var(--hot) calc(var(--s) * 1%), var(--paper)); }
.surprisal div { padding: .8em; border: 1px solid var(--line); border-radius: 8px;
  background: var(--paper); white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30em;
  overflow-y: auto; }
.surprisal b { font-weight: inherit; color: inherit; border-radius: 3px; padding: .12em 0;
  box-shadow: inset -1px 0 var(--paper); cursor: help; }
.surprisal b.unscored { background: none; border-bottom: 2px dotted var(--line); }
.surprisal b:hover, .surprisal b:focus { outline: 2px solid var(--ink); outline-offset: -1px;
  anchor-name: --surprisal-token; }
.surprisal b:hover::after, .surprisal b:focus:not(:has(~ b:hover)):not(b:hover ~ b)::after {
  content: attr(aria-label); position: fixed; z-index: 1000; inset: auto 8px 8px 8px;
  padding: .6em .9em; border-radius: 8px; background: #22242b; color: #ffffff; text-align: left;
  font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; direction: ltr;
  box-shadow: 0 2px 12px #0008; pointer-events: none; }
@media (min-width: 640px) { @supports (position-area: bottom) {
  .surprisal b:hover::after, .surprisal b:focus:not(:has(~ b:hover)):not(b:hover ~ b)::after {
    inset: auto; margin: 4px 0; max-width: 30em; position-anchor: --surprisal-token;
    position-area: bottom span-right;
    position-try-fallbacks: flip-inline, flip-block, flip-block flip-inline; } } }
"""


def heatmap(score) -> str:
    """The HTML of a `TextScore`: a legend in bits, and the text with a tooltip for each token.

    A tooltip holds the token, its surprisal -log2 p in bits, its probability p, its rank, the
    entropy of the prediction (the surprisal that the model expected) and, with `top_k`, the
    likeliest tokens. The tab key moves the focus to the first token. Everything that comes from the
    text or the model is escaped.
    """
    tokens = "".join(_token(score, i) for i in range(len(score.tokens)))
    steps = range(0, SCALE_BITS + 1, 4)
    legend = "".join(
        f'<i style="--s:{100 * bits // SCALE_BITS}">{bits}{"+" if bits == SCALE_BITS else ""}</i>'
        for bits in steps
    )
    return (
        f'<style>{STYLE}</style><section class="surprisal" aria-label="Surprisal of each token">'
        f"<p>Surprisal in bits: <span>{legend}</span></p>"
        f'<div dir="auto">{tokens}</div></section>'
    )


def _token(score, i: int) -> str:
    tip = html.escape(tooltip(score, i))
    piece = score.tokens[i] if score.offsets is None else score.text[slice(*score.offsets[i])]
    # Only the first token of a character shows it; the others show a dot.
    shown = html.escape(visible(piece)) or "·"
    if math.isnan(score.nll[i]):
        colour = 'class="unscored"'
    else:
        colour = f'style="--s:{_percent(score.nll[i])}"'
    tab = 0 if i == 0 else -1
    return f'<b {colour} tabindex="{tab}" role="note" aria-label="{tip}">{shown}</b>'


def tooltip(score, i: int) -> str:
    """Token i in a few lines of text."""
    lines = [f"“{visible(score.tokens[i], line_ends=False)}”"]
    if math.isnan(score.nll[i]):
        return "\n".join([*lines, "not scored: nothing stands in front of it"])
    lines[0] += f"  {score.nll[i] / math.log(2):.2f} bits"
    lines.append(f"probability {probability(score.nll[i])}, rank {score.ranks[i]:,}")
    lines.append(f"entropy of the prediction {score.entropy[i] / math.log(2):.2f} bits")
    if score.expected is not None:
        lines.append("expected:")
        lines += [
            f"  {probability(nll):>7}  “{visible(token, line_ends=False)}”"
            for token, nll in score.expected[i]
        ]
    return "\n".join(lines)


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


def _percent(nll: float) -> int:
    """The place of an nll in nats on the colour scale, 0 to 100."""
    return round(100 * min(nll / math.log(2) / SCALE_BITS, 1))
