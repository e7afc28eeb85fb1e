"""Pictures of results with matplotlib, which is imported where something is drawn.

Every picture has the intervals, and names what is infinite or NaN. How axes look is in
plot_axes.py; a text token by token is in plot_tokens.py.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppleval.show.plot_axes import (
    COLUMN,
    GREY,
    HEIGHT,
    MARKERS,
    MOST_HEIGHT,
    PALETTE,
    above,
    beside,
    check_matplotlib,
    figure_of,
    finite,
    labels_fit,
    legend_above,
    lines,
    listed,
    new_axes,
    number,
    set_context_scale,
    set_scale,
    short,
    styled,
)
from ppleval.stats.totals import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
FORMATS = (".png", ".svg", ".pdf")
DOTS_PER_INCH = 200

Draw = Callable[["Axes"], None]


@dataclass(frozen=True)
class Measure:
    """What a picture shows of a result: the value under `key`, with its interval."""

    key: str
    label: str
    neutral: float | None = None  # a value of no difference
    digits: int = 4  # in print


# A result is drawn by the first that it has.
MEASURES = (
    Measure("perplexity_ratio", "Perplexity ratio (model / base)", 1.0, 5),
    Measure("bits_per_byte_difference", "Difference in bits per byte (model − base)", 0.0),
    Measure("perplexity", "Perplexity"),
)
NEEDED = {"positions": "positions=True", "groups": "groups=[...]"}


@dataclass(frozen=True)
class Points:
    """Values with the ends of their intervals; an interval that cannot be drawn is NaN."""

    names: list[str]
    values: np.ndarray  # (n,)
    lows: np.ndarray  # (n,)
    highs: np.ndarray  # (n,)

    @classmethod
    def of(cls, names: Iterable, results: Iterable[Result], measure: Measure) -> "Points":
        """What the results have of this measure; NaN where they lack it."""
        keys = [measure.key + end for end in ("", "_ci_low", "_ci_high")]
        rows = [[result.get(key, math.nan) for key in keys] for result in results]
        values, lows, highs = np.array(rows, dtype=float).reshape(-1, 3).T
        drawn = np.isfinite(values) & np.isfinite(lows) & np.isfinite(highs)
        if measure.neutral != 0:
            drawn &= lows > 0  # exp underflows, and a logarithmic axis has no place for 0
        ends = (np.where(drawn, end, math.nan) for end in (lows, highs))
        return cls([str(name) for name in names], values, *ends)

    @property
    def drawn(self) -> np.ndarray:
        """Every number that needs a place on the axis."""
        return np.concatenate([self.values, self.lows, self.highs])

    def note(self) -> str:
        """Names what cannot be drawn."""
        hidden = [
            f"{short(name)} ({number(value)})".strip()
            for name, value in zip(self.names, self.values, strict=True)
            if not math.isfinite(value)
        ]
        is_bare = np.isfinite(self.values) & np.isnan(self.lows)
        bare = [short(name) for name, found in zip(self.names, is_bare, strict=True) if found]
        if bare == [""]:
            return "No finite interval"
        return lines(
            listed("Not shown", hidden, len(self.names)),
            listed("No finite interval", bare, len(self.names)),
        )


def plot(
    results: Result | Sequence[Result] | Mapping[str, Result],
    *,
    by: str | None = None,
    steps: Sequence[float] | None = None,
    ax: "Axes | None" = None,
) -> tuple["Figure", "Axes"]:
    """Draw results with their 95% intervals: the perplexity, or the ratio of a comparison.

    Args:
        results: of `compute` or `compare`. One: its curve over tokens of context if it has
            positions, else its groups, sorted, else a dot. A list, such as one for each evaluation
            of a training: a line. A dict from names, such as models, to results: a dot for each.
        by: "positions" or "groups", where a result has both, or to draw these of each in a dict.
        steps: of the list's results; by default they are numbered from 0.
        ax: draw here. By default pyplot makes a figure as wide as a column.

    Returns:
        The figure and its axes. What is infinite or NaN is named below the axis.

    Raises:
        TypeError, ValueError: something that is no result, or that has no such part.
        ModuleNotFoundError: matplotlib is not installed.
    """
    draw, height = _picture(results, by, steps)
    if ax is None:
        ax = new_axes(COLUMN, height)
    draw(ax)
    return figure_of(ax), ax


def check_path(path) -> None:
    """Check what `save` needs before the work begins.

    Raises:
        ValueError: the path does not end in .png, .svg or .pdf.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"A picture's name must end in {', '.join(FORMATS)}, got {str(path)!r}.")
    check_matplotlib()


