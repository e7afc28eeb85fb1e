"""--per-text: one JSON line for each text, written as soon as it is scored; --resume reads it."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, get_type_hints

import numpy as np

if TYPE_CHECKING:
    from ppleval.cli.corpus import Corpus
    from ppleval.cli.rows import Row
    from ppleval.stats.totals import TextSums

# The sums of a text take a few hundred bytes; those of a comparison 50 more for each token.
MOST_LINE_BYTES = 2**30
# No nll is negative, but for rounding; nats per token.
LEAST_MEAN = -1.0


class Finished(NamedTuple):
    """What a line holds of a text that was scored."""

    sums: "TextSums"
    fingerprint: str
    group: str | None


class PerTextFile:
    """JSON lines: the settings, then the sums of each text as soon as it is scored.

    Args:
        path: the file. No other run can write it until this object is closed, or its process dies.
        settings: those of this run, by name; the signature is one of them.
        sums_type: what is written of each text, `TextSums` or a class derived from it.
        resume: continue what the file holds.
        overwrite: replace what it holds, unless it is continued.
        num_buckets: how many results by position there are of each text.

    Raises:
        ValueError: the file holds something, without `resume` and `overwrite`; `resume` on a file
            of other settings, one that --per-text did not write, a damaged one, or none that can
            be read, such as a pipe; another run writes it.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, str],
        sums_type: "type[TextSums]",
        resume: bool,
        overwrite: bool = False,
        num_buckets: int = 0,
    ):
        self.path, self._sums_type, self._num_buckets = path, sums_type, num_buckets
        self.finished: list[Finished] = []
        if resume and path.exists() and not path.is_file():
            raise ValueError(
                f"{path} is no regular file, so --resume cannot continue it. Name a file, or leave "
                "out --resume."
            )
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
        kept, line = 0, b""
        with open(self.path, "rb") as file:
            for number in itertools.count(1):
                line = file.readline(MOST_LINE_BYTES)
                # A killed run may leave half a line: it has no line end, and does not count.
                if not line.endswith(b"\n") and len(line) < MOST_LINE_BYTES:
                    break
                with self._named_line(number):
                    row = _json_object(line)
                    if number == 1:
                        _from_json(row["signature"], str)
                    else:
                        self._add(row)
                if number == 1:
                    check_settings(str(self.path), row, settings)
                kept += len(line)
        if kept == 0 and not self._line(settings).startswith(line):
            raise ValueError(f"{self.path} was not written by --per-text. Name another file.")
        return kept

    def _add(self, row: dict) -> None:
        """Take the sums of a finished text.

        Raises:
            ValueError, KeyError, TypeError: --per-text does not write such.
        """
        checksum = row.pop("checksum")
        if checksum != _checksum(row):
            raise ValueError("it does not fit its checksum")
        sums = _from_json(row, self._sums_type)
        if not are_possible(sums, self._num_buckets):
            raise ValueError("no text has such sums")
        known = _from_json(row["fingerprint"], str)
        group = _from_json(row["group"], str) if "group" in row else None
        self.finished.append(Finished(sums, known, group))

    @contextlib.contextmanager
    def _named_line(self, number: int) -> Iterator[None]:
        """Name the line in an error of its contents."""
        try:
            yield
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            rest = ". Name another file."
            if number > 1:
                rest = (
                    ", or by another version of it, or is damaged. Delete it and all lines after "
                    "it, whose texts are then scored again."
                )
            raise ValueError(
                f"{self.path}: line {number} was not written by --per-text{rest}"
            ) from error

    def without_finished(self, corpus: "Corpus") -> "Iterator[Row]":
        """The rows after the finished ones, whose sums are added to the corpus.

        Raises:
            ValueError: the finished texts, or their groups, are not those of the interrupted run.
        """
        count = len(self.finished)
        for number, (sums, known, group) in enumerate(self.finished):
            row = next(corpus.rows, None)
            if row is None:
                raise ValueError(
                    f"{self.path} is of other texts: it has {count}, and now there are {number}. "
                    f"Name all files of the interrupted run, with a --limit of at least {count} or "
                    "none, or begin anew."
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
            corpus.add(sums, group)
        return corpus.rows

    def write(self, number: int, row: "Row", sums: "TextSums") -> None:
        """Add the sums of a text, and its group if it has one."""
        known = fingerprint(row.text, row.context)
        line = {"text": number, "fingerprint": known, "perplexity": sums.perplexity}
        if row.group is not None:
            line["group"] = row.group
        line = finite(line) | _as_json(dataclasses.asdict(sums))
        self._write_line(line | {"checksum": _checksum(line)})

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


def are_possible(sums: "TextSums", num_buckets: int | None = None) -> bool:
    """Whether a text can have these sums; what scores it writes no others.

    Args:
        num_buckets: how many results by position there are; None where it is not known.
    """
    nll_sums = sums.nll_sum, sums.unweighted_nll_sum, sums.token_nll_sq_sum
    return (
        all(0 <= count < 2**63 for count in (sums.num_tokens, sums.num_bytes, sums.num_words))
        and 0 <= sums.weight_sum < math.inf
        and (sums.weight_sum > 0) == (sums.num_tokens > 0)
        and _are_nll_sums(sums.num_tokens, *nll_sums)
        # NaN, which a model may give, is in all sums; a token without weight not in the first.
        and (not math.isnan(sums.nll_sum) or all(map(math.isnan, nll_sums)))
        and _are_possible_positions(sums.positions, num_buckets)
        and (not hasattr(sums, "base") or are_possible(sums.base, num_buckets))  # pyright: ignore
        and (not hasattr(sums, "kl") or _are_possible_pairs(sums))
    )


def _are_nll_sums(num_tokens: int, *values: float) -> bool:
    """Whether no sum of nll, or of divergences, is below 0, but for rounding."""
    return not any(value < LEAST_MEAN * (1 + num_tokens) for value in values)


def _are_possible_positions(positions: np.ndarray, num_buckets: int | None) -> bool:
    if num_buckets not in (None, len(positions)):
        return False
    if positions.size == 0:
        return True
    if positions.shape[1:] != (3,):
        return False
    weights_and_counts = positions[:, 1:]
    return bool(((weights_and_counts >= 0) & (weights_and_counts < math.inf)).all())


def _are_possible_pairs(sums: Any) -> bool:
    """Whether a text can have this part of `TokenPairSums`."""
    base, most = sums.base, math.exp(-LEAST_MEAN)
    return bool(
        (base.num_tokens, base.weight_sum) == (sums.num_tokens, sums.weight_sum)
        and sums.kl.shape == sums.delta_p.shape == (sums.num_tokens,)
        and not (sums.kl < LEAST_MEAN).any()
        and not (np.abs(sums.delta_p) > most).any()
        and _are_nll_sums(sums.num_tokens, sums.kl_sum, sums.reverse_kl_sum)
        and 0 <= sums.same_top_sum <= most * sums.weight_sum
    )


def _checksum(row: dict) -> str:
    """A hash of what a line holds beside it."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def _json_object(line: bytes) -> dict:
    """The JSON object of a line.

    Raises:
        ValueError, RecursionError: it is none, or has a name twice.
    """

    def once(items: list[tuple[str, Any]]) -> dict:
        found = dict(items)
        if len(found) < len(items):
            raise ValueError("a name is there twice")
        return found

    row = json.loads(line, object_pairs_hook=once)
    if not isinstance(row, dict):
        raise ValueError("no object")
    return row


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
        optional = {
            f.name for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING
        }
        kinds = {
            name: each for name, each in kinds.items() if name in value or name not in optional
        }
        return kind(**{name: _from_json(value[name], each) for name, each in kinds.items()})
    if kind is np.ndarray and isinstance(value, list):
        nested = any(isinstance(entry, list) for entry in value)
        entries = [_from_json(entry, np.ndarray if nested else float) for entry in value]
        return np.array(entries, dtype=np.float64)
    if kind is float and value in ("nan", "inf", "-inf"):
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
