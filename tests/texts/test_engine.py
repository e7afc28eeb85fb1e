"""Texts and a model, against plain float64 loops that score one window at a time."""

import json
import math
import pickle

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from other_models import make_seq2seq
from support import ROOT
from text_oracles import (
    NAMES,
    TEXTS,
    TINY,
    assert_equals,
    config_of,
    expected_result,
    flat,
    ids_of,
    ignore_empty,
    plain_nll,
    sliding_nll,
    window_nll,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppleval import Perplexity, __version__


@ignore_empty
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [None, 1, 2, 16])
def test_equals_a_loop_over_the_texts(ppl, models, name, batch_size):
    model, tokenizer = models[name]
    expected = expected_result(model, tokenizer, TEXTS)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        result = ppl.compute(
            predictions=TEXTS, model=model, tokenizer=tokenizer, batch_size=batch_size
        )
        assert_equals(result, expected)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = ppl.compute(
        predictions=[TEXTS[i] for i in order],
        model=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
    )
    expected["perplexities"] = [expected["perplexities"][i] for i in order]
    assert_equals(shuffled, expected)


def test_batches_change_nothing_to_1e_6(ppl):
    results = [
        ppl.compute(predictions=TEXTS, model_id=TINY, batch_size=size) for size in (1, 3, None)
    ]
    results.append(ppl.compute(predictions=TEXTS[::-1], model_id=TINY))
    for result in results[1:]:
        for name in ("perplexity", "bits_per_byte", "perplexity_ci_low", "mean_perplexity"):
            assert result[name] == pytest.approx(results[0][name], rel=1e-6)


def test_result_of_texts(ppl):
    result = ppl.compute(predictions=TEXTS, model_id=TINY)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    nll = [sum(window_nll(model, ids_of(tokenizer, text), 512, 256)) for text in TEXTS]
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    num_words = sum(len(text.split()) for text in TEXTS)
    assert result["num_bytes"] == num_bytes
    assert result["num_words"] == num_words
    assert result["num_sequences"] == len(TEXTS)
    assert result["bits_per_byte"] == pytest.approx(sum(nll) / math.log(2) / num_bytes, rel=2e-5)
    assert result["byte_perplexity"] == pytest.approx(math.exp(sum(nll) / num_bytes), rel=2e-5)
    assert result["word_perplexity"] == pytest.approx(math.exp(sum(nll) / num_words), rel=2e-4)
    assert result["mean_perplexity"] == pytest.approx(np.mean(result["perplexities"]))
    assert result["perplexity_ci_low"] < result["perplexity"] < result["perplexity_ci_high"]
    assert "num_truncated" not in result
    assert result["signature"] == (
        f"model:{TINY}|weights:ca7b6549|model_dtype:float32|quantization:none|tokenizer:21674b14|preset:none|start:<|bos|>|start_each_window:yes|max_length:none|window:512|"
        "stride:256|contexts:no|dtype:float32|backend:auto|"
        f"version:{__version__}"
    )


def test_the_held_out_text_at_the_figure_of_its_card(ppl):
    lines = (ROOT / "tiny_model" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    result = ppl.compute(predictions=texts, model_id=TINY)
    # The card's 1.620 is of disjoint blocks; sliding windows have more context.
    assert 1.55 < result["bits_per_byte"] < 1.62


# --- start token --------------------------------------------------------------------------------


@ignore_empty
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_without_start_token_the_second_token_is_the_first_scored(ppl, models, name):
    model, tokenizer = models[name]
    result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer, add_start_token=False)
    assert_equals(result, expected_result(model, tokenizer, TEXTS, start=False))
    assert "|start:none|" in result["signature"]


@ignore_empty
def test_a_tokenizer_without_bos_says_so(ppl, models):
    model, tokenizer = models["qwen"]
    result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert "|start:none(no-bos)|" in result["signature"]
    # Bytes are those of what was scored: the first token of each text was not.
    unscored = sum(
        len(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:1]).encode())
        for text in TEXTS
    )
    assert result["num_bytes"] == sum(len(text.encode()) for text in TEXTS) - unscored


def test_a_start_token_by_id(ppl, models):
    model, tokenizer = models["qwen"]
    result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer, add_start_token=1)
    ids = [[1, *ids_of(tokenizer, text)] for text in TEXTS]
    nll = flat(sliding_nll(model, row, bos=1) for row in ids)
    assert result["mean_nll"] == pytest.approx(np.mean(nll), rel=2e-5)
    assert "|start:<|eos|>|" in result["signature"]