def save(results, path, *, by: str | None = None) -> None:
    """Write what `plot` draws to a file, PNG, SVG or PDF by its name; pyplot is left alone.

    Raises:
        TypeError, ValueError, ModuleNotFoundError: as `plot` and `check_path`.
        OSError: the file cannot be written.
    """
    check_path(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    draw, height = _picture(results, by, None)
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(styled(figure.add_subplot()))
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _picture(results, by: str | None, steps: Sequence[float] | None) -> tuple[Draw, float]:
    """What draws these results, and its height in inches."""
    if by is not None and by not in NEEDED:
        raise ValueError(f'by must be "positions" or "groups", got {by!r}.')
    is_list = isinstance(results, Sequence) and not isinstance(results, str)
    if steps is not None and not is_list:
        raise ValueError("steps goes with a list of results.")
    if is_list:
        if by is not None:
            raise ValueError("by goes with one result or a dict of results, not with a list.")
        return _steps_picture(results, steps)
    if not isinstance(results, Mapping):
        raise _no_result(results)
    if not any(measure.key in results for measure in MEASURES):
        return _models_picture({str(name): model for name, model in results.items()}, by)
    if by is None:
        by = next((part for part in NEEDED if part in results), None)
    return _models_picture({"": results}, by)


def _measure(results: Sequence) -> Measure:
    """What all these results have, and are to be drawn by."""
    if not results:
        raise ValueError("There is nothing to draw: results is empty.")
    for result in results:
        if not isinstance(result, Mapping) or MEASURES[-1].key not in result:
            raise _no_result(result)
    found = [next(measure for measure in MEASURES if measure.key in r) for r in results]
    if len(set(found)) > 1:
        keys = ", ".join(measure.key for measure in dict.fromkeys(found))
        raise ValueError(f"Results of one picture must be of one kind, got some with {keys}.")
    return found[0]


def _no_result(found) -> TypeError:
    return TypeError(
        "results must be a result of compute or compare, a list of results or a dict from names to "
        f"results, got {short(repr(found), 60)}."
    )


def _steps_picture(results: Sequence, steps: Sequence[float] | None) -> tuple[Draw, float]:
    if steps is not None and len(steps) != len(results):
        raise ValueError(
            f"steps must hold one number for each result, got {len(steps)} for {len(results)}."
        )
    measure = _measure(results)
    places = list(range(len(results)) if steps is None else steps)
    points = Points.of(places, results, measure)

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        _curve(axes, places, points)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=steps is None))
        name = "Evaluation, numbered from 0" if steps is None else "Step"
        axes.set_xlabel(lines(name, points.note()), parse_math=False)
        _show_values(axes, "y", measure, [points], None)

    return draw, HEIGHT


def _models_picture(models: Mapping[str, Any], by: str | None) -> tuple[Draw, float]:
    """The models as dots, or their parts; a single one has the name ""."""
    measure = _measure(list(models.values()))
    if by is None:
        return _dots_picture({"": Points.of(models, models.values(), measure)}, measure, None)
    for model in models.values():
        if by not in model:
            raise ValueError(f'by="{by}" needs results with {by}: compute(..., {NEEDED[by]}).')
    parts = {name: model[by] for name, model in models.items()}
    whole = next(iter(models.values()))[measure.key] if len(models) == 1 else None
    if by == "positions":
        return _positions_picture(parts, measure, whole)
    names = _sorted_names(list(parts.values()), measure)
    series = {
        model: Points.of(names, [groups.get(name, {}) for name in names], measure)
        for model, groups in parts.items()
    }
    return _dots_picture(series, measure, whole)


def _sorted_names(parts: Sequence[Mapping[str, Result]], measure: Measure) -> list[str]:
    """The names of all groups, by what the first model has; those it lacks, or NaN, go last."""
    values = {name: math.nan for groups in parts for name in groups}
    values |= {name: result[measure.key] for name, result in parts[0].items()}
    return sorted(values, key=lambda name: (math.isnan(values[name]), values[name]))


