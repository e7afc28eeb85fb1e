"""Results by group: texts or sequences of one name, such as the domain that they come from."""

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ppleval.stats.totals import NllTotals, Result, exp_or_inf

T = TypeVar("T")


def checked_groups(groups: Iterable) -> list[str]:
    """The names of groups as strings; whole numbers are taken, too.

    Raises:
        TypeError: one string for all, or something that is no name.
    """
    if isinstance(groups, (str, Mapping)) or not isinstance(groups, Iterable):
        raise TypeError(
            "groups must be a list with one name for each text or sequence, got "
            f"{type(groups).__name__}."
        )
    return [_checked(group, f"groups[{i}]") for i, group in enumerate(groups)]


def _checked(group: Any, name: str) -> str:
    whole = isinstance(group, numbers.Integral) and not isinstance(group, bool)
    if not isinstance(group, str) and not whole:
        raise TypeError(f"{name} must be a string or a whole number, got {group!r}.")
    return str(group)


def check_number(groups: Sequence[str], count: int) -> None:
    """Raises ValueError unless there is one group for each of `count` texts or sequences."""
    if len(groups) != count:
        raise ValueError(
            f"groups must hold one name for each text or sequence, got {len(groups)} names for "
            f"{count}."
        )


def by_group(values: Sequence[T], groups: Sequence[str]) -> dict[str, list[T]]:
    """The values of each group, in the order in which the groups first appear."""
    values_of: dict[str, list[T]] = {}
    for value, group in zip(values, groups, strict=True):
        values_of.setdefault(group, []).append(value)
    return values_of


def add_groups(groups: Mapping[str, NllTotals], others: Mapping[str, NllTotals]) -> dict:
    """The totals of each group of either, added up."""
    names = dict.fromkeys([*groups, *others])
    zero = NllTotals()
    return {name: groups.get(name, zero) + others.get(name, zero) for name in names}


def grouped(groups: Mapping[str, T], result_of: Callable[[T], Result]) -> Result:
    """What is added to a result: `groups`, the result of each, and means over groups.

        macro_mean_nll   = unweighted mean of the groups' mean_nll, without empty groups
        macro_perplexity = exp(macro_mean_nll)

    Perplexities themselves are never averaged. With two models, base_macro_... are the base's.
    """
    results = {name: result_of(values) for name, values in groups.items()}
    added: dict[str, Any] = {"groups": results}
    scored = [result for result in results.values() if result["num_tokens"]]
    for side in ("", "base_"):
        means = [result[f"{side}mean_nll"] for result in scored if f"{side}mean_nll" in result]
        if side == "" or means:
            mean = sum(means) / len(means) if means else float("nan")
            added[f"{side}macro_mean_nll"] = mean
            added[f"{side}macro_perplexity"] = exp_or_inf(mean)
    return added
