"""Two models on the same texts, against float64 loops over the full log-softmax of both."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from text_oracles import CONTEXT, TEXTS, TINY, config_of, grown, ids_of, inputs_of, variant
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


def log_probs(model, ids, context=CONTEXT):
    """Oracle: log-softmax (len(ids) - 1, V), window by window."""
    rows, first, stop = [torch.zeros(0, model.config.vocab_size)], 1, min(len(ids), context + 1)
    while first < len(ids):
        start = max(0, stop - context - 1)
        with torch.no_grad():
            logits = model(torch.tensor([inputs_of(ids, start, stop - 1)])).logits[0].double()
        rows.append(logits[first - 1 - start :].log_softmax(-1))
        first, stop = stop, min(len(ids), stop + context // 2)
    return torch.cat(rows)


def expected_result(model, base, tokenizer, texts):
    """Oracle: every key of `compare` whose definition is a mean or a quantile over tokens."""
    columns = {name: [] for name in ("nll", "base_nll", "kl", "reverse_kl", "same", "delta_p")}
    num_bytes = 0
    for text in texts:
        ids = ids_of(tokenizer, text)
        q, p = log_probs(model, ids), log_probs(base, ids)
        targets = torch.tensor(ids[1:])[:, None]
        nll, base_nll = -q.gather(1, targets)[:, 0], -p.gather(1, targets)[:, 0]
        columns["nll"] += nll.tolist()
        columns["base_nll"] += base_nll.tolist()
        columns["kl"] += (p.exp() * (p - q)).sum(1).tolist()
        columns["reverse_kl"] += (q.exp() * (q - p)).sum(1).tolist()
        columns["same"] += (q.argmax(1) == p.argmax(1)).tolist()
        columns["delta_p"] += ((-nll).exp() - (-base_nll).exp()).tolist()
        num_bytes += len(text.encode())
    nll, base_nll, kl, reverse_kl, same, delta_p = map(np.array, columns.values())
    per_byte = 1 / math.log(2) / num_bytes
    return {
        "perplexity": np.exp(nll.mean()),
        "base_perplexity": np.exp(base_nll.mean()),
        "mean_nll": nll.mean(),
        "base_mean_nll": base_nll.mean(),
        "bits_per_byte": nll.sum() * per_byte,
        "base_bits_per_byte": base_nll.sum() * per_byte,
        "bits_per_byte_difference": (nll - base_nll).sum() * per_byte,
        "mean_nll_difference": (nll - base_nll).mean(),
        "perplexity_ratio": np.exp((nll - base_nll).mean()),
        "mean_kl": kl.mean(),
        "mean_reverse_kl": reverse_kl.mean(),
        **{
            f"kl_{n}": np.percentile(kl, q) for n, q in {"median": 50, "p90": 90, "p99": 99}.items()
        },
        "kl_p95": np.percentile(kl, 95),
        "kl_p999": np.percentile(kl, 99.9),
        "kl_max": kl.max(),
        "num_infinite_kl": 0,
        "same_top": same.mean(),
        "mean_delta_p": delta_p.mean(),
        "rms_delta_p": math.sqrt(np.mean(delta_p**2)),
        "delta_p_median": np.median(delta_p),
        **{f"delta_p_p{q}": np.percentile(delta_p, q) for q in (1, 5, 25, 75, 95, 99)},
        "num_tokens": len(nll),
        "num_sequences": len(texts),
        "num_bytes": num_bytes,
    }


def assert_equals(result, expected):
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    intervals = {name for name in result if name.endswith(("_ci_low", "_ci_high"))}
    assert set(result) - intervals == {*expected, "signature"}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_equals_a_loop_over_the_texts(ppl, models, name, batch_size):
    model, tokenizer = models[name]
    base = variant(model, seed=7)
    result = ppl.compare(TEXTS, model=model, tokenizer=tokenizer, base=base, batch_size=batch_size)
    expected = expected_result(model, base, tokenizer, TEXTS)
    assert expected["mean_kl"] > 1e-3
    assert_equals(result, expected)
    low, high = result["mean_kl_ci_low"], result["mean_kl_ci_high"]
    assert low < result["mean_kl"] < high


def broken(model):
    """A copy that gives NaN."""
    other = copy.deepcopy(model)
    torch.nn.init.constant_(other.lm_head.weight, math.nan)
    return other


def test_a_model_that_gives_nan_is_named(ppl, models):
    model, tokenizer = models["llama"]
    names = {"model": model, "tokenizer": tokenizer}
    with pytest.warns(UserWarning, match=r"The base gives NaN for texts\[0\], so what compares"):
        result = ppl.compare(TEXTS, base=broken(model), **names)
    assert math.isnan(result["mean_nll_difference"])
    assert not math.isnan(result["perplexity"])
    with pytest.warns(
        UserWarning, match=r"The model gives NaN for texts\[0\], so the perpl"
    ) as told:
        ppl.compare(TEXTS, base=model, **names | {"model": broken(model)})
    assert not any("The base gives NaN" in str(each.message) for each in told)


def test_each_perplexity_above_the_vocabulary_is_told_of(ppl, models):
    model, tokenizer = models["llama"]  # random
    base = variant(model, seed=7)
    with pytest.warns(UserWarning, match="above the size of the vocabulary") as told:
        ppl.compare(TEXTS, model=model, tokenizer=tokenizer, base=base)
    assert [str(each.message).split(" of ")[0] for each in told] == [
        "The perplexity",
        "The base_perplexity",
    ]


class Float32Head:
    """A Llama whose last layer is applied in float64, as the module applies it in float32."""

    def __init__(self, model):
        self._model, self.config = model, model.config

    def __call__(self, ids):
        hidden = self._model.model(ids).last_hidden_state.double()
        logits = hidden @ self._model.lm_head.weight.double().t()
        return SimpleNamespace(logits=logits)


def test_bfloat16(ppl, models):
    model, tokenizer = models["llama"]
    model, base = (variant(model, seed=7, scale=scale).to(torch.bfloat16) for scale in (0, 0.3))
    # One window at a time, because bfloat16 rounds otherwise in other batches.
    result = ppl.compare(TEXTS, model=model, tokenizer=tokenizer, base=base, batch_size=1)
    assert_equals(result, expected_result(Float32Head(model), Float32Head(base), tokenizer, TEXTS))


def test_a_model_against_itself(ppl):
    result = ppl.compare(TEXTS, model_id=TINY, base_id=TINY)
    assert result["mean_kl"] < 1e-7
    assert result["kl_max"] < 1e-7
    for end in ("", "_ci_low", "_ci_high"):
        assert result[f"perplexity_ratio{end}"] == 1
        assert result[f"same_top{end}"] == 1
        assert result[f"mean_nll_difference{end}"] == 0
    assert result["perplexity"] == pytest.approx(
        ppl.compute(predictions=TEXTS, model_id=TINY)["perplexity"], rel=1e-6
    )


def test_tokens(ppl, models):
    model, tokenizer = models["llama"]
    base = variant(model, seed=7)
    texts = [text for text in TEXTS if len(text) > 1]
    compared = ppl.compare_tokens(texts, model=model, tokenizer=tokenizer, base=base)
    own = ppl.score(texts, model=model, tokenizer=tokenizer)
    other = ppl.score(texts, model=base, tokenizer=tokenizer)
    for text, found, mine, theirs in zip(texts, compared, own, other, strict=True):
        assert (found.text, found.tokens, found.offsets) == (text, mine.tokens, mine.offsets)
        assert found.nll == pytest.approx(mine.nll, abs=1e-5)
        assert found.base_nll == pytest.approx(theirs.nll, abs=1e-5)
        ids = ids_of(tokenizer, text)
        q, p = log_probs(model, ids), log_probs(base, ids)
        assert found.kl == pytest.approx((p.exp() * (p - q)).sum(1).tolist(), abs=1e-5)
        assert found.top == [tokenizer.decode([i]) for i in q.argmax(1).tolist()]
        assert found.base_top == [tokenizer.decode([i]) for i in p.argmax(1).tolist()]
        ratio = np.exp(np.mean(np.subtract(mine.nll, theirs.nll)))
        assert found.perplexity_ratio == pytest.approx(ratio, rel=1e-5)


def test_contexts_and_presets(ppl, models):
    model, tokenizer = models["gpt2"]
    base = variant(model, seed=7)
    names = {"model": model, "tokenizer": tokenizer}
    for options in (
        {"contexts": ["Say it: "] * len(TEXTS)},
        {"preset": "lm-eval"},
        {"preset": "hf-docs"},
        {"preset": "gptq", "window": 16},
        {"max_length": 10},
    ):
        result = ppl.compare(TEXTS, base=base, **names, **options)
        contexts = {"predictions": TEXTS}
        own = ppl.compute(**contexts, **names, **options)
        other = ppl.compute(**contexts, model=base, tokenizer=tokenizer, **options)
        for name in ("perplexity", "mean_nll", "bits_per_byte"):
            assert result[name] == pytest.approx(own[name], rel=1e-6)
            assert result[f"base_{name}"] == pytest.approx(other[name], rel=1e-6)
        assert result["num_tokens"] == own["num_tokens"]


def test_the_numbers_of_llama_cpp(ppl, models):
    """Its statistics over the second half of each chunk, from the tokens themselves."""
    model, tokenizer = models["llama"]
    base = variant(model, seed=7)
    options = {"model": model, "tokenizer": tokenizer, "preset": "llama.cpp", "window": 16}
    result = ppl.compare(TEXTS, base=base, **options)
    (found,) = ppl.compare_tokens(TEXTS, base=base, **options)
    scored = ~np.isnan(found.nll)
    nll, base_nll, kl = (np.array(getattr(found, n))[scored] for n in ("nll", "base_nll", "kl"))
    assert len(nll) == result["num_tokens"] == scored.sum()

    def error(values):
        return np.std(values) / math.sqrt(len(values) - 1)

    delta_p = np.exp(-nll) - np.exp(-base_nll)
    expected = {
        "perplexity_standard_error": np.exp(nll.mean()) * error(nll),
        "mean_nll_difference_standard_error": error(nll - base_nll),
        "perplexity_ratio_standard_error": np.exp((nll - base_nll).mean()) * error(nll - base_nll),
        "nll_correlation": np.corrcoef(nll, base_nll)[0, 1],
        "mean_kl_standard_error": error(kl),
        "rms_delta_p_standard_error": 0.5 / np.sqrt(np.mean(delta_p**2)) * error(delta_p**2),
        "kl_p10": np.percentile(kl, 10),
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-4), name
    assert math.isnan(result["mean_kl_ci_low"])  # all texts are one


# --- vocabularies ---------------------------------------------------------------------------------


def test_a_padded_vocabulary_is_compared_on_the_common_ids(ppl, models):
    model, tokenizer = models["llama"]
    base = variant(model, seed=7)
    padded = variant(model, seed=7)
    padded.resize_token_embeddings(len(tokenizer) + 24)
    result = ppl.compare(TEXTS, model=model, tokenizer=tokenizer, base=padded)
    expected = expected_result(model, base, tokenizer, TEXTS)
    assert_equals(result, expected)
    assert f"|common_ids:{len(tokenizer)}|" in result["signature"]


def other_tokenizer(vocabulary="abcdefghijklmnopqrstuvwxyz .,;!?"):
    """One token for each character that it knows."""
    ids = {token: i for i, token in enumerate(["<unk>", "<s>", *vocabulary])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    letter = tokenizers.Regex(".")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(letter, "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def test_different_tokens_are_compared_by_their_bytes(ppl, models):
    model, tokenizer = models["llama"]
    other = other_tokenizer()
    torch.manual_seed(5)
    base = grown(AutoModelForCausalLM.from_config(config_of("gpt2", len(other))))
    result = ppl.compare(TEXTS, model=model, tokenizer=tokenizer, base=base, base_tokenizer=other)
    own = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    theirs = ppl.compute(predictions=TEXTS, model=base, tokenizer=other)
    assert not any(name.startswith(("mean_kl", "same_top", "perplexity_ratio")) for name in result)
    assert result["bits_per_byte"] == pytest.approx(own["bits_per_byte"])
    assert result["base_bits_per_byte"] == pytest.approx(theirs["bits_per_byte"])
    assert (result["num_tokens"], result["base_num_tokens"]) == (
        own["num_tokens"],
        theirs["num_tokens"],
    )
    difference = own["bits_per_byte"] - theirs["bits_per_byte"]
    assert result["bits_per_byte_difference"] == pytest.approx(difference)
    assert result["bits_per_byte_difference_ci_low"] < difference
    with pytest.raises(ValueError, match="positions= needs two models with the same tokens"):
        ppl.compare(
            TEXTS,
            model=model,
            tokenizer=tokenizer,
            base=base,
            base_tokenizer=other,
            positions=True,
        )
    with pytest.raises(ValueError, match="different tokens, so none can be compared"):
        ppl.compare_tokens(TEXTS, model=model, tokenizer=tokenizer, base=base, base_tokenizer=other)


def test_tokenizers_that_look_alike_are_refused(ppl, models):
    model, _ = models["llama"]
    one = other_tokenizer()
    moved = other_tokenizer("zyxwvutsrqponmlkjihgfedcba .,;!?")
    with pytest.raises(
        ValueError, match="same tokens, but under other ids: 'a' is 2 for the model"
    ):
        ppl.compare(TEXTS, model=model, tokenizer=one, base=model, base_tokenizer=moved)


def test_tokenizers_that_split_texts_differently_are_refused(ppl, models):
    model, tokenizer = models["llama"]
    other = AutoTokenizer.from_pretrained(TINY)
    other.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.raises(ValueError, match="give other ids for the text that begins 'The quick"):
        ppl.compare(TEXTS, model=model, tokenizer=tokenizer, base=model, base_tokenizer=other)


def test_an_added_token_changes_nothing(ppl, models):
    """As a fine-tuned model has it."""
    model, tokenizer = models["llama"]
    other = AutoTokenizer.from_pretrained(TINY)
    other.add_tokens(["<|tool|>"])
    tuned = variant(model, seed=7)
    tuned.resize_token_embeddings(len(other))
    result = ppl.compare(TEXTS, model=tuned, tokenizer=other, base=model, base_tokenizer=tokenizer)
    assert result["mean_kl"] > 1e-3


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_gets_a_sentence(ppl, models, tmp_path):
    model, tokenizer = models["llama"]
    names = {"model": model, "tokenizer": tokenizer}
    with pytest.raises(ValueError, match="A comparison needs a base: pass base_id="):
        ppl.compare(TEXTS, **names)
    with pytest.raises(ValueError, match="A comparison needs a base"):
        ppl.compare(TEXTS, base=model, base_id=TINY, **names)
    with pytest.raises(ValueError, match="Pass either model_id=, or model="):
        ppl.compare(TEXTS, base=model)
    with pytest.raises(ValueError, match="base_device= and base_kwargs= go with base_id="):
        ppl.compare(TEXTS, base=model, base_device="cpu", **names)
    with pytest.raises(ValueError, match="base_tokenizer= does not go with a saved base"):
        ppl.compare(TEXTS, base=tmp_path, base_tokenizer=tokenizer, **names)
    with pytest.raises(TypeError, match="unknown argument 'bas'"):
        ppl.compare(TEXTS, bas=model, **names)
    with pytest.raises(TypeError, match="predictions must be a list of texts, got one string"):
        ppl.compare("a text", base=model, **names)
    with pytest.raises(ValueError, match="is no saved base, or a damaged one: base.json"):
        ppl.compare(TEXTS, base=tmp_path / "missing", **names)
    with pytest.raises(ValueError, match="base_id=.*could not be loaded: there is no directory"):
        ppl.compare(TEXTS, base_id=str(tmp_path / "missing"), **names)


def test_an_encoder_is_refused(ppl, models):
    model, tokenizer = models["llama"]
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    encoder = grown(transformers.BertForMaskedLM(config))
    with pytest.raises(ValueError, match="a causal language model is needed"):
        ppl.compare(TEXTS, model=model, tokenizer=tokenizer, base=encoder)


def test_the_models_are_named_in_the_signature(ppl):
    signature = ppl.compare(TEXTS[:2], model_id=TINY, base_id=TINY)["signature"]
    assert f"model:{TINY}|weights:" in signature
    assert f"|base_model:{TINY}|base_weights:" in signature
