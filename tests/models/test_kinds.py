"""Kinds of models: rotary factors by length, padding, positions, quantised layers, and refusals."""

import logging

import numpy as np
import pytest
import torch
import transformers
from text_oracles import (
    CONTEXT,
    TEXTS,
    assert_equals,
    config_of,
    expected_result,
    grown,
    ids_of,
    plain_nll,
    window_nll,
)
from torch import nn
from transformers import AutoModelForCausalLM

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
PAD = 2  # of the tokenizer


def assert_equals_the_loop(ppl, model, tokenizer, context, texts=TEXTS, **options):
    for batch_size in (None, 1, 2):
        scores = ppl.score(texts, model=model, tokenizer=tokenizer, batch_size=batch_size)
        for text, score in zip(texts, scores, strict=True):
            ids = ids_of(tokenizer, text)
            expected = window_nll(model, ids, context, context // 2, **options)
            assert score.nll == pytest.approx(expected, rel=2e-5, abs=2e-5)


# What depends on the length of a batch


def longrope_config(vocab_size, original):
    dims = SMALL["hidden_size"] // SMALL["num_attention_heads"] // 2
    return transformers.Phi3Config(
        **SMALL,
        vocab_size=vocab_size,
        pad_token_id=PAD,
        max_position_embeddings=64,
        original_max_position_embeddings=original,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * dims,
            "long_factor": [8.0] * dims,
            "original_max_position_embeddings": original,
        },
    )


# 16 is between the lengths of the probe, which then sees that rows depend on each other; 30 and 5
# are not, as in real models.
@pytest.mark.parametrize("original", [30, 16, 5])
def test_short_and_long_texts_do_not_share_rotary_factors(ppl, tokenizer, original):
    torch.manual_seed(0)
    model = grown(AutoModelForCausalLM.from_config(longrope_config(len(tokenizer), original)))
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer)
    assert scorer.model.takes_batches == (original != 16)
    assert_equals_the_loop(ppl, model, tokenizer, 64)
    short, long = "Hello!", "Return a list. " * 10
    (alone,) = ppl.score([short], model=model, tokenizer=tokenizer)
    beside, _ = ppl.score([short, long], model=model, tokenizer=tokenizer)
    assert beside.nll == alone.nll
    # The same text under the long factors has another score, which the test has to see.
    ids = ids_of(tokenizer, short)
    other = plain_nll(model, ids + ids_of(tokenizer, long), 1, len(ids) + 40)[: len(ids) - 1]
    assert np.abs(np.subtract(other, alone.nll)).max() > 1e-2


def test_a_prediction_behind_a_text_does_not_change_its_rotary_factors(ppl, tokenizer):
    """With its last id, the text is one too long for the short factors."""
    torch.manual_seed(0)
    text = "Return the number of items."
    num_read = len(ids_of(tokenizer, text)) - 1
    model = grown(AutoModelForCausalLM.from_config(longrope_config(len(tokenizer), num_read)))
    (plain,) = ppl.score([text], model=model, tokenizer=tokenizer)
    (score,) = ppl.score([text], model=model, tokenizer=tokenizer, corrected=True)
    assert score.nll == pytest.approx(plain.nll, rel=1e-6)
    assert len(score.word_start_nll) == len(score.nll) + 1


def prophetnet(vocab_size):
    sizes = {"hidden_size": 32, "num_decoder_layers": 2, "num_decoder_attention_heads": 2}
    return transformers.ProphetNetForCausalLM(
        transformers.ProphetNetConfig(
            **sizes,
            vocab_size=vocab_size,
            decoder_ffn_dim=64,
            num_encoder_layers=1,
            num_encoder_attention_heads=2,
            max_position_embeddings=CONTEXT,
            is_decoder=True,
            is_encoder_decoder=False,
            add_cross_attention=False,
        )
    )


def test_a_decoder_that_looks_ahead_from_its_first_tokens_is_refused(ppl, tokenizer):
    """ProphetNet's, in transformers 5.23: its last tokens do not see what stands behind them."""
    torch.manual_seed(0)
    model = grown(prophetnet(len(tokenizer)))
    ids = torch.tensor([ids_of(tokenizer, TEXTS[0])[:20]])
    changed = ids.clone()
    changed[0, 1:] += 1
    first, other = (model(x, use_cache=False).logits[0, 0] for x in (ids, changed))
    assert (first - other).abs().max() > 1e-4 * first.abs().max()
    with pytest.raises(ValueError, match="looks at the tokens behind the one that it predicts"):
        ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)


