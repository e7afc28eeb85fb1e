"""--per-text: one JSON line for each text, written as soon as it is scored; --resume reads it."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, get_type_hints

import numpy as np

if TYPE_CHECKING:
    from ppleval.cli.sources import Row
    from ppleval.stats.totals import TextSums


class PerTextFile:
    """JSON lines: the settings, then the sums of each text as soon as it is scored.

    Args:
        path: the file. No other run can write it until this object is closed, or its process dies.
        settings: those of this run, by name; the signature is one of them.
        sums_type: what is written of each text, `TextSums` or a class derived from it.
        resume: continue what the file holds.
        overwrite: replace what it holds, unless it is continued.

    Raises:
        ValueError: the file holds something, without `resume` and `overwrite`; `resume` on a file
            of other settings, or one that --per-text did not write; another run writes it.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, str],
        sums_type: "type[TextSums]",
        resume: bool,
        overwrite: bool = False,
    ):
        self.path, self._sums_type = path, sums_type
        self.finished: list[TextSums] = []
        self._known: list[tuple[str, str | None]] = []  # fingerprint and group of each
        with contextlib.ExitStack() as stack:
            # Opened to append, which changes nothing yet.
            self._file = open(path, "ab")  # noqa: SIM115
            stack.enter_context(self)
            lock(self._file, path)
            size, kept = path.stat().st_size, 0  # 0 bytes are in a device or a pipe
            if size > 0 and resume:
                kept = self._continued(settings)
            elif size > 0 and not overwrite:
                raise ValueError(
                    f"{path} exists. Name a new file, or pass --overwrite, or --resume to continue "
                    "it."
                )
            if kept < size:
                self._file.truncate(kept)
            if kept == 0:
                self._write_line(settings)
            stack.pop_all()  # it stays open

    def __enter__(self) -> "PerTextFile":
        return self

    def __exit__(self, *error) -> None:
        with self._named_errors():
            self._file.close()

    def _continued(self, settings: dict[str, str]) -> int:
        """How many bytes of the file are kept, which are read.

        Raises:
            ValueError: as the class.
        """
        data = self.path.read_bytes()
        # A killed run may leave half a line: it has no line end, and does not count.
        length = data.rfind(b"\n") + 1
        if length > 0:
            self._read(data[:length].splitlines(), settings)
        elif not self._line(settings).startswith(data):
            raise ValueError(f"{self.path} was not written by --per-text.")
        return length

    def _read(self, lines: list[bytes], settings: dict[str, str]) -> None:
        with self._named_line(1):
            written = json.loads(lines[0])
            _from_json(written["signature"], str)
        for number, line in enumerate(lines[1:], start=2):
            with self._named_line(number):
                row = json.loads(line)
                self.finished.append(_from_json(row, self._sums_type))
                known = _from_json(row["fingerprint"], str)
                group = _from_json(row["group"], str) if "group" in row else None
                self._known.append((known, group))
        check_settings(str(self.path), written, settings)

    @contextlib.contextmanager
    def _named_line(self, number: int) -> Iterator[None]:
        """Name the line in an error of its contents."""
        try:
            yield
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.path}: line {number} was not written by --per-text."
            ) from error

    def without_finished(self, rows: "Iterator[Row]") -> "Iterator[Row]":
        """The rows after the finished ones.

        Raises:
            ValueError: the finished texts, or their groups, are not those of the interrupted run.
        """
        for number, (known, group) in enumerate(self._known):
            row = next(rows, None)
            if row is None:
                raise ValueError(
                    f"{self.path} is of other texts: it has {len(self._known)}, and now there are "
                    f"{number}. Name all files of the interrupted run, with a --limit of at least "
                    f"{len(self._known)} or none, or begin anew."
                )
            if fingerprint(row.text, row.context) != known:
                raise ValueError(
                    f"{self.path} is of other texts: number {number} is not the one scored then. "
                    "Name the files of the interrupted run in the same order, or begin anew."
                )
            if row.group != group:
                raise ValueError(
                    f"{self.path} is of other groups: text {number} was of {group!r} then, and is "
                    f"of {row.group!r} now. Group by what it was then, or begin anew."
                )
        return rows

    def write(self, number: int, row: "Row", sums: "TextSums") -> None:
        """Add the sums of a text, and its group if it has one."""
        known = fingerprint(row.text, row.context)
        line = {"text": number, "fingerprint": known, "perplexity": sums.perplexity}
        if row.group is not None:
            line["group"] = row.group
        self._write_line(finite(line) | _as_json(dataclasses.asdict(sums)))

    @staticmethod
    def _line(row: dict) -> bytes:
        return json.dumps(row, allow_nan=False).encode() + b"\n"

    def _write_line(self, row: dict) -> None:
        with self._named_errors():
            self._file.write(self._line(row))
            self._file.flush()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Name the file in an error of a write, such as that of a full disk."""
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise


def lock(file: BinaryIO, name: str | Path) -> None:
    """Keep other runs from writing an open file, until it is closed or this process ends.

    A device or a pipe is not locked, nor is a file where the system has no locks.

    Raises:
        ValueError: another run has locked the file.
    """
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # the second on some networked disks
        raise ValueError(f"{name} is being written by another run.") from error
    except (ImportError, OSError):
        return


def check_settings(place: str, written: dict, settings: dict) -> None:
    """Raises ValueError unless what was written there is of a run with the settings of this one."""
    if written != settings:
        then, now = _parts(written), _parts(settings)
        only_then, only_now = (
            ", ".join(part for part in own if part not in other) or "none"
            for own, other in ((then, now), (now, then))
        )
        raise ValueError(
            f"{place} is of a run with other settings, {only_then}; now they are {only_now}. "
            "Continue it with those of then, or begin anew in another place."
        )


def _parts(settings: dict) -> list[str]:
    """Each setting by itself, those of the signature as they stand there."""
    # A start token may hold "|", but no name and colon behind it.
    signature = re.split(r"\|(?=\w+:)", str(settings.get("signature", "")))
    others = [f"{name} {value}" for name, value in settings.items() if name != "signature"]
    return signature + others


def _as_json(value: Any) -> Any:
    """Sums as JSON, which has no NaN and no infinity: strings. `_from_json` reads them exactly."""
    if isinstance(value, dict):
        return {name: _as_json(entry) for name, entry in value.items()}
    if isinstance(value, np.ndarray):
        digits = 9 if value.dtype == np.float32 else 17  # so many tell all numbers apart
        return [
            _as_json(part) if value.ndim > 1 else _as_json(float(f"{part:.{digits}g}"))
            for part in value
        ]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any, kind: type) -> Any:
    """A value of this kind: a number, a string, an array, or a dataclass of such.

    Raises:
        TypeError, ValueError, KeyError: it is of another kind.
    """
    if dataclasses.is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{name: _from_json(value[name], each) for name, each in kinds.items()})
    if kind is np.ndarray and isinstance(value, list):
        nested = any(isinstance(entry, list) for entry in value)
        entries = [_from_json(entry, np.ndarray if nested else float) for entry in value]
        return np.array(entries, dtype=np.float64)
    if kind is float and isinstance(value, str):
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value


def finite(values: dict) -> dict:
    """The values, also nested ones, with None for NaN and infinity, which JSON does not have."""
    found = {}
    for name, value in values.items():
        is_finite = not isinstance(value, float) or math.isfinite(value)
        found[name] = finite(value) if isinstance(value, dict) else value if is_finite else None
    return found


def fingerprint(text: str | list[dict], context: str | None = None) -> str:
    """A hash of a text or a conversation, and its context if it has one, by which --resume sees
    whether it is the same."""
    whole = text if context is None else [context, text]
    text = whole if isinstance(whole, str) else json.dumps(whole, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]
