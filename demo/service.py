"""Texts and files of logits -> results, within the limits of the demo.

All numbers come from the metric. No Gradio here.
"""

import contextlib
import dataclasses
import functools
import inspect
import logging
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import metric_package
from demo.conversation import Message, read_conversation
from demo.logits_file import read_logits_file
from demo.settings import Model, Settings
from demo.views import LabelledComparison, LabelledConversation, LabelledScore

if TYPE_CHECKING:
    from text_score import TextScore
    from text_scoring import TextScorer

text_comparison = metric_package.sibling("text_comparison")
text_pair = metric_package.sibling("text_pair")
text_scoring = metric_package.sibling("text_scoring")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOP_K = 5
RETRY_S = 300  # until a model that failed to load is tried again
PATIENCE_S = 3  # how long a visitor waits while another one's request loads the model
MOST_IGNORED_IDS = 16  # each takes a pass over the labels
logger = logging.getLogger(__name__)


class Visible(Exception):  # noqa: N818
    """An error that the visitor sees: one or two sentences."""


class Metrics:
    """One metric for each listed model, loaded when it is first needed, and one for logits.

    Loading can take minutes, so it takes none of the slots for scoring.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._models = {model.label: model for model in settings.models}
        self._loading = {label: threading.Lock() for label in self._models}
        self._scorers: dict[str, TextScorer] = {}
        self._retry_at: dict[str, float] = {}  # the models that failed to load
        self._slots = threading.Semaphore(settings.queue.concurrency)
        self._logits = metric_package.load()
        # Each visitor sees the warnings about their own file; Python records those of all threads.
        self._logits_lock = threading.Lock()

    def scorer(self, label: str) -> "TextScorer":
        """The metric's `text_scorer` of a listed model.

        Raises:
            Visible: the model is not listed, is being loaded, or cannot be loaded.
        """
        if not isinstance(label, str) or label not in self._models:
            raise Visible("This model is not on the list.")
        if not self._loading[label].acquire(timeout=PATIENCE_S):
            raise Visible(f"{label} is being loaded. Try again in a minute.")
        try:
            if label not in self._scorers:
                self._scorers[label] = self._load_scorer(self._models[label])
            return self._scorers[label]
        finally:
            self._loading[label].release()

    def _load_scorer(self, model: Model) -> "TextScorer":
        told = Visible(f"{model.label} cannot be loaded at the moment. Choose another model.")
        if time.monotonic() < self._retry_at.get(model.label, 0):
            raise told
        kwargs = {"revision": model.revision, "dtype": model.dtype}
        try:
            return metric_package.load().text_scorer(
                model_id=_path_or_name(model.id),
                model_kwargs={name: value for name, value in kwargs.items() if value is not None},
            )
        except Exception:
            logger.exception("%s cannot be loaded", model.label)
            self._retry_at[model.label] = time.monotonic() + RETRY_S
            raise told from None

    def score(
        self,
        text: str,
        label: str,
        progress: Callable[[int, int], None],
        words: bool = False,
    ) -> LabelledScore:
        """A text under a model.

        Args:
            progress: gets the tokens done and in all.
            words: the score is for its words: corrected, if the model's tokens allow it.

        Raises:
            Visible: there is no text, it is too long, or it takes too long; or words under a model
                that does not tell where its tokens stand.
        """
        self._check(text)
        scorer = self.scorer(label)
        if words and not scorer.model.tokenizer.is_fast:
            raise Visible(
                f"{label} does not tell where its tokens stand in the text, so no words can be "
                "shown. Choose tokens."
            )
        with self._slots:
            self._ids(scorer, text, label)
            found = _score_of(scorer, text, self._bounded(progress), words)
        return LabelledScore(label, found, self._signature(scorer, label))

    def converse(
        self, pasted: str, label: str, progress: Callable[[int, int], None]
    ) -> LabelledConversation:
        """What the assistant says in a conversation, as JSON or as typed turns, under a model.

        Raises:
            Visible: as `score`; there is no conversation, or the chat template of the model refuses
                it.
        """
        self._check(pasted, "conversation")
        try:
            messages = read_conversation(pasted)
        except ValueError as error:
            raise Visible(str(error)) from None
        of_texts = self.scorer(label)
        with self._slots:
            try:
                scorer = self._conversation_scorer(of_texts, label)
                self._ids(scorer, messages, label, "conversation")
            except (ValueError, TypeError) as error:
                raise Visible(f"{label} cannot read this conversation. {error}") from None
            found = _score_of(scorer, messages, self._bounded(progress))
        if found.sums.num_tokens == 0:
            raise Visible(f"No token of {label} begins in what the assistant says.")
        return LabelledConversation(
            label, found, self._signature(scorer, label), _special_tokens(scorer)
        )

    def _conversation_scorer(self, scorer: "TextScorer", label: str) -> "TextScorer":
        """A scorer of conversations with the model of a scorer of texts."""
        template = self._models[label].chat_template
        options = dataclasses.replace(scorer.options, conversations=True, chat_template=template)
        return text_scoring.TextScorer(scorer.model, options)

    def compare(
        self, text: str, label_a: str, label_b: str, progress: Callable[[int, int], None]
    ) -> LabelledComparison | None:
        """A text under models A and B, token by token; None if they have different tokens.

        Both read it at once, in windows that fit both.

        Raises:
            Visible: as `score`.
        """
        self._check(text)
        a, b = self.scorer(label_a), self.scorer(label_b)
        if not _have_same_tokens(a, b):
            return None
        with self._slots:
            if self._ids(a, text, label_a) != self._ids(b, text, label_b):
                return None
            comparer = text_comparison.TextComparer(
                text_pair.ModelPair(b.model, a.model), b.options
            )
            tell = self._bounded(progress, num_models=2)
            (found,) = comparer.comparisons([text], progress=tell)
        return LabelledComparison(label_a, label_b, found)

    def _check(self, text: str, kind: str = "text") -> None:
        """Raises Visible: there is no text, or it is too long."""
        most = self._settings.limits.text_characters
        if not isinstance(text, str) or not text.strip():
            raise Visible(f"There is no {kind}. Type or paste one.")
        if len(text) > most:
            raise Visible(
                f"The {kind} has {len(text):,} characters; here at most {most:,} can be scored. "
                "Use the module for more."
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Visible(f"The {kind} holds half a character (a lone surrogate).") from None

    def _ids(
        self, scorer: "TextScorer", text: str | list[Message], label: str, kind: str = "text"
    ) -> Sequence[int]:
        """The tokens of a text, or of all the texts that a conversation needs.

        Raises:
            Visible: there are too many.
        """
        most = self._settings.limits.text_tokens
        (encoded,) = scorer.encoder.encode([text], None)
        if len(encoded.ids) > most:
            raise Visible(
                f"For {label} the {kind} has {len(encoded.ids):,} tokens; here at most {most:,} "
                "can be scored. Use the module for more."
            )
        return encoded.ids

    def _bounded(
        self, progress: Callable[[int, int], None], num_models: int = 1
    ) -> Callable[[int, int], None]:
        """`progress`, which raises Visible when the time for each of the models is over."""
        seconds = num_models * self._settings.limits.time_s
        deadline = time.monotonic() + seconds

        def tell(done: int, total: int) -> None:
            if time.monotonic() > deadline:
                raise Visible(f"This took longer than {seconds} s. Try a shorter text.")
            progress(done, total)

        return tell

    def _signature(self, scorer: "TextScorer", label: str) -> str:
        """All settings in one line, without this machine's paths."""
        name = self._models[label].id
        return scorer.signature(with_contexts=False).replace(_path_or_name(name), name)

    def logits(
        self,
        file: str | None,
        from_logits: bool,
        ignore_index: str,
        mask_token_id: str,
        shift: bool,
    ) -> tuple[dict, list[str]]:
        """The result of a file of logits, and the metric's warnings.

        Args:
            file: its path.
            ignore_index, mask_token_id: as typed; empty for none.

        Raises:
            Visible: there is no file, or it cannot be read or computed.
        """
        if file is None:
            raise Visible("There is no file. Upload one, or make an example.")
        options = {
            "from_logits": from_logits,
            "ignore_index": _ids(ignore_index, "ignore_index"),
            "mask_token_id": _id(mask_token_id, "mask_token_id"),
            "shift": shift,
        }
        try:
            arrays = read_logits_file(Path(file), self._settings.limits.array_mb)
            with self._logits_lock, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = self._logits.compute(
                    predictions=arrays["logits"],
                    references=arrays["labels"],
                    sample_weight=arrays.get("sample_weight"),
                    **options,
                )
        except (ValueError, TypeError) as error:
            raise Visible(_names_of_the_file(str(error))) from None
        assert result is not None  # `compute` returns None only to further processes of a launch
        notes = [str(warning.message) for warning in caught if self._is_of_metric(warning)]
        return result, [_names_of_the_file(note) for note in notes]

    def _is_of_metric(self, warning: warnings.WarningMessage) -> bool:
        """Whether it comes from the metric; other threads warn too."""
        package = Path(inspect.getfile(type(self._logits))).parent
        return warning.category is UserWarning and Path(warning.filename).parent in (package, HERE)