def test_there_is_never_a_second_bos(ppl, models):
    model, tokenizer = models["llama"]
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id  # it adds one by itself
    (score,) = ppl.score(["x y"], model=model, tokenizer=tokenizer)
    assert "<|bos|>" not in score.tokens
    expected = sliding_nll(model, ids_of(tokenizer, "x y"))
    assert score.nll == pytest.approx(expected, rel=1e-4)


# --- truncation and windows ---------------------------------------------------------------------


@pytest.mark.parametrize("start", [True, False])
def test_max_length_cuts_and_says_how_many(ppl, models, start):
    model, tokenizer = models["llama"]
    texts = [text for text in TEXTS if text != "a"]
    result = ppl.compute(
        predictions=texts,
        model=model,
        tokenizer=tokenizer,
        max_length=10,
        add_start_token=start,
    )
    ids = [ids_of(tokenizer, text, start) for text in texts]
    assert result["num_truncated"] == sum(len(row) > 10 for row in ids)
    nll = [plain_nll(model, row[:10], 1, len(row[:10])) for row in ids]
    assert result["mean_nll"] == pytest.approx(np.mean(flat(nll)), rel=2e-5)
    assert "|max_length:10|" in result["signature"]
    kept = sum(
        len(tokenizer.decode(row[(0 if start else 1) : 10], skip_special_tokens=True).encode())
        for row in ids
    )
    assert abs(result["num_bytes"] - kept) <= 3  # a cut inside a character of several bytes


@pytest.mark.parametrize(("window", "stride"), [(24, 1), (24, 24), (7, 3), (1, 1)])
def test_window_and_stride(ppl, models, window, stride):
    model, tokenizer = models["gpt2"]
    result = ppl.compute(
        predictions=TEXTS[2:4], model=model, tokenizer=tokenizer, window=window, stride=stride
    )
    nll = [
        sliding_nll(model, ids_of(tokenizer, text), context=window, stride=stride)
        for text in TEXTS[2:4]
    ]
    assert result["mean_nll"] == pytest.approx(np.mean(flat(nll)), rel=2e-5)
    assert f"|window:{window}|stride:{stride}|" in result["signature"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"preset": "gpt"}, "preset must be one of .*'lm-eval'.* got 'gpt'"),
        ({"preset": "lm-eval", "stride": 3}, 'stride has no meaning with preset="lm-eval"'),
        ({"window": 1000}, "window is 1000 tokens, but the model .* reads at most 512"),
        ({"stride": 600}, "stride must be between 1 and the window of 512"),
        ({"max_length": 0}, "max_length must be a whole number, at least 1, got 0"),
        ({"preset": "llama.cpp", "window": 2}, "a window of 2 tokens has nothing to score"),
    ],
)
def test_bad_text_options_are_named(ppl, options, match):
    with pytest.raises(ValueError, match=match):
        ppl.compute(predictions=TEXTS, model_id=TINY, **options)


# --- contexts and score -------------------------------------------------------------------------


@pytest.mark.parametrize("contexts", [["one"], ["one"] * 8])
def test_contexts_are_as_many_as_texts(ppl, contexts):
    with pytest.raises(ValueError, match="contexts must hold one prompt for each text"):
        ppl.compute(predictions=TEXTS, contexts=contexts, model_id=TINY)


# --- kinds of input -----------------------------------------------------------------------------


def test_texts_come_as_anything_that_is_iterated(ppl):
    expected = ppl.compute(predictions=TEXTS, model_id=TINY)
    column = datasets.Dataset.from_dict({"text": TEXTS})["text"]
    for texts in (tuple(TEXTS), column, (text for text in TEXTS), np.array(TEXTS)):
        result = ppl.compute(predictions=texts, model_id=TINY)
        assert result["perplexities"] == pytest.approx(expected["perplexities"])


