"""Several processes give the result of one, or an error; none waits for one that is gone."""

import json
import math
import os
import signal
import time

import pytest
from command_line import TINY, words_of
from support import ROOT, environments, finish_ranks, flat, load, start_ranks
from workers import rank as rank_worker
from workers import sync as worker

from ppleval import Perplexity, distributed


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{case: [what came on rank 0, on rank 1]}"""
    out = tmp_path_factory.mktemp("ranks") / "out"
    finished = rank_worker.finish([worker.__file__, out], environments(2), timeout=600)
    assert [status for status, _, _ in finished] == [0, 0], finished
    first, second = (json.loads(out.with_name(f"out.{rank}").read_text()) for rank in (0, 1))
    return {case: [first[case], second[case]] for case in first}


@pytest.fixture(scope="module")
def alone():
    """The metric in one process, with the model in memory after its first texts."""
    return Perplexity()


def assert_same(found: dict, expected: dict, rel: float = 1e-12) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        if isinstance(value, str):
            assert found[name] == value
        else:
            assert found[name] == pytest.approx(value, rel=rel, nan_ok=True), name


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["sync_then_compute", "compute_with_sync", "last_batch_in_compute", "reset_after_sync"]
)
def test_ranks_add_up(answers, case):
    ppl = Perplexity()
    for rank in (0, 1):
        worker.add(ppl, rank)
    expected = ppl.compute()
    for found in answers[case]:
        assert found.pop("pending", 0) == 0
        assert_same(found, expected)


def test_groups_add_up(answers):
    ppl = Perplexity()
    for rank in (0, 1):
        worker.add_with_groups(ppl, rank)
    expected = ppl.compute()
    assert set(expected["groups"]) == {"rank 0", "rank 1", "both", "batch 0"}
    for found in answers["batches_with_groups"]:
        groups = found.pop("groups")
        assert set(groups) == set(expected["groups"])
        for name, group in groups.items():
            assert_same(group, expected["groups"][name])
        assert_same(found, {n: value for n, value in expected.items() if n != "groups"})
    for error in answers["groups_on_one_only"]:
        assert error == "ValueError: groups must go with every batch and text, or with none."


@pytest.mark.filterwarnings("ignore:.*have no token to score:UserWarning")
def test_texts_with_groups_and_positions(answers, alone):
    options = {"groups": worker.NAMES, "positions": True}
    expected = alone.compute(predictions=worker.TEXTS, **worker.TINY, **options)
    for found in answers["texts_with_groups"]:
        assert list(found["groups"]) == list(expected["groups"])
        assert found["macro_mean_nll"] == pytest.approx(expected["macro_mean_nll"], rel=1e-6)
        for label, bucket in found["positions"].items():
            assert_same(bucket, expected["positions"][label], rel=1e-6)


def test_a_rank_may_have_nothing(answers):
    ppl = Perplexity()
    worker.add(ppl, 0)
    expected = ppl.compute()
    for found in answers["one_rank_without_any"]:
        assert_same(found, expected)


def test_ranks_stay_apart_unless_asked(answers):
    for rank, found in enumerate(answers["not_asked_for"]):
        ppl = Perplexity()
        worker.add(ppl, rank)
        assert found == ppl.compute()


def test_the_loop_of_the_docs(answers):
    """On 11 rows, in batches of 2; one process has more of them than the other."""
    for found in answers["loop_of_the_docs"]:
        assert found["perplexity"] == pytest.approx(found["true"], rel=2e-5)
        assert found["num_sequences"] == 11


def test_infinity_passes(answers):
    for found in answers["nothing_scored_and_infinity"]:
        assert found["perplexity"] == math.inf
        assert (found["num_tokens"], found["num_sequences"]) == (1, 1)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no_rank_with_any", "ValueError: Nothing to compute"),
        ("twice", "ValueError: sync was called"),
        ("more_after_sync", "ValueError: sync was called"),
        ("merge_after_sync", "ValueError: sync was called"),
        ("different_options", "ValueError: The ranks have different settings"),
        ("pending_texts", "ValueError: Texts are pending"),
        ("not_connected", "ValueError: sync: several processes were launched"),
        ("different_texts", "ValueError: The ranks were given different texts"),
        ("different_numbers_of_texts", "ValueError: The ranks were given different"),
        ("different_settings", "ValueError: The ranks were given different texts, or"),
        ("bad_text_everywhere", "TypeError: predictions[1] must be a string"),
    ],
)
def test_errors_come_on_every_rank(answers, case, message):
    for found in answers[case]:
        assert found.startswith(message)


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("bad_text_on_one", "TypeError: predictions[1] must be a string, got int."),
        ("model_that_fails_on_one", "ZeroDivisionError: no memory, say"),
    ],
)
def test_an_error_on_one_rank_reaches_all(answers, case, error):
    first, second = answers[case]
    assert second.startswith(error)
    assert first == f"ConnectionError: Rank 1 failed: {second}"


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("a_bad_batch_on_one", "ValueError: references[0, 0] is 11"),
        ("texts_pending_on_one", "ValueError: Texts need a model"),
    ],
)
def test_an_error_in_a_batch_of_one_rank_reaches_all(answers, case, error):
    other, own = answers[case]
    assert other == "ConnectionError: 1 of 2 ranks failed."
    assert own.startswith(error)


def test_alone_an_error_is_raised_at_once():
    alone = distributed.ALONE
    with pytest.raises(ZeroDivisionError):
        alone.attempt(lambda: 1 / 0)
    mine = alone.attempt(lambda: [1, 2]).then(lambda numbers: [3, *numbers])
    assert alone.sum(mine, 3, "settings") == mine.value == [3, 1, 2]
    assert alone.gather(mine) == [mine.value]
    assert alone.require_all(mine) is alone.require_equal(mine, "different") is mine.value


def test_alone_there_is_nothing_to_add():
    ppl = Perplexity()
    worker.add(ppl, 0)
    ppl.sync()
    found = ppl.compute()
    worker.add(ppl, 0)
    assert ppl.compute() == found
    worker.add(ppl, 0)
    assert ppl.compute(sync=True) == found
    with pytest.raises(TypeError, match="sync must be True or False"):
        ppl.compute(sync="yes")


def test_sync_and_num_process_exclude_each_other():
    ppl = load(num_process=2, process_id=0, experiment_id="sync")
    worker.add(ppl, 0)
    with pytest.raises(ValueError, match="use one"):
        ppl.sync()


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*have no token to score:UserWarning")
@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        ("texts", {}),
        ("texts_streamed", {}),
        ("texts_added", {}),
        ("texts_in_portions", {}),
        ("texts_with_contexts", {"contexts": worker.CONTEXTS}),
        ("texts_masked", {"predictions": worker.SHORT_TEXTS} | worker.other_models()["original"]),
        ("texts_with_sources", {"predictions": worker.SHORT_TEXTS} | worker.other_models()[None]),
        ("texts_joined", {"preset": "hf-docs"}),
        ("one_text", {"predictions": worker.TEXTS[:1]}),
    ],
)
def test_texts_are_shared_out(answers, alone, case, arguments):
    named = {} if "model" in arguments else {"model_id": TINY}
    expected = alone.compute(**({"predictions": worker.TEXTS} | named | arguments))
    for found in answers[case]:
        # A text of two tokens shows that the float32 model ran on batches of another shape.
        assert found["perplexities"] == pytest.approx(
            expected["perplexities"], rel=5e-6, nan_ok=True
        )
        assert_same(found | {"perplexities": expected["perplexities"]}, expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*have no token to score:UserWarning")
def test_texts_are_each_rank_s_own_unless_asked(answers, alone):
    for rank, found in enumerate(answers["own_texts"]):
        texts = worker.TEXTS[rank : rank + 2]
        expected = alone.compute(predictions=texts, model_id=TINY)
        assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)


# --- the command line -----------------------------------------------------------------------------


def write_texts(path, texts) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run(num_ranks: int, *arguments) -> list[tuple[int | None, str, str]]:
    """(exit status, standard output, standard error) of each rank; none imports for itself."""
    return rank_worker.finish(
        ["-m", "ppleval", *words_of(*arguments)], environments(num_ranks), timeout=120
    )


@pytest.mark.parametrize("number", [5, 1], ids=["some texts", "none on one rank"])
def test_the_command_line_shares_texts_out(tmp_path, alone, number):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    texts = [text or "x" for text in worker.TEXTS[:number]]
    write_texts(data, texts)
    (status, printed, error), (other_status, other_printed, other_error) = run(
        2, "--json", data, "--per-text", out
    )
    assert (status, other_status, other_printed) == (0, 0, ""), (error, other_error)
    expected = alone.compute(predictions=texts, model_id=TINY)
    found = json.loads(printed)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    rows = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert [row["text"] for row in rows] == list(range(number))
    assert [row["perplexity"] for row in rows] == pytest.approx(expected["perplexities"], rel=5e-6)


def test_what_exists_is_kept_also_by_several_ranks(tmp_path):
    """The rank that writes refuses it, and tells the other."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    write_texts(data, ["one", "two"])
    out.write_text("mine")
    (status, _, error), (other_status, _, other_error) = run(2, data, "--per-text", out)
    assert (status, other_status, out.read_text()) == (1, 1, "mine")
    assert f"error: --per-text {out} exists." in error
    assert f"error: Rank 0 failed: ValueError: --per-text {out} exists." in other_error
    (status, _, error), _ = run(2, data, "--per-text", out, "--overwrite")
    assert (status, len(out.read_text().splitlines())) == (0, 3), error


