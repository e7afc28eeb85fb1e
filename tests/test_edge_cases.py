"""The table of decided edge cases, row by row, through the loaded metric."""

import math
import warnings

import numpy as np
import pytest
import torch
from support import ROOT, as_objects, random_batch, reference_perplexity
from transformers.modeling_outputs import CausalLMOutput

from ppleval import Perplexity


def compute(logits, targets, **kwargs):
    return Perplexity().compute(predictions=logits, references=targets, **kwargs)


@pytest.mark.parametrize("why", ["ignored", "weight", "one position and shift"])
def test_nothing_scored_is_nan_with_a_warning(ppl, why):
    logits, targets = random_batch(length=1 if "shift" in why else 7)
    kwargs = {}
    if why == "ignored":
        targets[:] = -100
    elif why == "weight":
        kwargs["sample_weight"] = torch.zeros(3)
    else:
        kwargs["shift"] = True
    with pytest.warns(UserWarning, match="No token was scored, so the perplexity is NaN"):
        result = ppl.compute(predictions=logits, references=targets, **kwargs)
    assert math.isnan(result["perplexity"])
    assert (result["num_tokens"], result["num_sequences"]) == (0, 0)


def test_an_empty_batch_counts_as_added(ppl):
    ppl.add_batch(predictions=[], references=[])
    ppl.add_batch(predictions=torch.zeros(0, 4, 5), references=torch.zeros(0, 4).long())
    with pytest.warns(UserWarning, match="No token was scored"):
        assert math.isnan(ppl.compute()["perplexity"])


def test_nothing_added_raises(ppl):
    with pytest.raises(ValueError, match="Nothing to compute: pass predictions and references"):
        ppl.compute()


@pytest.mark.parametrize("bad_id", [11, -1, 10**12])
def test_a_target_outside_the_vocabulary_is_named(ppl, bad_id):
    logits, targets = random_batch()
    targets[2, 4] = bad_id
    match = rf"references\[2, 4\] is {bad_id}, outside the vocabulary of 11 ids .*ignore_index="
    with pytest.raises(ValueError, match=match):
        ppl.compute(predictions=logits, references=targets)
    with pytest.raises(ValueError, match=match):
        ppl.compute(predictions=list(logits), references=list(targets))
    # With shift the place is still that of the reference.
    with pytest.raises(ValueError, match=match):
        ppl.compute(predictions=logits, references=targets, shift=True)


def test_nan_that_was_cast_to_an_id_is_named(ppl):
    logits, targets = random_batch()
    targets[1, 2] = torch.iinfo(torch.int64).min
    with pytest.raises(ValueError, match=r"references\[1, 2\] is -9223372036854775808, outside"):
        ppl.compute(predictions=logits, references=targets)


def test_a_model_output_is_not_its_logits(ppl):
    output = CausalLMOutput(logits=torch.zeros(1, 2, 3))
    with pytest.raises(TypeError, match=r"got CausalLMOutput\. Pass its \.logits"):
        ppl.compute(predictions=output, references=[[0, 0]])


def test_the_first_reference_is_no_target_with_shift(ppl):
    logits, targets = random_batch()
    targets[:, 0] = 999
    assert ppl.compute(predictions=logits, references=targets, shift=True)["num_tokens"] == 18


