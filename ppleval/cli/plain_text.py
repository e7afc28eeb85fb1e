"""Plain text -> one text, or one of each line, as it is in the file."""

import codecs
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

from ppleval.cli.messages import warn
from ppleval.cli.rows import CHUNK, Row, too_long


def read_whole(name: str, file: BinaryIO, most: int) -> Iterator[Row]:
    """The whole of a file, as one row."""
    data = bytearray()
    while part := file.read(CHUNK):
        data += part
        if len(data) > most:
            raise too_long(name, most)
    if data.startswith(codecs.BOM_UTF8):
        del data[: len(codecs.BOM_UTF8)]
    text = without_nul(_decoded(data, name), name)
    _warn_of_json_lines(text, name)
    yield Row(text)


def read_lines(name: str, file: BinaryIO, most: int) -> Iterator[Row]:
    """A row for each line of a file, without its end."""
    for number, line in enumerate(lines_of(name, file, most)):
        if number == 0:
            _warn_of_json_lines(line, name)
        yield Row(without_nul(line.removesuffix("\r\n").removesuffix("\n"), name))


def lines_of(name: str, file: BinaryIO, most: int) -> Iterator[str]:
    """The lines, with their ends. Python's text files would also end one at a lone "\\r"."""
    for number, line in enumerate(iter(partial(file.readline, most + 1), b""), 1):
        if len(line) > most:
            raise too_long(f"{name}: line {number}", most)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield _decoded(line, f"{name}: line {number}")


def _decoded(data: bytes | bytearray, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 text: {error}.") from error


def without_nul(text: str, place: str) -> str:
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