def _dots_picture(
    series: Mapping[str, Points], measure: Measure, whole: float | None
) -> tuple[Draw, float]:
    """A row for each name, with a dot for each series; of a single one also the values."""
    names = next(iter(series.values())).names
    rows = np.arange(len(names))[::-1]

    def draw(axes: "Axes") -> None:
        fit = labels_fit(axes, len(names), down=True)
        shifts = 0.7 * ((len(series) - 1) / 2 - np.arange(len(series))) / len(series)
        dots = [
            _dots(axes, rows + shifts[i], points, i, 1 if fit else 0.3)
            for i, points in enumerate(series.values())
        ]
        axes.set_yticks(rows if fit else [], map(short, names) if fit else [], parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.spines["left"].set_visible(names != [""])
        if not fit:
            axes.set_ylabel(f"{len(names)} names, in order")
        elif len(series) == 1:
            for row, value in zip(rows, next(iter(series.values())).values, strict=True):
                beside(axes, row, number(value, measure.digits))
        _show_values(axes, "x", measure, series.values(), whole)
        axes.set_xlabel(lines(axes.get_xlabel(), _notes(series)), parse_math=False)
        if len(series) > 1:
            legend_above(axes, dots, series)

    height = 0.65 + max(0.22, 0.14 * len(series)) * len(names)
    height += 0.2 * (whole is not None or len(series) > 1)
    return draw, height if height <= MOST_HEIGHT else COLUMN


def _positions_picture(
    models: Mapping[str, Mapping[str, Result]], measure: Measure, whole: float | None
) -> tuple[Draw, float]:
    """A curve for each model over its buckets; empty buckets have no place in it."""
    series = {}
    for name, buckets in models.items():
        filled = {label: bucket for label, bucket in buckets.items() if bucket["num_tokens"]}
        series[name] = Points.of(filled, filled.values(), measure)

    def draw(axes: "Axes") -> None:
        curves = [
            _curve(axes, [_middle(bucket) for bucket in points.names], points, i)
            for i, points in enumerate(series.values())
        ]
        ends = [end for points in series.values() for b in points.names for end in _ends(b)]
        set_context_scale(axes, min(ends, default=0), max(ends, default=1))
        axes.set_xlabel(lines("Tokens of context", _notes(series)), parse_math=False)
        _show_values(axes, "y", measure, series.values(), whole)
        if len(series) > 1:
            legend_above(axes, curves, series)

    return draw, HEIGHT + 0.1 * (len(series) - 1)


def _show_values(
    axes: "Axes", which: str, measure: Measure, series: Iterable[Points], whole: float | None
) -> None:
    """The axis "x" or "y" of the values, with lines at the neutral one and at that of the whole."""
    set_scale(axes, which, np.concatenate([points.drawn for points in series]))
    line = axes.axvline if which == "x" else axes.axhline
    if measure.neutral is not None:
        line(measure.neutral, color=GREY, lw=0.8, zorder=0.5)
    label = measure.label
    if whole is not None and math.isfinite(whole):
        line(whole, color=GREY, lw=0.8, ls="--", zorder=0.5)
        shown = number(whole, measure.digits)
        if which == "x":
            above(axes, whole, f"whole {shown}")
        else:
            beside(axes, whole, f"whole\n{shown}")
    elif whole is not None:
        label = lines(label, f"(of the whole: {number(whole)})")
    axes.set(**{f"{which}label": label})


def _notes(series: Mapping[str, Points]) -> str:
    """The notes of all, each once."""
    return lines(*dict.fromkeys(points.note() for points in series.values()))


def _ends(bucket: str) -> tuple[int, int]:
    """The least and the most context in a bucket, from its label such as "4-7"."""
    first, _, last = bucket.partition("-")
    return int(first), int(last or first)


def _middle(bucket: str) -> float:
    """Where a bucket stands on a logarithmic axis."""
    first, last = _ends(bucket)
    return math.sqrt((first + 1) * (last + 1)) - 1  # 0 has a place, too


def _curve(axes: "Axes", places: Sequence[float], points: Points, i: int = 0) -> "Line2D":
    """A line with a band for its intervals, which are bars where a neighbour lacks one."""
    x, colour = np.asarray(places, dtype=float), PALETTE[i % len(PALETTE)]
    has_interval = np.pad(np.isfinite(points.lows), 1)
    in_band = has_interval[1:-1] & (has_interval[:-2] | has_interval[2:])
    axes.fill_between(x, points.lows, points.highs, where=in_band, color=colour, alpha=0.2, lw=0)
    alone = has_interval[1:-1] & ~in_band
    axes.vlines(x[alone], points.lows[alone], points.highs[alone], colors=colour, lw=1.5)
    marker = MARKERS[i % len(MARKERS)]
    return axes.plot(x, finite(points.values), color=colour, marker=marker, ms=3.5, lw=1.5)[0]


def _dots(axes: "Axes", rows: np.ndarray, points: Points, i: int, size: float) -> "Line2D":
    """A dot for each value on a bar for its interval."""
    colour, has_interval = PALETTE[i % len(PALETTE)], np.isfinite(points.lows)
    lows, highs = points.lows[has_interval], points.highs[has_interval]
    axes.hlines(rows[has_interval], lows, highs, colors=colour, lw=1.5 * size)
    marker = MARKERS[i % len(MARKERS)]
    return axes.plot(finite(points.values), rows, marker, color=colour, ms=4.5 * size)[0]
