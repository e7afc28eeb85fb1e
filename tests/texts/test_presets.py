"""Other people's numbers, each against a plain loop that does what they do."""

import math
import re

import numpy as np
import pytest
import torch
from text_oracles import (
    CONTEXT,
    TEXTS,
    TINY,
    config_of,
    flat,
    ids_of,
    plain_nll,
)
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppleval.show.tables import as_table, comparison_table

BOS = "<|bos|>"


@pytest.fixture
def without_bos():
    """A tokenizer with a BOS that it does not add by itself, as GPT-2's."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


def test_preset_evaluate(ppl, models):
    """The classic module: each text at once, padded; mean of exp(mean)."""
    model, tokenizer = models["gpt2"]
    for max_length in (12, None):
        texts = TEXTS[1:2] + TEXTS[4:5] if max_length is None else TEXTS
        expected = []
        for text in texts:
            ids = ids_of(tokenizer, text)[:max_length]
            expected.append(np.exp(np.mean(plain_nll(model, ids, 1, len(ids)))))
        result = ppl.compute(
            predictions=texts,
            model=model,
            tokenizer=tokenizer,
            preset="evaluate",
            max_length=max_length,
        )
        assert result["perplexities"] == pytest.approx(expected, rel=2e-5)
        assert result["mean_perplexity"] == pytest.approx(np.mean(expected), rel=2e-5)
    with pytest.raises(ValueError, match="more than the model's context of 24.*Pass max_length"):
        ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer, preset="evaluate")


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_preset_lm_eval(ppl, models, name):
    """loglikelihood_rolling: a prefix token, then disjoint windows with one token of context."""
    model, tokenizer = models[name]
    texts = [*TEXTS, "<|bos|>spelt out"]
    prefix = tokenizer.bos_token_id if name == "llama" else tokenizer.eos_token_id
    nll_sum, num_words, num_tokens = 0.0, 0, 0
    for text in texts:
        spelt = text.startswith(tokenizer.decode([prefix]))
        tokens = tokenizer(text, add_special_tokens=not spelt).input_ids
        whole = [prefix, *tokens]
        done = 0
        while done < len(tokens):
            size = min(CONTEXT, len(tokens) - done)
            stop = done + size + 1
            start = done if size == CONTEXT or done == 0 else stop - CONTEXT - 1
            nll_sum += sum(plain_nll(model, whole, done + 1, stop, start, bos=-1))
            done += size
        num_words += len(re.split(r"\s+", text))
        num_tokens += len(tokens)
    num_bytes = sum(len(text.encode()) for text in texts)
    result = ppl.compute(predictions=texts, model=model, tokenizer=tokenizer, preset="lm-eval")
    assert result["num_tokens"] == num_tokens
    assert result["mean_nll"] * num_tokens == pytest.approx(nll_sum, rel=2e-5)
    assert (result["num_bytes"], result["num_words"]) == (num_bytes, num_words)
    assert result["bits_per_byte"] == pytest.approx(nll_sum / num_bytes / math.log(2), rel=2e-5)
    assert "|preset:lm-eval|" in result["signature"]


@pytest.mark.parametrize("stride", [5, 12, 24])
def test_preset_hf_docs(ppl, models, stride):
    """The recipe of the transformers documentation, with its way of counting."""
    model, tokenizer = models["llama"]
    ids = torch.tensor([tokenizer("\n\n".join(TEXTS)).input_ids])
    nll_sum, num_tokens, previous = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + CONTEXT, ids.shape[1])
        new = end - previous
        labels = ids[:, begin:end].clone()
        labels[:, :-new] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss.item()
        if new > 1:  # the recipe multiplies the mean by new - 1
            nll_sum += loss * (new - 1)
            num_tokens += new - 1
        previous = end
        if end == ids.shape[1]:
            break
    result = ppl.compute(
        predictions=TEXTS, model=model, tokenizer=tokenizer, preset="hf-docs", stride=stride
    )
    assert result["perplexity"] == pytest.approx(math.exp(nll_sum / num_tokens), rel=2e-5)
    assert "|start:tokenizer|" in result["signature"]
    # A byte has no weight: per byte it is the sum of all that is scored, whatever the stride.
    plain = result["bits_per_byte"] * math.log(2) * result["num_bytes"]
    assert plain / ids.shape[1] == pytest.approx(nll_sum / num_tokens, rel=0.15)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("window", [None, 10])
def test_preset_gptq(ppl, models, name, window):
    """The mean loss of whole chunks, the tail dropped."""
    model, tokenizer = models[name]
    size = window or CONTEXT
    ids = torch.tensor([tokenizer("\n\n".join(TEXTS)).input_ids])
    chunks = ids[:, : ids.shape[1] // size * size].view(-1, size)
    assert chunks.numel() < ids.numel()
    with torch.no_grad():
        losses = [model(chunk[None], labels=chunk[None]).loss.item() for chunk in chunks]
    result = ppl.compute(
        predictions=TEXTS, model=model, tokenizer=tokenizer, preset="gptq", window=window
    )
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=2e-5)
    assert result["num_tokens"] == len(chunks) * (size - 1)
    assert (
        f"|preset:gptq|start:tokenizer|start_each_window:no|max_length:none|window:{size}|"
        in result["signature"]
    )


def test_preset_gptq_reads_2048_tokens_of_longer_contexts(ppl, models):
    _, tokenizer = models["llama"]
    config = config_of("llama", len(tokenizer))
    config.max_position_embeddings = 4096
    model = AutoModelForCausalLM.from_config(config).eval()
    assert ppl.text_scorer(model=model, tokenizer=tokenizer, preset="gptq").window == 2048
    with pytest.raises(ValueError, match="needs a chunk of 2048 tokens at least; the texts have"):
        ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer, preset="gptq")


def llama_cpp_nll(model, ids, bos):
    """Oracle: the second half of each chunk; `bos` takes the place of its first id."""
    chunks = [ids[i : i + CONTEXT] for i in range(0, len(ids) - CONTEXT + 1, CONTEXT)]
    chunks = [chunk if bos is None else [bos, *chunk[1:]] for chunk in chunks]
    return flat(plain_nll(model, chunk, CONTEXT // 2 + 1, CONTEXT) for chunk in chunks)


def test_llama_cpp_adds_a_bos_only_where_the_tokenizer_does(ppl, models, without_bos):
    model, with_bos = models["gpt2"]
    for tokenizer, start, name in (
        (with_bos, 0, "<|bos|>"),
        (without_bos, None, "none(not-added)"),
    ):
        text_ids = tokenizer("\n".join(TEXTS), add_special_tokens=False).input_ids
        ids = text_ids if start is None else [start, *text_ids]
        nll = llama_cpp_nll(model, ids, start)
        result = ppl.compute(
            predictions=TEXTS, model=model, tokenizer=tokenizer, preset="llama.cpp"
        )
        assert result["num_tokens"] == len(nll)
        assert result["mean_nll"] == pytest.approx(np.mean(nll), rel=2e-5)
        assert f"|start:{name}|" in result["signature"]


def test_llama_cpp_takes_spelt_special_tokens_for_text_and_drops_a_line_end(ppl, models):
    model, tokenizer = models["llama"]
    text = f"Return {BOS} the <|eos|> list. " * 12
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert 0 not in ids
    nll = llama_cpp_nll(model, [0, *ids], 0)
    for ending, more in (("\n", 0), ("\n\n", 1)):
        result = ppl.compute(
            predictions=[text + ending], model=model, tokenizer=tokenizer, preset="llama.cpp"
        )
        # One more token than whole chunks would have no effect: the ids are counted instead.
        (encoded,) = ppl.text_scorer(
            model=model, tokenizer=tokenizer, preset="llama.cpp"
        ).encoder.encode([text + "\n" * more], None)
        assert len(encoded.ids) == 1 + len(ids) + more
        assert result["mean_nll"] == pytest.approx(np.mean(nll), rel=2e-5)


def test_llama_cpp_drops_the_last_line_end_of_the_text(ppl, models):
    model, tokenizer = models["llama"]
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer, preset="llama.cpp")
    for text, kept in (("word " * 60 + "\n", "word " * 60), ("word " * 60 + "\n\n", None)):
        (score,) = scorer.score([text])
        assert score.text == (text[:-1] if kept is None else kept)


def test_llama_cpp_needs_two_chunks(ppl, models):
    model, tokenizer = models["llama"]
    call = {"model": model, "tokenizer": tokenizer, "preset": "llama.cpp"}
    word = "list"
    num_ids = len(tokenizer(word * 47, add_special_tokens=False).input_ids)
    assert num_ids == 47  # with BOS two chunks
    assert ppl.compute(predictions=[word * 47], **call)["num_tokens"] == 2 * (CONTEXT // 2 - 1)
    with pytest.raises(ValueError, match=r"needs two chunks of 24 tokens at least.*have 47 tokens"):
        ppl.compute(predictions=[word * 46], **call)


@pytest.mark.parametrize("preset", ["gptq", "llama.cpp"])
def test_what_is_dropped_behind_the_last_whole_chunk_is_counted(ppl, models, preset):
    """One word is one token, so the tail is known; llama.cpp puts a BOS in front."""
    model, tokenizer = models["llama"]
    call = {"model": model, "tokenizer": tokenizer, "preset": preset}
    num_own = len(tokenizer("list", add_special_tokens=preset == "gptq").input_ids)
    num_own += preset == "llama.cpp"
    for tail in (0, 1, CONTEXT - 1):
        text = "list" * (3 * CONTEXT + tail - num_own + 1)
        result = ppl.compute(predictions=[text], **call)
        assert result["num_dropped_tokens"] == tail
        compared = ppl.compare([text], base=model, **call)
        assert compared["num_dropped_tokens"] == tail
        assert ("tokens dropped" in as_table(result, "llama")) == (tail > 0)
        assert ("tokens dropped" in comparison_table(compared, "llama", "llama")) == (tail > 0)
    for others in (None, "evaluate", "lm-eval", "hf-docs"):
        result = ppl.compute(predictions=["list"], **call | {"preset": others})
        assert "num_dropped_tokens" not in result


def test_llama_cpp_prints_its_own_error(ppl, models):
    model, tokenizer = models["llama"]
    result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer, preset="llama.cpp")
    nll = np.array(llama_cpp_nll(model, ids_of(tokenizer, "\n".join(TEXTS)), 0))
    expected = np.exp(nll.mean()) * np.sqrt(nll.var() / (len(nll) - 1))
    assert result["perplexity_standard_error"] == pytest.approx(expected, rel=1e-4)
    assert math.isnan(result["perplexity_ci_low"])  # one text has no interval of texts
    plain = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert "perplexity_standard_error" not in plain
