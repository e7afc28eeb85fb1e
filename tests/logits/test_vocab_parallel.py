"""Logits that several processes share give what the whole gives on one, or an error on each."""

import json

import pytest
from support import environments
from workers import rank as rank_worker
from workers import shards as worker

# Each: name -> how its error begins on every rank, or on the second and on the others.
ERRORS = {
    "target_beyond": "TargetOutOfRangeError: targets[1, 2] is 11, outside the vocabulary of 11 ids",
    "target_beyond_in_compute": "ValueError: references[1, 2] is 11, outside the vocabulary of 11",
    "target_beyond_plain_columns": "TargetOutOfRangeError: targets[1, 2] is -7, outside the vocab",
    "other_targets_on_one": "ValueError: The processes that share these logits were given differ",
    "other_weights_on_one": "ValueError: The processes that share these logits were given differ",
    "other_dtype_on_one": "ValueError: The processes that share these logits were given differ",
    "float_targets_on_one": (
        "TypeError: targets must be integer token ids",
        "ConnectionError: Rank 1 failed: TypeError: targets must be integer token ids",
    ),
    "no_references_on_one": (
        "ValueError: references is missing",
        "ConnectionError: Rank 1 failed: ValueError: references is missing",
    ),
    "no_references_on_one_with_sync": (
        "ValueError: references is missing",
        "ConnectionError: Rank 1 failed: ValueError: references is missing",
    ),
    "texts_pending_on_one": ("ValueError: Texts need a model", "ConnectionError: 1 of"),
    "negative_weight": "ValueError: sample_weight[3] must be finite, not negative",
    "other_shape": "ValueError: predictions must have the shape (B, T, V) and references (B, T)",
    "negative_probability_on_one": "ValueError: from_logits=False takes probabilities, got a neg",
    "partial_sums": "TypeError: logits is a DTensor with the placement P",
    "parts_of_other_sizes": "ValueError: logits is a DTensor of (5, 7, ",
    "gradient": "ValueError: The nll of logits that several processes share has no gradient",
    "gradient_of_weight": "ValueError: The nll of logits that several processes share has no grad",
    "gap_in_the_vocabulary": "ValueError: vocab_start: the columns of the processes, 0 to 1, ",
    "start_without_group": "ValueError: vocab_start, the id of the first column here, and process",
    "group_without_start": "ValueError: vocab_start, the id of the first column here, and process",
    "start_of_a_dtensor": "ValueError: logits is a DTensor, which knows its place: leave out",
    "no_group": "TypeError: process_group must be one of torch.distributed's process groups",
    "start_that_is_no_integer": "TypeError: vocab_start must be an integer, got 0.5.",
    "weight_along_hidden_size": "TypeError: weight is a DTensor that is sharded along hidden_size",
    "sharded_hidden": "TypeError: hidden is a DTensor that is sharded, and so is the vocabulary",
    "bias_of_another_size_on_one": (
        "ValueError: bias must be (vocab_size,), here",
        "ConnectionError: Rank 1 failed: ValueError: bias must be (vocab_size,), here",
    ),
    "unknown_backend": "ValueError: backend must be one of",
}
VALUES = [name for name in worker.CASES if name not in ERRORS]
MESH_ERRORS = ("an_error_in_one_row_of_the_mesh", "a_bad_probability_in_one_row_of_the_mesh")
MESH_VALUES = [name for name in worker.MESH_CASES if name not in MESH_ERRORS]
# Where it is not 16: with entropy and rank; over each of two dimensions.
MOST_BYTES = {"plain_columns-True": 22, "two_dimensions-vocab-vocab": 2 * 16}


def start(num_ranks, directory):
    """{case: [what came on each rank]}"""
    out = directory / "out"
    finished = rank_worker.finish([worker.__file__, out], environments(num_ranks), timeout=60)
    assert [status for status, _, _ in finished] == [0] * num_ranks, finished
    ranks = [json.loads(out.with_name(f"out.{rank}").read_text()) for rank in range(num_ranks)]
    return {case: [found[case] for found in ranks] for case in ranks[0]}


@pytest.fixture(scope="module", params=[2, 3])
def answers(request, tmp_path_factory):
    return start(request.param, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def mesh_answers(tmp_path_factory):
    return start(4, tmp_path_factory.mktemp("ranks"))


def assert_values(case, found):
    assert isinstance(found, dict), found
    assert found.get("deviation", 0) <= 1e-6
    assert found.get("bytes_per_token", 0) <= MOST_BYTES.get(case, 16)


@pytest.mark.parametrize("case", VALUES)
def test_shared_logits_give_what_the_whole_gives(answers, case):
    for found in answers[case]:
        assert_values(case, found)


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_comes_on_every_rank(answers, case):
    expected = ERRORS[case]
    own, others = (expected, expected) if isinstance(expected, str) else expected
    for rank, found in enumerate(answers[case]):
        assert isinstance(found, str), found
        assert found.startswith(own if rank == 1 else others)


@pytest.mark.parametrize("case", MESH_VALUES)
def test_two_dimensions_of_a_mesh(mesh_answers, case):
    for found in mesh_answers[case]:
        assert_values(case, found)


def test_an_error_reaches_every_row_of_a_mesh(mesh_answers):
    first, *others = mesh_answers["an_error_in_one_row_of_the_mesh"]
    assert first.startswith("TypeError: references must be integer token ids")
    for found in others:
        assert found.startswith("ConnectionError: Rank 0 failed: ")
        assert "references must be integer token ids" in found
    for found in mesh_answers["a_bad_probability_in_one_row_of_the_mesh"]:
        assert found.startswith("ValueError: from_logits=False takes probabilities")
