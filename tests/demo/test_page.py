"""The demo in a browser."""

import base64
import csv
import json
import math
import re
import threading
import time
import zlib
from dataclasses import replace

import gradio
import httpx
import numpy as np
import pytest
from demo_models import LABEL
from demo_server import OTHER, PROSE, TINY, ask, serving, threads_that_score, wait_for, with_queue

from demo import handlers, models, service, views
from demo.pair_data import pair_data
from demo.score_view import ADDRESS
from ppleval import Perplexity
from ppleval.show import heatmap


@pytest.fixture(scope="module")
def profile(browser):
    """One for all pages, so that Gradio's files are fetched once."""
    return browser.new_context(viewport={"width": 1200, "height": 900})


@pytest.fixture
def page(profile, url):
    """A page that sends no request elsewhere, and logs no error."""
    page = profile.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(error.stack))
    page.goto(url)
    yield page
    page.close()
    assert [r for r in requests if not r.startswith((url, "data:", "blob:"))] == []
    assert errors == []


def press(page, name):
    page.get_by_role("button", name=name).click()


def violations(page):
    """What axe-core finds on the page: WCAG and its best practices."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    return [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]


def choose_example(page, example):
    """Gradio asks the server for the text."""
    press(page, example.label)
    typed = "text => [...document.querySelectorAll('textarea')].some(box => box.value === text)"
    page.wait_for_function(typed, arg=example.text)


def score_text(page, text):
    """Type a text, score it, and wait for its heatmap; another was there before."""
    page.get_by_label("Text", exact=True).fill(text)
    press(page, "Score")
    tokens = page.locator(".surprisal .text").filter(has_text=text).locator("b")
    tokens.first.wait_for()
    return tokens


def test_models_that_cannot_be_used_are_not_offered(page, settings):
    page.get_by_text("Not available at the moment: Absent.").first.wait_for()
    page.get_by_label("Model", exact=True).first.click()
    names = page.get_by_role("listbox").get_by_role("option").all_inner_texts()
    assert [name.strip(" ✓\n") for name in names] == [
        f"{model.label}: {model.description}" for model in settings.models[:2]
    ]


def test_type_score_and_hover(page):
    tokens = score_text(page, PROSE)
    result = Perplexity().compute(predictions=[PROSE], model_id=TINY)
    assert tokens.count() == result["num_tokens"]
    assert f"Perplexity {result['perplexity']:.1f}" in page.locator(".verdict").first.inner_text()
    tip = "(token) => getComputedStyle(token, '::after').content"
    assert tokens.nth(3).evaluate(tip) == "none"  # nothing pops up unasked
    tokens.nth(3).hover()
    assert "bits" in tokens.nth(3).evaluate(tip)
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate(FOCUSED)


def test_words_in_place_of_tokens(page):
    tokens = score_text(page, PROSE)
    assert tokens.count() > len(PROSE.split())
    page.get_by_label("of each", exact=True).select_option("word")
    shown = page.locator(".surprisal .text").text_content()
    words = page.locator(".surprisal .text b")
    assert (shown, words.count()) == (PROSE, len(PROSE.split()))
    (expected,) = Perplexity().score([PROSE], model_id=TINY, corrected=True)
    words.nth(3).click()
    told = page.get_by_label("One word", exact=True).inner_text()
    word = expected.words[3]
    assert f"“ {word.text}” {word.nll / math.log(2):.2f} bits" in told
    assert f"corrected for where words end: {word.corrected_nll / math.log(2):.2f} bits" in told


TOASTS = "[data-testid=toast-body]"
RESULTS = ".surprisal:visible, .statistics:visible"
PROGRESS = "[data-testid=status-tracker]:not(.hide):visible"  # what it covers is faint


def ask_on(page, tab, text):
    """Ask for a score on a tab, whose button is returned with that to stop it."""
    page.get_by_role("tab", name=tab).click()
    label, action = {
        "Text": ("Text", "Score"),
        "Conversation": ("Conversation", "Score"),
        "Compare": ("Text A", "Compare"),
    }[tab]
    page.get_by_role("textbox", name=label, exact=True).fill(text)
    if tab == "Compare":  # two texts: one after the other
        page.get_by_label("Text B").fill("Another text.")
    button = page.get_by_role("button", name=action, exact=True)
    button.click()
    return button, page.get_by_role("button", name="Stop", exact=True)


@pytest.mark.parametrize("tab", ["Text", "Conversation", "Compare"])
def test_stop_in_the_browser(page, held, tab):
    """By the keyboard: no error, no old result, and the next score at once."""
    running, release = held
    page.locator(".chart .line").first.wait_for()
    assert page.get_by_role("button", name="Stop", exact=True).is_disabled()
    text = "User: Go on.\nAssistant: endless" if tab == "Conversation" else "endless"
    button, stop = ask_on(page, tab, text)
    wait_for(lambda: running and stop.is_enabled())
    page.wait_for_timeout(500)  # until Gradio's progress has faded in
    assert violations(page) == []
    stop.press("Enter")
    told = page.get_by_role("status").filter(has_text="Stopped. Nothing was scored.")
    told.wait_for()
    wait_for(lambda: threads_that_score() == 0 and stop.is_disabled())
    assert button.evaluate(FOCUSED)
    assert page.locator(f"{RESULTS}, {TOASTS}").count() == 0
    assert page.locator(PROGRESS).count() == 0
    assert violations(page) == []
    release.set()
    ask_on(page, tab, "User: Name it.\nAssistant: A list.")
    page.locator(".surprisal:visible b").first.wait_for()
    assert (told.count(), stop.is_disabled()) == (0, True)


def test_a_request_that_waits_is_stopped(browser, settings, outside, held):
    running, release = held
    with serving(with_queue(settings)) as (demo, url):
        page = browser.new_page()
        page.goto(url)
        page.locator(".chart .line").first.wait_for()
        events = [ask(url, text).json()["event_id"] for text in "abcd"]
        wait_for(lambda: threads_that_score() == 4)
        _, stop = ask_on(page, "Text", "mine")
        wait_for(lambda: len(demo._queue) == 1)
        stop.click()
        page.get_by_text("Stopped. Nothing was scored.").wait_for()
        wait_for(lambda: len(demo._queue) == 0 and stop.is_disabled())
        assert page.locator(TOASTS).count() == 0
        release.set()
        for event in events:
            assert "complete" in httpx.get(f"{url}gradio_api/call/score/{event}").text
        page.close()
    assert "mine" not in running


def test_stop_before_the_server_has_the_request(page, held):
    """On a slow line: it is stopped as soon as it is there."""
    wait_for(lambda: page.locator(".chart .line").count())
    page.route("**/queue/join*", lambda route: time.sleep(1) or route.continue_())
    _, stop = ask_on(page, "Text", "endless")
    stop.click()
    page.get_by_text("Stopped. Nothing was scored.").wait_for()
    wait_for(lambda: threads_that_score() == 0 and stop.is_disabled())
    assert page.locator(f"{RESULTS}, {TOASTS}").count() == 0


def test_pressing_twice_asks_once(page, held):
    page.locator(".chart .line").first.wait_for()
    before = page.evaluate("history.length")
    page.get_by_label("Text", exact=True).fill("endless")
    page.get_by_role("button", name="Score").dblclick()
    page.keyboard.press("Control+Enter")
    wait_for(lambda: held[0])
    stop = page.get_by_role("button", name="Stop", exact=True)
    wait_for(stop.is_enabled)
    stop.click()
    page.get_by_text("Stopped. Nothing was scored.").wait_for()
    wait_for(lambda: threads_that_score() == 0)
    assert held[0] == ["endless"]
    assert page.evaluate("history.length") == before + 1


def test_an_error_makes_the_button_ready(page):
    page.locator(".chart .line").first.wait_for()
    _, stop = ask_on(page, "Text", "word " * 5000)
    page.get_by_text("25,000 characters; here at most 20,000").wait_for()
    wait_for(stop.is_disabled)
    score_text(page, "Another text.")


def test_who_closes_the_page_frees_the_place(browser, url, held):
    page = browser.new_page()
    page.goto(url)
    ask_on(page, "Text", "endless")
    wait_for(lambda: held[0])
    page.close()
    wait_for(lambda: threads_that_score() == 0)


def link_of(url, tab, values):
    """A link as any program can make it."""
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(values if isinstance(values, bytes) else json.dumps(values).encode())
    return f"{url}#{tab}={base64.urlsafe_b64encode(packed + packer.flush()).decode().rstrip('=')}"


CROWD = "".join(chr(0x4E00 + i * 37 % 20_000) for i in range(1_900))  # hardly compressible
MARKUP = "</textarea><img src=x onerror=alert(1)><script>alert(2)</script> \u202e"


@pytest.mark.parametrize(
    "text",
    [f"The list.\n\n  Its items.\t{MARKUP} naïve 漢字 🎉 e\u0301 \x07", CROWD, PROSE[:80] * 250],
    ids=["all kinds", "many letters", "20,000 characters"],
)
def test_the_address_restores_a_text(page, browser, text):
    """What one browser scored, another one shows."""
    ask_on(page, "Text", text)
    page.locator(".surprisal b").first.wait_for()
    page.wait_for_function("location.hash.startsWith('#text=')")
    other = browser.new_page()
    asked, dialogs = [], []
    other.on("request", lambda request: asked.append(request))
    other.on("dialog", lambda dialog: dialogs.append(dialog) or dialog.dismiss())
    other.goto(page.url)
    other.locator(".surprisal b").first.wait_for()
    assert other.get_by_label("Text", exact=True).input_value() == text
    shown = [p.locator(".verdict").first.inner_text() for p in (page, other)]
    assert shown[0] == shown[1]
    assert other.locator(".notice").inner_text() == ""
    assert (other.url, dialogs) == (page.url, [])
    fragment = page.url.partition("#")[2]
    sent = [f"{r.url} {r.post_data} {r.all_headers()}" for r in asked]
    assert any("/queue/join" in request for request in sent)
    assert [request for request in sent if fragment[:40] in request.partition("#")[0]] == []
    other.close()


def test_half_a_character_in_an_address(page):
    """A lone surrogate is told, as without an address, and restored."""
    page.locator(".chart .line").first.wait_for()
    set_text = """box => { box.value = "a" + String.fromCharCode(0xD800);
      box.dispatchEvent(new Event("input", { bubbles: true })); }"""
    page.get_by_label("Text", exact=True).evaluate(set_text)
    press(page, "Score")
    page.get_by_text("half a character").first.wait_for()
    page.reload()
    page.get_by_text("half a character").first.wait_for()
    code = "box => [box.value.length, box.value.charCodeAt(1)]"
    assert page.get_by_label("Text", exact=True).evaluate(code) == [2, 0xD800]


def test_an_address_restores_each_tab(page, url, settings):
    talk = settings.conversation_examples[0].text
    page.goto(link_of(url, "conversation", {"conversation": talk, "model": LABEL}))
    page.locator(".surprisal:visible b.unscored").first.wait_for()
    assert page.get_by_role("tab", name="Conversation").get_attribute("aria-selected") == "true"
    assert page.get_by_role("textbox", name="Conversation").input_value() == talk
    page.get_by_role("tab", name="Text").click()  # where the page is as it opens
    page.locator(".surprisal:visible b").first.wait_for()
    values = {"text_a": "The list.", "model_a": LABEL, "text_b": "", "model_b": OTHER}
    page.goto(link_of(f"{url}?__theme=dark", "compare", values))
    page.get_by_text("is less surprised, by").wait_for()
    assert page.get_by_label("Model B").input_value() == f"{OTHER}: random"
    page.goto(f"{url}?__theme=light#logits")
    page.get_by_role("button", name="Compute").wait_for()
    assert page.locator(".notice").inner_text() == ""


def test_back_and_forward(page, url):
    """From text to text, from tab to tab, and from another site."""
    page.locator(".surprisal b").first.wait_for()
    example = page.get_by_label("Text", exact=True).input_value()
    score_text(page, "First text.")
    score_text(page, "Second text.")
    ask_on(page, "Compare", "Third text.")
    page.get_by_text("surprises its model less").wait_for()
    page.get_by_role("tab", name="Logits").click()
    press(page, "Compute")
    page.get_by_text("There is no file").first.wait_for()
    page.wait_for_function("location.hash === '#logits'")

    def check(text):
        page.locator(".surprisal:visible div").filter(has_text=text).first.wait_for()
        label = "Text A" if text == "Third text." else "Text"
        assert page.get_by_label(label, exact=True).input_value() == text

    page.goto("about:blank")
    page.go_back()
    page.get_by_role("button", name="Compute").wait_for()
    for text in ("Third text.", "Second text.", "First text.", example):
        page.go_back()
        check(text)
    assert page.url == url
    for text in ("First text.", "Second text."):
        page.go_forward()
        check(text)
    page.goto("about:blank")
    page.go_back()
    check("Second text.")
    page.reload()
    check("Second text.")
    length = page.evaluate("history.length")
    press(page, "Score")  # the same again is no new entry
    check("Second text.")
    assert page.evaluate("history.length") == length


def test_back_stops_what_runs(page, held):
    running, release = held
    page.locator(".surprisal b").first.wait_for()
    example = page.get_by_label("Text", exact=True).input_value()
    ask_on(page, "Text", "endless")
    wait_for(lambda: running)
    release.set()
    page.go_back()
    page.locator(".surprisal div").filter(has_text=example).wait_for()
    wait_for(lambda: threads_that_score() == 0)
    assert page.locator(TOASTS).count() == 0


UNREADABLE = "The link could not be read, so it changed nothing here."
UNLISTED = "The link asks for a model that is not on the list. Choose one, and press the button."


@pytest.mark.parametrize(
    "fragment",
    ["#top", "#/a/b", "#text", "#text=", "#text=AAAA", "#text=%3Cb%3E", "#text=<b>", "#constructor",
     "#__proto__=AAAA", "#" + "x" * 10_000, "#text=" + "A" * 600_000],
    ids=lambda fragment: fragment[:20],
)  # fmt: skip
def test_an_address_of_something_else(page, url, settings, fragment):
    page.goto("about:blank")
    page.goto(url + fragment)
    page.get_by_role("status").filter(has_text=UNREADABLE).wait_for()
    page.locator(".surprisal b").first.wait_for()
    assert page.get_by_label("Text", exact=True).input_value() == settings.examples[0].text
    page.evaluate("location.hash = ''")
    page.locator(".notice:empty").wait_for(state="attached")


@pytest.mark.parametrize(
    "values",
    [[], None, "text", {"text": "a"}, {"text": ["a"], "model": LABEL}, {"text": "a", "model": 1},
     b'{"text": "\xff", "model": "x"}', b"{" + b" " * 10**8],
    ids=lambda values: str(values)[:20],
)  # fmt: skip
def test_an_address_with_other_values(page, url, settings, values):
    """The last one becomes 100 MB."""
    page.goto("about:blank")
    page.goto(link_of(url, "text", values))
    page.get_by_role("status").filter(has_text=UNREADABLE).wait_for()
    assert page.get_by_label("Text", exact=True).input_value() == settings.examples[0].text
    assert violations(page) == []


def test_an_address_with_a_model_that_is_not_listed(page, url):
    """The text is there, and nothing is scored under another model."""
    dialogs = []
    page.on("dialog", lambda dialog: dialogs.append(dialog) or dialog.dismiss())
    page.goto("about:blank")
    page.goto(link_of(url, "text", {"text": MARKUP, "model": MARKUP}))
    page.get_by_role("status").filter(has_text=UNLISTED).wait_for()
    assert page.get_by_label("Text", exact=True).input_value() == MARKUP
    choice = page.get_by_label("Model", exact=True).first
    assert choice.input_value() == f"{LABEL}: 2.4M parameters, Python documentation"
    assert page.locator(".surprisal b").count() == 0
    assert page.locator(".gradio-container img, .gradio-container script").count() == 0
    press(page, "Score")
    page.locator(".surprisal b").first.wait_for()
    assert page.locator(".notice").inner_text() == ""
    assert dialogs == []


@pytest.mark.parametrize("is_allowed", [True, False])
def test_copy_link(browser, url, is_allowed):
    """By the keyboard; where a browser keeps the clipboard to itself, the address has the link."""
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    if is_allowed:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
    else:
        page.add_init_script("navigator.clipboard.writeText = () => Promise.reject()")
    page.goto(f"{url}?__theme=light")
    page.locator(".surprisal b").first.wait_for()
    page.get_by_label("Text", exact=True).fill("A text to pass on.")
    button = page.locator("#text-copy")
    widths = [button.bounding_box()["width"]]
    button.press("Enter")
    told = "Link copied" if is_allowed else "In the address"
    page.get_by_role("status").filter(has_text=told).wait_for()
    page.locator("#text-copy", has_text=told).wait_for()
    widths.append(button.bounding_box()["width"])
    assert violations(page) == []
    link = page.evaluate("navigator.clipboard.readText()") if is_allowed else page.url
    page.locator("#text-copy", has_text="Copy link").wait_for()
    assert widths[0] == widths[1]
    assert link.startswith(f"{url}?__theme=light#text=")
    page.goto("about:blank")
    page.goto(link)
    page.locator(".surprisal div", has_text="A text to pass on.").wait_for()
    context.close()


def test_a_link_in_a_narrow_window(browser, url):
    """As one that is magnified: Gradio has the last tabs in a menu there."""
    page = browser.new_page(viewport={"width": 320, "height": 700})
    page.set_default_timeout(10000)
    values = {"text_a": "The list.", "model_a": LABEL, "text_b": "A list.", "model_b": LABEL}
    page.goto(link_of(url, "compare", values))
    page.locator(".pair b").first.wait_for()
    for button in page.locator(".asking:visible button").all():
        box = button.bounding_box()
        assert box["x"] + box["width"] <= 320
    page.close()


SHIFTS = """new PerformanceObserver((list) => {
  for (const { value } of list.getEntries()) window.shifted = (window.shifted ?? 0) + value;
}).observe({ type: "layout-shift", buffered: true })"""


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_jumps(browser, url, width):
    """Neither while the page opens nor when another text is scored: a cumulative layout shift below
    0.05, where web.dev calls 0.1 good."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.add_init_script(SHIFTS)
    page.goto(url)
    page.locator(".chart path:visible").first.wait_for()
    score_text(page, PROSE * 10)
    page.wait_for_timeout(500)
    assert page.evaluate("window.shifted ?? 0") < 0.05
    page.close()


