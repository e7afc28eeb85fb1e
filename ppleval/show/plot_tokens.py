"""A picture of a scored text: the surprisal of each token, and the entropy of its prediction."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ppleval.show.heatmap import visible
from ppleval.show.plot_axes import (
    COLUMN,
    HEIGHT,
    LABEL_ROOM,
    PAGE,
    figure_of,
    finite,
    labels_fit,
    legend_above,
    lines,
    listed,
    new_axes,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
# Light and dark, so that the line is seen on the bars, in grey, too.
SURPRISAL, ENTROPY = "#56B4E9", "#000000"


def plot_score(score, ax: "Axes | None" = None) -> tuple["Figure", "Axes"]:
    """Draw the surprisal of each token of a `TextScore`, and the entropy that was predicted."""
    if ax is None:
        column_is_enough = len(score.tokens) * LABEL_ROOM < 0.75 * COLUMN
        ax = new_axes(COLUMN if column_is_enough else PAGE, HEIGHT)
    bits, entropy = (np.array(nats) / math.log(2) for nats in (score.nll, score.entropy))
    places, edges = np.arange(len(bits)), np.arange(len(bits) + 1) - 0.5
    fit = labels_fit(ax, len(bits))
    if fit:
        surprisal = ax.bar(places, finite(bits), color=SURPRISAL)
        has_glyph = _glyphs()
        labels = [_token_label(token, has_glyph) for token in score.tokens]
        ax.set_xticks(places, labels, rotation=90, parse_math=False)
        ax.tick_params(axis="x", length=0)
    else:
        surprisal = ax.stairs(finite(bits), edges, fill=True, color=SURPRISAL)
    expected = ax.stairs(entropy, edges, baseline=None, color=ENTROPY, lw=0.8)
    name = "" if fit else "Token, numbered from 0"
    ax.set_xlabel(lines(name, _score_note(score, bits)), parse_math=False)
    for place in places[np.isinf(bits)]:
        ax.text(place, 0.98, "∞", transform=ax.get_xaxis_transform(), ha="center", va="top")
    ax.set_xlim(-0.6, max(len(bits), 1) - 0.4)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("Bits per token")
    legend_above(ax, [surprisal, expected], ["surprisal", "entropy"])
    return figure_of(ax), ax


def _token_label(token: str, has_glyph: Callable[[int], int]) -> str:
    """A token in a few letters; � stands for what the font lacks."""
    shown = visible(token, line_ends=False).strip() or "␣"
    return short("".join(c if has_glyph(ord(c)) else "\ufffd" for c in shown), 12)


def _glyphs() -> Callable[[int], int]:
    """Whether the font has a character, by its number; 0 if not."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return get_font(findfont(FontProperties())).get_char_index


def _score_note(score, bits: np.ndarray) -> str:
    """Names the tokens without a bar."""
    has_glyph = _glyphs()
    infinite = [_token_label(score.tokens[i], has_glyph) for i in np.flatnonzero(np.isinf(bits))]
    unscored = int(np.isnan(bits).sum())
    return lines(
        listed("Infinite", infinite, len(bits)),
        f"Not scored: {unscored} of {len(bits)} tokens" if unscored else "",
    )
