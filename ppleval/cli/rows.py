"""A row of a file or a dataset: a text with its group and its context, of a size that is taken."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ppleval.shown import listed, shown
from ppleval.texts.inputs import num_characters

# Bytes read at once, because a line may be of any length.
CHUNK = 1 << 20
# Of one text: 4 MB may unpack to 4 GB, and a tokenizer takes many times the memory of a text.
MAX_TEXT_BYTES = 1 << 30


class Row(NamedTuple):
    """A text or the messages of a conversation, the name of its group, and its context."""

    text: str | list[dict]
    group: str | None = None  # None without groups
    context: str | None = None  # None without contexts


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read: of the texts and, if any, of groups and contexts."""

    text: str
    group: str | None = None
    context: str | None = None

    @property
    def names(self) -> list[str]:
        """Each column once."""
        names = (self.text, self.group, self.context)
        return list(dict.fromkeys(name for name in names if name is not None))

    @property
    def need_a_table(self) -> bool:
        """Whether a text alone is not enough."""
        return len(self.names) > 1

    def check(self, place: str, found: Sequence[str]) -> None:
        """Raises ValueError unless each column is there once; `found` are those that are there."""
        for name in self.names:
            if name not in found:
                there = listed(found, near=name)
                raise ValueError(f"{place} has no column {shown(repr(name))}; it has {there}.")
            if found.count(name) > 1:
                raise ValueError(
                    f"{place} has {found.count(name)} columns {name!r}; one is needed."
                )

    def row(self, source: str, number: int, values: Mapping[str, Any]) -> Row:
        """The text, the group and the context of a row, from the values of its columns.

        Raises:
            ValueError: the text is neither a string nor a list of messages, the context no string,
                or the group neither a string nor a whole number; one holds half a character.
        """
        for name in self.names:
            check_characters(f"{source}: {name!r} of row {number}", values[name])
        text = values[self.text]
        is_conversation = isinstance(text, list) and all(isinstance(entry, dict) for entry in text)
        if not isinstance(text, str) and not is_conversation:
            found = type(text).__name__
            raise ValueError(f"{source}: {self.text!r} of row {number} is no text, but {found}.")
        context = None if self.context is None else values[self.context]
        if self.context is not None and not isinstance(context, str):
            found = type(context).__name__
            raise ValueError(f"{source}: {self.context!r} of row {number} is no text, but {found}.")
        if self.group is None:
            return Row(text, context=context)
        group = values[self.group]
        if not isinstance(group, str | int) or isinstance(group, bool):
            raise ValueError(
                f"{source}: {self.group!r} of row {number} must be a string or a whole number to "
                f"name a group, got {shown(repr(group))}."
            )
        return Row(text, str(group), context)


def check_characters(place: str, value: Any) -> None:
    """Raises ValueError for half a character in a string, or in those of a conversation."""
    inside = [value]
    while inside:
        part = inside.pop()
        if isinstance(part, dict):
            inside += [*part, *part.values()]
        elif isinstance(part, list):
            inside += part
        elif isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:
                code = f"U+{ord(part[error.start]):X}"
                raise ValueError(
                    f"{place} holds half a character (the lone surrogate {code}). Write the whole "
                    "character, or leave it out."
                ) from error


def limited(rows: Iterator[Row], name: str, most: int) -> Iterator[Row]:
    """The rows, of which none has a text of more than `most` bytes.

    Here are all texts; readers of packed files see one of them before it fills the memory.

    Raises:
        ValueError: a text that is longer; `name` says of which file it is.
    """
    for number, row in enumerate(rows):
        # A character has at least one byte.
        if num_characters(row.text) > most or num_characters(row.context or "") > most:
            raise too_long(f"{name}: row {number}", most)
        yield row


def too_long(place: str, most: int) -> ValueError:
    return ValueError(
        f"{place} has more than {most:,} bytes, the most of one text. Split it, or raise "
        "--max-text-bytes if memory allows."
    )
