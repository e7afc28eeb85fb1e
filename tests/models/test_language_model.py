"""A model, or a directory, that is not what it was: nothing is scored from memory."""

import concurrent.futures
import json
import logging
import multiprocessing
import re
import shutil
import sys
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from other_models import make_seq2seq
from text_oracles import (
    NAMES,
    TEXTS,
    TINY,
    assert_equals,
    config_of,
    expected_result,
    grown,
)
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppleval import Perplexity
from ppleval.cli.main import main
from ppleval.models import identity as models_identity


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


def test_an_attribute_of_the_model_that_changed(ppl, tokenizer):
    config = transformers.CohereConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=24,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    call = {"predictions": TEXTS, "model": model, "tokenizer": tokenizer}
    before = ppl.compute(**call)
    model.logit_scale = 3.0
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
    after, expected = ppl.compute(**call), Perplexity().compute(**call)
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
    assert parts(Perplexity(), model=model, tokenizer=tokenizer) == from_disk
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


def other_merges(tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"][:2] = state["model"]["merges"][1::-1]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<|bos|>"
    )


def test_tokenizers_of_one_vocabulary_are_told_apart():
    tokenizer_id = models_identity.tokenizer_id
    plain, split = AutoTokenizer.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    split.split_special_tokens = True
    other = other_merges(AutoTokenizer.from_pretrained(TINY))
    same = AutoTokenizer.from_pretrained(TINY)
    assert tokenizer_id(plain) == tokenizer_id(same)
    assert len({tokenizer_id(t) for t in (plain, split, other)}) == 3


def test_the_configuration_counts_for_the_signature(ppl, tokenizer):
    model = fresh("gemma", tokenizer)
    call = {"predictions": TEXTS, "model": model, "tokenizer": tokenizer}
    before = ppl.compute(**call)["signature"]
    model.config.final_logit_softcapping = 9.0
    assert ppl.compute(**call)["signature"] != before


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_weights_of_every_kind_have_an_identity(tokenizer):
    """None is copied, or read whole."""
    weights_id = models_identity.weights_id
    model = fresh("llama", tokenizer)
    first = weights_id(model)
    for value in (
        torch.eye(4).to_sparse(),
        torch.eye(4).to_sparse_csr(),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.tensor(1.0),
        torch.empty(0, 3),
        torch.empty(3, device="meta"),
    ):
        model.register_buffer("extra", value)
        assert weights_id(model) != first
    model.extra = torch.zeros(4096, 8).t()  # not contiguous
    assert weights_id(model) != first
    assert weights_id(model) == weights_id(model)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_packed_weights_count(tokenizer):
    weights_id = models_identity.weights_id
    found = set()
    for factor in (1.0, 1.1):
        model = fresh("llama", tokenizer)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0].mul_(100 * factor)
        packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        found.add(weights_id(packed))
    assert len(found) == 2


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


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The directories of a LoRA adapter and of its base."""
    base = shutil.copytree(TINY, tmp_path_factory.mktemp("adapter") / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(
        base.parent / "adapter"
    )
    return base.parent / "adapter", base


def with_adapter(adapter, name="default"):
    directory, base = adapter
    model = AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, directory, adapter_name=name)


def parts_of(ppl, **how):
    """The perplexity, and the parts of the signature."""
    result = ppl.compute(predictions=TEXTS, **how)
    found = re.findall(r"\|(\w+):(.*?)(?=\|\w+:|$)", "|" + result["signature"])
    return result["perplexity"], dict(found)


def test_each_state_of_an_adapter_has_a_signature_of_its_own(ppl, adapter, tokenizer):
    model = with_adapter(adapter)
    call = {"model": model, "tokenizer": tokenizer}
    on = parts_of(ppl, **call)
    with model.disable_adapter():
        off = parts_of(ppl, **call)
    assert parts_of(ppl, **call) == on
    layer: Any = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    layer.scaling["default"] *= 2
    scaled = parts_of(ppl, **call)
    layer.scaling["default"] /= 2
    assert parts_of(ppl, **call) == on
    model.merge_adapter()
    merged = parts_of(ppl, **call)
    assert merged[0] == pytest.approx(on[0], rel=1e-5)
    assert len({perplexity for perplexity, _ in (on, off, scaled)}) == 3
    assert len({parts["weights"] for _, parts in (on, off, scaled, merged)}) == 4


def test_an_adapter_is_one_model_however_it_was_loaded(ppl, adapter, tokenizer):
    directory, base = adapter
    found = [
        parts_of(ppl, model_id=str(directory), tokenizer=tokenizer),
        parts_of(ppl, model=with_adapter(adapter), tokenizer=tokenizer),
        parts_of(ppl, model=with_adapter(adapter, "mine"), tokenizer=tokenizer),
    ]
    assert [parts.pop("model") for _, parts in found] == [
        str(directory),
        f"{base}+default",
        f"{base}+mine",
    ]
    assert found[1:] == found[:1] * 2


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_weights_that_were_quantised_in_memory_are_named(ppl, tokenizer, dtype):
    model = AutoModelForCausalLM.from_pretrained(TINY)
    packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=dtype)
    _, parts = parts_of(ppl, model=packed, tokenizer=tokenizer)
    assert parts["quantization"] == "DynamicQuantizedLinear"


class EightBits(torch.Tensor):
    """A weight in the form of torchao's, which is not installed where tests run."""

    @staticmethod
    def __new__(cls, packed, activations):
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)

    def __init__(self, packed, activations):
        self.packed, self.activations = packed, activations

    def __tensor_flatten__(self):
        return ["packed"], {"activations": self.activations, "device": self.device}

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default  # as nn.Parameter does
        return cls(args[0].packed, args[0].activations)


