"""Checkpoints, bases and adapters that lack weights are refused; what is not needed may lack."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from command_line import run
from other_models import SIZES, make_masked, make_seq2seq, make_tokenizer
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from text_oracles import TINY, config_of, grown, ids_of, plain_nll

from ppleval import Perplexity
from ppleval.models import weights

TEXT = ["Playing a list."]  # shorter than a context
DOWN = "model.layers.1.mlp.down_proj.weight"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def ppl():
    return Perplexity()


def saved(directory, model, tokenizer):
    """The directory that holds both."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def changed(directory, change, file="model.safetensors"):
    """The directory, whose tensors by name `change` changed in place."""
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, {"format": "pt"})
    return directory


@pytest.fixture
def llama(models, tmp_path):
    """A directory of an untied Llama."""
    return saved(tmp_path / "llama", *models["llama"])


@pytest.fixture(scope="module")
def adapted(models, tmp_path_factory):
    """A LoRA directory, that of its base, and the perplexity of TEXT by a plain loop."""
    torch.manual_seed(0)
    model, tokenizer = models["llama"]
    base = saved(tmp_path_factory.mktemp("base"), model, tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapter = tmp_path_factory.mktemp("adapter")
    model = saved_adapter(adapter, model, tokenizer, settings)
    ids = ids_of(tokenizer, TEXT[0])
    return adapter, base, np.exp(np.mean(plain_nll(model, ids, 1, len(ids))))


def saved_adapter(directory, base, tokenizer, settings, **options):
    """The model with a new adapter, whose weights go to the directory."""
    model = get_peft_model(base, settings)
    model.save_pretrained(directory, **options)
    tokenizer.save_pretrained(directory)
    return model


def refusal(ppl, directory, **options):
    """What is said of a model that is not loaded; by any seed, as no random number matters."""
    with pytest.raises(ValueError, match=r"could not be loaded( as a .*)?: ") as caught:
        ppl.compute(predictions=TEXT, model_id=str(directory), device="cpu", **options)
    return str(caught.value)


# Checkpoints


def renamed(tensors):
    tensors["model.layers.1.mlp.up.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")


def cut(tensors):
    tensors[HEAD] = tensors[HEAD][:-72].clone()


@pytest.mark.parametrize("model_kwargs", [None, {"ignore_mismatched_sizes": True}])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop(DOWN), f"1 missing ({DOWN}). "),
        (lambda tensors: tensors.pop(HEAD), f"1 missing ({HEAD}). "),
        (lambda tensors: tensors.pop("model.norm.weight"), "1 missing (model.norm.weight). "),
        (cut, f"1 of another shape ({HEAD} (3000x32, not 3072x32)). "),
        (
            renamed,
            "1 missing (model.layers.1.mlp.up_proj.weight), 1 of names that it does not know "
            "(model.layers.1.mlp.up.weight). ",
        ),
    ],
)
def test_an_incomplete_checkpoint_is_refused_by_name(ppl, llama, change, reason, model_kwargs):
    found = refusal(ppl, changed(llama, change), model_kwargs=model_kwargs)
    assert "its checkpoint does not have all weights of LlamaForCausalLM, and transformers" in found
    assert reason in found
    assert found.endswith("complete it yourself and pass model=.")


def test_names_are_listed_up_to_a_number(ppl, llama):
    found = refusal(ppl, changed(llama, dict.clear))
    assert "21 missing (lm_head.weight, " in found
    assert ", and 16 more). " in found
    assert found.count("\n") == 0


def test_the_bundled_model_without_a_layers_weight(ppl, tmp_path):
    """Under seeds 0 and 1 its perplexity was 57.86 and 57.07; whole it has 63.64."""
    directory = shutil.copytree(TINY, tmp_path / "tiny")
    changed(directory, lambda tensors: tensors.pop("model.layers.3.mlp.down_proj.weight"))
    assert "1 missing (model.layers.3.mlp.down_proj.weight)" in refusal(ppl, directory)


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_checkpoint_of_another_class_is_refused(ppl, tokenizer, tmp_path, kind):
    model = getattr(transformers, kind)(config_of("llama", len(tokenizer)))
    found = refusal(ppl, saved(tmp_path, model, tokenizer))
    assert "1 missing (lm_head.weight)" in found
    assert f"Its configuration says that it was saved as {kind}." in found


