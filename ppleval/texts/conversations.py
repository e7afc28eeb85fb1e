"""Conversations -> token ids, and which of them are scored.

A token counts as the speaker's if it begins in what the speaker says: one that begins in the header
of the turn and reaches into the content does not.
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppleval.models.identity import short_hash
from ppleval.texts.chat_template import ChatTemplate, Messages, Rendering
from ppleval.texts.encoding import EncodedText, Places, TextEncoder
from ppleval.texts.options import TextOptions
from ppleval.texts.windows import CutIntoWindows, Window, only_scoring


@dataclass(frozen=True, kw_only=True)
class EncodedConversation(EncodedText):
    """The ids of a conversation; of all its texts, one after the other, if it needs several."""

    messages: Messages
    parts: list[tuple[int, int]]  # ids [first, stop) of each text
    scored: list[tuple[int, int]]  # ids [first, stop), ascending
    special: frozenset[int]  # ids that stand for no text, such as that of the end of a turn

    @property
    def given(self) -> Messages:
        """What the user passed."""
        return self.messages

    def text_of(self, first: int, stop: int) -> str:
        """The part of the text that ids[first:stop] stand for, without special tokens."""
        pieces = (super(EncodedConversation, self).text_of(*run) for run in self._runs(first, stop))
        return "".join(pieces)

    def num_bytes(self, first: int, stop: int) -> int:
        """UTF-8 bytes of the text that ids[first:stop] stand for, without special tokens."""
        runs = self._runs(first, stop)
        return sum(super(EncodedConversation, self).num_bytes(*run) for run in runs)

    def _runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """ids[first:stop] without special ones, as ranges."""
        for is_special, run in itertools.groupby(
            range(first, stop), lambda place: self.ids[place] in self.special
        ):
            if not is_special:
                places = list(run)
                yield places[0], places[-1] + 1

    def windows(self, cut: CutIntoWindows, window: int, stride: int) -> Iterator[Window]:
        """Windows that score what the speakers say; each lies in one of the texts."""
        for begin, end in self.parts:
            # Nothing stands in front of the first id.
            scored = [(max(a, begin + 1), b) for a, b in self.scored if begin <= a < end]
            scored = [(a, b) for a, b in scored if a < b]
            if scored:
                windows = cut(scored[-1][1] - begin, window, stride, scored[0][0] - begin)
                yield from only_scoring(scored, windows, begin)


class ConversationEncoder(TextEncoder):
    """Encodes conversations under one set of options.

    Raises:
        ValueError: a tokenizer without a chat template, or a slow one.
    """

    def __init__(self, tokenizer, options: TextOptions):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"Conversations need a fast tokenizer, which tells where its tokens stand in the "
                f"text; {type(tokenizer).__name__} is a slow one."
            )
        self.template = ChatTemplate(
            tokenizer, options.chat_template, options.chat_template_kwargs or {}, options.roles
        )
        super().__init__(tokenizer, options)

    def _start_id(self) -> int | None:
        """The BOS, if the template puts it in front."""
        bos, user = self.tokenizer.bos_token_id, {"role": "user", "content": "a"}
        for messages in ([user], [{"role": "system", "content": "a"}, user]):
            with contextlib.suppress(ValueError):  # a template may ask for a system message
                text = self.template.render(messages).text
                first = self.tokenizer(text, add_special_tokens=False).input_ids[:1]
                return bos if first == [bos] else None
        return None

    @property
    def start_name(self) -> str:
        """For the signature: the template decides."""
        return "template"

    def settings(self) -> dict[str, str | None]:
        """What a signature says of how conversations are read."""
        variables = self.options.chat_template_kwargs
        return {
            "chat_template": short_hash(self.template.source),
            "chat_template_kwargs": short_hash(_canonical(variables)) if variables else None,
            "roles": ",".join(self.template.roles),
        }

    def encode(
        self, texts: Sequence[Any], contexts: Sequence[str] | None
    ) -> Sequence[EncodedConversation]:
        """Encode conversations, which have no contexts.

        Raises:
            ValueError: the template refuses one, or does not show where a turn begins.
        """
        rendered = [self.template.renderings(messages) for messages in texts]
        ids, places = self._tokenize([part.text for part in itertools.chain(*rendered)])
        encoded = zip(ids, places, strict=True)
        return [
            self._joined_parts(messages, parts, list(itertools.islice(encoded, len(parts))))
            for messages, parts in zip(texts, rendered, strict=True)
        ]

    def _joined_parts(
        self,
        messages: Messages,
        renderings: Sequence[Rendering],
        encoded: Sequence[tuple[list[int], Places | None]],
    ) -> EncodedConversation:
        all_ids: list[int] = []
        parts: list[tuple[int, int]] = []
        scored: list[tuple[int, int]] = []
        columns: list[tuple[str, Places]] = []
        for rendering, (ids, places) in zip(renderings, encoded, strict=True):
            assert places is not None  # the tokenizer is fast
            begin = len(all_ids)
            all_ids += ids
            parts.append((begin, len(all_ids)))
            scored += [(begin + a, begin + b) for a, b in _ids_of(rendering, places)]
            columns.append((rendering.text, places))
        text = "".join(rendering.text for rendering in renderings)
        joined = Places(functools.partial(_joined_places, columns))
        return EncodedConversation(
            text,
            all_ids,
            0,
            joined,
            messages=messages,
            parts=parts,
            scored=scored,
            special=self.template.special_ids,
        )


def _canonical(variables: Mapping[str, Any]) -> str:
    """Equal for equal variables, in whichever order; a tool that is a function goes by its name."""
    return json.dumps(
        variables, sort_keys=True, default=lambda it: getattr(it, "__name__", str(it))
    )


def _ids_of(rendering: Rendering, places: Places) -> Iterator[tuple[int, int]]:
    """The ids [first, stop) that begin in what is scored; ranges without any are left out."""
    # In bytes, because several tokens may stand for one character.
    begins = np.concatenate([[0], places.byte_ends[:-1]])
    for start, stop in rendering.scored:
        before = len(rendering.text[:start].encode())
        size = len(rendering.text[start:stop].encode())
        first, last = np.searchsorted(begins, [before, before + size])
        if first < last:
            yield int(first), int(last)


def _joined_places(columns: Sequence[tuple[str, Places]]) -> tuple[np.ndarray, np.ndarray]:
    """The places of several texts in one behind the other."""
    ends, byte_ends = [], []
    num_characters = num_bytes = 0
    for text, places in columns:
        ends.append(places.ends + num_characters)
        byte_ends.append(places.byte_ends + num_bytes)
        num_characters += len(text)
        num_bytes += len(text.encode())
    return np.concatenate(ends), np.concatenate(byte_ends)