def test_ignore_index_none_does_not_hide_minus_100():
    logits, targets = random_batch()
    targets[0, 0] = -100
    with pytest.raises(ValueError, match=r"references\[0, 0\] is -100"):
        compute(logits, targets, ignore_index=None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_a_scored_row_is_kept_and_named_once(ppl, bad):
    logits, targets = random_batch()
    logits[1, 5, 3] = bad
    with pytest.warns(UserWarning, match=r"predictions\[1, 5\] holds NaN or \+inf") as caught:
        ppl.add_batch(predictions=logits, references=targets)
        ppl.add_batch(predictions=logits[1:], references=targets[1:])
    assert len(caught) == 1
    result = ppl.compute()
    assert math.isnan(result["perplexity"])
    assert result["num_tokens"] == 35
    with pytest.warns(UserWarning, match=r"predictions\[1, 5\]"):  # a new run warns anew
        ppl.compute(predictions=list(logits), references=list(targets))


def test_anything_in_an_ignored_row_has_no_effect():
    logits, targets = random_batch()
    targets[1] = -100
    expected = compute(logits, targets)
    for anything in (math.nan, math.inf, -math.inf, 1e38):
        logits[1] = anything
        assert compute(logits, targets) == expected


@pytest.mark.filterwarnings("ignore:With from_logits=False, some rows:UserWarning")
def test_anything_in_an_ignored_row_of_probabilities_has_no_effect():
    values, targets = torch.rand(3, 7, 11), torch.randint(11, (3, 7))
    targets[1] = -100
    expected = compute(values, targets, from_logits=False)
    for anything in (math.nan, math.inf, -5.0):
        values[1] = anything
        assert compute(values, targets, from_logits=False) == expected


def test_a_leading_block_of_minus_infinity():
    logits = torch.full((1, 2, 300), -math.inf)
    logits[..., 200:] = 1.5
    assert compute(logits, [[250, 200]])["perplexity"] == pytest.approx(100, rel=1e-6)


def test_a_target_of_probability_zero_is_infinite():
    logits = torch.tensor([[[0.0, -math.inf], [0.0, 0.0]]])
    result = compute(logits, [[1, 1]])
    assert result["perplexity"] == result["mean_nll"] == math.inf
    probabilities = np.array([[[1.0, 0.0], [0.5, 0.5]]])
    assert compute(probabilities, [[1, 1]], from_logits=False)["perplexity"] == math.inf


def test_weight_zero_on_an_infinite_nll_leaves_the_rest():
    logits = torch.tensor([[[0.0, -math.inf], [0.0, 0.0]]])
    result = compute(logits, [[1, 1]], sample_weight=[[0.0, 1.0]])
    assert result["perplexity"] == pytest.approx(2)


def test_perplexity_overflows_to_infinity():
    result = compute(torch.tensor([[[0.0, 2000.0]]]), [[0]])
    assert result["mean_nll"] == 2000
    assert result["perplexity"] == math.inf


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_from_logits_false_with_what_is_no_probability(ppl, bad):
    values = torch.full((1, 2, 2), 0.5)
    values[0, 1, 0] = bad
    with pytest.raises(ValueError, match="negative or non-finite .* pass from_logits=True"):
        ppl.compute(predictions=values, references=[[0, 0]], from_logits=False)


def test_rows_that_do_not_sum_to_one_are_normalised_with_one_warning(ppl):
    values = torch.tensor([[[1.0, 3.0], [2.0, 6.0]]])
    with pytest.warns(UserWarning, match="do not sum to 1; each row is divided") as caught:
        result = ppl.compute(predictions=values, references=[[1, 1]], from_logits=False)
    assert len(caught) == 1
    assert result["perplexity"] == pytest.approx(4 / 3)


def test_probabilities_given_as_logits_are_computed_with_one_warning(ppl):
    probabilities = random_batch()[0].softmax(-1)
    targets = probabilities.argmax(-1)
    with pytest.warns(UserWarning, match="look like probabilities.*from_logits=False") as caught:
        result = ppl.compute(predictions=probabilities, references=targets)
    assert len(caught) == 1
    nll = torch.nn.functional.cross_entropy(probabilities.double().flatten(0, 1), targets.view(-1))
    assert result["mean_nll"] == pytest.approx(nll.item(), rel=1e-6)


def test_logits_between_zero_and_one_are_no_probabilities(ppl):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = torch.rand(2, 3, 50)
        ppl.compute(predictions=logits, references=logits.argmax(-1))


SHAPE_ERRORS = {
    "batch sizes": ((2, 3, 5), (3, 3), r"\(2, 3, 5\) and \(3, 3\)"),
    "ids one shorter": ((2, 3, 5), (2, 2), r"\(2, 3, 5\) and \(2, 2\).*shift=True"),
    "logits one shorter": ((2, 3, 5), (2, 4), "shift=True: position t is then"),
    "no batch": ((3, 5), (3,), r"A single sequence goes to add\(prediction=, reference=\)"),
    "ids of another rank": ((2, 3, 5), (2, 3, 5), r"references \(B, T\), got"),
    "four dimensions": ((1, 2, 3, 5), (1, 2, 3), r"\(B, T, V\)"),
}


@pytest.mark.parametrize("case", SHAPE_ERRORS)
def test_shapes_that_do_not_fit_are_both_named(ppl, case):
    logits_shape, targets_shape, match = SHAPE_ERRORS[case]
    with pytest.raises(ValueError, match=match):
        ppl.compute(
            predictions=torch.zeros(logits_shape), references=torch.zeros(targets_shape).long()
        )


def test_shapes_of_listed_sequences_name_the_sequence(ppl):
    good, bad = torch.zeros(3, 5), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"predictions\[1\] must have the shape \(T, V\)"):
        ppl.compute(predictions=[good, bad], references=[[0, 0, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="got 2 predictions, 1 references"):
        ppl.compute(predictions=[good, good], references=[[0, 0, 0]])
    with pytest.raises(ValueError, match="got 1 predictions, 1 references, 2 sample_weight"):
        ppl.compute(predictions=[good], references=[[0, 0, 0]], sample_weight=[1, 1])


def test_one_shorter_with_shift_says_to_pass_all(ppl):
    with pytest.raises(ValueError, match="pass the logits of all T positions and all T ids"):
        ppl.compute(
            predictions=torch.zeros(1, 3, 5), references=torch.zeros(1, 4).long(), shift=True
        )


TYPE_ERRORS = {
    "float labels": (np.zeros((1, 2, 3)), np.zeros((1, 2)), "references must be integer token ids"),
    "integer predictions": (np.zeros((1, 2, 3), int), [[0, 0]], "predictions must be floating"),
    "ids as predictions": ([[1, 2]], [[1, 2]], r"predictions\[0\] must be floating-point"),
    "text and ids": ("some text", [[0, 0]], "got str"),
    "texts and ids": (["some text", "more"], [[0, 0], [0, 0]], r"predictions\[0\] must hold num"),
    "logits and texts": (np.zeros((1, 2, 3)), ["ab"], "references must hold numbers"),
    "bool labels": (np.zeros((1, 2, 3)), np.zeros((1, 2), bool), "references must be integer"),
    "nothing": ([[None]], [[0]], r"predictions\[0\] must hold numbers"),
}


@pytest.mark.parametrize("case", TYPE_ERRORS)
def test_wrong_types_say_what_was_expected(ppl, case):
    predictions, references, match = TYPE_ERRORS[case]
    with pytest.raises(TypeError, match=match):
        ppl.compute(predictions=predictions, references=references)


def test_one_of_the_two_inputs_missing(ppl):
    logits, targets = random_batch()
    for predictions in (logits, torch.tensor(1.0), np.float32(1.0), list(logits)):
        with pytest.raises(ValueError, match="references is missing"):
            ppl.compute(predictions=predictions)
    with pytest.raises(ValueError, match="predictions is missing"):
        ppl.add_batch(references=targets)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (torch.ones(2, 7), r"shape \(3, 7\) of the references, or \(3,\).*got \(2, 7\)"),
        (torch.ones(7), r"got \(7,\)"),
        (torch.tensor([0.0, 1.0, -2.0]), r"\[2\] must be finite, not negative and .*got -2.0"),
        (torch.full((3, 7), math.nan), "finite, not negative"),
    ],
)
def test_bad_weights(ppl, weights, match):
    logits, targets = random_batch()
    with pytest.raises(ValueError, match=f"sample_weight.*{match}"):
        ppl.compute(predictions=logits, references=targets, sample_weight=weights)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("form", [lambda values: values, list], ids=["tensor", "list"])