def _special_tokens(scorer: "TextScorer") -> frozenset[str]:
    """The special tokens of a scorer of conversations, as its scores show them."""
    encoder: Any = scorer.encoder  # of conversations
    decode = scorer.model.tokenizer.decode
    return frozenset(str(decode([i])) for i in encoder.template.special_ids)


def _score_of(
    scorer: "TextScorer",
    text: Any,  # or the messages of a conversation
    progress: Callable[[int, int], None],
    words: bool = False,
) -> "TextScore":
    ask = functools.partial(scorer.score, [text], top_k=TOP_K, progress=progress)
    if words:
        with contextlib.suppress(ValueError):  # not all tokens carry the space in front of them
            (score,) = ask(corrected=True)
            return score
    (score,) = ask()
    return score


def _have_same_tokens(a: "TextScorer", b: "TextScorer") -> bool:
    try:
        return text_pair.same_tokens(a.model.tokenizer, b.model.tokenizer)
    except ValueError:  # the same tokens, but under other ids
        return False


def _path_or_name(model_id: str) -> str:
    """A directory next to app_config.yaml by its path, anything else as a name on the Hub."""
    return str(ROOT / model_id) if (ROOT / model_id).is_dir() else model_id


def _names_of_the_file(message: str) -> str:
    """The message with the names of the file's arrays in place of the metric's arguments."""
    return message.replace("predictions", "logits").replace("references", "labels")


def _id(text: str, name: str) -> int | None:
    """A token id that was typed; None for an empty field."""
    try:
        return int(text) if text.strip() else None
    except ValueError:
        raise Visible(f"{name} must be a whole number, got {text.strip()[:40]!r}.") from None


def _ids(text: str, name: str) -> tuple[int, ...] | None:
    """Token ids that were typed, comma-separated; None for an empty field."""
    parts = text.split(",", MOST_IGNORED_IDS)
    if len(parts) > MOST_IGNORED_IDS:
        raise Visible(f"{name} takes at most {MOST_IGNORED_IDS} ids here.")
    found = [_id(part, name) for part in parts]
    return tuple(token for token in found if token is not None) or None
