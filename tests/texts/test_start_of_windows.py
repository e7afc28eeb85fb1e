"""The start token in front of each window, with a model that depends on it as Gemma does."""

import math

import pytest
import torch
from text_oracles import CONTEXT, TEXTS, TINY, ids_of, sliding_nll, window_nll
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

LONG = [text for text in TEXTS if len(text) > 200]


class NeedsStart(torch.nn.Module):
    """Scales the embeddings of a row by 30 unless its first id is the start token."""

    def __init__(self, embeddings):
        super().__init__()
        self.embeddings, self.num_embeddings = embeddings, embeddings.num_embeddings
        self.weight = embeddings.weight

    def forward(self, ids):
        scale = torch.where(ids[:, :1] == 0, 1.0, 30.0)
        return self.embeddings(ids) * scale[..., None]


@pytest.fixture(scope="module")
def needy():
    """(model, tokenizer)."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=10.0,  # so that the size of the embeddings matters
        initializer_range=0.5,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_input_embeddings(NeedsStart(model.get_input_embeddings()))
    return model, tokenizer


def test_a_model_that_needs_the_start_token_gets_it(ppl, needy):
    model, tokenizer = needy
    options = {"predictions": LONG, "model": model, "tokenizer": tokenizer}
    with_start = ppl.compute(**options)
    without = ppl.compute(**options, start_each_window=False)
    expected = [nll for text in LONG for nll in sliding_nll(model, ids_of(tokenizer, text))]
    assert with_start["mean_nll"] == pytest.approx(sum(expected) / len(expected), rel=2e-5)
    # Only the windows that begin inside a text are worse.
    assert without["perplexity"] > 5 * with_start["perplexity"]
    assert "|start_each_window:yes|" in with_start["signature"]
    assert "|start_each_window:no|" in without["signature"]


def test_without_it_windows_begin_with_the_text(ppl, models):
    model, tokenizer = models["llama"]
    scores = ppl.score(TEXTS, model=model, tokenizer=tokenizer, start_each_window=False)
    for text, score in zip(TEXTS, scores, strict=True):
        ids = ids_of(tokenizer, text)
        # A BOS that no id equals: the oracle replaces nothing.
        expected = window_nll(model, ids, CONTEXT, CONTEXT // 2, bos=-1)
        assert score.nll == pytest.approx(expected, rel=2e-5, abs=2e-5)


def test_short_texts_and_models_without_a_start_token_are_as_they_were(ppl, models):
    short = [text for text in TEXTS if len(text) < 20]
    for name in ("llama", "qwen"):
        model, tokenizer = models[name]
        texts = short if name == "llama" else LONG
        options = {"predictions": texts, "model": model, "tokenizer": tokenizer}
        found = [ppl.compute(**options, start_each_window=flag) for flag in (None, True, False)]
        assert len({result["mean_nll"] for result in found}) == 1
    assert all("|start_each_window:no|" in result["signature"] for result in found)


@pytest.mark.parametrize("preset", ["evaluate", "lm-eval", "hf-docs", "gptq", "llama.cpp"])
def test_presets_have_their_own_way(ppl, preset):
    with pytest.raises(
        ValueError, match=f'start_each_window has no meaning with preset="{preset}"'
    ):
        ppl.compute(predictions=TEXTS, model_id=TINY, preset=preset, start_each_window=True)
    scorer = ppl.text_scorer(model_id=TINY, preset=preset)
    assert scorer.reader.starts_each_window == (preset == "llama.cpp")


def test_no_boolean(ppl):
    with pytest.raises(TypeError, match="start_each_window must be True, False or None, got 1"):
        ppl.compute(predictions=TEXTS, model_id=TINY, start_each_window=1)
    assert math.isfinite(ppl.compute(predictions=TEXTS, model_id=TINY)["perplexity"])
