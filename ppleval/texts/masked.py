"""A masked model and texts -> the pseudo-log-likelihood of each token.

    nll_t = -log p(token t | the text with token t masked)

(Salazar et al. 2020, https://aclanthology.org/2020.acl-main.240.) Where a rare word has several
tokens, those that are not masked give it away; "within_word_l2r" also masks the later tokens of the
word (Kauf and Ivanova 2023, https://aclanthology.org/2023.acl-short.80). The model reads a copy of
the text for each token, so a text costs as many passes as it has tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ppleval.models.kinds import MaskedModel, check_has_mask
from ppleval.models.language_model import Span
from ppleval.texts.encoding import EncodedText, TextEncoder
from ppleval.texts.options import TextOptions
from ppleval.texts.reading import TextReader
from ppleval.texts.windows import MaskedWindow, Window, centred_windows


@dataclass(frozen=True)
class MaskedText(EncodedText):
    """The ids of a text without special tokens, and what is masked where each is scored."""

    mask_ends: Sequence[int] = ()  # ids[i:mask_ends[i]] are masked where ids[i] is scored


class MaskedEncoder(TextEncoder):
    """Encodes texts for a masked model.

    Raises:
        ValueError: a tokenizer that cannot do what is asked for.
    """

    def __init__(self, tokenizer, options: TextOptions):
        super().__init__(tokenizer, options)
        if options.pseudo == "within_word_l2r" and not self._is_fast:
            raise ValueError(
                'pseudo="within_word_l2r" needs a fast tokenizer, which tells which tokens make up '
                'a word. Pass one as tokenizer=, or pseudo="original".'
            )
        self.head, self.tail = self._special_tokens()

    def _start_id(self) -> None:
        """None: the tokenizer's special tokens stand around each text."""
        return None

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts in front of a text, and those behind it."""
        bare, whole = (self._tokenize(["a"], special)[0][0] for special in (False, True))
        for at in range(len(whole) - len(bare) + 1):
            if bare and whole[at : at + len(bare)] == bare:
                return whole[:at], whole[at + len(bare) :]
        raise ValueError(
            f"The tokenizer gives {bare} for the text 'a', and {whole} with its special tokens; "
            "pseudo= needs one that puts special tokens around a text."
        )

    def encode(self, texts: Sequence[str], contexts: Sequence[str] | None) -> list[EncodedText]:
        """Encode a batch of texts, each behind its context if there are any."""
        encoded = super().encode(texts, contexts)
        if self.options.pseudo == "original":
            ends: list[Sequence[int]] = [range(1, len(text.ids) + 1) for text in encoded]
        else:
            ends = list(self._ends_of_words(encoded, contexts))
        return [
            MaskedText(**vars(text), mask_ends=mask_ends)
            for text, mask_ends in zip(encoded, ends, strict=True)
        ]

    def _ends_of_words(
        self, encoded: Sequence[EncodedText], contexts: Sequence[str] | None
    ) -> Iterator[list[int]]:
        """For each id of a text, the number behind the last id of its word."""
        texts = [text.text for text in encoded]
        are_joined = self.options.join_contexts == "text"
        if contexts is not None and are_joined:
            texts = [context + text for context, text in zip(contexts, texts, strict=True)]
        for text, words in zip(encoded, self._words(texts), strict=True):
            # Nobody asks for the words of a context that was tokenised by itself.
            words = [None] * (0 if are_joined else text.num_prefix) + words
            ends = list(range(1, len(text.ids) + 1))
            for i in reversed(range(len(ends) - 1)):
                if words[i] is not None and words[i] == words[i + 1]:
                    ends[i] = ends[i + 1]
            yield ends

    def _words(self, texts: list[str]) -> list[list[int | None]]:
        """For each token of each text the number of its word, as the tokenizer splits words."""
        encodings = self._call_tokenizer(texts, add_special_tokens=False).encodings
        assert encodings is not None  # the tokenizer is fast
        return [encoding.word_ids for encoding in encodings]


class MaskedReader(TextReader):
    """Reads texts for a masked model under one set of options.

    Raises:
        ValueError: a window that the model does not hold, or that has no room beside the special
            tokens.
    """

    encoder: MaskedEncoder

    def __init__(self, model: MaskedModel, options: TextOptions):
        super().__init__(model, options)
        self._mask_id = model.mask_id
        head, tail = self.encoder.head, self.encoder.tail
        model.check_ids([*head, *tail, model.mask_id])
        self._num_special = len(head) + len(tail)
        if self.window <= self._num_special:
            raise ValueError(
                f"window must be at least {self._num_special + 1}, because the tokenizer adds "
                f"{self._num_special} special tokens; got {self.window}."
            )

    @classmethod
    def check_use(
        cls,
        name: str | None,
        tokenizer: PreTrainedTokenizerBase,
        options: TextOptions,
        with_contexts: bool | None,
    ) -> None:
        """Check what can be told before the model of this name is loaded, as `TextReader` does."""
        check_has_mask(name, tokenizer)
        MaskedEncoder(tokenizer, options)

    def _new_encoder(self) -> MaskedEncoder:
        return MaskedEncoder(self.model.tokenizer, self.options)

    def settings(self, with_contexts: bool) -> dict[str, str | int | bool | None]:
        """The settings that decide which tokens are scored, and what the model sees of them."""
        return {
            "pseudo": self.options.pseudo,
            "max_length": self.options.max_length,
            "window": self.window,
            "contexts": self.options.join_contexts if with_contexts else False,
        }

    @property
    def shortened_contexts(self) -> str:
        """How a warning names contexts that the model did not read as a whole."""
        return (
            f"are not read as a whole: a window of {self.window} tokens, centred on the first "
            "token of the text, does not reach back to their start"
        )

    def windows(self, text: EncodedText) -> Iterator[MaskedWindow]:
        """One window for each scored token."""
        return centred_windows(len(text.ids), self.window - self._num_special, text.num_prefix)

    def num_inputs(self, text: EncodedText, window: Window) -> int:
        """How many ids the model reads for a window, special tokens included."""
        return window.num_inputs + self._num_special

    def span(self, number: int, text: EncodedText, window: Window) -> Span:
        """What the model reads for a window of the text of this number, and what is scored."""
        assert isinstance(text, MaskedText)  # of the encoder
        at, stop = window.first, min(text.mask_ends[window.first], window.stop)
        head, tail = self.encoder.head, self.encoder.tail
        return Span(
            inputs=[
                *head,
                *text.ids[window.start : at],
                *[self._mask_id] * (stop - at),
                *text.ids[stop : window.stop],
                *tail,
            ],
            rows=[len(head) + at - window.start],
            targets=[text.ids[at]],
            place=(number, at),
        )
