"""The arguments that name a model, how it is loaded, the one that is kept."""

import concurrent.futures
import pickle

import pytest
import torch
from text_oracles import (
    TEXTS,
    TINY,
    assert_equals,
    expected_result,
)
from transformers import AutoModelForCausalLM

from ppleval import Perplexity


def test_a_model_is_loaded_once_and_not_pickled(ppl, monkeypatch):
    calls = []
    original = AutoModelForCausalLM.from_pretrained

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    first = ppl.compute(predictions=TEXTS, model_id=TINY)
    second = ppl.compute(predictions=TEXTS, model_id=TINY, stride=100)
    ppl.score(TEXTS, model_id=TINY)
    assert len(calls) == 1
    assert first["num_tokens"] == second["num_tokens"]
    assert len(pickle.dumps(ppl)) < 100_000
    ppl.compute(predictions=TEXTS, model_id=TINY, model_kwargs={"dtype": torch.bfloat16})
    assert len(calls) == 2


def test_model_kwargs_and_device_pass_through(ppl):
    result = ppl.compute(
        predictions=TEXTS,
        model_id=TINY,
        device="cpu",
        model_kwargs={"dtype": torch.bfloat16, "attn_implementation": "eager"},
    )
    assert "|model_dtype:bfloat16|" in result["signature"]
    exact = ppl.compute(predictions=TEXTS, model_id=TINY, device=torch.device("cpu"))
    assert result["perplexity"] == pytest.approx(exact["perplexity"], rel=0.05)
    assert result["perplexity"] != exact["perplexity"]


def test_an_unknown_model_is_named(ppl, tmp_path):
    with pytest.raises(ValueError, match="model_id='nobody/nothing' could not be loaded"):
        ppl.compute(predictions=TEXTS, model_id="nobody/nothing")
    with pytest.raises(ValueError, match="could not be loaded: .* has neither config.json"):
        ppl.compute(predictions=TEXTS, model_id=str(tmp_path))


def test_one_model_in_several_threads(models):
    model, tokenizer = models["llama"]
    expected = expected_result(model, tokenizer, TEXTS)

    def compute(_):
        return Perplexity().compute(predictions=TEXTS, model=model, tokenizer=tokenizer)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for result in pool.map(compute, range(24)):
            assert_equals(result, expected)
