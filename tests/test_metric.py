"""What a user calls: compute, add, add_batch, the call form, reset, merge, options, signature."""

import inspect
import itertools
import json
import math
import sys
import threading
from dataclasses import fields

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, as_objects, random_batch, random_rows, reference_nll, reference_perplexity

from ppleval import Perplexity, __version__
from ppleval.arguments import UNSET
from ppleval.logits import inputs as batches
from ppleval.logits.options import Options
from ppleval.models.loading import BaseSource, ModelSource
from ppleval.texts.options import TextOptions

# --- the seeds ----------------------------------------------------------------------------------


def keras_example():
    """keras_hub's documented example: ids (2, 5) and values (2, 5, 10) that do not sum to 1."""
    rng = np.random.RandomState(42)
    return rng.randint(10, size=[2, 5]), rng.uniform(size=(2, 5, 10))


def torchmetrics_example():
    """torchmetrics' documented example: scores (2, 8, 5), two targets ignored."""
    scores = torch.rand(2, 8, 5, generator=torch.manual_seed(22))
    targets = torch.randint(5, (2, 8), generator=torch.manual_seed(22))
    targets[0, 6:] = -100
    return targets, scores


# Published to 8 digits from a float32 computation, whose last digit is rounding.
KERAS_REL = 2e-7


@pytest.mark.filterwarnings("ignore:With from_logits=False, some rows:UserWarning")
def test_keras_hub_from_probabilities(ppl):
    targets, values = keras_example()
    result = ppl.compute(predictions=values, references=targets, from_logits=False)
    assert result["perplexity"] == pytest.approx(14.352535, rel=KERAS_REL)


def test_keras_hub_from_logits(ppl):
    targets, values = keras_example()
    result = ppl.compute(predictions=values, references=targets)
    assert result["perplexity"] == pytest.approx(10.655224, rel=KERAS_REL)


@pytest.mark.filterwarnings("ignore:With from_logits=False, some rows:UserWarning")
def test_keras_hub_mask_equals_weights_and_merges():
    """The document shows 14.352535 for all of them, because id 0 does not occur; 4 does."""
    targets, values = keras_example()
    masked = Perplexity(from_logits=False, mask_token_id=4)
    masked.add_batch(predictions=values, references=targets)
    weighted = Perplexity(from_logits=False)
    weights = (targets != 4).astype("float32")
    weighted.add_batch(predictions=values, references=targets, sample_weight=weights)
    p = values / values.sum(-1, keepdims=True)
    nll = -np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0])
    expected = np.exp(nll[targets != 4].mean())
    assert 0 < (targets == 4).sum() < targets.size
    assert masked.compute()["perplexity"] == pytest.approx(expected)
    assert weighted.compute()["perplexity"] == pytest.approx(expected)
    result = Perplexity(from_logits=False, mask_token_id=0).compute(
        predictions=values, references=targets
    )
    assert result["perplexity"] == pytest.approx(14.352535, rel=KERAS_REL)


@pytest.mark.parametrize("form", ["scores", "log-probabilities"])
def test_torchmetrics_example(ppl, form):
    targets, scores = torchmetrics_example()
    if form == "log-probabilities":
        scores = scores.log_softmax(-1)
    assert round(ppl(predictions=scores, references=targets), 4) == 5.2545
    result = ppl.compute()
    assert round(result["perplexity"], 4) == 5.2545
    assert result["num_tokens"] == 14


def test_torchmetrics_example_in_batches_merged_and_reset():
    targets, scores = torchmetrics_example()
    first, second = Perplexity(), Perplexity()
    first.add_batch(predictions=2 * scores, references=targets)
    first.reset()
    first.add_batch(predictions=scores[:1], references=targets[:1])
    second.add_batch(predictions=scores[1:], references=targets[1:])
    first.merge(second)
    assert round(first.compute()["perplexity"], 4) == 5.2545
    assert len(second) == 1  # merge leaves the other as it was


