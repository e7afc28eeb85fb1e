"""Files of each kind give exactly the texts that are in them, one at a time, or a sentence."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import tracemalloc
from functools import partial
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pyarrow import parquet

from ppleval.cli import sources as text_files
from ppleval.cli.rows import CHUNK

BOM = b"\xef\xbb\xbf"

# What readers of tables like to take for a number, a date, a missing value or the end of a line.
TEXTS = [
    "007",
    "1e3",
    "2020-01-01",
    "2021-03-04T05:06:07Z",
    "NA",
    "null",
    "true",
    "",
    " spaces ",
    'a "quoted", comma\tand tab',
    "two\r\nlines\n",
    "lone\rreturn",
    "odd\x0bbreaks\u2028here\x85",
    "\ufeffmark",
    "naïve 漢字 🎉",
]


def table(delimiter: str, **options) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, **options)
    writer.writerows([["id", "body"], *enumerate(TEXTS)])
    return out.getvalue().encode()


def parquet_bytes(columns: dict) -> bytes:
    out = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), out)
    return out.getvalue().to_pybytes()


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as file:
        file.write(data)
    return out.getvalue().to_pybytes()


ROWS = [{"id": i, "meta": {"body": [i]}, "body": text} for i, text in enumerate(TEXTS)]
JSON_LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
TABLES = {
    "rows.csv": table(","),
    "unix.CSV": table(",", lineterminator="\n", quoting=csv.QUOTE_ALL),
    "rows.tsv": table("\t"),
    "rows.jsonl": JSON_LINES,
    "dos.ndjson": JSON_LINES.replace(b"\n", b"\r\n \r\n"),
    "lines.json": JSON_LINES,
    "lines.jsonlines": JSON_LINES,
    "lines.jl": JSON_LINES,
    "lines.ldjson": JSON_LINES,
    "list.json": json.dumps(ROWS).encode(),
    "indented.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "strings.json": json.dumps(TEXTS).encode(),
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACKERS[".lzma"] = partial(lzma.compress, format=lzma.FORMAT_ALONE)
PACKERS[".zst"] = zstd


def read(path, data: bytes | None = None, lines=False, column="body") -> list[str]:
    if data is not None:
        path.write_bytes(data)
    return [row.text for row in text_files.read_rows([str(path)], lines, column)]


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", TABLES)
def test_strings_stay_as_they_are(tmp_path, name, packing):
    data = PACKERS[packing](TABLES[name])
    assert read(tmp_path / f"{name}{packing}", data) == TEXTS


@pytest.mark.parametrize("name", TABLES)
def test_a_byte_order_mark_is_no_part_of_a_table(tmp_path, name):
    assert read(tmp_path / name, BOM + TABLES[name]) == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_parquet(tmp_path, kind):
    data = parquet_bytes({"id": range(len(TEXTS)), "body": pa.array(TEXTS, kind)})
    assert read(tmp_path / "rows.parquet", data) == TEXTS


def test_a_parquet_column_of_categories_with_a_dot(tmp_path):
    data = parquet_bytes({"a.b": pa.array(TEXTS).dictionary_encode(), "a": ["no"] * len(TEXTS)})
    assert read(tmp_path / "rows.parquet", data, column="a.b") == TEXTS


def test_numbers_far_down_in_a_table_are_still_strings(tmp_path):
    """A reader that looks at 10,000 rows at a time takes the second lot for numbers."""
    texts = ["a"] * 10_000 + ["12"] * 15_000
    assert read(tmp_path / "rows.csv", "\n".join(["body", *texts]).encode()) == texts


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 64])
@pytest.mark.parametrize("name", [name for name in TABLES if "js" in name])
def test_json_may_be_cut_anywhere(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr("ppleval.cli.json_rows.CHUNK", chunk)
    assert read(tmp_path / name, BOM + b" \n" + TABLES[name] + b" \n") == TEXTS


def test_a_field_of_any_length(tmp_path):
    text = "long " * 100_000
    assert read(tmp_path / "rows.csv", f"body\n{text}\n".encode()) == [text]


def test_a_nul_in_json_and_parquet_is_a_character(tmp_path):
    assert read(tmp_path / "rows.parquet", parquet_bytes({"body": ["a\0b"]})) == ["a\0b"]
    assert read(tmp_path / "rows.jsonl", rb'{"body": "a\u0000b"}') == ["a\0b"]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", ["book.txt", "book.md", "book", "book.py", "Book.v2"])
def test_a_text_file_is_one_text_with_its_own_line_ends(tmp_path, name, packing):
    text = "one\r\ntwo\rtoo\x0b\u2028three\n\n🎉"
    data = PACKERS[packing](BOM + text.encode())
    assert read(tmp_path / f"{name}{packing}", data) == [text]


@pytest.mark.parametrize("packing", PACKERS)
def test_lines_end_at_newlines_alone(tmp_path, packing):
    data = BOM + "one\r\ntwo\rtoo\x0b\u2028three\x85\n\n\r\r\n\ufefffour\r".encode()
    path = tmp_path / f"book.txt{packing}"
    expected = ["one", "two\rtoo\x0b\u2028three\x85", "", "\r", "\ufefffour\r"]
    assert read(path, PACKERS[packing](data), lines=True) == expected


def test_parts_that_were_packed_one_by_one(tmp_path):
    for packing in (".gz", ".bz2", ".xz", ".zst"):
        data = PACKERS[packing](b"one ") + PACKERS[packing](b"two")
        assert read(tmp_path / f"parts.txt{packing}", data) == ["one two"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty.jsonl", b""),
        ("blank.ndjson", b"\n \r\n"),
        ("empty.json", b"[ ]\n"),
        ("empty.csv", b""),
        ("mark.csv", BOM),
        ("header.csv", b"id,body\n\n"),
        ("header.tsv", b"id\tbody"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("rows.parquet", parquet_bytes({"body": pa.array([], pa.string())})),
        ("nulls.parquet", parquet_bytes({"body": pa.array([], pa.null())})),
    ],
)
def test_a_table_without_rows_holds_no_texts(tmp_path, name, data):
    assert read(tmp_path / name, data) == []


def test_the_standard_input_stands_among_files(tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_bytes(b"one")
    (tmp_path / "table.csv").write_bytes(b"body\nthree\n")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(BOM + b"zwei\r\n")))
    names = [str(tmp_path / "one.txt"), "-", str(tmp_path / "table.csv")]
    rows = text_files.read_rows(names, False, "body", "file")
    assert [row[:2] for row in rows] == list(zip(["one", "zwei\r\n", "three"], names, strict=True))


@pytest.mark.parametrize("name", ["x.foo", "x", "x.txt.gz"])
@pytest.mark.parametrize("lines", [False, True])
def test_json_lines_by_another_name_are_plain_text_with_a_warning(tmp_path, capsys, name, lines):
    path, data = tmp_path / name, b'{"body": "one"}\n{"body": "two"}'
    data = gzip.compress(data) if name.endswith(".gz") else data
    texts = ['{"body": "one"}', '{"body": "two"}']
    assert read(path, data, lines) == (texts if lines else ["\n".join(texts)])
    assert capsys.readouterr().err == (
        f"warning: {path} looks like JSON Lines and is scored as plain text; name it .jsonl to "
        "read it as a table\n"
    )


@pytest.mark.parametrize("lines", [False, True])
def test_json_lines_on_the_standard_input_are_plain_text_with_a_warning(monkeypatch, capsys, lines):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(BOM + b'{"body": "one"}')))
    assert list(text_files.read_rows([], lines, "body")) == [('{"body": "one"}', None, None)]
    assert capsys.readouterr().err.startswith("warning: standard input looks like JSON Lines")


@pytest.mark.parametrize("lines", [False, True])
def test_other_plain_text_is_read_without_a_warning(tmp_path, capsys, lines):
    read(tmp_path / "x.foo", b'plain\n{"body": "one"}', lines)
    read(tmp_path / "x.jsonl", b'{"body": "one"}', lines)
    assert capsys.readouterr().err == ""


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.csv", b"kind,body\nnews,one\n7,two\n"),
        ("rows.jsonl", b'{"kind": "news", "body": "one"}\n{"kind": 7, "body": "two"}'),
        ("rows.parquet", parquet_bytes({"kind": ["news", "7"], "body": ["one", "two"]})),
    ],
)
def test_a_column_names_the_groups(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    rows = text_files.read_rows([str(path)], False, "body", "kind")
    assert [row[:2] for row in rows] == [("one", "news"), ("two", "7")]
    assert next(text_files.read_rows([str(path)], False, "body", "body"))[:2] == ("one", "one")


def test_two_halves_of_a_character_are_one(tmp_path):
    assert read(tmp_path / "a.json", b'["\\ud83c\\udf89"]') == ["🎉"]


def test_a_file_whose_name_is_no_utf8_is_a_group_that_can_be_written(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "w") as file:
        file.write("one")
    (row,) = text_files.read_rows([os.fsdecode(path)], False, "body", text_files.BY_FILE)
    assert row.group == f"{tmp_path}/caf\\xe9.txt"


NO_NAME = " must be a string or a whole number to name a group, got "


def test_a_parquet_column_of_whole_numbers_names_groups(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet_bytes({"year": [2024, 2025], "body": ["one", "two"]}))
    rows = text_files.read_rows([str(path)], False, "body", "year")
    assert [row[:2] for row in rows] == [("one", "2024"), ("two", "2025")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"id,body\n1,one\n", "a.csv has no column 'kind'; it has id, body."),
        ("a.csv", b"kind,kind,body\n1,2,one\n", "a.csv has 2 columns 'kind'; one is needed."),
        ("a.jsonl", b'{"body": "one"}', "a.jsonl: row 0 has no column 'kind'; it has body."),
        ("a.jsonl", b'{"body": "one", "kind": 1, "kind": 2}', "'kind' is there twice"),
        ("a.jsonl", b'{"body": "one", "kind": null}', "'kind' of row 0" + NO_NAME + "None."),
        ("a.jsonl", b'{"body": "one", "kind": true}', "'kind' of row 0" + NO_NAME + "True."),
        ("a.jsonl", b'{"body": "one", "kind": "x"}\n{"body": "one", "kind": "a\\ud800"}',
         "a.jsonl: 'kind' of row 1 holds half a character (the lone surrogate U+D800)."),
        ("a.json", b'["one"]', "a.json: row 0 is no object, but str."),
        ("a.parquet", parquet_bytes({"body": ["one", "two"], "kind": ["x", None]}),
         "a.parquet: 'kind' of row 1" + NO_NAME + "None."),
        ("a.parquet", parquet_bytes({"body": ["one"]}), "has no column 'kind'; it has body."),
    ],
)  # fmt: skip
def test_a_group_that_is_missing(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(text_files.read_rows([str(tmp_path / name)], False, "body", "kind"))


def test_plain_text_has_no_columns_to_group_by():
    """It is said at once, before anything is read."""
    for files, place in (["a.csv", "a.txt"], "a.txt"), ([], "The standard input"):
        with pytest.raises(ValueError, match=f"^{place} is plain text and has no column 'kind'"):
            text_files.read_rows(files, False, "body", "kind")


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lines.txt", "rows.csv", "rows.jsonl", "list.json"])
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_a_file_is_never_in_memory_as_a_whole(tmp_path, name, packing):
    """24 MB on disk; a reader of the whole file takes 24 MB or more."""
    text = "word " * 5_000
    row = {"lines.txt": text, "rows.csv": text}.get(name, json.dumps({"body": text}))
    first, last, between = {"list.json": ("[", "]", ",")}.get(name, ("", "\n", "\n"))
    path = tmp_path / f"{name}{packing}"
    with gzip.open(path, "wt", 1) if packing else path.open("w") as file:
        file.write("body\n" if name == "rows.csv" else first)
        for number in range(960):
            file.write((between if number else "") + row)
        file.write(last)
    texts = text_files.read_rows([str(path)], True, "body")
    assert next(texts).text == text
    tracemalloc.start()
    try:
        assert sum(1 for _ in texts) == 959
        assert tracemalloc.get_traced_memory()[1] < 6e6
    finally:
        tracemalloc.stop()


def test_a_parquet_file_is_never_in_memory_as_a_whole(tmp_path):
    """36 MB in one row group, as most writers leave it."""
    path = tmp_path / "rows.parquet"
    texts = pa.array([f"{number:05} " * 300 for number in range(20_000)])
    parquet.write_table(pa.table({"body": texts}), path, compression="none", use_dictionary=False)
    del texts
    before, most = pa.total_allocated_bytes(), 0
    tracemalloc.start()  # what Arrow reads from a Python file is in Python's memory
    try:
        for _ in text_files.read_rows([str(path)], False, "body"):
            most = max(most, pa.total_allocated_bytes() - before)
        assert 0 < most + tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()


def test_an_error_in_json_is_noticed_where_it_is(tmp_path):
    """Not by reading on to the end of the file, in search of the end of the row."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"body": "one"}\n{"body": "two}\n' + b'{"body": "more"}\n' * 1_500_000)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"row 1 \(line 2\) is no JSON: Invalid control char"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


