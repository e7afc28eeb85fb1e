"""What a user passes as texts: whether they are texts or conversations, and each of them checked as
it is read."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ppleval.user_warnings import warn_user

# Where datasets have their texts and conversations.
COLUMNS = ("text", "messages", "content", "sentence", "document")
NO_IDS = "Pass the texts themselves: they are tokenised here, with the tokenizer of the model."


def are_texts(predictions) -> bool:
    """Whether this is a list, an array or a column of texts or conversations, by its first entry.

    What is no logits anyway, such as the rows of a table, was meant as texts.
    """
    if isinstance(predictions, (str, Mapping)) or not hasattr(predictions, "__len__"):
        return False
    if getattr(predictions, "shape", None) == ():  # a lone number, which has no length after all
        return False
    first = next((entry for entry in predictions if entry is not None), None)
    return isinstance(first, str | bytes | Mapping) or is_conversation(first) or _are_tokens(first)


def _are_tokens(entry) -> bool:
    """Whether this is a list of strings."""
    is_list = isinstance(entry, list | tuple)
    if isinstance(entry, np.ndarray):
        is_list = entry.ndim == 1
    return is_list and len(entry) > 0 and isinstance(entry[0], str)


def is_conversation(entry) -> bool:
    """Whether this is a list of messages, which need not be complete."""
    is_list = isinstance(entry, Sequence) and not isinstance(entry, str)
    if isinstance(entry, np.ndarray):  # a cell of a table
        is_list = entry.ndim == 1
    return is_list and len(entry) > 0 and isinstance(entry[0], Mapping)


def with_kind(texts: Iterable) -> tuple[Iterable, bool]:
    """The texts, and whether they are conversations, by the first one.

    An error of reading it is raised again where it is read next: there, other processes are told.
    """
    rest = iter(texts)
    try:
        first = list(itertools.islice(rest, 1))
    except Exception as error:
        return _raising(error), False
    texts = texts if rest is not texts else itertools.chain(first, rest)
    return texts, bool(first) and is_conversation(first[0])


def _raising(error: Exception) -> Iterator:
    raise error
    yield


def check_texts(texts) -> None:
    """Raises TypeError for anything but a collection of texts, as far as it is known unread."""
    if texts is None:
        raise TypeError("predictions is missing: pass a list of texts, or of conversations.")
    check_collection(texts, "predictions")


def check_collection(texts, name: str) -> None:
    """Raises TypeError for anything but None and a collection of texts, such as one string."""
    if isinstance(texts, str | bytes):
        raise TypeError(
            f"{name} must be a list of texts, got one string. Wrap it in a list: [text]."
        )
    if texts is None:
        return
    if type(texts) is not list:
        _check_no_table(texts, name)
    if not isinstance(texts, Iterable):
        raise TypeError(f"{name} must be a list of texts, got {type(texts).__name__}.")
    first = texts[0] if isinstance(texts, Sequence) and len(texts) > 0 else ""
    if _is_message(first):
        raise TypeError(
            f"{name} must be a list of conversations, got the messages of one. Wrap it in a list: "
            "[messages]."
        )
    if not is_conversation(first):
        _checked(first, name, 0)


def _check_no_table(texts, name: str) -> None:
    """Raises TypeError for a table, for a dict of columns and for what a tokenizer returns."""
    if _is_tokenized(texts):
        raise TypeError(f"{name} must be a list of texts, got {type(texts).__name__}. {NO_IDS}")
    column = _column_of(texts)
    if column is not None:
        raise TypeError(
            f"{name} must be a list of texts, got a table ({type(texts).__name__}). Pass one of "
            f"its columns: table{column}."
        )


def _is_message(entry) -> bool:
    """Whether this is a message of a conversation, which need not be complete."""
    return isinstance(entry, Mapping) and not entry.keys().isdisjoint(("role", "content"))


def _names_in(table) -> list | None:
    """The columns of a table, or the keys of a dict; None for anything else."""
    if isinstance(table, Mapping):
        return list(table)
    columns = getattr(table, "column_names", getattr(table, "columns", None))
    return None if columns is None else list(columns)


def _is_tokenized(value) -> bool:
    """Whether this is what a tokenizer returns, or a table or row of it without the text."""
    names = _names_in(value) or []
    return "input_ids" in names and not any(column in names for column in COLUMNS)


def _column_of(table) -> str | None:
    """How to get the texts out of a table, such as "['text']"; None for anything else."""
    names = _names_in(table)
    if isinstance(table, Mapping) and names and _names_in(table[names[0]]) is not None:
        return f"[{names[0]!r}]{_column_of(table[names[0]])}"  # the splits of a DatasetDict
    return None if names is None else f"[{_text_column(names)!r}]"


def _text_column(names: list) -> Any:
    """The column of a table, or key of a row, that probably has the texts."""
    return next((name for name in COLUMNS if name in names), names[0] if names else COLUMNS[0])


def checked_pairs(
    texts: Iterable,
    contexts: Iterable[str] | None,
    conversations: bool = False,
    warns: bool = True,
) -> Iterator[tuple[Any, str | None]]:
    """Each text with its context, or each conversation, checked when it is read.

    Raises:
        TypeError: a text or context that is no string; a conversation that is no list of messages
            with a role and a content.
        ValueError: no texts, more or fewer contexts than texts, contexts of conversations, or
            invalid Unicode.
    """
    if conversations and contexts is not None:
        raise ValueError(
            "Conversations have no contexts: what comes before a turn conditions it. Put a context "
            "into a message of the user or the system."
        )
    missing = object()
    if contexts is None:
        pairs = zip(texts, itertools.repeat(None))
    else:
        pairs = itertools.zip_longest(texts, contexts, fillvalue=missing)
    check = _checked_conversation if conversations else _checked
    number, warned = -1, not warns
    for number, (text, context) in enumerate(pairs):
        if text is missing or context is missing:
            raise ValueError(
                "contexts must hold one prompt for each text; there are more "
                f"{'contexts' if text is missing else 'texts'}, beyond {number}."
            )
        checked = check(text, "predictions", number)
        if not warned and isinstance(text, np.ndarray) and _has_whole_float(checked):
            warned = True
            warn_user(
                f"predictions[{number}] has a number such as 1.0, which may have been 1: pandas "
                "makes floats of whole numbers where a row has none, and a template prints them. "
                'Read the table with dtype_backend="pyarrow", or pass a column of a Dataset.'
            )
        yield checked, None if contexts is None else _checked(context, "contexts", number)
    if number < 0:
        raise ValueError("predictions holds no texts.")


def plain(value: Any) -> Any:
    """A text, a conversation or a part of one as JSON has it, without keys whose value is None.

    Arrow gives all dicts of a column the same keys, at any depth, and None for those that a row
    does not have. Nothing tells such a None from one that was there, so neither is data. In a list
    None stays. Tables hold lists as arrays.
    """
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _has_whole_float(value: Any) -> bool:
    """Whether there is a float without a fraction, or NaN, in a plain value."""
    if isinstance(value, dict | list):
        return any(map(_has_whole_float, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and not value % 1 > 0


def num_characters(text: str | Sequence[Mapping[str, Any]]) -> int:
    """How long a text or, roughly, a conversation is."""
    if isinstance(text, str):
        return len(text)
    return sum(len(str(value)) for message in text for value in message.values())


def _checked(text, name: str, number: int) -> str:
    place = f"{name}[{number}]"
    if not isinstance(text, str):
        raise TypeError(
            f"{place} must be a string, got {type(text).__name__}.{_remedy(text, number)}"
        )
    _check_unicode(text, place)
    return text


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is no valid Unicode text: {error}.") from None


def _remedy(entry, number: int) -> str:
    """What to pass in place of something that is no text, as a sentence behind a blank."""
    if _is_missing(entry):
        return f" Row {number + 1}, counted from 1, is empty: leave it out, or pass ''."
    if is_conversation(entry):
        return " All are texts, or all are conversations."
    if _is_tokenized(entry) or _kind_of_numbers(entry) == "i":
        return f" {NO_IDS}"
    if _kind_of_numbers(entry) == "f":
        return " Logits go with references=, without a model."
    if _is_message(entry):
        return " A conversation is a list of messages: wrap it in a list, [messages]."
    if isinstance(entry, Mapping):
        texts = [key for key, value in entry.items() if isinstance(value, str)]
        column = _text_column(texts or list(entry))
        return f" Pass one field of each row: [row[{column!r}] for row in rows]."
    if _are_tokens(entry):
        return (
            " Join tokens to a text: tokenizer.convert_tokens_to_string(tokens), or words: "
            "' '.join(words)."
        )
    if isinstance(entry, bytes):
        return " Decode it: .decode()."
    if isinstance(entry, os.PathLike):
        return " A file is not read: pass what it holds, path.read_text()."
    return ""


def _is_missing(entry) -> bool:
    """Whether this is how lists and tables have a text that is not there."""
    is_nan = isinstance(entry, float) and math.isnan(entry)
    return entry is None or is_nan or type(entry).__name__ == "NAType"


def _kind_of_numbers(entry) -> str:
    """Whether lists, arrays and tensors hold integers, "i", or floats, "f"; "" for neither."""
    dtype = str(getattr(entry, "dtype", ""))
    while isinstance(entry, list | tuple) and entry:
        entry = entry[0]
    if isinstance(entry, int) or "int" in dtype:
        return "i"
    return "f" if isinstance(entry, float) or "float" in dtype else ""


def _checked_conversation(messages, name: str, number: int) -> list[dict[str, Any]]:
    place = f"{name}[{number}]"
    if not is_conversation(messages):
        hint = " All are texts, or all are conversations." if isinstance(messages, str) else ""
        if _is_missing(messages):
            hint = f" Row {number + 1}, counted from 1, is empty: leave it out."
        found = "an empty one" if messages == [] else type(messages).__name__
        raise TypeError(f"{place} must be a conversation, a list of messages, got {found}.{hint}")
    messages = plain(messages)  # which all processes print alike
    for i, message in enumerate(messages):
        _check_message(message, f"{place}[{i}]")
    return messages


def _check_message(message, name: str) -> None:
    if not isinstance(message, Mapping):
        raise TypeError(
            f"{name} must be a message, such as {{'role': 'user', 'content': 'Hello'}}, got "
            f"{type(message).__name__}."
        )
    if not isinstance(message.get("role"), str):
        raise TypeError(f"{name} has no role: it needs one such as 'user' or 'assistant'.")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise TypeError(f"{name} has no content: it needs a text, got {content!r}.")
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise TypeError(f"{name} has content that is no text, which is not scored: {part!r}.")
        _check_unicode(part["text"], f"{name}['content']")
