"""What the endpoints do: what a visitor sent -> what the page shows, or a sentence."""

import functools
import html
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

try:  # on a Space with ZeroGPU only, where it comes before torch
    import spaces  # pyright: ignore[reportMissingImports]
except ImportError:
    spaces = None

import gradio as gr

from demo.logits_file import write_example
from demo.models import Visible
from demo.pair_data import pair_data, same_tokens_data
from demo.queueing import wanted_here
from demo.service import Metrics
from demo.settings import HeldOut, Settings
from demo.token_data import as_json, json_text, score_data
from demo.views import (
    LabelledScore,
    comparison,
    comparison_table,
    figures,
    logits_table,
    verdict,
)
from ppleval.show import heatmap

MESSAGE_CHARACTERS = 400  # of a message to a visitor, which may repeat what they sent
logger = logging.getLogger(__name__)


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
        raise refused(message)

    return wrapped


def refused(message: str) -> gr.Error:
    """What Gradio shows to a visitor; it renders HTML."""
    return gr.Error(message, title="Not possible", print_exception=False)


def on_gpu(handler: Callable) -> Callable:
    """The handler with a GPU, on a Space with ZeroGPU."""
    return handler if spaces is None else spaces.GPU(handler)


def make_handlers(settings: Settings, metrics: Metrics) -> dict[str, Callable]:
    """What the endpoints do, by their names; and `first`, the score that a page opens with."""
    directory = tempfile.TemporaryDirectory(prefix="perplexity-demo-")  # deleted at exit
    write_example(Path(directory.name) / "example.npz")

    @on_gpu
    @told
    def score(text: str, model: str, progress=gr.Progress()):  # noqa: B008, Gradio's way
        return shown(metrics.score(text, model, _shown_by(progress)), metrics.held_out(model))

    @functools.lru_cache(maxsize=1)  # an error is not kept
    def of_first_example():
        model = settings.default_model
        labelled = metrics.score(settings.examples[0].text, model, lambda *_: None)
        return shown(labelled, metrics.held_out(model))

    def first():
        try:
            return of_first_example()
        except Visible:  # the model is not loaded yet
            return gr.skip()

    @on_gpu
    @told
    def converse(conversation: str, model: str, progress=gr.Progress()):  # noqa: B008
        return shown(metrics.converse(conversation, model, _shown_by(progress)))

    @on_gpu
    @told
    def compare(text_a: str, model_a: str, text_b: str, model_b: str, progress=gr.Progress()):  # noqa: B008
        tell = _shown_by(progress)
        if not (text_a and text_a.strip()):
            raise Visible("There is no text A. Type or paste one.")
        text_b = text_b if text_b and text_b.strip() else text_a
        if text_a == text_b:
            pair = metrics.compare(text_a, model_a, model_b, tell)
            if pair is not None:
                table = comparison_table(pair.a, pair.b, pair)
                return comparison(pair.a, pair.b), table, json_text(same_tokens_data(pair))
        a = metrics.score(text_a, model_a, tell)
        b = metrics.score(text_b, model_b, tell)
        return comparison(a, b), comparison_table(a, b), json_text(pair_data(a, b))

    @told
    def logits(file, from_logits: bool, ignore_index: str, mask_token_id: str, shift: bool):
        result, notes = metrics.logits(file, from_logits, ignore_index, mask_token_id, shift)
        figures = {name: as_json(value) for name, value in result.items()}
        return logits_table(result, notes), figures

    def example():
        return str(Path(directory.name) / "example.npz")

    return {
        "score": score,
        "first": first,
        "conversation": converse,
        "compare": compare,
        "logits": logits,
        "example": example,
    }


def shown(labelled: LabelledScore, held_out: HeldOut | None = None) -> tuple[str, str]:
    """A score as the page shows it: what it means, and all of it as JSON."""
    result = figures(labelled)
    del result["mean_perplexity"]  # for one text, the perplexity
    return verdict(result, held_out), json_text(score_data(labelled, result))


def _shown_by(progress: gr.Progress) -> Callable[[int, int], None]:
    """What tells the visitor of the progress. It raises Visible when nobody waits for the score."""
    is_wanted = wanted_here()

    def show(done: int, total: int) -> None:
        if not is_wanted():
            raise Visible("This was stopped.")
        if total:
            progress(done / total, desc=f"{done:,} of {total:,} tokens")

    return show