# --- the result ---------------------------------------------------------------------------------


def test_result_is_flat_and_plain(ppl):
    logits, targets = random_batch()
    result = ppl.compute(predictions=logits, references=targets)
    assert {name: type(value) for name, value in result.items()} == {
        "perplexity": float,
        "mean_nll": float,
        "bits_per_token": float,
        "perplexity_ci_low": float,
        "perplexity_ci_high": float,
        "num_tokens": int,
        "num_sequences": int,
        "signature": str,
    }
    nll = reference_nll(logits, targets)
    mean = nll.mean().item()
    assert result["mean_nll"] == pytest.approx(mean, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    assert result["bits_per_token"] == pytest.approx(mean / math.log(2), rel=1e-6)
    residuals = nll.sum(1) - mean * 7
    # Student's t of three equal sequences, with 2 degrees of freedom.
    margin = 4.30265273 * math.sqrt(3 / 2 * (residuals**2).sum()) / 21
    assert result["perplexity_ci_low"] == pytest.approx(math.exp(mean - margin), rel=1e-6)
    assert result["perplexity_ci_high"] == pytest.approx(math.exp(mean + margin), rel=1e-6)
    assert (result["num_tokens"], result["num_sequences"]) == (21, 3)


def test_signature_names_every_setting():
    ppl = Perplexity(ignore_index=[5, -100, 5], mask_token_id=0, shift=True, dtype="float64")
    logits, targets = random_batch()
    result = ppl.compute(predictions=logits, references=targets)
    assert result["signature"] == (
        "from_logits:yes|ignore_index:-100,5|mask_token_id:0|shift:yes|dtype:float64|backend:auto|"
        f"version:{__version__}"
    )


def test_the_signature_names_the_dtype_that_reduced(ppl):
    """Logits in float64 take float64, whatever the option."""
    logits, targets = random_batch()
    for dtypes, expected in (
        (["float32"], "float32"),
        (["bfloat16", "float16"], "float32"),
        (["float64"], "float64"),
        (["float64", "float32"], "float32,float64"),
    ):
        for dtype in dtypes:
            batch = torch.as_tensor(logits).to(getattr(torch, dtype))
            ppl.add_batch(predictions=batch, references=targets)
        assert f"|dtype:{expected}|" in ppl.compute()["signature"]
    lists = [torch.zeros(2, 3, dtype=getattr(torch, name)) for name in ("float64", "float32")]
    result = ppl.compute(predictions=lists, references=[[0, 1], [2, 0]])
    assert "|dtype:float32,float64|" in result["signature"]


def test_the_changelog_is_headed_by_the_version():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if line.startswith("## ")).split()[1] == __version__


def test_result_can_be_saved(ppl, tmp_path):
    logits, targets = random_batch(batch=1)  # its interval is NaN
    result = ppl.compute(predictions=logits, references=targets)
    saved = json.loads(evaluate.save(tmp_path / "result.json", **result).read_text())
    assert saved["perplexity"] == result["perplexity"]
    assert math.isnan(saved["perplexity_ci_low"])


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["load", "compute"])
@pytest.mark.parametrize(
    "options",
    [
        {"ignore_index": 3},
        {"ignore_index": (3, 4)},
        {"ignore_index": None},
        {"mask_token_id": 3},
        {"mask_token_id": np.int64(3), "ignore_index": [4]},
        {"shift": True},
        {"shift": True, "mask_token_id": 3},
        {"dtype": "float64"},
    ],
)
def test_options_at_load_and_at_compute(options, way):
    logits, targets = random_batch(batch=5)
    if way == "load":
        result = Perplexity(**options).compute(predictions=logits, references=targets)
    else:
        ppl = Perplexity()
        result = ppl.compute(predictions=logits, references=targets, **options)
        # They hold for this call alone.
        after = ppl.compute(predictions=logits, references=targets)
        assert after == Perplexity().compute(predictions=logits, references=targets)
    if options.get("shift"):
        logits, targets = logits[:, :-1], targets[:, 1:]
    unscored = np.atleast_1d([] if options.get("ignore_index") is None else options["ignore_index"])
    unscored = {*unscored.tolist(), options.get("mask_token_id")}
    weights = np.array([[id_ not in unscored for id_ in row] for row in targets.tolist()], float)
    assert result["perplexity"] == pytest.approx(
        reference_perplexity(logits, targets, weights), rel=1e-6
    )
    assert result["num_tokens"] == weights.sum()