def test_weights_of_a_class_of_their_own_are_named(tokenizer):
    identity = models_identity
    found = set()
    for activations in (None, "int8"):
        model = fresh("llama", tokenizer)
        packed = torch.ones(64, 32, dtype=torch.int8)
        weight = nn.Parameter(EightBits(packed, activations), requires_grad=False)
        model.model.layers[0].mlp.up_proj.weight = weight
        assert identity.quantization_name(model) == "EightBits"
        found.add(identity.weights_id(model))
    assert len(found) == 2


STATES = {
    "a hook": CHANGES["a hook on the model"],
    "a forward of its own": patch_forward,
    "another activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.ReLU()),
    "a number of a module": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.9),
    "rounded rotary frequencies": lambda model: model.model.rotary_emb.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", STATES)
def test_what_takes_part_in_a_forward_pass_is_in_the_signature(ppl, tokenizer, change):
    call = {"model": AutoModelForCausalLM.from_pretrained(TINY), "tokenizer": tokenizer}
    before, parts = parts_of(ppl, **call)
    STATES[change](call["model"])
    after, changed = parts_of(ppl, **call)
    assert after != before
    assert {name for name in parts if parts[name] != changed[name]} == {"weights"}


def model_of_family(name):
    """(model, what it is called with for so many ids)"""
    if name == "m2m100":
        model, _ = make_seq2seq(name)
        return model, lambda ids: {"input_ids": ids, "decoder_input_ids": ids}
    config = config_of(name.partition(":")[0], 64)
    if name == "llama:dynamic":
        config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    torch.manual_seed(0)
    return grown(AutoModelForCausalLM.from_config(config)), lambda ids: {"input_ids": ids}


@pytest.mark.parametrize("name", [*NAMES, "llama:dynamic", "m2m100"])
def test_passes_training_and_loading_leave_the_identity(name, tmp_path):
    """Caches of positions grow, and gradients may be asked for; the model stays what it is."""
    weights_id = models_identity.weights_id
    model, inputs = model_of_family(name)
    before = weights_id(model)
    for length in (8, 20, 9, 40 if ":" in name or name == "m2m100" else 10):
        with torch.no_grad():
            model(**inputs(torch.arange(length)[None]), output_hidden_states=True)
        assert weights_id(model) == before
    model.save_pretrained(tmp_path)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    assert weights_id(model) == before
    for place in ({}, {"device_map": {"": "cpu"}}):
        assert weights_id(type(model).from_pretrained(tmp_path, **place)) == before


