"""Texts -> ids: the start token, contexts, special tokens, and the bytes that are scored."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from text_oracles import (
    TEXTS,
    TINY,
    config_of,
    ids_of,
    ignore_empty,
    plain_nll,
    sliding_nll,
)
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

BOS = "<|bos|>"


@pytest.fixture(scope="module")
def dummy_prefix():
    """A model and a tokenizer that puts a dummy prefix before a text, as Llama 2's does."""
    words = ["▁the", "▁thing", "▁Return", "▁in", "▁", "the", "thing", "Return", "in"]
    letters = sorted(set("".join(words)))
    vocab = ["<unk>", "<s>", *[f"<0x{byte:02X}>" for byte in range(256)], *letters]
    merges = []

    def build(word):
        made = word[0]
        for letter in word[1:]:
            merge = (made, letter)
            made += letter
            if made not in vocab:
                vocab.append(made)
            if merge not in merges:
                merges.append(merge)

    for word in words:
        build(word)
    backend = Tokenizer(
        BPE({token: i for i, token in enumerate(vocab)}, merges, unk_token="<unk>",
            byte_fallback=True, fuse_unk=True)
    )  # fmt: skip
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("llama", len(tokenizer))).eval()
    return model, tokenizer


# The start token


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_text_that_brings_the_start_token_has_it_once(ppl, models, name):
    model, tokenizer = models[name]
    plain = ppl.compute(predictions=["Return the list."], model=model, tokenizer=tokenizer)
    spelt = [BOS + "Return the list."]
    result = ppl.compute(predictions=spelt, model=model, tokenizer=tokenizer)
    assert result["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-6)
    assert result["num_tokens"] == plain["num_tokens"]
    assert result["num_bytes"] == plain["num_bytes"] == len("Return the list.")
    (score,) = ppl.score(spelt, model=model, tokenizer=tokenizer)
    assert score.tokens[0] == BOS
    assert math.isnan(score.nll[0])
    assert "".join(score.text[a:b] for a, b in score.offsets) == score.text


def test_a_context_that_brings_the_start_token_has_it_once(ppl, models):
    model, tokenizer = models["llama"]
    call = {"model": model, "tokenizer": tokenizer, "predictions": ["the list."]}
    plain = ppl.compute(**call, contexts=["Return "])
    assert ppl.compute(**call, contexts=[BOS + "Return "])["mean_nll"] == plain["mean_nll"]
    # An empty context leaves the text's own.
    call["predictions"] = [BOS + "the list."]
    plain = ppl.compute(predictions=["the list."], model=model, tokenizer=tokenizer)
    assert ppl.compute(**call, contexts=[""])["mean_nll"] == pytest.approx(plain["mean_nll"])


def test_a_text_of_nothing_but_the_start_token_is_not_scored(ppl):
    with pytest.warns(UserWarning, match="1 of 2 texts have no token to score"):
        result = ppl.compute(predictions=[BOS, "One."], model_id=TINY)
    assert math.isnan(result["perplexities"][0])


def test_the_classic_module_scores_a_start_token_that_a_text_brings(ppl, models):
    model, tokenizer = models["gpt2"]
    result = ppl.compute(
        predictions=[BOS + "Hello!"], model=model, tokenizer=tokenizer, preset="evaluate"
    )
    ids = ids_of(tokenizer, BOS + "Hello!")
    assert ids[:2] == [0, 0]
    assert result["mean_nll"] == pytest.approx(
        np.mean(plain_nll(model, ids, 1, len(ids))), rel=2e-5
    )


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16])
def test_a_start_token_may_be_an_integer_of_numpy(ppl, kind):
    expected = ppl.compute(predictions=TEXTS, model_id=TINY, add_start_token=1)
    result = ppl.compute(predictions=TEXTS, model_id=TINY, add_start_token=kind(1))
    assert result == expected