@pytest.mark.parametrize("options", [{"shift": False}, {"ignore_index": -100}])
def test_an_option_of_a_call_counts_also_where_it_is_the_default(options):
    logits, targets = random_batch()
    ppl = Perplexity(shift=True, ignore_index=3, dtype="float64")
    result = ppl.compute(predictions=logits, references=targets, **options)
    expected = Perplexity(**{"shift": True, "ignore_index": 3, "dtype": "float64"} | options)
    assert result == expected.compute(predictions=logits, references=targets)


# The dataclasses whose fields are parameters of a method.
OF_TEXTS = (TextOptions, ModelSource)
OPTIONS_OF_METHODS = {
    "__init__": (Options,),
    "trainer_hooks": (Options,),
    "compute": (Options, *OF_TEXTS),
    "score": OF_TEXTS,
    "text_scorer": OF_TEXTS,
    "save_base": OF_TEXTS,
    "compare": (*OF_TEXTS, BaseSource),
    "compare_tokens": (*OF_TEXTS, BaseSource),
    "text_comparer": (*OF_TEXTS, BaseSource),
}


@pytest.mark.parametrize("name", OPTIONS_OF_METHODS)
def test_signatures_have_every_option_with_its_default(name):
    """UNSET stands for what the metric was made with, or for what the texts show."""
    parameters = inspect.signature(getattr(Perplexity, name)).parameters
    expected = {f.name: f.default for kind in OPTIONS_OF_METHODS[name] for f in fields(kind)}
    if name != "__init__":
        expected |= {f.name: UNSET for f in fields(Options) if f.name in expected}
    if "conversations" in expected:
        expected["conversations"] = UNSET  # as the texts are
    if name == "trainer_hooks":
        expected["shift"] = None  # as the model needs it
    found = {option: parameters[option] for option in expected}
    assert {option: each.default for option, each in found.items()} == expected
    assert {each.kind for each in found.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert list(parameters)[-1] == "unknown"


@pytest.mark.parametrize(
    ("name", "misspelt", "match"),
    [
        ("add_batch", "reference", "unknown argument 'reference'. .* predictions, references, "),
        (
            "add",
            "groups",
            r"unknown argument 'groups'. Did you mean group\? The arguments are prediction, ",
        ),
        (
            "__call__",
            "shift",
            "unknown argument 'shift'. It goes to compute, trainer_hooks or where",
        ),
        ("add_batch", "texts", "unknown argument 'texts'. The texts are called predictions"),
        ("compute", "texts", "unknown argument 'texts'. The texts are called predictions"),
        ("score", "texts", "unknown argument 'texts'. The texts are called predictions"),
        ("compare", "texts", "unknown argument 'texts'. The texts are called predictions"),
    ],
)
def test_unknown_arguments_are_refused_with_what_to_do(ppl, name, misspelt, match):
    with pytest.raises(TypeError, match=match):
        getattr(ppl, name)(**{misspelt: ["a"]})


def test_options_at_compute_must_match_pending_batches(ppl):
    logits, targets = random_batch()
    ppl.add_batch(predictions=logits, references=targets)
    with pytest.raises(ValueError, match="other options .*dtype:float64.* than the batches added"):
        ppl.compute(dtype="float64")
    assert ppl.compute(dtype="float32", ignore_index=[-100])["num_tokens"] == targets.numel()


@pytest.mark.parametrize("where", ["load", "compute"])
def test_a_misspelt_option_is_named(where):
    logits, targets = random_batch()
    with pytest.raises(TypeError, match="unknown argument 'ignore_idx'. Did you mean ignore_index"):
        if where == "load":
            Perplexity(ignore_idx=0)
        else:
            Perplexity().compute(predictions=logits, references=targets, ignore_idx=0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"shift": 1}, TypeError, "shift must be True or False, got 1"),
        ({"from_logits": "no"}, TypeError, "from_logits must be True or False, got 'no'"),
        ({"mask_token_id": 0.0}, TypeError, "mask_token_id must be one token id or None, got 0.0"),
        ({"mask_token_id": [0, 1]}, TypeError, "Several ids go into ignore_index"),
        ({"mask_token_id": True}, TypeError, "mask_token_id must be one token id"),
        ({"ignore_index": "pad"}, TypeError, "ignore_index must be an integer"),
        ({"dtype": "float16"}, ValueError, 'dtype must be "float32" or "float64"'),
    ],
)
def test_bad_options_are_named(options, error, match):
    with pytest.raises(error, match=match):
        Perplexity(**options)


