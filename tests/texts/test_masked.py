"""Pseudo-perplexity of masked models, against loops that read one masked copy at a time."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from other_models import (
    CONTEXT,
    MASKED,
    TEXTS,
    make_masked,
    make_tokenizer,
    masked_config,
    masked_nll,
    needs_network,
)
from support import flat
from text_oracles import grown, make_models

from ppleval import Perplexity
from ppleval.cli.main import main

CONTEXTS = ["Sleep. ", "", "The letter ", "The dog reads it. " * 4, "un"]


@pytest.fixture(scope="module")
def masked():
    """Name -> (model, tokenizer), tiny and random."""
    return {name: make_masked(name) for name in MASKED}


@pytest.fixture(scope="module")
def ppl():
    """One metric, whose options come with each call."""
    return Perplexity()


def ends_of(words, pseudo):
    """For each token, where the masks end when it is scored."""
    last = {word: i for i, word in enumerate(words)}
    return [i + 1 if pseudo == "original" else last[word] + 1 for i, word in enumerate(words)]


def expected_nll(model, tokenizer, text, pseudo, window=CONTEXT, context=""):
    """Oracle: the nll of each token of the text behind its context."""
    encoded = tokenizer(context + text, add_special_tokens=False, return_offsets_mapping=True)
    head, tail = tokenizer("a").input_ids[:1], tokenizer("a").input_ids[-1:]
    ids, ends = encoded.input_ids, ends_of(encoded.word_ids(), pseudo)
    first = sum(bool(context) and end <= len(context) for _, end in encoded.offset_mapping)
    return [
        masked_nll(model, ids, (head, tail), tokenizer.mask_token_id, at, ends, window - 2)
        for at in range(first, len(ids))
    ]


@pytest.mark.parametrize("pseudo", ["original", "within_word_l2r"])
@pytest.mark.parametrize("name", MASKED)
def test_equals_one_masked_copy_at_a_time(ppl, masked, name, pseudo):
    """Also longer than the context: TEXTS[3] is, by any of the tokenizers."""
    model, tokenizer = masked[name]
    expected = [expected_nll(model, tokenizer, text, pseudo) for text in TEXTS]
    assert len(expected[3]) > CONTEXT
    options = {"model": model, "tokenizer": tokenizer, "pseudo": pseudo}
    for batch_size in (None, 3):
        scores = ppl.score(TEXTS, **options, batch_size=batch_size)
        for text, score, nll in zip(TEXTS, scores, expected, strict=True):
            assert score.nll == pytest.approx(nll, rel=2e-5)
            assert "".join(text[slice(*place)] for place in score.offsets) == text


def test_the_scorer_runs_the_output_layer_on_the_masked_positions_alone(ppl, masked):
    model, tokenizer = masked["bert"]
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer, pseudo="original")
    assert scorer.model.takes_batches
    assert scorer.model.head.layer is model.get_output_embeddings()
    (draft,) = scorer.drafts(TEXTS[:1])
    spans = [scorer.reader.span(0, draft.encoded, window) for window in draft.windows]
    assert [span.targets for span in spans] == [[i] for i in draft.encoded.ids]
    assert [span.inputs.count(tokenizer.mask_token_id) for span in spans] == [1] * len(spans)


def test_the_later_tokens_of_a_word_are_masked_by_hand(ppl, masked):
    """ "walkings" has several tokens, "mat" and "." one each."""
    model, tokenizer = masked["bert"]
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer, pseudo="within_word_l2r")
    (draft,) = scorer.drafts(["mat walkings."])
    tokens = tokenizer.tokenize("mat walkings.")
    begins = [i for i, token in enumerate(tokens) if not token.startswith("##")]
    begin, stop = begins[-2:]  # of "walkings", of "."
    assert stop - begin >= 2
    for at, window in enumerate(draft.windows):
        end = stop if begin <= at < stop else at + 1 if at >= stop else begins[begins.index(at) + 1]
        read = tokenizer.convert_ids_to_tokens(scorer.reader.span(0, draft.encoded, window).inputs)
        masks = ["[MASK]"] * (end - at)
        assert read == ["[CLS]", *tokens[:at], *masks, *tokens[end:], "[SEP]"]


def test_a_long_text_is_read_around_each_token(ppl, masked):
    model, tokenizer = masked["roberta"]
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer, pseudo="original", window=9)
    (draft,) = scorer.drafts(TEXTS[:1])
    size, num_ids = 7, len(draft.encoded.ids)
    assert num_ids > 12
    assert [window.start for window in draft.windows] == [
        min(max(at - 3, 0), num_ids - size) for at in range(num_ids)
    ]
    assert {
        len(scorer.reader.span(0, draft.encoded, window).inputs) for window in draft.windows
    } == {9}
    (score,) = scorer.score(TEXTS[:1])
    expected = expected_nll(model, tokenizer, TEXTS[0], "original", window=9)
    assert score.nll == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("pseudo", ["original", "within_word_l2r"])
def test_a_context_is_read_and_not_scored(ppl, masked, pseudo):
    """Also one that the window of the first token does not reach back to."""
    model, tokenizer = masked["roberta"]
    options = {"model": model, "tokenizer": tokenizer, "pseudo": pseudo, "contexts": CONTEXTS}
    scores = ppl.score(TEXTS, **options)
    for text, context, score in zip(TEXTS, CONTEXTS, scores, strict=True):
        expected = expected_nll(model, tokenizer, text, pseudo, context=context)
        assert score.nll == pytest.approx(expected, rel=2e-5)
    with pytest.warns(UserWarning, match="1 of 5 contexts are not read as a whole: a window of 24"):
        result = ppl.compute(predictions=TEXTS, **options)
    assert result["num_truncated_contexts"] == 1
    apart = ppl.score(TEXTS[:1], **options | {"contexts": ["Sleep"]}, join_contexts="ids")
    ids = [tokenizer(t, add_special_tokens=False) for t in ("Sleep", TEXTS[0])]
    words = [(number, word) for number, part in enumerate(ids) for word in part.word_ids()]
    both, before = ids[0].input_ids + ids[1].input_ids, len(ids[0].input_ids)
    special = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    assert apart[0].nll == pytest.approx(
        [
            masked_nll(
                model, both, special, tokenizer.mask_token_id, at, ends_of(words, pseudo), 22
            )
            for at in range(before, len(both))
        ],
        rel=2e-5,
    )


def test_the_result_of_a_corpus(ppl, masked):
    model, tokenizer = masked["bert"]
    texts = [*TEXTS, ""]
    with pytest.warns(UserWarning, match=r"1 of 6 texts have no token to score.*predictions\[5\]"):
        result = ppl.compute(
            predictions=texts,
            model=model,
            tokenizer=tokenizer,
            pseudo="within_word_l2r",
            groups=["a", "b", "a", "b", "a", "b"],
        )
    nll = [expected_nll(model, tokenizer, text, "within_word_l2r") for text in TEXTS]
    whole = np.concatenate(nll)
    assert result["perplexity"] == pytest.approx(np.exp(whole.mean()), rel=2e-5)
    assert result["num_tokens"] == len(whole)
    assert result["num_bytes"] == len("".join(TEXTS).encode())
    assert math.isnan(result["perplexities"][5])
    assert result["perplexities"][:5] == pytest.approx([np.exp(np.mean(n)) for n in nll], rel=2e-5)
    group = np.concatenate([nll[0], nll[2], nll[4]])
    assert result["groups"]["a"]["mean_nll"] == pytest.approx(group.mean(), rel=2e-5)
    settings = "|pseudo:within_word_l2r|max_length:none|window:24|contexts:no|"
    assert settings in result["signature"]


def test_entropy_ranks_and_expected_tokens(ppl, masked):
    model, tokenizer = masked["electra"]
    options = {"model": model, "tokenizer": tokenizer, "pseudo": "original", "top_k": 2}
    (score,) = ppl.score(TEXTS[:1], **options)
    ids = tokenizer(TEXTS[0]).input_ids
    ids[3] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, 3].double()
    log_p = logits.log_softmax(-1)
    assert score.entropy[2] == pytest.approx(-(log_p.exp() @ log_p).item(), rel=2e-5)
    target = tokenizer(TEXTS[0]).input_ids[3]
    assert score.ranks[2] == 1 + (logits > logits[target]).sum()
    assert score.expected[2][0][1] == pytest.approx(-log_p.max().item(), rel=2e-5)


def test_max_length_cuts_the_ids_of_a_text(ppl, masked):
    model, tokenizer = masked["bert"]
    options = {"model": model, "tokenizer": tokenizer, "pseudo": "original"}
    result = ppl.compute(predictions=TEXTS, **options, max_length=6)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert result["num_tokens"] == sum(len(i[:6]) for i in ids)
    assert result["num_truncated"] == sum(len(i) > 6 for i in ids)
    place = tokenizer(TEXTS[3], return_offsets_mapping=True).offset_mapping[6]
    whole = [text for text, i in zip(TEXTS, ids, strict=True) if len(i) <= 6]
    alone = ppl.compute(predictions=TEXTS[3:4], **options, max_length=6)
    assert alone["num_bytes"] == len(TEXTS[3][: place[1]].encode())
    assert result["num_bytes"] >= alone["num_bytes"] + len("".join(whole).encode())


class ReactsToPadding(transformers.BertForMaskedLM):
    """As convolutions over tokens do."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        output.logits = output.logits * (1 + 0.1 * input_ids.shape[1])
        return output


