"""What the command line writes: nothing that is read or was there is lost, nothing is in vain."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from command_line import TINY, result, run
from support import largest_file

from ppleval.cli.per_text import PerTextFile
from ppleval.models import loading
from ppleval.show import plots
from ppleval.stats.totals import TextSums

TEXTS = ["Return the number of items.", "naïve 漢字 🎉", "Raises ValueError\nif there is none."]
OWN = '{"mine": 1}\n'


@pytest.fixture
def data(tmp_path) -> Path:
    """Texts, in the directory where the command runs."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def no_model(monkeypatch):
    """No model may be loaded: what is refused is refused before."""

    def fail(*args, **options):
        raise AssertionError("a model was to be loaded")

    monkeypatch.setattr(loading.KeptModel, "get", fail)


def files_below(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(tmp_path: Path, *arguments) -> str:
    """The sentence that refuses a call, which changes no file."""
    before = files_below(tmp_path)
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert files_below(tmp_path) == before
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1].removeprefix("error: ")


# --- what is there is kept ------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--per-text", "--plot"])
def test_what_exists_is_kept_unless_it_may_be_overwritten(tmp_path, data, option, request):
    out = tmp_path / "notes.svg"
    out.write_text(OWN)
    request.getfixturevalue("no_model")
    message = refused(tmp_path, data, option, out)
    assert message.startswith(f"{option} {out} exists. Name a new file, or pass --overwrite")
    assert ("--resume" in message) == (option == "--per-text")


@pytest.mark.parametrize("option", ["--per-text", "--plot"])
def test_overwrite(tmp_path, data, option):
    """A longer file, of which nothing is left."""
    out = tmp_path / "out.svg"
    out.write_text(OWN * 10_000)
    result(data, option, out, "--overwrite")
    assert OWN not in out.read_text()
    if option == "--per-text":
        assert len(out.read_text().splitlines()) == 1 + len(TEXTS)


def test_an_empty_file_holds_nothing_to_lose(tmp_path, data):
    """As mktemp makes it."""
    out = tmp_path / "out.jsonl"
    out.touch()
    result(data, "--per-text", out)
    assert len(out.read_text().splitlines()) == 1 + len(TEXTS)


@pytest.mark.parametrize("option", ["--per-text", "--plot", "--to"])
def test_the_standard_output_is_the_results(tmp_path, data, option, no_model):
    """A file of this name is written as ./-"""
    message = refused(tmp_path, data, option, "-")
    assert message.startswith(f"{option} - would write to the standard output")


def test_overwrite_needs_something_to_write(data):
    done = run(data, "--overwrite")
    assert (done.returncode, "--overwrite needs --per-text or --plot" in done.stderr) == (2, True)


