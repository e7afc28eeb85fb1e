"""A list in JSON, or values one after another as in JSON Lines -> rows, read piece by piece."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from ppleval.cli.rows import CHUNK, Columns, Row, check_characters, too_long

BLANK = re.compile(r"[ \t\r\n]*")

# A parser stops at most this far before the end of JSON that is cut off, unless within a string.
LONGEST_TOKEN = len(r"\ud83d\udf89")


def read_json(name: str, file: BinaryIO, most: int, columns: Columns) -> Iterator[Row]:
    """The rows of a file of JSON: objects or, if texts are all that is read, also strings."""

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
            raise too_long(f"{self._name}: row {number} (line {self.line_of(self.at)})", self._most)
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