def test_conversations_are_shared_out(tmp_path, alone):
    template = ROOT / "tests" / "chat_templates" / "chatml.jinja"
    talks = [
        [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": text or "x"}]
        for text in worker.TEXTS[:5]
    ]
    data = tmp_path / "talks.jsonl"
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (status, printed, error), (other_status, *_) = run(
        2, "--json", data, "--column", "messages", "--chat-template", template
    )
    assert (status, other_status) == (0, 0), error
    expected = alone.compute(predictions=talks, model_id=TINY, chat_template=template.read_text())
    found = json.loads(printed)
    assert found["signature"] == expected["signature"]
    assert found["num_tokens"] == expected["num_tokens"]
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)


def test_no_texts_at_all_is_an_error(tmp_path):
    write_texts(tmp_path / "none.jsonl", [])
    for status, printed, error in run(2, tmp_path / "none.jsonl"):
        assert (status, printed) == (1, "")
        assert f"error: There are no texts in {tmp_path / 'none.jsonl'}." in error


def test_the_standard_input_is_not_shared():
    for status, _, error in run(2, "-"):
        assert status == 1
        assert "error: Several processes cannot share the standard input" in error


@pytest.mark.long
def test_a_dead_rank_ends_the_run_and_resume_continues_it(tmp_path, alone):
    """Also without a launcher that would end the others; on more ranks or fewer."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    texts = [f"The number {i} is in the list." for i in range(5_000)]  # several portions
    write_texts(data, texts)
    ranks = start_ranks(2, "-m", "ppleval", *words_of("--json", data, "--per-text", out))
    deadline = time.monotonic() + 120
    try:
        while not out.exists() or out.read_bytes().count(b"\n") < 100:
            assert ranks[0].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(ranks[1].pid, signal.SIGKILL)
    (status, printed, error), (killed, _, _) = finish_ranks(ranks, timeout=60)
    assert (status, killed, printed) == (1, -signal.SIGKILL, "")
    assert error.splitlines()[-1].startswith("error: Another rank is gone")
    kept = out.read_bytes().count(b"\n") - 1
    assert 0 < kept < len(texts)

    (status, printed, _), _ = run(2, "--json", data, "--per-text", out, "--resume")
    assert status == 0
    whole = alone.compute(predictions=texts, model_id=TINY)
    del whole["perplexities"]
    assert_same(json.loads(printed), whole, rel=1e-6)
    assert len(out.read_text().splitlines()) == len(texts) + 1


def test_groups_and_positions_are_shared_out_and_resumed(tmp_path):
    """The file lost its second half."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    rows = [{"text": f"Item {i}. {'Return it. ' * (i % 7)}", "kind": i % 3} for i in range(400)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--json", "--group-by", "kind", "--positions", data]
    [(status, alone, error)] = run(1, *options)
    assert status == 0, error
    (status, printed, error), _ = run(2, *options, "--per-text", out)
    assert status == 0, error
    lines = out.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["group"] for line in lines[1:]] == [str(i % 3) for i in range(400)]
    out.write_bytes(b"".join(lines[:200]) + lines[200][:50])
    (status, resumed, error), _ = run(2, *options, "--per-text", out, "--resume")
    assert status == 0, error
    whole, *others = map(json.loads, (alone, printed, resumed))
    assert list(whole["groups"]) == ["0", "1", "2"]
    for found in others:
        assert flat(found) == pytest.approx(flat(whole), rel=1e-5, nan_ok=True)