def test_each_text_is_known_as_soon_as_it_and_those_before_it_are(ppl, models):
    """--per-text writes them so; a portion of texts is scored longest first."""
    model, tokenizer = models["llama"]
    texts = ["word " * n for n in (9, 2, 8, 3, 7)]
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        scorer = ppl.text_scorer(model=model, tokenizer=tokenizer)
        passes.clear()
        known = []
        for text, _ in scorer.sums(texts, batch_size=1):
            known.append((text, len(passes)))
    finally:
        handle.remove()
    assert [text for text, _ in known] == texts
    # The longest is known when the second has been launched; "word word" is the last of all.
    assert [count for _, count in known] == [2, 5, 5, 5, 5]


def test_texts_added_before_compute_names_the_model(ppl):
    expected = ppl.compute(predictions=TEXTS, model_id=TINY)
    ppl.add_batch(predictions=TEXTS[:2])
    ppl.add_batch(predictions=TEXTS[2:5])
    assert len(ppl) == 5
    copy = pickle.loads(pickle.dumps(ppl))
    for metric in (ppl, copy):
        result = metric.compute(predictions=TEXTS[5:], model_id=TINY)
        assert result["perplexities"] == pytest.approx(expected["perplexities"])
        assert len(metric) == 0


@ignore_empty
def test_an_empty_text_is_nan_and_named(ppl):
    with pytest.warns(UserWarning, match=r"2 of 4 texts have no token .*first of them predictions"):
        result = ppl.compute(predictions=["One.", "", "Two.", ""], model_id=TINY)
    expected = ppl.compute(predictions=["One.", "Two."], model_id=TINY)
    assert [math.isnan(p) for p in result["perplexities"]] == [False, True, False, True]
    for name in ("perplexity", "mean_perplexity", "num_sequences", "num_bytes"):
        assert result[name] == pytest.approx(expected[name], rel=1e-6)


