"""What a method of `Perplexity` was given; its keywords are the fields of the options."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import fields
from types import FunctionType
from typing import Any


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


# The default of an option for which what was said when the metric was made shows through.
UNSET: Any = _Unset()

_TEXTS = "The texts are called predictions."
_MASK = (
    "Of logits, pass it as sample_weight=, or put -100 into the references where it is 0. Texts "
    "need none."
)
_MODEL = "A name or a directory of a model goes to model_id=, an object to model= and tokenizer=."
# What other libraries, and people, call an argument -> what it is called here.
REMEDIES = {
    **dict.fromkeys(("texts", "text", "data", "dataset", "input_texts", "inputs"), _TEXTS),
    "logits": "The logits are called predictions.",
    **dict.fromkeys(("labels", "targets", "target"), "The token ids are called references."),
    "input_ids": "They are called references; of a causal model they go with shift=True.",
    **dict.fromkeys(("attention_mask", "mask"), _MASK),
    **dict.fromkeys(("weights", "weight"), "The weights are called sample_weight."),
    **dict.fromkeys(("prompts", "prompt", "context"), "The prompts are called contexts."),
    **dict.fromkeys(("model_name", "model_name_or_path", "pretrained", "checkpoint"), _MODEL),
}


def given(method: FunctionType, arguments: dict[str, Any], *kinds: type) -> dict[str, Any]:
    """The options among the arguments of a call that are not at their defaults.

    Args:
        method: what was called; it has the defaults.
        arguments: its `locals()` before it binds other names; in `unknown` the keywords that it
            does not know.
        kinds: dataclasses, whose fields are the options.

    Raises:
        TypeError: a keyword that the method does not know.
    """
    if arguments["unknown"]:
        refuse(arguments["unknown"], method, type(arguments["self"]))
    names = {field.name for kind in kinds for field in fields(kind)}
    found = {}
    for name, default in (method.__kwdefaults__ or {}).items():
        value = arguments[name]
        is_default = value is default or (type(value) is type(default) and value == default)
        if name in names and not is_default:
            found[name] = value
    return found


def refuse(unknown: dict[str, Any], method: FunctionType, owner: type) -> None:
    """Raises TypeError for keywords that a method of the class `owner` does not know."""
    for name in unknown:
        known = _names(method)
        remedy = _remedy(name, known, owner)
        raise TypeError(f"unknown argument {name!r}. {remedy}The arguments are {', '.join(known)}.")


def _remedy(name: str, known: list[str], owner: type) -> str:
    """What to pass in place of an unknown argument, as a sentence with a blank behind it."""
    if name in REMEDIES:
        return f"{REMEDIES[name]} "
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if alike:
        return f"Did you mean {alike[0]}? "
    takers = [
        other
        for other, method in inspect.getmembers(owner, inspect.isfunction)
        if not other.startswith("_") and name in _names(method)
    ]
    makers = [vars(kind)["__init__"] for kind in owner.__mro__ if "__init__" in vars(kind)]
    if any(name in _names(maker) for maker in makers):
        takers.append("where the metric is made")
    if not takers:
        return ""
    *others, last = takers
    return f"It goes to {', '.join(others)}{' or ' if others else ''}{last}. "


def _names(method: Callable) -> list[str]:
    """The arguments of a method that can be given by name."""
    parameters = inspect.signature(method).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.name != "self"]
