"""Models that several processes hold together give the number of one process, or an error."""

import itertools
import json
import re
import signal
import time

import pytest
import torch
from support import ROOT, environments
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from workers import rank as rank_worker
from workers import spread as worker
from workers import trainer

from ppleval import Perplexity

pytestmark = pytest.mark.filterwarnings("ignore:.*have no token to score:UserWarning")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The directory of a small Llama, with a tokenizer."""
    directory = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_model")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **layers, max_position_embeddings=64, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=[2, 4])
def answers(request, tmp_path_factory, llama):
    """{kind of model: {case: [what came on each rank]}}"""
    out = tmp_path_factory.mktemp("ranks") / "out"
    num_ranks = request.param
    command = [worker.__file__, llama, out]
    finished = rank_worker.finish(command, environments(num_ranks), timeout=120)
    assert [status for status, _, _ in finished] == [0] * num_ranks, finished
    ranks = [json.loads(out.with_name(f"out.{r}").read_text()) for r in range(num_ranks)]
    return {
        kind: {case: [rank[kind][case] for rank in ranks] for case in cases}
        for kind, cases in ranks[0].items()
    }


@pytest.fixture(scope="module")
def expected(llama):
    """What gives the result of texts in one process."""
    ppl = Perplexity()
    models = {"llama": LlamaForCausalLM.from_pretrained(llama), "gpt2": worker.whole("gpt2")}

    def compute(family, texts):
        named = {"model": models[family], "tokenizer": worker.tokenizer()}
        return ppl.compute(predictions=texts, **named)

    return compute


def family(kind):
    return "gpt2" if "GPT-2" in kind else "llama"


def assert_equal(found, whole):
    for name in ("perplexity", "mean_perplexity", "perplexity_ci_high", "num_tokens"):
        assert found[name] == pytest.approx(whole[name], rel=2e-6, nan_ok=True), name


@pytest.mark.parametrize(("case", "end"), [("shared", None), ("one text", 1), ("alone", 2)])
def test_each_rank_has_the_number_of_one_process(answers, expected, case, end):
    for kind, cases in answers.items():
        if kind == "others":
            continue
        whole = expected(family(kind), worker.TEXTS[:end])
        for found in cases[case]:
            assert_equal(found, whole)
            assert found["perplexities"] == pytest.approx(
                whole["perplexities"], rel=2e-5, nan_ok=True
            ), kind
        assert len({found["signature"] for found in cases[case]}) == 1


def test_logits_exist_for_a_few_rows_at_a_time(answers):
    """The output layer runs where its weight is whole, also inside of the forward pass."""
    for kind, cases in answers.items():
        if kind not in ("others", "pipeline"):
            assert set(cases["rows of logits"]) == {1}, kind


def test_ranks_of_sharded_weights_have_texts_of_their_own(answers, expected):
    """Each has more batches than the one before."""
    kinds = [kind for kind, cases in answers.items() if "own" in cases]
    assert len(kinds) >= 3
    for kind in kinds:
        for rank, found in enumerate(answers[kind]["own"]):
            assert_equal(found, expected(family(kind), worker.own_texts(rank)))


def cases_of(answers, kind):
    if kind not in answers:
        pytest.skip(f"not on this number of ranks: {kind}")
    return answers[kind]


@pytest.mark.parametrize("kind", ["tensor parallel", "FSDP 2"])
def test_a_model_is_compared_with_itself_in_one_process(answers, kind):
    for found in cases_of(answers, kind)["compared"]:
        assert found["mean_kl"] == pytest.approx(0, abs=1e-6)
        assert found["perplexity"] == pytest.approx(found["base_perplexity"], rel=2e-6)
        assert found["same_top"] == 1


@pytest.mark.parametrize("kind", ["tensor parallel", "FSDP 2"])
def test_what_cannot_be_scored_is_an_error_on_every_rank(answers, kind):
    cases = cases_of(answers, kind)
    for error in cases["saved"]:
        assert error.startswith("ValueError: save_base takes a model that one process holds as a")
    first, *others = cases["a bad text on one"]
    assert first == f"ConnectionError: Rank 1 failed: {others[0]}"
    for error in others:
        assert error.startswith("TypeError: predictions[1] must be a string, got int.")


def test_a_model_within_itself_is_refused(answers):
    for error in cases_of(answers, "FSDP 2")["compared with itself"]:
        assert re.match("ValueError: The base of .* is the same object", error)


@pytest.mark.parametrize("kind", ["FSDP 1", "FSDP 2"])
def test_mixed_precision_is_that_of_the_forward_pass(answers, kind):
    """With the tolerance of float32, its windows would be scored one by one."""
    assert all(found == ["bfloat16", True] for found in answers["others"][f"mixed, {kind}"])


def test_a_trainer_counts_each_example_once(answers, llama):
    """Processes that hold a model together evaluate the same examples."""
    model = LlamaForCausalLM.from_pretrained(llama)
    true = trainer.expected_perplexity(model, worker.ROWS, True, 1)
    evens = trainer.expected_perplexity(model, worker.ROWS[::2], True, 1)
    kinds = [kind for kind, cases in answers.items() if "evaluated" in cases]
    assert len(kinds) >= 2
    for kind in kinds:
        for found in itertools.chain(*answers[kind]["evaluated"]):
            assert found["eval_perplexity"] == pytest.approx(true, rel=2e-5), kind
            assert found["eval_num_sequences"] == len(worker.ROWS)
            assert found["eval_perplexity_even"] == pytest.approx(evens, rel=2e-5)


def test_the_loop_of_the_docs(answers, llama):
    """Of unequal numbers of batches; on two ranks one has none."""
    model = LlamaForCausalLM.from_pretrained(llama)
    true = trainer.expected_perplexity(model, worker.ROWS, True, 1)
    for found in answers["FSDP 2"]["loop"]:
        assert found["perplexity"] == pytest.approx(true, rel=2e-5)
        assert found["num_sequences"] == len(worker.ROWS)


def test_ranks_of_one_model_must_have_the_same_texts(answers):
    for error in cases_of(answers, "tensor parallel")["other texts on one"]:
        assert error.startswith("ValueError: The ranks were given different texts")


def test_the_ranks_of_one_model_in_several_groups(answers, expected):
    cases = cases_of(answers, "tensor parallel, two copies")
    for found in cases["in groups"]:
        assert_equal(found, expected("llama", worker.TEXTS))
    for error in cases["other texts in one group"]:
        assert error.startswith("ValueError: The ranks were given different texts")


def test_a_group_that_parts_ranks_in_step_is_refused(answers):
    if "in groups" not in cases_of(answers, "FSDP 2"):
        pytest.skip("of two ranks no group parts a model")
    for rank, error in enumerate(answers["FSDP 2"]["in groups"]):
        message = f"ValueError: process_group holds the ranks [{rank % 2}, {rank % 2 + 2}], but the"
        assert error.startswith(message)


def test_sums_of_a_group(answers, llama):
    found = answers["others"]
    ranks = range(len(found["computed"]))
    for rank in ranks:
        ppl = Perplexity()
        for other in (rank // 2 * 2, rank // 2 * 2 + 1):
            worker.add(ppl, other)
        whole = ppl.compute()
        for case in ("computed", "synced"):
            assert found[case][rank] == whole
        texts = ppl.compute(predictions=worker.TEXTS[rank // 2 :], model_id=str(llama))
        assert_equal(found["texts"][rank], texts)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("without sync", "ValueError: process_group goes with sync=True"),
        ("no group", "TypeError: process_group must be one of torch.distributed's process groups"),
        ("part of the logits", "ValueError: The model .* of the 3072 ids of its output layer, and"),
        ("three heads", "ValueError: .* cannot be run by processes that share its layers"),
    ],
)
def test_other_errors(answers, case, message):
    for error in answers["others"][case]:
        assert re.match(message, error)


def test_a_tokenizer_that_one_rank_refuses(answers):
    first, *others = answers["others"]["tokenizer"]
    assert all(error.startswith("TypeError: tokenizer must be a trans") for error in others)
    assert first == f"ConnectionError: Rank 1 failed: {others[0]}"


def test_options_that_one_rank_refuses(answers):
    first, *others = answers["others"]["window"]
    assert all(error.startswith("ValueError: window is 1000000 tokens") for error in others)
    assert first == f"ConnectionError: Rank 1 failed: {others[0]}"


def test_the_group_of_others_is_refused(answers):
    for error in cases_of(answers["others"], "group of others"):
        assert error.startswith("TypeError: process_group must be one of torch.distributed's")


@pytest.mark.parametrize(
    ("num_ranks", "kind"),
    [
        (2, "tensor parallel"),
        (2, "FSDP 1"),
        (2, "FSDP 2"),
        (4, "tensor parallel, two copies"),
    ],
)
def test_a_rank_that_dies_ends_the_others(tmp_path, llama, num_ranks, kind):
    out = tmp_path / "out"
    started = time.monotonic()
    finished = rank_worker.finish(
        [worker.__file__, llama, out, kind], environments(num_ranks), timeout=60
    )
    assert time.monotonic() - started < 60
    assert [status for status, _, _ in finished] == [0] * (num_ranks - 1) + [-signal.SIGKILL]
    for rank in range(num_ranks - 1):
        error = json.loads(out.with_name(f"out.{rank}").read_text())
        assert error.startswith("ConnectionError: Another rank is gone"), error
