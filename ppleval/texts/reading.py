"""How a causal model reads texts: ids, the windows of each, and what is scored in a window.

A reader is made of a model and the options of texts. Those of other kinds of models are in
masked.py and encoder_decoder.py; engine.py runs the model on what they cut.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppleval.models.language_model import Span
from ppleval.models.pair import ScoredModel
from ppleval.texts.conversations import ConversationEncoder
from ppleval.texts.encoding import EncodedText, TextEncoder
from ppleval.texts.options import TextOptions
from ppleval.texts.schedule import Portion
from ppleval.texts.windows import Window, check_window


class TextReader:
    """Reads texts, or conversations, for a causal model under one set of options.

    Raises:
        ValueError: a window that the model does not hold, or a start token that it does not have.
    """

    def __init__(self, model: ScoredModel, options: TextOptions):
        self.model, self.options, self.rules = model, options, options.rules
        self.encoder = self._new_encoder()
        self.start_id = self.encoder.start_id
        # Whether the start token takes the place of the first id of later windows.
        starts = options.start_each_window
        starts = self.rules.starts_each_window if starts is None else starts
        self.starts_each_window = starts and self.start_id is not None
        longest = min(model.context_length, self.rules.longest_window or model.context_length)
        self.window = longest if options.window is None else options.window
        if self.window > model.context_length:
            raise ValueError(
                f"window is {self.window} tokens, but the model {model.name} reads at most "
                f"{model.context_length}."
            )
        self.stride = (
            options.stride or self.window // (1 if self.rules.stride_is_window else 2) or 1
        )
        check_window(self.window, self.stride)
        if self.start_id is not None and self.start_id >= model.num_embeddings:
            raise ValueError(
                f"The start token is id {self.start_id}, but the model {model.name} has "
                f"{model.num_embeddings} embeddings. Pass another id to add_start_token, or False."
            )

    @classmethod
    def check_use(
        cls,
        name: str | None,
        tokenizer: PreTrainedTokenizerBase,
        options: TextOptions,
        with_contexts: bool | None,
    ) -> None:
        """Check what can be told before the model of this name is loaded.

        Args:
            with_contexts: whether texts will have contexts; None where that is not known.

        Raises:
            ValueError: options that this tokenizer, or a model of this kind, does not take.
        """
        encoder_of(tokenizer, options)

    def check_contexts(self, with_contexts: bool) -> None:
        """Raises ValueError for texts with contexts, or without, that cannot be read so."""
        self.options.check_use(with_contexts)

    def _new_encoder(self) -> TextEncoder:
        return encoder_of(self.model.tokenizer, self.options)

    @property
    def shortened_contexts(self) -> str:
        """How a warning names contexts that the model did not read as a whole."""
        return f"are longer than the window of {self.window} tokens and were cut from the left"

    def settings(self, with_contexts: bool) -> dict[str, str | int | bool | None]:
        """The settings that decide which tokens are scored, and what the model sees of them."""
        return {
            "preset": self.options.preset,
            "start": self.encoder.start_name,
            "start_each_window": self.starts_each_window,
            "max_length": self.options.max_length,
            "window": self.window,
            "stride": None if "stride" in self.rules.without else self.stride,
            "contexts": self.options.join_contexts if with_contexts else False,
            **self.encoder.settings(),
        }

    def encode(self, portion: Portion) -> Iterable[EncodedText]:
        """The ids of each text of a portion."""
        if not portion:  # a rank may have no share
            return []
        return self.encoder.encode(*texts_and_contexts(portion))

    def windows(self, text: EncodedText) -> Iterable[Window]:
        """The windows in which a text is scored."""
        return text.windows(self.rules.windows, self.window, self.stride)

    def num_inputs(self, text: EncodedText, window: Window) -> int:
        """How many ids the model reads for a window."""
        return window.num_inputs

    def span(self, number: int, text: EncodedText, window: Window) -> Span:
        """What the model reads for a window of the text of this number, and what is scored."""
        ids = text.ids
        inputs = ids[window.start : window.start + window.num_inputs]
        if self.starts_each_window and self.start_id is not None:
            inputs[0] = self.start_id
        rows: list[int] = []
        targets: list[int] = []
        for first, stop in window.ranges:
            rows += range(first - window.start - 1, stop - window.start - 1)
            targets += ids[first:stop]
        if window.reads_end:
            rows.append(window.num_inputs - 1)
            targets.append(ids[-1])  # any, because its nll is not looked at
        return Span(inputs, rows, targets, (number, window.first))


def texts_and_contexts(portion: Portion) -> tuple[Sequence[Any], Sequence[str] | None]:
    """The texts of a portion, and their contexts, which all of them have or none."""
    texts, contexts = zip(*portion, strict=True)
    return texts, None if contexts[0] is None else contexts


def encoder_of(tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> TextEncoder:
    """What encodes texts, or conversations, as the options say."""
    return (ConversationEncoder if options.conversations else TextEncoder)(tokenizer, options)
