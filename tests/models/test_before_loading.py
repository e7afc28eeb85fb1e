"""What can be told without the model is told before it is loaded, which may take minutes."""

import json

import numpy as np
import pytest
import transformers
from command_line import run
from other_models import make_seq2seq, make_tokenizer
from support import ROOT
from text_oracles import TEXTS, TINY

from ppleval import Perplexity
from ppleval.models import loading

HELD_OUT = str(ROOT / "tiny_model" / "held_out.jsonl")
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


class Loaded(BaseException):
    """The model's weights were asked for, which no `except Exception` hides."""


@pytest.fixture
def no_loading(monkeypatch):
    """A model, of which loading began, ends the call."""

    def load(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr(loading, "load_whole", load)


def call(method, *args, **options):
    return lambda: getattr(Perplexity(), method)(*args, **{"model_id": TINY} | options)


def compute(texts=TEXTS, **options):
    return call("compute", predictions=texts, **options)


def score(texts=TEXTS, **options):
    return call("score", texts, **options)


def compare(texts=TEXTS, **options):
    return call("compare", texts, **{"base_id": TINY} | options)


def compare_tokens(texts=TEXTS, **options):
    return call("compare_tokens", texts, **{"base_id": TINY} | options)


def save_base(texts=TEXTS, path="/nowhere/base", **options):
    return call("save_base", texts, path, **options)


# What the mistake is -> (a call that makes it, what its error says).
OF_TEXTS = {
    "ids": ([[1, 2], [3]], r"predictions\[0\] must be a string, got list"),
    "an array of ids": (np.arange(6).reshape(2, 3), r"predictions\[0\] must be a string"),
    "no texts": ([], "predictions holds no texts"),
    "None among texts": ([*TEXTS, None], rf"predictions\[{len(TEXTS)}\] must be a string"),
    "half a character": ([*TEXTS, "\ud83d"], "is no valid Unicode text"),
    "a text among conversations": ([MESSAGES, "a text"], "must be a conversation"),
    "a message without a role": ([[{"content": "Hi"}]], "has no role"),
}
OF_OPTIONS = {
    "no batch": ({"batch_size": 0}, "batch_size must be a whole number, at least 1"),
    "fewer contexts": ({"contexts": ["one"]}, "contexts must hold one prompt for each text"),
    "one context": ({"contexts": "one"}, "contexts must be a list of texts, got one string"),
    "numbers as contexts": ({"contexts": [1] * len(TEXTS)}, r"contexts\[0\] must be a string"),
    "a preset without contexts": (
        {"contexts": TEXTS, "preset": "lm-eval"},
        'preset="lm-eval" has no contexts',
    ),
    "a stride beyond the window": ({"window": 8, "stride": 9}, "stride must be between 1 and the"),
    "an unknown preset": ({"preset": "lm-evaluation"}, "preset must be one of"),
    "an unknown option": ({"widow": 8}, "unknown argument 'widow'"),
    "a precision": ({"dtype": "float8"}, "dtype"),
    "a device": ({"device": "nonsense"}, "could not be loaded: .*nonsense"),
    "the name of a tokenizer": ({"tokenizer": "gpt2"}, "tokenizer must be a transformers tok"),
    "model_kwargs": ({"model_kwargs": "bfloat16"}, "model_kwargs must be a dict"),
    "contexts of conversations": (
        {"texts": [MESSAGES], "contexts": ["one"]},
        "Conversations have no contexts",
    ),
    "conversations without a template": ({"texts": [MESSAGES]}, "need a chat template"),
}
GROUPS = {
    "fewer groups": ({"groups": ["one"]}, "groups must hold one name for each text"),
    "one group": ({"groups": "one"}, "groups must be a list with one name"),
    "groups of joined texts": (
        {"groups": ["one"] * len(TEXTS), "preset": "hf-docs"},
        'preset="hf-docs" joins all texts, so it has no groups',
    ),
}
BASES = {
    "no base": ({"base_id": None}, "A comparison needs a base"),
    "a base that is not there": (
        {"base_id": "/nowhere/base"},
        "base_id='/nowhere/base' could not be loaded: there is no directory /nowhere/base",
    ),
    "a saved base that is not there": (
        {"base_id": None, "base": "/nowhere/base"},
        "/nowhere/base is no saved base, .* goes to base_id=",
    ),
    "a number as base": ({"base_id": None, "base": 1}, "base must be a transformers model"),
    "the name of a base's tokenizer": ({"base_tokenizer": "gpt2"}, "base_tokenizer must be a"),
    "base_kwargs": ({"base_kwargs": "bfloat16"}, "base_kwargs must be a dict"),
}
METHODS = (compute, score, compare, compare_tokens, save_base)
OF_ALL = OF_OPTIONS | {name: ({"texts": texts}, said) for name, (texts, said) in OF_TEXTS.items()}
CALLS = {
    f"{method.__name__}: {name}": (method(**options), message)
    for methods, kinds in (
        (METHODS, OF_ALL),
        ((compute, compare), GROUPS),
        ((compare, compare_tokens), BASES),
    )
    for method in methods
    for name, (options, message) in kinds.items()
}
CALLS |= {
    "score: top_k": (score(top_k=-1), "top_k must be a whole number, at least 0"),
    "score: corrected": (score(corrected="yes"), "corrected must be True or False"),
    "save_base: a place that is taken": (save_base(path=TINY), "exists, and is no saved base"),
    "compare: pseudo": (compare(pseudo="original"), "compare takes causal models only"),
    "compute: a model without a mask": (compute(pseudo="original"), "has no mask token"),
}


@pytest.mark.parametrize("mistake", CALLS)
def test_no_mistake_loads_the_model(no_loading, mistake):
    call, message = CALLS[mistake]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_the_first_of_a_generator_is_looked_at(no_loading, method):
    with pytest.raises(TypeError, match=r"predictions\[0\] must be a string, got list"):
        method(ids for ids in [[1, 2]])()
    with pytest.raises(ZeroDivisionError):
        method(1 / zero for zero in [0])()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_what_is_right_is_loaded(no_loading, method):
    with pytest.raises(Loaded):
        method()()


def test_a_generator_is_read_once():
    """What is looked at first is scored, too."""
    expected = compute()()
    assert compute(iter(TEXTS))() == expected
    contexts = ["Return "] * len(TEXTS)
    expected = compute(contexts=contexts)()
    assert compute(contexts=iter(contexts))() == expected
    assert compute(iter(TEXTS), contexts=iter(contexts))() == expected


def test_an_encoder_decoder_without_sources(no_loading, tmp_path):
    model, tokenizer = make_seq2seq("t5")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for made in (compute, score):
        with pytest.raises(ValueError, match="is an encoder-decoder: pass contexts="):
            made(model_id=tmp_path)()
        with pytest.raises(ValueError, match="preset has no meaning for .*encoder-decoder"):
            made(model_id=tmp_path, contexts=TEXTS, preset="evaluate")()
    done = run("--model", tmp_path, HELD_OUT)
    assert done.stderr.startswith(f"error: {tmp_path} is an encoder-decoder: name --context-column")


def test_a_masked_model_of_words_without_a_fast_tokenizer(no_loading, tmp_path):
    make_tokenizer("bert").save_pretrained(tmp_path)
    transformers.BertConfig().save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    slow = transformers.BertTokenizerLegacy(tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        compute(model_id=tmp_path, tokenizer=slow, pseudo="within_word_l2r")()


COMMANDS = {
    "batch_size": (["--batch-size", 0], "batch_size must be a whole number"),
    "window": (["--window", 8, "--stride", 9], "stride must be between 1 and"),
    "preset": (["--preset", "lmeval"], "preset must be one of"),
    "contexts": (
        ["--preset", "lm-eval", "--context-column", "text"],
        'preset="lm-eval" has no contexts',
    ),
    "groups": (["--preset", "gptq", "--group-by", "text"], "joins all texts, so they have no gr"),
    "resume": (["--preset", "gptq", "--per-text", "OUT", "--resume"], "--resume goes by the text"),
    "output": (["--per-text", "/nowhere/out.jsonl"], "there is no directory /nowhere"),
    "picture": (["--plot", "OUT.bmp"], "A picture's name must end in .png"),
    "place": (["--to", HELD_OUT], "would overwrite"),
    "base": (["--base", "/nowhere/base"], "there is no directory /nowhere/base"),
    "column": (["--column", "texts"], "texts"),
    "device": (["--device", "nonsense"], "nonsense"),
    "pseudo": (["--pseudo", "original"], "has no mask token"),
    "saved batch_size": (["--to", "OUT", "--batch-size", 0], "batch_size must be a whole number"),
}


@pytest.mark.parametrize("mistake", COMMANDS)
def test_no_mistake_in_a_command_loads_the_model(no_loading, tmp_path, mistake):
    words, message = COMMANDS[mistake]
    words = [str(word).replace("OUT", str(tmp_path / "out")) for word in words]
    done = run(*words, HELD_OUT)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


def test_a_command_of_conversations(no_loading, tmp_path):
    data = tmp_path / "talks.jsonl"
    data.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    done = run("--column", "messages", data)
    assert "Conversations need a chat template" in done.stderr
    done = run("--column", "messages", "--preset", "evaluate", data)
    assert "preset has no meaning with conversations" in done.stderr
