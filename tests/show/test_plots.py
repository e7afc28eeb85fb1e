"""Pictures show the numbers of results, their intervals, and what cannot be drawn."""

import math
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from support import ROOT

from ppleval import Perplexity
from ppleval.show import plot_tokens, plots

LN2 = math.log(2)


def result(value, low=math.nan, high=math.nan, **more):
    interval = {"perplexity_ci_low": low, "perplexity_ci_high": high}
    return {"perplexity": value, **interval, "num_tokens": 5, **more}


def comparison(ratio, low, high, **more):
    interval = {"perplexity_ratio_ci_low": low, "perplexity_ratio_ci_high": high}
    return result(20.0, perplexity_ratio=ratio, **interval, **more)


def drawn(results, **options):
    """The axes of a figure of their own, out of pyplot's reach, that `plot` was given."""
    axes = Figure(figsize=(3.5, 3)).add_subplot()
    figure, same = plots.plot(results, ax=axes, **options)
    assert same is axes
    assert figure is axes.figure
    return axes


def marks(axes):
    """(x, y) of the lines with markers."""
    lines = [line for line in axes.lines if line.get_marker() != "None"]
    return [np.stack(line.get_data()).tolist() for line in lines]


def bars(axes):
    """[[(x, y), (x, y)], ...] of the intervals that are drawn as bars."""
    return [segment.tolist() for bar in axes.collections if hasattr(bar, "get_segments")
            for segment in bar.get_segments()]  # fmt: skip


def bands(axes):
    """{(x, y), ...} of the corners of each band."""
    return [
        {tuple(corner) for corner in path.vertices.tolist()}
        for band in axes.collections
        if not hasattr(band, "get_segments")
        for path in band.get_paths()
    ]


def levels(axes, style):
    """Where the thin lines across the axes are, on the axis of the values."""
    across = [line for line in axes.lines if line.get_marker() == "None"]
    data = [np.stack(line.get_data()).tolist() for line in across if line.get_linestyle() == style]
    return [x[0] if x[0] == x[1] else y[0] for x, y in data]


def names(labels):
    return [label.get_text() for label in labels]


def test_one_result_is_a_dot_with_its_interval():
    axes = drawn(result(20.0, 15.0, 30.0))
    assert marks(axes) == [[[20], [0]]]
    assert bars(axes) == [[[15, 0], [30, 0]]]
    assert names(axes.texts) == ["20"]
    assert axes.get_xlabel() == "Perplexity"
    assert axes.get_title() == ""


def test_models_are_rows_in_the_order_given():
    axes = drawn({"b $x_1$": result(30.0, 20.0, 40.0), "a": result(20.0, 15.0, 25.0)})
    assert marks(axes) == [[[30, 20], [1, 0]]]
    assert bars(axes) == [[[20, 1], [40, 1]], [[15, 0], [25, 0]]]
    assert names(axes.get_yticklabels()) == ["b $x_1$", "a"]
    assert not axes.get_yticklabels()[0].get_parse_math()
    assert axes.get_xscale() == "linear"


def test_groups_are_sorted_and_the_whole_is_a_line():
    groups = {"hard": result(90.0, 80.0, 95.0), "none": result(math.nan), "easy": result(9.0)}
    axes = drawn(result(50.0, groups=groups))
    assert names(axes.get_yticklabels()) == ["easy", "hard", "none"]
    np.testing.assert_equal(marks(axes), [[[9, 90, math.nan], [2, 1, 0]]])
    assert bars(axes) == [[[80, 1], [95, 1]]]
    assert levels(axes, "--") == [50]
    assert names(axes.texts) == ["9", "90", "NaN", "whole 50"]
    assert axes.get_xlabel() == "Perplexity\nNot shown: none (NaN)\nNo finite interval: easy"
    assert axes.get_xscale() == "log"  # 9 to 95


