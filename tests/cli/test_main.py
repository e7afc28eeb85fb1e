"""The command line as a user runs it: files of each kind, outputs, errors, and a killed run."""

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_type_hints
from xml.etree import ElementTree

import datasets
import pytest
from command_line import TINY, command_of, result, run, words_of
from support import ROOT, flat, kill_when
from transformers.utils.logging import is_progress_bar_enabled

from ppleval import Perplexity
from ppleval.cli import per_text as per_text_file
from ppleval.cli.main import main
from ppleval.cli.per_text import PerTextFile
from ppleval.stats.pairs import TokenPairSums
from ppleval.stats.totals import TextSums

TEXTS = ["Return the number of items.", "naïve 漢字 🎉", "Raises ValueError\nif there is none."]


def assert_same(found, texts):
    expected = Perplexity().compute(predictions=texts, model_id=TINY)
    for name in ("perplexity", "mean_perplexity", "bits_per_byte", "perplexity_ci_high"):
        value = math.nan if found[name] is None else found[name]
        assert value == pytest.approx(expected[name], rel=1e-6, nan_ok=True)
    assert found["num_tokens"] == expected["num_tokens"]
    assert found["signature"] == expected["signature"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_files_of_each_kind(tmp_path, kind):
    data = datasets.Dataset.from_dict({"id": [1, 2, 3], "body": TEXTS})
    path = tmp_path / f"data.{kind}"
    if kind == "txt":
        paths = []
        for i, text in enumerate(TEXTS):
            paths.append(tmp_path / f"{i}.txt")
            paths[-1].write_text(text, encoding="utf-8")
    else:
        {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[kind](path)
        paths = [path, "--column", "body"]
    assert_same(result(*paths), TEXTS)


TALKS = [
    [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    for user, assistant in [("Hello!", "Hi"), ("What is a list?", "naïve 🎉"), ("One", "Two")]
]
CHATML = ROOT / "tests" / "chat_templates" / "chatml.jinja"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_and_their_resumption(tmp_path, kind):
    path, out = tmp_path / f"talks.{kind}", tmp_path / "out.jsonl"
    data = datasets.Dataset.from_dict({"messages": TALKS, "domain": ["a", "b", "a"]})
    {"jsonl": data.to_json, "parquet": data.to_parquet}[kind](path)
    arguments = [path, "--column", "messages", "--chat-template", CHATML, "--group-by", "domain"]
    found = result(*arguments, "--per-text", out)
    template = CHATML.read_text()
    expected = Perplexity().compute(
        predictions=TALKS, groups=["a", "b", "a"], model_id=TINY, chat_template=template
    )
    assert found["signature"] == expected["signature"]
    for one, other in [(found, expected), (found["groups"]["a"], expected["groups"]["a"])]:
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-6)
        assert one["num_tokens"] == other["num_tokens"]
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:2]))
    again = result(*arguments, "--per-text", out, "--resume")
    assert again["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)
    changed = datasets.Dataset.from_dict({"messages": TALKS[::-1], "domain": ["a", "b", "a"]})
    {"jsonl": changed.to_json, "parquet": changed.to_parquet}[kind](path)
    done = run(*arguments, "--per-text", out, "--resume")
    assert (done.returncode, "is of other texts: number 0" in done.stderr) == (1, True)


def test_a_chat_template_for_texts_is_refused(tmp_path):
    done = run("--chat-template", CHATML, stdin="text")
    assert done.returncode == 1
    assert "chat_template has no meaning with texts that are no conversations" in done.stderr


def test_as_a_command(tmp_path):
    """From another directory."""
    arguments = command_of("--json", "--lines")
    done = subprocess.run(
        arguments,
        input="\n".join(TEXTS),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert_same(json.loads(done.stdout), "\n".join(TEXTS).split("\n"))


def test_standard_input_is_utf8_whatever_the_locale(tmp_path):
    """Also behind a byte order mark, as a file is."""
    data = b"\xef\xbb\xbf" + "café, naïve 漢字 🎉\n".encode()
    path = tmp_path / "text.txt"
    path.write_bytes(data)

    def pipe(locale):
        done = subprocess.run(
            command_of("--json"),
            input=data,
            capture_output=True,
            check=True,
            timeout=120,
            env=os.environ | {"PYTHONCOERCECLOCALE": "0"} | locale,
        )
        return json.loads(done.stdout)

    locales = [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
    filed = result(path)
    with ThreadPoolExecutor() as pool:
        for locale, piped in zip(locales, pool.map(pipe, locales), strict=True):
            assert piped["num_bytes"] == filed["num_bytes"] == len(data) - 3, locale
            assert piped["perplexity"] == pytest.approx(filed["perplexity"], rel=1e-6), locale


def test_lines_and_standard_input():
    text = "first line\nsecond line\n"
    assert_same(result("--lines", stdin=text), ["first line", "second line"])
    assert_same(result(stdin=text), [text])


def test_the_table(tmp_path):
    done = run("--lines", "--max-length", 6, stdin="\n".join(TEXTS))
    assert done.returncode == 0
    first, *lines = done.stdout.splitlines()
    assert first == TINY
    table = {line[2:18].strip(): line[18:30].strip() for line in lines[:-1]}
    expected = Perplexity().compute(
        predictions="\n".join(TEXTS).split("\n"), model_id=TINY, max_length=6
    )
    assert table["perplexity"] == f"{expected['perplexity']:.2f}"
    assert table["bits per byte"] == f"{expected['bits_per_byte']:.3f}"
    assert table["texts cut"] == str(expected["num_truncated"]) == "2"
    assert lines[-1].strip() == expected["signature"]


def test_per_text_file(tmp_path):
    out = tmp_path / "scores.jsonl"
    found = result("--lines", "--per-text", out, stdin="one two\n\nthree\n")
    header, *rows = map(json.loads, out.read_text().splitlines())
    assert header == {"signature": found["signature"]}
    expected = Perplexity()
    with pytest.warns(UserWarning, match="no token to score"):
        expected = expected.compute(predictions=["one two", "", "three"], model_id=TINY)
    assert [row["text"] for row in rows] == [0, 1, 2]
    assert rows[1].pop("perplexity") is None
    del expected["perplexities"][1]
    found = [row["perplexity"] for row in rows if "perplexity" in row]
    assert found == pytest.approx(expected["perplexities"], rel=1e-6)


def test_resume_after_the_end_gives_the_same(tmp_path):
    out = tmp_path / "scores.jsonl"
    arguments = ["--lines", "--per-text", out]
    first = result(*arguments, stdin="one\ntwo\n")
    assert result(*arguments, "--resume", stdin="one\ntwo\n") == first
    more = result(*arguments, "--resume", stdin="one\ntwo\nthree\n")
    assert_same(more, ["one", "two", "three"])


def test_a_half_written_line_does_not_count(tmp_path):
    out = tmp_path / "scores.jsonl"
    arguments = ["--lines", "--per-text", out]
    first = result(*arguments, stdin="one\ntwo\n")
    whole = out.read_bytes()
    for left in (whole[:-5], whole[:10], b"", whole + b'{"text": 2, "finger'):
        out.write_bytes(left)
        again = result(*arguments, "--resume", stdin="one\ntwo\n")
        assert again["perplexity"] == pytest.approx(first["perplexity"], rel=1e-6)
        assert len(out.read_text().splitlines()) == 3


def test_resume_refuses_another_run(tmp_path):
    out = tmp_path / "scores.jsonl"
    arguments = ["--lines", "--per-text", out]
    result(*arguments, stdin="one\ntwo\n")
    before = out.read_bytes()
    for changed, stdin, message in (
        (["--stride", 7], "one\ntwo\n", "other settings, stride:256; now they are stride:7. Cont"),
        ([], "one\nother\n", "is of other texts: number 1 is not the one"),
        ([], "one\n", "is of other texts: it has 2, and now there are 1. Name all files"),
        (["--limit", 1], "one\ntwo\n", "with a --limit of at least 2 or none"),
        (["--preset", "hf-docs"], "one\ntwo\n", "joins all texts"),
    ):
        done = run(*arguments, "--resume", *changed, stdin=stdin)
        assert done.returncode == 1
        assert message in done.stderr
        assert out.read_bytes() == before
    out.write_text("something else\n")
    done = run(*arguments, "--resume", stdin="one\ntwo\n")
    assert (done.returncode, "was not written by --per-text" in done.stderr) == (1, True)
    assert out.read_text() == "something else\n"


GOOD = {
    "text": 0,
    "fingerprint": per_text_file.fingerprint("one"),
    "perplexity": 7.4,
    "nll_sum": 4.0,
}
GOOD |= {"weight_sum": 2.0, "unweighted_nll_sum": 4.0, "num_tokens": 2, "num_bytes": 3}
GOOD |= {"token_nll_sq_sum": 10.0, "context_truncated": False}
GOOD |= {"num_words": 1, "truncated": False, "positions": []}
ODD_LINES = {
    "null": {"nll_sum": None},
    "no number": {"nll_sum": "many"},
    "flag for number": {"weight_sum": True},
    "word for count": {"num_tokens": "2"},
    "fraction for count": {"num_bytes": 2.5},
    "count below zero": {"num_tokens": -2},
    "bytes below zero": {"num_bytes": -1},
    "count above 64 bits": {"num_words": 2**63},
    "count of 400 digits": {"num_tokens": 10**400},
    "number of 5000 digits": b'{"num_tokens": %s}' % (b"9" * 5000),
    "no tokens": {"num_tokens": 0},
    "weight below zero": {"weight_sum": -2.0},
    "infinite weight": {"weight_sum": "inf"},
    "weight that is none": {"weight_sum": "nan"},
    "nll below zero": {"nll_sum": -4.0},
    "nll of minus infinity": {"unweighted_nll_sum": "-inf"},
    "nll that is none in one sum": {"nll_sum": "nan"},
    "word that is a number in Python": {"nll_sum": " 4_0.0 "},
    "positions": {"positions": [[1.0, 1.0, 1.0]]},
    "positions of another shape": {"positions": [1.0]},
    "ragged positions": {"positions": [[1.0], [1.0, 2.0]]},
    "number for flag": {"truncated": 0},
    "number for fingerprint": {"fingerprint": 5},
    "list for row": b"[1]",
    "no JSON": b"{",
    "too deep": b"[" * 100_000,
    "no UTF-8": b'{"text": "\xff"}',
}


def sealed(row: dict) -> bytes:
    """A line with a checksum that fits."""
    return json.dumps(row | {"checksum": per_text_file._checksum(row)}).encode()


@pytest.mark.parametrize("case", ODD_LINES)
def test_resume_refuses_an_odd_line(tmp_path, case):
    """Also if its checksum fits."""
    path, odd = tmp_path / "scores.jsonl", ODD_LINES[case]
    lines = [json.dumps({"signature": "s"}).encode(), sealed(GOOD)]
    path.write_bytes(b"\n".join([*lines, b""]))
    with PerTextFile(path, {"signature": "s"}, TextSums, resume=True) as log:
        assert log.finished[0].sums.perplexity == pytest.approx(math.exp(2))
    lines.append(odd if isinstance(odd, bytes) else sealed(GOOD | odd))
    path.write_bytes(b"\n".join([*lines, b""]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="scores.jsonl: line 3 was not written by --per-text"):
        PerTextFile(path, {"signature": "s"}, TextSums, resume=True)
    assert path.read_bytes() == before


DAMAGES = {
    "another sum": (b'"nll_sum": 4.0', b'"nll_sum": 5.0'),
    "another count": (b'"num_bytes": 3', b'"num_bytes": 2'),
    "a name twice": (b'"num_bytes": 3', b'"num_bytes": 2, "num_bytes": 3'),
    "no checksum": (b'"checksum": ', b'"other": '),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_resume_refuses_a_damaged_line(tmp_path, case):
    path, (old, new) = tmp_path / "scores.jsonl", DAMAGES[case]
    line = sealed(GOOD)
    assert old in line
    path.write_bytes(b"\n".join([b'{"signature": "s"}', line.replace(old, new), b""]))
    match = (
        r"line 2 was not written by --per-text, or by another version of it, or is damaged. Delete "
        r"it and all lines after it, whose texts are then scored again\.$"
    )
    with pytest.raises(ValueError, match=match):
        PerTextFile(path, {"signature": "s"}, TextSums, resume=True)


def test_resume_takes_what_a_model_may_give(tmp_path):
    """NaN in all sums, infinity, nothing scored, and buckets by position."""
    path = tmp_path / "scores.jsonl"
    nan = dict.fromkeys(("nll_sum", "unweighted_nll_sum", "token_nll_sq_sum"), "nan")
    nothing = dict.fromkeys(("nll_sum", "unweighted_nll_sum", "token_nll_sq_sum"), 0.0)
    nothing |= {"weight_sum": 0.0, "num_tokens": 0, "num_bytes": 0, "num_words": 0}
    rows = [GOOD | nan, GOOD | dict.fromkeys(nan, "inf"), GOOD | nothing]
    rows = [row | {"positions": [["nan", 1.0, 1.0], [0.0, 0.0, 0.0]]} for row in rows]
    path.write_bytes(b"\n".join([b'{"signature": "s"}', *map(sealed, rows), b""]))
    with PerTextFile(path, {"signature": "s"}, TextSums, resume=True, num_buckets=2) as log:
        found = [text.sums.perplexity for text in log.finished]
    assert found == pytest.approx([math.nan, math.inf, math.nan], nan_ok=True)


def test_resume_refuses_pairs_that_do_not_fit(tmp_path):
    path = tmp_path / "scores.jsonl"
    one = {name: value for name, value in GOOD.items() if name in get_type_hints(TextSums)}
    pair = GOOD | {"base": one, "kl_sum": 1.0, "reverse_kl_sum": 1.0, "same_top_sum": 1.0}
    pair |= {"nll_product_sum": 9.0, "kl": [0.5, 0.5], "delta_p": [-0.5, 0.5]}

    def read(row):
        path.write_bytes(b'{"signature": "s"}\n' + sealed(row) + b"\n")
        with PerTextFile(path, {"signature": "s"}, TokenPairSums, resume=True) as log:
            return [text.sums for text in log.finished]

    assert read(pair)[0].kl.tolist() == [0.5, 0.5]
    for odd in (
        {"kl": [0.5]}, {"delta_p": [0.5, 9.0]}, {"kl": [0.5, -9.0]}, {"kl_sum": -90.0},
        {"same_top_sum": 20.0}, {"base": one | {"num_tokens": 1}},
        {"base": one | {"num_bytes": -1}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="line 2 was not written by --per-text, or by"):
            read(pair | odd)


def test_resume_reads_regular_files_only(tmp_path):
    """It waits for no pipe, and reads no endless device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path} is no regular file, so --resume cannot"):
            PerTextFile(path, {"signature": "s"}, TextSums, resume=True)


def test_resume_refuses_an_endless_line(tmp_path, monkeypatch):
    path = tmp_path / "scores.jsonl"
    monkeypatch.setattr(per_text_file, "MOST_LINE_BYTES", 1000)
    path.write_bytes(b'{"signature": "s"}\n' + b" " * 5000)
    with pytest.raises(ValueError, match="line 2 was not written by --per-text"):
        PerTextFile(path, {"signature": "s"}, TextSums, resume=True)


@pytest.mark.long
def test_killed_in_the_middle_and_resumed(tmp_path):
    """The same result as a run that was not killed, without scoring again what was scored; also by
    group and by position."""
    source = (ROOT / "tiny_model" / "held_out.jsonl").read_text(encoding="utf-8")
    texts = [json.loads(line)["text"] for line in source.splitlines()]
    data = tmp_path / "data.jsonl"
    pieces = [text[i : i + 900] for text in texts for i in range(0, len(text), 900)] * 3
    rows = [{"text": piece, "kind": i % 3} for i, piece in enumerate(pieces)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--group-by", "kind", "--positions"]
    whole = result(data, *options, "--per-text", tmp_path / "whole.jsonl")

    out = tmp_path / "killed.jsonl"
    arguments = command_of("--json", *options, data, "--per-text", out)
    kill_when(lambda: out.exists() and len(out.read_bytes().splitlines()) >= 30, arguments)
    kept = len(out.read_bytes().splitlines()) - 1
    assert 0 < kept < len(pieces)
    resumed = result(data, *options, "--per-text", out, "--resume")
    assert resumed["signature"] == whole["signature"]
    assert list(resumed["groups"]) == ["0", "1", "2"]
    assert flat(resumed) == pytest.approx(flat(whole), rel=1e-5, nan_ok=True)
    for name, value in whole.items():
        if isinstance(value, (int, float)):
            assert resumed[name] == pytest.approx(value, rel=1e-6)
    assert len(out.read_text().splitlines()) == len(pieces) + 1


def test_a_missing_text_ends_the_run_also_when_it_is_resumed(tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    rows = [{"text": "one"}] * 2048 + [{"text": None}] + [{"text": "two"}] * 3
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for resume in ([], ["--resume"]):
        done = run(data, "--per-text", out, *resume)
        assert done.returncode == 1
        assert "'text' of row 2048 is no text, but NoneType" in done.stderr


def test_the_input_is_not_overwritten(tmp_path):
    data, notes = tmp_path / "data.jsonl", tmp_path / "notes.txt"
    data.write_text('{"text": "one"}\n')
    notes.write_text("no newline")
    for arguments in ([data, "--per-text", data], [data, "--per-text", notes, "--resume"]):
        done = run(*arguments)
        assert done.returncode == 1
        assert "would overwrite" in done.stderr or "was not written by" in done.stderr
    assert data.read_text() == '{"text": "one"}\n'
    assert notes.read_text() == "no newline"


def test_a_disk_that_becomes_full_is_named(tmp_path, monkeypatch):
    """Also when the file is closed, which tries once more to write what is left."""
    out = tmp_path / "scores.jsonl"
    with PerTextFile(out, {"signature": "s"}, TextSums, resume=False) as log:
        pass
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(log, "_file", full)
        for write in (lambda: log._write_line({}), log.__exit__):
            with pytest.raises(OSError, match=f"No space left on device: '{out}'"):
                write()


def test_json_has_no_nan(tmp_path):
    out = tmp_path / "out.jsonl"
    done = run("--json", "--lines", "--per-text", out, stdin="one\n\n")

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(done.stdout, parse_constant=refuse)
    assert found["perplexity_ci_low"] is None  # of a single text
    rows = [json.loads(line, parse_constant=refuse) for line in out.read_text().splitlines()]
    assert rows[2]["perplexity"] is None


def test_odd_files(tmp_path):
    brackets, table, marked = tmp_path / "d[1].jsonl", tmp_path / "d.csv", tmp_path / "bom.txt"
    brackets.write_text('{"text": "one"}\n')
    table.write_text('text,n\nNA,1\n"",2\n')
    marked.write_bytes(b"\xef\xbb\xbfthree")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    done = run("--json", brackets, table, marked, empty)
    assert done.returncode == 0, done.stderr
    assert "1 of 4 texts have no token to score" in done.stderr
    assert json.loads(done.stdout)["num_bytes"] == len("oneNAthree")


def test_a_table_without_rows(tmp_path):
    empty, text = tmp_path / "empty.parquet", tmp_path / "text.txt"
    datasets.Dataset.from_dict({"text": []}).to_parquet(empty)
    text.write_text("one")
    assert result(empty, text)["num_sequences"] == 1
    header = tmp_path / "header.csv"
    header.write_text("text\n")
    for arguments in ([empty, header], [empty, header, "--preset", "lm-eval"]):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[-1] == f"error: There are no texts in {empty}, {header}."


ERRORS = {
    "no such file": (["nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
    "no such table": (["nowhere.csv"], "No such file or directory: 'nowhere.csv'"),
    "no such model": (["--model", "nobody/nothing"], "model_id='nobody/nothing' could not be load"),
    "no such preset": (["--preset", "gpt"], "preset must be one of"),
    "archive, noticed before the model is loaded": (
        ["a.zip", "--model", "nobody/nothing"], "a.zip is of a kind that is not read"
    ),
    "directory": ([str(ROOT)], f"{ROOT} is a directory. Name the files in it, or read it by "),
    "second file, noticed before the model is loaded": (
        [str(ROOT / "LICENSE"), "nowhere.txt", "--model", "nobody/nothing"], "'nowhere.txt'"
    ),
    "no texts": (["--lines"], "There are no texts in the standard input."),
    "no texts, joined": (["--lines", "-", "--preset", "hf-docs"], "in the standard input."),
    "full disk": (["--per-text", "/dev/full"], "No space left on device: '/dev/full'"),
    "binary": ([str(ROOT / "tiny_model" / "model.safetensors")], "is not UTF-8 text"),
    "no such column": ([str(ROOT / "tiny_model" / "held_out.jsonl"), "--column", "x"],
                       "has no column 'x'; it has name, text"),
    "standard input has no columns": (["--group-by", "x"], "The standard input is plain text and"),
    "groups, joined": (["--group-by", "file", "--preset", "hf-docs"],
                       "error: --preset hf-docs joins all texts, so they have no groups."),
}  # fmt: skip


@pytest.mark.parametrize("lines", [[], ["--lines"]])
def test_standard_input_that_is_no_text(lines):
    done = run(*lines, stdin=b"caf\xe9\n")
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: standard input")
    assert "is not UTF-8 text: 'utf-8' codec can't decode byte 0xe9 in position 3" in last


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case):
    arguments, message = ERRORS[case]
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resume"],
        ["--window", "many"],
        ["--limit", "0"],
        ["--tensor-parallel", "0"],
        ["a.txt", "--dataset", "name"],
        ["--lines", "--dataset", "name"],
        ["--batchsize", "2"],
    ],
)
def test_wrong_usage_is_status_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "usage: ppleval compute" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the first word must be a command, one of compute, compare, save-base"),
        (["a.txt"], "must be a command, one of compute, compare, save-base, got 'a.txt'"),
        (["--model", "gpt2"], "got '--model'"),
        (["compute", "--modle", "gpt2"], "there is no option --modle; did you mean --model?"),
        (["compute", "--model_id=gpt2"], "did you mean --model?"),
        (["compute", "--model", "m", "--text"], "no option --text; ppleval compute --help has all"),
        (["compute", "--model", "m", "-v"], "no option -v"),
        (["compute", "--base", "gpt2"], "--base is an option of ppleval compare, not of ppleval c"),
        (["save-base", "--json"], "of ppleval compute and ppleval compare, not of ppleval save-b"),
        (["compute", "a", "--model", "m", "b"], "b stands apart from the other files; name all f"),
    ],
)
def test_words_that_are_not_known(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_beginning_of_an_option_is_taken_for_it(tmp_path):
    (tmp_path / "--odd.txt").write_text(TEXTS[0])
    assert run("--json", "--pos", "--lim=1", "--", tmp_path / "--odd.txt").returncode == 0


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["compute", "--help"], words_of("--window", "many")]
)
def test_help_and_wrong_usage_wait_for_no_large_import(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "ppleval", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "ppleval.cli.rows" in imported
    assert imported.isdisjoint({"evaluate", "torch", "transformers"})


# --- groups and positions -------------------------------------------------------------------------

KINDS = ["news", "code", "news"]


def write_rows(path, texts=TEXTS, kinds=KINDS):
    rows = [{"text": text, "kind": kind} for text, kind in zip(texts, kinds, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_groups_and_positions_are_those_of_compute(tmp_path):
    data = write_rows(tmp_path / "data.jsonl")
    options = {"predictions": TEXTS, "groups": KINDS, "positions": True, "model_id": TINY}
    found = result(data, "--group-by", "kind", "--positions")
    expected = Perplexity().compute(**options)
    assert list(found["groups"]) == ["news", "code"]
    assert flat(found) == pytest.approx(flat(expected), rel=1e-6, nan_ok=True)
    assert "perplexities" not in found["groups"]["news"]


def ratio_of(group: dict) -> str:
    """What the table for people has of a group in a comparison."""
    low, high = (f"{group[f'perplexity_ratio_ci_{end}']:.4f}" for end in ("low", "high"))
    ratio, tokens = f"{group['perplexity_ratio']:>12.4f}", group["num_tokens"]
    return f"{ratio}   95% interval {low} to {high}; tokens {tokens}"


def test_groups_and_positions_of_a_comparison(tmp_path):
    texts, kinds = TEXTS * 6, KINDS * 6
    data = write_rows(tmp_path / "data.jsonl", texts, kinds)
    arguments = [data, "--group-by", "kind", "--positions", "--base", TINY, "--dtype", "bfloat16"]
    found = result(*arguments)
    expected = Perplexity().compare(
        texts,
        groups=kinds,
        positions=True,
        base_id=TINY,
        model_id=TINY,
        model_kwargs={"dtype": "bfloat16"},
    )
    assert flat(found) == pytest.approx(flat(expected), rel=1e-6, nan_ok=True)
    lines = run(*arguments).stdout.splitlines()
    assert lines[lines.index("  by group                       perplexity ratio") + 1 :][:2] == [
        f"    news          {ratio_of(expected['groups']['news'])}, texts 12",
        f"    code          {ratio_of(expected['groups']['code'])}, texts 6",
    ]
    assert any(line.startswith("  macro perplexity") and "   base " in line for line in lines)
    assert "  tokens before                  perplexity ratio" in lines


def test_files_are_groups_in_the_table_for_people(tmp_path):
    """The names of files are long, and a bucket without tokens has no line."""
    first, second = tmp_path / "first_long_name.txt", tmp_path / "b.txt"
    texts = ["Return one.", "Return two.", "Return three.", "Return all of them."]
    first.write_text("\n".join(texts))
    second.write_text("six")
    done = run(first, second, "--lines", "--group-by", "file", "--positions")
    assert done.returncode == 0, done.stderr
    names = [str(first)] * 4 + [str(second)]
    expected = Perplexity().compute(
        predictions=[*texts, "six"], groups=names, positions=True, model_id=TINY
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    of_first, of_second = expected["groups"].values()
    low, high = (f"{of_first[f'perplexity_ci_{end}']:.2f}" for end in ("low", "high"))
    counts = f"tokens {of_first['num_tokens']}, texts 4"
    at = lines.index(["by", "group", "perplexity"])
    assert lines[at + 1 : at + 3] == [
        f"{first} {of_first['perplexity']:.2f} 95% interval {low} to {high}; {counts}".split(),
        f"{second} {of_second['perplexity']:.2f} no 95% interval; "
        f"tokens {of_second['num_tokens']}, texts 1".split(),
    ]
    macro = f"{expected['macro_perplexity']:.2f}"
    assert lines[at + 3][:3] == ["macro", "perplexity", macro]
    at = lines.index(["tokens", "before", "perplexity"])
    labels = [line[0] for line in lines[at + 1 : -1]]
    assert labels == [name for name, part in expected["positions"].items() if part["num_tokens"]]


def test_the_table_says_of_how_many_texts_the_interval_is():
    texts = ["Return two.", "Return six.", "Return all."]
    done = run("--lines", stdin="\n".join(texts))
    expected = Perplexity().compute(predictions=texts, model_id=TINY)
    low, high = (expected[f"perplexity_ci_{end}"] for end in ("low", "high"))
    assert f"95% interval {low:.2f} to {high:.2f}, of 3 texts\n" in done.stdout


def test_groups_and_positions_are_resumed(tmp_path):
    data, out = write_rows(tmp_path / "data.jsonl"), tmp_path / "out.jsonl"
    arguments = [data, "--group-by", "kind", "--positions", "--per-text", out]
    whole = result(*arguments)
    header, *rows = out.read_bytes().splitlines(keepends=True)
    settings = {"signature": whole["signature"], "group_by": "kind", "positions": "yes"}
    assert json.loads(header) == settings
    assert [json.loads(row)["group"] for row in rows] == KINDS
    out.write_bytes(header + b"".join(rows[:2]))
    # Float32 rounds otherwise in batches of another shape, and an interval of two texts shows it.
    resumed = flat(result(*arguments, "--resume"))
    assert resumed == pytest.approx(flat(whole), rel=1e-4, nan_ok=True)
    for changed in (
        [data, "--positions"],
        [data, "--group-by", "text", "--positions"],
        [data, "--group-by", "kind"],
    ):
        done = run(*changed, "--per-text", out, "--resume")
        assert done.returncode == 1
        assert "is of a run with other settings, " in done.stderr
        assert "; now they are " in done.stderr
        assert "signature" not in done.stderr


def test_resume_refuses_other_groups_in_the_same_column(tmp_path):
    data, out = write_rows(tmp_path / "data.jsonl"), tmp_path / "out.jsonl"
    arguments = [data, "--group-by", "kind", "--per-text", out]
    result(*arguments)
    write_rows(data, kinds=["news", "tale", "news"])
    written = out.read_bytes()
    done = run(*arguments, "--resume")
    assert done.returncode == 1
    assert "is of other groups: text 1 was of 'code' then, and is of 'tale' now" in done.stderr
    assert out.read_bytes() == written


def test_a_perplexity_above_the_vocabulary_is_told_of():
    """By a text that the bundled model cannot expect."""
    done = run(stdin="zqzqzq")
    assert done.returncode == 0
    assert "warning: The perplexity of " in done.stderr


def test_only_the_first_texts(tmp_path):
    """What follows them is not read."""
    data = tmp_path / "data.jsonl"
    write_rows(data)
    data.write_text(data.read_text() + "no row\n")
    assert_same(result(data, "--limit", 3), TEXTS)
    assert_same(result(data, "--limit", 2), TEXTS[:2])


def test_a_dataset(tmp_path):
    """Of two configurations; test_text_datasets.py has more."""
    for config in ("de", "en"):
        data = {"body": [f"{config} {text}" for text in TEXTS], "kind": KINDS}
        datasets.Dataset.from_dict(data).to_parquet(tmp_path / config / "test.parquet")
    names = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("de", "en"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    arguments = ["--dataset", f"{tmp_path}:en", "--column", "body", "--group-by", "kind"]
    found = result(*arguments, "--limit", 2)
    assert_same(found, [f"en {text}" for text in TEXTS[:2]])
    assert list(found["groups"]) == ["news", "code"]
    done = run("--dataset", f"{tmp_path}:fr", "--model", "nobody/nothing")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: {tmp_path} has no configuration 'fr'; it has de, en."
    )


# --- comparisons ----------------------------------------------------------------------------------


def test_a_comparison_for_people(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 3))
    done = run(data, "--base", TINY, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    expected = Perplexity().compare(
        TEXTS * 3, base_id=TINY, model_id=TINY, model_kwargs={"dtype": "bfloat16"}
    )
    title, *rows, signature = done.stdout.splitlines()
    assert title == f"{TINY}, compared with {TINY}"
    assert signature.strip() == expected["signature"]
    shown = {row[2:18].strip(): row[18:].strip() for row in rows}
    assert shown["perplexity"].startswith(f"{expected['perplexity']:.3f}   base ")
    low, high = (expected[f"perplexity_ratio_ci_{end}"] for end in ("low", "high"))
    ratio = f"{expected['perplexity_ratio']:.4f}   95% interval {low:.4f} to {high:.4f}"
    assert shown["perplexity ratio"] == ratio
    assert shown["KL divergence"].startswith(f"{expected['mean_kl']:.4g}   95% interval ")
    assert shown["same top token"].startswith(f"{expected['same_top']:.2%}")
    assert shown["texts"] == "9"


def test_a_comparison_of_one_text_has_no_interval(tmp_path):
    (tmp_path / "one.txt").write_text(TEXTS[0])
    done = run(tmp_path / "one.txt", "--base", TINY)
    assert "perplexity ratio      1.0000   no 95% interval" in done.stdout
    found = json.loads(run(tmp_path / "one.txt", "--base", TINY, "--json").stdout)
    assert found["perplexity_ratio_ci_low"] is None
    assert found["mean_kl"] == 0


def test_a_base_is_saved_and_compared_with(tmp_path):
    data, base = tmp_path / "data.jsonl", tmp_path / "base"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    done = run(data, "--to", base)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert f"saved {base}; compare with it by: ppleval compare --base {base}" in done.stderr
    found, expected = (result(data, "--base", where) for where in (base, TINY))
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)
    done = run(data, "--base", base, "--window", "100")
    assert done.returncode == 1
    assert "saved with window 512, and the texts are now read with window 100" in done.stderr


def test_a_base_that_is_not_there(tmp_path):
    done = run("--base", tmp_path / "nothing", stdin="text")
    assert done.returncode == 1
    assert "could not be loaded: there is no directory" in done.stderr


def test_a_picture(tmp_path):
    picture, data = tmp_path / "result.svg", tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    done = run(data, "--positions", "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert "<svg" in picture.read_text(encoding="utf-8")
    done = run(data, "--plot", tmp_path / "result.doc")
    assert done.returncode == 1
    assert ".svg" in done.stderr
    assert "perplexity" not in done.stdout


# ESC, an 8-bit ESC, NUL, line ends, right-to-left marks; and a long one.
HOSTILE = "g\x1b[31m\x9b1m\r\nperplexity   1.0\u2028\u202e\u2066"
NAMES = {
    "hostile": HOSTILE + "\0",
    "long": "g" * 10_000,
}


def assert_harmless(done, most=4000):
    """What the command says has no bytes but those of text, tells no lies and is short."""
    said = done.stdout + done.stderr.replace("\r", "\n")  # of the progress of loading
    assert [c for c in said if not (c.isprintable() or c == "\n")] == []
    assert len(said.encode()) < most
    assert "perplexity   1.0" not in [line.strip() for line in said.splitlines()]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_group_does_not_reach_the_terminal(tmp_path, name):
    groups = [name, "b", name]
    rows = [{"text": text, "g": group} for text, group in zip(TEXTS, groups, strict=True)]
    path, picture = tmp_path / "rows.jsonl", tmp_path / "picture.svg"
    path.write_text("\n".join(map(json.dumps, rows)))
    done = run(path, "--group-by", "g", "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert_harmless(done)
    assert max(map(len, done.stdout.splitlines()[:-1])) < 200
    ElementTree.parse(picture)
    assert list(result(path, "--group-by", "g")["groups"]) == [name, "b"]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_column_does_not_reach_the_terminal(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({name: "one", "number": 5}))
    assert result(path, "--column", name)["num_sequences"] == 1
    for column in ("text", "number", name + "?"):
        done = run(path, "--column", column)
        assert done.returncode == 1
        assert_harmless(done)
    path.write_text(json.dumps({name: 1}))
    assert_harmless(run(path, "--column", name))
    many = {f"{name}{number}": "one" for number in range(100)}
    path.write_text(json.dumps(many))
    done = run(path)
    assert_harmless(done)
    assert "and 92 more" in done.stderr


def test_a_file_does_not_reach_the_terminal(tmp_path):
    """A name in a directory has at most 255 bytes, and no NUL."""
    directory = tmp_path / HOSTILE
    directory.mkdir()
    path = directory / "a.txt"
    path.write_text('{"not a table')
    done = run(path, "--group-by", "file")
    assert done.returncode == 0, done.stderr
    assert_harmless(done)
    assert list(result(path, "--group-by", "file")["groups"]) == [str(path)]
    for arguments in (
        [directory / "none.txt"],
        [directory / "archive.zip"],
        [path, "--group-by", "x"],
        [path, "--per-text", path],
        [path, "--per-text", directory / "none" / "out"],
        [path, "--plot", directory / "a.pdf" / "b.pdf"],
        [path, "--dataset", directory],
        [path, f"--{HOSTILE}"],
        ["--limit", HOSTILE, path],
        ["--dataset", directory],
        ["f" * 10_000],
    ):
        done = run(*arguments)
        assert done.returncode in (1, 2)
        assert_harmless(done, most=6000)


def test_a_model_does_not_reach_the_terminal(tmp_path):
    directory = tmp_path / HOSTILE / HOSTILE
    shutil.copytree(TINY, directory)
    done = run("--model", directory, stdin=TEXTS[0])
    assert done.returncode == 0, done.stderr
    assert_harmless(done)
    base = tmp_path / HOSTILE / "base"
    for arguments in (
        ["--model", directory, "--to", base],
        ["--model", directory, "--base", base],
        ["--model", directory, "--base", directory],
        ["--base", directory.parent],
        ["--model", directory.parent],
        ["--model", "m" * 10_000],
        ["--base", HOSTILE],
        ["--model", "https://me:hf_secret@huggingface.co/a/b"],
    ):
        done = run(*arguments, stdin=TEXTS[0])
        assert_harmless(done)
        assert "hf_secret" not in done.stderr


def test_one_text_has_a_most(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two" * 100}))
    done = run(path, "--max-text-bytes", 200)
    assert done.returncode == 1
    assert "a.jsonl: row 1 has more than 200 bytes, the most of one text. Split it" in done.stderr
    assert run(path, "--max-text-bytes", 0).returncode == 2
    done = run("--dataset", path, "--max-text-bytes", 200)
    assert "row 1 has more than 200 bytes" in done.stderr


def test_memory_that_runs_out_ends_in_a_sentence(tmp_path, monkeypatch):
    def no_memory(*args):
        raise MemoryError

    monkeypatch.setattr("ppleval.cli.corpus.read_rows", no_memory)
    done = run(stdin=TEXTS[0])
    assert done.returncode == 1
    assert done.stderr.startswith("error: memory ran out. Pass a smaller --batch-size")


def test_bars_of_loading_are_for_terminals(tmp_path):
    """transformers shows them wherever standard error goes."""
    text = tmp_path / "text.txt"
    text.write_text("Return the number of items in the list.")
    assert "Loading weights" not in run(text).stderr
    assert "Loading weights" not in run("--to", tmp_path / "base", text).stderr
    assert is_progress_bar_enabled()  # as before, for whoever uses the library
