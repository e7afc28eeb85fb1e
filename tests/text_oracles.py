"""What the tests of texts and models share: tiny models, and plain float64 loops over windows.

The models are small and random; some are trained by no one, which is no matter: the loops see the
same ones. GPT-2 (no BOS in front by itself), Llama (RoPE), Qwen (no BOS at all) and a soft-capped
Gemma, whose logits are not those of its output layer.
"""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import transformers
from support import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = str(ROOT / "tiny_model")
CONTEXT = 24
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "Hello!",
    "Return the number of items in the list; raise ValueError if there are none. " * 4,
    "naïve façade — 漢字かな 🎉🎉",
    "a",
    "Two lines\n\n  and indentation\twith a tab  ",
    "Return a list. " * 20,
]


def config_of(name, vocab_size):
    small = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    if name == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT
        )
    if name == "gemma":
        return transformers.Gemma2Config(
            **small, head_dim=16, final_logit_softcapping=2.0, initializer_range=0.5
        )
    classes = {"llama": transformers.LlamaConfig, "qwen": transformers.Qwen2Config}
    return classes[name](**small)


NAMES = ["gpt2", "llama", "qwen", "gemma"]


def grown(model):
    """The model in evaluation mode, with weights large enough for logits that differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def variant(model, seed, scale=0.3):
    """A copy of the model with noise in its weights."""
    other = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * parameter.std() * noise if parameter.numel() > 1 else 0)
    return other.eval()


def make_models():
    """Name -> (model, tokenizer)."""
    made = {}
    for seed, name in enumerate(NAMES):
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        if name == "qwen":
            tokenizer.bos_token = None
        torch.manual_seed(seed)
        config = config_of(name, len(tokenizer))
        made[name] = grown(AutoModelForCausalLM.from_config(config)), tokenizer
    return made


def inputs_of(ids, start, stop, bos=0):
    """What the model reads of ids[start:stop]. A window inside a text begins with the text's start
    token, which is id 0 of the bundled tokenizer, if the text has one."""
    return [bos, *ids[start + 1 : stop]] if ids[0] == bos else ids[start:stop]


def plain_nll(model, ids, first, stop, start=0, bos=0, **options):
    """Oracle: nll of ids[first:stop] given ids[start:], float64, one window."""
    with torch.no_grad():
        inputs = torch.tensor([inputs_of(ids, start, stop - 1, bos)])
        logits = model(inputs, **options).logits[0].double()
    log_probs = logits.log_softmax(-1)
    return [-log_probs[i - 1 - start, ids[i]].item() for i in range(first, stop)]


def sliding_nll(model, ids, first=1, context=CONTEXT, stride=CONTEXT // 2, bos=0):
    """Oracle: each id with the context that the sliding window gives it, found one id at a time."""
    found = []
    stop = min(len(ids), max(context + 1, first + 1) if first <= context else first + stride)
    for i in range(first, len(ids)):
        while i >= stop:
            stop = min(len(ids), stop + stride)
        start = max(0, stop - context - 1)
        found += plain_nll(model, ids, i, i + 1, start, bos)
    return found


def window_nll(model, ids, context, stride, **options):
    """Oracle: the same window by window, for models whose scores depend on a window's length."""
    found, first, stop = [], 1, min(len(ids), context + 1)
    while first < len(ids):
        found += plain_nll(model, ids, first, stop, max(0, stop - context - 1), **options)
        first, stop = stop, min(len(ids), stop + stride)
    return found


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def ids_of(tokenizer, text, start=True):
    bos = [] if tokenizer.bos_token_id is None or not start else [tokenizer.bos_token_id]
    return bos + tokenizer(text, add_special_tokens=False).input_ids


def expected_result(model, tokenizer, texts, start=True):
    per_text = [sliding_nll(model, ids_of(tokenizer, text, start)) for text in texts]
    nll = flat(per_text)
    return {
        "mean_nll": np.mean(nll),
        "perplexities": [np.exp(np.mean(text)) if text else math.nan for text in per_text],
        "num_tokens": len(nll),
    }


def assert_equals(result, expected, rel=2e-5):
    assert result["num_tokens"] == expected["num_tokens"]
    assert result["perplexity"] == pytest.approx(np.exp(expected["mean_nll"]), rel=rel)
    assert result["perplexities"] == pytest.approx(expected["perplexities"], rel=rel, nan_ok=True)


# "a" is one token, which a tokenizer without BOS cannot score.
ignore_empty = pytest.mark.filterwarnings("ignore:.*no token to score:UserWarning")
