"""The buttons that ask for a score, stop it, and copy a link to it; and what such a link restores.

demo/link.js does the work in the browser: the server sees nothing of a link.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from demo.body import most_bytes
from demo.queueing import stop
from demo.settings import Settings

LINK_JS = (Path(__file__).parent / "link.js").read_text(encoding="utf-8")
# Of a call that answers at once: around the queue, and without a sign of progress.
UNSEEN: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
NOTICES = '<p class="notice" role="status"></p><p class="said" role="status"></p>'


class Asking:
    """The buttons of a tab, in a row, and its fields, which a link restores."""

    def __init__(self, tab: str, action: str, **fields: Component):
        """
        Args:
            tab: the id of the tab.
            action: what the first button says, such as Score.
            fields: by their names in a link; one that begins with "model" is that of a model.
        """
        self.tab, self.fields = tab, fields
        with gr.Row(elem_classes="asking"):
            ids = {name: f"{tab}-{name}" for name in ("score", "stop", "copy")}
            self._score = gr.Button(action, variant="primary", elem_id=ids["score"], min_width=90)
            self._stop = gr.Button("Stop", interactive=False, elem_id=ids["stop"], min_width=70)
            self._copy = gr.Button("Copy link", elem_id=ids["copy"], min_width=130)

    def connect(
        self,
        page: gr.Blocks,
        handler: Callable,
        inputs: list[Component],
        outputs: list[Component],
        api_name: str,
        **more,
    ) -> None:
        """Let the buttons call the handler, stop it, and copy a link.

        Args:
            outputs: the first one takes a sentence.
            more: of the handler's event.
        """

        async def stop_mine(request: gr.Request) -> None:
            stop(page._queue, request.session_hash, api_name)

        values, count = list(self.fields.values()), len(outputs)
        ask = f"(...values) => demo.ask('{self.tab}', values, {count})"
        run = self._score.click(
            None, values, [*outputs, self._stop], js=ask, api_visibility="private"
        ).then(handler, inputs, outputs, api_name=api_name, **more)
        for ended in (run.then, run.failure):  # Gradio's `then` skips errors
            done = f"() => demo.done('{self.tab}')"
            ended(None, None, self._stop, js=done, api_visibility="private")
        told = f"() => demo.stop('{self.tab}', {count})"
        self._stop.click(None, None, outputs, js=told, api_visibility="private").then(
            stop_mine, None, None, **UNSEEN
        )
        copy = f"(...values) => demo.copy('{self.tab}', values)"
        self._copy.click(None, values, self._copy, js=copy, api_visibility="private").then(
            None, None, self._copy, js="() => demo.copied()", api_visibility="private"
        )


class Links:
    """Reads a link when the page opens and when a visitor goes back, and presses the button."""

    def __init__(self, settings: Settings):
        opening = {"text": settings.examples[0].text, "model": settings.default_model}
        self._others: list[str] = []
        self._place = gr.HTML(
            NOTICES,
            elem_classes="link",
            js_on_load=LINK_JS,
            models=[model.label for model in settings.models],
            opening={"tab": "text", "values": opening},
            most_bytes=most_bytes(settings.limits),
        )

    def keep_tab(self, tab: str, button: gr.Button) -> None:
        """Keep which tab was used, when its button is pressed."""
        self._others.append(tab)
        js = f"() => demo.keep('{tab}', [])"
        button.click(None, None, None, js=js, api_visibility="private")

    def connect(self, asking: list[Asking], example: Callable, outputs: list[Component]) -> None:
        """Let a link restore the fields.

        Args:
            example: what fills these outputs where there is no link.
        """
        of_tabs = {one.tab: list(one.fields) for one in asking}
        self._place.props["fields"] = of_tabs | {tab: [] for tab in self._others}
        fields = [field for one in asking for field in one.fields.values()]
        restored = self._place.submit(
            None, None, fields, js="() => demo.restored()", api_visibility="private"
        )
        restored.then(None, None, None, js="() => demo.press()", api_visibility="private")
        self._place.select(example, None, outputs, **UNSEEN)
