"""--per-text of `--engine ray`: a directory with one Parquet file of sums for each chunk of texts.

A chunk is consecutive texts of one file. Its Parquet file is named after that file and its first
row, and appears as a whole: whoever scores the chunk again, after another worker died, replaces it
by the same. Names that begin with "_" are no data to readers of Parquet.
"""

import hashlib
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

import numpy as np
import pyarrow as pa
from pyarrow import fs, parquet

from per_text_file import check_settings, fingerprint
from text_files import Row, file_system

if TYPE_CHECKING:
    from totals import TextSums

SETTINGS = "_settings.json"
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

    def prepare(self, resume: bool) -> None:
        """Make the directory, before anything is scored.

        Raises:
            ValueError: without `resume`, it holds something; with it, something else than what such
                a run wrote.
        """
        self._system.create_dir(self._path)
        names = {info.base_name for info in self._files()}
        if names and not resume:
            raise ValueError(
                f"--per-text {self.name} is not empty: name a new directory, or continue the run "
                "that wrote it by --resume."
            )
        if names and SETTINGS not in names:
            raise ValueError(f"{self.name} was not written by --per-text of --engine ray.")

    def _files(self) -> list[fs.FileInfo]:
        return self._system.get_file_info(fs.FileSelector(self._path))

    def agree(self, settings: dict) -> None:
        """Write the settings of the run, if the directory has none yet.

        Raises:
            ValueError: it has others.
        """
        settings = json.loads(json.dumps(settings))  # tuples as the lists that are read back
        path = f"{self._path}/{SETTINGS}"
        if self._system.get_file_info(path).type == fs.FileType.NotFound:
            self._put(path, lambda file: file.write(json.dumps(settings, indent=1).encode()))
        with self._system.open_input_file(path) as file:
            check_settings(self.name, json.loads(file.read()), settings)

    def num_chunks(self) -> int:
        """How many chunks it holds."""
        return sum(not info.base_name.startswith("_") for info in self._files())

    def write(self, file: str, first: int, rows: Sequence[Row], sums: Sequence["TextSums"]) -> None:
        """Write the sums of a chunk: `rows` are those of the file from row `first` on."""
        columns = {
            "file": pa.array([file] * len(rows)),
            "row": pa.array(range(first, first + len(rows)), pa.int64()),
            "fingerprint": pa.array(_fingerprints(rows)),
        }
        if rows[0].group is not None:
            columns["group"] = pa.array([row.group for row in rows])
        table = pa.table(columns | sums_columns(sums))
        self._put(self._chunk(file, first), lambda place: parquet.write_table(table, place))

    def read(
        self, file: str, first: int, rows: Sequence[Row], sums_type: type["TextSums"]
    ) -> list["TextSums"] | None:
        """The sums of a chunk that was written before; None if it was not.

        Raises:
            ValueError: what was written is of other texts or groups, or no such file.
        """
        path = self._chunk(file, first)
        if self._system.get_file_info(path).type == fs.FileType.NotFound:
            return None
        try:
            table = parquet.read_table(path, filesystem=self._system)
            known, sums = table["fingerprint"].to_pylist(), sums_of(table, sums_type)
        except (pa.ArrowException, KeyError) as error:
            raise ValueError(f"{path} was not written by --per-text of --engine ray.") from error
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
        """Write a file that is there as a whole or not at all, whenever this process is killed."""
        unfinished = f"{self._path}/_{uuid.uuid4().hex}"
        with self._system.open_output_stream(unfinished) as file:
            write(file)
        self._system.move(unfinished, path)


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
