"""The listed models: loaded in the background, and tried again if that fails. No Gradio here."""

import logging
import threading
from typing import TYPE_CHECKING

from demo.settings import Model, Settings
from ppleval import Perplexity

if TYPE_CHECKING:
    from ppleval.texts.engine import TextScorer

RETRY_S = 300  # until the models that failed to load are tried again
PATIENCE_S = 3  # how long one visitor waits for a model that is being loaded
logger = logging.getLogger(__name__)


class Visible(Exception):  # noqa: N818
    """An error that the visitor sees: one or two sentences."""


class Models:
    """The metric's `text_scorer` of each listed model, by its label.

    One thread loads them one after the other, because transformers patches torch meanwhile, for all
    threads. What may wait for the network comes last, so that it delays no other.
    """

    def __init__(self, settings: Settings):
        self._waiting = {
            model.label: model
            for model in sorted(
                settings.models,
                key=lambda model: (model.label != settings.default_model, not model.is_local),
            )
        }
        self._tried = {label: threading.Event() for label in self._waiting}
        self._places = {label: threading.Lock() for label in self._waiting}  # each for one visitor
        self._scorers: dict[str, TextScorer] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._load_all, daemon=True)
        self._thread.start()

    def _load_all(self) -> None:
        while True:
            for label, model in list(self._waiting.items()):
                if self._closed.is_set():
                    return
                try:
                    self._scorers[label] = _load(model)
                    del self._waiting[label]
                except Exception as error:
                    logger.warning("%s cannot be loaded: %s", label, error)
                self._tried[label].set()
            if not self._waiting or self._closed.wait(RETRY_S):
                return

    def close(self) -> None:
        """Load no further model."""
        self._closed.set()

    def scorer(self, label: str) -> "TextScorer":
        """The scorer of a listed model.

        Raises:
            Visible: the model is not listed, is being loaded, or cannot be loaded.
        """
        if not isinstance(label, str) or label not in self._tried:
            raise Visible("This model is not on the list.")
        # One visitor waits for it, and others are told at once: who waits takes a place of those
        # who score.
        if not self._tried[label].is_set() and self._places[label].acquire(blocking=False):
            try:
                self._tried[label].wait(PATIENCE_S)
            finally:
                self._places[label].release()
        if label in self._scorers:
            return self._scorers[label]
        if self._tried[label].is_set():
            raise Visible(f"{label} cannot be loaded at the moment. Choose another model.")
        raise Visible(f"{label} is being loaded. Try again in a minute.")

    def absent(self) -> list[str]:
        """The labels of the models that cannot be used at the moment."""
        return list(self._waiting)


def _load(model: Model) -> "TextScorer":
    kwargs = {"revision": model.revision, "dtype": model.dtype}
    return Perplexity().text_scorer(
        model_id=model.source,
        model_kwargs={name: value for name, value in kwargs.items() if value is not None},
        positions=True,
    )