def test_a_weight_that_is_not_used_may_be_anything(ppl, weight, shift, form):
    """Of an ignored label, and with shift of the first one, as a NaN logit there."""
    logits, targets = random_batch()
    weights = 0.5 + torch.rand(3, 7)
    targets[1, 3] = -100
    options = {"predictions": form(logits), "references": form(targets), "shift": shift}
    expected = ppl.compute(**options, sample_weight=form(weights))
    unused = weights.clone()
    unused[1, 3] = weight
    if shift:
        unused[:, 0] = weight
    assert ppl.compute(**options, sample_weight=form(unused)) == expected
    unused[2, 4] = weight
    with pytest.raises(ValueError, match=r"sample_weight\[2\] must be finite, not negative"):
        ppl.compute(**options, sample_weight=form(unused))


def test_probabilities_whose_sum_overflows_are_refused_for_that(ppl):
    with pytest.raises(ValueError, match="or a row whose sum overflows"):
        ppl.compute(predictions=torch.full((1, 1, 2), 3e38), references=[[0]], from_logits=False)


ROWS = [np.zeros((2, 3)), np.zeros((2, 3))]
NO_LISTS = {
    "a number": ({"predictions": 3.0}, "predictions must be a list with one entry for each"),
    "an object": ({"predictions": object()}, "predictions must be a list.*got object"),
    "one id": ({"references": 1}, "references must be a list with one entry.*got int"),
    "an array without axes": ({"references": np.array(1)}, "references must be a list"),
    "a tensor without axes": ({"references": torch.tensor(1)}, "references must be a list"),
    "one weight": ({"sample_weight": 2.0}, "sample_weight must be a list.*got float"),
    "weights in a dict": ({"sample_weight": {0: 1.0, 1: 2.0}}, "sample_weight.*got dict"),
    "weights in a set": ({"sample_weight": {1.0, 2.0}}, "sample_weight must be a list.*got set"),
    "a missing weight": ({"sample_weight": [None, 2.0]}, r"sample_weight\[0\] must hold numbers"),
}


