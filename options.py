"""The settings that change the number: their checks, and the signature that names them."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from .nll import IGNORE_INDEX, ignored_ids, reduction_dtype

VERSION = "0.1.0"


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

    def __post_init__(self) -> None:
        for name in ("from_logits", "shift"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if self.mask_token_id is not None:
            try:
                mask_token_id = operator.index(self.mask_token_id)
            except TypeError:
                raise TypeError(
                    f"mask_token_id must be one token id or None, got {self.mask_token_id!r}. "
                    "Several ids go into ignore_index."
                ) from None
            object.__setattr__(self, "mask_token_id", mask_token_id)
        # One form for each meaning, so that equal settings compare and print alike.
        object.__setattr__(self, "ignore_index", tuple(sorted(set(ignored_ids(self.ignore_index)))))
        dtype = str(reduction_dtype(self.dtype)).removeprefix("torch.")
        object.__setattr__(self, "dtype", dtype)

    @property
    def unscored_ids(self) -> tuple[int, ...]:
        """Every target id that is not scored."""
        masked = () if self.mask_token_id is None else (self.mask_token_id,)
        return self.ignore_index + masked

    @property
    def signature(self) -> str:
        """All settings in one line, such as "from_logits:yes|ignore_index:-100|..."."""

        def text(value) -> str:
            if isinstance(value, bool):
                return "yes" if value else "no"
            if isinstance(value, tuple):
                return ",".join(map(str, value)) or "none"
            return "none" if value is None else str(value)

        settings = [f"{f.name}:{text(getattr(self, f.name))}" for f in fields(self)]
        return "|".join([*settings, f"version:{VERSION}"])

    def replace(self, **changes) -> "Options":
        """These options with some changed.

        Raises:
            TypeError: a name that is no option.
        """
        known = [f.name for f in fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise TypeError(f"unknown argument {unknown[0]!r}. The options are {', '.join(known)}.")
        return replace(self, **changes)