def test_a_file_that_appeared_while_the_model_was_loaded_is_kept(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text(OWN)
    with pytest.raises(ValueError, match="out.jsonl exists"):
        PerTextFile(out, {"signature": "s"}, TextSums, resume=False)
    assert out.read_text() == OWN


def test_resume_wins_over_overwrite(tmp_path, data):
    """So that a picture can be drawn anew: --overwrite is for the picture then."""
    out, picture = tmp_path / "out.jsonl", tmp_path / "out.svg"
    arguments = [data, "--per-text", out, "--plot", picture]
    result(*arguments)
    written = out.stat().st_ino, out.read_bytes()
    picture.write_text(OWN)
    result(*arguments, "--resume", "--overwrite")
    assert (out.stat().st_ino, out.read_bytes()) == written
    assert "<svg" in picture.read_text()
    out.write_text(OWN)
    assert "was not written by --per-text" in refused(
        tmp_path, data, "--per-text", out, "--resume", "--overwrite"
    )


# --- one run at a time ----------------------------------------------------------------------------

# A process that holds the file open until its input ends; nothing is read, so no class is needed.
HOLD = """
import sys
from pathlib import Path
from ppleval.cli.per_text import PerTextFile
log = PerTextFile(Path(sys.argv[1]), {"signature": "s"}, object, resume=False)
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_run_on_the_same_file_is_refused_until_the_first_is_killed(tmp_path, data):
    """Also under another name."""
    out, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(out)
    result(data, "--per-text", out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1])
    command = [sys.executable, "-c", HOLD, tmp_path / "held.jsonl"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    first = subprocess.Popen(command, env=environment, text=True, **pipes)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        os.replace(tmp_path / "held.jsonl", tmp_path / "moved.jsonl")
        out.unlink()
        os.link(tmp_path / "moved.jsonl", out)
        for option in ("--resume", "--overwrite"):
            for name in (out, link):
                message = refused(tmp_path, data, "--per-text", name, option)
                assert message == f"{name} is being written by another run."
    finally:
        first.kill()
        first.wait()
        first.communicate()
    out.write_bytes(lines[0] + lines[1])
    assert result(data, "--per-text", out, "--resume")["num_sequences"] == len(TEXTS)
    assert len(out.read_bytes().splitlines()) == 1 + len(TEXTS)


# --- what is read is never written ----------------------------------------------------------------


def ways_to_lose_an_input(tmp_path: Path, data: Path) -> dict[str, tuple[list, str]]:
    """What is called -> its arguments, and what the sentence says."""
    directory, model, base = tmp_path / "directory", tmp_path / "model", tmp_path / "base"
    directory.mkdir()
    (directory / "a.jsonl").write_bytes(data.read_bytes())
    for copy in (model, base):
        copy.mkdir()
        (copy / "config.json").write_text(OWN)
    picture, template = tmp_path / "v.svg", tmp_path / "template.jinja"
    for path in (picture, template):
        path.write_text("<svg></svg>")
    soft, hard = tmp_path / "soft.jsonl", tmp_path / "hard.jsonl"
    soft.symlink_to(data)
    os.link(data, hard)
    os.link(directory / "a.jsonl", tmp_path / "inner.jsonl")
    (directory / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_bytes(data.read_bytes())
    of_data = f"would overwrite {data}, which is to be read"
    in_directory = f"lies in {directory}, which is to be read"
    return {
        "file": ([data, "--per-text", data], of_data),
        "relative": ([data, "--per-text", os.path.relpath(data)], of_data),
        "symlink": ([data, "--per-text", soft], of_data),
        "hard link": ([data, "--per-text", hard], of_data),
        "second file": ([picture, data, "--per-text", data], of_data),
        "dataset": (["--dataset", data, "--per-text", data], of_data),
        "dataset and split": (["--dataset", f"{data}:train", "--per-text", data], of_data),
        "in a dataset": (
            ["--dataset", directory, "--per-text", directory / "a.jsonl"], in_directory
        ),
        "new in a dataset": (
            ["--dataset", f"{directory}:train", "--per-text", directory / "new.jsonl"],
            in_directory,
        ),
        "linked into a dataset": (
            ["--dataset", directory, "--per-text", tmp_path / "inner.jsonl"],
            f"would overwrite a file of {directory}",
        ),
        "in a linked directory": (
            ["--dataset", directory, "--per-text", tmp_path / "elsewhere" / "b.jsonl"],
            f"would overwrite a file of {directory}",
        ),
        "model": (
            ["--model", model, data, "--per-text", model / "config.json"], f"lies in {model}, "
        ),
        "base": ([data, "--base", base, "--plot", base / "v.svg"], f"lies in {base}, "),
        "template": (
            [data, "--chat-template", template, "--per-text", template],
            f"would overwrite {template}, ",
        ),
        "picture": ([picture, "--plot", picture], f"would overwrite {picture}, "),
        "one another": (
            [data, "--per-text", tmp_path / "new.svg", "--plot", tmp_path / "." / "new.svg"],
            "would overwrite",
        ),
        "saved base": ([data, "--to", tmp_path], f"{tmp_path} contains {data}, which is"),
        "base in the model": (["--model", model, data, "--to", model / "b"], "lies in"),
        "Ray": (
            ["--engine", "ray", f"{directory}/", "--per-text", directory / "out"],
            f"lies in {directory}/, ",
        ),
        "Ray, a URI": (
            ["--engine", "ray", f"file://{data}", "--per-text", f"file://{data}"],
            f"would overwrite file://{data}, ",
        ),
        "Ray, remote": (
            ["--engine", "ray", "s3://bucket/in/", "--per-text", "s3://bucket/in/out/"],
            "lies in s3://bucket/in/, ",
        ),
    }  # fmt: skip


CASES = (
    "file", "relative", "symlink", "hard link", "second file", "dataset", "dataset and split",
    "in a dataset", "new in a dataset", "linked into a dataset", "in a linked directory", "model",
    "base", "template", "picture", "one another", "saved base", "base in the model", "Ray",
    "Ray, a URI", "Ray, remote",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_never_written(tmp_path, data, no_model, case):
    """Whatever its name is, and with --overwrite and --resume, too."""
    arguments, message = ways_to_lose_an_input(tmp_path, data)[case]
    allowing = [[]] if "--to" in arguments else [[], ["--overwrite"]]
    if "--per-text" in arguments:
        allowing.append(["--resume"])
    for options in allowing:
        assert message in refused(tmp_path, *arguments, *options)


def test_the_standard_input_may_be_a_file_that_is_not_to_be_written(tmp_path, data, no_model):
    kept = os.dup(0)
    try:
        with open(data, "rb") as file:
            os.dup2(file.fileno(), 0)
        message = refused(tmp_path, "--lines", "--per-text", data, "--overwrite")
    finally:
        os.dup2(kept, 0)
        os.close(kept)
    assert f"--per-text {data} would overwrite the standard input" in message


def test_a_name_on_the_hub_is_no_path(tmp_path, data, monkeypatch):
    """An output may have the name of a model that is not here."""
    monkeypatch.chdir(tmp_path)
    done = run("--model", "nobody/nothing", data, "--per-text", "nobody")
    assert "model_id='nobody/nothing' could not be loaded" in done.stderr


# --- before the work, and after the number --------------------------------------------------------


@pytest.mark.parametrize("option", ["--per-text", "--plot", "--to"])
def test_what_cannot_be_written_is_refused_before_the_work(
    tmp_path, data, no_model, option, monkeypatch
):
    name = "out.svg"
    directory, closed = tmp_path / "directory.svg", tmp_path / "closed"
    directory.mkdir()
    closed.mkdir()
    (tmp_path / "file").touch()
    cases = [(tmp_path / "file" / name, f"there is no directory {tmp_path}/file.")]
    if option != "--to":
        cases += [
            (directory, "is a directory; name a file"),
            (tmp_path / "none" / name, f"there is no directory {tmp_path}/none"),
        ]
    if option == "--plot":
        cases.append((tmp_path / "out.doc", "must end in .png, .svg, .pdf"))
    for path, message in cases:
        assert message in refused(tmp_path, data, option, path)
    access = os.access  # root may write everywhere
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != closed and access(path, mode)
    )
    for path in [closed / name] + [closed / "a" / "b"] * (option == "--to"):
        assert refused(tmp_path, data, option, path) == (
            f"{option} {path} cannot be written: no permission to write to {closed}."
        )


def test_something_else_at_the_place_of_a_base_is_refused_before_the_work(tmp_path, data, no_model):
    place = tmp_path / "notes"
    place.mkdir()
    (place / "diary.txt").write_text("dear diary")
    message = f"{place} exists, and is no saved base. Choose another path."
    assert refused(tmp_path, data, "--to", place) == message


@pytest.mark.parametrize("options", [[], ["--json"], ["--base", TINY]], ids=str)
def test_the_number_is_there_also_if_its_picture_fails(tmp_path, data, options, monkeypatch):
    def fail(result, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "save", fail)
    picture = tmp_path / "v.svg"
    done = run(data, *options, "--plot", picture)
    assert done.returncode == 1
    assert "perplexity" in done.stdout
    assert done.stderr.splitlines()[-1] == f"error: No space left on device: '{picture}'"


def test_a_picture_on_a_full_disk(tmp_path, data):
    picture = tmp_path / "v.png"
    with largest_file(1000):
        done = run(data, "--plot", picture)
    assert (done.returncode, "  perplexity  " in done.stdout) == (1, True)
    assert done.stderr.splitlines()[-1] == f"error: File too large: '{picture}'"


def test_a_dataset_beside_its_output_is_read(tmp_path):
    """What is beside the inputs is free."""
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "in" / "test.parquet")
    found = result(
        "--dataset", f"{tmp_path}/in:test", "--per-text", tmp_path / "out.jsonl",
        "--plot", tmp_path / "v.svg",
    )  # fmt: skip
    assert found["num_sequences"] == len(TEXTS)


def test_a_base_on_a_full_disk_is_continued(tmp_path):
    """Each kind of file in turn is the first that does not fit."""
    data, base = tmp_path / "data.jsonl", tmp_path / "base"
    texts = [text * 20 for text in TEXTS * 9]  # in two files, of which the second is larger
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings, layer, *of_texts = (
        "base.json",
        "output_layer.safetensors",
        "texts-000000000.safetensors",
        "texts-000000009.safetensors",
    )
    layer_size = 4 * 3072 * 192  # bytes
    for size, missing, kept in (
        (100, settings, []),
        (layer_size, layer, [settings]),
        (layer_size + 1000, of_texts[1], [settings, layer, of_texts[0]]),
    ):
        with largest_file(size):
            done = run(data, "--to", base)
        assert (done.returncode, done.stdout) == (1, "")
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"error: {base / missing} cannot be written: ")
        assert "File too large" in last
        assert sorted(path.name for path in base.iterdir()) == kept  # no part takes up the disk
    done = run(data, "--to", base)
    assert done.returncode == 0, done.stderr
    found = result(data, "--base", base)
    assert (found["num_sequences"], found["mean_kl"] < 1e-7) == (len(texts), True)