def test_groups_of_several_models_stand_together():
    first = result(5.0, groups={"x": result(3.0), "y": result(2.0)})
    second = result(6.0, groups={"x": result(4.0), "z": result(1.0)})
    axes = drawn({"one": first, "_two": second}, by="groups")
    assert names(axes.get_yticklabels()) == ["y", "x", "z"]
    (values, rows), (other_values, other_rows) = marks(axes)
    np.testing.assert_equal([values, other_values], [[2, 3, math.nan], [math.nan, 4, 1]])
    assert rows == pytest.approx([2.175, 1.175, 0.175])
    assert other_rows == pytest.approx([1.825, 0.825, -0.175])
    assert names(axes.get_legend().get_texts()) == ["one", "_two"]
    assert levels(axes, "--") == []


def test_many_groups_go_without_names():
    groups = {str(i): result(float(i)) for i in range(1, 101)}
    axes = drawn(result(50.0, groups=groups))
    assert names(axes.get_yticklabels()) == []
    assert axes.get_ylabel() == "100 names, in order"
    assert marks(axes)[0][0] == sorted(range(1, 101))
    assert axes.get_xlabel().endswith("No finite interval: 100 of 100")


def test_positions_are_a_curve_with_a_band():
    positions = {
        "0": result(800.0, 500.0, 900.0),
        "1": result(400.0, 300.0, 500.0),
        "2-3": result(200.0),
        "4-7": result(100.0, 50.0, 200.0),
        "8": result(math.nan, num_tokens=0),
    }
    axes = drawn(result(150.0, positions=positions, groups={"x": result(1.0)}))
    ((x, y),) = marks(axes)
    assert x == pytest.approx([0, 1, math.sqrt(12) - 1, math.sqrt(40) - 1])
    assert y == [800, 400, 200, 100]
    (band,) = bands(axes)
    assert band == {(0, 500), (0, 900), (1, 300), (1, 500)}
    assert bars(axes) == [[[x[3], 50], [x[3], 200]]]  # no neighbour has a band
    assert (axes.get_xscale(), axes.get_yscale()) == ("symlog", "log")
    assert axes.get_xlabel() == "Tokens of context\nNo finite interval: 2-3"
    assert axes.get_ylabel() == "Perplexity"
    assert levels(axes, "--") == [150]


def test_ticks_of_context_are_powers_of_two_in_numbers():
    buckets = ["0", *(f"{2**i}-{2 ** (i + 1) - 1}" for i in range(17))]
    axes = drawn(result(9.0, positions={name: result(9.0) for name in buckets}))
    axes.figure.draw_without_rendering()
    assert names(axes.get_xticklabels()) == ["0", "1", "8", "64", "512", "4096", "32k"]


def test_positions_of_several_models_are_several_curves():
    models = {name: result(9.0, positions={"1": result(value)}) for name, value in
              (("a", 3.0), ("b", 4.0))}  # fmt: skip
    axes = drawn(models, by="positions")
    assert marks(axes) == [[[1], [3]], [[1], [4]]]
    assert names(axes.get_legend().get_texts()) == ["a", "b"]
    first, second = (line for line in axes.lines if line.get_marker() != "None")
    assert first.get_color() != second.get_color()
    assert first.get_marker() != second.get_marker()


def test_a_list_is_a_line_over_steps():
    run = [result(9.0, 8.0, 10.0), result(7.0, 6.0, 8.0), result(math.inf), result(5.0, 0.0, 6.0)]
    axes = drawn(run)
    np.testing.assert_equal(marks(axes), [[[0, 1, 2, 3], [9, 7, math.nan, 5]]])
    assert bands(axes) == [{(0, 8), (0, 10), (1, 6), (1, 8)}]
    note = "Not shown: 2 (∞)\nNo finite interval: 3"
    assert axes.get_xlabel() == f"Evaluation, numbered from 0\n{note}"
    axes = drawn(run, steps=[100, 200, 200, 400])
    assert marks(axes)[0][0] == [100, 200, 200, 400]
    assert axes.get_xlabel().startswith("Step\n")


