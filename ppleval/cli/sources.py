"""Files and the standard input -> texts, one at a time, with their groups. Others are refused.

A text comes as it is in the file: no character changes, and no string of a table becomes a number,
a date or a missing value. A byte order mark at the start of a file is not part of the text. NUL is
a sign of binary data in plain text, CSV and TSV, and is refused there; in JSON, which spells it
"\\u0000", and in Parquet it is a character like others. Half a character (a lone surrogate), which
JSON can spell, is refused: no tokenizer reads it, and no result could be written with it.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ppleval.cli.messages import warn
from ppleval.shown import listed, shown, without_secrets
from ppleval.texts.inputs import num_characters

if TYPE_CHECKING:
    from pyarrow import fs
# Bytes read at once, because a line may be of any length.
CHUNK = 1 << 20
# Of one text: 4 MB may unpack to 4 GB, and a tokenizer takes many times the memory of a text.
MAX_TEXT_BYTES = 1 << 30

# Archives, documents and other tables. Most are not UTF-8, but some would pass for plain text.
REFUSED = {
    ".7z", ".arrow", ".avro", ".br", ".db", ".doc", ".docx", ".epub", ".feather", ".h5", ".hdf5",
    ".lz4", ".npy", ".npz", ".ods", ".odt", ".orc", ".pdf", ".pickle",
    ".pkl", ".pptx", ".psv", ".rar", ".rtf", ".sqlite", ".sqlite3", ".tab", ".tar", ".tbz2", ".tgz",
    ".txz", ".xls", ".xlsx", ".z", ".zip",
}  # fmt: skip


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


def limited(rows: Iterator[Row], name: str, most: int) -> Iterator[Row]:
    """The rows, of which none has a text of more than `most` bytes.

    Here are all texts; readers of packed files see one of them before it fills the memory.

    Raises:
        ValueError: a text that is longer; `name` says of which file it is.
    """
    for number, row in enumerate(rows):
        # A character has at least one byte.
        if num_characters(row.text) > most or num_characters(row.context or "") > most:
            raise _too_long(f"{name}: row {number}", most)
        yield row


def _too_long(place: str, most: int) -> ValueError:
    return ValueError(
        f"{place} has more than {most:,} bytes, the most of one text. Split it, or raise "
        "--max-text-bytes if memory allows."
    )


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
    return opener, _read_lines if lines else _read_whole


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


def _read_whole(name: str, file: BinaryIO, most: int) -> Iterator[Row]:
    data = bytearray()
    while part := file.read(CHUNK):
        data += part
        if len(data) > most:
            raise _too_long(name, most)
    if data.startswith(codecs.BOM_UTF8):
        del data[: len(codecs.BOM_UTF8)]
    text = _without_nul(_decoded(data, name), name)
    _warn_of_json_lines(text, name)
    yield Row(text)


def _read_lines(name: str, file: BinaryIO, most: int) -> Iterator[Row]:
    for number, line in enumerate(_lines(name, file, most)):
        if number == 0:
            _warn_of_json_lines(line, name)
        yield Row(_without_nul(line.removesuffix("\r\n").removesuffix("\n"), name))


def _lines(name: str, file: BinaryIO, most: int) -> Iterator[str]:
    """The lines, with their ends. Python's text files would also end one at a lone "\\r"."""
    for number, line in enumerate(iter(partial(file.readline, most + 1), b""), 1):
        if len(line) > most:
            raise _too_long(f"{name}: line {number}", most)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield _decoded(line, f"{name}: line {number}")