ERRORS = {
    "bare string": (TypeError, {"predictions": "text"}, r"string\. Wrap it in a list"),
    "bare context": (TypeError, {"contexts": "text"}, "contexts must be a list of texts"),
    "empty list": (ValueError, {"predictions": []}, "predictions holds no texts"),
    "not a string": (TypeError, {"predictions": ["a", 3]}, r"predictions\[1\] must be a string"),
    "none": (TypeError, {"predictions": [None]}, "must be a string, got NoneType"),
    "references": (ValueError, {"references": ["a"]}, "without references"),
    "both": (ValueError, {"model": 1}, "Pass either model_id=, or model= and tokenizer="),
    "misspelt": (
        TypeError,
        {"strid": 3},
        "unknown argument 'strid'. Did you mean stride.*arguments are predictions, .*, batch_size,",
    ),
    "device of a model": (
        ValueError,
        {"model_id": None, "model": 1, "device": "cpu"},
        "device= and model_kwargs= go with model_id=",
    ),
    "token option": (ValueError, {"shift": True}, "shift= goes with logits and references="),
    "mapping": (
        TypeError,
        {"predictions": {"text": TEXTS}},
        r"got a table \(dict\). Pass one of its columns",
    ),
    "table": (TypeError, {"predictions": pd.DataFrame({"text": TEXTS})}, "got a table"),
    "surrogate": (
        ValueError,
        {"predictions": ["a", "\ud800"]},
        r"predictions\[1\] is no valid Uni",
    ),
    "arrays": (
        TypeError,
        {"predictions": [np.array(["a", "b"])]},
        r"predictions\[0\] must be a str",
    ),
    "number for texts": (TypeError, {"predictions": 5}, "must be a list of texts, got int"),
    "number for contexts": (
        TypeError,
        {"contexts": 5},
        "contexts must be a list of texts, got int",
    ),
    "model id": (TypeError, {"model_id": 5}, "model_id must be a name or a path, got int. A model"),
    "long model id": (ValueError, {"model_id": "x" * 300}, "could not be loaded"),
    "list for preset": (ValueError, {"preset": ["lm-eval"]}, "preset must be one of"),
    "start token": (
        ValueError,
        {"preset": "hf-docs", "add_start_token": False},
        'add_start_token has no meaning with preset="hf-docs"',
    ),
    "batch size": (ValueError, {"batch_size": 0}, "batch_size must be a whole number, at least 1"),
    "device": (ValueError, {"device": "nonsense"}, "could not be loaded.*nonsense"),
    "dtype": (ValueError, {"model_kwargs": {"dtype": "foo"}}, "could not be loaded"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_of_texts(ppl, case):
    error, change, match = ERRORS[case]
    with pytest.raises(error, match=match):
        ppl.compute(**({"predictions": TEXTS, "model_id": TINY} | change))


def test_texts_without_a_model(ppl):
    with pytest.raises(ValueError, match="Texts need a model: pass model_id="):
        ppl.compute(predictions=["some text"])
    ppl.add_batch(predictions=["some text"])
    with pytest.raises(ValueError, match="Texts need a model"):
        ppl.compute()


def test_texts_and_logits_do_not_mix(ppl):
    logits = {"predictions": torch.zeros(1, 2, 3), "references": [[0, 0]]}
    ppl.add_batch(**logits)
    with pytest.raises(ValueError, match="Batches of logits are pending"):
        ppl.compute(predictions=TEXTS, model_id=TINY)
    with pytest.raises(ValueError, match="Batches of logits are pending, and texts do not mix"):
        ppl.add_batch(predictions=TEXTS)
    assert len(ppl) == 1
    ppl.reset()
    ppl.add_batch(predictions=TEXTS)
    for call in (ppl.add_batch, ppl):
        with pytest.raises(ValueError, match="Texts are pending, and logits do not mix"):
            call(**logits)
    assert len(ppl) == len(TEXTS)


def test_a_bad_text_is_refused_when_it_is_added(ppl):
    ppl.add_batch(predictions=["one", "two"])
    with pytest.raises(TypeError, match=r"predictions\[1\] must be a string, got int"):
        ppl.add_batch(predictions=["a", 3])
    with pytest.raises(ValueError, match="Texts go without sample_weight"):
        ppl.add_batch(predictions=["a"], sample_weight=[1])
    assert len(ppl) == 2


def test_columns_are_added(ppl):
    column = datasets.Dataset.from_dict({"text": ["one two", "three"]})["text"]
    for texts in (column, np.array(["four"]), pd.Series(["five", "six"])):
        ppl.add_batch(predictions=texts)
    ppl.add(prediction="seven")
    assert ppl.compute(model_id=TINY)["num_sequences"] == 6


@pytest.mark.parametrize("name", ["tokenizer", "contexts", "batch_size", "device", "model_kwargs"])
def test_what_goes_with_a_model_is_refused_without(ppl, name):
    with pytest.raises(ValueError, match=f"{name}= goes with texts and model_id="):
        ppl.compute(predictions=torch.zeros(1, 2, 3), references=[[0, 0]], **{name: 1})


def test_logits_go_with_arguments_of_a_model_that_say_nothing(ppl):
    call = {"predictions": torch.zeros(1, 2, 4), "references": [[0, 0]]}
    unused = {"model_id": None, "tokenizer": None, "trust_remote_code": True}
    assert ppl.compute(**call, **unused)["perplexity"] == pytest.approx(4)


def test_a_misspelt_argument_of_a_model_is_named(ppl):
    with pytest.raises(TypeError, match=r"'modelid'\. Did you mean model_id\?.*, model_id, "):
        ppl.compute(predictions=TEXTS, modelid=TINY)
    with pytest.raises(TypeError, match=r"'modelid'\. Did you mean model_id\?.*, model_id, "):
        ppl.score(TEXTS, modelid=TINY)


def test_a_model_that_gives_nan_is_named(ppl, models):
    tokenizer = models["llama"][1]
    model = AutoModelForCausalLM.from_config(config_of("llama", len(tokenizer))).eval()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.warns(UserWarning, match=r"The model gives NaN for predictions\[0\]"):
        result = ppl.compute(predictions=["Hello there"], model=model, tokenizer=tokenizer)
    assert math.isnan(result["perplexity"])


def test_a_perplexity_above_the_vocabulary_is_told_of(ppl, models):
    model, tokenizer = models["llama"]  # random
    message = f"The perplexity of .* is above the size of the vocabulary, {len(tokenizer)}: "
    with pytest.warns(
        UserWarning, match=f"{message}worse than guessing.*an untrained model"
    ) as told:
        result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert len(told) == 1
    assert result["perplexity"] > len(tokenizer)


# --- models -------------------------------------------------------------------------------------


def test_dtype_of_the_reduction_is_that_of_the_options():
    ppl = Perplexity(dtype="float64")
    assert "|dtype:float64|" in ppl.compute(predictions=TEXTS, model_id=TINY)["signature"]


@pytest.mark.parametrize(
    "side", [{"model_kwargs": {"dtype": "float64"}}, {"base_kwargs": {"dtype": "float64"}}]
)
def test_a_float64_model_is_reduced_in_float64_as_the_signature_says(ppl, side):
    if "model_kwargs" in side:
        assert "|dtype:float64|" in ppl.text_scorer(model_id=TINY, **side).signature(False)
    comparer = ppl.text_comparer(base_id=TINY, model_id=TINY, **side)
    assert "|dtype:float64|" in comparer.signature(False)


def test_dropout_is_off_and_training_goes_on(ppl, models):
    tokenizer = models["gpt2"][1]
    config = config_of("gpt2", len(tokenizer))
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.5
    model = AutoModelForCausalLM.from_config(config).train()
    frozen = model.transformer.h[0].eval()
    first, second = (
        ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer) for _ in range(2)
    )
    assert first == second
    assert model.training
    assert not frozen.training
    scored = ppl.text_scorer(model=model, tokenizer=tokenizer).score(TEXTS)
    next(scored)  # a reader who stops in the middle finds the model as it was
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_default_device(ppl):
    expected = ppl.compute(predictions=TEXTS, model_id=TINY)
    try:
        torch.set_default_device("meta")
        assert ppl.compute(predictions=TEXTS, model_id=TINY) == expected
    finally:
        torch.set_default_device(None)


def test_a_model_that_changed_is_probed_again(ppl):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_config(config_of("llama", len(tokenizer))).eval()

    def adapt():
        model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Softshrink(0.1))

    for change in (
        lambda: None,
        lambda: model.resize_token_embeddings(len(tokenizer) + 64),
        adapt,
        lambda: model.double(),
    ):
        change()
        result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
        assert_equals(result, expected_result(model, tokenizer, TEXTS))


