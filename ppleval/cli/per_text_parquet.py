"""--per-text of `--engine ray`: a directory with one Parquet file of sums for each chunk of texts.

A chunk is consecutive texts of one file. Its Parquet file is named after that file and its first
row, and appears as a whole: whoever scores the chunk again, after another worker died, replaces it
by the same. Names that begin with "_" are no data to readers of Parquet.
"""

import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

import numpy as np
import pyarrow as pa
from pyarrow import fs, parquet

from ppleval.cli.per_text import are_possible, check_settings, fingerprint, lock
from ppleval.cli.rows import Row
from ppleval.cli.sources import file_system
from ppleval.shown import without_secrets

if TYPE_CHECKING:
    from ppleval.stats.totals import TextSums
SETTINGS, LOCK = "_settings.json", "_lock"
UNFINISHED = re.compile(r"_[0-9a-f]{32}")  # left by a worker that was killed while it wrote
OWN = re.compile(rf"{SETTINGS}|{UNFINISHED.pattern}|[0-9a-f]{{16}}-[0-9]{{12,}}\.parquet")
KINDS = {
    float: pa.float64(),
    int: pa.int64(),
    bool: pa.bool_(),
    np.ndarray: pa.list_(pa.list_(pa.float64())),
}


class PerTextDirectory:
    """The directory; each process has an object of its own for it.

    Args:
        name: a path, or a URI that pyarrow knows.
    """

    def __init__(self, name: str):
        self.name = name
        self._system, self._path = file_system(name)

    @contextlib.contextmanager
    def prepared(self, resume: bool, overwrite: bool = False) -> Iterator[None]:
        """Make the directory, before anything is scored; no other run may write to it within.

        Args:
            overwrite: delete what such a run wrote, and nothing else, unless it is continued.

        Raises:
            ValueError: it holds something, without `resume` and `overwrite`; with them, something
                else than what such a run wrote; another run writes to it.
        """
        self._system.create_dir(self._path)
        names = [info.base_name for info in self._files()]
        held = [name for name in names if name != LOCK and not UNFINISHED.fullmatch(name)]
        if held and not (resume or overwrite):
            raise ValueError(
                f"--per-text {self.name} is not empty: name a new directory, continue the run that "
                "wrote it by --resume, or pass --overwrite."
            )
        if held and SETTINGS not in held:
            raise ValueError(f"{self.name} was not written by --per-text of --engine ray.")
        with self._locked():
            if overwrite and not resume:
                for name in filter(OWN.fullmatch, names):
                    self._system.delete_file(f"{self._path}/{name}")
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Refuse a second run on the directory. Only file systems of this machine have locks."""
        if not isinstance(self._system, fs.LocalFileSystem):
            yield
            return
        with open(f"{self._path}/{LOCK}", "ab") as file:
            lock(file, self.name)
            yield

    def _files(self) -> list[fs.FileInfo]:
        return self._system.get_file_info(fs.FileSelector(self._path))

    def agree(self, settings: dict) -> None:
        """Write the settings of the run, if the directory has none yet.

        Raises:
            ValueError: it has others.
        """
        settings = json.loads(json.dumps(settings))  # tuples as the lists that are read back
        path = f"{self._path}/{SETTINGS}"
        if not self._is_there(path):
            self._put(path, lambda file: file.write(json.dumps(settings, indent=1).encode()))
        with self._system.open_input_file(path) as file:
            try:
                written = dict(json.loads(file.read()))
            except (ValueError, TypeError, RecursionError) as error:
                raise _not_written(path) from error
        check_settings(self.name, written, settings)

    def _is_there(self, path: str) -> bool:
        """Whether there is a file.

        Raises:
            ValueError: there is something else, such as a pipe, which would be waited for.
        """
        kind = self._system.get_file_info(path).type
        if kind not in (fs.FileType.NotFound, fs.FileType.File):
            raise _not_written(path)
        return kind == fs.FileType.File

    def num_chunks(self) -> int:
        """How many chunks it holds."""
        return sum(not info.base_name.startswith("_") for info in self._files())

    def write(self, file: str, first: int, rows: Sequence[Row], sums: Sequence["TextSums"]) -> None:
        """Write the sums of a chunk: `rows` are those of the file from row `first` on."""
        columns = {
            "file": pa.array([without_secrets(file)] * len(rows)),
            "row": pa.array(range(first, first + len(rows)), pa.int64()),
            "fingerprint": pa.array(_fingerprints(rows)),
        }
        if rows[0].group is not None:
            columns["group"] = pa.array([row.group for row in rows])
        table = pa.table(columns | sums_columns(sums))
        self._put(
            self._chunk(file, first),
            lambda place: parquet.write_table(table, place, write_page_checksum=True),
        )

    def read(
        self, file: str, first: int, rows: Sequence[Row], sums_type: type["TextSums"]
    ) -> list["TextSums"] | None:
        """The sums of a chunk that was written before; None if it was not.

        Raises:
            ValueError: what was written is of other texts or groups, damaged, or no such file.
        """
        path = self._chunk(file, first)
        if not self._is_there(path):
            return None
        # First, because pyarrow has one error for a disk that fails and for bytes that are damaged.
        with self._system.open_input_file(path) as opened:
            data = opened.read()
        try:
            table = parquet.read_table(pa.BufferReader(data), page_checksum_verification=True)
            _check_columns(table, sums_type)
            known, sums = table["fingerprint"].to_pylist(), sums_of(table, sums_type)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise _not_written(path) from error
        if not all(map(are_possible, sums)):
            raise _not_written(path)
        if known != _fingerprints(rows):
            raise ValueError(
                f"{self.name} is of other texts: the rows of {file} from {first} on are not those "
                "scored then."
            )
        # Whether there are any is a setting, of which `agree` tells.
        has_groups = rows[0].group is not None and "group" in table.column_names
        if has_groups and table["group"].to_pylist() != [row.group for row in rows]:
            raise ValueError(
                f"{self.name} is of other groups: the rows of {file} from {first} on were of "
                "others then. Group by what it was then, or begin anew."
            )
        return sums

    def _chunk(self, file: str, first: int) -> str:
        place = file if "://" in file else str(Path(file).absolute())
        return f"{self._path}/{hashlib.sha256(place.encode()).hexdigest()[:16]}-{first:012}.parquet"

    def _put(self, path: str, write) -> None:
        """Write a file that is there as a whole or not at all, whenever this process is killed.

        Raises:
            OSError: it cannot be written, such as on a full disk; its message names the file.
        """
        unfinished = f"{self._path}/_{uuid.uuid4().hex}"
        try:
            with self._system.open_output_stream(unfinished) as file:
                write(file)
            self._system.move(unfinished, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._system.delete_file(unfinished)
            raise OSError(f"{path} cannot be written: {error}") from error


def _not_written(path: str) -> ValueError:
    return ValueError(
        f"{path} was not written by --per-text of --engine ray, or is damaged. Delete it, and "
        "what it held is scored again."
    )


def _check_columns(table: pa.Table, sums_type: type["TextSums"]) -> None:
    """Raises KeyError or TypeError unless the columns of `sums_columns` are there, without null."""
    for name, kind in get_type_hints(sums_type).items():
        if table[name].type != KINDS[kind] or table[name].null_count > 0:
            raise TypeError(f"{name} is of {table[name].type}")


def _fingerprints(rows: Sequence[Row]) -> list[str]:
    return [fingerprint(row.text, row.context) for row in rows]


def sums_columns(sums: Sequence["TextSums"]) -> dict[str, pa.Array]:
    """The perplexity of each text and its sums, as columns of a table."""
    columns = {"perplexity": pa.array([text.perplexity for text in sums], pa.float64())}
    for name, kind in get_type_hints(type(sums[0])).items():
        values = [getattr(text, name) for text in sums]
        values = [value.tolist() for value in values] if kind is np.ndarray else values
        columns[name] = pa.array(values, KINDS[kind])
    return columns


def sums_of(table: pa.Table, sums_type: type["TextSums"]) -> list["TextSums"]:
    """The sums of each text, from a table with `sums_columns`.

    Raises:
        KeyError: the table has no such columns.
    """
    kinds = get_type_hints(sums_type)
    columns = {name: table[name].to_pylist() for name in kinds}
    columns["positions"] = [np.array(each).reshape(-1, 3) for each in columns["positions"]]
    return [
        sums_type(**dict(zip(kinds, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]
