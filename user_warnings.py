"""Warnings that name the user's line, however deep in the metric their reason is found."""

import sys
import warnings
from types import FrameType


def warn_user(message: str) -> None:
    """Warn, as `warnings.warn` does, at the line that called into this package."""
    frame, level = sys._getframe(1), 2
    while frame is not None and _is_inside(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_inside(frame: FrameType) -> bool:
    # contextlib stands between a context manager of this package and the `with` of another module.
    names = frame.f_globals
    return names.get("__package__") == __package__ or names.get("__name__") == "contextlib"
