"""CSV, TSV and Parquet -> rows. No string of a table becomes a number or a missing value."""

import csv
import itertools
from collections.abc import Iterator
from typing import BinaryIO

from ppleval.cli.plain_text import lines_of, without_nul
from ppleval.cli.rows import CHUNK, Columns, Row, too_long


def read_csv(
    name: str, file: BinaryIO, most: int, columns: Columns, delimiter: str = ","
) -> Iterator[Row]:
    """The rows behind the header of a CSV file; none takes more than `most` characters."""
    csv.field_size_limit(2**31 - 1)
    header, number, size = None, -1, 0

    def lines_of_row() -> Iterator[str]:
        nonlocal size
        for line in lines_of(name, file, most):
            size += len(line)
            if size > most:
                raise too_long(place(), most)
            yield line

    rows = csv.reader(lines_of_row(), delimiter=delimiter, strict=True)

    def place() -> str:
        row = "the header" if header is None else f"row {number}"
        return f"{name}: {row} (line {rows.line_num})"

    try:
        for row in filter(None, rows):  # an empty line is no row
            without_nul("".join(row), place())
            if header is None:
                header = row
                columns.check(name, header)
            elif len(row) != len(header):
                raise ValueError(f"{place()} has {len(row)} fields, and the header {len(header)}.")
            else:
                yield columns.row(name, number, dict(zip(header, row, strict=True)))
            number, size = number + 1, 0
    except csv.Error as error:
        # Python's message for a stray carriage return is for programmers.
        stray = "new-line character seen" in str(error)
        reason = "a carriage return outside quotes, which is no line end" if stray else error
        raise ValueError(f"{place()} is no CSV: {reason}.") from error


def read_parquet(name: str, file: BinaryIO, most: int, columns: Columns) -> Iterator[Row]:
    """The rows of a Parquet file; only these columns are read."""
    import pyarrow
    from pyarrow import parquet

    try:
        # Without a buffer, pyarrow reads the columns of a whole row group at once.
        table = parquet.ParquetFile(file, buffer_size=CHUNK, pre_buffer=False)
        columns.check(name, table.schema_arrow.names)
        batches = table.iter_batches(batch_size=64, columns=columns.names)
        rows = itertools.chain.from_iterable(
            zip(*(batch[column] for column in columns.names), strict=True) for batch in batches
        )
        for number, fields in enumerate(rows):
            values = {}
            for column, field in zip(columns.names, fields, strict=True):
                try:
                    values[column] = field.as_py()
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{name}: {column!r} of row {number} is not UTF-8 text: {error}."
                    ) from error
            yield columns.row(name, number, values)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name} is no Parquet file that can be read: {error}") from error
