"""What a Trainer reports with the hooks is the corpus perplexity, in every setting."""

import json
import math
import pickle
import runpy
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from support import ROOT, environments, random_batch, reference_nll, reference_perplexity
from torch.utils.data import DataLoader, IterableDataset
from workers import rank as rank_worker

from ppleval import Perplexity

WORKER = ROOT / "tests" / "workers" / "trainer.py"
worker = SimpleNamespace(**runpy.run_path(str(WORKER)))
SETTINGS = worker.SETTINGS
# But for that of random logits, which are worse than guessing.
no_warnings = pytest.mark.filterwarnings(
    "error", "ignore:The perplexity of .* is above the size of the vocabulary:UserWarning"
)
CASES = [(setting, model) for setting, (models, *_) in SETTINGS.items() for model in models]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """{number of processes: what the worker measured}: one start for all settings, both at once."""
    directory = tmp_path_factory.mktemp("trainer")

    def run(num_processes):
        out = directory / f"{num_processes}.json"
        finished = rank_worker.finish([WORKER, out], environments(num_processes), timeout=600)
        assert [status for status, _, _ in finished] == [0] * num_processes, finished
        return num_processes, json.loads(out.read_text())

    with ThreadPoolExecutor() as pool:
        return dict(pool.map(run, (1, 2)))


@pytest.fixture(scope="session", params=[1, 2], ids=["one process", "two processes"])
def evaluations(request, runs):
    return runs[request.param]


@pytest.mark.parametrize(("setting", "model"), CASES, ids=lambda value: str(value))
def test_trainer_reports_the_corpus_perplexity(evaluations, setting, model):
    by_batch_size = evaluations[setting][model]
    assert set(by_batch_size) == {"1", "5"}
    for batch_size, pairs in by_batch_size.items():
        assert len(pairs) >= 2
        for value, expected in pairs:
            assert value == pytest.approx(expected, rel=2e-5), batch_size


def hooks(**options):
    found = Perplexity().trainer_hooks(**options)
    assert set(found) == {"preprocess_logits_for_metrics", "compute_metrics"}
    return found["preprocess_logits_for_metrics"], found["compute_metrics"]


def as_prediction(predictions):
    return SimpleNamespace(predictions=predictions, label_ids=None)


def test_a_batch_becomes_a_few_sums_for_each_row():
    logits, labels = random_batch(batch=3, length=5)
    labels[1, 2:] = -100
    preprocess, compute_metrics = hooks(shift=False)
    rows = preprocess(logits, labels)
    assert rows.shape == (3, 7)
    assert rows.dtype == torch.float64
    assert rows[:, 1].tolist() == [5, 2, 5]
    nll = reference_nll(logits, labels.clamp(min=0)) * (labels != -100)
    assert rows[:, 0].tolist() == pytest.approx(nll.sum(1).tolist())
    result = compute_metrics(as_prediction(rows.numpy()))
    expected = Perplexity().compute(predictions=logits, references=labels)
    assert result == {name: value for name, value in expected.items() if name != "signature"}
    assert all(isinstance(value, (int, float)) for value in result.values())


def test_the_shift_is_the_default():
    logits, labels = random_batch()
    preprocess, compute_metrics = hooks()
    result = compute_metrics(as_prediction(preprocess(logits, labels).numpy()))
    expected = reference_perplexity(logits[:, :-1], labels[:, 1:])
    assert result["perplexity"] == pytest.approx(expected)


def test_options_of_the_metric_and_of_the_call_hold():
    logits, labels = random_batch()
    preprocess, _ = Perplexity(ignore_index=3).trainer_hooks(mask_token_id=4, shift=False).values()
    scored = (labels != 3) & (labels != 4)
    assert (preprocess(logits, labels)[:, 1] == scored.sum(1)).all()
    with pytest.raises(TypeError, match="unknown argument 'shfit'"):
        Perplexity().trainer_hooks(shfit=True)


def test_what_trainer_pads_with_is_never_scored():
    """Trainer fills labels and logits up with -100, whatever the user does not score."""
    logits, labels = random_batch(batch=2, length=6)
    labels[0, 4:] = -100
    logits[0, 4:] = -100
    preprocess, _ = hooks(shift=False, ignore_index=None)
    assert preprocess(logits, labels)[:, 1].tolist() == [4, 6]


def test_logits_are_found_among_the_outputs():
    logits, labels = random_batch()
    preprocess, _ = hooks()
    expected = preprocess(logits, labels)
    for outputs in ((logits, (logits[..., :2],)), (torch.tensor(0.1), logits), [logits]):
        assert torch.equal(preprocess(outputs, labels), expected)
    assert torch.equal(preprocess(logits, (labels, labels[:, 0])), expected)


def test_logits_are_told_from_other_states_of_their_shape():
    """By the labels that these are too narrow for, in one batch of an evaluation."""
    logits, labels = random_batch(vocab_size=11)
    low = labels.clamp(max=3)
    narrow = logits[..., :5].clone()
    preprocess, _ = hooks()
    expected = preprocess(logits, labels), preprocess(logits, low)
    for outputs in ((narrow, logits), (logits, narrow)):
        preprocess, _ = hooks()
        assert torch.equal(preprocess(outputs, labels), expected[0])
        assert torch.equal(preprocess(outputs, low), expected[1])
    # Encoder states of another length than the labels tell it, too.
    preprocess, _ = hooks()
    preprocess((logits, narrow[:, :-1]), low)
    assert torch.equal(preprocess((logits, narrow), low), expected[1])
    assert not preprocess((logits, narrow), labels.clone().fill_(-100)).any()


