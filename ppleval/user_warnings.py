"""Warnings that name the user's line, however deep in the library their reason is found."""

import sys
import warnings
from types import FrameType

from ppleval.shown import shown_message


class PerplexityWarning(UserWarning):
    """Something about logits, texts or a model that makes a number worth a second look."""


def warn_user(message: str) -> None:
    """Warn, as `warnings.warn` does, at the line that called into this package."""
    frame, level = sys._getframe(1), 2
    while frame is not None and _is_inside(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(shown_message(message), PerplexityWarning, stacklevel=level)


def _is_inside(frame: FrameType) -> bool:
    # contextlib stands between a context manager of this package and the `with` of another module.
    name = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] == "ppleval" or name == "contextlib"
