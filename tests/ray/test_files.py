"""Corpora on Ray: the number of one process, also through killed workers and interrupted runs.

One cluster of two CPUs serves the module. What needs no cluster is tested without one: a reader and
a worker are called as Ray would call them.
"""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from command_line import TINY, words_of
from support import ROOT, flat, free_port, largest_file

from ppleval import Perplexity
from ppleval.cli.main import main
from ppleval.cli.per_text_parquet import PerTextDirectory
from ppleval.cli.rows import Row
from ppleval.cli.sources import file_system, files_in
from ppleval.ray import cluster as ray_cluster
from ppleval.ray import files as ray_files
from ppleval.ray import totals as ray_totals
from ppleval.stats import texts as stats_texts
from ppleval.stats import totals
from ppleval.texts import schedule

ray = ray_cluster.imported()

NUM_TEXTS = 200
SOURCE = "".join(
    json.loads(line)["text"]
    for line in (ROOT / "tiny_model" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As each worker has: the last bits of what a model gives depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster.cluster(2):
        yield


def pieces(count: int, size: int = 300) -> list[dict]:
    """Rows with texts of unequal lengths, an empty one among them, and groups."""
    rows = [
        {"text": SOURCE[size * i : size * i + 20 + 37 * i % size], "kind": "abc"[i // 5 % 3]}
        for i in range(count)
    ]
    rows[count // 2]["text"] = ""
    return rows


def write_rows(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=16)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(*arguments):
    """The command line within this process: (exit status, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words_of("--json", *arguments))
        except SystemExit as stop:
            status = stop.code
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def chunks(directory: Path) -> dict[str, int]:
    """Each finished chunk, with the time of its last change."""
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("[!_]*")}


def per_text(directory: Path) -> list[dict]:
    """The rows of all chunks, in the order of the texts."""
    rows = pa.parquet.read_table(directory).to_pylist()
    return sorted(rows, key=lambda row: row["row"])


def workers_of_ray() -> list[psutil.Process]:
    """The processes that hold a model."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "ChunkScorer" in child.name()
    ]


def make_job(**changes) -> ray_files.Job:
    fields = {"lines": False, "column": "text", "group_by": None, "context_column": None}
    fields |= {"batch_size": None, "per_text": None, "directory": os.getcwd()}
    return ray_files.Job(**{"options": {"model_id": TINY}} | fields | changes)


def attempts(count: int = 0):
    """Those of an actor, called at once; `count` were made before."""
    known = ray_files.Attempts()
    for _ in range(count):
        known.begin((0, 0))
    return SimpleNamespace(
        begin=SimpleNamespace(remote=known.begin), end=SimpleNamespace(remote=known.end)
    )


def answers(job, *files, known=None):
    """What the reader and one worker make of the files, chunk by chunk."""
    worker = ray_files.ChunkScorer(job, known or attempts())
    for number, file in enumerate(files):
        for chunk in ray_files.read_chunks({"number": number, "file": file}, job):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ray, "get", lambda value: value)
                answer = worker(chunk)["answer"]
            yield pickle.loads(answer)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A file of texts, named by a URI; what one process says of them, with its sums."""
    directory = tmp_path_factory.mktemp("corpus")
    file = "file://" + write_rows(directory / "texts.parquet", pieces(NUM_TEXTS))
    options = ["--group-by", "kind", "--positions"]
    done = run(file, *options, "--per-text", directory / "one.jsonl")
    assert done.returncode == 0, done.stderr
    lines = (directory / "one.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    return SimpleNamespace(file=file, options=options, result=json.loads(done.stdout), rows=rows)


@pytest.fixture(scope="module")
def scored(corpus, cluster, tmp_path_factory):
    """A run that is killed after its first chunk, while it writes another; then one of two workers
    that continues it, one of which is killed after its first chunk."""
    out = tmp_path_factory.mktemp("scored") / "out"
    options = {"model_id": TINY, "positions": True}
    job = make_job(options=options, group_by="kind", per_text=str(out))
    with job.output().prepared(resume=False):
        next(answers(job, corpus.file))
    (out / "_torn").write_bytes(b"PAR1")
    before, killed = chunks(out), []

    def kill_one():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            if len(chunks(out)) > len(before):
                victim = workers_of_ray()[0]
                victim.kill()
                killed.append(victim.pid)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    arguments = ["--engine", "ray", "--workers", 2, "--per-text", out, "--resume"]
    done = run(*arguments, corpus.file, *corpus.options)
    killer.join()
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=out, done=done, killed=killed, before=before)


def test_two_workers_give_the_number_of_one_process_though_one_is_killed(corpus, scored):
    assert len(scored.killed) == 1
    assert len(chunks(scored.out)) >= 4  # so that it was killed in the middle
    found = json.loads(scored.done.stdout)
    assert found["signature"] == corpus.result["signature"]
    assert flat(found) == pytest.approx(flat(corpus.result), rel=1e-9, nan_ok=True)
    assert list(found["groups"]) == list(corpus.result["groups"]) == ["a", "b", "c"]
    assert f"1 of {NUM_TEXTS} texts have no token to score" in scored.done.stderr


def test_what_an_earlier_run_has_scored_is_not_scored_again(scored):
    ((name, written),) = scored.before.items()
    assert chunks(scored.out)[name] == written
    num_rows = pa.parquet.read_metadata(scored.out / name).num_rows
    assert f"{num_rows} of {NUM_TEXTS} texts were done" in scored.done.stderr


def test_each_text_is_written_once_beside_its_place(corpus, scored):
    rows = per_text(scored.out)
    assert [(row["file"], row["row"]) for row in rows] == [
        (corpus.file, number) for number in range(NUM_TEXTS)
    ]
    for row, other in zip(rows, corpus.rows, strict=True):
        assert row["nll_sum"] == pytest.approx(other["nll_sum"], rel=1e-9)
        for name in ("fingerprint", "group", "num_tokens"):
            assert row[name] == other[name]


@pytest.mark.long
def test_an_error_ends_the_run_with_one_sentence(cluster, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{"text": "one"}])
    arguments = ["--engine", "ray", "--workers", 1, "--model", tmp_path / "absent", data]
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: model_id='{tmp_path}/absent' could not be loaded")


def test_a_cluster_that_is_gone_is_named(cluster, monkeypatch):
    def fail(answers):
        raise ray.exceptions.RayError("the node is dead\nwith details")

    monkeypatch.setattr(ray_files.CorpusTotals, "of", fail)
    with pytest.raises(ConnectionError, match="could not finish the run: the node is dead$"):
        ray_files.score_files(make_job(), ["data.jsonl"], 1, None)


def test_a_cluster_that_is_not_there_is_named(monkeypatch):
    port = free_port()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(
                ConnectionError, match=f"No Ray cluster answers at RAY_ADDRESS={address}"
            ),
            ray_cluster.cluster(),
        ):
            pass


def test_a_local_cluster_listens_on_loopback_only(cluster):
    families = psutil.Process().children(recursive=True)
    listening = {
        connection.laddr.ip
        for process in families
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


# --- without a cluster ----------------------------------------------------------------------------


def corpus_of(found) -> ray_totals.CorpusTotals:
    total = ray_totals.CorpusTotals(stats_texts.TextTotals())
    for answer in found:
        total.add(answer)
    return total


def check_same(found: dict, expected: dict, rel: float = 1e-9) -> None:
    assert found["signature"] == expected["signature"]
    assert flat(found) == pytest.approx(flat(expected), rel=rel, nan_ok=True)


def test_chunks_hold_the_portions_of_one_process_and_grow(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{"text": "word " * 20_000}] * 40)
    found = [
        pickle.loads(item["chunk"])
        for item in ray_files.read_chunks({"number": 3, "file": data}, make_job())
    ]
    firsts = [chunk.place[1] for chunk in found]
    assert [chunk.place[0] for chunk in found] == [3] * len(found)
    assert firsts == [0, *(firsts[i] + len(found[i].rows) for i in range(len(found) - 1))]
    sizes = [len(chunk.portions) for chunk in found]
    assert sizes[: ray_files.CHUNKS_OF_A_SIZE + 1] == [1] * ray_files.CHUNKS_OF_A_SIZE + [2]
    pairs = iter([("word " * 20_000, None)] * 40)
    expected = [len(portion) for portion in schedule.portions(pairs)]
    assert [len(portion) for chunk in found for portion in chunk.portions] == expected


def test_contexts_and_options(tmp_path):
    rows = [{"text": f" {word} it.", "prompt": "Return " * (i + 1)} for i, word in enumerate("abc")]
    data = write_rows(tmp_path / "data.jsonl", rows)
    job = make_job(options={"model_id": TINY, "max_length": 12}, context_column="prompt")
    found = corpus_of(answers(job, data)).result()
    expected = Perplexity().compute(
        predictions=[row["text"] for row in rows],
        contexts=[row["prompt"] for row in rows],
        model_id=TINY,
        max_length=12,
    )
    assert "num_truncated" in expected
    check_same(found, expected)


def test_conversations(tmp_path):
    talk = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi"}]
    template = (ROOT / "tests" / "chat_templates" / "chatml.jinja").read_text()
    options = {"model_id": TINY, "conversations": True, "chat_template": template}
    data = write_rows(tmp_path / "talks.parquet", [{"messages": talk}] * 3)
    found = corpus_of(answers(make_job(options=options, column="messages"), data)).result()
    options.pop("conversations")
    check_same(found, Perplexity().compute(predictions=[talk] * 3, **options))


def test_what_arrow_adds_to_conversations(tmp_path):
    """None for each key of another row: of a file, and of a dataset that is batches of Arrow."""
    talks = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
        for call in ({"city": "Bern"}, {"days": [1, None]})
    ]
    template = (
        "{% for m in messages %}{{ m.role + '\n' }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    options = {"model_id": TINY, "chat_template": template}
    expected = Perplexity().compute(predictions=talks, **options)
    rows = [{"messages": talk} for talk in talks]
    data = write_rows(tmp_path / "talks.parquet", rows)
    job = make_job(options=options | {"conversations": True}, column="messages")
    check_same(corpus_of(answers(job, data)).result(), expected)


def test_groups_come_in_the_order_of_the_texts_whatever_comes_first(tmp_path):
    first, second = "ba", "cab"
    files = [
        write_rows(tmp_path / f"{kinds}.jsonl", [{"text": "one " * 9, "kind": k} for k in kinds])
        for kinds in (first, second)
    ]
    found = list(answers(make_job(group_by="kind"), *files))
    expected = Perplexity().compute(
        predictions=["one " * 9] * 5, groups=list(first + second), model_id=TINY
    )
    for order in (found, found[::-1]):
        result = corpus_of(order).result()
        assert list(result["groups"]) == list(expected["groups"]) == ["b", "a", "c"]
        check_same(result, expected, rel=1e-6)  # the files do not share batches


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 5}, "data.jsonl: 'text' of row 1 is no text, but int."),
        ({"text": "\ud83d"}, "data.jsonl: 'text' of row 1 holds half a character"),
    ],
)
def test_a_bad_row_is_an_error_of_the_run(tmp_path, row, message):
    data = write_rows(tmp_path / "data.jsonl", [{"text": "one"}, row])
    with pytest.raises(ValueError, match="data.jsonl") as error:
        corpus_of(answers(make_job(), data))
    assert message in str(error.value)


def test_a_file_that_is_not_there_is_an_error_of_the_run(tmp_path):
    (answer,) = answers(make_job(), str(tmp_path / "absent.jsonl"))
    assert "No such file or directory" in answer.error


def test_texts_that_kill_their_workers_end_the_run(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{"text": "one"}, {"text": "two"}])
    most = ray_files.MOST_ATTEMPTS
    (answer,) = answers(make_job(), data, known=attempts(most - 1))
    assert answer.error is None
    (answer,) = answers(make_job(), data, known=attempts(most))
    assert f"{most} workers died while they scored rows 0 to 1 of {data}" in answer.error


def test_what_is_counted_of_a_chunk_is_forgotten_when_it_is_done():
    known = ray_files.Attempts()
    assert [known.begin((0, 7)), known.begin((0, 7)), known.begin((0, 9))] == [1, 2, 1]
    known.end((0, 7))
    known.end((0, 7))
    assert known.begin((0, 7)) == 1


def test_answers_of_different_settings_do_not_add_up():
    def answer(signature):
        return ray_totals.Answer.of([], None, {"signature": signature}, (0, 0), 0)

    total = corpus_of([answer("one"), answer("one")])
    with pytest.raises(ValueError, match="Texts were scored with different settings"):
        total.add(answer("two"))
    with pytest.raises(ValueError, match="There are no texts"):
        corpus_of([]).result()


# --- the directory --------------------------------------------------------------------------------


def test_resume_refuses_other_texts_settings_and_directories(tmp_path):
    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    write_rows(data, [{"text": "one"}, {"text": "two"}])
    job = make_job(per_text=str(out))
    with PerTextDirectory(str(out)).prepared(resume=False):
        (answer,) = answers(job, str(data))
    assert (answer.error, answer.num_finished) == (None, 0)
    with (
        pytest.raises(ValueError, match="out is not empty: name a new directory, continue"),
        PerTextDirectory(str(out)).prepared(resume=False),
    ):
        pass
    with PerTextDirectory(str(out)).prepared(resume=True):
        (again,) = answers(job, str(data))
    assert (again.totals, again.num_finished) == (answer.totals, 2)

    (other,) = answers(
        make_job(per_text=str(out), options={"model_id": TINY, "stride": 7}), str(data)
    )
    assert "out is of a run with other settings, stride:256; now they are stride:7." in other.error
    (other,) = answers(make_job(per_text=str(out), group_by="file"), str(data))
    assert "is of a run with other settings" in other.error
    write_rows(data, [{"text": "one"}, {"text": "three"}])
    (other,) = answers(job, str(data))
    assert f"out is of other texts: the rows of {data} from 0 on are not those" in other.error
    (chunk,) = chunks(out)
    (out / chunk).write_bytes(b"something else")
    (other,) = answers(job, str(data))
    assert f"{chunk} was not written by --per-text of --engine ray" in other.error


def test_overwrite_deletes_what_such_a_run_wrote_and_nothing_else(tmp_path):
    out, data = tmp_path / "out", write_rows(tmp_path / "data.jsonl", [{"text": "one"}])
    job = make_job(per_text=str(out))
    with job.output().prepared(resume=False):
        assert next(answers(job, data)).error is None
    (out / f"_{'0' * 32}").touch()
    (out / "notes.parquet").write_text("mine")
    with job.output().prepared(resume=True, overwrite=True):  # it continues
        assert len(list(out.iterdir())) == 5
    with job.output().prepared(resume=False, overwrite=True):
        assert {path.name for path in out.iterdir()} == {"_lock", "notes.parquet"}
    for options in ({"resume": True}, {"resume": False, "overwrite": True}):
        with (
            pytest.raises(ValueError, match="was not written by --per-text of --engine ray"),
            PerTextDirectory(str(out)).prepared(**options),
        ):
            pass
    assert {path.name for path in out.iterdir()} == {"_lock", "notes.parquet"}


def test_a_second_run_on_a_directory_is_refused(tmp_path):
    out = tmp_path / "out"
    with PerTextDirectory(str(out)).prepared(resume=False):
        for resume in (False, True):
            with (
                pytest.raises(ValueError, match="out is being written by another run"),
                PerTextDirectory(f"file://{out}").prepared(resume=resume),
            ):
                pass
    with PerTextDirectory(str(out)).prepared(resume=False):
        pass


def test_a_run_that_was_killed_before_it_wrote_anything_is_continued(tmp_path):
    """It leaves the lock, and half a file of settings."""
    (tmp_path / "_lock").touch()
    (tmp_path / f"_{'a1' * 16}").write_text("{")
    for resume in (False, True):
        with PerTextDirectory(str(tmp_path)).prepared(resume=resume):
            pass


def test_a_directory_on_a_full_disk_is_named(tmp_path):
    sums = [totals.TextSums(0.0, 0.0, 0.0, 0.0, 0, 0, 0, False, True, np.zeros((0, 3)))]
    output = PerTextDirectory(str(tmp_path))
    name = f"{tmp_path}/[0-9a-f]{{16}}-000000000000.parquet"
    with (
        largest_file(100),
        pytest.raises(OSError, match=f"^{name} cannot be written: .*File too large"),
    ):
        output.write("data.jsonl", 0, [Row("one")], sums)
    assert list(tmp_path.iterdir()) == []


def test_resume_refuses_other_groups_in_the_same_column(tmp_path):
    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    write_rows(data, [{"text": "one", "kind": "a"}, {"text": "two", "kind": "b"}])
    job = make_job(per_text=str(out), group_by="kind")
    with PerTextDirectory(str(out)).prepared(resume=False):
        (answer,) = answers(job, str(data))
    assert answer.error is None
    (again,) = answers(job, str(data))
    assert (list(again.groups), again.num_finished) == (["a", "b"], 2)
    write_rows(data, [{"text": "one", "kind": "a"}, {"text": "two", "kind": "c"}])
    (other,) = answers(job, str(data))
    assert f"out is of other groups: the rows of {data} from 0 on were of others" in other.error


def test_odd_numbers_are_read_as_they_were_written(tmp_path):
    sums_type = totals.TextSums
    positions = totals.np.array([[1.5, 2.0, 2.0], [float("inf"), 1.0, 1.0]])
    sums = [
        sums_type(float("inf"), 2.0, float("nan"), 0.1, 2, 3, 1, True, False, positions),
        sums_type(0.0, 0.0, 0.0, 0.0, 0, 0, 0, False, True, positions[:1]),
    ]
    output, rows = PerTextDirectory("file://" + str(tmp_path)), [Row("one"), Row("", context="x")]
    output.write("data.jsonl", 7, rows, sums)
    assert output.read("data.jsonl", 8, rows, sums_type) is None
    found = output.read("data.jsonl", 7, rows, sums_type)
    assert list(map(str, found)) == list(map(str, sums))
    assert output.num_chunks() == 1


# A column of a chunk -> what else it holds.
ODD_COLUMNS = {
    "num_tokens": [pa.array([-2]), pa.array([2.0]), pa.array([None], pa.int64()), pa.array(["2"])],
    "nll_sum": [pa.array([-9.0]), pa.array([float("nan")]), pa.array([None], pa.float64())],
    "weight_sum": [pa.array([float("inf")]), pa.array([0.0])],
    "positions": [pa.array([[[1.0, -1.0, 1.0]]]), pa.array([[[1.0, 2.0]]]), pa.array([[1.0]])],
}


@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_resume_refuses_sums_that_no_text_has(tmp_path, name):
    positions = totals.np.array([[1.5, 2.0, 2.0]])
    sums = [totals.TextSums(4.0, 2.0, 4.0, 9.0, 2, 3, 1, True, False, positions)]
    output, rows = PerTextDirectory(str(tmp_path)), [Row("one")]
    output.write("data.jsonl", 0, rows, sums)
    assert len(output.read("data.jsonl", 0, rows, totals.TextSums)) == 1
    (path,) = tmp_path.iterdir()
    table = pa.parquet.read_table(path)
    for column in ODD_COLUMNS[name]:
        odd = table.set_column(table.column_names.index(name), name, column)
        pa.parquet.write_table(odd, path)
        with pytest.raises(ValueError, match=f"{path} was not written by .*, or is damaged. Delet"):
            output.read("data.jsonl", 0, rows, totals.TextSums)


def test_resume_refuses_a_chunk_whose_bytes_changed(tmp_path):
    """Numbers, too: each page has a checksum."""
    sums = [totals.TextSums(4.25, 2.0, 4.0, 9.0, 2, 3, 1, True, False, totals.np.zeros((0, 3)))]
    output, rows = PerTextDirectory(str(tmp_path)), [Row("one")]
    output.write("data.jsonl", 0, rows, sums)
    (path,) = tmp_path.iterdir()
    whole, number = path.read_bytes(), totals.np.float64(4.25).tobytes()
    at = whole.index(number) + 6
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    with pytest.raises(ValueError, match="was not written by .*, or is damaged. Delete it, and wh"):
        output.read("data.jsonl", 0, rows, totals.TextSums)


@pytest.mark.parametrize("name", ["_settings.json", "chunk"])
def test_resume_waits_for_no_pipe(tmp_path, name):
    output, rows = PerTextDirectory(str(tmp_path)), [Row("one")]
    os.mkfifo(output._chunk("data.jsonl", 0) if name == "chunk" else tmp_path / name)
    with pytest.raises(ValueError, match="was not written by --per-text of --engine ray"):
        if name == "chunk":
            output.read("data.jsonl", 0, rows, totals.TextSums)
        else:
            output.agree({"signature": "s"})


@pytest.mark.parametrize("text", ["{", "[1]", "5", "[" * 100_000])
def test_settings_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "_settings.json").write_text(text)
    with pytest.raises(
        ValueError, match="_settings.json was not written by --per-text of --engine"
    ):
        PerTextDirectory(str(tmp_path)).agree({"signature": "s"})


def test_the_files_of_a_directory(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "sub/a.jsonl", "_settings.json", ".hidden"):
        write_rows(tmp_path / name, [{"text": "one"}])
    found = [f"{tmp_path}/b.jsonl", f"{tmp_path}/sub/a.jsonl"]
    assert files_in(f"{tmp_path}/") == found
    assert files_in(f"file://{tmp_path}/") == [f"file://{name}" for name in found]
    assert files_in("a.jsonl") == ["a.jsonl"]
    with pytest.raises(ValueError, match="wrong://"):
        file_system("wrong://bucket/a.jsonl")


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--limit", 3],
        ["--dataset", "x"],
        ["--tensor-parallel", 2],
    ],
)
def test_what_does_not_go_with_ray(arguments):
    files = [] if arguments[0] == "--dataset" else ["data.jsonl"]
    done = run("--engine", "ray", *files, *arguments)
    assert done.returncode == 2
    assert "--engine ray reads files, and goes without --dataset, --limit and" in done.stderr


def test_the_number_of_workers_is_checked():
    assert "--workers needs --engine ray" in run("x.txt", "--workers", 2).stderr
    done = run("--engine", "ray", "x.txt", "--workers", 0)
    assert (done.returncode, "--workers must be at least 1" in done.stderr) == (2, True)


def test_what_is_refused_before_ray_starts(tmp_path, monkeypatch):
    data, empty = write_rows(tmp_path / "data.jsonl", [{"text": "one"}]), tmp_path / "empty"
    empty.mkdir()
    picture = tmp_path / "out" / "v.svg"
    picture.parent.mkdir()
    picture.write_text("<svg></svg>")
    monkeypatch.setattr(ray_cluster, "cluster", None)
    for arguments, message in (
        ([data, data], "takes each file once, and one is named twice"),
        ([f"{empty}/"], f"There are no files in {empty}/"),
        ([data, "--preset", "hf-docs"], "--preset hf-docs joins all texts"),
        ([data, "--window", 0], "window"),
        ([data, "--column", "body"], "has no column 'body'"),
        ([data, "--plot", tmp_path / "x.doc"], ".svg"),
        ([data, "--plot", tmp_path / "none" / "x.svg"], "there is no directory"),
        ([data, "--per-text", tmp_path], f"contains {data}, which is to be read"),
        ([data, "--per-text", picture.parent], "out is not empty"),
        ([data, "--plot", picture], "exists. Name a new file, or pass --overwrite"),
        ([data, "--plot", picture, "--per-text", picture.parent, "--overwrite"], "lies in"),
    ):
        done = run("--engine", "ray", *arguments)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "starts its workers itself" in run("--engine", "ray", data).stderr


def test_without_ray_a_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    data = write_rows(tmp_path / "data.jsonl", [{"text": "one"}])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = run("--engine", "ray", data)
    assert done.returncode == 1
    assert done.stderr == "error: This needs Ray: pip install 'ray[data]'\n"


def test_each_worker_gets_a_gpu_where_there_are_some(monkeypatch):
    def pool(workers, device, **resources):
        monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
        found = ray_cluster.pool(workers, device)
        return found.pop("compute").max_size, found

    assert pool(None, None, CPU=16.0, GPU=4.0) == (4, {"num_gpus": 1})
    assert pool(None, "cpu", CPU=16.0, GPU=4.0) == (16, {"num_cpus": 1})
    assert pool(3, "cuda", CPU=16.0, GPU=4.0) == (3, {"num_gpus": 1})
    assert pool(None, None, CPU=16.0) == (16, {"num_cpus": 1})
    with pytest.raises(ValueError, match="--workers 5 needs a GPU each, and the Ray cluster has 4"):
        pool(5, None, CPU=16.0, GPU=4.0)