def test_a_comparison_is_a_ratio_beside_one():
    axes = drawn({"int8": comparison(1.0001, 0.9999, 1.0003), "int4": comparison(1.02, 1.01, 1.03)})
    assert marks(axes) == [[[1.0001, 1.02], [1, 0]]]
    assert bars(axes) == [[[0.9999, 1], [1.0003, 1]], [[1.01, 0], [1.03, 0]]]
    assert levels(axes, "-") == [1]
    assert axes.get_xlabel() == "Perplexity ratio (model / base)"
    assert names(axes.texts) == ["1.0001", "1.02"]


def test_a_comparison_by_bytes_is_a_difference_beside_zero():
    key = "bits_per_byte_difference"
    axes = drawn(result(20.0, **{key: -0.5, f"{key}_ci_low": -1.0, f"{key}_ci_high": 0.0}))
    assert bars(axes) == [[[-1, 0], [0, 0]]]
    assert levels(axes, "-") == [0]
    assert names(axes.texts) == ["−0.5"]


def test_nothing_finite_still_gives_a_picture(tmp_path):
    for i, value in enumerate((math.inf, math.nan)):
        whole = result(value, groups={"x": result(value)}, positions={"1": result(value)})
        for by in ("groups", "positions"):
            plots.save(whole, tmp_path / f"{i}{by}.png", by=by)
            axes = drawn(whole, by=by)
            shown = axes.get_xlabel() + axes.get_ylabel()
            assert f"(of the whole: {'∞' if i == 0 else 'NaN'})" in shown


@pytest.mark.parametrize(
    ("results", "options", "error", "message"),
    [
        ([], {}, ValueError, "results is empty"),
        ({}, {}, ValueError, "results is empty"),
        ("text", {}, TypeError, "a list of results or a dict from names to results, got 'text'"),
        (None, {}, TypeError, "got None"),
        ([{"loss": 1.0}], {}, TypeError, r"got {'loss': 1.0}"),
        (
            [result(1.0), comparison(1.0, 1.0, 1.0)],
            {},
            ValueError,
            "of one kind, got some with perplexity, perplexity_ratio",
        ),
        ([result(1.0)], {"steps": [1, 2]}, ValueError, "for each result, got 2 for 1"),
        (result(1.0), {"steps": [1]}, ValueError, "steps goes with a list"),
        ([result(1.0)], {"by": "groups"}, ValueError, "by goes with one result or a dict"),
        (result(1.0), {"by": "groups"}, ValueError, r"by=\"groups\" needs .*groups=\[\.\.\.\]"),
        ({"a": result(1.0)}, {"by": "positions"}, ValueError, "compute.*positions=True"),
        (result(1.0), {"by": "group"}, ValueError, '"positions" or "groups", got \'group\''),
    ],
)
def test_what_cannot_be_drawn_is_refused(results, options, error, message):
    with pytest.raises(error, match=message):
        plots.plot(results, **options)


def make_score(tokens, bits, entropy):
    return SimpleNamespace(
        tokens=tokens, nll=[b * LN2 for b in bits], entropy=[b * LN2 for b in entropy]
    )


def score_axes(score, width=3.5):
    axes = Figure(figsize=(width, 3)).add_subplot()
    return plot_tokens.plot_score(score, axes)[1]


def test_tokens_are_bars_of_bits_with_a_line_of_entropy():
    score = make_score(
        ["$a$", " the", "\n", " ", "漢"], [math.nan, 2, 3, math.inf, 1], [math.nan, 1, 2, 4, 5]
    )
    axes = score_axes(score)
    heights = [bar.get_height() for bar in axes.patches if hasattr(bar, "get_height")]
    np.testing.assert_allclose(heights, [math.nan, 2, 3, math.nan, 1])
    (entropy,) = (patch for patch in axes.patches if not hasattr(patch, "get_height"))
    np.testing.assert_allclose(entropy.get_data().values, [math.nan, 1, 2, 4, 5])
    assert names(axes.get_xticklabels()) == ["$a$", "the", "↵", "␣", "\ufffd"]
    assert not axes.get_xticklabels()[0].get_parse_math()
    assert not axes.xaxis.label.get_parse_math()
    assert axes.get_xlabel() == "Infinite: ␣\nNot scored: 1 of 5 tokens"
    assert names(axes.texts) == ["∞"]
    assert axes.get_ylabel() == "Bits per token"
    assert names(axes.get_legend().get_texts()) == ["surprisal", "entropy"]
    axes.figure.draw_without_rendering()  # no warning of missing glyphs