def test_a_start_token_that_the_model_does_not_read_is_named(ppl):
    match = "The start token is id 999999, but the model .* has 3072 embeddings. Pass another id"
    with pytest.raises(ValueError, match=match):
        ppl.compute(predictions=TEXTS, model_id=TINY, add_start_token=999999)
    for bad in (-1, 1.5, "bos", None):
        with pytest.raises(TypeError, match="add_start_token must be True, False or a token id"):
            ppl.compute(predictions=TEXTS, model_id=TINY, add_start_token=bad)


# Contexts


def joined(tokenizer, context, text):
    """Oracle: ids of the whole string, and how many of them end in the context."""
    encoded = tokenizer(context + text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded.offset_mapping]
    return encoded.input_ids, sum(end <= len(context) for end in ends) if context else 0


@ignore_empty
@pytest.mark.parametrize("name", ["gpt2", "qwen"])
def test_contexts_are_tokenised_with_their_texts(ppl, models, name):
    model, tokenizer = models[name]
    contexts = ["", "A prompt: ", "word " * 10, "ret", "", "y", "z"]
    texts = [*TEXTS[:3], "urn the list", *TEXTS[4:]]
    start = [] if name == "qwen" else [0]
    nll, spanned = [], 0
    for text, context in zip(texts, contexts, strict=True):
        ids, num_context = joined(tokenizer, context, text)
        spanned += len(tokenizer(context, add_special_tokens=False).input_ids) != num_context
        nll += sliding_nll(model, start + ids, first=max(1, len(start) + num_context))
    assert spanned >= 2
    result = ppl.compute(predictions=texts, contexts=contexts, model=model, tokenizer=tokenizer)
    assert result["num_tokens"] == len(nll)
    assert result["mean_nll"] == pytest.approx(np.mean(nll), rel=2e-5)
    assert "|contexts:text|" in result["signature"]
    assert result["num_truncated_contexts"] == 0
    if name == "gpt2":
        assert result["num_bytes"] == sum(len(text.encode()) for text in texts)


def test_ids_of_contexts_can_be_joined_instead(ppl, models):
    model, tokenizer = models["gpt2"]
    contexts = ["", "A prompt: ", "word " * 10, "x", "", "y", "z"]
    nll = []
    for text, context in zip(TEXTS, contexts, strict=True):
        prefix = ids_of(tokenizer, context)
        nll += sliding_nll(model, prefix + ids_of(tokenizer, text, start=False), first=len(prefix))
    result = ppl.compute(
        predictions=TEXTS, contexts=contexts, model=model, tokenizer=tokenizer, join_contexts="ids"
    )
    assert result["mean_nll"] == pytest.approx(np.mean(nll), rel=2e-5)
    assert "|contexts:ids|" in result["signature"]
    assert result["num_bytes"] == sum(len(text.encode()) for text in TEXTS)
    with pytest.raises(
        ValueError, match=r"join_contexts must be one of \('text', 'ids'\), got 'x'"
    ):
        ppl.compute(predictions=TEXTS, contexts=TEXTS, model_id=TINY, join_contexts="x")


def test_contexts_and_a_tokenizer_with_a_dummy_prefix(ppl, dummy_prefix):
    """'Return' and ' the thing' are four tokens with BOS, as the whole string; not five."""
    model, tokenizer = dummy_prefix
    for context, text, num_scored in (("Return", " the thing", 2), ("in", "the", 1)):
        ids = [1, *tokenizer(context + text, add_special_tokens=False).input_ids]
        nll = plain_nll(model, ids, len(ids) - num_scored, len(ids))
        (score,) = ppl.score([text], contexts=[context], model=model, tokenizer=tokenizer)
        assert score.nll == pytest.approx(nll, rel=1e-4)
        apart = ppl.compute(
            predictions=[text],
            contexts=[context],
            model=model,
            tokenizer=tokenizer,
            join_contexts="ids",
        )
        assert apart["num_tokens"] > num_scored or text == "the"


def test_contexts_without_places(ppl):
    """A slow tokenizer has no offsets: what it gives the context alone is the context's."""
    tokenizer = transformers.ByT5Tokenizer()
    model = AutoModelForCausalLM.from_config(config_of("llama", len(tokenizer))).eval()
    kwargs = {"model": model, "tokenizer": tokenizer, "add_start_token": 1}
    result = ppl.compute(predictions=["the list"], contexts=["Return "], **kwargs)
    ids = [1, *tokenizer("Return the list", add_special_tokens=False).input_ids]
    assert result["num_tokens"] == result["num_bytes"] == 8
    assert result["mean_nll"] == pytest.approx(np.mean(plain_nll(model, ids, 8, 16)), rel=2e-5)