class Normalised(transformers.LlamaForCausalLM):
    """Its logits depend on the number of rows, or of tokens, that it reads at once."""

    axis = 0

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits * (1 + 0.1 * input_ids.shape[self.axis])
        return output


@pytest.mark.parametrize("axis", [0, 1])
def test_a_model_that_reacts_to_its_batch_is_scored_one_by_one(ppl, tokenizer, axis, caplog):
    torch.manual_seed(0)
    model = grown(Normalised(config_of("llama", len(tokenizer))))
    model.axis = axis
    with caplog.at_level(logging.WARNING):
        assert_equals_the_loop(ppl, model, tokenizer, CONTEXT, TEXTS[:4])
    assert "depend on the other rows of a batch; its windows are scored one by one" in caplog.text


class OneRow(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        if len(input_ids) > 1:
            raise RuntimeError("the shapes do not match")
        return super().forward(input_ids=input_ids, **kwargs)


def test_a_model_that_fails_on_several_rows_is_scored_one_by_one(ppl, tokenizer):
    torch.manual_seed(0)
    model = grown(OneRow(config_of("llama", len(tokenizer))))
    assert_equals_the_loop(ppl, model, tokenizer, CONTEXT, TEXTS[:4])


class Random(Normalised):
    """Its logits are others at each call."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits * (1 + torch.rand(()))
        return output


def test_a_random_model_is_refused(ppl, tokenizer):
    model = grown(Random(config_of("llama", len(tokenizer))))
    with pytest.raises(ValueError, match="gives other logits for the same ids at each call"):
        ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)


def test_rotary_factors_that_stay_from_a_longer_call(ppl, tokenizer):
    config = config_of("llama", len(tokenizer))
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    torch.manual_seed(0)
    model = grown(AutoModelForCausalLM.from_config(config))
    expected = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    ids = torch.tensor([ids_of(tokenizer, TEXTS[2])])
    assert ids.shape[1] > 2 * CONTEXT
    with torch.no_grad():
        model(ids)
    assert ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer) == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_is_not_nan_in_float64(ppl, tokenizer, attention):
    """As it is with a mask, in sliding windows that hold nothing but padding."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        **SMALL, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, sliding_window=4
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()
    assert_equals_the_loop(ppl, grown(model), tokenizer, CONTEXT, TEXTS[:4])


def test_a_causal_xlnet_whose_mask_takes_single_rows_only(ppl, tokenizer):
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=2, d_inner=64, attn_type="uni"
    )
    model = grown(transformers.XLNetLMHeadModel(config))
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer)
    assert_equals_the_loop(ppl, model, tokenizer, scorer.window, TEXTS[:4])


# The context length


ROBERTA_KIN = {
    "roberta": transformers.RobertaForCausalLM,
    "xlm-roberta": transformers.XLMRobertaForCausalLM,
    "camembert": transformers.CamembertForCausalLM,
    "data2vec-text": transformers.Data2VecTextForCausalLM,
    "xmod": transformers.XmodForCausalLM,
}


@pytest.mark.parametrize("name", ROBERTA_KIN)
def test_positions_behind_the_padding_id(ppl, tokenizer, name):
    torch.manual_seed(0)
    kind = ROBERTA_KIN[name]
    sizes = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    config = kind.config_class(
        **sizes,
        vocab_size=len(tokenizer),
        pad_token_id=PAD,
        max_position_embeddings=CONTEXT,
        is_decoder=True,
    )
    if name == "xmod":
        config.languages, config.default_language = ["en_XX"], "en_XX"
    model = grown(kind(config))
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer)
    assert scorer.window == CONTEXT - PAD - 1
    assert_equals_the_loop(ppl, model, tokenizer, CONTEXT - PAD - 1, TEXTS[:4])


def test_the_context_of_whispers_decoder(ppl, tokenizer):
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        max_target_positions=CONTEXT,
        pad_token_id=PAD,
    )
    model = grown(transformers.WhisperForCausalLM(config))
    assert_equals_the_loop(ppl, model, tokenizer, CONTEXT, TEXTS[:4])


