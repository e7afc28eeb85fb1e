"""The demo: paste a text and see what surprises a model; compare; check a file of logits.

    python app.py

What it offers, and how much of the machine a visitor may use, stands in app_config.yaml. The
numbers come from the metric, the sentences and pictures from app_views.py and heatmap.py; here are
only the page, the limits, and the errors that a visitor is told.
"""

import contextlib
import functools
import html
import inspect
import logging
import math
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

with contextlib.suppress(ImportError):  # of a Space with ZeroGPU, which wants to come before torch
    import spaces

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import evaluate
import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from app_settings import Model, Settings, read_settings
from app_views import Scored, chart, comparison, figures, logits_table, verdict
from heatmap import heatmap, visible
from logits_file import read_logits_file, write_example

HERE = Path(__file__).resolve().parent
TOP_K = 5
MESSAGE_CHARACTERS = 400  # of what a visitor is told, which may repeat what was sent
MOST_IGNORED_IDS = 16  # each takes a pass over the labels
logger = logging.getLogger(__name__)

# The arrow keys go from token to token; the tab key leads to the first one and past them all.
ARROW_KEYS = """
element.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const token = document.activeElement;
  if (!step || !token.matches(".surprisal b")) return;
  const next = step > 0 ? token.nextElementSibling : token.previousElementSibling;
  if (next) { next.focus(); event.preventDefault(); }
});
"""
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.verdict { font-size: 1.1em; }
.results :is(td, th) { padding: 5px 8px !important; font-size: 0.9em; }
.results :is(td, th):not(:last-child) { white-space: nowrap; }
.results code { white-space: normal; overflow-wrap: anywhere; }
"""


class Visible(Exception):  # noqa: N818
    """What a visitor is told, in a sentence."""


class Metrics:
    """One metric for each listed model, loaded when it is first asked for, and one for logits."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._models = {model.label: model for model in settings.models}
        self._locks = {label: threading.Lock() for label in self._models}
        self._scorers = {}
        self.logits = self._load()
        # A warning of the metric is shown to whom it concerns; Python catches them for all threads.
        self.logits_lock = threading.Lock()

    def warned(self, warning: warnings.WarningMessage) -> bool:
        """Whether it is the metric's, and not that of another thread."""
        package = Path(inspect.getfile(type(self.logits))).parent
        return warning.category is UserWarning and Path(warning.filename).parent in (package, HERE)

    @staticmethod
    def _load():
        return evaluate.load(str(HERE / "perplexity.py"))

    def scorer(self, label: str):
        """The metric's `text_scorer` of a listed model.

        Raises:
            Visible: the model is not listed, or cannot be loaded.
        """
        if not isinstance(label, str) or label not in self._models:
            raise Visible("This model is not on the list.")
        with self._locks[label]:
            if label not in self._scorers:
                self._scorers[label] = self._load_scorer(self._models[label])
            return self._scorers[label]

    def _load_scorer(self, model: Model):
        kwargs = {"revision": model.revision, "dtype": model.dtype}
        try:
            return self._load().text_scorer(
                model_id=_path_or_name(model.id),
                model_kwargs={name: value for name, value in kwargs.items() if value is not None},
            )
        except (ValueError, TypeError, RuntimeError, ImportError):
            logger.exception("%s cannot be loaded", model.label)
            raise Visible(
                f"{model.label} cannot be loaded at the moment. Choose another model."
            ) from None

    def score(self, text: str, label: str, progress: gr.Progress) -> Scored:
        """A text under a model, within the limits.

        Raises:
            Visible: no text, too long a text, or too long a time.
        """
        limits = self._settings.limits
        if not isinstance(text, str) or not text.strip():
            raise Visible("There is no text. Type or paste one.")
        if len(text) > limits.text_characters:
            raise Visible(
                f"The text has {len(text):,} characters; here at most "
                f"{limits.text_characters:,} can be scored. Use the module for more."
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Visible("The text holds half a character (a lone surrogate).") from None
        scorer = self.scorer(label)
        (encoded,) = scorer.encoder.encode([text], None)
        if len(encoded.ids) > limits.text_tokens:
            raise Visible(
                f"For {label} the text has {len(encoded.ids):,} tokens; here at most "
                f"{limits.text_tokens:,} can be scored. Use the module for more."
            )
        deadline = time.monotonic() + limits.time_s

        def tell(done: int, total: int) -> None:
            if time.monotonic() > deadline:
                raise Visible(f"This took longer than {limits.time_s} s. Try a shorter text.")
            progress(done / total, desc=f"{done:,} of {total:,} tokens")

        (scored,) = scorer.score([text], top_k=TOP_K, progress=tell)
        model = self._models[label]
        signature = scorer.signature(with_contexts=False)
        return Scored(
            label,
            scorer.describe(scored, with_expected=True),
            scored.sums,
            signature.replace(_path_or_name(model.id), model.id),  # no path of this machine
        )


def _path_or_name(model_id: str) -> str:
    """A directory next to this file by its path, anything else as a name on the Hub."""
    return str(HERE / model_id) if (HERE / model_id).is_dir() else model_id


def told(handler: Callable) -> Callable:
    """The handler, whose `Visible` errors Gradio shows to the visitor; others are logged."""

    @functools.wraps(handler)
    def wrapped(*args, **kwargs):
        try:
            return handler(*args, **kwargs)
        except Visible as error:
            # Gradio renders HTML in it, and parts of it may come from the visitor.
            message = html.escape(visible(str(error)[:MESSAGE_CHARACTERS]))
        except Exception:
            logger.exception("a visitor's request failed")
            message = "This failed, for a reason that only the log of the server shows."
        raise gr.Error(message, title="Not possible", print_exception=False)

    return wrapped


def on_gpu(handler: Callable) -> Callable:
    """The handler with a GPU, on a Space with ZeroGPU."""
    return spaces.GPU(handler) if "spaces" in globals() else handler


def as_json(result: dict) -> dict:
    """JSON has no NaN and no infinity: null, and the name."""
    return {
        name: (None if math.isnan(value) else str(value))
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in result.items()
    }


def make_handlers(settings: Settings) -> dict[str, Callable]:
    """What the endpoints /score, /compare, /logits and /example do."""
    metrics = Metrics(settings)
    example_file = Path(tempfile.mkdtemp(prefix="perplexity-demo-")) / "example.npz"
    write_example(example_file)

    @on_gpu
    @told
    def score(text: str, model: str, progress=gr.Progress()):  # noqa: B008, Gradio's way
        scored = metrics.score(text, model, progress)
        result = figures(scored)
        del result["perplexities"], result["mean_perplexity"]  # of one text: the perplexity
        return verdict(result), heatmap(scored.score), chart(scored.score), as_json(result)

    @on_gpu
    @told
    def compare(text_a: str, model_a: str, text_b: str, model_b: str, progress=gr.Progress()):  # noqa: B008
        a = metrics.score(text_a, model_a, progress)
        b = metrics.score(text_b if text_b and text_b.strip() else text_a, model_b, progress)
        shown = [comparison(a, b)]
        for scored in (a, b):
            shown += [verdict(figures(scored)), heatmap(scored.score)]
        return tuple(shown)

    @told
    def logits(file, from_logits: bool, ignore_index: str, mask_token_id: str, shift: bool):
        if file is None:
            raise Visible("There is no file. Upload one, or make an example.")
        try:
            arrays = read_logits_file(Path(file), settings.limits.array_mb)
            with metrics.logits_lock, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = metrics.logits.compute(
                    predictions=arrays["logits"],
                    references=arrays["labels"],
                    sample_weight=arrays.get("sample_weight"),
                    from_logits=from_logits,
                    ignore_index=_ids(ignore_index, "ignore_index"),
                    mask_token_id=_id(mask_token_id, "mask_token_id"),
                    shift=shift,
                )
        except (ValueError, TypeError) as error:
            raise Visible(_names_of_the_file(error)) from None
        notes = [_names_of_the_file(w.message) for w in caught if metrics.warned(w)]
        return logits_table(result, notes), as_json(result)

    def example():
        return str(example_file)

    return {"score": score, "compare": compare, "logits": logits, "example": example}


def _names_of_the_file(message: Exception) -> str:
    """The metric speaks of its arguments, of which a file has two under other names."""
    return str(message).replace("predictions", "logits").replace("references", "labels")


def _id(text: str, name: str) -> int | None:
    """A token id that was typed; None for an empty field."""
    try:
        return int(text) if text.strip() else None
    except ValueError:
        raise Visible(f"{name} must be a whole number, got {text.strip()[:40]!r}.") from None


def _ids(text: str, name: str) -> tuple[int, ...] | None:
    """Token ids with commas between; None for an empty field."""
    parts = text.split(",", MOST_IGNORED_IDS)
    if len(parts) > MOST_IGNORED_IDS:
        raise Visible(f"{name} takes at most {MOST_IGNORED_IDS} ids here.")
    found = [_id(part, name) for part in parts]
    return tuple(token for token in found if token is not None) or None


def make_app(settings: Settings) -> gr.Blocks:
    """The page."""
    handlers = make_handlers(settings)
    labels = [model.label for model in settings.models]
    limits, queue = settings.limits, settings.queue
    of_model = {"concurrency_id": "model", "concurrency_limit": queue.concurrency}

    def text_box(label: str, **more) -> gr.Textbox:
        return gr.Textbox(label=label, lines=5, max_lines=14, **more)

    def model_choice(label: str) -> gr.Dropdown:
        return gr.Dropdown(labels, value=settings.default_model, label=label)

    # Uploads are deleted after an hour. Nothing else that a visitor sends is written to disk; a
    # result waits in Gradio's memory until it is fetched.
    with gr.Blocks(title=settings.title, analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown(f"# {settings.title}\n\n{settings.intro}")
        with gr.Tab("Text"):
            text = text_box("Text")
            gr.Examples(
                [[example.text] for example in settings.examples],
                [text],
                example_labels=[example.label for example in settings.examples],
                api_visibility="private",
            )
            model = model_choice("Model")
            button = gr.Button("Score", variant="primary")
            line = gr.Markdown(elem_classes="verdict")
            picture = gr.HTML(js_on_load=ARROW_KEYS)
            points = gr.LinePlot(
                x="token", y="bits", label="Surprisal along the text", height=240,
                x_title="token", y_title="bits", y_lim=[0, None],
            )  # fmt: skip
            with gr.Accordion("All figures", open=False):
                result = gr.JSON(label="Result")
            outputs = [line, picture, points, result]
            button.click(handlers["score"], [text, model], outputs, api_name="score", **of_model)
        with gr.Tab("Compare"):
            gr.Markdown(
                "Two texts under one model; or one text under two models, with the second text "
                "left empty. Bits per byte can be compared between models, perplexities cannot."
            )
            with gr.Row():
                with gr.Column(min_width=300):
                    text_a, model_a = text_box("Text A"), model_choice("Model A")
                with gr.Column(min_width=300):
                    text_b = text_box("Text B", placeholder="Empty: the same as text A")
                    model_b = model_choice("Model B")
            button = gr.Button("Compare", variant="primary")
            line = gr.Markdown(elem_classes="verdict")
            shown = [line]
            with gr.Row():
                for _ in "AB":
                    with gr.Column(min_width=300):
                        shown += [gr.Markdown(), gr.HTML(js_on_load=ARROW_KEYS)]
            inputs = [text_a, model_a, text_b, model_b]
            button.click(handlers["compare"], inputs, shown, api_name="compare", **of_model)
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
    return app.queue(max_size=queue.size)


def launch(app: gr.Blocks, settings: Settings, **more) -> tuple:
    """Serve the page; nothing leaves the machine, and nothing of a visitor is kept on disk."""
    # Of the fonts that Gradio brings, the bold ones have few letters; those of the system have all.
    # Its hints and its main button have too little contrast (WCAG 2.2 asks for 4.5).
    theme = getattr(gr.themes, settings.theme.capitalize())(
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
        app_kwargs={"middleware": [Middleware(BoundedBody, settings.limits.text_characters)]},
        theme=theme,
        css=CSS,
        max_file_size=f"{settings.limits.file_mb}mb",
        run_history=False,
        share=False,
        ssr_mode=False,
        show_error=False,
        footer_links=[],
        **more,
    )


class BoundedBody:
    """Refuses what cannot be a request for a text of so many characters, before it is all read.

    Gradio bounds uploads by itself, but not the bodies of calls, which it keeps while they wait.
    """

    def __init__(self, app, text_characters: int):
        self._app = app
        self._most = 2 * 6 * text_characters + 10_000  # two texts, each character as \uXXXX

    async def __call__(self, scope, receive, send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"].endswith("/upload"):
            await self._app(scope, receive, send)
            return
        messages, size = [], 0
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            if size > self._most:
                answer = PlainTextResponse("The request is too large.", status_code=413)
                await answer(scope, receive, send)
                return

        async def replay():
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)


if __name__ == "__main__":
    chosen = read_settings(HERE / "app_config.yaml")
    launch(make_app(chosen), chosen)