def test_a_vision_language_checkpoint_with_other_names(ppl, tokenizer, tmp_path):
    config = transformers.Emu3Config(
        text_config=SIZES
        | {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "pad_token_id": 2},
        vq_config={
            "codebook_size": 8,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "hidden_size": 32,
        },
        vocabulary_map={"<image>": 5},
    )
    model = transformers.Emu3ForConditionalGeneration(config)
    found = refusal(ppl, saved(tmp_path, model, tokenizer))
    assert "all weights of Emu3ForCausalLM" in found
    assert " of names that it does not know (" in found


def test_a_bare_encoder_is_no_masked_model(ppl, tmp_path):
    model, tokenizer = make_masked("bert")
    found = refusal(ppl, saved(tmp_path, model.bert, tokenizer), pseudo="original")
    assert "all weights of BertForMaskedLM" in found
    assert "6 missing (cls.predictions.bias, " in found
    assert "saved as BertModel" in found
    # Loaded as a causal model it is refused, too, and the masked kind is named in a sentence.
    assert 'pass model=. For the pseudo-perplexity of a masked one pass pseudo="' in refusal(
        ppl, tmp_path
    )


def test_an_incomplete_encoder_decoder_is_refused(ppl, tmp_path):
    lost = "decoder.block.1.layer.1.EncDecAttention.v.weight"
    directory = changed(saved(tmp_path, *make_seq2seq("t5")), lambda tensors: tensors.pop(lost))
    assert f"1 missing ({lost})" in refusal(ppl, directory, contexts=TEXT)


def test_an_expert_that_no_probe_reaches_is_refused(ppl, tmp_path):
    """Of two experts one token takes one; a text may take the other."""
    tokenizer = make_tokenizer("t5")
    config = transformers.SwitchTransformersConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        num_experts=2,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    saved(tmp_path / "whole", model, tokenizer)
    for expert in (0, 1):
        lost = f"decoder.block.1.layer.2.mlp.experts.expert_{expert}.wi.weight"
        directory = shutil.copytree(tmp_path / "whole", tmp_path / f"without_{expert}")
        changed(directory, lambda tensors, lost=lost: tensors.pop(lost))
        assert f"1 missing ({lost})" in refusal(ppl, directory, contexts=TEXT)


def test_an_incomplete_base_of_a_comparison_is_refused(ppl, llama):
    changed(llama, lambda tensors: tensors.pop(DOWN))
    with pytest.raises(ValueError, match=rf"base_id=.*1 missing \({DOWN}\)"):
        ppl.compare(TEXT, model_id=TINY, base_id=str(llama), device="cpu")


def test_the_command_line_says_it_and_fails(llama, tmp_path):
    changed(llama, lambda tensors: tensors.pop(DOWN))
    text = tmp_path / "text.txt"
    text.write_text(TEXT[0])
    for arguments in (["--model", llama], ["--base", llama]):
        done = run(*arguments, text)
        assert done.returncode == 1
        assert done.stdout == ""
        assert f"1 missing ({DOWN})" in done.stderr.splitlines()[-1]


# Adapters


def test_an_adapter_over_its_base(ppl, adapted):
    directory, _, expected = adapted
    result = ppl.compute(predictions=TEXT, model_id=str(directory), device="cpu")
    assert result["perplexity"] == pytest.approx(expected, rel=2e-5)


def test_an_adapter_beside_its_base(ppl, adapted, tmp_path):
    adapter, base, expected = adapted
    both = shutil.copytree(base, tmp_path / "both")
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    result = ppl.compute(predictions=TEXT, model_id=str(both), device="cpu")
    assert result["perplexity"] == pytest.approx(expected, rel=2e-5)
    changed(both, lambda tensors: tensors.pop(DOWN))
    assert f"the base of its adapter, {both}, does not have all" in refusal(ppl, both)


def test_an_adapter_with_tensors_of_other_names(ppl, adapted, tmp_path):
    """It gave exactly the numbers of its base."""
    directory = shutil.copytree(adapted[0], tmp_path / "adapter")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("lora_", "low_rank_")] = tensors.pop(name)

    found = refusal(ppl, changed(directory, rename, "adapter_model.safetensors"))
    assert "its adapter does not have all weights of LlamaForCausalLM" in found
    assert "8 missing (model.layers.0.self_attn.q_proj.lora_A.default.weight, " in found
    assert "8 of names that it does not know (model.layers.0.self_attn.q_proj.low_rank_A" in found


