"""evaluate's own protocols: several processes, memory, combine, pickling; and no stray files."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import dill
import evaluate
import pytest
from support import ROOT, SCRIPT, load, random_batch
from workers import pair as pair_worker

SPLITS = {"uneven": 3, "one process has nothing": 6}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(what each of two processes answers in each case, its folder); started once for all."""
    logits, targets = random_batch(batch=6)
    cases = {"nothing at all": ([[], []], str(tmp_path_factory.mktemp("pair")), {})}
    for case, split in SPLITS.items():
        halves = [(logits[:split], targets[:split]), (logits[split:], targets[split:])]
        parts = [[(x.tolist(), y.tolist())] if len(x) else [] for x, y in halves]
        cases[case] = (parts, str(tmp_path_factory.mktemp("pair")), {"mask_token_id": 2})
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=pair_worker.work, args=(i, cases, queue)) for i in (0, 1)]
    for process in processes:
        process.start()
    answers = dict(queue.get(timeout=180) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    return {
        case: ([answers[i][case] for i in (0, 1)], Path(folder))
        for case, (_, folder, _) in cases.items()
    }


@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_on_one_file_system(pair, split):
    logits, targets = random_batch(batch=6)
    ((merged, _), other), folder = pair[split]
    expected = load(mask_token_id=2).compute(predictions=logits, references=targets)
    assert merged.keys() == expected.keys()
    assert merged.pop("signature") == expected.pop("signature")
    assert merged == pytest.approx(expected, rel=1e-9)
    assert type(merged["num_tokens"]) is int
    assert other == (None, 0)
    assert not list(folder.rglob("*.arrow"))


def test_two_processes_that_add_nothing(pair):
    ((answer, _), _), _ = pair["nothing at all"]
    assert answer.startswith("Nothing to compute")


def test_keep_in_memory():
    logits, targets = random_batch()
    result = load(keep_in_memory=True).compute(predictions=logits, references=targets)
    assert result == load().compute(predictions=logits, references=targets)


def test_a_single_process_writes_no_file(tmp_path):
    ppl = load(cache_dir=str(tmp_path))
    logits, targets = random_batch()
    ppl.add_batch(predictions=logits, references=targets)
    ppl.compute()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_combine():
    logits, targets = random_batch()
    combined = evaluate.combine({"raw": load(), "shifted": load(shift=True)}, force_prefix=True)
    combined.add_batch(predictions=logits, references=targets)
    result = combined.compute()
    for name, options in (("raw", {}), ("shifted", {"shift": True})):
        alone = load(**options).compute(predictions=logits, references=targets)
        assert result[f"{name}_perplexity"] == alone["perplexity"]
    assert combined.compute(predictions=logits, references=targets) == result


@pytest.mark.parametrize("pickler", [pickle, dill], ids=lambda module: module.__name__)
@pytest.mark.parametrize("moment", ["fresh", "pending", "after compute"])
def test_pickling_at_any_moment_keeps_what_was_accumulated(pickler, moment):
    logits, targets = random_batch()
    ppl = load(shift=True)
    if moment == "after compute":
        ppl.compute(predictions=logits, references=targets)
    if moment == "pending":
        ppl.add_batch(predictions=logits, references=targets)
    copy = pickler.loads(pickler.dumps(ppl))
    assert len(copy) == len(ppl)
    for metric in (ppl, copy):
        metric.add_batch(predictions=2 * logits, references=targets)
    assert copy.compute() == ppl.compute()


MAP_PROGRAM = """
import os, sys
import datasets, evaluate, numpy as np, torch

torch.rand(1000, 1000).exp()  # starts torch's threads, which a fork does not take along
data = datasets.Dataset.from_dict({"x": [[[[float(i), 1.0, 2.0]]] for i in range(4)]})
ppl = evaluate.load(sys.argv[1])
ppl.add_batch(predictions=torch.zeros(1, 1, 3), references=[[0]])

def score(row):
    logits = np.tile(np.array(row["x"]), (40, 50, 1000))  # enough for several threads
    value = ppl(predictions=logits, references=np.zeros((40, 50), int))
    return {"perplexity": value, "pending": len(ppl), "process": os.getpid()}

scored = data.map(score, num_proc=2)
assert len(set(scored["process"])) == 2
assert scored["pending"] == [41, 81, 41, 81], scored["pending"]
for row in data:
    ppl.reset()
    assert score(row)["perplexity"] == scored["perplexity"][int(row["x"][0][0][0])]
"""


def test_inside_datasets_map_with_two_processes():
    """In a process group of its own, because what goes wrong after a fork hangs."""
    command = [sys.executable, "-c", MAP_PROGRAM, SCRIPT]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_progress_follows_the_switches_of_evaluate_and_datasets(capsys):
    ppl, texts = load(), {"predictions": ["The cat sat."], "model_id": str(ROOT / "tiny_model")}
    ppl.compute(**texts)  # which loads the model
    assert "tok/s" in capsys.readouterr().err
    for switch in (evaluate.utils.logging, datasets):
        disable = getattr(switch, "disable_progress_bar", None) or switch.disable_progress_bars
        enable = getattr(switch, "enable_progress_bar", None) or switch.enable_progress_bars
        disable()
        try:
            ppl.compute(**texts)
        finally:
            enable()
        assert capsys.readouterr().err == ""