@pytest.mark.parametrize("case", NO_LISTS)
def test_what_goes_with_listed_sequences_is_a_list(ppl, case):
    """A dict would give its keys as weights, a set any order, and None the weight 1."""
    changed, match = NO_LISTS[case]
    right = {"predictions": ROWS, "references": [[0, 1], [0, 1]]}
    with pytest.raises(TypeError, match=match):
        ppl.add_batch(**right | changed)
    assert len(ppl) == 0


MASKED = {
    "one array": lambda masked: masked,
    "a list of arrays": list,
    "nested lists": lambda masked: [list(part) for part in masked],
    "plain arrays before it": lambda masked: [*masked.data[:2], masked[2]],
    "an array of arrays": lambda masked: as_objects(list(masked)),
}


@pytest.mark.parametrize("name", ["predictions", "references", "sample_weight"])
@pytest.mark.parametrize("form", MASKED)
def test_masked_arrays_are_refused_wherever_they_are(ppl, name, form):
    logits, targets = random_batch()
    batch = {"predictions": logits, "references": targets, "sample_weight": torch.ones(3, 7)}
    batch = {argument: value.numpy() for argument, value in batch.items()}
    masked = np.ma.masked_equal(batch[name], batch[name].flat[-1])
    batch = {argument: list(value) for argument, value in batch.items()}
    batch[name] = MASKED[form](masked)
    with pytest.raises(TypeError, match=rf"{name}.* is a masked array, whose mask would be lost"):
        ppl.compute(**batch)


def test_the_smallest_weights_count(ppl):
    logits, targets = random_batch(batch=1, length=2)
    # float32 ends at 1e-45.
    weights = np.array([[1e-100, 3e-100]])
    result = ppl.compute(predictions=logits, references=targets, sample_weight=weights)
    assert result["num_tokens"] == 2
    expected = reference_perplexity(logits, targets, [[1.0, 3.0]])
    assert result["perplexity"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-100, 1e100])
