"""Warnings that name the user's line, however deep in the library their reason is found."""

import sys
import warnings

from ppleval.shown import shown_message

# Where the user's line is not: contextlib stands between a context manager of this package and the
# `with` of another module.
INSIDE = ("ppleval", "contextlib")


class PerplexityWarning(UserWarning):
    """Something about logits, texts or a model that makes a number worth a second look."""


def warn_user(message: str) -> None:
    """Warn, as `warnings.warn` does, at the line that called into this package."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(shown_message(message), PerplexityWarning, stacklevel=level)
