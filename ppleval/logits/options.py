"""The settings that change the number: their checks, and the signature that names them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppleval import __version__
from ppleval.logits.tensors import IGNORE_INDEX, check_backend, ignored_ids, reduction_dtype
from ppleval.shown import shown


@dataclass(frozen=True)
class Options:
    """What `evaluate.load` and `compute` take; compared, merged and printed as one value.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, named.
    """

    from_logits: bool = True
    ignore_index: int | Sequence[int] | None = IGNORE_INDEX
    mask_token_id: int | None = None
    shift: bool = False
    dtype: str = "float32"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("from_logits", "shift"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if self.mask_token_id is not None:
            if np.ndim(self.mask_token_id) > 0 or isinstance(self.mask_token_id, (bool, float)):
                raise TypeError(
                    f"mask_token_id must be one token id or None, got {self.mask_token_id!r}. "
                    "Several ids go into ignore_index."
                )
            (mask_token_id,) = ignored_ids(self.mask_token_id)
            object.__setattr__(self, "mask_token_id", mask_token_id)
        # One form for each meaning, so that equal settings compare and print alike.
        object.__setattr__(self, "ignore_index", tuple(sorted(set(ignored_ids(self.ignore_index)))))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        check_backend(self.backend)

    @property
    def unscored_ids(self) -> tuple[int, ...]:
        """Every target id that is not scored."""
        return ignored_ids(self.ignore_index) + ignored_ids(self.mask_token_id)

    @property
    def signature(self) -> str:
        """All settings in one line, such as "from_logits:yes|ignore_index:-100|..."."""
        return self.signature_of(())

    def signature_of(self, dtypes: Sequence[str]) -> str:
        """The signature of a run whose batches were reduced in these dtypes; without any, in that
        of the options. Logits in float64 always take float64."""
        return signature(vars(self) | {"dtype": tuple(dtypes) or self.dtype})


def dtype_name(dtype) -> str:
    """The name of a reduction's dtype, such as "float32"; raises ValueError for any other."""
    return str(reduction_dtype(dtype)).removeprefix("torch.")


def positive_int(value, name: str, least: int = 1) -> int:
    """`value` as an int. A ValueError names the argument if it is not an int, or below `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}.")
    return int(value)


def signature(settings: dict) -> str:
    """Names and values of settings in one line, with the version."""

    def text(value) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, tuple):
            return ",".join(map(str, value)) or "none"
        return "none" if value is None else shown(value)

    named = [f"{name}:{text(value)}" for name, value in settings.items()]
    return "|".join([*named, f"version:{__version__}"])