# --- accumulation -------------------------------------------------------------------------------


def test_batches_examples_and_compute_add_up(ppl):
    logits, targets = random_batch(batch=6)
    weights = torch.rand(6, 7)
    whole = ppl.compute(predictions=logits, references=targets, sample_weight=weights)
    ppl.add_batch(predictions=logits[:2], references=targets[:2], sample_weight=weights[:2])
    assert len(ppl) == 2
    ppl.add(prediction=logits[2], reference=targets[2], sample_weight=weights[2])
    assert len(ppl) == 3
    ppl(predictions=logits[3:4], references=targets[3:4], sample_weight=weights[3:4])
    parts = ppl.compute(predictions=logits[4:], references=targets[4:], sample_weight=weights[4:])
    assert parts["num_tokens"] == whole["num_tokens"]
    assert parts["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-12)
    assert parts["perplexity_ci_low"] == pytest.approx(whole["perplexity_ci_low"], rel=1e-9)
    assert len(ppl) == 0


def test_call_returns_the_value_of_the_batch_alone(ppl):
    first, second = random_batch(seed=1), random_batch(seed=2)
    for logits, targets in (first, second):
        value = ppl(predictions=logits, references=targets)
        assert value == pytest.approx(reference_perplexity(logits, targets), rel=1e-6)
    both = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    assert ppl.compute()["perplexity"] == pytest.approx(reference_perplexity(*both), rel=1e-6)


def test_compute_starts_afresh(ppl):
    logits, targets = random_batch()
    ppl.compute(predictions=2 * logits, references=targets)
    again = ppl.compute(predictions=logits, references=targets)
    assert again == Perplexity().compute(predictions=logits, references=targets)


def test_merge_refuses_other_options_and_other_things(ppl):
    with pytest.raises(ValueError, match="same options; these are .*shift:no.*shift:yes"):
        ppl.merge(Perplexity(shift=True))
    with pytest.raises(TypeError, match="another Perplexity, got dict"):
        ppl.merge({})


def test_repr_is_one_line(ppl):
    ppl.add_batch(**dict(zip(("predictions", "references"), random_batch(), strict=True)))
    assert repr(ppl).startswith("<Perplexity of 3 sequences so far, from_logits:yes|")
    assert len(repr(ppl).splitlines()) == 1


# --- threads ------------------------------------------------------------------------------------


@pytest.fixture
def in_threads():
    """Calls functions at once, each in a thread of its own that is interrupted all the time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def call(*functions):
        results = {}
        threads = [
            threading.Thread(target=lambda i=i: results.update({i: functions[i]()}), daemon=True)
            for i in range(len(functions))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        return [results[i] for i in range(len(functions))]

    yield call
    sys.setswitchinterval(interval)


def test_batches_of_several_threads_all_count(ppl, in_threads):
    logits, targets = random_batch(batch=1, length=2)

    def add():
        for _ in range(100):
            ppl.add_batch(predictions=logits, references=targets)
            ppl(predictions=logits, references=targets)

    in_threads(*[add] * 8)
    assert len(ppl) == 1600
    result = ppl.compute()
    assert (result["num_tokens"], result["num_sequences"]) == (3200, 1600)
    assert result["perplexity"] == pytest.approx(reference_perplexity(logits, targets), rel=1e-6)


@pytest.mark.parametrize("with_a_batch", [False, True])
def test_what_is_added_during_compute_counts_in_this_result_or_the_next(
    ppl, in_threads, with_a_batch
):
    logits, targets = random_batch(batch=1, length=2)
    batch = {"predictions": logits, "references": targets}

    def add():
        for _ in range(100):
            ppl.add_batch(**batch)

    def compute():
        ppl.add_batch(**batch)  # so that there is something to compute
        results = [ppl.compute(**batch) if with_a_batch else ppl.compute()]
        for _ in range(100):
            ppl.add_batch(**batch)
            results.append(ppl.compute(**batch))
        return sum(result["num_tokens"] for result in results)

    *_, num_tokens = in_threads(*[add] * 6, compute)
    left = ppl.compute(**batch)["num_tokens"] - 2
    assert num_tokens + left == 2 * (600 + 101 + 100 + with_a_batch)


def test_metrics_may_merge_each_other_at_once(in_threads):
    first, second = Perplexity(), Perplexity()

    def merge(one, other):
        for _ in range(5000):
            one.merge(other)

    in_threads(lambda: merge(first, second), lambda: merge(second, first))
    assert len(first) == len(second) == 0


# --- weights ------------------------------------------------------------------------------------


def test_the_weights_of_an_added_sequence_may_be_any_tensor(ppl):
    logits, targets = random_batch(batch=1)
    weights = torch.tensor([1.0, 0.5, 0, 1, 0, 0, 2], dtype=torch.bfloat16, requires_grad=True)
    ppl.add(prediction=logits[0], reference=targets[0], sample_weight=weights)
    expected = reference_perplexity(logits, targets, weights.detach().float().numpy())
    assert ppl.compute()["perplexity"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", ["tokens", "sequences", "lists", "integers"])
def test_fractional_weights(ppl, shape):
    logits, targets = random_batch()
    weights = {
        "tokens": np.random.default_rng(0).random((3, 7)),
        "sequences": np.array([0.5, 2.0, 1.5]),
        "lists": [[0.25 * t for t in range(7)]] * 3,
        "integers": torch.arange(21).view(3, 7),
    }[shape]
    result = ppl.compute(predictions=logits, references=targets, sample_weight=weights)
    full = np.asarray(weights, dtype=float)
    full = full[:, None] if full.ndim == 1 else full
    assert result["perplexity"] == pytest.approx(
        reference_perplexity(logits, targets, full), rel=1e-6
    )
    assert result["num_tokens"] == (np.broadcast_to(full, (3, 7)) > 0).sum()


def test_weights_move_with_the_references(ppl):
    logits, targets = random_batch()
    weights = torch.rand(3, 7)
    result = ppl.compute(predictions=logits, references=targets, sample_weight=weights, shift=True)
    expected = reference_perplexity(logits[:, :-1], targets[:, 1:], weights[:, 1:].numpy())
    assert result["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_weight_zero_hides_anything(ppl):
    logits, targets = random_batch()
    expected = ppl.compute(predictions=logits[:2], references=targets[:2])
    logits[2], targets[2] = math.nan, 10**6
    result = ppl.compute(predictions=logits, references=targets, sample_weight=[1.0, 1.0, 0.0])
    assert result == expected


# --- kinds of input -----------------------------------------------------------------------------


KINDS = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "nested lists": lambda x: x.tolist(),
    "tuple of tensors": lambda x: tuple(x),
    "list of arrays": lambda x: [row.numpy() for row in x],
    "object array": lambda x: as_objects([row.numpy() for row in x]),
}


@pytest.mark.parametrize(("left", "right"), list(itertools.product(KINDS, repeat=2)))
def test_kinds_of_input_mix(ppl, left, right):
    logits, targets = random_batch()
    result = ppl.compute(predictions=KINDS[left](logits), references=KINDS[right](targets))
    assert result["perplexity"] == pytest.approx(reference_perplexity(logits, targets), rel=1e-6)
    assert result["num_sequences"] == 3


@pytest.mark.parametrize("kind", ["tensors", "arrays", "nested lists"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_ragged_lists(ppl, kind, weighted, shift):
    lengths = [4, 1, 9, 8, 7]  # equal enough for an interval
    logits, targets = random_batch(batch=5, length=9)
    weights = torch.rand(5, 9) if weighted else torch.ones(5, 9)
    ragged = [[x[i, :n] for i, n in enumerate(lengths)] for x in (logits, targets, weights)]
    convert = {"tensors": lambda x: x, "arrays": lambda x: x.numpy()}.get(
        kind, lambda x: x.tolist()
    )
    predictions, references, sample_weight = ([convert(row) for row in x] for x in ragged)
    result = ppl.compute(
        predictions=predictions,
        references=references,
        sample_weight=sample_weight if weighted else None,
        shift=shift,
    )
    for i, n in enumerate(lengths):
        targets[i, n:] = -100
    padded = Perplexity(shift=shift).compute(
        predictions=logits, references=targets, sample_weight=weights
    )
    assert result["num_tokens"] == sum(lengths) - 5 * shift
    assert result["perplexity"] == pytest.approx(padded["perplexity"], rel=1e-6)
    assert result["perplexity_ci_high"] == pytest.approx(padded["perplexity_ci_high"], rel=1e-6)


def test_ragged_with_one_weight_per_sequence(ppl):
    a, b = random_batch(batch=1, length=3, seed=1), random_batch(batch=1, length=5, seed=2)
    result = ppl.compute(
        predictions=[a[0][0], b[0][0]], references=[a[1][0], b[1][0]], sample_weight=[1.0, 0.5]
    )
    nll_a, nll_b = reference_nll(*a).sum().item(), reference_nll(*b).sum().item()
    assert result["mean_nll"] == pytest.approx((nll_a + 0.5 * nll_b) / (3 + 2.5), rel=1e-6)


def random_sequences(num_sequences, vocab_size, seed=0):
    """Logits (T_i, V) and targets (T_i,) of sequences of 0 to 8 tokens."""
    lengths = torch.randint(9, (num_sequences,), generator=torch.Generator().manual_seed(seed))
    logits, targets = random_rows(int(lengths.sum()), vocab_size, seed=seed)
    return list(logits.split(lengths.tolist())), list(targets.split(lengths.tolist()))


@pytest.fixture
def launched(monkeypatch):
    """The logits of each reduction from now on."""
    logits, launch = [], batches.launch
    monkeypatch.setattr(
        batches, "launch", lambda *args, **kw: logits.append(args[0]) or launch(*args, **kw)
    )
    return logits


def test_short_sequences_are_reduced_together(launched):
    logits, targets = random_sequences(1000, vocab_size=1500)  # 6 million logits
    batches.reduce_batch(logits, targets, None, Options())
    assert sum(len(part) for part in launched) == sum(len(part) for part in logits)
    assert max(part.numel() for part in launched) <= batches.TOGETHER
    assert len(launched) < 10


def test_a_long_sequence_is_not_copied(launched):
    logits, targets = random_sequences(6, vocab_size=1500)
    logits[3], targets[3] = random_rows(700, 1500)
    assert logits[3].numel() > batches.TOGETHER
    batches.reduce_batch(logits, targets, None, Options())
    assert len(launched) == 3
    assert launched[1].data_ptr() == logits[3].data_ptr()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sequences_together_are_what_they_are_alone(weighted, shift):
    logits, targets = random_sequences(60, vocab_size=30)
    weights = [torch.rand(len(ids)) for ids in targets] if weighted else None
    for i, kind in enumerate([torch.float64, torch.bfloat16, torch.float32, torch.float32]):
        logits[7 * i : 7 * i + 7] = [part.to(kind) for part in logits[7 * i : 7 * i + 7]]
    targets[2::5] = [ids.masked_fill(ids % 2 == 0, -100) for ids in targets[2::5]]
    targets[3::5] = [ids.to(torch.uint8) for ids in targets[3::5]]
    targets[4::5] = [ids.tolist() for ids in targets[4::5]]
    logits[40] = logits[40][:, :25]  # another vocabulary
    targets[40] = targets[40] % 25
    if weighted:
        weights[5:9] = [2, 0.5, np.float32(1.5), torch.tensor(True)]
    options = Options(shift=shift)
    together = batches.reduce_batch(logits, targets, weights, options)
    alone = [
        batches.reduce_batch([x], [y], w, options)
        for x, y, w in zip(
            logits, targets, [[w] for w in weights] if weighted else [None] * 60, strict=True
        )
    ]
    assert together.nll_sums.tolist() == [float(sums.nll_sums[0]) for sums in alone]
    assert together.weight_sums.tolist() == [float(sums.weight_sums[0]) for sums in alone]
    assert together.num_tokens.tolist() == [int(sums.num_tokens[0]) for sums in alone]


@pytest.mark.parametrize("shift", [False, True])
def test_places_among_sequences_that_are_reduced_together(ppl, shift):
    logits, targets = random_sequences(300, vocab_size=30)
    sequence = next(i for i, ids in enumerate(targets) if i > 200 and len(ids) == 5)
    assert min(len(ids) for ids in targets[:sequence]) == 0
    batch = {"predictions": logits, "references": targets}
    options = {"shift": shift}

    logits[sequence][3, 2] = math.nan
    with pytest.warns(UserWarning, match=rf"predictions\[{sequence}, 3\] holds NaN"):
        ppl.compute(**batch, **options)
    targets[sequence][4] = 30
    with pytest.raises(ValueError, match=rf"references\[{sequence}, 4\] is 30, outside"):
        ppl.compute(**batch, **options)
    targets[sequence][4] = 3
    weights = [torch.ones(len(ids)) for ids in targets]
    weights[sequence][1] = -1
    with pytest.raises(ValueError, match=rf"sample_weight\[{sequence}\] must be finite.* -1.0"):
        ppl.compute(**batch, **options, sample_weight=weights)
    logits[sequence] = logits[sequence][:4]
    with pytest.raises(ValueError, match=rf"predictions\[{sequence}\] must have the shape"):
        ppl.compute(**batch, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_through_compute(ppl, dtype):
    logits, targets = random_batch(batch=2, length=20, vocab_size=50257, dtype=dtype)
    result = ppl.compute(predictions=logits, references=targets)
    expected = reference_nll(logits, targets).mean().item()
    assert result["mean_nll"] == pytest.approx(expected, abs=1e-5)


# --- properties ---------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
METRIC = Perplexity()


def perplexity(logits, targets, **kwargs):
    return METRIC.compute(predictions=logits, references=targets, **kwargs)["perplexity"]


@given(seeds, st.floats(-50, 50))
def test_a_constant_added_to_the_logits_changes_nothing(seed, constant):
    logits, targets = random_batch(seed=seed, dtype=torch.float64)
    assert perplexity(logits + constant, targets) == pytest.approx(perplexity(logits, targets))


@given(st.integers(2, 3000), st.floats(-30, 30))
def test_uniform_logits_have_the_perplexity_of_the_vocabulary(vocab_size, value):
    logits = torch.full((2, 3, vocab_size), value)
    targets = torch.randint(vocab_size, (2, 3))
    assert perplexity(logits, targets) == pytest.approx(vocab_size, rel=1e-5)


@given(seeds)
def test_the_order_of_tokens_sequences_and_vocabulary_changes_nothing(seed):
    logits, targets = random_batch(seed=seed)
    expected = perplexity(logits, targets)
    for dim, size in enumerate(targets.shape):
        order = torch.randperm(size)
        shuffled = perplexity(logits.index_select(dim, order), targets.index_select(dim, order))
        assert shuffled == pytest.approx(expected, rel=1e-6)
    order = torch.randperm(11)
    assert perplexity(logits[..., order], order.argsort()[targets]) == pytest.approx(
        expected, rel=1e-6
    )


@given(seeds, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_any_split_into_batches_gives_the_same(seed, sizes):
    logits, targets = random_batch(batch=sum(sizes), seed=seed)
    for part in zip(logits.split(sizes), targets.split(sizes), strict=True):
        METRIC.add_batch(predictions=part[0], references=part[1])
    assert METRIC.compute()["perplexity"] == pytest.approx(perplexity(logits, targets), rel=1e-6)


@given(seeds)
def test_weights_of_zero_and_one_are_a_mask(seed):
    logits, targets = random_batch(seed=seed)
    weights = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)) < 0.5
    weights[0, 0] = True
    weighted = perplexity(logits, targets, sample_weight=weights)
    assert weighted == pytest.approx(perplexity(logits, targets.where(weights, -100)), rel=1e-12)


@given(seeds, st.floats(0.01, 100))
def test_weights_count_only_relative_to_each_other(seed, factor):
    logits, targets = random_batch(seed=seed)
    weights = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)) + 0.1
    one = METRIC.compute(predictions=logits, references=targets, sample_weight=weights)
    other = METRIC.compute(predictions=logits, references=targets, sample_weight=weights * factor)
    for name in ("perplexity", "perplexity_ci_low", "perplexity_ci_high"):
        assert other[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.uint16, torch.uint64, torch.float16], ids=str
)
def test_weights_of_every_type(ppl, dtype):
    logits, targets = random_batch()
    weights = torch.tensor([[1, 0, 1, 1, 0, 1, 1]]).repeat(3, 1)
    result = ppl.compute(predictions=logits, references=targets, sample_weight=weights.to(dtype))
    assert result["num_tokens"] == 15
    expected = reference_perplexity(logits, targets, weights.numpy())
    assert result["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_complex_weights_are_refused(ppl):
    logits, targets = random_batch()
    weights = torch.ones(3, 7, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"sample_weight must hold real numbers, got torch.complex"):
        ppl.add_batch(predictions=logits, references=targets, sample_weight=weights)


def test_dtype_is_that_of_the_reduction(ppl):
    logits, targets = random_batch(vocab_size=5000)
    result = ppl.compute(predictions=logits, references=targets, dtype="float64")
    assert result["perplexity"] == pytest.approx(reference_perplexity(logits, targets), rel=1e-13)


@pytest.mark.parametrize("vocab_size", [2, 3, 100])
@pytest.mark.parametrize("kind", ["sure", "wrong", "uniform"])
def test_probabilities_of_every_kind_are_noticed(ppl, vocab_size, kind):
    probabilities = torch.full((2, 3, vocab_size), 1 / vocab_size)
    targets = torch.zeros(2, 3, dtype=torch.int64)
    if kind != "uniform":
        place = 0 if kind == "sure" else vocab_size - 1
        probabilities = torch.eye(vocab_size)[torch.full((2, 3), place)]
    with pytest.warns(UserWarning, match="predictions look like probabilities"):
        ppl.compute(predictions=probabilities, references=targets)