LONG = "word " * 2_000_000
BOMBS = {
    "bomb.txt": (LONG, "bomb.txt.gz has more than"),
    "lines.txt": ("short\n" + LONG, "lines.txt.gz: line 2 has more than"),
    "bomb.csv": (f"body\none\n{LONG}\n", "bomb.csv.gz: line 3 has more than"),
    "quoted.csv": ('body\none\n"' + "word\n" * 2_000_000 + '"', r"quoted.csv.gz: row 1 \(line"),
    "bomb.jsonl": ('{"body": "one"}\n{"body": "' + LONG, r"bomb.jsonl.gz: row 1 \(line 2\) has"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_text_that_unpacks_to_too_much_is_not_unpacked(tmp_path, name):
    text, match = BOMBS[name]
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(text.encode()))
    del text
    rows = text_files.read_rows([str(path)], name == "lines.txt", "body", max_text_bytes=200_000)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{match}.* 200,000 bytes, the most of one text"):
            list(rows)
        assert tracemalloc.get_traced_memory()[1] < 9e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.csv", "lines.txt"])
def test_the_most_of_one_text(tmp_path, name):
    texts = ["a" * 100, "b" * 150]
    path = tmp_path / name
    data = {
        "rows.parquet": parquet_bytes({"body": texts}),
        "rows.jsonl": "\n".join(json.dumps({"body": text}) for text in texts).encode(),
        "rows.csv": "\n".join(["body", *texts]).encode(),
        "lines.txt": "\n".join(texts).encode(),
    }
    path.write_bytes(data[name])
    for most, num_rows in ((180, 2), (130, 1)):
        found = text_files.read_rows([str(path)], True, "body", max_text_bytes=most)
        assert next(found).text == texts[0]
        if num_rows == 2:
            assert next(found).text == texts[1]
        else:
            with pytest.raises(
                ValueError, match=f"{name}: (row 1|line [23]) has more than 130 bytes"
            ):
                next(found)


def test_a_group_of_a_file_has_no_secrets(monkeypatch):
    monkeypatch.setattr(text_files, "_open", lambda name: io.BytesIO(b"one text"))
    name = "s3://KEY:SECRET@bucket/a.txt"
    (row,) = text_files.read_rows([name], False, "body", text_files.BY_FILE)
    assert row.group == "s3://***@bucket/a.txt"


def test_of_a_million_columns_the_nearest_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",".join(f"column{number}" for number in range(10**6)))
    with pytest.raises(ValueError, match="has no column 'colunm7'; it has column7, ") as error:
        read(path, column="colunm7")
    assert str(error.value).endswith(", and 999,992 more.")
    assert len(str(error.value)) < 400


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "a.zip",
        "a.PDF",
        "a.docx",
        "a.xlsx",
        "a.arrow",
        "a.7z",
        "a.tar",
        "a.tar.gz",
        "a.tgz",
        "a.tab",
        "a.rtf",
        "a.txt.lz4",
        "a.jsonl.Z",
        "a.sqlite",
        "a.parquet.gz",
        "a.html.br",
        "a.npz",
    ],
)
def test_other_kinds_are_refused_by_name_before_anything_is_read(tmp_path, name):
    (tmp_path / "good.txt").write_text("plain text")
    (tmp_path / name).write_text("plain text")
    with pytest.raises(ValueError, match="is of a kind that is not read. Unpack it") as error:
        text_files.read_rows([str(tmp_path / "good.txt"), str(tmp_path / name)], False, "body")
    assert str(tmp_path / name) in str(error.value)


