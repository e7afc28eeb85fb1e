"""Texts and files of logits -> results, within the limits of the demo.

All numbers come from the metric. No Gradio here.
"""

import contextlib
import dataclasses
import functools
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.conversation import Message, read_conversation
from demo.logits_file import read_logits_file
from demo.models import Models, Visible
from demo.settings import HeldOut, Settings
from demo.views import LabelledComparison, LabelledConversation, LabelledScore
from ppleval import Perplexity
from ppleval.models.pair import ModelPair, same_tokens
from ppleval.stats.positions import position_results
from ppleval.stats.texts import TextTotals
from ppleval.texts.compare import TextComparer
from ppleval.texts.engine import TextScorer
from ppleval.user_warnings import PerplexityWarning

if TYPE_CHECKING:
    from ppleval.stats.totals import Result
    from ppleval.texts.score import TextScore

TOP_K = 5
MOST_IGNORED_IDS = 16  # each takes a pass over the labels
INT64 = range(-(2**63), 2**63)
LOOK_S = 0.1  # between two looks at whether one who waits is still wanted
ENDING = "The demo is being restarted. Try again in a minute."


class Metrics:
    """The listed models, and a metric for logits."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._listed = {model.label: model for model in settings.models}
        self._slots = threading.Semaphore(settings.queue.concurrency)
        self._ends_at = math.inf
        self._logits = Perplexity()
        # Each visitor sees the warnings about their own file; Python records those of all threads.
        self._logits_lock = threading.Lock()
        self.models = Models(settings)

    def held_out(self, label: str) -> HeldOut | None:
        """What a model was measured on that it was not trained on."""
        return self._listed[label].held_out

    def end(self, seconds: float) -> None:
        """Score nothing new, and stop what still runs after some seconds."""
        self._ends_at = time.monotonic() + seconds
        self.models.close()

    @contextlib.contextmanager
    def _slot(self, progress: Callable[[int, int], None]) -> Iterator[None]:
        """One of the places of those who score. `progress` is asked while it waits for one.

        Raises:
            Visible: the demo ends.
        """
        while not self._slots.acquire(timeout=LOOK_S):
            progress(0, 0)
        try:
            progress(0, 0)
            if self._ends_at < math.inf:
                raise Visible(ENDING)
            yield
        finally:
            self._slots.release()

    def score(
        self,
        text: str,
        label: str,
        progress: Callable[[int, int], None],
    ) -> LabelledScore:
        """A text under a model.

        Args:
            progress: gets the tokens done and in all, both 0 while the text waits for its turn.
                What it raises ends the score, and frees its place.

        Raises:
            Visible: there is no text, it is too long, or it takes too long.
        """
        self._check(text)
        scorer = self.models.scorer(label)
        with self._slot(progress):
            self._ids(scorer, text, label)
            found = _score_of(scorer, text, self._bounded(progress))
        return LabelledScore(
            label, found, self._signature(scorer, label), _positions(scorer, found)
        )

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
        of_texts = self.models.scorer(label)
        with self._slot(progress):
            try:
                scorer = self._conversation_scorer(of_texts, label)
                self._ids(scorer, messages, label, "conversation")
            except (ValueError, TypeError) as error:
                raise Visible(f"{label} cannot read this conversation. {error}") from None
            found = _score_of(scorer, messages, self._bounded(progress))
        if found.sums.num_tokens == 0:
            raise Visible(f"No token of {label} begins in what the assistant says.")
        return LabelledConversation(
            label,
            found,
            self._signature(scorer, label),
            _positions(scorer, found),
            _special_tokens(scorer),
        )

    def _conversation_scorer(self, scorer: TextScorer, label: str) -> TextScorer:
        """A scorer of conversations with the model of a scorer of texts."""
        template = self._listed[label].chat_template
        options = dataclasses.replace(scorer.options, conversations=True, chat_template=template)
        return TextScorer(scorer.model, options)

    def compare(
        self, text: str, label_a: str, label_b: str, progress: Callable[[int, int], None]
    ) -> LabelledComparison | None:
        """A text under models A and B, token by token; None if they have different tokens.

        Both read it at once, in windows that fit both.

        Raises:
            Visible: as `score`.
        """
        self._check(text)
        a, b = self.models.scorer(label_a), self.models.scorer(label_b)
        if not _have_same_tokens(a, b):
            return None
        with self._slot(progress):
            if self._ids(a, text, label_a) != self._ids(b, text, label_b):
                return None
            models: Any = b.model, a.model  # each is a single one
            comparer = TextComparer(ModelPair(*models), b.options)
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
        self, scorer: TextScorer, text: str | list[Message], label: str, kind: str = "text"
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
        """`progress`; it raises Visible when the time for each model is over or the demo ends."""
        seconds = num_models * self._settings.limits.time_s
        deadline = time.monotonic() + seconds

        def tell(done: int, total: int) -> None:
            now = time.monotonic()
            if now > self._ends_at:
                raise Visible(ENDING)
            if now > deadline:
                raise Visible(f"This took longer than {seconds} s. Try a shorter text.")
            progress(done, total)

        return tell

    def _signature(self, scorer: TextScorer, label: str) -> str:
        """All settings in one line, without this machine's paths."""
        model = self._listed[label]
        return scorer.signature(with_contexts=False).replace(model.source, model.id)

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
        if self._ends_at < math.inf:
            raise Visible(ENDING)
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
        notes = [
            str(warning.message) for warning in caught if warning.category is PerplexityWarning
        ]
        return result, [_names_of_the_file(note) for note in notes]