def test_an_adapter_of_another_rank(ppl, adapted, tmp_path):
    directory = shutil.copytree(adapted[0], tmp_path / "adapter")
    settings = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(settings | {"r": 4}))
    assert "q_proj.lora_A.default.weight (2x32, not 4x32)" in refusal(ppl, directory)


def test_an_adapter_over_an_incomplete_base(ppl, adapted, tmp_path):
    adapter, base, _ = adapted
    base = changed(shutil.copytree(base, tmp_path / "base"), lambda tensors: tensors.pop(DOWN))
    adapter = shutil.copytree(adapter, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    found = refusal(ppl, adapter)
    assert f"the base of its adapter, {base}, does not have all" in found
    assert f"1 missing ({DOWN})" in found
    settings["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert "base_model_name_or_path in its adapter_config.json names no base" in refusal(
        ppl, adapter
    )


def with_a_fox(base, directory, settings, **options):
    """A directory of an adapter whose base was given one more token: (its model, its tokenizer)."""
    base = transformers.AutoModelForCausalLM.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["fox"])
    base.resize_token_embeddings(len(tokenizer))
    settings = {"r": 2, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings
    model = saved_adapter(directory, base, tokenizer, LoraConfig(**settings), **options)
    return model, tokenizer


FOX = ["Return the fox of a list."]
WHOLE = ["embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("settings", "saves_embeddings"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": WHOLE}, False),
    ],
    ids=["embeddings", "modules_to_save"],
)
def test_an_adapter_with_the_weights_of_added_tokens(
    ppl, adapted, tmp_path, settings, saves_embeddings
):
    """It has the numbers of the model that was trained, as AutoPeftModelForCausalLM has."""
    model, tokenizer = with_a_fox(
        adapted[1], tmp_path, settings, save_embedding_layers=saves_embeddings
    )
    by_name = ppl.compute(predictions=FOX, model_id=str(tmp_path), device="cpu")["perplexity"]
    for other in (model, AutoPeftModelForCausalLM.from_pretrained(tmp_path)):
        expected = ppl.compute(predictions=FOX, model=other, tokenizer=tokenizer)["perplexity"]
        assert by_name == pytest.approx(expected, rel=2e-5)


def test_an_adapter_of_added_tokens_over_tied_embeddings(ppl, models, tmp_path):
    model, tokenizer = models["gemma"]
    base = saved(tmp_path / "base", model, tokenizer)
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [len(tokenizer)]}
    adapter = tmp_path / "adapter"
    model, tokenizer = with_a_fox(base, adapter, settings, save_embedding_layers=False)
    by_name = ppl.compute(predictions=FOX, model_id=str(adapter), device="cpu")["perplexity"]
    expected = ppl.compute(predictions=FOX, model=model, tokenizer=tokenizer)["perplexity"]
    assert by_name == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    ("settings", "saves_embeddings", "lost"),
    [
        ({"target_modules": ["embed_tokens"]}, False, "embeddings and rows of the output layer"),
        ({"target_modules": ["embed_tokens"]}, True, "rows of the output layer"),
        ({"trainable_token_indices": [3072]}, False, "rows of the output layer"),
    ],
)
def test_an_adapter_without_weights_of_added_tokens(
    ppl, adapted, tmp_path, settings, saves_embeddings, lost
):
    """PEFT makes them up."""
    with_a_fox(adapted[1], tmp_path, settings, save_embedding_layers=saves_embeddings)
    reason = "its tokenizer has id 3072, which its base has not, and the adapter does not hold"
    assert f"{reason} their {lost}; PEFT would make them up." in refusal(ppl, tmp_path)


def test_an_adapter_without_its_tokenizer_has_that_of_its_base(ppl, adapted, tmp_path):
    adapter = shutil.copytree(adapted[0], tmp_path / "adapter")
    for file in adapter.glob("*token*"):
        file.unlink()
    result = ppl.compute(predictions=TEXT, model_id=str(adapter), device="cpu")
    assert result["perplexity"] == pytest.approx(adapted[2], rel=2e-5)


