"""Encoder-decoders: the nll of labels given a source, against the model's own labels=."""

import json

import numpy as np
import pytest
import torch
import transformers
from other_models import (
    CONTEXT,
    SEQ2SEQ,
    TEXTS,
    labels_nll,
    make_seq2seq,
    make_tokenizer,
    needs_network,
)
from tokenizers.processors import TemplateProcessing

from ppleval import Perplexity
from ppleval.cli.main import main

TARGETS = ["The mat.", "playing ", "", "a naïve dog", "un"]
SOURCES = [TEXTS[0], "a", "Playing, walking.", "", TEXTS[1]]


@pytest.fixture(scope="module")
def models():
    """Name -> (model, tokenizer), tiny and random."""
    return {name: make_seq2seq(name) for name in SEQ2SEQ}


@pytest.fixture(scope="module")
def ppl():
    """One metric, whose options come with each call."""
    return Perplexity()


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_equals_the_models_own_labels(ppl, models, name):
    """Whatever the batch, though sources and targets are of other lengths."""
    model, tokenizer = models[name]
    expected = [labels_nll(model, tokenizer, *pair) for pair in zip(SOURCES, TARGETS, strict=True)]
    for batch_size in (None, 1, 2):
        options = {"model": model, "tokenizer": tokenizer, "batch_size": batch_size}
        scores = ppl.score(TARGETS, contexts=SOURCES, **options)
        for text, score, nll in zip(TARGETS, scores, expected, strict=True):
            assert score.nll == pytest.approx(nll.tolist(), rel=2e-5)
            assert "".join(text[slice(*place)] for place in score.offsets) == text
    result = ppl.compute(predictions=TARGETS, contexts=SOURCES, model=model, tokenizer=tokenizer)
    whole = torch.cat(expected)
    assert result["mean_nll"] == pytest.approx(whole.mean().item(), rel=2e-5)
    assert result["num_tokens"] == len(whole)
    assert result["num_bytes"] == len("".join(TARGETS).encode())
    assert result["num_words"] == 7
    assert result["num_truncated_contexts"] == 0


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_texts_that_spell_the_padding(ppl, name):
    """Given labels, bert2bert hides it from its decoder. Others show it; but T5Gemma, whose decoder
    reads it first here, hides it where it keeps no cache."""
    model, tokenizer = make_seq2seq(name)
    model.double()
    pad = tokenizer.pad_token
    texts, sources = [f"The {pad} mat{pad}{pad} dog", f"{pad}a", "playing a dog"], ["a", "un", "a"]
    assert all(tokenizer.pad_token_id in tokenizer(text).input_ids for text in texts[:2])
    named = {"model": model, "tokenizer": tokenizer, "dtype": "float64"}
    scores = ppl.score(texts, contexts=sources, **named)
    for text, source, score in zip(texts, sources, scores, strict=True):
        expected = labels_nll(model, tokenizer, source, text).tolist()
        assert score.nll == pytest.approx(expected, rel=1e-6)  # T5Gemma attends in 32 bits


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_batches_and_the_output_layer_alone(ppl, models, name):
    """The bias that Marian adds to what its layer gives is no reason to make all logits."""
    model, tokenizer = models[name]
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer)
    assert scorer.model.takes_batches
    assert scorer.model.head.layer is model.get_output_embeddings()


def test_what_the_decoder_reads(ppl, models):
    """T5 begins with the padding id. mBART puts the language code of the end in front."""
    for name, start in [("t5", "<pad>"), ("mbart", "en_XX")]:
        model, tokenizer = models[name]
        scorer = ppl.text_scorer(model=model, tokenizer=tokenizer)
        (text,) = scorer.encoder.encode(["a"], ["a"])
        end = ["</s>", "en_XX"] if name == "mbart" else ["</s>"]
        assert tokenizer.convert_ids_to_tokens(text.ids) == [start, "▁a", *end]
        assert tokenizer.convert_ids_to_tokens(text.source) == ["▁a", *end]
        assert text.num_prefix == 1