def _special_tokens(scorer: TextScorer) -> frozenset[str]:
    """The special tokens of a scorer of conversations, as its scores show them."""
    encoder: Any = scorer.encoder  # of conversations
    decode = scorer.model.tokenizer.decode
    return frozenset(str(decode([i])) for i in encoder.template.special_ids)


def _score_of(
    scorer: TextScorer,
    text: Any,  # or the messages of a conversation
    progress: Callable[[int, int], None],
) -> "TextScore":
    ask = functools.partial(scorer.score, [text], top_k=TOP_K, progress=progress)
    with contextlib.suppress(ValueError):  # not all tokens carry the space in front of them
        (score,) = ask(corrected=True)
        return score
    (score,) = ask()
    return score


def _positions(scorer: TextScorer, score: "TextScore") -> "Result":
    """The results by tokens that the model could see, by their labels; none without tokens."""
    totals = TextTotals.of([score.sums])
    return position_results(totals.positions, scorer.edges, scorer.window)


def _have_same_tokens(a: TextScorer, b: TextScorer) -> bool:
    try:
        return same_tokens(a.model.tokenizer, b.model.tokenizer)
    except ValueError:  # the same tokens, but under other ids
        return False


def _names_of_the_file(message: str) -> str:
    """The message with the names of the file's arrays in place of the metric's arguments."""
    return message.replace("predictions", "logits").replace("references", "labels")


def _id(text: str, name: str) -> int | None:
    """A token id that was typed; None for an empty field."""
    typed = (text or "").strip()
    try:
        token_id = int(typed) if typed else None
    except ValueError:
        raise Visible(f"{name} must be a whole number, got {typed[:40]!r}.") from None
    # The metric would call it an `ignore_index`, which is what it makes of a `mask_token_id`.
    if token_id is not None and token_id not in INT64:
        raise Visible(f"{name} must fit into 64 bits, got {typed[:40]}.")
    return token_id


def _ids(text: str, name: str) -> tuple[int, ...] | None:
    """Token ids that were typed, comma-separated; None for an empty field."""
    parts = (text or "").split(",", MOST_IGNORED_IDS)
    if len(parts) > MOST_IGNORED_IDS:
        raise Visible(f"{name} takes at most {MOST_IGNORED_IDS} ids here.")
    found = [_id(part, name) for part in parts]
    return tuple(token for token in found if token is not None) or None
