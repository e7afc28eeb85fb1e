"""What `datasets.load_dataset` reads -> texts, one at a time, with their groups."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ppleval.cli.rows import Columns, Row
from ppleval.shown import listed, shown

if TYPE_CHECKING:
    from datasets import IterableDataset


def read_dataset_rows(spec: str, columns: Columns) -> Iterator[Row]:
    """The texts of a split, one after another. Only names are read before the first is asked for.

    Args:
        spec: NAME, NAME:CONFIG, NAME:SPLIT or NAME:CONFIG:SPLIT. NAME is what `load_dataset` takes,
            a file that it reads, or a directory of `save_to_disk`. A lone second part is the
            configuration if one has that name, else the split.
        columns: those of the texts and of the groups.

    Raises:
        ValueError: at once, a configuration, split or column that is missing, with those that there
            are; a dataset that cannot be read, also while reading.
    """
    stream = _open(spec)
    with _named_errors(spec):  # not every format names its columns before the first row
        found = stream.column_names or list(next(iter(stream), {}))
    columns.check(shown(spec), found)
    return _read(shown(spec), stream.select_columns(columns.names), columns)


def _open(spec: str) -> "IterableDataset":
    import datasets  # here, because it takes seconds

    name, *parts = spec.split(":")
    if len(parts) > 2 or not name:
        raise ValueError(f"A dataset is NAME[:CONFIG][:SPLIT], got {shown(repr(spec))}.")
    # What Dataset.save_to_disk wrote; load_dataset reads what DatasetDict.save_to_disk did.
    if (Path(name) / "state.json").is_file():
        return _open_saved(name, parts)
    source: dict = {"path": name}
    if Path(name).is_file():
        # Absolute, because "." has no name.
        source = {"path": str(Path(name).absolute().parent), "data_files": Path(name).name}
    with _named_errors(name):
        configs = datasets.get_dataset_config_names(**source)
        config = datasets.get_dataset_default_config_name(**source)
    if len(parts) == 2 or (parts and (parts[0] in configs or config is None)):
        config = parts.pop(0)
    place = f"{name}:{_checked(name, 'configuration', config, configs)}"
    with _named_errors(place):
        splits = datasets.load_dataset(**source, name=config, streaming=True)
    split = parts[0] if parts else next(iter(splits)) if len(splits) == 1 else None
    return splits[_checked(place, "split", split, list(splits))]


def _open_saved(name: str, parts: list[str]) -> "IterableDataset":
    import datasets

    if parts:
        raise ValueError(f"{name} is one saved dataset without splits: --dataset {name}.")
    with _named_errors(name):
        saved = datasets.Dataset.load_from_disk(name)
        return saved.with_format(None).to_iterable_dataset()


def _checked(place: str, kind: str, name: str | None, names: list[str]) -> str:
    """The name, if it is one of `names`."""
    if name is None:
        there, one = listed(names), f"{place}:{names[0]}"
        raise ValueError(f"{shown(place)} has the {kind}s {there}; name one, as in {shown(one)}.")
    if name not in names:
        there = listed(names, near=name)
        raise ValueError(f"{shown(place)} has no {kind} {shown(repr(name))}; it has {there}.")
    return name


def _read(spec: str, stream: "IterableDataset", columns: Columns) -> Iterator[Row]:
    rows = enumerate(stream)
    while True:
        with _named_errors(spec):
            row = next(rows, None)
        if row is None:
            return
        yield columns.row(spec, *row)


@contextlib.contextmanager
def _named_errors(spec: str) -> Iterator[None]:
    """Name the dataset in an error of `datasets`, whose kinds are many."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"The dataset {shown(spec)} cannot be read: {error}") from error