def test_a_long_text_goes_without_labels():
    axes = score_axes(make_score(["x"] * 200, range(200), [1] * 200))
    surprisal, entropy = (patch.get_data() for patch in axes.patches)
    np.testing.assert_allclose(surprisal.values, np.arange(200))
    np.testing.assert_allclose(entropy.values, np.ones(200))
    assert axes.get_xlabel() == "Token, numbered from 0"


def test_an_empty_text():
    assert score_axes(make_score([], [], [])).get_ylabel() == "Bits per token"


def test_pictures_from_the_metric():
    """Without axes of the user's, pyplot makes a figure; a text that fits takes a column."""
    from matplotlib import pyplot

    ppl = Perplexity()
    logits = np.zeros((4, 3, 8))
    options = {"predictions": logits, "references": np.zeros((4, 3), int)}
    computed = ppl.compute(**options, groups=["a", "b", "a", "b"])
    before = pyplot.get_fignums()
    figure, axes = ppl.plot(computed)
    assert len(pyplot.get_fignums()) == len(before) + 1
    assert names(axes.get_yticklabels()) == ["a", "b"]
    assert np.allclose(marks(axes)[0][0], 8)
    assert figure.get_figwidth() == 3.5
    pyplot.close(figure)
    (score,) = ppl.score(["Return the list."], model_id=str(ROOT / "tiny_model"))
    figure, axes = score.plot()
    heights = [bar.get_height() for bar in axes.patches if hasattr(bar, "get_height")]
    np.testing.assert_allclose(heights, np.array(score.nll) / LN2)
    assert figure.get_figwidth() == 3.5
    pyplot.close(figure)


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_save_writes_what_the_name_says(tmp_path, suffix, start):
    path = tmp_path / f"picture.{suffix.upper()}"
    plots.save(result(20.0, 15.0, 30.0), path)
    assert path.read_bytes().startswith(start)


def test_names_that_others_wrote_leave_a_picture_whole(tmp_path):
    evil = "a\x1b[31m\0\ud800\n\u202e"
    groups = {evil: result(2.0, 1.5, 3.0), "b" * 10_000: result(math.inf), "c": result(3.0, 2, 4)}
    path = tmp_path / "picture.svg"
    plots.save(result(2.5, 2.0, 3.0, groups=groups), path)
    ElementTree.parse(path)
    plots.save({evil: result(2.0, 1.5, 3.0), "-->": result(math.inf)}, path)
    ElementTree.parse(path)


def test_save_refuses_other_names(tmp_path):
    message = r"must end in \.png, \.svg, \.pdf, got '.*picture\.jpg'"
    with pytest.raises(ValueError, match=message):
        plots.save(result(20.0), tmp_path / "picture.jpg")
    with pytest.raises(ValueError, match=r"got 'picture'"):
        plots.check_path("picture")


def test_save_leaves_pyplot_and_its_settings_alone(tmp_path):
    """In a process of its own, where nothing has chosen a backend yet."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from ppleval.show import plot_tokens, plots
assert not [name for name in sys.modules if name.startswith("matplotlib")]
import matplotlib
settings = dict(matplotlib.rcParams)
plots.save({{"perplexity": 9.0}}, {str(tmp_path / "picture.png")!r})
assert "matplotlib.pyplot" not in sys.modules
assert dict(matplotlib.rcParams) == settings
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_without_matplotlib_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        lambda: plots.plot(result(1.0)),
        lambda: plots.check_path("picture.png"),
        lambda: plot_tokens.plot_score(make_score(["a"], [1], [1])),
    ):
        with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
            draw()