def _decoded(data: bytes | bytearray, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 text: {error}.") from error


def _without_nul(text: str, place: str) -> str:
    """The text, unless it is binary data that happens to be valid UTF-8."""
    if "\0" in text:
        raise ValueError(f"{place} holds NUL characters, which no plain text has.")
    return text


def _warn_of_json_lines(text: str, name: str) -> None:
    """A warning, not an error: JSON Lines under another suffix may be meant as plain text."""
    if text.startswith('{"'):
        warn(
            f"{name} looks like JSON Lines and is scored as plain text; name it .jsonl to read it "
            "as a table"
        )


def _read_csv(
    name: str, file: BinaryIO, most: int, columns: Columns, delimiter: str = ","
) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    header, number, size = None, -1, 0

    def lines_of_row() -> Iterator[str]:
        nonlocal size
        for line in _lines(name, file, most):
            size += len(line)
            if size > most:
                raise _too_long(place(), most)
            yield line

    rows = csv.reader(lines_of_row(), delimiter=delimiter, strict=True)

    def place() -> str:
        row = "the header" if header is None else f"row {number}"
        return f"{name}: {row} (line {rows.line_num})"

    try:
        for row in filter(None, rows):  # an empty line is no row
            _without_nul("".join(row), place())
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


def _read_parquet(name: str, file: BinaryIO, most: int, columns: Columns) -> Iterator[Row]:
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


BLANK = re.compile(r"[ \t\r\n]*")

# A parser stops at most this far before the end of JSON that is cut off, unless within a string.
LONGEST_TOKEN = len(r"\ud83d\udf89")


def _read_json(name: str, file: BinaryIO, most: int, columns: Columns) -> Iterator[Row]:
    def to_row(items: list[tuple]) -> dict:
        for column in columns.names:
            if sum(key == column for key, _ in items) > 1:
                raise ValueError(f"{column!r} is there twice")
        return dict(items)

    for number, row in enumerate(_json_values(name, file, most, to_row)):
        if isinstance(row, str) and not columns.need_a_table:
            check_characters(f"{name}: row {number}", row)
            yield Row(row)
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{name}: row {number} is no object, but {type(row).__name__}.")
        columns.check(f"{name}: row {number}", list(row))
        yield columns.row(name, number, row)


def _json_values(name: str, file: BinaryIO, most: int, to_row: Callable[[list], dict]) -> Iterator:
    """The items of a list, or values one after another as in JSON Lines."""
    decode = json.JSONDecoder(object_pairs_hook=to_row).raw_decode
    unread, number = _Unread(name, file, most), 0
    is_list = unread.next_character() == "["
    end = "]" if is_list else ""
    unread.at += is_list
    while (following := unread.next_character()) != end:
        if is_list and number > 0:
            if following != ",":
                raise unread.no_json(number, unread.at, "Expecting ',' delimiter")
            unread.at += 1
        yield _json_value(unread, number, decode)
        number += 1
    unread.at += is_list
    if unread.next_character() != "":
        raise ValueError(f"{name}: more follows its list of {number} rows.")


def _json_value(unread: "_Unread", number: int, decode: Callable):
    """The next value, which is row `number`."""
    while True:
        unread.next_character()
        try:
            value, unread.at = decode(unread.text, unread.at)
            return value
        except (ValueError, RecursionError) as error:
            if _may_be_cut(error, unread.text) and unread.read_more(number):
                continue
            position, reason = getattr(error, "pos", unread.at), getattr(error, "msg", error)
            raise unread.no_json(number, position, reason) from error


def _may_be_cut(error: Exception, text: str) -> bool:
    """Whether the text may be valid JSON that only ends too early."""
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated string") or error.pos > len(text) - LONGEST_TOKEN
    )


class _Unread:
    """The part of a file that is decoded but not yet parsed: `text`, from `at` on."""

    def __init__(self, name: str, file: BinaryIO, most: int):
        self.text, self.at = "", 0
        self._name, self._file, self._most = name, file, most
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._first_line = 1

    def next_character(self) -> str:
        """Move `at` behind blanks; return the character there, or "" at the end of the file."""
        while True:
            blank = BLANK.match(self.text, self.at)
            assert blank is not None  # it matches an empty string, too
            self.at = blank.end()
            if self.at < len(self.text) or not self.read_more():
                return self.text[self.at : self.at + 1]

    def no_json(self, number: int, position: int, reason) -> ValueError:
        """The error of row `number`, at a position in `text`."""
        line = self.line_of(position)
        return ValueError(f"{self._name}: row {number} (line {line}) is no JSON: {reason}.")

    def line_of(self, position: int) -> int:
        """The line of the file, from 1, that holds a position in `text`."""
        return self._first_line + self.text.count("\n", 0, position)

    def read_more(self, number: int = 0) -> bool:
        """Read more of the file into `text`, for row `number`; False at its end."""
        if len(self.text) - self.at > self._most:
            raise _too_long(
                f"{self._name}: row {number} (line {self.line_of(self.at)})", self._most
            )
        # Twice as much each time, or a long value would be parsed again and again.
        data = self._file.read(CHUNK + len(self.text) - self.at)
        try:
            more = self._decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.line_of(len(self.text)) + error.object.count(b"\n", 0, error.start)
            raise ValueError(
                f"{self._name}: line {line} is not UTF-8 text: {error.reason}."
            ) from error
        if not data:
            return False
        self._first_line = self.line_of(self.at)
        self.text, self.at = self.text[self.at :] + more, 0
        return True


TABLES = {
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".json": _read_json,
    ".parquet": _read_parquet,
}
TABLES |= dict.fromkeys((".jsonl", ".jsonlines", ".jl", ".ndjson", ".ldjson"), _read_json)