@pytest.mark.parametrize("width", [11, 16])
def test_several_outputs_that_may_be_logits(width):
    logits, labels = random_batch(vocab_size=11)
    hidden = random_batch(vocab_size=width, seed=1)[0]
    preprocess, _ = hooks()
    shapes = rf"\(3, 7, {width}\) and \(3, 7, 11\) may all be the logits"
    with pytest.raises(ValueError, match=shapes) as error:
        preprocess((hidden, logits), labels)
    assert "model.config.keys_to_ignore_at_inference" in str(error.value)


def test_sums_of_batches_start_afresh_after_the_last():
    logits, labels = random_batch(batch=4)
    preprocess, compute_metrics = hooks(shift=False)
    for _ in range(2):
        for part in (slice(0, 3), slice(3, 4)):
            rows = preprocess(logits[part], labels[part])
            result = compute_metrics(as_prediction(rows), compute_result=part.stop == 4)
        assert result["perplexity"] == pytest.approx(reference_perplexity(logits, labels))
        assert result["num_sequences"] == 4


def test_sums_of_an_evaluation_that_broke_do_not_stay():
    logits, labels = random_batch(vocab_size=11)
    preprocess, compute_metrics = hooks(shift=False)
    assert compute_metrics(as_prediction(preprocess(logits, labels)), compute_result=False) == {}
    with pytest.raises(ValueError, match=r"references\[0, 0\] is 11"):
        preprocess(logits, labels.clone().fill_(11))
    result = compute_metrics(as_prediction(preprocess(logits, labels)))
    assert result["num_sequences"] == len(labels)


def test_two_sets_of_hooks_and_the_metric_do_not_share_sums():
    logits, labels = random_batch()
    ppl = Perplexity(shift=True)
    first, second = ppl.trainer_hooks(), ppl.trainer_hooks()
    rows = first["preprocess_logits_for_metrics"](logits, labels)
    first["compute_metrics"](as_prediction(rows), compute_result=False)
    assert second["compute_metrics"](as_prediction(rows))["num_sequences"] == len(labels)
    assert len(ppl) == 0


def test_hooks_are_pickled():
    """As a search for hyperparameters on several processes does."""
    logits, labels = random_batch()
    found = Perplexity().trainer_hooks()
    preprocess, compute_metrics = pickle.loads(pickle.dumps(found)).values()
    rows = preprocess(logits, labels)
    assert torch.equal(rows, found["preprocess_logits_for_metrics"](logits, labels))
    assert compute_metrics(as_prediction(rows))["num_sequences"] == len(labels)


def test_nothing_scored_is_nan_and_a_warning():
    logits, labels = random_batch()
    preprocess, compute_metrics = hooks()
    rows = preprocess(logits, labels.fill_(-100))
    with pytest.warns(UserWarning, match="No token was scored"):
        result = compute_metrics(as_prediction(rows))
    assert math.isnan(result["perplexity"])
    assert result["num_tokens"] == 0


def test_a_perplexity_above_the_vocabulary_is_told_of_once():
    logits, labels = random_batch()
    logits *= 9
    preprocess, compute_metrics = hooks(shift=False)
    message = "The perplexity of .* is above the size of the vocabulary, 11: worse than guessing"
    with pytest.warns(UserWarning, match=message) as told:
        for _ in range(2):  # a Trainer evaluates again and again
            result = compute_metrics(as_prediction(preprocess(logits, labels)))
    assert len(told) == 1
    assert result["perplexity"] > 11


def test_nan_is_kept_and_its_example_named():
    logits, labels = random_batch(batch=4)
    logits[2, 1] = math.nan
    preprocess, compute_metrics = hooks(shift=False)
    parts = [as_prediction(preprocess(logits[i : i + 1], labels[i : i + 1])) for i in range(4)]
    compute_metrics(parts[0], compute_result=False)
    compute_metrics(parts[1], compute_result=False)
    with pytest.warns(UserWarning, match="example 2 hold NaN"):
        compute_metrics(parts[2], compute_result=False)
    assert math.isnan(compute_metrics(parts[3])["perplexity"])


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        ((), "which are none"),
        (torch.zeros(3, 7, dtype=torch.int64), r"\(3, 7\) torch.int64"),
        ((torch.tensor(1.0), None), r"\(\) torch.float32, NoneType"),
    ],
    ids=["nothing", "generated ids", "a loss"],
)
def test_an_evaluation_without_logits_says_what_to_set(outputs, found):
    preprocess, _ = hooks()
    labels = torch.zeros(3, 7, dtype=torch.int64)
    with pytest.raises(ValueError, match=found) as error:
        preprocess(outputs, labels)
    for name in ('loss_type="nll"', "predict_with_generate", "prediction_loss_only"):
        assert name in str(error.value)