def test_a_context_of_ten_million_tokens_is_one(ppl, tokenizer):
    config = config_of("llama", len(tokenizer))
    config.max_position_embeddings = 10_485_760
    model = AutoModelForCausalLM.from_config(config).eval()
    assert ppl.text_scorer(model=model, tokenizer=tokenizer).window == 10_485_760


# Layers that are quantised or sharded


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_model_quantised_by_torch_is_used_as_it_is(ppl, tokenizer):
    torch.manual_seed(0)
    model = grown(AutoModelForCausalLM.from_config(config_of("llama", len(tokenizer))))
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert callable(model.lm_head.weight)
    # It scales its activations by the largest of all rows that it is given together.
    assert_equals_the_loop(ppl, model, tokenizer, CONTEXT, TEXTS[:4])


class Packed(torch.Tensor):
    """A weight that knows one operation, as those of torchao do."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    def __tensor_flatten__(self):
        return ["values"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            hidden, weight, *bias = args
            return function(hidden, weight.values, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values)
        raise NotImplementedError(f"Packed has no {function}.")


class Sharded(nn.Linear):
    """An output layer that runs in the forward pass of its model only, as under FSDP."""

    inside = False

    def forward(self, hidden):
        if not self.inside:
            raise RuntimeError("the weight is not gathered")
        return super().forward(hidden)


@pytest.mark.parametrize("kind", ["packed", "sharded"])
def test_an_output_layer_whose_weight_is_not_plain(ppl, tokenizer, kind):
    torch.manual_seed(0)
    model = grown(AutoModelForCausalLM.from_config(config_of("llama", len(tokenizer))))
    expected = expected_result(model, tokenizer, TEXTS)
    if kind == "packed":
        model.lm_head.weight = nn.Parameter(Packed(model.lm_head.weight.data), requires_grad=False)
        assert type(model.lm_head.weight) is Packed
    else:
        head = Sharded(*reversed(model.lm_head.weight.shape), bias=False)
        head.weight = model.lm_head.weight
        model.lm_head = head
        model.register_forward_pre_hook(lambda *_: setattr(head, "inside", True))
        model.register_forward_hook(lambda *_: setattr(head, "inside", False))
    assert_equals(ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer), expected)


# Refusals


class Uniform(transformers.PreTrainedModel):
    """A model without a weight, and perhaps without embeddings."""

    config_class = transformers.LlamaConfig
    _supports_sdpa = True

    def __init__(self, config, embeddings):
        super().__init__(config)
        self.table = embeddings

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


class Prompted(transformers.LlamaForCausalLM):
    """It puts virtual tokens in front, as prompt tuning does."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        embedded = self.model.embed_tokens(input_ids)
        virtual = embedded.new_zeros(len(embedded), 5, embedded.shape[-1])
        return super().forward(inputs_embeds=torch.cat([virtual, embedded], 1), **kwargs)


def test_what_is_no_causal_language_model_is_told_apart(ppl, tokenizer):
    config = config_of("llama", len(tokenizer))
    config.pad_token_id = PAD
    classifier = transformers.LlamaForTokenClassification(config).eval()
    with pytest.raises(ValueError, match="returned 2 scores for each token.*classifies tokens"):
        ppl.compute(predictions=TEXTS, model=classifier, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="29 positions of 24 input ids.*as prompt tuning does"):
        ppl.compute(predictions=TEXTS, model=Prompted(config).eval(), tokenizer=tokenizer)
    with pytest.raises(TypeError, match="Uniform has no input embeddings"):
        ppl.compute(predictions=TEXTS, model=Uniform(config, None), tokenizer=tokenizer)


def test_a_model_without_a_weight_is_scored(ppl, tokenizer):
    model = Uniform(config_of("llama", len(tokenizer)), nn.Identity())
    result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert result["perplexity"] == pytest.approx(len(tokenizer), rel=1e-6)


def test_a_model_that_cannot_be_called_with_ids_is_refused(ppl, tokenizer, monkeypatch):
    model = transformers.LlamaForCausalLM(config_of("llama", len(tokenizer))).eval()
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: [][0])
    with pytest.raises(ValueError, match="as a causal language model is: list index out of range"):
        ppl.compute(predictions=["text"], model=model, tokenizer=tokenizer)


def test_weights_that_are_not_there(ppl, models):
    """On `meta` there are shapes alone."""
    model, tokenizer = models["llama"]
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(ValueError, match="and 20 others are on the device meta"):
        ppl.compute(predictions=TEXTS, model=empty, tokenizer=tokenizer)
