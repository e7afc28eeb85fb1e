"""The words of a scored text, those between white space, and the surprisal of each.

Tokens are not words: a word has several, and a token may reach into several words, or end with the
white space behind one. What a word takes from which token is decided here.
"""

import bisect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ppleval.models.kinds import CausalModel


@dataclass(frozen=True)
class Word:
    """A word, or several that share a token, whose surprisal cannot be divided among them."""

    text: str
    start: int  # characters [start, end) of the scored text
    end: int
    tokens: range  # the numbers of its tokens
    nll: float  # of its tokens together, nats; NaN if one of them is not scored
    corrected_nll: float | None = None  # -log p(word), nats; None if it was not asked for


def words_of(score) -> list[Word]:
    """The words of a `TextScore`, in order; of a text that was cut, those of what is left of it.

    A token belongs to the word with its first character that is no white space. Tokens of nothing
    but white space belong to the next word, at the end of the text to the last. So the words' nll
    add up to that of the text; a text without a word has none.

        corrected_nll = nll - log P(a word begins | all before the next word)
                            + log P(a word begins | all before this word)

    (Pimentel and Meister 2024; Oh and Schuler 2024.) Where tokens carry the space in front of them,
    only the first token of the next word tells that a word has ended. The correction gives the
    probability of that to the word that ends. Its logarithm is 0 behind a token that ends with
    white space, where a word begins anyway, and before a text that begins with a word. Neighbours
    have it in common, so the corrected nll add up to that of the text and the terms of its ends.

    Raises:
        ValueError: a score without offsets, which needs a fast tokenizer.
    """
    if score.offsets is None:
        raise ValueError(
            "Words need the places of tokens in the text, which a slow tokenizer does not give. "
            "Load the fast one (use_fast=True)."
        )
    end = score.offsets[-1][1] if score.offsets else 0
    places = [match.span() for match in re.finditer(r"\S+", score.text[:end])]
    if not places:
        return []
    found = []
    for tokens, first, last in _groups(score.offsets, places, _tokens_of_words(score)):
        start, stop = places[first][0], places[last][1]
        nll = sum(score.nll[tokens.start : tokens.stop])
        corrected = None
        if score.word_start_nll is not None:
            begins_text = not found and start == 0
            before = 0.0 if begins_text else _boundary_nll(score, tokens.start)
            corrected = nll + _boundary_nll(score, tokens.stop) - before
        found.append(Word(score.text[start:stop], start, stop, tokens, nll, corrected))
    return found


def _tokens_of_words(score) -> list[int]:
    """The numbers of all tokens but those that are not scored and stand for no more than white
    space, such as the line end behind the header of a turn, or a special token in front of all."""
    return [
        i
        for i, (start, end) in enumerate(score.offsets)
        if score.text[start:end].strip() or (start == end > 0) or not math.isnan(score.nll[i])
    ]


def _groups(
    offsets: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]], tokens: Sequence[int]
) -> Iterator[tuple[range, int, int]]:
    """(numbers of tokens, number of their first word, of their last) of each group of these tokens;
    no word is in two groups, and no group could be divided."""
    starts, ends = zip(*places, strict=True)
    group: tuple[range, int, int] | None = None
    for i in tokens:
        start, end = offsets[i]
        first = min(bisect.bisect_right(ends, start), len(places) - 1)
        last = max(first, bisect.bisect_left(starts, end) - 1)
        if group is not None and start == end:  # the rest of a character, or a special token
            group = range(group[0].start, i + 1), *group[1:]
        elif group is not None and first <= group[2]:
            group = range(group[0].start, i + 1), group[1], max(group[2], last)
        else:
            if group is not None:
                yield group
            group = range(i, i + 1), first, last
    if group is not None:
        yield group


def _boundary_nll(score, number: int) -> float:
    """-log P(a word begins) in front of token `number`, or behind the last, in nats."""
    if number > 0:
        end = score.offsets[number - 1][1]
        # A tokenizer may leave white space out of the offsets of the token that ends with it.
        if score.text[end - 1 : end].isspace() or score.tokens[number - 1][-1:].isspace():
            return 0.0
    return score.word_start_nll[number]


# Any letter: a token stands in the middle of a text behind it.
LETTER = "a"


def word_start_ids(model) -> torch.Tensor:
    """The ids, ascending, of tokens that begin with white space, and of that which ends a text.

    Raises:
        ValueError: not a causal model, or its tokens do not carry the white space in front of them.
    """
    if not isinstance(model, CausalModel):
        raise ValueError(
            f"corrected=True needs one causal language model, and {model.name} is something else. "
            "Leave it out: words have a nll without it."
        )
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"corrected=True needs a fast tokenizer, got {type(tokenizer).__name__}. "
            "Load it with use_fast=True."
        )
    found = _begin_with_space(tokenizer)
    two_words = tokenizer(f"{LETTER} {LETTER}", add_special_tokens=False).input_ids
    if found.isdisjoint(two_words):
        raise ValueError(
            "corrected=True needs a tokenizer whose tokens carry the space in front of them, such "
            f"as GPT-2's or Llama's; {type(tokenizer).__name__} reads {LETTER!r} behind a space as "
            f"{tokenizer.convert_ids_to_tokens(two_words)[-1:]}."
        )
    end = tokenizer.eos_token_id
    found |= {end} if isinstance(end, int) else set()
    return torch.tensor(sorted(i for i in found if i < model.vocab_size))


def _begin_with_space(tokenizer) -> set[int]:
    """The ids whose token begins with white space in the middle of a text."""
    backend = tokenizer.backend_tokenizer
    before = tokenizer(LETTER, add_special_tokens=False).input_ids
    skipped = len(backend.decode(before, skip_special_tokens=False))
    # At the start of a text some decoders drop the white space.
    texts = backend.decode_batch(
        [[*before, i] for i in range(len(tokenizer))], skip_special_tokens=False
    )
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    found = set()
    for i, (text, name) in enumerate(zip(texts, names, strict=True)):
        text = text[skipped:]
        # A decoder that puts spaces between tokens (BERT's) leaves the rest as the token is named.
        if text[:1].isspace() and not (name and text.split()[:1] and name[0] == text.split()[0][0]):
            found.add(i)
    return found
