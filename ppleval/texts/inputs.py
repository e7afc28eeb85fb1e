"""What a user passes as texts: whether they are texts or conversations, and each of them checked as
it is read."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ppleval.user_warnings import warn_user


def are_texts(predictions) -> bool:
    """Whether this is a list, an array or a column of texts or conversations, by its first one."""
    if isinstance(predictions, (str, Mapping)) or not hasattr(predictions, "__len__"):
        return False
    if getattr(predictions, "shape", None) == ():  # a lone number, which has no length after all
        return False
    first = next(iter(predictions)) if len(predictions) > 0 else None
    return isinstance(first, str) or is_conversation(first)


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


def check_collection(texts, name: str) -> None:
    """Raises TypeError for anything but None and a collection of texts, such as one string."""
    if isinstance(texts, str):
        raise TypeError(
            f"{name} must be a list of texts, got one string. Wrap it in a list: [text]."
        )
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        raise TypeError(f"{name} must be a list of texts, got a table. Pass one of its columns.")
    if texts is not None and not isinstance(texts, Iterable):
        raise TypeError(f"{name} must be a list of texts, got {type(texts).__name__}.")
    if isinstance(texts, Sequence) and len(texts) > 0 and isinstance(texts[0], Mapping):
        raise TypeError(
            f"{name} must be a list of conversations, got the messages of one. Wrap it in a list: "
            "[messages]."
        )


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
        pairs = ((text, None) for text in texts)
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
        checked = check(text, f"predictions[{number}]")
        if not warned and isinstance(text, np.ndarray) and _has_whole_float(checked):
            warned = True
            warn_user(
                f"predictions[{number}] has a number such as 1.0, which may have been 1: pandas "
                "makes floats of whole numbers where a row has none, and a template prints them. "
                'Read the table with dtype_backend="pyarrow", or pass a column of a Dataset.'
            )
        yield checked, None if contexts is None else _checked(context, f"contexts[{number}]")
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


def _checked(text, name: str) -> str:
    if not isinstance(text, str):
        hint = " All are texts, or all are conversations." if is_conversation(text) else ""
        raise TypeError(f"{name} must be a string, got {type(text).__name__}.{hint}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no valid Unicode text: {error}.") from None
    return text


def _checked_conversation(messages, name: str) -> list[dict[str, Any]]:
    if not is_conversation(messages):
        hint = " All are texts, or all are conversations." if isinstance(messages, str) else ""
        found = "an empty one" if messages == [] else type(messages).__name__
        raise TypeError(f"{name} must be a conversation, a list of messages, got {found}.{hint}")
    messages = plain(messages)  # which all processes print alike
    for i, message in enumerate(messages):
        _check_message(message, f"{name}[{i}]")
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
        _checked(part["text"], f"{name}['content']")
