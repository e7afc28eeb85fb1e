"""An encoder-decoder, sources and texts -> the nll of each text given its source.

    nll_t = -log p(label t | the source, the labels before it)

The labels are the ids that the tokenizer gives a text as a target, with the special tokens that it
adds, as `Seq2SeqTrainer` has them; all are scored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from ppleval.models.kinds import Seq2SeqModel
from ppleval.models.language_model import Span
from ppleval.texts.encoding import EncodedText, Places, TextEncoder
from ppleval.texts.options import TextOptions
from ppleval.texts.reading import TextReader
from ppleval.texts.windows import Window


@dataclass(frozen=True)
class TargetText(EncodedText):
    """What the decoder reads first and then the labels of a text, and the ids of its source."""

    source: Sequence[int] = ()


class Seq2SeqEncoder(TextEncoder):
    """Encodes texts and their sources for an encoder-decoder."""

    def __init__(self, model: Seq2SeqModel, options: TextOptions):
        super().__init__(model.tokenizer, options)
        self._model = model

    def _start_id(self) -> None:
        """None: the model says what its decoder begins with."""
        return None

    def encode(self, texts: Sequence[str], contexts: Sequence[str] | None) -> list[EncodedText]:
        """Encode a batch of texts, each with its source."""
        assert contexts is not None  # the scorer asks for them
        targets, sources = self._targets(list(texts)), self._sources(list(contexts))
        return [
            self._cut(replace(target, source=source, context_truncated=is_cut))
            for target, (source, is_cut) in zip(targets, sources, strict=True)
        ]

    def _targets(self, texts: list[str]) -> Iterator[TargetText]:
        encoded = self._call_tokenizer(text_target=texts, return_special_tokens_mask=True)
        places: list[Places | None] = [None] * len(texts)
        if self._is_fast:
            rows = zip(texts, encoded["offset_mapping"], encoded["input_ids"], strict=True)
            masks = encoded["special_tokens_mask"]
            places = [
                self._places(*row).with_text_up_to(_num_of_text(mask), row[0])
                for row, mask in zip(rows, masks, strict=True)
            ]
        for text, labels, place in zip(texts, encoded["input_ids"], places, strict=True):
            first = self._first_input(labels)
            yield TargetText(text, [*first, *labels], len(first), place and place.behind("", 1))

    def _first_input(self, labels: list[int]) -> list[int]:
        """What the decoder reads before the labels; empty without any label.

        Raises:
            ValueError: the decoder reads something else than the labels, one place behind.
        """
        if not labels:
            return []
        inputs = self._model.decoder_inputs(labels)
        if inputs[1:] != labels[:-1]:
            raise ValueError(
                f"The decoder of {self._model.name} does not read the labels one place behind: for "
                f"{labels[:8]} it reads {inputs[:8]}."
            )
        return inputs[:1]

    def _sources(self, contexts: list[str]) -> Iterator[tuple[list[int], bool]]:
        """The ids of each source, and whether they are cut to what the encoder reads."""
        limit = self._model.source_length
        for context, ids in zip(contexts, self._call_tokenizer(contexts).input_ids, strict=True):
            is_cut = len(ids) > limit
            if is_cut:  # by the tokenizer, which keeps its special tokens
                (ids,) = self._call_tokenizer(
                    [context], truncation=True, max_length=limit
                ).input_ids
            self._model.check_source(ids)
            yield ids, is_cut


def _num_of_text(special_tokens_mask: list[int]) -> int:
    """How many ids there are up to the last one that is no special token."""
    return int(np.flatnonzero([not special for special in special_tokens_mask]).max(initial=-1)) + 1


class Seq2SeqReader(TextReader):
    """Reads sources and texts for an encoder-decoder under one set of options.

    Raises:
        ValueError: a window that the model does not hold, or an option that has no meaning for an
            encoder-decoder.
    """

    model: Seq2SeqModel

    def __init__(self, model: Seq2SeqModel, options: TextOptions):
        self.check_use(model.name, model.tokenizer, options, with_contexts=None)
        super().__init__(model, options)

    @classmethod
    def check_use(
        cls,
        name: str | None,
        tokenizer: PreTrainedTokenizerBase,
        options: TextOptions,
        with_contexts: bool | None,
    ) -> None:
        """Check what can be told before the model of this name is loaded, as `TextReader` does."""
        options.refuse(
            ("preset", "add_start_token", "start_each_window", "join_contexts", "conversations"),
            f"for {name}, which is an encoder-decoder",
        )
        if with_contexts is False:
            raise ValueError(
                f"{name} is an encoder-decoder: pass contexts=, one source for each text, such as "
                "a sentence for its translation. Its encoder reads them."
            )

    def check_contexts(self, with_contexts: bool) -> None:
        """Raises ValueError for texts without contexts."""
        self.check_use(self.model.name, self.model.tokenizer, self.options, with_contexts)

    def _new_encoder(self) -> Seq2SeqEncoder:
        return Seq2SeqEncoder(self.model, self.options)

    def settings(self, with_contexts: bool) -> dict[str, str | int | bool | None]:
        """The settings that decide which tokens are scored, and what the model sees of them."""
        return {
            "source_length": self.model.source_length,
            "max_length": self.options.max_length,
            "window": self.window,
            "stride": self.stride,
        }

    @property
    def shortened_contexts(self) -> str:
        """How a warning names contexts that the model did not read as a whole."""
        return (
            f"are longer than the {self.model.source_length} tokens that the encoder of "
            f"{self.model.name} reads and were cut from the right"
        )

    def num_inputs(self, text: EncodedText, window: Window) -> int:
        """How many ids the model reads for a window, its source included."""
        assert isinstance(text, TargetText)  # of the encoder
        return window.num_inputs + len(text.source)

    def span(self, number: int, text: EncodedText, window: Window) -> Span:
        """What the model reads for a window of the text of this number, and what is scored."""
        assert isinstance(text, TargetText)  # of the encoder
        return replace(super().span(number, text, window), source=text.source)