def test_labels_are_missing_or_do_not_fit():
    logits, labels = random_batch(batch=3, length=7)
    preprocess, _ = hooks()
    with pytest.raises(ValueError, match="evaluation set has no labels"):
        preprocess(logits, None)
    with pytest.raises(ValueError, match=r"shape \(3, 7, 11\), the labels \(3, 6\)"):
        preprocess(logits, labels[:, 1:])
    with pytest.raises(TypeError, match="integer token ids") as error:
        preprocess(logits, labels.float())
    assert "references its labels" in error.value.__notes__[0]


@pytest.mark.parametrize(
    "predictions", [np.zeros((3, 7, 11)), None, [np.zeros((3, 7, 11))], np.zeros((3, 4))]
)
def test_compute_metrics_needs_the_other_hook(predictions):
    _, compute_metrics = hooks()
    with pytest.raises(ValueError, match=r"Give Trainer both: Trainer\(\.\.\., \*\*ppl"):
        compute_metrics(as_prediction(predictions))


def last_batch_of(monkeypatch, num_processes, process_index=0, **dataloader):
    """accelerate is at the last batch of such a dataloader, on that process."""
    from accelerate import state

    defaults = {"dataset": [], "total_batch_size": 6}
    values = {
        "end_of_dataloader": True,
        "remainder": 2,
        "active_dataloader": SimpleNamespace(**(defaults | dataloader)),
    }
    for name, value in values.items():
        monkeypatch.setattr(state.GradientState, name, value)
    process = SimpleNamespace(process_index=process_index, num_processes=num_processes)
    monkeypatch.setattr(state, "PartialState", lambda: process)


@pytest.mark.parametrize(("process_index", "kept"), [(0, 2), (1, 0)])
def test_rows_that_fill_up_the_last_batch_do_not_count(monkeypatch, process_index, kept):
    """Seq2SeqTrainer gathers them; here the last batch of 2 x 3 rows holds 2 that are real."""
    logits, labels = random_batch(batch=3)
    preprocess, _ = hooks()
    full = preprocess(logits, labels)
    last_batch_of(monkeypatch, 2, process_index)
    rows = preprocess(logits, labels)
    assert torch.equal(rows[:kept], full[:kept])
    assert (rows[kept:] == 0).all()


@pytest.mark.parametrize("gathered", [2, 4], ids=["Trainer", "Seq2SeqTrainer"])
def test_rows_that_trainer_drops_on_one_process_count(monkeypatch, gathered):
    """As of a collator that makes more rows than examples: here 4 rows of 2 examples."""
    logits, labels = random_batch(batch=4)
    expected = Perplexity(shift=True).compute(predictions=logits, references=labels)
    preprocess, compute_metrics = hooks()
    last_batch_of(monkeypatch, 1)
    result = compute_metrics(as_prediction(preprocess(logits, labels)[:gathered]))
    assert result == {name: pytest.approx(expected[name]) for name in result}
    assert result["num_sequences"] == 4


def in_loop(dataloader, step, function, *args):
    """Call a hook from where Trainer calls it."""

    def evaluation_loop(self, dataloader, step):
        return function(*args)

    return evaluation_loop(SimpleNamespace(model=torch.nn.Module()), dataloader, step)


@pytest.mark.parametrize("gathered", [2, 6], ids=["Trainer", "Seq2SeqTrainer"])
def test_rows_that_trainer_drops_on_several_processes_make_it_nan(monkeypatch, gathered):
    """The dataloader that began last is another one, at its end, with a last batch of 2."""
    logits, labels = random_batch(batch=3)
    preprocess, compute_metrics = hooks()
    last_batch_of(monkeypatch, 2)
    prepared = DataLoader(range(60), batch_size=3)
    prepared.end_of_dataloader, prepared.remainder = False, 0
    rows = in_loop(prepared, 0, preprocess, logits, labels)
    prediction = as_prediction(torch.cat([rows, rows])[:gathered])
    if gathered == 6:
        expected = reference_perplexity(logits[:, :-1], labels[:, 1:])
        result = in_loop(prepared, 0, compute_metrics, prediction)
        assert result["perplexity"] == pytest.approx(expected)
        return
    with pytest.warns(UserWarning, match="passed on 2 of 6 rows .* of accelerate that began last"):
        result = in_loop(prepared, 0, compute_metrics, prediction)
    assert math.isnan(result["perplexity"])
    assert math.isnan(result["perplexity_ci_low"])


