"""Files and the standard input -> texts, one at a time, with their groups. Others are refused.

A text comes as it is in the file: no character changes, and no string of a table becomes a number,
a date or a missing value. A byte order mark at the start of a file is not part of the text. NUL is
a sign of binary data in plain text, CSV and TSV, and is refused there; in JSON, which spells it
"\\u0000", and in Parquet it is a character like others. Half a character (a lone surrogate), which
JSON can spell, is refused: no tokenizer reads it, and no result could be written with it.
"""

import bz2
import gzip
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ppleval.cli.json_rows import read_json
from ppleval.cli.plain_text import read_lines, read_whole
from ppleval.cli.rows import MAX_TEXT_BYTES, Columns, Row, limited
from ppleval.cli.tables import read_csv, read_parquet
from ppleval.shown import shown, without_secrets

if TYPE_CHECKING:
    from pyarrow import fs
# Archives, documents and other tables. Most are not UTF-8, but some would pass for plain text.
REFUSED = {
    ".7z", ".arrow", ".avro", ".br", ".db", ".doc", ".docx", ".epub", ".feather", ".h5", ".hdf5",
    ".lz4", ".npy", ".npz", ".ods", ".odt", ".orc", ".pdf", ".pickle",
    ".pkl", ".pptx", ".psv", ".rar", ".rtf", ".sqlite", ".sqlite3", ".tab", ".tar", ".tbz2", ".tgz",
    ".txz", ".xls", ".xlsx", ".z", ".zip",
}  # fmt: skip


# What --group-by takes for a group of each file.
BY_FILE = "file"


def read_rows(
    files: list[str],
    lines: bool,
    column: str,
    group_by: str | None = None,
    context_column: str | None = None,
    max_text_bytes: int = MAX_TEXT_BYTES,
) -> Iterator[Row]:
    """The texts of the files, one after another. Nothing is read before it is needed, but that all
    files are there is seen at once.

    Args:
        files: their names, or URIs that pyarrow knows, such as s3://bucket/data.jsonl; "-", or an
            empty list, is the standard input.
        lines: each line of a plain-text file is a text. It ends at a newline and nowhere else; a
            carriage return directly before the newline is not part of it.
        column: the column of a table that holds the texts. A JSON row may also be the text itself,
            if that is all.
        group_by: the column of a table that names each text's group; BY_FILE for the file's name,
            without the secrets of an address.
        context_column: the column of a table that holds each text's context.
        max_text_bytes: of one text, unpacked and with what is around it in its row.

    Raises:
        ValueError: at once, a kind of file that is not supported, a directory, or a file without
            columns to group by; while reading, data that is not what it should be, or a text that
            is too long, with the name of the file and the place in it.
        OSError: at once, a file that is not there; while reading, one that cannot be opened.
    """
    columns = Columns(column, None if group_by == BY_FILE else group_by, context_column)
    sources = [(name, *_opener_and_reader(name, lines, columns)) for name in files or ["-"]]
    for name in files:
        _check_is_there(name)
    return _read_all(sources, group_by == BY_FILE, max_text_bytes)


def _check_is_there(name: str) -> None:
    if name == "-" or "://" in name:
        return
    if Path(name).is_dir():
        raise ValueError(
            f"{name} is a directory. Name the files in it, or read it by --dataset {name}."
        )
    Path(name).stat()


def _read_all(
    sources: Iterable[tuple[str, Callable | None, Callable]], by_file: bool, most: int
) -> Iterator[Row]:
    for name, opener, reader in sources:
        for row in limited(_read(name, opener, reader, most), shown(name), most):
            yield row._replace(group=_visible(without_secrets(name))) if by_file else row


def _visible(name: str) -> str:
    """The name of a file, whose bytes need not be UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _opener_and_reader(
    name: str, lines: bool, columns: Columns
) -> tuple[Callable | None, Callable]:
    """How to unpack a file, if it is packed, and how to get its rows, by its suffixes."""
    suffix = Path(name).suffix.lower()
    opener = OPENERS.get(suffix)
    if opener is not None:
        suffix = Path(Path(name).stem).suffix.lower()
    # Parquet is read in pieces, from its end, which a compressed file does not allow.
    if suffix in REFUSED or (suffix == ".parquet" and opener is not None):
        raise ValueError(
            f"{shown(name)} is of a kind that is not read. Unpack it, or convert it to plain text, "
            ".jsonl, .csv, .tsv or .parquet."
        )
    if suffix in TABLES:
        return opener, partial(TABLES[suffix], columns=columns)
    if columns.need_a_table:
        place = "The standard input" if name == "-" else shown(name)
        _, *missing = columns.names
        by_file = f" --group-by {BY_FILE} makes a group of each file."
        hint = "" if columns.group is None else by_file
        raise ValueError(
            f"{place} is plain text and has no column {shown(repr(missing[0]))}.{hint}"
        )
    return opener, read_lines if lines else read_whole


def _read(name: str, opener: Callable | None, reader: Callable, most: int) -> Iterator[Row]:
    """The rows of one file; an error says which file cannot be read."""
    if name == "-":
        yield from reader("standard input", sys.stdin.buffer, most)
        return
    with ExitStack() as stack:
        file = stack.enter_context(_open(name))
        try:
            if opener is not None:
                file = stack.enter_context(opener(file, "rb"))
            yield from reader(shown(name), file, most)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{shown(name)} cannot be read: {error}.") from error


def _open(name: str) -> BinaryIO:
    if "://" not in name:
        return open(name, "rb")
    system, path = file_system(name)
    return io.BufferedReader(system.open_input_file(path))


def file_system(name: str) -> "tuple[fs.FileSystem, str]":
    """Where a file or a directory lies, and its path there: a URI that pyarrow knows, or a path.

    Raises:
        ValueError: a URI of another kind.
    """
    from pyarrow import fs

    if "://" not in name:
        return fs.LocalFileSystem(), str(Path(name).absolute())
    return fs.FileSystem.from_uri(name)


def files_in(name: str) -> list[str]:
    """The files below a directory, which is a name that ends in "/", in order; another name alone.

    Names that begin with "." or "_" are left out, as pyarrow leaves them out of a data set.
    """
    from pyarrow import fs

    if not name.endswith("/"):
        return [name]
    system, path = file_system(name)
    found = system.get_file_info(fs.FileSelector(path.rstrip("/"), recursive=True))
    return sorted(
        name + info.path.removeprefix(path.rstrip("/") + "/")
        for info in found
        if info.is_file and not info.base_name.startswith((".", "_"))
    )


def _open_zstd(file: BinaryIO, mode: str) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".lzma": lzma.open}
OPENERS[".zst"] = _open_zstd


TABLES = {
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".json": read_json,
    ".parquet": read_parquet,
}
TABLES |= dict.fromkeys((".jsonl", ".jsonlines", ".jl", ".ndjson", ".ldjson"), read_json)
