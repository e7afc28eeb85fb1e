"""Gradio's places for a score and a comparison, which demo/view/ draws from JSON in the browser.

The files of demo/view/ are JavaScript modules, sent as they are: there is no build step.
"""

import hashlib
from pathlib import Path

import gradio as gr
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles

from ppleval.show import heatmap

FOLDER = Path(__file__).parent / "view"
FILES = sorted(FOLDER.iterdir())
# Another version has another address, so no browser mixes files of two.
ADDRESS = f"/view-{hashlib.sha256(b''.join(f.read_bytes() for f in FILES)).hexdigest()[:12]}"
STYLE = heatmap.style(".surprisal b.tipped") + (FOLDER / "view.css").read_text(encoding="utf-8")


def routes() -> list[BaseRoute]:
    """Where the server sends the files from."""
    return [Mount(ADDRESS, StaticFiles(directory=FOLDER))]


def score_view() -> gr.HTML:
    """The view of one score. Its value is the JSON of `token_data.score_data`, or None."""
    return _view("score")


def pair_view() -> gr.HTML:
    """The view of a comparison. Its value is the JSON of pair_data.py, or None."""
    return _view("pair")


def _view(kind: str) -> gr.HTML:
    return gr.HTML(
        html_template=f'<style>{STYLE}</style><div class="view {kind}"></div>',
        js_on_load=f"import(`${{window.gradio_config.root}}{ADDRESS}/main.js`)"
        f".then(({{ start }}) => start(element, props, watch, '{kind}'))",
        apply_default_css=False,
    )
