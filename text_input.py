"""Whether what a user passes are texts."""

from collections.abc import Iterable, Mapping


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