def test_a_model_that_reacts_to_padding_is_scored_one_by_one(ppl, masked):
    model, tokenizer = masked["bert"]
    torch.manual_seed(0)
    reacting = grown(ReactsToPadding(model.config))
    scorer = ppl.text_scorer(model=reacting, tokenizer=tokenizer, pseudo="original")
    assert not scorer.model.takes_batches
    for text, score in zip(TEXTS[:3], scorer.score(TEXTS[:3]), strict=True):
        expected = expected_nll(reacting, tokenizer, text, "original")
        assert score.nll == pytest.approx(expected, rel=2e-5)


# Loading and refusals


def test_a_model_by_name_is_loaded_as_a_masked_one(ppl, masked, tmp_path):
    model, tokenizer = masked["bert"]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    by_name = {"model_id": str(tmp_path), "device": "cpu"}
    result = ppl.compute(predictions=TEXTS, **by_name, pseudo="original")
    expected = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer, pseudo="original")
    assert result["perplexities"] == expected["perplexities"]
    hint = 'For the pseudo-perplexity of a masked one pass pseudo="within_word_l2r"'
    with pytest.raises(ValueError, match=hint):
        ppl.compute(predictions=TEXTS, **by_name)
    with pytest.raises(ValueError, match=hint):
        ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)


def test_deberta_by_name_is_refused_with_a_hint(ppl, masked, tmp_path):
    """transformers has no causal class for it, so that it cannot be loaded as such."""
    model, tokenizer = masked["deberta"]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='could not be loaded as a causal.*pass pseudo="within'):
        ppl.compute(predictions=TEXTS, model_id=str(tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pseudo": "l2r"}, "pseudo must be one of .'original', 'within_word_l2r'. or None"),
        ({"preset": "lm-eval"}, 'preset has no meaning with pseudo="original"'),
        ({"stride": 4}, "stride has no meaning"),
        ({"start_each_window": True}, "start_each_window has no meaning"),
        ({"add_start_token": False}, "add_start_token has no meaning"),
        ({"add_start_token": 1}, "add_start_token has no meaning"),
        ({"positions": True}, "positions has no meaning"),
        ({"window": 2}, "window must be at least 3, because the tokenizer adds 2 special tokens"),
        ({"window": 25}, "window is 25 tokens, but the model .* reads at most 24"),
    ],
)
def test_options_that_do_not_fit(ppl, masked, given, message):
    model, tokenizer = masked["bert"]
    options = {"model": model, "tokenizer": tokenizer, "pseudo": "original"} | given
    with pytest.raises(ValueError, match=message):
        ppl.compute(predictions=TEXTS, **options)