@no_warnings
def test_batches_of_an_interrupted_evaluation_are_not_missed():
    """Of a dataloader that was not prepared, where nothing tells one evaluation from the next."""
    logits, labels = random_batch()
    preprocess, compute_metrics = hooks()
    preprocess(logits, labels)
    result = compute_metrics(as_prediction(preprocess(logits, labels)))
    expected = reference_perplexity(logits[:, :-1], labels[:, 1:])
    assert result["perplexity"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("dataloader", "told"),
    [
        (SimpleNamespace(dataset=type("IterableDatasetShard", (), {})()), "dispatch_batches"),
        (None, "accelerator.prepare"),
    ],
    ids=["a stream that each reads", "a dataloader that was not prepared"],
)
def test_examples_that_several_processes_may_count_leave_no_interval(monkeypatch, dataloader, told):
    logits, labels = random_batch(batch=3)
    labels[:, 1:] = logits[:, :-1].argmax(-1)  # no worse than guessing
    preprocess, compute_metrics = hooks()
    last_batch_of(monkeypatch, 2)
    monkeypatch.setattr("accelerate.state.GradientState.remainder", -1)
    monkeypatch.setattr("accelerate.state.GradientState.active_dataloader", dataloader)
    if dataloader is None:
        monkeypatch.setattr("accelerate.state.GradientState.end_of_dataloader", False)
    rows = preprocess(logits, labels)
    with pytest.warns(UserWarning, match=told) as told_of:
        result = compute_metrics(as_prediction(rows))
    assert len(told_of) == 1
    expected = reference_perplexity(logits[:, :-1], labels[:, 1:])
    assert result["perplexity"] == pytest.approx(expected)
    assert math.isnan(result["perplexity_ci_low"])
    assert math.isnan(result["perplexity_ci_high"])


@pytest.mark.parametrize(
    ("num_examples", "remainder", "process_index", "kept"),
    [(4, 4, 0, 3), (4, 2, 1, 0), (4, 2, 0, None), (4, 7, 1, None), (2, 3, 0, None)],
    ids=["none repeated", "all repeated", "some repeated", "some on the last", "more rows"],
)
def test_rows_that_are_no_examples(monkeypatch, num_examples, remainder, process_index, kept):
    """A batch of 3 rows: which are repeated is known of all or none, else the answer is NaN."""
    logits, labels = random_batch(batch=3)
    preprocess, compute_metrics = hooks()
    full = preprocess(logits, labels)
    last_batch_of(monkeypatch, 2, process_index, total_batch_size=2 * num_examples)
    monkeypatch.setattr("accelerate.state.GradientState.remainder", remainder)
    rows = preprocess(logits, labels)
    if kept is not None:
        full[kept:] = 0
        assert torch.equal(rows, full)
        return
    with pytest.warns(UserWarning, match="per_device_eval_batch_size=1"):
        result = compute_metrics(as_prediction(torch.cat([full, rows])))
    assert math.isnan(result["perplexity"])


def flattened(
    monkeypatch,
    dataset,
    batch_size=3,
    sampler=torch.utils.data.SequentialSampler,
    collator=None,
    **gradient_state,
):
    """Logits and labels of 3 documents in one row, and accelerate at their batch."""
    from accelerate.state import GradientState
    from transformers import DataCollatorWithFlattening

    logits, labels = random_batch(batch=1, length=12)
    labels[0, [0, 3, 8]] = -100
    dataloader = SimpleNamespace(
        collate_fn=collator or DataCollatorWithFlattening(),
        dataset=dataset,
        total_batch_size=batch_size,
        end_of_dataloader=len(dataset) <= batch_size,
        remainder=-1,
        batch_sampler=torch.utils.data.BatchSampler(sampler(dataset), batch_size, False),
    )
    monkeypatch.setattr(GradientState, "active_dataloader", dataloader)
    for name, value in gradient_state.items():
        monkeypatch.setattr(GradientState, name, value)
    return logits, labels


def examples(*lengths):
    return [{"input_ids": [1] * length} for length in lengths]