def test_weights_of_any_size_count_relative_to_each_other(ppl, scale):
    logits, targets = random_batch(batch=5, length=2)
    weights = np.linspace(0.5, 1.0, 10).reshape(5, 2)
    expected = ppl.compute(predictions=logits, references=targets, sample_weight=weights)
    result = ppl.compute(predictions=logits, references=targets, sample_weight=weights * scale)
    assert result["num_tokens"] == 10
    assert result["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-12)
    low = expected["perplexity_ci_low"] if scale > 1e-150 else math.nan
    assert result["perplexity_ci_low"] == pytest.approx(low, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("weight", [1e101, 1e200, 1e308, math.inf])
def test_weights_whose_sums_would_overflow_are_refused(ppl, weight):
    logits, targets = random_batch(batch=2, length=2)
    with pytest.raises(ValueError, match=r"\[1\] must be finite.*at most 1e\+100.*divide them by"):
        ppl.add_batch(predictions=logits, references=targets, sample_weight=[1.0, weight])
    assert len(ppl) == 0


BAD_BATCHES = {
    "target out of range": lambda x, y: (x, y + 11),
    "shape": lambda x, y: (x[:, :-1], y),
    "type": lambda x, y: (x.long(), y),
    "not a number": lambda x, y: (["a"], ["b"]),
    "the last of a list": lambda x, y: ([*x, x[0]], [*y, y[0] + 11]),
}


@pytest.mark.parametrize("how", ["add_batch", "call", "compute"])
@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_batch_leaves_what_was_accumulated(ppl, case, how):
    logits, targets = random_batch()
    expected = ppl.compute(predictions=logits, references=targets)
    ppl.add_batch(predictions=logits, references=targets)
    predictions, references = BAD_BATCHES[case](logits, targets)
    call = {"add_batch": ppl.add_batch, "call": ppl, "compute": ppl.compute}[how]
    with pytest.raises((TypeError, ValueError)):
        call(predictions=predictions, references=references)
    assert len(ppl) == 3
    assert ppl.compute() == expected


def test_the_callers_tensors_are_not_changed(ppl):
    logits, targets = random_batch()
    weights = torch.rand(3, 7)
    copies = [x.clone() for x in (logits, targets, weights)]
    logits.requires_grad_()
    ppl.compute(predictions=logits, references=targets, sample_weight=weights, shift=True)
    for tensor, copy in zip((logits, targets, weights), copies, strict=True):
        assert torch.equal(tensor.detach(), copy)


# --- worse than guessing --------------------------------------------------------------------------

GUESSING = (
    "The perplexity of .* is above the size of the vocabulary, 50: worse than guessing. .*labels "
    "that are not shifted .*shifted twice, padding that is scored .*, or an untrained model"
)


def sure_model(vocab_size=50, length=12):
    """Logits and the ids of two texts, the second one with padding of id 0 behind its half: at each
    place the next id has most of the probability, and the others the rest unevenly."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocab_size, (2, length), generator=generator)
    logits = torch.randn(2, length, vocab_size, generator=generator)
    logits[:, :-1].scatter_(2, ids[:, 1:, None], 9.0)
    attention = torch.ones(2, length, dtype=torch.int64)
    attention[1, length // 2 :] = 0
    return logits, ids * attention, attention


WRONG_LABELS = {
    "not shifted": lambda logits, ids, mask: (logits, ids, mask, False),
    "shifted twice": lambda logits, ids, mask: (logits[:, :-1], ids[:, 1:], mask[:, 1:], True),
    "padding is scored": lambda logits, ids, mask: (logits, ids, None, True),
}


@pytest.mark.parametrize("case", WRONG_LABELS)
def test_a_perplexity_above_the_vocabulary_is_told_of_once(case):
    logits, ids, weights, shift = WRONG_LABELS[case](*sure_model())
    ppl = Perplexity(shift=shift)
    batch = {"predictions": logits, "references": ids, "sample_weight": weights}
    if case == "padding is scored":
        batch = {name: value if value is None else value[1:] for name, value in batch.items()}
    ppl.add_batch(**batch)
    with pytest.warns(UserWarning, match=GUESSING) as told:
        result = ppl.compute(**batch)
    assert len(told) == 1
    assert result["perplexity"] > 50


@pytest.mark.filterwarnings("error::UserWarning")
def test_what_is_no_worse_than_guessing_is_not_told_of(ppl):
    logits, ids, weights = sure_model()
    right = {"predictions": logits, "references": ids, "sample_weight": weights, "shift": True}
    assert ppl.compute(**right)["perplexity"] < 2
    # A uniform guess, whose nll is that of the vocabulary but for rounding.
    for dtype in (torch.float32, torch.bfloat16):
        uniform = torch.full((2, 12, 50), 0.3, dtype=dtype)
        result = ppl.compute(predictions=uniform, references=ids)
        assert result["perplexity"] == pytest.approx(50, rel=1e-6)
    # Excluded tokens are no sign of wrong labels.
    logits[0, 0, ids[0, 1]] = -math.inf
    assert ppl.compute(**right)["perplexity"] == math.inf


@pytest.mark.filterwarnings("error::UserWarning")
def test_batches_of_different_vocabularies_are_judged_by_both(ppl):
    """Guesses over 1000 and 10 ids, of as many tokens: together as good as over 100."""
    ppl.add_batch(predictions=torch.zeros(1, 6, 1000), references=torch.zeros(1, 6, dtype=int))
    other = Perplexity()
    other.add_batch(predictions=torch.zeros(1, 6, 10), references=torch.zeros(1, 6, dtype=int))
    other.merge(ppl)
    assert other.compute()["perplexity"] == pytest.approx(100)
    bad = torch.zeros(1, 6, 10)
    bad[..., 1] = 2
    ppl.add_batch(predictions=bad, references=torch.zeros(1, 6, dtype=int))
    with pytest.warns(UserWarning, match="above the size of the vocabulary, 100: worse"):
        ppl.compute()


def test_a_vocabulary_of_one_is_no_vocabulary(ppl):
    """As the log-probabilities of the targets, with a dimension added, look."""
    log_probs, targets = torch.tensor([[[-2.0], [-0.5], [-1.0]]]), torch.zeros(1, 3, dtype=int)
    message = r"a vocabulary of one: these are no logits.* Pass the logits or log-probabilities of"
    for options in ({}, {"from_logits": False}, {"shift": True}):
        with pytest.raises(ValueError, match=rf"predictions has the shape \(1, 3, 1\), {message}"):
            ppl.compute(predictions=log_probs.exp(), references=targets, **options)
    with pytest.raises(ValueError, match=rf"predictions\[0\] has the shape \(3, 1\), {message}"):
        ppl.add(prediction=log_probs[0], reference=targets[0])
    preprocess = ppl.trainer_hooks()["preprocess_logits_for_metrics"]
    with pytest.raises(ValueError, match=message):
        preprocess(log_probs, targets)
    assert len(ppl) == 0


# --- a metric that is used while it reads ---------------------------------------------------------


def use_of(ppl, name):
    """What calls a method of the metric with something that it takes."""
    logits, targets = random_batch()
    batch = {"predictions": logits, "references": targets}
    return {
        "compute": lambda: ppl.compute(**batch),
        "add_batch": lambda: ppl.add_batch(**batch),
        "add texts": lambda: ppl.add_batch(predictions=["one"]),
        "call": lambda: ppl(**batch),
        "reset": ppl.reset,
        "merge": lambda: ppl.merge(Perplexity()),
        "merge into another": lambda: Perplexity().merge(ppl),
        "sync": ppl.sync,
    }[name]


USES = ["compute", "add_batch", "add texts", "call", "reset", "merge", "merge into another", "sync"]


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("kind", ["texts", "logits"])
def test_a_metric_is_not_used_in_what_its_compute_reads(ppl, name, kind):
    """What is pending would count twice, or be lost; a second metric may be used there."""
    logits, targets = random_batch()
    given = {"predictions": ["a text"], "model_id": str(ROOT / "tiny_model")}
    if kind == "logits":
        given = {"predictions": list(logits), "references": targets}

    def read(use):
        for value in given["predictions"]:
            use()
            yield value

    def add():
        pending = {"predictions": ["a text that waits"]} if kind == "texts" else given
        ppl.add_batch(**pending)

    add()
    expected = ppl.compute(**given)["perplexity"]
    add()
    count = len(ppl)
    with pytest.raises(
        ValueError, match="This metric is computing, and what it reads for that uses"
    ):
        ppl.compute(**given | {"predictions": read(use_of(ppl, name))})
    assert len(ppl) == count
    found = ppl.compute(**given | {"predictions": read(lambda: use_of(Perplexity(), name)())})
    assert found["perplexity"] == expected
    use_of(ppl, name)()  # afterwards it may be used again