def test_an_adapter_whose_base_is_gone(ppl, adapted, tmp_path):
    adapter = shutil.copytree(adapted[0], tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    found = refusal(ppl, adapter)
    assert f"it is an adapter, and its base is gone: there is no directory {tmp_path}/gone" in found
    assert "as base_model_name_or_path" in found
    (adapter / "adapter_config.json").write_text("{")
    assert f"{adapter / 'adapter_config.json'} is not valid JSON: " in refusal(ppl, adapter)


def test_an_adapter_of_an_encoder_decoder(ppl, tmp_path):
    model, tokenizer = make_seq2seq("t5")
    base = saved(tmp_path / "base", model, tokenizer)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(base)
    settings = LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
    adapter = tmp_path / "adapter"
    model = saved_adapter(adapter, model, tokenizer, settings)
    by_name = ppl.compute(predictions=TEXT, contexts=TEXT, model_id=str(adapter), device="cpu")[
        "perplexity"
    ]
    expected = ppl.compute(
        predictions=TEXT, contexts=TEXT, model=model.base_model.model, tokenizer=tokenizer
    )["perplexity"]
    assert by_name == pytest.approx(expected, rel=2e-5)
    for file in adapter.glob("*token*"):
        file.unlink()
    again = ppl.compute(predictions=TEXT, contexts=TEXT, model_id=str(adapter), device="cpu")
    assert again["perplexity"] == by_name
    changed(base, lambda tensors: tensors.pop("encoder.final_layer_norm.weight"))
    assert "encoder.final_layer_norm.weight" in refusal(ppl, adapter, contexts=TEXT)


def test_an_adapter_that_would_not_be_loaded(ppl, adapted, tmp_path, monkeypatch):
    on_disk = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path)}
    with pytest.raises(ValueError, match="its adapter cannot be on disk"):
        ppl.compute(predictions=TEXT, model_id=str(adapted[0]), model_kwargs=on_disk)
    monkeypatch.setattr(weights, "is_peft_available", lambda: False)
    assert "it is an adapter, which needs PEFT: pip install peft" in refusal(ppl, adapted[0])


# What may be absent


def assert_loads(ppl, directory, model, tokenizer, **options):
    """With the numbers of the model."""
    by_name = ppl.compute(predictions=TEXT, model_id=str(directory), device="cpu", **options)
    expected = ppl.compute(predictions=TEXT, model=model, tokenizer=tokenizer, **options)
    assert by_name["perplexities"] == expected["perplexities"]


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_a_tied_output_layer(ppl, models, tmp_path, name):
    directory = saved(tmp_path, *models[name])
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    assert_loads(ppl, directory, *models[name])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_tied_embeddings_and_the_bias_of_an_encoder_decoder(ppl, tmp_path, name):
    model, tokenizer = make_seq2seq(name)
    directory = saved(tmp_path, model, tokenizer)
    changed(directory, lambda tensors: tensors.pop("final_logits_bias", None))
    assert_loads(ppl, directory, model, tokenizer, contexts=TEXT)


POSITIONS = [f"model.{part}.embed_positions.weight" for part in ("encoder", "decoder")]


def test_sinusoidal_positions_are_computed(ppl, tmp_path):
    """Pegasus' own checkpoints lack them."""
    tokenizer = make_tokenizer("t5")
    torch.manual_seed(0)
    ids: dict = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    config = transformers.PegasusConfig(
        **ids,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        forced_eos_token_id=None,
    )
    model = grown(transformers.PegasusForConditionalGeneration(config))
    for part in (model.model.encoder, model.model.decoder):  # as they are before they grow
        part.embed_positions.weight.data.div_(4)
    saved(tmp_path, model, tokenizer)
    changed(tmp_path, lambda tensors: [tensors.pop(name) for name in POSITIONS])
    assert_loads(ppl, tmp_path, model, tokenizer, contexts=TEXT)
    lost = "model.decoder.layernorm_embedding.weight", "model.decoder.layer_norm.weight"
    changed(tmp_path, lambda tensors: [tensors.pop(name, None) for name in lost])
    assert lost[1] in refusal(ppl, tmp_path, contexts=TEXT)


