"""What a user passes as texts: whether they are texts, and each of them checked as it is read."""

import itertools
from collections.abc import Iterable, Iterator, Mapping


def are_texts(predictions) -> bool:
    """Whether this is a list, an array or a column of strings, by its first entry."""
    if isinstance(predictions, (str, Mapping)) or not hasattr(predictions, "__len__"):
        return False
    if getattr(predictions, "shape", None) == ():  # a lone number, which has no length after all
        return False
    return len(predictions) > 0 and isinstance(next(iter(predictions)), str)


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


def checked_pairs(
    texts: Iterable[str], contexts: Iterable[str] | None
) -> Iterator[tuple[str, str | None]]:
    """Each text with its context, checked when it is read.

    Raises:
        TypeError: a text or context that is no string.
        ValueError: no texts, more or fewer contexts than texts, or invalid Unicode.
    """
    missing = object()
    if contexts is None:
        pairs = ((text, None) for text in texts)
    else:
        pairs = itertools.zip_longest(texts, contexts, fillvalue=missing)
    number = -1
    for number, (text, context) in enumerate(pairs):
        if text is missing or context is missing:
            raise ValueError(
                "contexts must hold one prompt for each text; there are more "
                f"{'contexts' if text is missing else 'texts'}, beyond {number}."
            )
        text = _checked(text, f"predictions[{number}]")
        yield text, None if contexts is None else _checked(context, f"contexts[{number}]")
    if number < 0:
        raise ValueError("predictions holds no texts.")


def _checked(text, name: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no valid Unicode text: {error}.") from None
    return text
