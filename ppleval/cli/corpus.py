"""The texts that the arguments of a command name, read one at a time, and what is scored."""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ppleval.cli.datasets import read_dataset_rows
from ppleval.cli.options import sources
from ppleval.cli.rows import Columns, Row, limited
from ppleval.cli.sources import read_rows
from ppleval.shown import listed, shown

if TYPE_CHECKING:
    from ppleval.stats.totals import TextSums


@dataclass
class Corpus:
    """The texts of a command.

    first: the first of them.
    rows: those that are not read yet, the first included; each is read when it is asked for.
    sums: of the texts that are scored.
    groups: of these texts, one for each if there are any.
    """

    first: Row
    rows: Iterator[Row]
    sums: "list[TextSums]" = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Iterator[Row], sources: list[str]) -> "Corpus":
        """The corpus of these rows.

        Raises:
            ValueError: the files or the dataset hold no texts at all.
        """
        first = next(rows, None)
        if first is None:
            names = ["the standard input" if name == "-" else name for name in sources]
            raise ValueError(f"There are no texts in {listed(names)}.")
        return cls(first, itertools.chain([first], rows))

    def add(self, sums: "TextSums", group: str | None) -> None:
        """Add the sums of the next text, and its group if it has one."""
        self.sums.append(sums)
        if group is not None:
            self.groups.append(group)


def read_corpus(
    args: argparse.Namespace, num_processes: int, group_by: str | None = None
) -> Corpus:
    """The corpus that the arguments name.

    Raises:
        TypeError, ValueError, OSError: as `read_rows` and `read_dataset_rows`; no texts at all, or
            the standard input for several processes.
    """
    if args.dataset is not None:
        columns = Columns(args.column, group_by, args.context_column)
        rows = read_dataset_rows(args.dataset, columns)
        rows = limited(rows, shown(args.dataset), args.max_text_bytes)
    elif num_processes > 1 and "-" in sources(args):
        raise ValueError("Several processes cannot share the standard input; name files.")
    else:
        rows = read_rows(
            args.files, args.lines, args.column, group_by, args.context_column, args.max_text_bytes
        )
    return Corpus.of(itertools.islice(rows, args.limit), sources(args))


def texts_and_contexts(
    rows: Iterator[Row], with_contexts: bool
) -> tuple[Iterator[Any], Iterator[Any] | None]:
    """The texts or conversations, and the contexts if there are any."""
    rows, copy = itertools.tee(rows)
    return (row.text for row in rows), (row.context for row in copy) if with_contexts else None