def test_special_tokens_have_no_characters(ppl):
    """Spaces that the tokenizer leaves out belong to the last token of the text."""
    tokenizer = make_tokenizer("bert")
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": tokenizer.sep_token_id}
    sizes = {"vocab_size": len(tokenizer), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**ids, **sizes)).eval()
    options = {"contexts": ["a"], "model": model, "tokenizer": tokenizer}
    (score,) = ppl.score(["a  "], **options)
    assert score.tokens == ["[CLS]", "a", "[SEP]"]
    assert score.offsets == [(0, 0), (0, 3), (3, 3)]
    without_end = ppl.compute(predictions=["a b  "], **options, max_length=4)
    assert (without_end["num_bytes"], without_end["num_tokens"]) == (5, 3)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_text_longer_than_the_decoders_context(ppl, models, name):
    """Windows as those of a causal model, each with the whole source."""
    model, tokenizer = models[name]
    text, source = TEXTS[3], TEXTS[1]
    (score,) = ppl.score([text], contexts=[source], model=model, tokenizer=tokenizer)
    labels = tokenizer(text_target=text).input_ids
    ids = [tokenizer.pad_token_id, *labels]
    assert len(ids) > CONTEXT + 1
    source = torch.tensor([tokenizer(source).input_ids])
    expected, stop = [], CONTEXT + 1
    for i in range(1, len(ids)):
        while i >= stop:
            stop = min(len(ids), stop + CONTEXT // 2)
        inputs = torch.tensor([ids[max(0, stop - CONTEXT - 1) : i]])
        with torch.no_grad():
            logits = model(input_ids=source, decoder_input_ids=inputs).logits[0, -1].double()
        expected.append(-logits.log_softmax(-1)[ids[i]].item())
    assert score.nll == pytest.approx(expected, rel=2e-5)


def test_a_source_longer_than_the_encoder_reads_is_cut_by_the_tokenizer(ppl, models):
    model, tokenizer = models["bart"]
    sources = [TEXTS[3], "short"]
    options = {"contexts": sources, "model": model, "tokenizer": tokenizer}
    with pytest.warns(UserWarning, match="1 of 2 contexts are longer than the 24 tokens that the"):
        result = ppl.compute(predictions=["a", "mat"], **options)
    assert result["num_truncated_contexts"] == 1
    expected = [labels_nll(model, tokenizer, *p) for p in zip(sources, ["a", "mat"], strict=True)]
    assert result["mean_nll"] == pytest.approx(torch.cat(expected).mean().item(), rel=2e-5)
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer)
    (text,) = scorer.encoder.encode(["a"], [TEXTS[3]])
    assert len(text.source) == CONTEXT
    assert text.source[-1] == tokenizer.eos_token_id


def test_groups_positions_and_max_length(ppl, models):
    model, tokenizer = models["marian"]
    options = {"contexts": SOURCES, "model": model, "tokenizer": tokenizer}
    nll = [
        labels_nll(model, tokenizer, *pair).numpy() for pair in zip(SOURCES, TARGETS, strict=True)
    ]
    result = ppl.compute(
        predictions=TARGETS, **options, groups=["a", "b", "a", "b", "b"], positions=(0, 2)
    )
    group = np.concatenate([nll[0], nll[2]])
    assert result["groups"]["a"]["mean_nll"] == pytest.approx(group.mean(), rel=2e-5)
    first = np.concatenate([text[:1] for text in nll])  # behind one id, that of the start
    assert result["positions"]["0-1"]["mean_nll"] == pytest.approx(first.mean(), rel=2e-5)
    cut = ppl.compute(predictions=TARGETS, **options, max_length=3)
    kept = np.concatenate([text[:2] for text in nll])
    assert cut["mean_nll"] == pytest.approx(kept.mean(), rel=2e-5)
    assert cut["num_truncated"] == sum(len(text) > 2 for text in nll)
    assert "|source_length:24|max_length:3|window:24|stride:12|" in cut["signature"]


def test_a_slow_tokenizer(ppl):
    """ByT5's, of bytes."""
    tokenizer = transformers.ByT5Tokenizer()
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.config.decoder_start_token_id = tokenizer.pad_token_id
    (score,) = ppl.score(["é"], contexts=["ab"], model=model, tokenizer=tokenizer)
    expected = labels_nll(model, tokenizer, "ab", "é").tolist()
    assert score.nll == pytest.approx(expected, rel=2e-5)
    assert score.offsets is None


def test_trainers_loss_and_metrics_agree(ppl, models, tmp_path):
    """eval_loss is the mean of batch means: here there is one batch."""
    model, tokenizer = models["t5"]
    rows = [
        {**tokenizer(source), "labels": tokenizer(text_target=text).input_ids}
        for source, text in zip(SOURCES, TARGETS, strict=True)
    ]
    args = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=8, report_to=[], use_cpu=True
    )
    found = transformers.Seq2SeqTrainer(
        model=model,
        args=args,
        eval_dataset=rows,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
        **ppl.trainer_hooks(shift=False),
    ).evaluate()
    result = ppl.compute(predictions=TARGETS, contexts=SOURCES, model=model, tokenizer=tokenizer)
    assert result["mean_nll"] == pytest.approx(found["eval_loss"], rel=2e-5)
    assert result["mean_nll"] == pytest.approx(found["eval_mean_nll"], rel=2e-5)
    assert result["num_tokens"] == found["eval_num_tokens"]
    assert result["perplexity_ci_low"] == pytest.approx(found["eval_perplexity_ci_low"], rel=2e-5)


