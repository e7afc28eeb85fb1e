"""Which tokens of a vocabulary begin a new word."""

import torch

from .text_causal import CausalModel

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
