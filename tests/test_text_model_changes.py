"""A model, or a directory, that is not what it was: nothing is scored from memory."""

import multiprocessing
import re
import shutil

import pytest
import torch
from conftest import load
from text_oracles import (
    TEXTS,
    TINY,
    assert_equals,
    config_of,
    expected_result,
    grown,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def fresh(name, tokenizer):
    torch.manual_seed(0)
    return grown(AutoModelForCausalLM.from_config(config_of(name, len(tokenizer))))


def halve(module, args, output):
    output.logits = output.logits * 0.5
    return output


def patch_forward(model):
    original = model.forward

    def forward(*args, **kwargs):
        return halve(None, None, original(*args, **kwargs))

    model.forward = forward


CHANGES = {
    "a hook on the model": lambda model: model.register_forward_hook(halve),
    "a hook on its layer": lambda model: model.lm_head.register_forward_hook(
        lambda module, args, output: output * 0.5
    ),
    "a forward of its own": patch_forward,
    "a cap in the configuration": lambda model: setattr(
        model.config, "final_logit_softcapping", 0.5
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_between_two_calls(ppl, tokenizer, change):
    model = fresh("gemma", tokenizer)
    call = {"predictions": TEXTS, "model": model, "tokenizer": tokenizer}
    before = ppl.compute(**call)
    CHANGES[change](model)
    after = ppl.compute(**call)
    assert after["perplexity"] != pytest.approx(before["perplexity"], rel=1e-2)
    assert_equals(after, expected_result(model, tokenizer, TEXTS))


@pytest.mark.parametrize("first", [True, False])
def test_a_hook_on_all_modules_is_not_missed(ppl, tokenizer, first):
    model = fresh("llama", tokenizer)
    call = {"predictions": TEXTS, "model": model, "tokenizer": tokenizer}
    if not first:
        ppl.compute(**call)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 0.5 if module is model.lm_head else None
    )
    try:
        assert_equals(ppl.compute(**call), expected_result(model, tokenizer, TEXTS))
    finally:
        handle.remove()


@pytest.fixture
def directory(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


def rewrite_weights(directory, change=lambda weight: weight.mul_(1.5)):
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        change(model.lm_head.weight)
    model.save_pretrained(directory)


def test_weights_rewritten_in_their_directory_are_loaded_anew(ppl, directory):
    call = {"predictions": TEXTS, "model_id": str(directory)}
    before = ppl.compute(**call)
    rewrite_weights(directory)
    after, expected = ppl.compute(**call), load().compute(**call)
    assert after == expected
    assert after["perplexity"] != before["perplexity"]
    assert after["signature"] != before["signature"]


def test_the_signature_tells_checkpoints_apart_and_nothing_else(ppl, directory, tokenizer):
    def parts(metric=ppl, **how):
        signature = metric.compute(predictions=TEXTS, **how)["signature"]
        return dict(re.findall(r"\|(\w+):(.*?)(?=\|\w+:|$)", signature))

    from_disk = parts(model_id=str(directory))
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert parts(model=model, tokenizer=tokenizer) == from_disk
    tokenizer(TEXTS, padding=True)  # leaves its padding switched on
    assert parts(load(), model=model, tokenizer=tokenizer) == from_disk
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1e-3)  # as a step of training would
    trained = parts(model=model, tokenizer=tokenizer)
    assert {name for name in trained if trained[name] != from_disk[name]} == {"weights"}
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert parts(model=model, tokenizer=tokenizer)["quantization"] == "gptq"
    other = AutoTokenizer.from_pretrained(TINY)
    other.add_tokens(["zebra"])
    model.resize_token_embeddings(len(other))
    assert parts(model=model, tokenizer=other)["tokenizer"] != from_disk["tokenizer"]


def test_buffers_that_are_stored_count_as_weights(ppl, tokenizer):
    model = fresh("llama", tokenizer)
    model.register_buffer("packed", torch.zeros(8, dtype=torch.int32))
    model.register_buffer("scratch", torch.zeros(8), persistent=False)
    call = {"predictions": TEXTS, "model": model, "tokenizer": tokenizer}
    first = ppl.compute(**call)["signature"]
    model.scratch.fill_(1.0)
    assert ppl.compute(**call)["signature"] == first
    model.packed.fill_(1)
    assert ppl.compute(**call)["signature"] != first


def test_a_run_is_not_resumed_with_other_weights(directory, tmp_path, capsys):
    from test_cli import cli

    text = tmp_path / "text.txt"
    text.write_text("One.\nTwo.\nThree.")
    command = ["--model", str(directory), "--lines", str(text)]
    command += ["--per-text", str(tmp_path / "out.jsonl"), "--resume"]
    assert cli.main(command) == 0
    rewrite_weights(directory)
    assert cli.main(command) == 1
    assert "is of a run with other settings" in capsys.readouterr().err


def compute_in_child(queue):
    queue.put(load().compute(predictions=TEXTS, model_id=TINY)["perplexity"])


def test_texts_in_a_forked_child_of_a_parent_with_threads(ppl):
    expected = ppl.compute(predictions=TEXTS, model_id=TINY)["perplexity"]
    threads = torch.get_num_threads()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    try:
        torch.set_num_threads(2)
        torch.ones(1000, 1000).mm(torch.ones(1000, 1000))  # starts the pool
        child = context.Process(target=compute_in_child, args=(queue,))
        child.start()
        assert queue.get(timeout=120) == pytest.approx(expected, rel=1e-6)
    finally:
        torch.set_num_threads(threads)
        child.kill()
        child.join()