ERRORS = {
    "zeros": ("a.bin", b"PK\0\0", "a.bin holds NUL characters"),
    "utf-16": ("a.txt", "text".encode("utf-16"), "a.txt is not UTF-8 text: 'utf-8' codec can't"),
    "latin-1": ("a.txt", b"caf\xe9", "byte 0xe9 in position 3"),
    "gzip by another name": ("a", gzip.compress(b"one"), "a is not UTF-8 text"),
    "latin-1 in csv": ("a.csv", b"body\nx\ncaf\xe9\n", "a.csv: line 3 is not UTF-8 text"),
    "latin-1 in jsonl": (
        "a.jsonl", b'{"body": "x"}\n' * 200_000 + b'{"body": "caf\xe9"}\n',
        "a.jsonl: line 200001 is not UTF-8 text: invalid continuation byte",
    ),
    "half a character": (
        "a.jsonl", b'{"body": "x"}\n{"body": "caf\\ud83c!"}\n',
        r"a.jsonl: 'body' of row 1 holds half a character \(the lone surrogate U\+D83C\). Write",
    ),
    "half a character of a row that is a text": (
        "a.json", b'["x", "\\udf89"]', r"a.json: row 1 holds half a character \(.* U\+DF89\)"
    ),
    "half a character in a conversation": (
        "a.jsonl", b'{"body": [{"role": "user", "content": [{"text": "\\ud800"}]}]}',
        "a.jsonl: 'body' of row 0 holds half a character",
    ),
    "half a character in a name within a conversation": (
        "a.jsonl", b'{"body": [{"\\ud800": "user"}]}', "'body' of row 0 holds half a character",
    ),
    "cut character": ("a.json", b'[{"body": "\xf0\x9f', "a.json: line 1 is not UTF-8 text: unexp"),
    "no json": ("a.jsonl", b'{"body": "x"}\n\n{"body": }\n', r"row 1 \(line 3\) is no JSON: Exp"),
    "cut json": ("a.jsonl", b'{"body": "x"}\n{"body": "y', r"row 1 \(line 2\) is no JSON: Untermi"),
    "cut list": ("a.json", b'[{"body": "x"},\n', r"row 1 \(line 2\) is no JSON: Expecting v"),
    "behind a list": ("a.json", b'[{"body": "x"}] []', "a.json: more follows its list of 1 rows"),
    "far behind a list": ("a.json", b"[]" + b" " * CHUNK + b"1", "more follows its"),
    "no comma": (
        "a.json", b'[{"body": "x"}\n{"body": "y"}]', r"row 1 \(line 2\) is no JSON: Expecting ','"
    ),
    "no comma far down": (
        "a.json", b'[{"body": "x"}' + b"\n" * CHUNK + b'"y"]', "row 1 .* Expecting ','"
    ),
    "cut before a comma": ("a.json", b'["x"', r"row 1 \(line 1\) is no JSON: Expecting ','"),
    "first comma": ("a.json", b'[,{"body": "x"}]', r"row 0 \(line 1\) is no JSON: Expecting value"),
    "two commas": ("a.json", b'["x",\n,"y"]', r"a.json: row 1 \(line 2\) is no JSON: Expecting v"),
    "last comma": ("a.json", b'[{"body": "x"},\n]', r"row 1 \(line 2\) is no JSON: Expecting val"),
    "a comma alone": ("a.json", b"[,]", r"a.json: row 0 \(line 1\) is no JSON: Expecting value"),
    "commas between lines": ("a.jsonl", b'"x",\n"y"', r"row 1 \(line 1\) is no JSON: Expecting v"),
    "nested too deep": ("a.json", b"[" * 200_000, r"row 0 \(line 1\) is no JSON: maximum rec"),
    "long number": ("a.jsonl", b"1" * 5_000, r"a.jsonl: row 0 \(line 1\) is no JSON: Exceeds"),
    "far down": (
        "a.jsonl", b'{"body": "x"}\n' * 200_000 + b"{]\n",
        r"row 200000 \(line 200001\) is no JSON: Expecting property name",
    ),
    "key twice": ("a.jsonl", b'{"body": "x", "body": "y"}', r"row 0 .* 'body' is there twice"),
    "no object": ("a.jsonl", b'{"body": "x"}\n[1]', "a.jsonl: row 1 is no object, but list"),
    "no such key": ("a.json", b'[{"id": 1, "x": 2}]', "row 0 has no column 'body'; it has id, x"),
    "later no such key": ("a.jsonl", b'{"body": "x"}\n{}', "a.jsonl: row 1 has no column 'body'"),
    "number": ("a.jsonl", b'{"body": "1"}\n{"body": 1}', "'body' of row 1 is no text, but int"),
    "null": ("a.jsonl", b'{"body": null}', "'body' of row 0 is no text, but NoneType"),
    "no such column": ("a.csv", b"id,x\n1,2\n", "a.csv has no column 'body'; it has id, x"),
    "no such column in no rows": ("a.tsv", b"id\tx", "a.tsv has no column 'body'; it has id, x"),
    "column twice": ("a.csv", b"body,body\n1,2\n", "a.csv has 2 columns 'body'"),
    "short row": ("a.csv", b"id,body\n1,x\n\n2\n", r"row 1 \(line 4\) has 1 field.*header 2"),
    "long row": ("a.csv", b"id,body\n1,x,y\n", r"a.csv: row 0 \(line 2\) has 3 field.*header 2"),
    "open quote": ("a.csv", b'body\nx\n"y\n', r"a.csv: row 1 \(line 3\) is no CSV: unexpected end"),
    "text behind a quote": ("a.tsv", b'body\n"y" z\n', r"row 0 \(line 2\) is no CSV: '\t' exp"),
    "carriage return": (
        "a.csv", b"body\nlone\rreturn\n", r"row 0 \(line 2\) is no CSV: a carriage return outside"
    ),
    "nul in csv": ("a.csv", b"body\nx\n\na\0b\n", r"a.csv: row 1 \(line 4\) holds NUL characters"),
    "nul beside": ("a.tsv", b"id\tbody\n\0\tx\n", r"a.tsv: row 0 \(line 2\) holds NUL characters"),
    "utf-16 csv": (
        "a.csv", "body\nx\n".encode("utf-16-le"), r"a.csv: the header \(line 1\) holds NUL char"
    ),
    "old mac": ("a.csv", b"body\rone\rtwo\r", r"a.csv: the header \(line 1\) is no CSV: a carr"),
    "quote in the header": ("a.csv", b'"body', r"a.csv: the header \(line 1\) is no CSV"),
    "no parquet": ("a.parquet", b"plain text, no Parquet", "a.parquet is no Parquet file"),
    "empty parquet": ("a.parquet", b"", "a.parquet is no Parquet file"),
    "parquet column": (
        "a.parquet", parquet_bytes({"id": [1], "x": [2]}), "has no column 'body'; it has id, x"
    ),
    "parquet dates": (
        "a.parquet", parquet_bytes({"body": pa.array([None, 0], pa.timestamp("s"))}),
        "a.parquet: 'body' of row 0 is no text, but NoneType",
    ),
    "parquet bytes": ("a.parquet", parquet_bytes({"body": [b"x"]}), "row 0 is no text, but bytes"),
    "parquet latin-1": (
        "a.parquet",
        parquet_bytes({"body": pa.array(["x", b"caf\xe9"], pa.binary()).view(pa.string())}),
        "a.parquet: 'body' of row 1 is not UTF-8 text",
    ),
    "no gzip": ("a.txt.gz", b"plain text", "a.txt.gz cannot be read: Not a gzipped file"),
    "no bzip2": ("a.txt.bz2", b"plain text", "a.txt.bz2 cannot be read: Invalid data"),
    "no xz": ("a.txt.xz", b"plain text", "a.txt.xz cannot be read: Input format"),
    "no zstd": ("a.txt.zst", b"plain text", "a.txt.zst cannot be read: ZSTD"),
    "bad deflate": (
        "a.txt.gz", gzip.compress(b"text")[:10] + b"\xff" * 30, "cannot be read: Error -3"
    ),
}  # fmt: skip
ERRORS |= {
    f"cut {packing}": (f"a.jsonl{packing}", PACKERS[packing](JSON_LINES)[:-9], "cannot be read")
    for packing in (".gz", ".bz2", ".xz", ".lzma", ".zst")
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_names_file_and_place(tmp_path, case):
    name, data, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name, data)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("suffix", ["", ".txt", ".csv", ".jsonl", ".parquet", ".gz", ".zst"])
def test_a_missing_file_and_a_directory(tmp_path, suffix):
    path = tmp_path / f"it{suffix}"
    with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{path}'"):
        read(path)
    path.mkdir()
    with pytest.raises(ValueError, match=f"{path} is a .*(directory|kind)"):
        read(path)


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("data", [b"caf\xe9\n", b"PK\0\n"])
def test_the_standard_input_is_named(monkeypatch, data, lines):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    with pytest.raises(ValueError, match="standard input.* (is not UTF-8 text|holds NUL)"):
        list(text_files.read_rows([], lines, "text"))