def test_contexts_that_are_cut_are_counted(ppl, models):
    model, tokenizer = models["gpt2"]
    contexts = ["short ", "word " * 40, "word " * 50]
    with pytest.warns(
        UserWarning, match=r"2 of 3 contexts are longer.*window of 24.*contexts\[1\]"
    ):
        result = ppl.compute(
            predictions=["the list"] * 3, contexts=contexts, model=model, tokenizer=tokenizer
        )
    assert result["num_truncated_contexts"] == 2
    assert "num_truncated_contexts" not in ppl.compute(predictions=TEXTS, model_id=TINY)


def test_half_a_character_in_a_context_is_named(ppl):
    with pytest.raises(ValueError, match=r"contexts\[1\] is no valid Unicode text"):
        ppl.compute(predictions=["a", "b"], contexts=["a", "\ud800"], model_id=TINY)


# Bytes


def bytes_of(tokenizer, ids):
    """Oracle: each letter of a byte-level token is one byte."""
    return sum(len(token) for token in tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("text", ["🎉🎉 abc déf", "é", "漢字かな", "naïve façade", "plain"])
@pytest.mark.parametrize("limit", [None, 2, 3, 5])
def test_bytes_are_those_of_the_scored_tokens(ppl, models, text, limit):
    model, tokenizer = models["llama"]
    ids = ids_of(tokenizer, text, start=False)
    for start in (False, True):
        result = ppl.compute(
            predictions=[text, "one two three"],
            model=model,
            tokenizer=tokenizer,
            add_start_token=start,
            max_length=limit,
        )
        other = ids_of(tokenizer, "one two three", start=False)
        scored = [x[not start : limit and limit - start] for x in (ids, other)]
        assert result["num_tokens"] == sum(map(len, scored))
        assert result["num_bytes"] == sum(bytes_of(tokenizer, x) for x in scored)
        if start and limit is None:
            assert result["num_bytes"] == len(text.encode()) + len("one two three")


def test_bytes_where_a_tokenizer_falls_back_to_bytes(ppl, dummy_prefix):
    model, tokenizer = dummy_prefix
    text = "🎉the"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["▁", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>", "the"]
    for limit, num_bytes in ((3, 1), (4, 2), (6, 4), (7, 7)):
        result = ppl.compute(
            predictions=[text, "the"], model=model, tokenizer=tokenizer, max_length=limit
        )
        assert result["num_bytes"] - 3 == num_bytes


def test_bytes_behind_a_space_that_the_tokenizer_puts_in_front(ppl, models):
    model, tokenizer = models["llama"][0], transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for text in ("🎉 a", " 🎉 a"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert tokens[0].startswith("Ġ")
        result = ppl.compute(
            predictions=[text], model=model, tokenizer=tokenizer, add_start_token=False
        )
        assert result["num_bytes"] == sum(map(len, tokens[1:]))


def test_the_places_of_many_texts_never_fall(ppl, models):
    _, tokenizer = models["llama"]
    encoder = ppl.text_scorer(model_id=TINY).encoder
    generator = np.random.default_rng(0)
    letters = [*"ab é漢🎉\n\t", "👩‍👩‍👧", BOS]
    for _ in range(200):
        text = "".join(generator.choice(letters, size=generator.integers(1, 12)))
        (encoded,) = encoder.encode([text], None)
        steps = np.diff(encoded.places.byte_ends[encoded.num_prefix - 1 :])
        assert (steps >= 0).all()
        sizes = [
            len(token.encode()) if token == BOS else len(token)
            for token in tokenizer.convert_ids_to_tokens(encoded.ids[encoded.num_prefix :])
        ]
        if encoded.num_prefix == 1:
            assert steps.tolist() == sizes, json.dumps(text)
