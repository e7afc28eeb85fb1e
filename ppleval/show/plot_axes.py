"""How axes of matplotlib look in print: sizes, colours, scales, notes. Knows nothing of results.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; markers differ, too,
for prints in grey.
"""

import importlib.util
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from ppleval.shown import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
GREY = "#595959"
COLUMN, PAGE = 3.5, 7.0  # inches: the width of a column, and of two
HEIGHT, MOST_HEIGHT = 2.4, 9.0  # inches
LABEL_ROOM = 0.13  # inches that a label needs
POINTS = 8  # size of letters in a column


def new_axes(width: float, height: float) -> "Axes":
    """Axes in a figure of pyplot, in inches."""
    check_matplotlib()
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(width, height), layout="constrained")
    return styled(figure.add_subplot())


def styled(axes: "Axes") -> "Axes":
    """Style axes for print: small letters, and no more lines than needed."""
    axes.tick_params(labelsize=POINTS)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.xaxis.offsetText, axes.yaxis.offsetText):
        label.set_fontsize(POINTS)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def check_matplotlib() -> None:
    """Raises ModuleNotFoundError with what to do where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "Pictures need matplotlib: pip install matplotlib", name="matplotlib"
        )


def figure_of(axes: "Axes") -> "Figure":
    """The figure that the axes are in, also through subfigures."""
    return cast("Figure", axes.get_figure(root=True))


def set_scale(axes: "Axes", which: str, values: np.ndarray) -> None:
    """Set the scale of the axis "x" or "y": logarithmic beyond a factor of ten, its numbers written
    out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis = getattr(axes, f"{which}axis")
    values = values[np.isfinite(values)]
    if len(values) and 0 < 10 * values.min() < values.max():
        axes.set(**{f"{which}scale": "log"})
        span = values.max() / values.min()
        in_decade = (1, 2, 5) if span < 30 else (1, 3) if span < 300 else (1,)
        axis.set_major_locator(LogLocator(subs=in_decade))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}".replace("-", "−")))


def set_context_scale(axes: "Axes", first: int, last: int) -> None:
    """Make the x axis logarithmic, with a place for 0, and ticks at powers of two."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("symlog", base=2, linthresh=1)
    powers = range(last.bit_length())
    apart = 1 + len(powers) // 7  # so many labels fit in a column
    axes.xaxis.set_major_locator(FixedLocator([0, *(2**power for power in powers[::apart])]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(round(value))))
    axes.set_xlim(-0.3 if first == 0 else 0.9 * first, 1.15 * last)


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 8192 and count % 1024 == 0 else str(count)


def above(axes: "Axes", place: float, text: str) -> None:
    """Write a text over the axes."""
    where = axes.get_xaxis_transform()
    axes.text(place, 1.02, text, transform=where, ha="center", size=_letters(axes))


def beside(axes: "Axes", height: float, text: str) -> None:
    """Write a text at the right of the axes."""
    where = axes.get_yaxis_transform()
    axes.text(1.02, height, text, transform=where, va="center_baseline", size=_letters(axes))


def legend_above(axes: "Axes", handles: Sequence, names: Iterable[str]) -> None:
    """A legend that covers nothing, in as many columns as fit."""
    labels = [short(name) for name in names]
    columns = max(1, 44 // (6 + max(map(len, labels))))
    legend = axes.legend(
        handles,
        labels,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.2,
        ncols=columns,
        frameon=False,
        handlelength=1.5,
        fontsize=_letters(axes),
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _letters(axes: "Axes") -> float | str:
    """The size of letters of these axes, which may be the user's."""
    return axes.xaxis.label.get_fontsize()


def labels_fit(axes: "Axes", count: int, down: bool = False) -> bool:
    """Whether so many labels fit along the axes, across or down."""
    box = axes.get_window_extent()
    inches = (box.height if down else box.width) / figure_of(axes).dpi
    return count * LABEL_ROOM <= inches


def finite(values: np.ndarray) -> np.ndarray:
    """The values with NaN in place of infinities, which break lines as NaN does."""
    return np.where(np.isfinite(values), values, math.nan)


def number(value: float, digits: int = 4) -> str:
    """A number for people."""
    if math.isfinite(value):
        return f"{value:.{digits}g}".replace("-", "−")
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"


def short(name: str, most: int = 22) -> str:
    """A name without its middle, if longer than `most`: the ends tell names apart."""
    name, half = shown(name), (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def listed(title: str, names: Sequence[str], total: int, most: int = 36) -> str:
    """A line for a note: the title and the names, or how many, if they take more letters."""
    line = f"{title}: {', '.join(names)}"
    if len(line) > most:
        line = f"{title}: {len(names)} of {total}"
    return line if names else ""


def lines(*parts: str) -> str:
    """The parts that are not empty, one below the other."""
    return "\n".join(filter(None, parts))