@pytest.mark.parametrize(("width", "fragment"), [(390, "#foreign"), (1280, "")])
def test_nothing_jumps_for_a_link_or_a_stop(browser, url, held, width, fragment):
    """On a phone once the page is there: Gradio draws its parts one after the other."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.add_init_script(SHIFTS)
    link = link_of(url, "text", {"text": "The list.", "model": LABEL})
    page.goto(url + fragment if fragment else link)
    stop = page.get_by_role("button", name="Stop", exact=True)
    if fragment:
        page.locator(".surprisal b").first.wait_for()
    else:
        wait_for(stop.is_enabled)
        stop.click()
        page.get_by_text("Stopped. Nothing was scored.").wait_for()
    if width == 390:
        page.evaluate("window.shifted = 0")
    ask_on(page, "Text", "endless")
    wait_for(lambda: "endless" in held[0])
    stop.click()
    page.get_by_text("Stopped. Nothing was scored.").wait_for()
    page.locator("#text-copy").click()
    page.wait_for_timeout(2500)  # until that button has its name again
    assert page.evaluate("window.shifted ?? 0") < 0.05
    page.close()


def test_no_old_result_beside_a_new_text(page, held):
    """Neither while that is scored nor after an error; and the progress stands in one place."""
    results = page.locator(".surprisal:visible, .verdict p:visible")
    page.locator(".surprisal:visible").first.wait_for()
    assert results.count() == 3
    page.get_by_label("Text", exact=True).fill(PROSE)
    press(page, "Score")
    page.get_by_text("1 of 2 tokens").wait_for()
    assert page.locator("[data-testid=status-tracker]:not(.hide):visible").count() == 1
    assert results.count() == 0
    held[1].set()
    page.locator(".surprisal:visible").wait_for()
    page.get_by_label("Text", exact=True).fill("word " * 5000)
    press(page, "Score")
    page.get_by_text("25,000 characters; here at most 20,000").wait_for()
    assert results.count() == 0


def test_the_heatmap_on_paper_and_in_forced_colours(page):
    tokens = score_text(page, PROSE * 10)
    ground = "(token) => getComputedStyle(token).backgroundColor"
    grounds = [tokens.nth(i).evaluate(ground) for i in range(3)]
    assert len(set(grounds)) == 3
    box = page.locator(".surprisal .text")
    is_whole = "(box) => box.scrollHeight === box.clientHeight"
    assert not box.evaluate(is_whole)
    page.emulate_media(media="print")
    assert box.evaluate(is_whole)
    assert tokens.first.evaluate("(token) => getComputedStyle(token).printColorAdjust") == "exact"
    assert page.locator("textarea:visible, .surprisal b:visible").count() == tokens.count()
    page.emulate_media(media="screen", forced_colors="active")
    assert [tokens.nth(i).evaluate(ground) for i in range(3)] == grounds


FOCUSED = "(token) => token === document.activeElement"


def test_the_panel_of_one_token(page):
    """Pinned by a click or a key: its figures are those of `score`."""
    tokens = score_text(page, PROSE.strip())
    (expected,) = Perplexity().score([PROSE.strip()], model_id=TINY, top_k=service.TOP_K)
    panel = page.get_by_label("One token", exact=True)
    most = int(np.argmax(expected.nll))  # pinned at first
    assert f"{expected.nll[most] / math.log(2):.2f} bits" in panel.inner_text()

    def check(i):
        told = panel.inner_text()
        bits = expected.nll[i] / math.log(2)
        assert f"“{expected.tokens[i]}” {bits:.2f} bits" in told
        assert f"rank {expected.ranks[i]:,}" in told
        assert f"entropy of the prediction {expected.entropy[i] / math.log(2):.2f} bits" in told
        before = expected.text[: expected.offsets[i][0]].rstrip()
        read = panel.locator(".read").inner_text().strip()
        if read.startswith("… "):  # the last of it, whole words
            assert 70 < len(read) <= 92
            assert before.endswith(f" {read[2:]}")
        else:
            assert read == (before or "nothing")
        bars = panel.locator("li")
        assert bars.count() == service.TOP_K
        for j, (token, nll) in enumerate(expected.expected[i]):
            shown = heatmap.visible(token, line_ends=False)
            assert f"“{shown}”" in bars.nth(j).inner_text()
            width = bars.nth(j).evaluate("bar => bar.style.getPropertyValue('--percent')")
            assert float(width.strip("%")) == pytest.approx(100 * math.exp(-nll), rel=0.06)

    tokens.nth(3).click()
    check(3)
    tokens.first.focus()
    for key, i in (("ArrowRight", 1), ("End", len(expected.nll) - 1), ("Home", 0)):
        page.keyboard.press(key)
        assert tokens.nth(i).evaluate(FOCUSED)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    check(1)
    assert page.locator(".text .pinned").count() == 1
    assert [tokens.nth(i).get_attribute("tabindex") for i in range(3)] == ["-1", "0", "-1"]


def test_a_tooltip_can_be_reached_and_closed(page):
    """WCAG 1.4.13: the mouse may enter it, and Escape closes it."""
    tokens = score_text(page, PROSE)
    is_open = """(token) => {
      const { content, display } = getComputedStyle(token, "::after");
      return content !== "none" && display !== "none"; }"""
    tokens.nth(3).hover()
    box = tokens.nth(3).bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] - 20, steps=10)
    assert tokens.nth(3).evaluate("(token) => token.matches(':hover')")
    assert tokens.nth(3).evaluate(is_open)
    page.keyboard.press("Escape")
    page.wait_for_timeout(100)  # in which another token, now under the mouse, could open its own
    assert not any(token.evaluate(is_open) for token in tokens.all())
    page.mouse.move(0, 0)
    tokens.nth(4).focus()
    assert tokens.nth(4).evaluate(is_open)


def test_control_enter_scores(page):
    page.locator(".surprisal b").first.wait_for()
    box = page.get_by_label("Text", exact=True)
    box.fill("Another text.")
    box.press("Control+Enter")
    page.locator(".surprisal .text", has_text="Another text.").wait_for()


def test_what_a_screen_reader_is_told(page):
    """The result, the name of the chart, and the text as a text."""
    page.get_by_role("status").filter(has_text="as uncertain as a choice").wait_for()
    page.get_by_label("Surprisal along the text in bits, of each token", exact=True).wait_for()
    assert page.locator(".surprisal .text [role], .surprisal b[aria-label]").count() == 0


ARABIC = "تعيد الدالة عدد العناصر"


def test_a_text_that_runs_from_right_to_left(page):
    """In the box and in the heatmap; its letters stay joined, and the arrow keys go with it."""
    box = page.get_by_label("Text", exact=True)
    assert box.evaluate("box => getComputedStyle(box).unicodeBidi") == "plaintext"
    tokens = score_text(page, ARABIC)
    assert page.locator(".surprisal .text").inner_text() == ARABIC
    lefts = [tokens.nth(i).bounding_box()["x"] for i in range(tokens.count())]
    assert lefts == sorted(lefts, reverse=True)
    right = page.locator(".surprisal .text").evaluate("div => div.getBoundingClientRect().right")
    assert right - lefts[0] < 50
    joined = """div => {
      const widthOf = (element) => {
        const all = document.createRange(); all.selectNodeContents(element);
        return all.getBoundingClientRect().width; };
      const plain = div.cloneNode(); plain.textContent = div.textContent; div.after(plain);
      const difference = Math.abs(widthOf(div) - widthOf(plain));
      plain.remove(); return difference; }"""
    assert page.locator(".surprisal .text").evaluate(joined) < 1
    head = page.locator(".panel strong")
    figure = "strong => strong.lastChild.textContent.trim().split(' ')[1]"
    assert head.evaluate(figure) == "bits"
    assert head.locator("bdi").bounding_box()["x"] == head.bounding_box()["x"]
    tokens.first.focus()
    page.keyboard.press("ArrowLeft")
    assert tokens.nth(1).evaluate(FOCUSED)


def test_markup_in_the_text_stays_text(page):
    text = "<img src=x onerror=alert(1)><script>alert(2)"
    dialogs = []
    page.on("dialog", lambda dialog: dialogs.append(dialog) or dialog.dismiss())
    score_text(page, text)
    assert page.locator(".surprisal img, .surprisal script").count() == 0
    assert (
        page.locator(".surprisal .text").inner_text()
        == "<img src=x onerror=alert(1)><script>aler" + "t(2)"
    )
    assert dialogs == []


def test_the_page_opens_with_an_example_and_its_score(page, settings):
    """And says what the number means."""
    first = settings.examples[0].text
    assert page.get_by_label("Text", exact=True).input_value() == first
    page.locator(".surprisal b").first.wait_for()
    assert page.locator(".surprisal .text").inner_text() == first
    perplexity = Perplexity().compute(predictions=[first], model_id=TINY)["perplexity"]
    verdict = page.locator(".verdict").first.inner_text()
    assert f"as uncertain as a choice among {perplexity:.0f} equally likely tokens" in verdict
    assert "On Python documentation that it was not trained on, this model has 71." in verdict
    choice = page.get_by_label("Model", exact=True).first.input_value()
    assert choice == f"{LABEL}: 2.4M parameters, Python documentation"


def test_a_page_opens_before_its_model_is_loaded(settings, outside, monkeypatch):
    """The text is there, its score is not; a later visitor sees both."""
    release, metrics_load = threading.Event(), models._load
    monkeypatch.setattr(models, "PATIENCE_S", 0)
    monkeypatch.setattr(models, "_load", lambda model: release.wait(60) and metrics_load(model))
    metrics = service.Metrics(settings)
    first = handlers.make_handlers(settings, metrics)["first"]
    assert first() == gradio.skip()
    release.set()
    wait_for(lambda: LABEL not in metrics.models.absent())
    line, data = first()
    assert "**Perplexity 23.1**" in line
    monkeypatch.setattr(metrics, "score", None)  # once is enough
    assert first()[1] is data
    metrics.end(0)


def test_an_example_and_an_over_long_text(page, settings):
    choose_example(page, settings.examples[2])
    press(page, "Score")
    page.get_by_text("9,030 equally likely").wait_for()
    page.get_by_label("Text", exact=True).fill("word " * 5000)
    press(page, "Score")
    page.get_by_text("25,000 characters; here at most 20,000").wait_for()
    assert "Traceback" not in page.content()


def test_a_conversation_in_the_browser(page, url, settings):
    for theme in ("light", "dark"):
        page.goto(f"{url}?__theme={theme}")
        page.get_by_role("tab", name="Conversation").click()
        choose_example(page, settings.conversation_examples[0])
        press(page, "Score")
        grey = page.locator(".surprisal b.unscored:visible").first
        grey.wait_for()
        scored = page.locator(".surprisal b:not(.unscored):visible").first
        colour = "(token) => getComputedStyle(token).color"
        assert grey.evaluate(colour) != scored.evaluate(colour)
        assert grey.evaluate(CONTRAST) >= 4.5
        wait_for(lambda: page.locator(PROGRESS).count() == 0)
        assert violations(page) == []
        assert (
            "Assistant:↵\nIt returns the" in page.locator(".surprisal:visible .text").inner_text()
        )


def compare_texts(page, text_a, text_b, model_b=LABEL):
    """The pieces of both sides."""
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Text A").fill(text_a)
    page.get_by_label("Text B").fill(text_b)
    if model_b != LABEL:
        # Gradio's list logs an error if it changes while it is open.
        page.get_by_text("Not available at the moment: Absent.").last.wait_for()
        page.get_by_label("Model B").fill(model_b)
        page.get_by_role("option", name=model_b).click()
    press(page, "Compare")
    sides = page.locator(".panes:visible section")
    sides.first.wait_for()
    return sides.nth(0).locator("b"), sides.nth(1).locator("b")


REVISED = PROSE.replace("is empty", "is not empty", 1)
COLOUR = "(e) => [e.classList.contains('more'), e.classList.contains('less'), e.style.cssText]"


def test_compare_in_the_browser(page):
    a, b = compare_texts(page, PROSE, REVISED)
    assert page.locator(".panes h2").all_inner_texts() == [f"A {LABEL}", f"B {LABEL}"]
    assert page.locator(".panes .text").nth(1).inner_text().startswith(REVISED[:60])
    assert page.locator(".score:visible table tr").count() == 5  # the statistics
    page.wait_for_timeout(500)  # Gradio fades a result in
    assert violations(page) == []
    # What only B has, and what both have behind it.
    alone = page.locator(".panes b.alone")
    assert alone.all_inner_texts() == ["not"]
    number = b.all_inner_texts().index("not")
    assert a.nth(number - 1).inner_text() == "is"
    alone.hover()
    tip = "(e) => getComputedStyle(e, '::after').content"
    assert "only in B" in alone.evaluate(tip)
    assert page.locator(".panes .pointed").count() == 1
    b.nth(number + 1).hover()
    assert a.nth(number).evaluate("(e) => e.classList.contains('pointed')")
    assert "A: " in b.nth(number + 1).evaluate(tip)
    # Each side has the colour of its own difference.
    of_a, of_b = a.nth(number).evaluate(COLOUR), b.nth(number + 1).evaluate(COLOUR)
    assert of_a == [of_b[1], of_b[0], of_b[2]]
    assert of_a[0] != of_a[1]
    page.get_by_label("Colour by").locator("visible=true").select_option("surprisal")
    assert not any(a.nth(number).evaluate(COLOUR)[:2])


def test_the_keys_of_a_comparison(page):
    """Each side is one stop of the tab key; what is chosen on one is shown for both."""
    a, b = compare_texts(page, PROSE, REVISED)
    assert page.locator('.panes [tabindex="0"]').count() == 2
    number = b.all_inner_texts().index("not")
    a.nth(0).focus()
    page.keyboard.press("Tab")
    assert b.nth(0).evaluate(FOCUSED)
    for _ in range(number + 1):
        page.keyboard.press("ArrowRight")
    assert b.nth(number + 1).evaluate(FOCUSED)
    page.keyboard.press("Enter")
    pinned = page.locator(".panes .pinned")
    assert pinned.all_inner_texts() == ["empty", "empty"]
    panel = page.locator(".panel:visible")
    head = panel.locator(".both").inner_text()
    assert re.search(r"“ empty” \d+\.\d\d bits (more|less) in B", head)
    assert panel.locator("ol").count() == 2
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert pinned.all_inner_texts() == ["not"]
    assert panel.inner_text().startswith("“ not” only in B")
    page.keyboard.press("End")
    assert b.last.evaluate(FOCUSED)
    # A tooltip of the focus in B is not in the way of one in A, and closes by Escape.
    a.nth(1).scroll_into_view_if_needed()
    a.nth(1).hover()
    tooltip = "(e) => getComputedStyle(e, '::after').display"
    assert (a.nth(1).evaluate(tooltip), b.last.evaluate(tooltip)) == ("block", "none")
    page.keyboard.press("Escape")
    assert a.nth(1).evaluate(tooltip) == "none"


def test_both_sides_scroll_to_the_same_place(page):
    """B has some more in the middle, so that its places are others; neither moves the other."""
    lines = [f"Line {i} is one of many lines.\n" for i in range(60)]
    more = [f"This text number {i} is in B alone.\n" for i in range(20)]
    a, b = compare_texts(page, "".join(lines), "".join([*lines[:30], *more, *lines[30:]]))
    boxes = page.locator(".panes .text")

    def scroll(side, share):
        """Of the way; where both then are."""
        to = "(box, share) => (box.scrollTop = share * (box.scrollHeight - box.clientHeight))"
        boxes.nth(side).evaluate(to, share)
        page.wait_for_timeout(100)
        tops = [boxes.nth(i).evaluate("(box) => box.scrollTop") for i in (0, 1)]
        page.wait_for_timeout(300)
        assert [boxes.nth(i).evaluate("(box) => box.scrollTop") for i in (0, 1)] == tops
        return tops

    def line(tokens, number):
        return tokens.nth(
            [i for i, t in enumerate(tokens.all_inner_texts()) if t == "many"][number]
        )

    def height(tokens, number):
        return line(tokens, number).bounding_box()["y"]

    assert scroll(0, 0.25)[1] > 0
    assert height(a, 18) == pytest.approx(height(b, 18), abs=15)
    scroll(1, 0.8)
    assert height(a, 47) == pytest.approx(height(b, 47), abs=15)
    room = "(box) => box.scrollHeight - box.clientHeight"
    assert scroll(0, 1)[1] == pytest.approx(boxes.nth(1).evaluate(room), abs=1)
    assert scroll(1, 0) == [0, 0]
    # A click on one side shows its place on the other, and moves nothing under the mouse.
    tops = scroll(0, 0.5)
    line(a, 29).click()
    page.wait_for_timeout(200)
    assert boxes.nth(0).evaluate("(box) => box.scrollTop") == tops[0]
    frame, shown = boxes.nth(1).bounding_box(), page.locator(".panes .pinned").nth(1).bounding_box()
    assert frame["y"] <= shown["y"] <= frame["y"] + frame["height"]


def saved_table(page):
    with page.expect_download() as download:
        page.locator("button:visible", has_text="Save CSV").click()
    assert download.value.suggested_filename == "comparison.csv"
    with open(download.value.path(), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_comparison_as_a_table(page):
    compare_texts(page, "It is new.", "It is not new.", OTHER)
    rows = saved_table(page)
    assert "".join(row["a_text"] for row in rows) == "It is new."
    assert "".join(row["b_text"] for row in rows) == "It is not new."
    (added,) = (row for row in rows if row["a_text"] == "" and row["b_text"].strip() == "not")
    assert (added["a_start"], added["difference"]) == ("", "")
    last = rows[-1]
    assert float(last["difference"]) == pytest.approx(
        float(last["b_bits"]) - float(last["a_bits"]), rel=1e-4
    )


DRAW = """async ([address, pair]) => {
  const { makePairView } = await import(`${address}/pair.js`);
  const view = makePairView();
  document.querySelector("main").replaceChildren(view.article);
  view.draw(pair);
}"""


def test_sides_that_cannot_be_aligned(page, url):
    """The tokens of a slow tokenizer have no places; some are infinitely surprising."""
    scores = Perplexity().score(["It is new.", "It is not new."], model_id=TINY)
    a, b = (views.LabelledScore("x", replace(score, offsets=None), "", {}) for score in scores)
    pair = pair_data(a, b)
    assert pair["pieces"] is None
    page.evaluate(DRAW, [f"{url.rstrip('/')}{ADDRESS}", pair])
    assert page.locator("main .text").all_inner_texts() == ["It is new.", "It is not new."]
    page.get_by_text("cannot be aligned").wait_for()
    assert page.get_by_label("Colour by").input_value() == "surprisal"
    assert page.locator("main .panes :is(.less, .more, .alone)").count() == 0
    first = page.locator("main .panes b").nth(1)
    first.hover()
    assert "in A" in first.get_attribute("data-tip")
    assert saved_table(page)[-1]["b_text"] == "."


def test_infinite_differences(page, url):
    scores = Perplexity().score(["It is new."] * 2, model_id=TINY)
    worse = replace(scores[0], nll=[math.inf] * len(scores[0].nll))
    a, b = (views.LabelledScore("x", score, "", {}) for score in (worse, scores[1]))
    page.evaluate(DRAW, [f"{url.rstrip('/')}{ADDRESS}", pair_data(a, b)])
    assert "infinite bits less in B" in page.locator("main .panel").inner_text()
    assert page.locator("main .panes .more").count() == len(scores[0].tokens)
    assert "Infinity" in {row["a_bits"] for row in saved_table(page)}
    assert {float(row["difference"]) for row in saved_table(page)} == {-math.inf}


def test_a_comparison_on_paper_and_in_forced_colours(page):
    a, _ = compare_texts(page, PROSE * 10, "", OTHER)
    ground = "(token) => getComputedStyle(token).backgroundColor"
    grounds = [a.nth(i).evaluate(ground) for i in range(3)]
    page.emulate_media(media="print")
    for box in page.locator(".panes .text").all():
        assert box.evaluate("(box) => box.scrollHeight === box.clientHeight")
    page.emulate_media(media="screen", forced_colors="active")
    assert [a.nth(i).evaluate(ground) for i in range(3)] == grounds


@pytest.mark.parametrize(("width", "is_beside"), [(1280, True), (640, True), (600, False)])
def test_both_sides_are_seen_without_a_jump(browser, url, width, is_beside):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.add_init_script(SHIFTS)
    page.goto(url)
    page.locator(".chart path:visible").first.wait_for()
    before = page.evaluate("window.shifted ?? 0")
    compare_texts(page, PROSE, REVISED)
    page.wait_for_timeout(500)
    assert page.evaluate("window.shifted ?? 0") - before < 0.05
    a, b = (page.locator(".panes .text").nth(i).bounding_box() for i in (0, 1))
    assert (a["y"] == b["y"]) == is_beside
    assert (a["x"] == b["x"]) != is_beside
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_upload_and_bad_upload(page, tmp_path):
    page.get_by_role("tab", name="Logits").click()
    press(page, "Make a small example file")
    page.locator("a[download='example.npz']").wait_for()
    press(page, "Compute")
    page.get_by_role("cell", name="perplexity", exact=True).wait_for()
    page.get_by_label("Clear").click()
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"no archive")
    page.locator("input[type=file]").set_input_files(str(bad))
    page.locator("a[download='bad.npz']").wait_for()
    press(page, "Compute")
    page.get_by_text("The file is no .npz archive").wait_for()


# The contrast of an element's colour to the first ground behind it that has one.
CONTRAST = """(element) => {
  const paint = document.createElement("canvas").getContext("2d");
  const channels = (colour) => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
    return paint.getImageData(0, 0, 1, 1).data;
  };
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  let ground = element;
  while (ground && channels(getComputedStyle(ground).backgroundColor)[3] < 255)
    ground = ground.parentElement;
  const behind = luminance(channels(getComputedStyle(ground).backgroundColor));
  const front = luminance(channels(getComputedStyle(element).color));
  return (Math.max(front, behind) + 0.05) / (Math.min(front, behind) + 0.05);
}"""


def test_a_text_under_two_models_in_the_browser(page, url):
    """The colours of the legend are the strongest that a token can have."""
    for theme in ("light", "dark"):
        page.goto(f"{url}?__theme={theme}")
        text = "Return the number <b>of</b> items."
        tokens, _ = compare_texts(page, text, "", OTHER)
        assert page.locator(".panes .text").all_inner_texts() == [text, text]
        tokens.nth(3).hover()
        tip = tokens.nth(3).evaluate("e => getComputedStyle(e, '::after').content")
        assert re.search(r"bits (more|less) in A", tip)
        assert "KL(A‖B) " in tip
        assert tip.count("expected “") == 2
        for element in page.locator(".surprisal:visible :is(i, b)").all():
            assert element.evaluate(CONTRAST) >= 4.5, element.evaluate("e => e.outerHTML")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1600])
def test_the_page_fits(browser, url, theme, width):
    """No sideways scrolling, a label on every control, and the contrast that WCAG 2.2 asks for."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(f"{url}?__theme={theme}")
    page.locator(".surprisal b").first.wait_for()
    for tab in ("Text", "Conversation", "Compare", "Logits"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for control in page.locator("textarea:visible, input:visible").all():
            named = control.evaluate(
                "c => !!(c.labels?.length || c.ariaLabel || c.getAttribute('aria-labelledby'))"
            )
            assert named, control.evaluate("c => c.outerHTML")
        if width > 390:
            assert violations(page) == []
        words = (
            "[role=tab][aria-selected=true], button.primary:visible, .surprisal b:visible, "
            "[data-testid='block-info']:visible"
        )
        for element in page.locator(words).all():
            assert element.evaluate(CONTRAST) >= 4.5, element.evaluate("e => e.outerHTML")
    page.close()


def test_the_page_asked_no_other_host(url, outside):
    """In all tests of this file before this one."""
    assert outside == []