def test_a_comparison_is_shared_out_and_resumed(tmp_path):
    """The model in bfloat16 against itself as stored: with a saved base; resumed behind half of the
    file, with both in memory; and alone."""
    data, out, base = tmp_path / "data.jsonl", tmp_path / "out.jsonl", tmp_path / "base"
    texts = [f"The number {i} is in the list. {'Return it. ' * (i % 7)}" for i in range(400)]
    write_texts(data, texts)
    Perplexity().save_base(texts, base, model_id=TINY)
    options = ["--json", "--dtype", "bfloat16", data]
    (status, printed, error), _ = run(2, *options, "--base", base, "--per-text", out)
    assert status == 0, error
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(texts) + 1
    out.write_bytes(b"".join(lines[:200]) + lines[200][:50])
    resume = ["--base", TINY, "--per-text", out, "--resume"]
    (status, resumed, error), _ = run(2, *options, *resume)
    assert status == 0, error
    whole = Perplexity().compare(
        texts, base_id=TINY, model_id=TINY, model_kwargs={"dtype": "bfloat16"}
    )
    found, again = map(json.loads, (printed, resumed))
    assert whole["mean_kl"] > 1e-6
    # bfloat16 rounds otherwise in batches of another shape.
    for result in (found, again):
        assert set(result) == set(whole)
        for name in ("perplexity", "base_perplexity", "perplexity_ratio", "num_tokens"):
            assert result[name] == pytest.approx(whole[name], rel=1e-3)
        for name in ("mean_kl", "kl_p99", "rms_delta_p"):
            assert result[name] == pytest.approx(whole[name], rel=0.1)
        assert result["signature"] == whole["signature"]