def test_a_tokenizer_without_offsets(ppl):
    """Bytes of what was scored, without the places of tokens."""
    tokenizer = transformers.ByT5Tokenizer()
    model = AutoModelForCausalLM.from_config(config_of("llama", len(tokenizer))).eval()
    text = "Return the naïve list. " * 4
    kwargs = {"model": model, "tokenizer": tokenizer, "add_start_token": 1}
    whole = ppl.compute(predictions=[text], **kwargs)
    assert whole["num_bytes"] == whole["num_tokens"] == len(text.encode())
    cut = ppl.compute(predictions=[text], max_length=9, **kwargs)
    assert cut["num_bytes"] == cut["num_tokens"] == 8
    (score,) = ppl.score([text], **kwargs)
    assert score.offsets is None


def bert(tokenizer):
    return transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )


def test_other_kinds_of_models_are_refused(ppl, models):
    tokenizer = models["llama"][1]
    masked = transformers.BertForMaskedLM(bert(tokenizer)).eval()
    with pytest.raises(ValueError, match="looks at the tokens behind the one that it predicts"):
        ppl.compute(predictions=TEXTS, model=masked, tokenizer=tokenizer)
    headless = transformers.LlamaModel(config_of("llama", len(tokenizer))).eval()
    with pytest.raises(ValueError, match="returned no logits"):
        ppl.compute(predictions=TEXTS, model=headless, tokenizer=tokenizer)
    classifier = transformers.BertForSequenceClassification(bert(tokenizer)).eval()
    with pytest.raises(ValueError, match=r"logits of shape \(5, 2\)"):
        ppl.compute(predictions=TEXTS, model=classifier, tokenizer=tokenizer)
    t5, t5_tokenizer = make_seq2seq("t5")
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        ppl.compute(predictions=TEXTS, model=t5, tokenizer=t5_tokenizer)


def test_what_is_no_model_and_no_tokenizer(ppl, models):
    model, tokenizer = models["llama"]
    with pytest.raises(TypeError, match="model must be a transformers model, got str"):
        ppl.compute(predictions=TEXTS, model="gpt2", tokenizer=tokenizer)
    with pytest.raises(TypeError, match="model= goes with the tokenizer"):
        ppl.compute(predictions=TEXTS, model=model)


def test_a_tokenizer_that_is_not_the_models(ppl, models):
    tokenizer = models["llama"][1]
    model = AutoModelForCausalLM.from_config(config_of("llama", 100)).eval()
    with pytest.raises(ValueError, match="has 100 embeddings: this tokenizer is not the model's"):
        ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
