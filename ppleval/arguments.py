"""What a method of `Perplexity` was given; its keywords are the fields of the options."""

from collections.abc import Sequence
from dataclasses import fields
from types import FunctionType
from typing import Any


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


# The default of an option for which what was said when the metric was made shows through.
UNSET: Any = _Unset()


def given(method: FunctionType, arguments: dict[str, Any], *kinds: type) -> dict[str, Any]:
    """The options among the arguments of a call that are not at their defaults, and unknown ones.

    Args:
        method: what was called; it has the defaults.
        arguments: its `locals()` before it binds other names; in `unknown` the keywords that it
            does not know, which whoever reads the options refuses.
        kinds: dataclasses, whose fields are the options.

    Raises:
        TypeError: `texts=`, which is called `predictions=`.
    """
    unknown = arguments["unknown"]
    _check_not_texts(unknown)
    names = {field.name for kind in kinds for field in fields(kind)}
    found = {}
    for name, default in (method.__kwdefaults__ or {}).items():
        value = arguments[name]
        is_default = value is default or (type(value) is type(default) and value == default)
        if name in names and not is_default:
            found[name] = value
    return found | unknown


def refuse(unknown: dict[str, Any], known: Sequence[str]) -> None:
    """Raises TypeError for keywords that a method, which takes the known ones, does not know."""
    _check_not_texts(unknown)
    for name in unknown:
        raise TypeError(
            f"unknown argument {name!r}. The arguments are {', '.join(known)}. Options go where "
            "the metric is made."
        )


def _check_not_texts(unknown: dict[str, Any]) -> None:
    if "texts" in unknown:
        raise TypeError("unknown argument 'texts'. The texts are called predictions.")
