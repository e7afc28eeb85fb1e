"""What can be told of texts and options without a model, which may take minutes to load."""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence, Sized
from typing import Any

from ppleval.logits.options import positive_int
from ppleval.stats.groups import check_number
from ppleval.texts.inputs import check_collection, checked_pairs
from ppleval.texts.options import TextOptions


def checked_texts(
    texts: Iterable,
    contexts: Iterable | None,
    options: TextOptions,
    *,
    groups: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> tuple[Iterable, Iterable | None]:
    """The texts and the contexts, to be read as before.

    What can be read twice, such as a list or a column, is checked as a whole; of a generator the
    first text is, and the others when they are read.

    Raises:
        TypeError, ValueError: texts, contexts, their numbers, or options that do not fit.
    """
    check_collection(texts, "predictions")
    check_collection(contexts, "contexts")
    options.check_use(with_contexts=contexts is not None, with_groups=groups is not None)
    if batch_size is not None:
        positive_int(batch_size, "batch_size")
    texts, texts_here = _twice(texts)
    contexts, contexts_here = _twice(contexts)
    pairs = checked_pairs(texts_here, contexts_here, options.conversations, warns=False)
    is_whole = texts_here is texts and contexts_here is contexts
    deque(pairs if is_whole else itertools.islice(pairs, 1), maxlen=0)
    if groups is not None and isinstance(texts, Sized):
        check_number(groups, len(texts))
    return texts, contexts


def check_scores(options: TextOptions, top_k: int, corrected: bool) -> int:
    """`top_k` as an int, of a call for the scores of texts.

    Raises:
        TypeError, ValueError: values of the wrong type or out of range; conversations, which
            cannot be corrected for.
    """
    if not isinstance(corrected, bool):
        raise TypeError(f"corrected must be True or False, got {corrected!r}.")
    if corrected and options.conversations:
        raise ValueError("corrected=True goes with texts; a turn ends with a token of its own.")
    return positive_int(top_k, "top_k", least=0)


def _twice(values: Iterable | None) -> tuple[Any, Any]:
    """The values, and once more: the same object where it can be read twice, else a copy."""
    can_be = hasattr(values, "__len__") and hasattr(values, "__getitem__")
    if values is None or can_be:
        return values, values
    first, second = itertools.tee(values)
    return first, second
