"""What people do wrong, and what they are told: one table of calls and words of their errors.

Read each error aloud: it names the argument, what was expected, what came, and what to do.
"""

import contextlib
import functools
import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from command_line import TINY, run
from support import ROOT
from transformers.modeling_outputs import CausalLMOutput

from ppleval import Perplexity, linear_token_nll, token_nll

TEXTS = ["To be, or not to be.", "That is the question."]


def command(*arguments, stdin="") -> None:
    """The command, whose last line is raised as an error if it fails."""
    done = run(*arguments, stdin=stdin)
    if done.returncode:
        raise ChildProcessError(done.stderr.strip().splitlines()[-1])


@functools.cache
def tiny() -> tuple:
    """The bundled model and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(TINY)


def model_without_a_place():
    """One that was made here, so that nothing tells where its tokenizer is."""
    return transformers.LlamaForCausalLM(tiny()[0].config.__class__(**SMALL))


SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2}


def compute_texts(predictions, **options):
    return Perplexity().compute(predictions=predictions, **{"model_id": TINY} | options)


def add_batch(predictions, **options):
    Perplexity().add_batch(predictions=predictions, **options)


def call(name, *arguments, **options):
    """A method of a metric, with a model."""
    return getattr(Perplexity(), name)(*arguments, model_id=TINY, **options)


ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
PART = {"type": "text", "text": "Hi"}
PARTS = [{"role": role, "content": [PART]} for role in ("user", "assistant")]
TALK = [{"role": role, "content": "Hi"} for role in ("user", "assistant")]
CONCATENATES = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
PRINTS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


def table() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


def compare_with_a_saved_base(**options):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "base")
        call("save_base", TEXTS, path, window=20)
        return call("compare", TEXTS, base=path, **options)


def hooked(outputs, labels, model=None, **options):
    """What the first hook makes of a batch, called from a Trainer if there is a model."""
    hook = Perplexity().trainer_hooks(**options)["preprocess_logits_for_metrics"]

    def evaluation_loop(self, dataloader, step):
        return hook(outputs, labels)

    if model is None:
        return hook(outputs, labels)
    return evaluation_loop(SimpleNamespace(model=model), None, 0)


def gathered(predictions, **options):
    """What the second hook makes of what Trainer has gathered."""
    hook = Perplexity().trainer_hooks(**options)["compute_metrics"]
    return hook(SimpleNamespace(predictions=predictions, label_ids=None))


def ids(*shape, least=0):
    return torch.full(shape, least)


def command_on(files: dict[str, str], *arguments) -> None:
    """The command, in a directory of its own with these files."""
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        for name, text in files.items():
            Path(name).write_text(text, encoding="latin-1")
        command(*arguments)


def resume(*arguments) -> None:
    """The command that continues another run, of three texts."""
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        Path("three.txt").write_text("one\ntwo\nthree\n")
        command("--lines", "three.txt", "--per-text", "out.jsonl")
        command("--lines", "three.txt", "--per-text", "out.jsonl", "--resume", *arguments)


LOGITS_OF_BATCH = torch.linspace(-1, 1, 30).view(2, 3, 5)
LABELS = torch.tensor([[0, 4, 2], [3, 1, 1]])
TABLE = pd.DataFrame(LABELS.numpy()).astype("Int64")


def compute(predictions=LOGITS_OF_BATCH, references=LABELS, sample_weight=None, **options) -> None:
    batch = {"predictions": predictions, "references": references, "sample_weight": sample_weight}
    Perplexity().compute(**batch, **options)


def masked(tensor: torch.Tensor) -> torch.Tensor:
    return torch.masked.masked_tensor(tensor, tensor > 0)


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
        ["model_id must be a name or a path", "got int"],
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
        ["could not be loaded", "there is no dtype float12", "bfloat16"],
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
TEXT_INPUTS = {
    # What is no list of texts.
    "one string": (lambda: compute_texts("a text"), ["predictions", "one string", "[text]"]),
    "bytes": (lambda: compute_texts(b"a text"), ["one string", "[text]"]),
    "a number": (lambda: compute_texts(5), ["predictions must be a list of texts, got int"]),
    "no texts": (lambda: compute_texts([]), ["predictions holds no texts"]),
    "nothing at all": (lambda: call("score"), ["predictions is missing", "list of texts"]),
    "a Dataset": (lambda: compute_texts(table()), ["predictions", "table (Dataset)", "['text']"]),
    "a Dataset, added": (lambda: add_batch(table()), ["table (Dataset)", "['text']"]),
    "a Dataset that streams": (
        lambda: compute_texts(table().to_iterable_dataset()),
        ["table (IterableDataset)", "['text']"],
    ),
    "a DatasetDict": (
        lambda: compute_texts(datasets.DatasetDict(test=table())),
        ["table (DatasetDict)", "['test']['text']"],
    ),
    "a DataFrame": (lambda: compute_texts(pd.DataFrame(ROWS)), ["table (DataFrame)", "['text']"]),
    "a DataFrame, added": (lambda: add_batch(pd.DataFrame(ROWS)), ["table (DataFrame)"]),
    "a dict of columns": (
        lambda: compute_texts({"sentence": TEXTS}),
        ["table (dict)", "['sentence']"],
    ),
    "a list of rows": (
        lambda: compute_texts(ROWS),
        ["predictions[0]", "string", "dict", "[row['text'] for row in rows]"],
    ),
    "a list of rows, added": (lambda: add_batch(ROWS), ["[row['text'] for row in rows]"]),
    "rows one by one": (lambda: compute_texts(iter(ROWS)), ["[row['text'] for row in rows]"]),
    "rows of conversations": (
        lambda: compute_texts([{"messages": TALK}]),
        ["[row['messages'] for row in rows]"],
    ),
    "rows with another name for the text": (
        lambda: call("score", [{"id": 7, "body": "text"}]),
        ["[row['body'] for row in rows]"],
    ),
    "one conversation": (lambda: compute_texts(TALK), ["messages of one", "[messages]"]),
    "messages one by one": (
        lambda: compute_texts(iter(TALK)),
        ["predictions[0]", "list of messages", "[messages]"],
    ),
    "a message without a role": (
        lambda: compute_texts([{"content": "Hi"}]),
        ["messages of one", "[messages]"],
    ),
    # What is no text.
    "a BatchEncoding": (
        lambda: compute_texts(tiny()[1](TEXTS)),
        ["predictions", "BatchEncoding", "texts themselves", "tokenised here"],
    ),
    "a BatchEncoding for each text": (
        lambda: compute_texts([tiny()[1](text) for text in TEXTS]),
        ["predictions[0]", "BatchEncoding", "texts themselves"],
    ),
    "a BatchEncoding, added": (
        lambda: add_batch(tiny()[1](TEXTS)),
        ["BatchEncoding", "inputs of a model", "model(**inputs).logits"],
    ),
    "a Dataset of ids": (
        lambda: compute_texts(datasets.Dataset.from_dict({"input_ids": [[1, 2]]})),
        ["Dataset", "texts themselves", "tokenised here"],
    ),
    "lists of ids": (lambda: compute_texts([[1, 2], [3]]), ["predictions[0]", "texts themselves"]),
    "ids": (lambda: compute_texts([1, 2]), ["predictions[0]", "got int", "texts themselves"]),
    "a tensor of ids": (lambda: compute_texts(ids(2, 3)), ["got Tensor", "texts themselves"]),
    "logits and a model": (
        lambda: compute_texts(torch.zeros(2, 3, 4)),
        ["got Tensor", "references=", "without a model"],
    ),
    "tokens": (
        lambda: compute_texts([text.split() for text in TEXTS]),
        ["predictions[0]", "convert_tokens_to_string(tokens)", "' '.join(words)"],
    ),
    "tokens, added": (lambda: add_batch([["a", "b"]]), ["predictions[0]", "' '.join(words)"]),
    "texts in bytes": (lambda: compute_texts([b"a"]), ["predictions[0]", "bytes", ".decode()"]),
    "paths": (lambda: compute_texts([Path("a.txt")]), ["predictions[0]", ".read_text()"]),
    "None in a list": (
        lambda: compute_texts(["a", None]),
        ["predictions[1]", "NoneType", "Row 2, counted from 1, is empty", "leave it out"],
    ),
    "None first": (lambda: add_batch([None, "a"]), ["predictions[0]", "Row 1, counted from 1"]),
    "NaN in a column": (
        lambda: compute_texts(pd.Series(["a", float("nan")])),
        ["predictions[1]", "Row 2, counted from 1, is empty"],
    ),
    "NA in a column": (
        lambda: compute_texts(pd.Series(["a", pd.NA], dtype="string")),
        ["predictions[1]", "Row 2, counted from 1, is empty"],
    ),
    "None among conversations": (
        lambda: compute_texts([TALK, None], chat_template=CONCATENATES),
        ["predictions[1]", "conversation", "Row 2, counted from 1, is empty"],
    ),
    "None among contexts": (
        lambda: compute_texts(TEXTS, contexts=["a", None]),
        ["contexts[1]", "Row 2, counted from 1, is empty", "pass ''"],
    ),
    "a text among conversations": (
        lambda: compute_texts([TALK, "Hi"], chat_template=CONCATENATES),
        ["predictions[1]", "All are texts, or all are conversations"],
    ),
    "one context for all": (
        lambda: compute_texts(TEXTS, contexts="a"),
        ["contexts must be a list of texts", "[text]"],
    ),
    "fewer contexts than texts": (
        lambda: compute_texts(TEXTS, contexts=["a"]),
        ["one prompt for each text", "more texts, beyond 1"],
    ),
    "parts of a message": (
        lambda: compute_texts([PARTS], chat_template=CONCATENATES),
        ["can only concatenate str", "list of parts", '"".join(part["text"] for part in'],
    ),
    "parts of a message that are printed": (
        lambda: compute_texts([PARTS], chat_template=PRINTS),
        ["prints the content", "as a list", '"".join(part["text"] for part in'],
    ),
    # The model and its tokenizer.
    "no tokenizer": (
        lambda: compute_texts(TEXTS, model_id=None, model=tiny()[0]),
        ["model= goes with the tokenizer", f"AutoTokenizer.from_pretrained({TINY!r})"],
    ),
    "no tokenizer, and none is known": (
        lambda: compute_texts(TEXTS, model_id=None, model=model_without_a_place()),
        ["model= goes with the tokenizer", "pass tokenizer="],
    ),
    "the name of a tokenizer": (
        lambda: compute_texts(TEXTS, model_id=None, model=tiny()[0], tokenizer="gpt2"),
        ["tokenizer must be", "got str", "AutoTokenizer.from_pretrained('gpt2')"],
    ),
    "a processor": (
        lambda: compute_texts(TEXTS, tokenizer=SimpleNamespace(tokenizer=tiny()[1])),
        ["tokenizer must be", "Pass its .tokenizer"],
    ),
    "the name of a model as model=": (
        lambda: compute_texts(TEXTS, model_id=None, model="gpt2", tokenizer=tiny()[1]),
        ["model must be", "got str", "model_id="],
    ),
    "a model as model_id=": (
        lambda: compute_texts(TEXTS, model_id=tiny()[0]),
        ["model_id must be a name or a path", "got LlamaForCausalLM.", "goes to model="],
    ),
    "texts without a model": (
        lambda: compute_texts(TEXTS, model_id=None),
        ["Texts need a model", "model_id="],
    ),
    "texts and references": (
        lambda: compute_texts(TEXTS, references=TEXTS),
        ["without references"],
    ),
    "a larger window than the saved base's": (
        lambda: compare_with_a_saved_base(window=21),
        ["saved with window 20", "with window 21", "same settings"],
    ),
    # Arguments by other names, or of other methods.
    "texts= for score": (
        lambda: call("score", texts=TEXTS),
        ["'texts'", "called predictions", "predictions, contexts, top_k", "batch_size."],
    ),
    "texts= for compare": (
        lambda: call("compare", texts=TEXTS, base_id=TINY),
        ["'texts'", "called predictions"],
    ),
    "data=": (lambda: call("compute", data=TEXTS), ["'data'", "called predictions"]),
    "input_texts=": (
        lambda: call("compute", input_texts=TEXTS),
        ["'input_texts'", "called predictions", "predictions, references", "process_group."],
    ),
    "prompts=": (lambda: compute_texts(TEXTS, prompts=TEXTS), ["'prompts'", "called contexts"]),
    "pretrained=": (
        lambda: Perplexity().compute(predictions=TEXTS, pretrained=TINY),
        ["'pretrained'", "model_id="],
    ),
    "save_base without a path": (lambda: call("save_base", TEXTS), ["path is missing"]),
    "a misspelt option": (
        lambda: compute_texts(TEXTS, max_len=5),
        ["'max_len'", "Did you mean max_length?", "The arguments are predictions, "],
    ),
    "top_k of compute": (lambda: compute_texts(TEXTS, top_k=5), ["'top_k'", "It goes to score"]),
    "a model where the metric is made": (
        lambda: Perplexity(model_id=TINY),
        ["'model_id'", "It goes to compare", "score"],
    ),
    "a model of add_batch": (
        lambda: add_batch(TEXTS, model_id=TINY),
        ["'model_id'", "compute", "arguments are predictions, references, sample_weight, groups"],
    ),
    "an option of add_batch": (
        lambda: add_batch([], references=[], shift=True),
        ["'shift'", "compute", "where the metric is made"],
    ),
    "an option of logits with texts": (
        lambda: compute_texts(TEXTS, shift=True),
        ["shift= goes with logits and references="],
    ),
    "an option of texts with logits": (
        lambda: compute_texts(np.zeros((1, 2, 3)), model_id=None, references=[[0, 1]], window=5),
        ["window= goes with texts and model_id="],
    ),
    "attention_mask= of compute": (
        lambda: compute_texts(torch.zeros(1, 2, 3), model_id=None, attention_mask=ids(1, 2)),
        ["'attention_mask'", "sample_weight=", "-100 into the references"],
    ),
    "attention_mask= of add_batch": (
        lambda: add_batch(torch.zeros(1, 2, 3), references=ids(1, 2), attention_mask=ids(1, 2)),
        ["'attention_mask'", "sample_weight=", "-100 into the references"],
    ),
    "labels=": (
        lambda: compute_texts(torch.zeros(1, 2, 3), model_id=None, labels=ids(1, 2)),
        ["'labels'", "called references"],
    ),
    "logits=": (
        lambda: Perplexity().add_batch(logits=torch.zeros(1, 2, 3), references=ids(1, 2)),
        ["'logits'", "called predictions"],
    ),
    # What generate and a model's body return.
    "the scores of generate": (
        lambda: add_batch(tuple(torch.zeros(12, 2, 11)), references=ids(2, 12)),
        ["12 predictions, 2 references", "scores of generate", "torch.stack(scores, dim=1)"],
    ),
    "hidden states": (
        lambda: add_batch(torch.zeros(2, 4, 16), references=ids(2, 4, least=39)),
        ["references[0, 0] is 39", "ignore_index=39", "hidden states", ".logits"],
    ),
}
LOGITS = {
    "no logits at all": (lambda: Perplexity().compute(), ["Nothing", "add_batch"]),
    "no references": (lambda: compute(references=None), ["references is missing"]),
    "ids for logits": (
        lambda: compute(LABELS),
        ["predictions must be floating-point", "belong into references"],
    ),
    "the two swapped": (lambda: compute(LABELS, LOGITS_OF_BATCH), ["predictions", "Token ids"]),
    "a model's output": (
        lambda: compute(CausalLMOutput(logits=LOGITS_OF_BATCH)),
        ["predictions", "its .logits"],
    ),
    "a model's output for token_nll": (
        lambda: token_nll(CausalLMOutput(logits=LOGITS_OF_BATCH), LABELS),
        ["logits", "got CausalLMOutput. Pass its .logits."],
    ),
    "a layer for its weight": (
        lambda: linear_token_nll(torch.ones(3, 4), torch.nn.Linear(4, 5), LABELS[0]),
        ["weight", "got Linear. Pass its .weight."],
    ),
    "one sequence": (
        lambda: compute(LOGITS_OF_BATCH[0], LABELS[0]),
        ["(B, T, V)", "got (3, 5) and (3,)", "add(prediction=, reference=)"],
    ),
    "a batch for one sequence": (
        lambda: Perplexity().add(prediction=LOGITS_OF_BATCH, reference=LABELS),
        ["(T, V)", "got (2, 3, 5)", "add_batch(predictions=, references=)"],
    ),
    "batches in a list": (
        lambda: compute([LOGITS_OF_BATCH], [LABELS]),
        ["predictions[0]", "add_batch"],
    ),
    "logits as F.cross_entropy takes them": (
        lambda: compute(LOGITS_OF_BATCH.transpose(1, 2)),
        ["got (2, 5, 3)", ".transpose(1, 2)"],
    ),
    "logits shifted by hand": (
        lambda: compute(LOGITS_OF_BATCH[:, :-1]),
        ["got (2, 2, 5) and (2, 3)", "shift=True"],
    ),
    "a vocabulary of one": (
        lambda: compute(LOGITS_OF_BATCH[..., :1], LABELS * 0),
        ["no logits", "exp(-mean)"],
    ),
    "padding ids as labels": (
        lambda: compute(references=LABELS + 4),
        ["references[0, 1] is 8", "5 ids [0, 5)", "ignore_index=8"],
    ),
    "float labels": (
        lambda: compute(references=LABELS.float()),
        ["references must be integer token ids", "torch.float32"],
    ),
    "a mask for labels": (
        lambda: compute(references=LABELS > 0),
        ["references", "bool", "sample_weight"],
    ),
    "NaN for a label": (
        lambda: compute(references=np.array([[0, 1, np.nan], [1, 2, 3]])),
        ["references must be integer", "NaN", "is -100"],
    ),
    "None for a label": (
        lambda: compute(references=[[0, 1, None], [1, 2, 3]]),
        ["references must hold numbers", "got None", "is -100"],
    ),
    "pandas' NA for a label": (
        lambda: compute(references=TABLE.mask(TABLE == 4)),
        ["references", "got <NA>", "is -100"],
    ),
    "texts with references": (
        lambda: compute(TEXTS, TEXTS),
        ["predictions[0]", "Texts go without references", "model_id"],
    ),
    "a dict": (lambda: compute({"logits": LOGITS_OF_BATCH}), ["predictions", "got dict"]),
    "a MaskedTensor of logits": (
        lambda: compute(masked(LOGITS_OF_BATCH)),
        ["predictions is a MaskedTensor", ".get_data()"],
    ),
    "a MaskedTensor of labels": (
        lambda: compute(references=masked(LABELS)),
        ["references is a Mask", "ignore_index"],
    ),
    "a masked array": (
        lambda: compute(references=np.ma.masked_equal(LABELS.numpy(), 4)),
        ["mask", "ignore_index"],
    ),
    "a sparse tensor": (
        lambda: compute(LOGITS_OF_BATCH.to_sparse()),
        ["sparse_coo", ".to_dense()"],
    ),
    "logits for probabilities": (
        lambda: compute(from_logits=False),
        ["negative or non-finite", "from_logits=True"],
    ),
    "probabilities of any size": (
        lambda: compute(torch.full((2, 3, 5), 3e38), from_logits=False),
        ["a row whose sum overflows", "from_logits=True"],
    ),
    "a weight that is NaN": (
        lambda: compute(sample_weight=torch.full((2, 3), torch.nan)),
        ["sample_weight[0] must be finite, not negative", "got nan"],
    ),
    "weights of another shape": (
        lambda: compute(sample_weight=torch.ones(3)),
        ["sample_weight must have the shape (2, 3)", "or (2,)", "got (3,)"],
    ),
    "half precision sums": (lambda: Perplexity(dtype="float16"), ["dtype", "float32", "'float16'"]),
    "several masks": (lambda: Perplexity(mask_token_id=[0, 1]), ["one token id", "ignore_index"]),
    "options between batches": (
        lambda: (
            (metric := Perplexity()).add_batch(predictions=LOGITS_OF_BATCH, references=LABELS)
            or metric.compute(shift=True)
        ),
        ["other options", "shift:yes", "reset()"],
    ),
    "another class merged": (lambda: Perplexity().merge(3), ["another Perplexity", "got int"]),
}
TRAINER = {
    "no logits": (
        lambda: hooked((), ids(2, 4)),
        ["No logits", "prediction_loss_only=False", "predict_with_generate=False"],
    ),
    "generated ids": (
        lambda: hooked(ids(2, 4), ids(2, 4)),
        ["No logits (B, T, V)", "(2, 4) torch.int64", "predict_with_generate=False"],
    ),
    "no labels": (
        lambda: hooked(torch.zeros(2, 4, 5), None),
        ["no labels", "label_names", "DataCollatorForLanguageModeling"],
    ),
    "float labels in a Trainer": (
        lambda: hooked(torch.zeros(2, 4, 5), torch.zeros(2, 4)),
        ["integer token ids", "float32"],
    ),
    "prompt tuning": (
        lambda: hooked(torch.zeros(2, 9, 5), ids(2, 4)),
        ["(2, 9, 5)", "(2, 4)", "prompt tuning", "pad(labels, (5, 0), value=-100)"],
    ),
    "labels that are shifted": (
        lambda: hooked(torch.zeros(2, 5, 5), ids(2, 4)),
        ["(2, 5, 5)", "(2, 4)", "shifted beforehand, leave that to the hooks"],
    ),
    "logits of some positions": (
        lambda: hooked(torch.zeros(2, 4, 5), ids(2, 9)),
        ["(2, 4, 5)", "(2, 9)", "5 positions have no logits", "logits_to_keep", "shift"],
    ),
    "another number of rows": (
        lambda: hooked(torch.zeros(3, 4, 5), ids(2, 4)),
        ["(3, 4, 5)", "(2, 4)", "one row for each example"],
    ),
    "labels of whole texts": (
        lambda: hooked(torch.zeros(3, 4, 5), ids(3)),
        ["(3, 4, 5)", "(3,)", "must be (B, T, V) and (B, T)"],
    ),
    "hidden states for a Trainer": (
        lambda: hooked(torch.zeros(2, 4, 16), ids(2, 4, least=39), model_without_a_place()),
        ["(2, 4, 16)", "16 numbers", "vocabulary 50 ids", "hidden states", "language-model head"],
    ),
    "hidden states of a model that is not known": (
        lambda: hooked(torch.zeros(2, 4, 16), ids(2, 4, least=39)),
        ["is 39", "vocabulary of 16 ids", "ignore_index=39", "hidden states"],
    ),
    "a label outside the vocabulary": (
        lambda: hooked(torch.zeros(2, 4, 50), ids(2, 4, least=60), model_without_a_place()),
        ["is 60", "vocabulary of 50 ids", "ignore_index=60"],
    ),
    "several outputs": (
        lambda: hooked((torch.zeros(2, 4, 5), torch.zeros(2, 4, 5)), ids(2, 4)),
        ["may all be the logits", "keys_to_ignore_at_inference"],
    ),
    "one vocabulary entry": (
        lambda: hooked(torch.zeros(2, 4, 1), ids(2, 4)),
        ["a vocabulary of one", "no logits"],
    ),
    "the second hook alone": (
        lambda: gathered(np.zeros((2, 4, 5))),
        ["preprocess_logits_for_metrics", "Give Trainer both", "**ppl.trainer_hooks()"],
    ),
    "a misspelt option of the hooks": (
        lambda: Perplexity().trainer_hooks(shfit=True),
        ["'shfit'", "Did you mean shift?", "shift, groups, process_group"],
    ),
    "an option of texts for the hooks": (
        lambda: Perplexity().trainer_hooks(window=5),
        ["'window'", "It goes to", "compute"],
    ),
    "a shift that is none": (
        lambda: Perplexity().trainer_hooks(shift="yes"),
        ["shift must be True or False", "'yes'"],
    ),
    "the name of one group": (
        lambda: Perplexity().trainer_hooks(groups="law"),
        ["groups"],
    ),
    "a group that hides a number of the whole": (
        lambda: Perplexity().trainer_hooks(groups=["law", "ci_low"]),
        ["rename the group 'ci_low'"],
    ),
}
HELD_OUT = str(ROOT / "tiny_model" / "held_out.jsonl")
COMMAND = {
    "no such file": (lambda: command("nowhere.txt"), ["No such file", "'nowhere.txt'"]),
    "no such second file": (lambda: command(HELD_OUT, "nowhere.txt"), ["No such", "nowhere.txt"]),
    "a directory": (
        lambda: command(TINY),
        ["is a directory", "Name the files", f"--dataset {TINY}"],
    ),
    "nothing in it": (
        lambda: command_on({"a.jsonl": ""}, "a.jsonl"),
        ["There are no texts in a.jsonl"],
    ),
    "another encoding": (
        lambda: command_on({"a.txt": "caf\xe9"}, "a.txt"),
        ["a.txt is not UTF-8 text", "position 3"],
    ),
    "a document": (lambda: command("a.pdf"), ["a.pdf is of a kind", "convert it to plain text"]),
    "another column": (
        lambda: command(HELD_OUT, "--column", "body"),
        ["row 0 has no column 'body'", "name, text"],
    ),
    "a column of numbers": (
        lambda: command_on({"a.jsonl": '{"text": 5}'}, "a.jsonl"),
        ["'text' of row 0", "but int"],
    ),
    "torn JSON": (lambda: command_on({"a.jsonl": '{"text": "a"'}, "a.jsonl"), ["row 0", "no JSON"]),
    "groups of plain text": (
        lambda: command(ROOT / "LICENSE", "--group-by", "kind"),
        ["no column 'kind'", "file makes"],
    ),
    "no texts asked for": (
        lambda: command(HELD_OUT, "--limit", 0),
        ["--limit must be at least 1, got 0"],
    ),
    "a word for a number": (
        lambda: command(HELD_OUT, "--window", "half"),
        ["--window", "int", "'half'"],
    ),
    "a window that is too long": (
        lambda: command(HELD_OUT, "--window", 9999),
        ["window is 9999 tokens", "at most 512"],
    ),
    "a stride of nothing": (
        lambda: command(HELD_OUT, "--stride", 0),
        ["stride must be a whole number, at least 1"],
    ),
    "a preset that is not known": (
        lambda: command(HELD_OUT, "--preset", "lmeval"),
        ["'lm-eval'", "got 'lmeval'"],
    ),
    "a stride of a preset": (
        lambda: command(HELD_OUT, "--preset", "lm-eval", "--stride", 3),
        ["stride has no meaning", "lm-eval"],
    ),
    "an option misspelt": (
        lambda: command(HELD_OUT, "--batchsize", 3),
        ["no option --batchsize", "mean --batch-size?"],
    ),
    "an option of another command": (
        lambda: command(HELD_OUT, "--base", TINY, "--pseudo", "original"),
        ["--pseudo is an option of ppleval compute, not of ppleval compare"],
    ),
    "an option of no command": (
        lambda: command(HELD_OUT, "--output", "a"),
        ["no option --output", "compute --help"],
    ),
    "files apart": (
        lambda: command("a.txt", "--lines", "b.txt"),
        ["b.txt stands apart", "side by side"],
    ),
    "files and a dataset": (
        lambda: command(HELD_OUT, "--dataset", TINY),
        ["--dataset goes without files"],
    ),
    "lines of a dataset": (
        lambda: command("--dataset", HELD_OUT, "--lines"),
        ["--dataset goes without --lines"],
    ),
    "a dataset without a name": (
        lambda: command("--dataset", ""),
        ["NAME[:CONFIG][:SPLIT]", "got ''"],
    ),
    "texts to the standard output": (
        lambda: command(HELD_OUT, "--per-text", "-"),
        ["--per-text -", "Name a file, or ./-"],
    ),
    "a picture to the standard output": (
        lambda: command(HELD_OUT, "--plot", "-"),
        ["--plot -", "Name a file"],
    ),
    "a base to the standard output": (
        lambda: command(HELD_OUT, "--to", "-"),
        ["--to -", "Name a file"],
    ),
    "a picture of another kind": (
        lambda: command(HELD_OUT, "--plot", "a.bmp"),
        [".png, .svg, .pdf", "got 'a.bmp'"],
    ),
    "an output that is read": (
        lambda: command(HELD_OUT, "--per-text", HELD_OUT),
        ["would overwrite", "another place"],
    ),
    "an output in no directory": (
        lambda: command(HELD_OUT, "--per-text", "/nowhere/a"),
        ["--per-text", "no directory"],
    ),
    "an output that exists": (
        lambda: command_on({"a": "mine"}, HELD_OUT, "--per-text", "a"),
        ["exists", "--overwrite"],
    ),
    "nothing to resume": (lambda: command(HELD_OUT, "--resume"), ["--resume needs --per-text"]),
    "fewer texts than before": (
        lambda: resume("--limit", 2),
        ["it has 3, and now there are 2", "at least 3 or none"],
    ),
    "another window than before": (
        lambda: resume("--window", 20),
        ["window:512, stride:256; now they are window:20, stride:10"],
    ),
    "groups that were not there before": (
        lambda: resume("--group-by", "file"),
        ["settings, none; now they are group_by file"],
    ),
    "workers without Ray": (
        lambda: command(HELD_OUT, "--workers", 2),
        ["--workers needs --engine ray"],
    ),
    "a dataset for Ray": (
        lambda: command("--engine", "ray", "--dataset", TINY),
        ["--engine ray reads files"],
    ),
    "one process for two parts": (
        lambda: command(HELD_OUT, "--tensor-parallel", 2),
        ["here it is 1", "torchrun"],
    ),
    "a template in another encoding": (
        lambda: command_on({"a.jinja": "\xe9"}, HELD_OUT, "--chat-template", "a.jinja"),
        ["--chat-template a.jinja is not UTF-8"],
    ),
    "a template for plain texts": (
        lambda: command_on({"a.jinja": "{{ 1 }}"}, HELD_OUT, "--chat-template", "a.jinja"),
        ["chat_template has no meaning with texts"],
    ),
}
# torch's words on what is made here to be refused.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
MISTAKES = LOADING | TEXT_INPUTS | LOGITS | TRAINER | COMMAND


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_says_what_to_do(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises(Exception) as error:  # noqa: PT011
        call()
    said = str(error.value)
    assert [word for word in words if word not in said] == [], said


def test_no_mistake_hides_another_of_the_same_name():
    sections = (LOADING, TEXT_INPUTS, LOGITS, TRAINER, COMMAND)
    assert len(MISTAKES) == sum(map(len, sections))