def test_a_pooler_that_changes_no_logits(ppl, tmp_path):
    tokenizer = make_tokenizer("bert")
    torch.manual_seed(0)
    sizes: dict = SIZES | {"vocab_size": len(tokenizer), "embedding_size": 32}
    config = transformers.SqueezeBertConfig(**sizes)
    model = grown(transformers.SqueezeBertForMaskedLM(config))
    saved(tmp_path, model, tokenizer)
    pooler = [f"transformer.pooler.dense.{name}" for name in ("weight", "bias")]
    changed(tmp_path, lambda tensors: [tensors.pop(name) for name in pooler])
    assert_loads(ppl, tmp_path, model, tokenizer, pseudo="original")
    changed(tmp_path, lambda tensors: tensors.pop("transformer.embeddings.LayerNorm.bias"))
    assert "transformer.embeddings.LayerNorm.bias" in refusal(ppl, tmp_path, pseudo="original")


def test_what_is_tried_is_put_back(models):
    """NaN stands in the weights meanwhile."""
    model = models["llama"][0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not weights._are_idle(model, [HEAD])
    assert not weights._are_idle(model, [DOWN])
    assert not weights._is_computed(model, DOWN)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("device_map", ["cpu", {"": "disk"}])
def test_a_placed_model(ppl, llama, models, tmp_path, device_map):
    placed = {"device_map": device_map, "offload_folder": str(tmp_path)}
    result = ppl.compute(predictions=TEXT, model_id=str(llama), model_kwargs=placed)
    model, tokenizer = models["llama"]
    expected = ppl.compute(predictions=TEXT, model=model, tokenizer=tokenizer)
    assert result["perplexity"] == pytest.approx(expected["perplexity"], rel=2e-5)
    changed(llama, lambda tensors: tensors.pop(DOWN))
    with pytest.raises(ValueError, match=rf"1 missing \({DOWN}\)"):
        ppl.compute(predictions=TEXT, model_id=str(llama), model_kwargs=placed)


def configured(directory, **entries):
    """The directory, with these entries in its config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return directory


KERNELS = {
    "attention": {"attn_implementation": "someone/kernel"},
    "private": {"_attn_implementation": "someone/kernel@main:forward"},
    "of a part": {"text_config": {"_attn_implementation": {"": "paged|someone/kernel"}}},
    "experts": {"experts_implementation": "someone/kernel"},
}


@pytest.mark.parametrize("entries", KERNELS.values(), ids=KERNELS)
def test_a_kernel_that_a_checkpoint_names_needs_trust(ppl, llama, entries, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.get_kernel", lambda *args, **_: asked.append(args)
    )
    monkeypatch.setattr("transformers.integrations.hub_kernels.is_kernels_available", lambda: True)
    configured(llama, **entries)
    with pytest.raises(ValueError, match="someone/kernel.*, a kernel on the Hub, which is code"):
        ppl.compute(predictions=TEXT, model_id=str(llama))
    assert asked == []


def test_a_kernel_of_an_adapters_base_needs_trust(ppl, adapted, tmp_path):
    adapter, base, _ = adapted
    configured(shutil.copytree(base, tmp_path / "base"), attn_implementation="someone/kernel")
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    settings = json.loads((copy / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "base")
    (copy / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="someone/kernel, a kernel on the Hub"):
        ppl.compute(predictions=TEXT, model_id=str(copy))


def test_an_implementation_of_transformers_itself_needs_no_trust(ppl, llama):
    expected = ppl.compute(predictions=TEXT, model_id=str(llama))["perplexity"]
    configured(llama, attn_implementation="eager")
    found = ppl.compute(predictions=TEXT, model_id=str(llama))["perplexity"]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["above", "absolute", "link"])
def test_weights_lie_in_the_directory_of_their_index(ppl, llama, kind):
    expected = ppl.compute(predictions=TEXT, model_id=str(llama))["perplexity"]
    outside = (llama / "model.safetensors").rename(llama.parent / "outside.safetensors")
    file = {"above": "../outside.safetensors", "absolute": str(outside), "link": "a.safetensors"}
    names = dict.fromkeys(load_file(outside), file[kind])
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    if kind == "link":  # as in the Hub's cache
        (llama / "a.safetensors").symlink_to(outside)
        found = ppl.compute(predictions=TEXT, model_id=str(llama))["perplexity"]
        assert found == pytest.approx(expected, rel=1e-6)
    else:
        match = "model.safetensors.index.json leads out of its directory, to .*outside"
        with pytest.raises(ValueError, match=match):
            ppl.compute(predictions=TEXT, model_id=str(llama))