def test_an_adapter_whose_base_was_rewritten_is_loaded_anew(ppl, adapter, tokenizer, tmp_path):
    base = shutil.copytree(adapter[1], tmp_path / "base")
    directory = shutil.copytree(adapter[0], tmp_path / "adapter")
    settings = json.loads((directory / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    call = {"predictions": TEXTS, "model_id": str(directory), "tokenizer": tokenizer}
    before = ppl.compute(**call)
    assert ppl.compute(**call) == before
    rewrite_weights(base)
    after, expected = ppl.compute(**call), Perplexity().compute(**call)
    assert after == expected
    assert after["perplexity"] != before["perplexity"]


def test_shards_in_a_folder_of_their_own_that_were_rewritten(ppl, directory, tokenizer):
    weights, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    names = list(AutoModelForCausalLM.from_pretrained(directory).state_dict())
    (directory / "shards").mkdir()
    shard = weights.rename(directory / "shards" / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(names, f"shards/{shard.name}")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    call = {"predictions": TEXTS, "model_id": str(directory)}
    before = ppl.compute(**call)
    other = AutoModelForCausalLM.from_pretrained(TINY)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    safetensors.torch.save_model(other, str(shard), metadata={"format": "pt"})
    after, expected = ppl.compute(**call), Perplexity().compute(**call)
    assert after == expected
    assert after["perplexity"] != before["perplexity"]


def test_a_run_is_not_resumed_with_other_weights(directory, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("One.\nTwo.\nThree.")
    command = ["compute", "--model", str(directory), "--lines", str(text)]
    command += ["--per-text", str(tmp_path / "out.jsonl"), "--resume"]
    assert main(command) == 0
    rewrite_weights(directory)
    assert main(command) == 1
    assert "is of a run with other settings" in capsys.readouterr().err


def in_threads(*functions):
    """Run at once, with many switches between them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
            return [done.result() for done in [pool.submit(each) for each in functions]]
    finally:
        sys.setswitchinterval(interval)


def test_two_threads_with_two_models_and_one_metric(ppl, tokenizer):
    models = [fresh("llama", tokenizer), fresh("gpt2", tokenizer)]
    text = ["Return the number of items."]
    expected = [
        Perplexity().compute(predictions=text, model=model, tokenizer=tokenizer)["perplexity"]
        for model in models
    ]

    def repeat(model):
        return {
            ppl.compute(predictions=text, model=model, tokenizer=tokenizer)["perplexity"]
            for _ in range(60)
        }

    found = in_threads(*(lambda model=model: repeat(model) for model in models * 2))
    assert found == [{value} for value in expected * 2]


def test_the_model_of_the_user_runs_on_in_another_thread(ppl, tokenizer):
    model = fresh("llama", tokenizer)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        right = model(ids).logits
    text = ["Return the number of items. " * 3]
    call = {"predictions": text, "model": model, "tokenizer": tokenizer}
    expected = ppl.compute(**call)["perplexity"]

    def forward():
        with torch.no_grad():
            return all(torch.equal(model(ids).logits, right) for _ in range(150))

    def compute():
        return {ppl.compute(**call)["perplexity"] for _ in range(40)} == {expected}

    assert in_threads(forward, compute, forward) == [True, True, True]


def test_a_tokenizer_is_left_as_it_was_and_serves_two_threads(ppl, tokenizer):
    model = fresh("llama", tokenizer)
    call = {"model": model, "tokenizer": tokenizer}
    encoders = [
        ppl.text_scorer(**call, **more).encoder
        for more in ({}, {"preset": "llama.cpp", "window": 8})
    ]
    backend = tokenizer.backend_tokenizer
    spelt = backend.encode("<|bos|>").ids
    texts = ["Return <|bos|> the list. " * 20]
    expected = [encoder.encode(texts, None)[0].ids for encoder in encoders]
    assert expected[0] != expected[1]
    assert backend.encode("<|bos|>").ids == spelt
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level

    def repeat(encoder, ids):
        return all(encoder.encode(texts, None)[0].ids == ids for _ in range(200))

    work = zip(encoders * 2, expected * 2, strict=True)
    assert all(in_threads(*(lambda pair=pair: repeat(*pair) for pair in work)))
    assert logger.level == level


def compute_in_child(queue):
    queue.put(Perplexity().compute(predictions=TEXTS, model_id=TINY)["perplexity"])


def test_texts_in_a_forked_child_of_a_parent_with_threads(ppl):
    expected = ppl.compute(predictions=TEXTS, model_id=TINY)["perplexity"]
    threads = torch.get_num_threads()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    # Several, since one in eight met transformers' loading threads with a pool of its parent.
    children = [context.Process(target=compute_in_child, args=(queue,)) for _ in range(4)]
    try:
        torch.set_num_threads(2)
        torch.ones(1000, 1000).mm(torch.ones(1000, 1000))  # starts the pool
        for child in children:
            child.start()
        found = [queue.get(timeout=120) for _ in children]
        assert found == pytest.approx([expected] * 4, rel=1e-6)
    finally:
        torch.set_num_threads(threads)
        for child in children:
            child.kill()
            child.join()
