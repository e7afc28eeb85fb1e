"""The output layer is used where it gives the model's own logits, and only there."""

import logging

import pytest
import torch
import transformers
from conftest import sibling
from text_oracles import (
    CONTEXT,
    TEXTS,
    TINY,
    assert_equals,
    config_of,
    expected_result,
    ids_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer


class Halved(transformers.LlamaForCausalLM):
    """It changes its logits, and its configuration does not say so."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


def with_changed_logits(name, vocab_size):
    if name == "halved":
        return Halved(config_of("llama", vocab_size))
    if name in ("llama", "gemma"):
        config = config_of(name, vocab_size)
        # With the usual small initial weights soft-capping is below any rounding error.
        config.initializer_range = 0.02
        config.final_logit_softcapping = 30.0
        return AutoModelForCausalLM.from_config(config)
    shape = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    shape |= {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"max_position_embeddings": CONTEXT}
    if name == "cohere":
        config = transformers.CohereConfig(**shape, logit_scale=0.0625, initializer_range=0.5)
    else:
        config = transformers.GraniteConfig(**shape, logits_scaling=8.0, initializer_range=0.5)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["llama", "gemma", "cohere", "granite", "halved"])
def test_models_that_change_their_logits(ppl, name, caplog):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = with_changed_logits(name, len(tokenizer)).eval()
    with caplog.at_level(logging.WARNING):
        result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
        score = ppl.score(TEXTS, model=model, tokenizer=tokenizer, top_k=3)
    assert_equals(result, expected_result(model, tokenizer, TEXTS))
    for text in score:  # the likeliest are on the scale of the others
        for nll, rank, expected in zip(text.nll, text.ranks, text.expected, strict=True):
            if 0 < rank <= 3:
                assert nll == pytest.approx(expected[rank - 1][1], abs=1e-4)
    # What the configuration states needs no logits of whole batches.
    assert ("are not those of its output layer" in caplog.text) == (name == "halved")


@pytest.mark.parametrize(
    "stated",
    [
        {"logit_scale": "inv_sqrt_d_model"},  # MPT's, which transformers does not read
        {"logit_scale": [1.0]},
        {"final_logit_softcapping": 0.0},
        {"logit_scale": -1.0},
    ],
    ids=str,
)
def test_what_a_configuration_states_may_be_anything(ppl, stated):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_config(config_of("llama", len(tokenizer))).eval()
    for name, value in stated.items():
        setattr(model.config, name, value)
    result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert_equals(result, expected_result(model, tokenizer, TEXTS))


def test_logits_of_a_bfloat16_model_are_not_rounded(ppl, models):
    config = config_of("llama", len(models["llama"][1]))
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    tokenizer = models["llama"][1]
    (score,) = ppl.score([TEXTS[5]], model=model, tokenizer=tokenizer, add_start_token=False)
    ids = ids_of(tokenizer, TEXTS[5], start=False)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids[:-1]])).last_hidden_state[0]
        logits = hidden.double() @ model.lm_head.weight.double().t()
        rounded = model.lm_head(hidden)
    targets = torch.tensor(ids[1:])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert score.nll[1:] == pytest.approx(expected.tolist(), abs=1e-4)
    worse = torch.nn.functional.cross_entropy(rounded.double(), targets, reduction="none")
    assert (worse - expected).abs().max() > 1e-3


def test_logits_never_exist_for_a_whole_batch(ppl, models, monkeypatch):
    """The output layer gives one tile at a time, and only of the rows that are scored."""
    monkeypatch.setattr(sibling("nll_tiles"), "TILE_ELEMENTS", 3072 * 5)
    model, tokenizer = models["llama"]
    sizes = []
    original = torch.mm

    def counted(a, b, **kwargs):
        sizes.append(len(a) * b.shape[1])
        return original(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert max(sizes) <= 3072 * 5
    assert sum(sizes) == result["num_tokens"] * model.config.vocab_size


def test_an_output_layer_that_is_not_plain(ppl, models):
    """Such as one of PEFT or of a quantised model: it is called, not multiplied with."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden) * 1.5

    model, tokenizer = models["llama"]
    plain = model.get_output_embeddings()
    model.set_output_embeddings(Wrapped(plain))
    try:
        result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
        assert_equals(result, expected_result(model, tokenizer, TEXTS))
    finally:
        model.set_output_embeddings(plain)


def test_an_output_layer_with_hooks(ppl, models):
    model, tokenizer = models["llama"]
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    try:
        result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
        assert_equals(result, expected_result(model, tokenizer, TEXTS))
    finally:
        handle.remove()
