"""How long does a visitor wait for a text of 2000 words, and then for what they touch?

The demo in a process of its own, Chromium beside it. `ppl.score` with the same model and text runs
in between, in this process, so that both meet the same machine. --busy N computes in N more.
"""

import argparse
import multiprocessing
import shutil
import statistics
import time

import httpx
from bench_demo import LABEL, LONG_WORDS, TINY, Server, texts, visit
from playwright.sync_api import Page, sync_playwright
from report import environment, table, write_section

from ppleval import Perplexity

RUNS = 7
SHIFTS = """new PerformanceObserver((list) => {
  for (const { value } of list.getEntries()) window.shifted = (window.shifted ?? 0) + value;
}).observe({ type: "layout-shift", buffered: true })"""
# Milliseconds from an action to the frame behind the one that shows it.
TIMED = """async (act) => {
  const frame = () => new Promise(requestAnimationFrame);
  await frame();
  const start = performance.now();
  act();
  await frame();
  await new Promise((resolve) => setTimeout(resolve));
  return performance.now() - start;
}"""
FOCUS = """const pieces = document.querySelectorAll(".text b");
  const piece = pieces[Math.floor(Math.random() * pieces.length)];
  piece.focus({ preventScroll: true });
  if (!getComputedStyle(piece, "::after").content.includes("bits")) throw "no tooltip";"""
PIN = """const pieces = document.querySelectorAll(".text b");
  pieces[Math.floor(Math.random() * pieces.length)].click();"""
CHOOSE = """const select = document.querySelector("select[aria-label='{label}']");
  select.value = "{value}"; select.dispatchEvent(new Event("change"));"""
ACTIONS = {
    "focus to tooltip": FOCUS,
    "click to panel": PIN,
    "colours by rank": CHOOSE.format(label="Colour by", value="rank"),
    "colours by surprisal": CHOOSE.format(label="Colour by", value="surprisal"),
    "words": CHOOSE.format(label="of each", value="word"),
    "sentences": CHOOSE.format(label="of each", value="sentence"),
    "tokens": CHOOSE.format(label="of each", value="token"),
}


def work() -> None:
    """Compute until the end."""
    while True:
        sum(range(10**6))


def score(page: Page, text: str) -> float:
    """Seconds from the click to the coloured text."""
    page.get_by_label("Text", exact=True).fill(text)
    page.evaluate("document.querySelector('.text').replaceChildren()")
    start = time.perf_counter()
    page.get_by_role("button", name="Score").click()
    page.locator(".text b").first.wait_for()
    return time.perf_counter() - start


def shifted(browser, url: str, width: int, text: str) -> float:
    """The cumulative layout shift while the page opens and a text is scored."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.add_init_script(SHIFTS)
    page.goto(url)
    page.locator(".text b").first.wait_for()
    score(page, text)
    page.wait_for_timeout(500)
    found = page.evaluate("window.shifted ?? 0")
    page.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=7951)
    parser.add_argument("--busy", type=int, default=0)
    args = parser.parse_args()
    busy = [multiprocessing.Process(target=work, daemon=True) for _ in range(args.busy)]
    for process in busy:
        process.start()
    long_texts = texts(LONG_WORDS)
    scorer = Perplexity().text_scorer(model_id=TINY)
    server = Server(args.port)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(server.url)
        page.locator(".text b").first.wait_for()
        asker = httpx.Client(base_url=server.url, timeout=60)
        of_module, of_program, of_page = [], [], []
        for text in [long_texts[-1], *long_texts[:RUNS]]:  # the first one warms both up
            start = time.perf_counter()
            list(scorer.score([text], top_k=5))
            of_module.append(time.perf_counter() - start)
            start = time.perf_counter()
            visit(asker, text, "192.0.2.1")
            of_program.append(time.perf_counter() - start)
            of_page.append(score(page, text))
        tokens = page.locator(".text b").count()
        actions = {
            name: [page.evaluate(f"({TIMED})(() => {{ {act} }})") for _ in range(RUNS)]
            for name, act in ACTIONS.items()
        }
        shifts = [shifted(browser, server.url, width, long_texts[0]) for width in (1280, 390)]
        browser.close()
    server.end()
    for process in busy:
        process.terminate()
    program, on_page = (
        statistics.median(found[1:]) / statistics.median(of_module[1:])
        for found in (of_program, of_page)
    )
    rows = [
        [name, f"{statistics.median(found):.0f}", f"{max(found):.0f}"]
        for name, found in actions.items()
    ]
    # Busy processes may slow down one of the two and not the other, so their ratio says nothing.
    beside_the_module = (
        f"A program has the answer of /score in {program:.2f} times the time of `ppl.score` with "
        f"top_k=5; from the click to the coloured text it is {on_page:.2f} times, with the browser "
        "on the same cores.\n\n"
    )
    body = (
        f"{environment(['torch', 'gradio', 'playwright'])}\n"
        f"{RUNS} texts of {LONG_WORDS} words, the last one {tokens:,} pieces, under the "
        f"{LABEL.lower()}; {args.busy} busy processes.\n\n"
        f"{'' if args.busy else beside_the_module}"
        f"{table(['milliseconds', 'median', 'highest'], rows)}\n"
        f"Cumulative layout shift while the page opens and a text is scored: {shifts[0]:.3f} at "
        f"1280 pixels, {shifts[1]:.3f} at 390.\n"
    )
    write_section(f"The page of the demo, beside {args.busy} busy processes", body)


if __name__ == "__main__":
    main()
