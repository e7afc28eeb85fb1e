"""Texts -> token ids: the start token, the prompt, truncation, and the place of each token."""

import functools
import itertools
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ppleval.models.language_model import tokenizer_errors
from ppleval.texts.options import TextOptions
from ppleval.texts.windows import CutIntoWindows, Window

if TYPE_CHECKING:
    from transformers import BatchEncoding
# A token of one byte, in tokenizers with byte fallback such as Llama 2's.
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
DUMMY_PREFIX = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's mark of a space
BYTE_OF_SPACE = "Ġ"  # the same in byte-level vocabularies
# Encoding sets options of the tokenizer, which other threads may use.
_LOCKS: WeakKeyDictionary = WeakKeyDictionary()


@dataclass(frozen=True)
class EncodedText:
    """The ids of a text, behind those that only condition it."""

    text: str
    ids: list[int]  # start token, context, text
    num_prefix: int  # ids in front of the text
    places: "Places | None"  # where the ids stand in the text; None from a slow tokenizer
    truncated: bool = False
    context_truncated: bool = False  # by the encoder of an encoder-decoder

    @property
    def given(self) -> Any:
        """What the user passed."""
        return self.text

    def windows(self, cut: CutIntoWindows, window: int, stride: int) -> Iterable[Window]:
        """Windows that score the text once."""
        return cut(len(self.ids), window, stride, max(1, self.num_prefix))

    def offsets(self) -> list[tuple[int, int]] | None:
        """Characters [start, end) of each token of the text, without gaps; None without places."""
        if self.places is None:
            return None
        ends = [0, *self.places.ends[self.num_prefix :].tolist()]
        if len(ends) > 1 and not self.truncated:
            ends[-1] = len(self.text)
        return list(itertools.pairwise(ends))

    def text_of(self, first: int, stop: int) -> str:
        """The part of the text that ids[first:stop] stand for; needs places."""
        last = self._takes_the_rest(stop)
        assert self.places is not None
        ends = self.places.ends
        begin = ends[first - 1] if first > 0 else 0
        return self.text[begin : None if last else ends[stop - 1]]

    def num_bytes(self, first: int, stop: int) -> int:
        """UTF-8 bytes of the text that ids[first:stop] stand for; needs places."""
        assert self.places is not None
        byte_ends = self.places.byte_ends
        last = self._takes_the_rest(stop)
        end = len(self.text.encode()) if last else int(byte_ends[stop - 1])
        return end - int(byte_ends[first - 1] if first > 0 else 0)

    def _takes_the_rest(self, stop: int) -> bool:
        # Spaces that a tokenizer leaves out of its offsets belong to the token behind them.
        return stop == len(self.ids) and not self.truncated


class Places:
    """Where each id ends in a text, (ids,) int64 each, never decreasing.

    They are found when they are first asked for: nobody asks for those of a text that is scored as
    a whole.
    """

    def __init__(self, find: Callable[[], tuple[np.ndarray, np.ndarray]]):
        self._find = find

    @functools.cached_property
    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        return self._find()

    @property
    def ends(self) -> np.ndarray:
        """In characters."""
        return self._ends[0]

    @property
    def byte_ends(self) -> np.ndarray:
        """In UTF-8 bytes; a character of several tokens is divided among them."""
        return self._ends[1]

    def behind(self, context: str, num_prefix: int) -> "Places":
        """The places in the text behind a context, with `num_prefix` ids in front of all."""

        def find() -> tuple[np.ndarray, np.ndarray]:
            before = np.zeros(num_prefix, dtype=np.int64)
            ends = np.maximum(self.ends - len(context), 0)
            byte_ends = np.maximum(self.byte_ends - len(context.encode()), 0)
            return np.concatenate([before, ends]), np.concatenate([before, byte_ends])

        return Places(find)

    def with_text_up_to(self, num_ids: int, text: str) -> "Places":
        """The places where the ids behind the first `num_ids` stand for nothing of the text: what
        tokens leave out at its end belongs to the last of these."""

        def find() -> tuple[np.ndarray, np.ndarray]:
            ends, byte_ends = self.ends.copy(), self.byte_ends.copy()
            ends[max(num_ids - 1, 0) :] = len(text)
            byte_ends[max(num_ids - 1, 0) :] = len(text.encode())
            return ends, byte_ends

        return Places(find)

    def __getitem__(self, ids: slice) -> "Places":
        return Places(lambda: (self.ends[ids], self.byte_ends[ids]))


