"""A dataset gives the texts of one split, one at a time, or a sentence with the names it has."""

import itertools
import re

import datasets
import pytest

from ppleval.cli.datasets import read_dataset_rows
from ppleval.cli.rows import Columns

BODY = Columns("body")
CONFIGS = """---
configs:
- config_name: de
  data_files: [{{split: test, path: de/test.parquet}}]
- config_name: en
  {default}
  data_files:
  - {{split: train, path: en/train.parquet}}
  - {{split: test, path: en/test.parquet}}
---
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory of parquet files with two configurations, of which one has two splits."""
    path = tmp_path_factory.mktemp("many")
    for name in ("de/test", "en/train", "en/test"):
        body = [f"{name} {number}" for number in range(3)]
        table = datasets.Dataset.from_dict({"year": [2024, 2025, None], "body": body})
        table.to_parquet(path / f"{name}.parquet")
    (path / "README.md").write_text(CONFIGS.format(default="default: false"))
    return path


def texts(spec, columns=BODY) -> list[str]:
    return [row.text for row in read_dataset_rows(str(spec), columns)]


@pytest.mark.parametrize(
    ("parts", "name"),
    [(":de", "de/test"), (":de:test", "de/test"), (":en:train", "en/train"), ("/de", "de/test")],
)
def test_a_split(directory, parts, name):
    assert texts(f"{directory}{parts}") == [f"{name} {number}" for number in range(3)]


def test_a_lone_part_is_a_split_if_no_configuration_has_that_name(directory, tmp_path):
    assert texts(f"{directory}/en:train") == [f"en/train {number}" for number in range(3)]
    for name in ("de", "en"):
        (tmp_path / name).symlink_to(directory / name)
    (tmp_path / "README.md").write_text(CONFIGS.format(default="default: true"))
    assert texts(f"{tmp_path}:train") == texts(f"{directory}:en:train")
    assert texts(f"{tmp_path}:de") == texts(f"{directory}:de")


def test_files(directory, tmp_path):
    assert texts(directory / "en" / "train.parquet") == texts(f"{directory}:en:train")
    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    assert texts(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("num_shards", [1, 2])
def test_what_save_to_disk_wrote(tmp_path, num_shards):
    """One split or several; rows that were chosen and put into another order."""
    rows = datasets.Dataset.from_dict({"year": range(5), "body": list("abcde")}).select([3, 0, 4])
    rows.with_format("torch").save_to_disk(tmp_path / "one", num_shards=num_shards)
    several = datasets.DatasetDict({"train": rows, "test": rows.select([2])})
    several.save_to_disk(tmp_path / "several")
    assert texts(tmp_path / "one") == texts(f"{tmp_path}/several:train") == ["d", "a", "e"]
    assert texts(tmp_path / "several" / "test") == ["e"]
    groups = [
        row.group for row in read_dataset_rows(str(tmp_path / "one"), Columns("body", "year"))
    ]
    assert groups == ["3", "0", "4"]
    with pytest.raises(ValueError, match=r"one saved dataset without splits: --dataset .*one\.$"):
        texts(f"{tmp_path}/one:train")
    with pytest.raises(ValueError, match="one has no column 'text'; it has year, body"):
        texts(tmp_path / "one", Columns("text"))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"torn")
    with pytest.raises(ValueError, match="The dataset .*one cannot be read: "):
        texts(tmp_path / "one")


def test_a_file_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    monkeypatch.chdir(tmp_path)
    assert texts("rows.jsonl") == ["one", "two"]


def test_a_column_names_the_groups(directory):
    rows = read_dataset_rows(f"{directory}:de", Columns("body", "year"))
    assert [row[:2] for row in itertools.islice(rows, 2)] == [
        ("de/test 0", "2024"),
        ("de/test 1", "2025"),
    ]
    with pytest.raises(
        ValueError, match=r":de: 'year' of row 2 must be a string or a whole num.*N"
    ):
        next(rows)


def test_rows_are_read_when_they_are_asked_for(directory, monkeypatch):
    asked = []
    iterate = datasets.IterableDataset.__iter__

    def noted(stream):
        for row in iterate(stream):
            asked.append(row)
            yield row

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", noted)
    rows = read_dataset_rows(f"{directory}:de", BODY)
    assert asked == []
    next(rows)
    assert asked == [{"body": "de/test 0"}]


@pytest.mark.parametrize(
    ("parts", "column", "message"),
    [
        ("", "body", "{0} has the configurations de, en; name one, as in {0}:de."),
        (":fr", "body", "{0} has no configuration 'fr'; it has de, en."),
        (":fr:test", "body", "{0} has no configuration 'fr'; it has de, en."),
        (":en", "body", "{0}:en has the splits train, test; name one, as in {0}:en:train."),
        (":en:validation", "body", "{0}:en has no split 'validation'; it has train, test."),
        ("/en:dev", "body", "{0}/en:default has no split 'dev'; it has train, test."),
        (":de", "text", "{0}:de has no column 'text'; it has year, body."),
        (":de", "year", "{0}:de: 'year' of row 0 is no text, but int."),
        (":en:test:more", "body", "A dataset is NAME[:CONFIG][:SPLIT], got '{0}:en:test:more'."),
        ("/nowhere", "body", "The dataset {0}/nowhere cannot be read: Couldn't"),
    ],
)
def test_what_is_not_there(directory, parts, column, message):
    with pytest.raises(ValueError, match=re.escape(message.format(directory))):
        texts(f"{directory}{parts}", Columns(column))


def test_data_that_cannot_be_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n{"body": 5\n')
    with pytest.raises(ValueError, match=f"The dataset {tmp_path}.* cannot be read: "):
        texts(tmp_path)