class ReadByBatch:
    """A dataset that has no other way to be read than the one that a DataLoader prefers."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, indices):
        return [self.rows[i] for i in indices]


class ReadOnce(ReadByBatch):
    def __getitems__(self, indices):
        raise RuntimeError("The file is closed.")


def packed(*lengths, seq_lengths):
    return [{**example, "seq_lengths": seq_lengths} for example in examples(*lengths)]


PADDING_FREE = SimpleNamespace(padding_free=True)


@pytest.mark.parametrize(
    ("dataset", "collator"),
    [
        (examples(3, 5, 4), None),
        (packed(12, seq_lengths=[3, 5, 4]), PADDING_FREE),
        (packed(3, 5, 4, seq_lengths=[9]), None),
        (ReadByBatch(examples(3, 5, 4)), None),
    ],
    ids=["one each", "packed", "a column of that name", "read by batch"],
)
def test_each_document_of_a_row_is_a_sequence(monkeypatch, dataset, collator):
    logits, labels = flattened(monkeypatch, dataset, collator=collator)
    preprocess, compute_metrics = hooks()
    result = compute_metrics(as_prediction(preprocess(logits, labels)))
    ppl = Perplexity(shift=True)
    for part in (slice(0, 3), slice(3, 8), slice(8, 12)):
        ppl.add_batch(predictions=logits[:, part], references=labels[:, part])
    expected = ppl.compute()
    assert result == {name: pytest.approx(expected[name]) for name in result}
    assert result["num_sequences"] == 3


@pytest.mark.parametrize(
    "dataset",
    [
        ReadOnce(examples(3, 5, 4)),
        packed(12, seq_lengths="three"),
        packed(12, seq_lengths=None),
        packed(12, seq_lengths=12),
        packed(12, seq_lengths=[3.0, 9.0]),
        packed(12, seq_lengths=[[3, 5], [4]]),
    ],
    ids=["cannot be read twice", "a string", "none", "a number", "floats", "lists"],
)
def test_documents_that_cannot_be_read_stop_no_evaluation(monkeypatch, dataset):
    logits, labels = flattened(monkeypatch, dataset, collator=PADDING_FREE)
    preprocess, compute_metrics = hooks()
    with pytest.warns(UserWarning, match="several documents, and where each begins is not known"):
        result = compute_metrics(as_prediction(preprocess(logits, labels)))
    assert result["perplexity"] > 0
    assert math.isnan(result["perplexity_ci_low"])


@pytest.mark.parametrize(
    ("dataset", "sampler"),
    [
        (examples(3, 4, 5), torch.utils.data.SequentialSampler),
        (examples(3, 5, 9), torch.utils.data.SequentialSampler),
        (examples(3, 5), torch.utils.data.SequentialSampler),
        ([{"text": "one"}] * 3, torch.utils.data.SequentialSampler),
        (["one"] * 3, torch.utils.data.SequentialSampler),
        (examples(3, 5, 4), torch.utils.data.RandomSampler),
    ],
    ids=["other lengths", "too long", "too short", "no ids", "no columns", "other order"],
)
def test_documents_that_are_not_known_leave_no_interval(monkeypatch, dataset, sampler):
    logits, labels = flattened(monkeypatch, dataset, sampler=sampler)
    preprocess, compute_metrics = hooks()
    with pytest.warns(UserWarning, match="several documents, and where each begins is not known"):
        result = compute_metrics(as_prediction(preprocess(logits, labels)))
    expected = reference_perplexity(logits[:, :-1], labels[:, 1:], labels[:, 1:] != -100)
    assert result["perplexity"] == pytest.approx(expected)
    assert math.isnan(result["perplexity_ci_low"])
    assert math.isnan(result["perplexity_ci_high"])


def ends(monkeypatch, dataset, batch_size, **arguments):
    """As `flattened`, at the last batch, with a collator of no class that is known."""
    collator = lambda examples: examples  # noqa: E731
    arguments = {"collator": collator, "end_of_dataloader": True} | arguments
    return flattened(monkeypatch, dataset, batch_size, **arguments)


def test_documents_are_told_by_the_number_of_examples(monkeypatch):
    """Of which the last batch has fewer, whatever the class of the collator."""
    ends(monkeypatch, examples(3, 5, 4, 2, 6), batch_size=3, end_of_dataloader=False)
    logits, labels = random_batch(batch=1, length=12)
    labels[0, [0, 3, 8]] = -100
    preprocess, compute_metrics = hooks()
    rows = preprocess(logits, labels)
    monkeypatch.setattr("accelerate.state.GradientState.end_of_dataloader", True)
    labels[0, [2, 8]] = -100
    rows = torch.cat([rows, preprocess(logits[:, :8], labels[:, :8])])
    result = compute_metrics(as_prediction(rows))
    assert result["num_sequences"] == 5
    assert result["perplexity_ci_low"] > 0


def test_examples_in_fewer_rows_leave_no_interval(monkeypatch):
    """Four examples in two rows: where they begin is not read."""
    ends(monkeypatch, examples(3, 4, 5, 2), batch_size=4, end_of_dataloader=False)
    logits, labels = random_batch(batch=2, length=7)
    preprocess, compute_metrics = hooks()
    with pytest.warns(UserWarning, match="several documents, and where each begins is not known"):
        result = compute_metrics(as_prediction(preprocess(logits, labels)))
    expected = reference_perplexity(logits[:, :-1], labels[:, 1:])
    assert result["perplexity"] == pytest.approx(expected)
    assert math.isnan(result["perplexity_ci_low"])


@no_warnings
def test_the_last_batch_has_fewer_examples(monkeypatch):
    ends(monkeypatch, examples(3, 4, 5, 2), batch_size=3, end_of_dataloader=False)
    logits, labels = random_batch(batch=3)
    preprocess, compute_metrics = hooks()
    rows = preprocess(logits, labels)
    monkeypatch.setattr("accelerate.state.GradientState.end_of_dataloader", True)
    rows = torch.cat([rows, preprocess(logits[:1], labels[:1])])
    assert compute_metrics(as_prediction(rows))["perplexity_ci_low"] > 0


class Stream:
    """Reads its examples in an order, and has no length, like torch's own sampler of streams."""

    def __init__(self, dataset):
        pass