def test_models_and_tokenizers_that_do_not_fit(ppl, masked):
    bert, tokenizer = masked["bert"]
    causal, causal_tokenizer = make_models()["llama"]
    with pytest.raises(ValueError, match="has no mask token"):
        ppl.score(TEXTS, model=causal, tokenizer=causal_tokenizer, pseudo="original")
    causal_tokenizer.mask_token = causal_tokenizer.convert_ids_to_tokens(5)
    with pytest.raises(ValueError, match="does not look at the tokens behind"):
        ppl.score(TEXTS, model=causal, tokenizer=causal_tokenizer, pseudo="original")
    slow = transformers.PerceiverTokenizer()
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        ppl.score(TEXTS, model=bert, tokenizer=slow, pseudo="within_word_l2r")
    with pytest.raises(ValueError, match="this tokenizer is not the model's"):
        ppl.score(TEXTS, model=bert, tokenizer=slow, pseudo="original")
    classifier = transformers.BertForSequenceClassification(bert.config)
    with pytest.raises(ValueError, match="a masked language model is needed"):
        ppl.score(TEXTS, model=classifier, tokenizer=tokenizer, pseudo="original")


def test_comparisons_are_of_causal_models(ppl, masked, tmp_path):
    model, tokenizer = masked["bert"]
    named = {"model": model, "tokenizer": tokenizer, "pseudo": "original"}
    with pytest.raises(ValueError, match="compare takes causal models only"):
        ppl.compare(TEXTS, base=model, **named)
    with pytest.raises(ValueError, match="compare takes causal models only"):
        ppl.compare_tokens(TEXTS, base=model, **named)
    with pytest.raises(ValueError, match="save_base takes causal models only"):
        ppl.save_base(TEXTS, tmp_path / "base", **named)


