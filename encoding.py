"""Texts -> token ids: the start token, the prompt, truncation, and the place of each token."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .options import TextOptions


@dataclass(frozen=True)
class EncodedText:
    """The ids of a text behind what only conditions it."""

    text: str
    ids: list[int]  # start token, context, text
    num_prefix: int  # how many of the ids stand before the text
    ends: np.ndarray | None  # character of the text at which each id ends; 0 for the prefix
    truncated: bool

    def span(self, first: int, stop: int) -> str:
        """The part of the text that ids[first:stop] stand for; needs character offsets."""
        # Spaces that a tokenizer leaves out of its offsets belong to the token behind them.
        last = stop == len(self.ids) and not self.truncated
        return self.text[self.ends[first - 1] : None if last else self.ends[stop - 1]]


class TextEncoder:
    """Encodes texts in batches under one policy of start token and truncation."""

    def __init__(self, tokenizer, options: TextOptions):
        self.tokenizer = tokenizer
        self.options = options
        self.start_id = self._start_id()

    def _start_id(self) -> int | None:
        start = self.options.add_start_token
        if start is False:
            return None
        if start is not True:
            return start
        start = self.tokenizer.bos_token_id
        if start is None and self.options.preset == "lm-eval":
            start = self.tokenizer.eos_token_id
        return start

    @property
    def start_name(self) -> str:
        """For the signature: the start token as text, or why there is none."""
        if self.options.preset == "hf-docs":
            return "tokenizer"  # whatever the tokenizer itself adds
        if self.start_id is None:
            return "none" if self.options.add_start_token is False else "none(no-bos)"
        return str(self.tokenizer.convert_ids_to_tokens(self.start_id))

    def encode(self, texts: Sequence[str], contexts: Sequence[str] | None) -> list[EncodedText]:
        """Encode a batch of texts, each behind its context where there are contexts."""
        preset = self.options.preset
        # The recipe lets the tokenizer add what it wants, and lm-eval puts its prefix before that.
        own_specials = preset in ("hf-docs", "lm-eval")
        prefix = [] if preset == "hf-docs" or self.start_id is None else [self.start_id]
        texts = list(texts)
        ids, ends = self._tokenize(texts, own_specials)
        if preset == "lm-eval" and prefix:
            # A text that brings the prefix itself is tokenised without special tokens.
            spelt = self.tokenizer.decode(prefix)
            bring = [i for i, text in enumerate(texts) if spelt and text.startswith(spelt)]
            if bring:
                plain_ids, plain_ends = self._tokenize([texts[i] for i in bring], False)
                for i, *pair in zip(bring, plain_ids, plain_ends, strict=True):
                    ids[i], ends[i] = pair
        prefixes = [prefix] * len(texts)
        if contexts is not None:
            context_ids, _ = self._tokenize(list(contexts), False)
            prefixes = [prefix + context for context in context_ids]
        return [
            self._put_together(*parts) for parts in zip(texts, prefixes, ids, ends, strict=True)
        ]

    def _put_together(self, text: str, prefix: list[int], ids: list[int], ends) -> EncodedText:
        whole = prefix + ids
        limit = self.options.max_length
        kept = whole if limit is None else whole[:limit]
        if ends is not None:
            ends = np.maximum.accumulate([0] * len(prefix) + ends, dtype=np.int64)[: len(kept)]
        return EncodedText(text, kept, min(len(prefix), len(kept)), ends, len(kept) < len(whole))

    def _tokenize(self, texts: list[str], special_tokens: bool) -> tuple[list, list]:
        """Ids, and the character at which each ends (None from a slow tokenizer), of each text."""
        fast = getattr(self.tokenizer, "is_fast", False)
        logger = logging.getLogger("transformers.tokenization_utils_base")
        level = logger.level
        # It warns of texts longer than the model's context, for which there are windows here.
        logger.setLevel(logging.ERROR)
        try:
            encoded = self.tokenizer(
                texts,
                add_special_tokens=special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=fast,
                truncation=False,
                padding=False,
            )
        finally:
            logger.setLevel(level)
        if not fast:
            return encoded["input_ids"], [None] * len(texts)
        ends = [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]
        return encoded["input_ids"], ends


def count_words(text: str, preset: str | None) -> int:
    """Words between white space; lm-eval also counts an empty one at a blank start or end."""
    return len(re.split(r"\s+", text)) if preset == "lm-eval" else len(text.split())
