"""What a fast tokenizer fails with, which is written in Rust, as an error of this library."""

from collections.abc import Iterator
from contextlib import contextmanager

from ppleval.shown import shown_message


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Raise ValueError where a tokenizer fails.

    The package `tokenizers` raises bare Exceptions. Where its code panics, as a damaged
    tokenizer.json can make it do, comes a BaseException, which passes by every `except Exception`.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = shown_message(error)
        raise ValueError(f"The tokenizer fails, its files may be damaged: {reason}") from error