# The command line


def test_the_command_line_resumes(masked, tmp_path, capsys):
    model, tokenizer = masked["roberta"]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts, scores = tmp_path / "texts.txt", tmp_path / "scores.jsonl"
    texts.write_text("\n".join(TEXTS), encoding="utf-8")
    command = ["compute", "--model", str(tmp_path / "model"), "--lines", str(texts), "--json"]
    command += ["--pseudo", "original", "--per-text", str(scores)]
    assert main(command) == 0
    whole = flat(json.loads(capsys.readouterr().out))
    nll = np.concatenate([expected_nll(model, tokenizer, text, "original") for text in TEXTS])
    assert whole["mean_nll",] == pytest.approx(nll.mean(), rel=2e-5)
    lines = scores.read_bytes().splitlines(keepends=True)
    scores.write_bytes(b"".join(lines[:3]))  # the settings and two texts
    assert main([*command, "--resume"]) == 0
    assert flat(json.loads(capsys.readouterr().out)) == pytest.approx(whole, rel=1e-6)
    assert main([*command[:-4], "--pseudo", "within_word_l2r", *command[-2:], "--resume"]) == 1
    assert "is of a run with other settings" in capsys.readouterr().err


# Published values


@needs_network
def test_published_by_mlm_scoring(ppl):
    """Of Salazar et al.; they took the cased model of GluonNLP, which has the same weights."""
    (score,) = ppl.score(["Hello world!"], model_id="bert-base-cased", pseudo="original")
    assert [-nll for nll in score.nll] == pytest.approx([-6.126739, -5.501766, -0.782497], abs=1e-4)


@needs_network
def test_published_by_minicons(ppl):
    """The surprisal of a word of three tokens. Where it is given, it may be in nats or bits."""
    text, surprisals = "The traveler lost the souvenir.", {}
    begin, end = text.index("souvenir"), text.index(".")
    for pseudo in ("original", "within_word_l2r"):
        (score,) = ppl.score([text], model_id="bert-base-uncased", pseudo=pseudo)
        tokens = zip(score.nll, score.offsets, strict=True)
        surprisals[pseudo] = sum(nll for nll, (_, stop) in tokens if begin < stop <= end)
    unit = surprisals["original"] / 18.014726
    assert unit == pytest.approx(1, rel=1e-4) or unit == pytest.approx(math.log(2), rel=1e-4)
    assert surprisals["within_word_l2r"] / 32.779836 == pytest.approx(unit, rel=1e-4)


def test_a_table_of_positions_that_is_no_embedding(ppl):
    """I-BERT's; it begins behind the padding id, as RoBERTa's."""
    tokenizer = make_tokenizer("roberta")
    config = masked_config("roberta", tokenizer).to_dict()
    torch.manual_seed(0)
    model = grown(transformers.IBertForMaskedLM(transformers.IBertConfig(**config)))
    options = {"model": model, "tokenizer": tokenizer, "pseudo": "original"}
    assert ppl.text_scorer(**options).window == CONTEXT
    assert ppl.compute(predictions=TEXTS, **options)["num_tokens"] > CONTEXT