@no_warnings
@pytest.mark.parametrize("sampler", [Stream, torch.utils.data.RandomSampler])
@pytest.mark.parametrize("end_of_dataloader", [False, True])
def test_one_example_in_a_batch_is_one_document(monkeypatch, sampler, end_of_dataloader):
    flattened(monkeypatch, examples(7), 1, sampler, end_of_dataloader=end_of_dataloader)
    logits, labels = random_batch(batch=2)
    preprocess, compute_metrics = hooks()
    rows = [preprocess(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    result = compute_metrics(as_prediction(torch.cat(rows)))
    expected = Perplexity(shift=True).compute(predictions=logits, references=labels)
    assert result == {name: pytest.approx(expected[name]) for name in result}


@pytest.mark.parametrize("collator", [None, PADDING_FREE], ids=["flattening", "padding-free"])
def test_a_row_of_a_stream_may_hold_several_documents(monkeypatch, collator):
    """At its end, the number of examples is not known; of packing it says nothing."""
    batch_size = 1 if collator is PADDING_FREE else 4
    logits, labels = ends(monkeypatch, examples(12), batch_size, sampler=Stream, collator=collator)
    preprocess, compute_metrics = hooks()
    with pytest.warns(UserWarning, match="several documents, and where each begins is not known"):
        compute_metrics(as_prediction(preprocess(logits, labels)))


def in_groups(monkeypatch, groups, **arguments):
    """Result, logits and labels of 4 examples; of their batches the second arrives first."""
    ends(monkeypatch, examples(7, 7, 7, 7), 3, **({"end_of_dataloader": False} | arguments))
    logits, labels = random_batch(batch=4)
    preprocess, compute_metrics = hooks(groups=groups)
    rows = [preprocess(logits[:3], labels[:3])]
    monkeypatch.setattr("accelerate.state.GradientState.end_of_dataloader", True)
    rows += [preprocess(logits[3:], labels[3:])]
    compute_metrics(as_prediction(rows[1]), compute_result=False)
    return compute_metrics(as_prediction(rows[0])), logits, labels


@no_warnings
def test_groups_are_flat_numbers(monkeypatch):
    """Which a Trainer can log; a whole number is a name, too."""
    groups = ["law", 7, "law", 7]
    result, logits, labels = in_groups(monkeypatch, groups)
    expected = Perplexity(shift=True).compute(predictions=logits, references=labels, groups=groups)
    for name, group in expected.pop("groups").items():
        expected[f"perplexity_{name}"] = group["perplexity"]
        expected[f"mean_nll_{name}"] = group["mean_nll"]
    del expected["signature"]
    assert result == pytest.approx(expected)
    assert result.keys() >= {"perplexity_7", "mean_nll_law", "macro_mean_nll", "macro_perplexity"}
    assert all(isinstance(value, (int, float)) for value in result.values())


class ByLength:
    """A batch sampler of the user's own."""


class Backwards(torch.utils.data.SequentialSampler):
    def __iter__(self):
        return reversed(range(len(self.data_source)))


@pytest.mark.parametrize(
    ("names", "arguments", "told"),
    [
        ("abc", {}, "groups has 3 names, and this evaluation set 4 examples"),
        ("abcde", {}, "groups has 5 names, and this evaluation set 4 examples"),
        ("abab", {"sampler": torch.utils.data.RandomSampler}, "RandomSampler may not read"),
        ("abab", {"sampler": Backwards}, "Backwards may not read"),
        ("abab", {"active_dataloader": None}, "accelerate has not prepared"),
        (
            "abab",
            {"active_dataloader": SimpleNamespace(remainder=-1, batch_sampler=ByLength())},
            "ByLength may not read",
        ),
    ],
    ids=["too few", "too many", "other order", "unknown order", "not prepared", "own batches"],
)
def test_groups_of_unknown_examples_are_left_out(monkeypatch, names, arguments, told):
    with pytest.warns(UserWarning, match=f"The result has no groups: .*{told}"):
        result, logits, labels = in_groups(monkeypatch, list(names), **arguments)
    expected = reference_perplexity(logits[:, :-1], labels[:, 1:])
    assert result["perplexity"] == pytest.approx(expected)
    assert len(result) == 7


@pytest.mark.parametrize(
    ("lengths", "collator", "told"),
    [
        ((3, 5, 4), None, "made 1 of 3"),
        ((12,), PADDING_FREE, "packed several documents into one"),
    ],
    ids=["flattened", "packed"],
)
def test_groups_need_a_row_of_each_example(monkeypatch, lengths, collator, told):
    batch_size = len(lengths)
    logits, labels = flattened(monkeypatch, examples(*lengths), batch_size, collator=collator)
    preprocess, compute_metrics = hooks(groups=["a"] * len(lengths))
    with pytest.warns(UserWarning, match=told):
        result = compute_metrics(as_prediction(preprocess(logits, labels)))
    assert "macro_mean_nll" not in result


@pytest.mark.parametrize("gathered", [[0], [0, 1, 1], [1, 1]], ids=["one", "twice", "for another"])
def test_groups_need_each_example_once(monkeypatch, gathered):
    ends(monkeypatch, examples(7, 7), 1, end_of_dataloader=False)
    logits, labels = random_batch(batch=2)
    preprocess, compute_metrics = hooks(groups=["a", "b"])
    rows = [preprocess(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    with pytest.warns(UserWarning, match="has come exactly once"):
        result = compute_metrics(as_prediction([rows[i] for i in gathered]))
    assert "perplexity_a" not in result


@pytest.mark.parametrize("groups", ["law", [None], [["law"]], {"law": 1}, 3])
def test_groups_are_checked_before_the_training(groups):
    with pytest.raises(TypeError, match="groups"):
        hooks(groups=groups)


@pytest.mark.parametrize("name", ["ci_low", "ci_high"])
def test_a_group_replaces_no_number_of_the_whole(name):
    with pytest.raises(ValueError, match=f"rename the group '{name}'"):
        hooks(groups=["law", name])


ROWS = worker.make_rows(shift=True)
OTHER_ROWS = worker.make_rows(shift=True, seed=1)
collate = worker.collate


@pytest.fixture(scope="session")
def gpt2():
    torch.manual_seed(0)
    return worker.gpt2().eval()


@pytest.fixture(scope="session")
def expected(gpt2):
    """Perplexity, interval and number of sequences of ROWS."""
    perplexity = worker.expected_perplexity(gpt2, ROWS, True, 1)
    return pytest.approx(
        {"perplexity": perplexity, **worker.expected_sequences(gpt2, ROWS)}, rel=2e-5
    )


def reported(metrics):
    names = ("perplexity", "num_sequences", "perplexity_ci_low", "perplexity_ci_high")
    return {name: metrics.get(f"eval_{name}") for name in names}


def trainer_of(model, directory, dataloader=None, hooks=None, **arguments):
    """A Trainer that evaluates the 11 ROWS in batches of 4, and trains on 10 in batches of 8.

    Args:
        dataloader: called for that of the evaluation set.
    """
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            str(directory),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            per_device_eval_batch_size=4,
            num_train_epochs=1,
            learning_rate=0.0,
            save_strategy="no",
            **arguments,
        ),
        train_dataset=OTHER_ROWS[:10],
        eval_dataset=ROWS,
        data_collator=collate,
        **(hooks or Perplexity().trainer_hooks()),
    )
    if dataloader is not None:
        trainer.get_eval_dataloader = lambda eval_dataset=None: dataloader()
    return trainer


class Rows(IterableDataset):
    """ROWS as a stream, with a length that is too high."""

    def __iter__(self):
        return iter(ROWS)

    def __len__(self):
        return 2 * len(ROWS)


class OneBatch(DataLoader):
    """Ends before its sampler does."""

    def __iter__(self):
        return iter([next(super().__iter__())])


class Held:
    """Hands on the first batch of a dataloader that it holds."""

    def __init__(self, dataloader):
        self.dataloader = dataloader

    def __iter__(self):
        return iter([next(iter(self.dataloader))])


def plain():
    return DataLoader(ROWS, batch_size=4, collate_fn=collate)


def prepared(rows=ROWS, batch_size=4):
    from accelerate import Accelerator

    dataloader = DataLoader(rows, batch_size=batch_size, collate_fn=collate)
    return Accelerator(cpu=True).prepare(dataloader)


# Ways to read ROWS; None for Trainer's own.
DATALOADERS = {
    "Trainer's": None,
    "plain": plain,
    "a list": lambda: [*plain()],
    "a generator": lambda: (batch for batch in plain()),
    "a stream": lambda: DataLoader(Rows(), batch_size=4, collate_fn=collate),
    "a class": lambda: OneBatch(ROWS + OTHER_ROWS, batch_size=len(ROWS), collate_fn=collate),
    "held": lambda: Held(prepared(ROWS + OTHER_ROWS, len(ROWS))),
}
BY_BATCH = pytest.mark.parametrize("by_batch", [True, False], ids=["by batch", "at once"])


@BY_BATCH
@pytest.mark.parametrize("name", DATALOADERS)
def test_each_dataloader_is_evaluated_to_its_end(gpt2, expected, tmp_path, name, by_batch):
    """By itself, and on the last batch of the training, whose dataloader is then at its end."""
    trainer = trainer_of(
        gpt2, tmp_path, DATALOADERS[name], batch_eval_metrics=by_batch, eval_strategy="epoch"
    )
    assert reported(trainer.evaluate()) == expected
    trainer.train()
    (logged,) = [log for log in trainer.state.log_history if "train_loss" not in log]
    assert reported(logged) == expected


class AtStep(transformers.TrainerCallback):
    """Does something once, after a batch of an evaluation."""

    def __init__(self, step, function):
        self.remaining, self.function = step, function

    def on_prediction_step(self, args, state, control, **kwargs):
        self.remaining -= 1
        if self.remaining == -1:
            self.result = self.function()


@BY_BATCH
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("num_rows", [2, 6], ids=["at its end", "in its middle"])
@pytest.mark.parametrize("name", ["Trainer's", "plain"])
def test_a_peek_at_another_dataloader(gpt2, expected, tmp_path, name, num_rows, step, by_batch):
    trainer = trainer_of(gpt2, tmp_path, DATALOADERS[name], batch_eval_metrics=by_batch)
    other = prepared(OTHER_ROWS[:num_rows])
    batches = iter(other)  # stays where it is
    trainer.add_callback(AtStep(step, lambda: next(batches)))
    assert reported(trainer.evaluate()) == expected


@BY_BATCH
@pytest.mark.parametrize("step", [0, 2])
def test_an_evaluation_inside_of_another(gpt2, expected, tmp_path, step, by_batch):
    trainer = trainer_of(gpt2, tmp_path, batch_eval_metrics=by_batch)
    inner = AtStep(step, lambda: trainer.evaluate(OTHER_ROWS))
    trainer.add_callback(inner)
    assert reported(trainer.evaluate()) == expected
    assert inner.result["eval_perplexity"] == pytest.approx(
        worker.expected_perplexity(gpt2, OTHER_ROWS, True, 1), rel=2e-5
    )


def test_an_evaluation_that_was_interrupted_leaves_nothing(gpt2, expected, tmp_path):
    def stop():
        raise KeyboardInterrupt

    trainer = trainer_of(gpt2, tmp_path, batch_eval_metrics=True)
    trainer.add_callback(AtStep(1, stop))
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    assert reported(trainer.evaluate()) == expected


def test_the_logits_of_a_batch_do_not_stay(gpt2, tmp_path):
    """Python 3.11 and 3.12 copy the variables of a loop that is looked into."""
    found = Perplexity().trainer_hooks()
    preprocess = found["preprocess_logits_for_metrics"]
    seen = []

    def watched(logits, labels):
        seen.append(weakref.ref(logits))
        return preprocess(logits, labels)

    trainer = trainer_of(gpt2, tmp_path, hooks=found | {"preprocess_logits_for_metrics": watched})
    trainer.add_callback(alive := AtStep(1, lambda: [logits() is not None for logits in seen]))
    trainer.evaluate()
    assert alive.result == [False, False]


def test_groups_of_a_plain_dataloader(gpt2, tmp_path):
    """Where no row is dropped its examples are known, as long as one process reads them."""
    names = ["law"] * 4 + ["code"] * 7
    found = Perplexity().trainer_hooks(groups=names)
    trainer = trainer_of(gpt2, tmp_path, plain, found, eval_strategy="epoch")
    law = worker.expected_perplexity(gpt2, ROWS[:4], True, 1)
    assert trainer.evaluate()["eval_perplexity_law"] == pytest.approx(law, rel=2e-5)
    with pytest.warns(UserWarning, match="passes on 2 of 4 rows, as another dataloader"):
        trainer.train()


def bart():
    config = transformers.BartConfig(
        vocab_size=worker.VOCAB_SIZE,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        init_std=0.5,
        decoder_start_token_id=0,
    )
    return transformers.BartForConditionalGeneration(config)


def lora_t5():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(worker.t5(), LoraConfig(target_modules=["q", "v"]))


class WrappedBert(torch.nn.Module):
    """A masked model in a module of the user's own."""

    def __init__(self):
        super().__init__()
        self.inner = worker.bert()

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.inner(input_ids, attention_mask, labels=labels)


MODELS = {
    "GPT-2": (worker.gpt2, True),
    "BERT": (worker.bert, False),
    "a causal BERT": (
        lambda: transformers.BertLMHeadModel(
            transformers.BertConfig(**worker.SMALL, **worker.HEADS, is_decoder=True)
        ),
        True,
    ),
    "T5": (worker.t5, False),
    "BART": (bart, False),
    "BART's decoder": (lambda: transformers.BartForCausalLM(bart().config), True),
    "T5 with LoRA": (lora_t5, False),
    "a module that holds BERT": (WrappedBert, False),
}


@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_decides_about_the_shift(tmp_path, name, given):
    """Unless the user does."""
    make_model, shift = MODELS[name]
    torch.manual_seed(0)
    model = make_model().eval()
    arguments = {} if given is None else {"shift": given}
    trainer = trainer_of(model, tmp_path, hooks=Perplexity().trainer_hooks(**arguments))
    trainer.label_names = ["labels"]
    found = trainer.evaluate()["eval_perplexity"]
    batch = collate(ROWS)
    logits, labels = model(**batch).logits, batch["labels"]
    shift = shift if given is None else given
    expected = Perplexity().compute(predictions=logits, references=labels, shift=shift)[
        "perplexity"
    ]
    assert found == pytest.approx(expected, rel=2e-5)


def test_what_prompt_tuning_is_told_to_do(tmp_path):
    """Longer labels for the hook alone; PEFT itself makes those of the model longer."""
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = get_peft_model(worker.gpt2(), config).eval()
    hooks = Perplexity().trainer_hooks()

    def evaluated():
        trainer = trainer_of(model, tmp_path, hooks=hooks, label_names=["labels"])
        return trainer.evaluate()["eval_perplexity"]

    with pytest.raises(ValueError, match="labels as they are, and the hook gets 5 more") as error:
        evaluated()
    _, told = str(error.value).split("preprocess_logits_for_metrics=")
    names = {"torch": torch, "hook": hooks["preprocess_logits_for_metrics"]}
    hooks["preprocess_logits_for_metrics"] = eval(told.removesuffix(")."), names)
    batch = collate(ROWS)
    labels = torch.nn.functional.pad(batch["labels"], (5, 0), value=-100)
    expected = Perplexity(shift=True).compute(predictions=model(**batch).logits, references=labels)
    assert evaluated() == pytest.approx(expected["perplexity"], rel=2e-5)


def test_hooks_of_two_kinds_of_models(tmp_path):
    """One Trainer's evaluation says nothing of the next one's."""
    torch.manual_seed(0)
    found = Perplexity().trainer_hooks()
    for make_model, shift in (MODELS["T5"], MODELS["GPT-2"], MODELS["T5"]):
        model = make_model().eval()
        result = trainer_of(model, tmp_path, hooks=found).evaluate()
        expected = worker.expected_perplexity(model, ROWS, shift, 1)
        assert result["eval_perplexity"] == pytest.approx(expected, rel=2e-5)


def test_a_shift_that_is_none():
    with pytest.raises(TypeError, match="shift must be True or False"):
        hooks(shift="yes")
