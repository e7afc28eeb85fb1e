"""What people do wrong, and what they are told: one table of calls and words of their errors.

Read each error aloud: it names the argument, what was expected, what came, and what to do.
"""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from command_line import TINY, run

from ppleval import Perplexity

TEXTS = ["To be, or not to be.", "That is the question."]


def command(*arguments, stdin="") -> None:
    """The command, whose last line is raised as an error if it fails."""
    done = run(*arguments, stdin=stdin)
    if done.returncode:
        raise ChildProcessError(done.stderr.strip().splitlines()[-1])


def load(name, texts=TEXTS, files=(), without=(), adapter=None, **options) -> None:
    """Score texts with the model of this name, where {there} is a directory that is made for it.

    Args:
        files: names of files in it.
        without: a pattern, for a directory of the bundled model without some of its files.
        adapter: what its adapter_config.json says.
    """
    with tempfile.TemporaryDirectory() as there:
        if without:
            shutil.copytree(TINY, there, dirs_exist_ok=True)
            for file in Path(there).glob(without):
                file.unlink()
        for file in files:
            Path(there, file).touch()
        if adapter is not None:
            Path(there, "adapter_config.json").write_text(json.dumps(adapter))
        with contextlib.chdir(there):
            name = name if name is None else name.format(there=there)
            Perplexity().compute(predictions=texts, model_id=name, **options)


def load_any(**names) -> None:
    """Score texts with a model that is named in any way."""
    Perplexity().score(TEXTS, **names)


def empty_model():
    """A model that has shapes and no weights."""
    config = transformers.AutoConfig.from_pretrained(TINY)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def on_meta() -> None:
    """A model whose weights were never loaded."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    Perplexity().compute(predictions=TEXTS, model=empty_model(), tokenizer=tokenizer)


def compare(**base) -> None:
    Perplexity().compare(TEXTS, model_id=TINY, **base)


def save_base(path, **options) -> None:
    Perplexity().save_base(TEXTS, path, model_id=TINY, **options)


# What the mistake is -> (a call that makes it, words that its error has).
LOADING = {
    "no model": (lambda: Perplexity().score(TEXTS), ["model_id=", "model= and tokenizer="]),
    "two models": (lambda: load(TINY, model=1), ["either model_id=", "model= and tokenizer="]),
    "a number as model_id": (
        lambda: load_any(model_id=7),
        ["model_id must be a name or a path", "7"],
    ),
    "a name as model": (
        lambda: load(None, model="gpt2", tokenizer="gpt2"),
        ["model must be a transformers model", "str", "goes to model_id="],
    ),
    "a name as tokenizer": (
        lambda: load(TINY, tokenizer="gpt2"),
        ["tokenizer must be a transformers tokenizer", "str"],
    ),
    "a relative path": (
        lambda: load("./llama"),
        ["'./llama'", "there is no directory /", "/llama", "Pass one that exists"],
    ),
    "an absolute path": (
        lambda: load("/nowhere/llama"),
        ["model_id='/nowhere/llama'", "there is no directory /nowhere/llama", "on the Hub"],
    ),
    "a path of three parts": (
        lambda: load("models/meta/llama"),
        ["there is no directory", "/models/meta/llama"],
    ),
    "a path from home": (
        lambda: load("~/llama"),
        ["~ is not expanded", f"Pass {Path.home()}/llama"],
    ),
    "a name that nobody has": (
        lambda: load("nobody/nothing"),
        ["model_id='nobody/nothing'", "no directory", "/nobody/nothing"],
    ),
    "an empty directory": (
        lambda: load("{there}"),
        ["neither config.json", "nor adapter_config.json", "nothing", "save_pretrained wrote"],
    ),
    "a directory of runs": (
        lambda: load("{there}", files=["events.log", "checkpoint-500"]),
        ["neither config.json", "checkpoint-500, events.log", "Trainer's checkpoint-500"],
    ),
    "a directory of GGUF": (
        lambda: load("{there}", files=["llama.Q4_K_M.gguf"]),
        ["llama.Q4_K_M.gguf", "GGUF", "gguf_file=", "model= and tokenizer="],
    ),
    "a file of GGUF": (
        lambda: load("{there}/llama.gguf", files=["llama.gguf"]),
        ["it is a GGUF file", "gguf_file=", "model= and tokenizer="],
    ),
    "a file of weights": (
        lambda: load("{there}/model.safetensors", files=["model.safetensors"]),
        ["it is a file", "Pass the directory that it is in, /"],
    ),
    "a model without its tokenizer": (
        lambda: load("{there}", without="token*"),
        ["It has no tokenizer", "save_pretrained", "tokenizer="],
    ),
    "a model without its weights": (
        lambda: load("{there}", without="*.safetensors"),
        ["could not be loaded as a causal language model", "model.safetensors"],
    ),
    "a subfolder that is not there": (
        lambda: load(TINY, model_kwargs={"subfolder": "merged"}),
        ["there is no directory", "/merged"],
    ),
    "an adapter whose base is gone": (
        lambda: load("{there}", adapter={"base_model_name_or_path": "/nowhere/llama"}),
        ["its base is gone", "no directory /nowhere/llama", "base_model_name_or_path"],
    ),
    "an adapter that names no base": (
        lambda: load("{there}", adapter={"peft_type": "LORA"}),
        ["base_model_name_or_path", "names no base", "which model it was trained on"],
    ),
    "a causal model as a masked one": (
        lambda: load(TINY, pseudo="original"),
        ["has no mask token", "needs a masked language model"],
    ),
    "a device that there is not": (
        lambda: load(TINY, device="gpu0"),
        ["could not be loaded", "gpu0"],
    ),
    "model_kwargs that are no dict": (
        lambda: load(TINY, model_kwargs="bfloat16"),
        ["model_kwargs must be a dict", "{'dtype': 'bfloat16'}", "got 'bfloat16'"],
    ),
    "a dtype that there is not": (
        lambda: load(TINY, model_kwargs={"dtype": "float12"}),
        ["could not be loaded", "float12"],
    ),
    "device= beside model=": (
        lambda: load(None, model=empty_model(), tokenizer=1, device="cpu"),
        ["device= and model_kwargs= go with model_id="],
    ),
    "weights on meta": (on_meta, ["are not there", "the device meta", "such as cpu"]),
    "no base": (compare, ["A comparison needs a base", "base_id=", "base=", "save_base"]),
    "a base that is not there": (
        lambda: compare(base_id="/nowhere/base"),
        ["base_id='/nowhere/base'", "there is no directory /nowhere/base"],
    ),
    "a name as base": (
        lambda: compare(base="gpt2"),
        ["gpt2 is no saved base", "save_base writes one", "goes to base_id="],
    ),
    "a number as base": (
        lambda: compare(base=7),
        ["base must be a transformers model", "int", "goes to base_id="],
    ),
    "a model's directory for a base to be saved": (
        lambda: save_base(TINY),
        ["exists, and is no saved base", "Choose another path"],
    ),
}
TEXT_INPUTS = {}
LOGITS = {
    "no logits at all": (lambda: Perplexity().compute(), ["Nothing", "add_batch"]),
}
TRAINER = {}
COMMAND = {}
MISTAKES = LOADING | TEXT_INPUTS | LOGITS | TRAINER | COMMAND


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_says_what_to_do(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises(Exception) as error:  # noqa: PT011
        call()
    said = str(error.value)
    assert [word for word in words if word not in said] == [], said
