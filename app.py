"""The demo: paste a text and see what surprises a model; compare; check a file of logits.

    python app.py

app_config.yaml says what it offers, and how much of the machine a visitor may use. The numbers come
from demo/service.py, the sentences and pictures from demo/views.py and heatmap.py. This file is the
page, with its errors and its bounds.
"""

import functools
import html
import logging
import math
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path

try:  # on a Space with ZeroGPU only, where it comes before torch
    import spaces  # pyright: ignore[reportMissingImports]
except ImportError:
    spaces = None

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from gradio import themes
from gradio.components import Component
from gradio.queueing import Event, Queue
from gradio.server_messages import EventMessage, ProcessCompletedMessage
from gradio.utils import get_upload_folder, is_in_or_equal
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse
from starlette.middleware import Middleware

import metric_package
from demo.body import BoundedBody
from demo.logits_file import write_example
from demo.service import Metrics, Visible
from demo.settings import Example, Settings, read_settings
from demo.views import (
    LabelledScore,
    chart,
    comparison,
    comparison_table,
    figures,
    logits_table,
    side_by_side,
    verdict,
)

heatmap = metric_package.sibling("heatmap")
TOKENS, WORDS = "tokens", "words"  # what a heatmap can show
CONVERSATION_HINT = """User: …
Assistant: …

or JSON: [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]"""
MESSAGE_CHARACTERS = 400  # of a message to a visitor, which may repeat what they sent
# Gradio keeps the texts and results of this many visitors in memory, up to 4 MB each. This page
# never reads them again.
SESSIONS = 10
logger = logging.getLogger(__name__)

# The arrow keys move from token to token. The tab key moves to the first one, then past them all.
ARROW_KEYS = """
element.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const token = document.activeElement;
  if (!step || !token.matches(".surprisal b")) return;
  const next = step > 0 ? token.nextElementSibling : token.previousElementSibling;
  if (next) { next.focus(); event.preventDefault(); }
});
"""
# Four tabs fit on a phone, where Gradio would hide some in a menu.
# Gradio writes a prefix behind each comma, so that no list may stand in `:is()`.
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
@media (max-width: 480px) { .tab-container button { padding: 0 7px !important; } }
.verdict { font-size: 1.1em; }
.results :is(td, th) { padding: 5px 8px !important; font-size: 0.9em; }
.results :is(td, th):not(:last-child) { white-space: nowrap; }
.html-container { padding: 0 !important; } /* in line with the text above */
.statistics { border: 0; padding: 0; font-variant-numeric: tabular-nums; }
.statistics tr { border: 0; }
.statistics td, .statistics th { padding: 4px 0 4px clamp(8px, 2vw, 24px); border: 0;
  border-bottom: 1px solid var(--border-color-primary); text-align: right; vertical-align: bottom;
  font-weight: normal; }