def _ends_of_tokens(
    text: str,
    offsets: np.ndarray,
    ids: Sequence[int],
    name: Callable[[int], str],
) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens end, in characters and in bytes, from a tokenizer's offsets (ids, 2), characters
    [start, end) of each id, and the names of ids."""
    starts, ends = offsets.reshape(-1, 2).T
    # A special token behind the text is at (0, 0).
    reached = np.maximum.accumulate(ends)
    bytes_before = _bytes_before(text)
    byte_ends = bytes_before[reached]
    # The next token continues the character in which this one ends.
    split = (starts[1:] < reached[:-1]) & (reached[:-1] <= ends[1:])
    for i in np.flatnonzero(split).tolist():
        token = name(ids[i])
        begin = byte_ends[i - 1] if i > 0 else 0
        if i == 0 and token.startswith(BYTE_OF_SPACE) and not text.startswith(" "):
            begin = -1  # a space that the tokenizer put in front (add_prefix_space)
        byte_ends[i] = min(begin + _bytes_of_part(token), byte_ends[i])
    return reached, byte_ends


class TextEncoder:
    """Encodes texts under one set of options for start token, contexts and truncation."""

    def __init__(self, tokenizer, options: TextOptions):
        self.tokenizer = tokenizer
        self.options, self.rules = options, options.rules
        self._is_fast = getattr(tokenizer, "is_fast", False)
        self.start_id = self._start_id()
        self._lock = _LOCKS.setdefault(tokenizer, threading.Lock())

    def _start_id(self) -> int | None:
        start = self.options.add_start_token
        if start is False or not self.rules.puts_start_token:
            return None
        if start is not True:
            return start
        start = self.tokenizer.bos_token_id
        if start is None and self.rules.eos_without_bos:
            start = self.tokenizer.eos_token_id
        # GPT-2's tokenizer has a BOS, but does not add it.
        if self.rules.start_token_as_tokenizer and self.tokenizer("a").input_ids[:1] != [start]:
            return None
        return start

    @property
    def start_name(self) -> str:
        """For the signature: the start token as text, or why there is none."""
        if not self.rules.puts_start_token:
            return "tokenizer"  # the tokenizer's own special tokens
        if self.start_id is not None:
            name = self.tokenizer.convert_ids_to_tokens(self.start_id)
            return str(self.start_id if name is None else name)
        if self.options.add_start_token is False:
            return "none"
        return "none(no-bos)" if self.tokenizer.bos_token_id is None else "none(not-added)"

    def settings(self) -> dict:
        """What a signature says of the encoding beside `start_name`."""
        return {}

    def encode(self, texts: Sequence[Any], contexts: Sequence[str] | None) -> Sequence[EncodedText]:
        """Encode a batch of texts, each behind its context if there are any."""
        texts = list(texts)
        if contexts is None:
            encoded = self._without_contexts(texts)
        elif self.options.join_contexts == "ids":
            encoded = self._apart(texts, list(contexts))
        else:
            encoded = self._joined(texts, list(contexts))
        if self.start_id is not None:
            encoded = map(self._started, encoded)
        if self.options.max_length is not None:
            encoded = map(self._cut, encoded)
        return list(encoded)

    def _without_contexts(self, texts: list[str]) -> Iterator[EncodedText]:
        ids, places = self._tokenize(texts, self.rules.tokenizer_adds)
        if self.rules.tokenizer_adds and self.start_id is not None:
            # lm-eval lets the tokenizer add nothing to a text that begins with the start token.
            spelt = self.tokenizer.decode([self.start_id])
            started = [i for i, text in enumerate(texts) if spelt and text.startswith(spelt)]
            if started:
                plain_ids, plain_places = self._tokenize([texts[i] for i in started])
                for at, i in enumerate(started):
                    ids[i], places[i] = plain_ids[at], plain_places[at]
        for text, text_ids, place in zip(texts, ids, places, strict=True):
            yield EncodedText(text, text_ids, 0, place)

    def _joined(self, texts: list[str], contexts: list[str]) -> Iterator[EncodedText]:
        """Context and text as one string; a token that spans both belongs to the text."""
        wholes = [context + text for context, text in zip(contexts, texts, strict=True)]
        ids, places = self._tokenize(wholes)
        if not self._is_fast:
            # The ids of the context are those that both have in common at the start.
            alone, _ = self._tokenize(contexts)
            for text, text_ids, context_ids in zip(texts, ids, alone, strict=True):
                pairs = zip(text_ids, context_ids, strict=False)
                same = [one == other for one, other in pairs]
                yield EncodedText(text, text_ids, [*same, False].index(False), None)
            return
        for text, context, text_ids, place in zip(texts, contexts, ids, places, strict=True):
            assert place is not None  # the tokenizer is fast
            # Not for an empty context: a tokenizer's dummy prefix may end at 0.
            num_context = int((place.ends <= len(context)).sum()) if context else 0
            yield EncodedText(text, text_ids, num_context, place.behind(context, 0))

    def _apart(self, texts: list[str], contexts: list[str]) -> Iterator[EncodedText]:
        """Context and text tokenised each by itself, and their ids joined."""
        (context_ids, _), (ids, places) = self._tokenize(contexts), self._tokenize(texts)
        for text, before, behind, place in zip(texts, context_ids, ids, places, strict=True):
            place = place and place.behind("", len(before))
            yield EncodedText(text, before + behind, len(before), place)

    def _started(self, text: EncodedText) -> EncodedText:
        """With the start token in front."""
        start = self.start_id
        assert start is not None  # who calls it has one
        # Chat templates render the start token into the text.
        if text.ids[:1] == [start] and not self.rules.start_token_twice:
            return text
        places = text.places and text.places.behind("", 1)
        return EncodedText(text.text, [start, *text.ids], 1 + text.num_prefix, places)

    def _cut(self, text: EncodedText) -> EncodedText:
        limit = self.options.max_length
        if limit is None or len(text.ids) <= limit:
            return text
        return replace(
            text,
            ids=text.ids[:limit],
            num_prefix=min(text.num_prefix, limit),
            places=text.places and text.places[:limit],
            truncated=True,
        )

    def _tokenize(
        self, texts: list[str], special_tokens: bool = False
    ) -> tuple[list[list[int]], list[Places | None]]:
        """The ids of each text, and their places."""
        options = {"split_special_tokens": True} if self.rules.spelt_tokens_are_text else {}
        encoded = self._call_tokenizer(texts, add_special_tokens=special_tokens, **options)
        if not self._is_fast:
            return encoded["input_ids"], [None] * len(texts)
        ids = encoded["input_ids"]
        return ids, list(map(self._places, texts, encoded["offset_mapping"], ids))

    def _places(self, text: str, offsets: list[tuple[int, int]], ids: Sequence[int]) -> Places:
        # An array: 16 bytes for each token, where a list of tuples has an object for each number.
        columns = text, np.array(offsets, dtype=np.int64), ids
        return Places(
            functools.partial(_ends_of_tokens, *columns, self.tokenizer.convert_ids_to_tokens)
        )

    def _call_tokenizer(self, texts: list[str] | None = None, **options) -> "BatchEncoding":
        """What the tokenizer returns: ids, and their offsets if it is fast."""
        defaults = {"truncation": False, "padding": False}
        with self._lock, _tokenizer_left_alone(self.tokenizer), tokenizer_errors():
            return self.tokenizer(
                texts,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=self._is_fast,
                **defaults | options,
            )


@contextmanager
def _tokenizer_left_alone(tokenizer) -> Iterator[None]:
    """Silence the tokenizer's warning of long texts, which windows take care of, and undo the
    option that a call sets in its backend."""
    logger = logging.getLogger("transformers.tokenization_utils_base")
    backend, level = getattr(tokenizer, "backend_tokenizer", None), logger.level
    splits = getattr(backend, "encode_special_tokens", None)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if backend is not None and splits is not None:
            backend.encode_special_tokens = splits


def _bytes_of_part(token: str) -> int:
    """UTF-8 bytes of a token that ends inside a character.

    A token of byte fallback, such as <0xF0>, is one byte; in a byte-level vocabulary (GPT-2's) each
    letter is one byte. The mark of a dummy prefix may share the place of the first character, but
    is no byte of the text.
    """
    return 1 if BYTE_TOKEN.fullmatch(token) else len(token.replace(DUMMY_PREFIX, ""))


def _bytes_before(text: str) -> np.ndarray:
    """UTF-8 bytes before each character of a text, and in total at the end: (characters + 1,)."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])
