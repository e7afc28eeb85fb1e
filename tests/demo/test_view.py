"""The view of a score in a browser: it is drawn from JSON, and needs no server."""

import csv
import io
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from demo_models import LABEL, loaded, settings_with
from support import ROOT

from demo import token_data, views
from demo.score_view import FOLDER, STYLE
from ppleval import Perplexity

TEXT = (
    "Return the number of items in the list. If it is empty, the result is zero.\n\nA naïve 漢字."
)
LN2 = math.log(2)
ORIGIN = "http://127.0.0.1:9"  # nothing listens there: the requests are answered by `answer`
PAGE = f"""<!doctype html><html lang="en"><title>A score</title><style>{STYLE}</style>
<main><h1>A score</h1><div role="tabpanel" aria-label="Text"><div class="verdict"></div>
<button class="primary">Score</button><div id="place"><div class="view"></div></div></div></main>
<script type="module">
import {{ start }} from "./main.js";
window.props = {{ value: null }};
start(document.querySelector("#place"), props, (_, draw) => {{ window.redraw = draw; }});
</script></html>"""
TYPES = {".js": "text/javascript", ".css": "text/css"}


@pytest.fixture(scope="module")
def metrics():
    return loaded(settings_with())


def data_of(metrics, text=TEXT):
    labelled = metrics.score(text, LABEL, lambda *_: None)
    return token_data.score_data(labelled, views.figures(labelled))


@pytest.fixture(scope="module")
def data(metrics):
    return data_of(metrics)


@pytest.fixture(scope="module")
def context(browser):
    context = browser.new_context(viewport={"width": 900, "height": 1200})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    return context


@pytest.fixture
def page(context):
    """A page that has no score yet, and logs no error."""
    page, errors = context.new_page(), []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(error.stack))

    def answer(route):
        name = route.request.url.removeprefix(f"{ORIGIN}/")
        if name == "":
            route.fulfill(body=PAGE, content_type="text/html; charset=utf-8")
        else:
            file = FOLDER / name
            route.fulfill(body=file.read_text(encoding="utf-8"), content_type=TYPES[file.suffix])

    page.route(f"{ORIGIN}/**", answer)
    page.goto(f"{ORIGIN}/")
    page.wait_for_function("() => !!window.redraw")
    yield page
    page.close()
    assert errors == []


def show(page, data):
    page.evaluate("data => { props.value = data && JSON.stringify(data); redraw(); }", data)
    return page.locator(".text b")


def choose(page, kind=None, mode=None):
    if kind:
        page.get_by_label("of each", exact=True).select_option(kind)
    if mode:
        page.get_by_label("Colour by").select_option(mode)


def number(value):
    return math.nan if value is None else float(value)


def ranges(data, kind):
    """Of tokens, of each unit."""
    if kind == "token":
        return data["pieces"]
    if kind == "word":
        return [[word["first"], word["stop"]] for word in data["words"]]
    ends = [data["text"].index(end) + len(end) for end in ("list.", "zero.")]
    firsts = [0] + [
        next(i for i, t in enumerate(data["tokens"]) if t["end"] > end and t["token"].strip())
        for end in ends
    ]
    firsts[2] = min(firsts[2], len(data["tokens"]))
    return [list(pair) for pair in itertools.pairwise([*firsts, len(data["tokens"])])]