# Loading and refusals


def test_a_model_by_name_is_loaded_as_an_encoder_decoder(ppl, models, tmp_path):
    """Without contexts= BART's decoder alone would be a causal model, which nobody means."""
    model, tokenizer = models["bart"]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    named = {"model_id": str(tmp_path), "device": "cpu"}
    result = ppl.compute(predictions=TARGETS, contexts=SOURCES, **named)
    expected = ppl.compute(predictions=TARGETS, contexts=SOURCES, model=model, tokenizer=tokenizer)
    assert result["perplexities"] == expected["perplexities"]
    with pytest.raises(ValueError, match="is an encoder-decoder: pass contexts="):
        ppl.compute(predictions=TARGETS, **named)
    for refused in (
        lambda: ppl.compute(predictions=TARGETS, **named, pseudo="original"),
        lambda: ppl.compare(TARGETS, **named, base_id=str(tmp_path)),
        lambda: ppl.save_base(TARGETS, tmp_path / "base", **named),
    ):
        with pytest.raises(ValueError, match="is an encoder-decoder; a (masked|causal) language"):
            refused()


def test_the_command_line_reads_sources_and_resumes(ppl, models, tmp_path, capsys):
    model, tokenizer = models["t5"]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"

    def write(sources):
        names = ("text", "source", "kind")
        rows = zip(TARGETS, sources, "ababa", strict=True)
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        data.write_text("\n".join(lines))

    write(SOURCES)
    command = [
        "compute",
        "--model",
        str(tmp_path / "model"),
        "--json",
        str(data),
        "--group-by",
        "kind",
    ]
    assert main(command) == 1
    assert "name --context-column" in capsys.readouterr().err
    command += ["--context-column", "source", "--per-text", str(out)]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    expected = ppl.compute(
        predictions=TARGETS,
        contexts=SOURCES,
        model_id=str(tmp_path / "model"),
        groups=list("ababa"),
    )
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert found["signature"] == expected["signature"]
    assert found["groups"]["a"]["num_tokens"] == expected["groups"]["a"]["num_tokens"]
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:3]))
    assert main([*command, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(
        found["perplexity"], rel=1e-6
    )
    write(["another source", *SOURCES[1:]])
    assert main([*command, "--resume"]) == 1
    assert "is of other texts: number 0" in capsys.readouterr().err


class ShiftsByTwo(transformers.T5ForConditionalGeneration):
    """Its method tells another story than its forward pass."""

    def prepare_decoder_input_ids_from_labels(self, labels):
        return super().prepare_decoder_input_ids_from_labels(labels).roll(1, 1)


def test_a_decoder_that_reads_something_else_for_labels_is_refused(ppl, models):
    model, tokenizer = models["t5"]
    odd = ShiftsByTwo(model.config)
    with pytest.raises(ValueError, match="reads something else for given labels than the labels"):
        ppl.compute(predictions=["a"], contexts=["a"], model=odd, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "evaluate"}, "preset has no meaning for .*, which is an encoder-decoder"),
        ({"add_start_token": False}, "add_start_token has no meaning"),
        ({"add_start_token": 1}, "add_start_token has no meaning"),
        ({"start_each_window": False}, "start_each_window has no meaning"),
        ({"join_contexts": "ids"}, "join_contexts has no meaning"),
        ({"contexts": None}, "is an encoder-decoder: pass contexts="),
        ({"contexts": ["a"]}, "contexts must hold one prompt for each text"),
    ],
)
def test_options_that_do_not_fit(ppl, models, given, message):
    model, tokenizer = models["t5"]
    options = {"model": model, "tokenizer": tokenizer, "contexts": SOURCES} | given
    with pytest.raises(ValueError, match=message):
        ppl.compute(predictions=TARGETS, **options)


def test_models_and_tokenizers_that_do_not_fit(ppl, models):
    model, tokenizer = models["t5"]
    named = {"tokenizer": models["bart"][1], "contexts": ["\N{SNOWMAN}"]}
    with pytest.raises(ValueError, match="this tokenizer is not the model's"):
        ppl.compute(predictions=["a"], model=model, **named)
    whisper = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=len(tokenizer),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    with pytest.raises(ValueError, match="reads input_features, as those of speech and of images"):
        ppl.compute(predictions=["a"], contexts=["a"], model=whisper, tokenizer=tokenizer)


# Published values


@needs_network
def test_published_by_minicons(ppl):
    """It tokenises without special tokens, so that its source has no end."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("t5-base")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A")
    named = {"model_id": "t5-base", "tokenizer": tokenizer}
    (score,) = ppl.score(["Paris."], contexts=["What is the capital of France?"], **named)
    assert [-nll for nll in score.nll[:2]] == pytest.approx([-7.561849, -4.617197], abs=0.01)