.statistics tr:first-child th { min-width: 5.2em; overflow-wrap: anywhere; }
.statistics th:first-child { min-width: 0 !important; padding-left: 0; text-align: left; }
.sides { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
.results code { white-space: normal; overflow-wrap: anywhere; }
"""


def told(handler: Callable) -> Callable:
    """The handler. Gradio shows its `Visible` errors to the visitor; others are logged."""

    @functools.wraps(handler)
    def wrapped(*args, **kwargs):
        try:
            return handler(*args, **kwargs)
        except Visible as error:
            # Gradio renders HTML in it, and parts of it may come from the visitor.
            message = html.escape(heatmap.visible(str(error)[:MESSAGE_CHARACTERS]))
        except Exception:
            logger.exception("a visitor's request failed")
            message = "This failed, for a reason that only the log of the server shows."
        raise gr.Error(message, title="Not possible", print_exception=False)

    return wrapped


def on_gpu(handler: Callable) -> Callable:
    """The handler with a GPU, on a Space with ZeroGPU."""
    return handler if spaces is None else spaces.GPU(handler)


def as_json(result: dict) -> dict:
    """The result with null for NaN and a string for infinity, which JSON does not have."""
    return {
        name: (None if math.isnan(value) else str(value))
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in result.items()
    }


def make_handlers(settings: Settings) -> dict[str, Callable]:
    """What the endpoints do, by their names, and `score_again`, a change of what /score shows."""
    metrics = Metrics(settings)
    directory = tempfile.TemporaryDirectory(prefix="perplexity-demo-")  # deleted at exit
    write_example(Path(directory.name) / "example.npz")

    @on_gpu
    @told
    def score(text: str, model: str, show: str, progress=gr.Progress()):  # noqa: B008, Gradio's way
        words = show == WORDS
        return shown(metrics.score(text, model, _shown_by(progress), words), words)

    def score_again(text: str, model: str, show: str, progress=gr.Progress()):  # noqa: B008
        return score(text, model, show, progress) if text and text.strip() else gr.skip()

    @on_gpu
    @told
    def converse(conversation: str, model: str, progress=gr.Progress()):  # noqa: B008
        return shown(metrics.converse(conversation, model, _shown_by(progress)))

    @on_gpu
    @told
    def compare(text_a: str, model_a: str, text_b: str, model_b: str, progress=gr.Progress()):  # noqa: B008
        tell = _shown_by(progress)
        text_b = text_b if text_b and text_b.strip() else text_a
        if text_a == text_b:
            pair = metrics.compare(text_a, model_a, model_b, tell)
            if pair is not None:
                picture = heatmap.difference_heatmap(pair.comparison, "A", "B")
                return comparison(pair.a, pair.b), comparison_table(pair.a, pair.b, pair), picture
        a = metrics.score(text_a, model_a, tell)
        b = metrics.score(text_b, model_b, tell)
        return comparison(a, b), comparison_table(a, b), side_by_side(a, b)

    @told
    def logits(file, from_logits: bool, ignore_index: str, mask_token_id: str, shift: bool):
        result, notes = metrics.logits(file, from_logits, ignore_index, mask_token_id, shift)
        return logits_table(result, notes), as_json(result)

    def example():
        return str(Path(directory.name) / "example.npz")

    return {
        "score": score,
        "score_again": score_again,
        "conversation": converse,
        "compare": compare,
        "logits": logits,
        "example": example,
    }


def shown(labelled: LabelledScore, words: bool = False) -> tuple:
    """A score as the page shows it: a line, a heatmap, a chart, and all figures."""
    result, score = figures(labelled), labelled.score
    del result["mean_perplexity"]  # for one text, the perplexity
    return verdict(result), heatmap.heatmap(score, words), chart(score), as_json(result)


class Page(gr.Blocks):
    """Gradio's page. It takes files only if they were uploaded, whichever field they come in. The
    last fields of a call may be left out, however it is sent."""

    async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
        """Refuse other files here: Gradio fetches any address before a field sees it.

        Raises:
            gr.Error: the file was not uploaded.
        """
        traverse(inputs, _refuse_from_elsewhere, is_file_obj_with_meta)
        # Gradio's client does the same; other programs send what they know of.
        inputs = [*inputs, *(field.value for field in block_fn.inputs[len(inputs) :])]
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def _refuse_from_elsewhere(file: dict) -> None:
    path = file["path"]
    if is_http_url_like(path) or not is_in_or_equal(path, get_upload_folder()):
        message = "The file was not uploaded. Upload the file here."
        raise gr.Error(message, title="Not possible", print_exception=False)


def _shown_by(progress: gr.Progress) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        progress(done / total, desc=f"{done:,} of {total:,} tokens")

    return show


def keep_latest_results(queue: Queue, most: int) -> None:
    """Drop all but the latest results that nobody fetched; Gradio would keep them all."""
    waiting = deque()
    send = queue.send_message

    def send_message(event: Event, event_message: EventMessage) -> None:
        if isinstance(event_message, ProcessCompletedMessage):
            waiting.append(weakref.ref(event_message, waiting.remove))  # removed when it is fetched
            if len(waiting) > most:
                oldest = waiting.popleft()()
                oldest.success = False
                oldest.output = {"error": "Nobody fetched this result in time. Ask again."}
        send(event, event_message)

    queue.send_message = send_message


def make_app(settings: Settings) -> gr.Blocks:
    """The page."""
    handlers = make_handlers(settings)
    labels = [model.label for model in settings.models]
    limits, queue = settings.limits, settings.queue
    # Besides the visitors who score, one for each model may be loading it.
    at_once = queue.concurrency + len(settings.models)
    of_model = {"concurrency_id": "model", "concurrency_limit": at_once}

    def text_box(label: str, **more) -> gr.Textbox:
        return gr.Textbox(label=label, lines=5, max_lines=14, **more)

    def model_choice(label: str) -> gr.Dropdown:
        return gr.Dropdown(labels, value=settings.default_model, label=label)

    def examples_of(examples: list[Example], box: gr.Textbox) -> None:
        gr.Examples(
            [[example.text] for example in examples],
            [box],
            example_labels=[example.label for example in examples],
            api_visibility="private",
        )

    def score_outputs(title: str) -> list[Component]:
        line = gr.Markdown(elem_classes="verdict")
        picture = gr.HTML(js_on_load=ARROW_KEYS)
        points = gr.LinePlot(
            x="token", y="bits", label=title, height=240,
            x_title="token", y_title="bits", y_lim=[0, None],
        )  # fmt: skip
        with gr.Accordion("All figures", open=False):
            result = gr.JSON(label="Result")
        return [line, picture, points, result]

    # Uploads are deleted after an hour. Nothing else that a visitor sends is written to disk.
    # Gradio's memory keeps the texts and results of the last SESSIONS visitors, and at most
    # queue.size results that nobody fetched.
    with Page(title=settings.title, analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown(f"# {settings.title}\n\n{settings.intro}")
        with gr.Tab("Text"):
            text = text_box("Text")
            examples_of(settings.examples, text)
            with gr.Row():
                model = model_choice("Model")
                show = gr.Radio([TOKENS, WORDS], value=TOKENS, label="Show", min_width=200)
            button = gr.Button("Score", variant="primary")
            inputs, outputs = [text, model, show], score_outputs("Surprisal along the text")
            button.click(handlers["score"], inputs, outputs, api_name="score", **of_model)
            show.input(
                handlers["score_again"], inputs, outputs, api_visibility="private", **of_model
            )
        with gr.Tab("Conversation"):
            gr.Markdown(
                "How surprised is the model by what the assistant says? All else is grey: it only "
                "conditions what follows. A model without a chat template of its own, such as the "
                "bundled one or GPT-2, was not trained on conversations and reads plain lines."
            )
            conversation = text_box("Conversation", placeholder=CONVERSATION_HINT)
            examples_of(settings.conversation_examples, conversation)
            model = model_choice("Model")
            button = gr.Button("Score", variant="primary")
            outputs = score_outputs("Surprisal of what the assistant says")
            button.click(
                handlers["conversation"],
                [conversation, model],
                outputs,
                api_name="conversation",
                **of_model,
            )
        with gr.Tab("Compare"):
            gr.Markdown(
                "Two texts under one model; or one text under two models, with the second text "
                "left empty. If both models have the same tokens, each token shows by how much B "
                "is less or more surprised than A; if not, only bits per byte can be compared."
            )
            with gr.Row():
                with gr.Column(min_width=300):
                    text_a, model_a = text_box("Text A"), model_choice("Model A")
                with gr.Column(min_width=300):
                    text_b = text_box("Text B", placeholder="Empty: the same as text A")
                    model_b = model_choice("Model B")
            button = gr.Button("Compare", variant="primary")
            line = gr.Markdown(elem_classes="verdict")
            table = gr.HTML()
            picture = gr.HTML(js_on_load=ARROW_KEYS)
            shown = [line, table, picture]
            inputs = [text_a, model_a, text_b, model_b]
            button.click(
                handlers["compare"],
                inputs,
                shown,
                api_name="compare",
                show_progress_on=picture,
                **of_model,
            )
        with gr.Tab("Logits"):
            gr.Markdown(
                "An .npz or .safetensors file with `logits` (B, T, V), `labels` (B, T) and, if you "
                f"like, `sample_weight` (B, T) or (B,); at most {limits.file_mb} MB."
            )
            file = gr.File(label="File", file_types=[".npz", ".safetensors"], height=140)
            make_example = gr.Button("Make a small example file")
            with gr.Row():
                from_logits = gr.Checkbox(
                    True, label="from_logits", info="off: probabilities", min_width=200
                )
                shift = gr.Checkbox(
                    False, label="shift", info="on: labels are the input ids", min_width=200
                )
            with gr.Row():
                ignore_index = gr.Textbox(
                    "-100", label="ignore_index", info="ids, with commas; or empty", min_width=200
                )
                mask_token_id = gr.Textbox(
                    "", label="mask_token_id", info="one more id; or empty", min_width=200
                )
            button = gr.Button("Compute", variant="primary")
            table = gr.Markdown(elem_classes="results")
            with gr.Accordion("All figures", open=False):
                result = gr.JSON(label="Result")
            make_example.click(handlers["example"], None, file, api_name="example")
            inputs = [file, from_logits, ignore_index, mask_token_id, shift]
            button.click(
                handlers["logits"], inputs, [table, result], api_name="logits", concurrency_limit=1
            )
    app.queue(max_size=queue.size)
    keep_latest_results(app._queue, queue.size)
    return app


def launch(app: gr.Blocks, settings: Settings, **more) -> tuple:
    """Serve the page. Nothing leaves the machine; make_app says what is kept of a visitor."""
    # Gradio's bold fonts lack many letters, which the system's fonts have. Gradio's hints and main
    # button have too little contrast (WCAG 2.2 asks for 4.5).
    theme = getattr(themes, settings.theme.capitalize())(
        font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    ).set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )
    return app.launch(
        app_kwargs={"middleware": [Middleware(BoundedBody, settings.limits)]},
        theme=theme,
        css=CSS,
        max_file_size=f"{settings.limits.file_mb}mb",
        state_session_capacity=SESSIONS,
        run_history=False,
        share=False,
        ssr_mode=False,
        show_error=False,
        footer_links=[],
        **more,
    )


if __name__ == "__main__":
    chosen = read_settings(Path(__file__).resolve().with_name("app_config.yaml"))
    launch(make_app(chosen), chosen)