def values_of(data, kind, mode):
    """By numpy, and not by the page."""
    found = []
    for first, stop in ranges(data, kind):
        scored = [t for t in data["tokens"][first:stop] if t["bits"] is not None]
        bits, entropy = (
            np.array([number(t[name]) for t in scored]) for name in ("bits", "entropy")
        )
        ranks = sorted(t["rank"] for t in scored)
        of_all = np.mean if kind == "sentence" else np.sum
        if not scored:
            found.append(math.nan)
        elif mode == "rank":
            found.append(ranks[(len(ranks) - 1) // 2] if kind == "sentence" else ranks[-1])
        else:
            found.append(of_all(bits) - (of_all(entropy) if mode == "excess" else 0))
    return found


def colour_of(mode, value):
    """The class and the strength that stand for a value."""
    if math.isnan(value):
        return "unscored", ""
    if mode == "surprisal":
        return "", str(round(100 * math.sqrt(min(1, value / 16))))
    if mode == "rank":
        return "", str(25 * sum(value > most for most in (1, 10, 100, 1000)))
    side = "more" if value > 0 else "less"
    return side, str(round(100 * math.sqrt(min(1, abs(value) / 8))))


LOOKS = """spans => spans.map(b => [
  [...b.classList].filter(name => ["less", "more", "unscored"].includes(name)).join(),
  b.style.getPropertyValue("--s")])"""
EDGES = {
    "surprisal": list(range(17)),
    "rank": [1, 2, 11, 101, 1001],
    "excess": list(range(-8, 9)),
}


@pytest.mark.parametrize("mode", ["surprisal", "rank", "excess"])
@pytest.mark.parametrize("kind", ["token", "word", "sentence"])
def test_colours_histogram_and_marks(page, data, kind, mode):
    """Each unit has the colour of its value; bins and marks count these values."""
    spans = show(page, data)
    choose(page, kind, mode)
    values = values_of(data, kind, mode)
    assert spans.count() == len(values)
    assert page.locator(".text").text_content().replace("↵", "") == data["text"]
    looks = [tuple(look) for look in spans.evaluate_all(LOOKS)]
    assert looks == [colour_of(mode, value) for value in values]
    scored = [value for value in values if not math.isnan(value)]
    edges = EDGES[mode]
    counts = [int(n) for n in np.histogram(np.maximum(scored, edges[0]), [*edges, math.inf])[0]]
    titles = page.locator(".bars i").evaluate_all("bars => bars.map(bar => bar.title)")
    assert [int(title.split(": ")[1].split()[0]) for title in titles] == counts
    slider = page.get_by_label("Mark from")

    def marked():
        return spans.evaluate_all("bs => bs.map(b => b.classList.contains('marked'))")

    first = edges[int(slider.input_value())]  # about a tenth is marked at first
    assert marked() == [value >= first for value in values]
    assert 1 <= sum(marked()) <= max(len(scored) / 10, counts[edges.index(first)])
    slider.fill("1")
    assert marked() == [value >= edges[1] for value in values]
    count = sum(marked())
    slider.fill("0")
    assert marked() == [not math.isnan(value) for value in values]
    slider.fill("1")
    assert f"{count} of {len(scored)} {kind}" in page.locator(".histogram output").inner_text()


def test_the_most_surprising_spans(page, metrics):
    """Runs of marked tokens, those with the most bits first; each leads to its place."""
    data = data_of(metrics, "If purple monkeys return the list, a zero eats the functions. " * 3)
    page.set_viewport_size({"width": 300, "height": 1200})  # the text does not fit in its box
    spans = show(page, data)
    page.get_by_label("Mark from").fill("8")
    runs = []
    for is_marked, run in itertools.groupby(
        zip(data["pieces"], values_of(data, "token", "surprisal"), strict=True),
        key=lambda pair: pair[1] >= 8,
    ):
        if is_marked:
            run = list(run)
            text = "".join(t["token"] for piece, _ in run for t in data["tokens"][slice(*piece)])
            runs.append((sum(bits for _, bits in run), text.strip(), run[0][0]))
    runs.sort(key=lambda run: -run[0])
    assert len(runs) > 3
    buttons = page.locator(".spans button")
    told = [text.split(" in ")[0] for text in buttons.all_inner_texts()]
    assert told == [
        f"“{text}” {bits:.1f} bits" for bits, text, _ in runs[:8] if "\ufffd" not in text
    ]
    assert page.locator(".spans h2").inner_text().startswith(f"{len(runs)} underlined spans")
    for i, (_, _, first) in enumerate(runs[:3]):
        buttons.nth(i).click()
        pinned = spans.nth(data["pieces"].index(first))
        assert pinned.evaluate("b => b.classList.contains('pinned')")
        box, frame = pinned.bounding_box(), page.locator(".text").bounding_box()
        assert frame["y"] <= box["y"] < frame["y"] + frame["height"]


def test_the_chart_and_the_text_show_the_same_place(page, data):
    spans = show(page, data)
    svg = page.locator(".chart svg")
    box = svg.bounding_box()
    tokens = len(data["tokens"])

    def place(token):
        return box["x"] + 30 + token / tokens * (box["width"] - 38), box["y"] + 60

    first, stop = data["pieces"][7]
    page.mouse.move(*place((first + stop) / 2))
    assert spans.nth(7).evaluate("b => b.classList.contains('pointed')")
    bits = data["tokens"][first]["bits"]
    told = svg.locator(".pointed text").text_content()
    assert told == f"\u2068“{data['tokens'][first]['token']}”\u2069 {bits:.1f} bits"
    page.mouse.click(*place((first + stop) / 2))
    assert spans.nth(7).evaluate("b => b.classList.contains('pinned')")
    assert f"{bits:.2f} bits" in page.locator(".panel").inner_text()
    page.mouse.move(0, 0)
    assert page.locator(".pointed").count() == 0
    spans.nth(3).hover()
    line = svg.locator(".pointed line")
    middle = sum(data["pieces"][3]) / 2
    assert float(line.get_attribute("x1")) == pytest.approx(place(middle)[0] - box["x"], abs=0.5)
    page.get_by_label("Mark from").focus()
    spans.nth(5).focus()
    assert (
        svg.locator(".pointed text")
        .text_content()
        .startswith(f"\u2068“{data['tokens'][data['pieces'][5][0]]['token']}”")
    )


POINTS = (
    r"path => path.getAttribute('d').match(/[ML][\d.]+ [\d.]+/g).map(p => p.slice(1).split(' '))"
)


def test_the_chart_of_a_long_text_is_a_running_mean(page, metrics):
    data = data_of(metrics, "The list is not changed, and the result is zero. " * 60)
    show(page, data)
    bits = values_of(data, "token", "surprisal")
    window = round(len(bits) / 100)
    caption = page.locator(".chart figcaption").inner_text()
    assert caption == f"Surprisal along the text in bits, running mean of {window} tokens"
    points = np.array(page.locator(".chart .line").evaluate(POINTS), dtype=float)
    top = float(page.locator(".chart text").nth(2).text_content())
    starts = [max(0, i - window // 2) for i in range(len(bits))]
    means = [np.nanmean(bits[start : start + window]) for start in starts]
    heights = [means[i] for i in range(len(bits)) if not math.isnan(bits[i])]
    # The axis is 108 pixels high, and ends at 128.
    assert points[:, 1] == pytest.approx([128 - 108 * height / top for height in heights], abs=0.06)
    assert page.locator(".chart .band").count() == 30  # every other sentence


def test_means_and_what_stands_alone_are_lines(page, metrics):
    """Between what is not scored, a line from middle to middle would have no end."""
    talk = "User: What?\nAssistant: The list.\nUser: And?\nAssistant: It is empty."
    labelled = metrics.converse(talk, LABEL, lambda *_: None)
    show(page, token_data.score_data(labelled, {}))
    kinds = page.get_by_label("of each", exact=True).locator("option").all_inner_texts()
    assert kinds == ["token", "word", "turn"]
    choose(page, "turn")
    path = page.locator(".chart .line").get_attribute("d")
    assert (path.count("M"), path.count("H"), path.count("L")) == (2, 2, 0)
    assert page.locator(".text b:not(.unscored)").count() == 2


def test_a_score_that_comes_while_its_tab_is_not_shown(page, data, metrics):
    """The chart is drawn when the tab is shown; all else is there."""
    show(page, data)
    page.evaluate("document.querySelector('[role=tabpanel]').style.display = 'none'")
    other = data_of(metrics, "The list is empty.")
    show(page, other)
    page.evaluate("document.querySelector('[role=tabpanel]').style.display = ''")
    scored = [token for token in other["tokens"] if token["bits"] is not None]
    most = max(scored, key=lambda token: token["bits"])
    assert page.locator(".panel").inner_text().startswith(f"“{most['token']}” ")
    page.wait_for_function(
        """count =>
        document.querySelector(".chart .line").getAttribute("d").match(/[ML]/g).length === count""",
        arg=len(scored),
    )
    assert page.locator(".chart .pinned").count() == 1


def test_a_new_score_has_nothing_pointed_at(page, data, metrics):
    spans = show(page, data)
    spans.nth(3).hover()
    spans.nth(4).hover()
    page.locator(".chart .pointed").wait_for(state="attached")
    show(page, data_of(metrics, "The list is empty."))
    assert page.locator(".pointed").count() == 0


def test_every_word_of_a_conversation_has_figures(page, metrics):
    """Behind the last word stand the token that ends its turn, and tokens of no word."""
    labelled = metrics.converse(
        "User: What?\nAssistant: The list.\nUser: And?\nAssistant: It is empty.",
        LABEL,
        lambda *_: None,
    )
    data = token_data.score_data(labelled, {})
    spans = show(page, data)
    choose(page, "word")
    for i, word in enumerate(data["words"]):
        spans.nth(i).evaluate("span => span.click()")  # a tooltip may be in front of it
        told = page.locator(".panel").inner_text()
        figure = "not scored" if word["bits"] is None else f" {word['bits']:.2f} bits"
        assert figure in told.split("\n\nread")[0]
    assert spans.count() == len(data["words"])
    assert "empty." in told


def test_by_position_in_the_context(page, data):
    show(page, data)
    page.get_by_text("By position in the context").click()
    rows = [row.split("\n") for row in page.locator(".positions li").all_inner_texts()]
    expected = [
        [label.replace("-", "–"), f"{found['bits']:.1f} bits", f"{found['num_tokens']} token"]
        for label, found in data["positions"].items()
    ]
    assert [[a, b, c.removesuffix("s")] for a, b, c in rows] == expected


def saved(page, name):
    with page.expect_download() as download:
        page.get_by_role("button", name=name).click()
    return download.value.path().read_bytes().decode()


HARD = 'He said "no",\r\n=1+1; naïve 漢字 👨‍👩‍👧\tתעיד \x07 end'


@pytest.mark.parametrize("text", [TEXT, HARD])
def test_every_export_has_the_numbers_of_score(page, metrics, text):
    show(page, data_of(metrics, text))
    tiny = str(ROOT / "tiny_model")
    (expected,) = Perplexity().score([text], model_id=tiny, top_k=5)
    result = Perplexity().compute(predictions=[text], model_id=tiny)
    as_json = json.loads(saved(page, "Save JSON"))
    rows = list(csv.DictReader(io.StringIO(saved(page, "Save CSV"), newline="")))
    page.get_by_role("button", name="Copy table").click()
    page.get_by_text("Copied").wait_for()
    pasted = page.evaluate("navigator.clipboard.readText()")
    copied = list(csv.DictReader(io.StringIO(pasted), dialect="excel-tab"))
    assert as_json["result"]["perplexity"] == pytest.approx(result["perplexity"], rel=1e-6)
    assert as_json["text"] == text
    flat = str.maketrans("\t\r\n", "   ")
    for found, clean in ((as_json["tokens"], None), (rows, None), (copied, flat)):
        assert len(found) == len(expected.tokens)
        for i, token in enumerate(found):
            name = expected.tokens[i]
            assert token["token"] == (name.translate(clean) if clean else name)
            assert [int(token["start"]), int(token["end"])] == list(expected.offsets[i])
            if math.isnan(expected.nll[i]):
                assert token["bits"] in ("", None)
                continue
            assert float(token["bits"]) * LN2 == pytest.approx(expected.nll[i], rel=1e-5, abs=1e-6)
            assert float(token["entropy"]) * LN2 == pytest.approx(expected.entropy[i], rel=1e-5)
            assert int(token["rank"]) == expected.ranks[i]
            for j, (likely, nll) in enumerate(expected.expected[i], 1):
                if "expected" in token:
                    shown = token["expected"][j - 1]["token"], token["expected"][j - 1]["bits"]
                else:
                    shown = token[f"expected_{j}"], token[f"expected_{j}_bits"]
                assert shown[0] == (likely.translate(clean) if clean else likely)
                assert float(shown[1]) * LN2 == pytest.approx(nll, rel=1e-5, abs=1e-6)


def test_a_table_for_the_clipboard_is_read_by_others(page, metrics):
    """A quote at the beginning of a cell would begin a text that goes on to the next quote."""
    text = 'He said:\n"\n" and "yes" or 5".'
    data = data_of(metrics, text)
    show(page, data)
    page.get_by_role("button", name="Copy table").click()
    page.get_by_text("Copied").wait_for()
    pasted = page.evaluate("navigator.clipboard.readText()")
    rows = list(csv.DictReader(io.StringIO(pasted), dialect="excel-tab"))
    tokens = [token["token"].replace("\n", " ") for token in data["tokens"]]
    assert any(token.startswith('"') for token in tokens)
    assert [row["token"] for row in rows] == tokens


def test_what_was_chosen_stays_for_the_next_score(page, data, metrics):
    show(page, data)
    choose(page, "word", "rank")
    spans = show(page, data_of(metrics, "The list is empty."))
    assert spans.count() == 4
    assert page.locator(".steps i").first.inner_text() == "1"
    show(page, None)
    assert page.locator(".surprisal").count() == 0
    spans = show(page, data | {"words": None})  # of a model without places
    assert spans.count() == len(data["pieces"])


def test_another_unit_shows_the_same_place(page, data):
    spans = show(page, data)
    spans.nth(5).click()
    place = data["pieces"][5][0]
    for kind in ("word", "sentence", "word"):
        choose(page, kind)
        pinned = spans.evaluate_all("all => all.findIndex(b => b.matches('.pinned'))")
        first, stop = ranges(data, kind)[pinned]
        assert first <= place < stop
        place = first


def test_a_score_without_places_or_numbers(page, metrics):
    """A slow tokenizer, a probability of zero, and a text of which nothing is scored."""
    labelled = metrics.score("The list.", LABEL, lambda *_: None)
    nll = [math.nan, math.inf, *labelled.score.nll[2:]]
    score = replace(labelled.score, nll=nll, offsets=None)
    spans = show(page, token_data.score_data(replace(labelled, score=score), {}))
    assert spans.count() == len(nll)
    assert "infinite bits" in page.locator(".panel").inner_text()
    nothing = replace(score, nll=[math.nan] * len(nll))
    spans = show(page, token_data.score_data(replace(labelled, score=nothing), {}))
    assert spans.evaluate_all(LOOKS) == [["unscored", ""]] * len(nll)
    assert "not scored" in page.locator(".panel").inner_text()


def test_a_probability_of_zero_in_a_long_text(page, data):
    """It is infinite in the means around it, and only in these."""
    tokens = data["tokens"] * 30
    tokens[50] = tokens[50] | {"bits": "Infinity"}
    pieces = [[i, i + 1] for i in range(len(tokens))]
    show(page, data | {"tokens": tokens, "pieces": pieces, "words": None})
    assert "running mean" in page.locator(".chart figcaption").inner_text()
    path = page.locator(".chart .line").get_attribute("d")
    assert "NaN" not in path
    heights = [point.split(" ")[1] for point in path.replace("L", "M").split("M")[1:]]
    assert 1 < heights.count("20.0") < 40


def test_a_span_without_a_visible_character(page, metrics):
    """What JavaScript takes for white space is more than what a reader sees as such."""
    show(page, data_of(metrics, "\ufeff"))
    assert page.locator(".spans button").inner_text().startswith("“[U+FEFF]” ")


def test_ctrl_enter_in_a_result_keeps_the_focus_on_the_page(page, data):
    """The next score replaces what had it."""
    spans = show(page, data)
    spans.nth(0).focus()
    page.keyboard.press("Control+Enter")
    assert page.evaluate("document.activeElement.textContent") == "Score"


def test_on_paper_a_dark_page_can_be_read(page, data):
    page.evaluate("document.body.className = 'dark'; document.body.style.background = '#000'")
    show(page, data)
    page.emulate_media(media="print")
    colours = page.locator(".surprisal").evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
    )
    assert colours == ["rgb(31, 31, 31)", "rgb(255, 255, 255)"]


def test_no_markup_comes_from_a_text(page, metrics):
    text = "👨‍👩‍👧 <img src=x onerror=alert(1)> ${1+1} {{x}} \u202e"
    show(page, data_of(metrics, text))
    for kind in ("word", "sentence", "token"):
        choose(page, kind)
        shown = page.locator(".text").text_content()
        assert shown == text.replace("\u202e", "[U+202E]")
    assert page.locator(".surprisal img").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everybody_can_use_it(page, data, theme):
    """axe-core finds nothing, and every control is reached by keys."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page.evaluate(
        "theme => { document.body.className = theme; "
        "document.body.style.background = theme === 'dark' ? '#16181d' : '#fff'; "
        "document.body.style.color = theme === 'dark' ? '#fff' : '#000'; }",
        theme,
    )
    show(page, data)
    for summary in page.locator("summary").all():
        summary.click()
    for mode in ("surprisal", "rank", "excess"):
        choose(page, "token", mode)
        found = axe.Axe().run(page).response["violations"]
        assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found] == []
    page.get_by_label("Colour by").focus()
    reached = []
    for _ in range(9):
        reached.append(page.evaluate("document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert reached[:5] == ["SELECT", "SELECT", "B", "INPUT", "BUTTON"]
