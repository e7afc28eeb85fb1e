"""What people do wrong, and what they are told: one table of calls and words of their errors.

Read each error aloud: it names the argument, what was expected, what came, and what to do.
"""

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from command_line import run
from text_oracles import TINY

from ppleval import Perplexity

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


def compute(predictions, **options):
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


# What the mistake is -> (a call that makes it, words that its error has).
LOADING = {}
TEXT_INPUTS = {
    # What is no list of texts.
    "one string": (lambda: compute("a text"), ["predictions", "one string", "[text]"]),
    "bytes": (lambda: compute(b"a text"), ["one string", "[text]"]),
    "a number": (lambda: compute(5), ["predictions must be a list of texts, got int"]),
    "no texts": (lambda: compute([]), ["predictions holds no texts"]),
    "nothing at all": (lambda: call("score"), ["predictions is missing", "list of texts"]),
    "a Dataset": (lambda: compute(table()), ["predictions", "table (Dataset)", "['text']"]),
    "a Dataset, added": (lambda: add_batch(table()), ["table (Dataset)", "['text']"]),
    "a Dataset that streams": (
        lambda: compute(table().to_iterable_dataset()),
        ["table (IterableDataset)", "['text']"],
    ),
    "a DatasetDict": (
        lambda: compute(datasets.DatasetDict(test=table())),
        ["table (DatasetDict)", "['test']['text']"],
    ),
    "a DataFrame": (lambda: compute(pd.DataFrame(ROWS)), ["table (DataFrame)", "['text']"]),
    "a DataFrame, added": (lambda: add_batch(pd.DataFrame(ROWS)), ["table (DataFrame)"]),
    "a dict of columns": (lambda: compute({"sentence": TEXTS}), ["table (dict)", "['sentence']"]),
    "a list of rows": (
        lambda: compute(ROWS),
        ["predictions[0]", "string", "dict", "[row['text'] for row in rows]"],
    ),
    "a list of rows, added": (lambda: add_batch(ROWS), ["[row['text'] for row in rows]"]),
    "rows one by one": (lambda: compute(iter(ROWS)), ["[row['text'] for row in rows]"]),
    "rows of conversations": (
        lambda: compute([{"messages": TALK}]),
        ["[row['messages'] for row in rows]"],
    ),
    "rows with another name for the text": (
        lambda: call("score", [{"id": 7, "body": "text"}]),
        ["[row['body'] for row in rows]"],
    ),
    "one conversation": (lambda: compute(TALK), ["messages of one", "[messages]"]),
    "messages one by one": (
        lambda: compute(iter(TALK)),
        ["predictions[0]", "list of messages", "[messages]"],
    ),
    "a message without a role": (
        lambda: compute([{"content": "Hi"}]),
        ["messages of one", "[messages]"],
    ),
    # What is no text.
    "a BatchEncoding": (
        lambda: compute(tiny()[1](TEXTS)),
        ["predictions", "BatchEncoding", "texts themselves", "tokenised here"],
    ),
    "a BatchEncoding for each text": (
        lambda: compute([tiny()[1](text) for text in TEXTS]),
        ["predictions[0]", "BatchEncoding", "texts themselves"],
    ),
    "a BatchEncoding, added": (
        lambda: add_batch(tiny()[1](TEXTS)),
        ["BatchEncoding", "inputs of a model", "model(**inputs).logits"],
    ),
    "a Dataset of ids": (
        lambda: compute(datasets.Dataset.from_dict({"input_ids": [[1, 2]]})),
        ["Dataset", "texts themselves", "tokenised here"],
    ),
    "lists of ids": (lambda: compute([[1, 2], [3]]), ["predictions[0]", "texts themselves"]),
    "ids": (lambda: compute([1, 2]), ["predictions[0]", "got int", "texts themselves"]),
    "a tensor of ids": (lambda: compute(ids(2, 3)), ["got Tensor", "texts themselves"]),
    "logits and a model": (
        lambda: compute(torch.zeros(2, 3, 4)),
        ["got Tensor", "references=", "without a model"],
    ),
    "tokens": (
        lambda: compute([text.split() for text in TEXTS]),
        ["predictions[0]", "convert_tokens_to_string(tokens)", "' '.join(words)"],
    ),
    "tokens, added": (lambda: add_batch([["a", "b"]]), ["predictions[0]", "' '.join(words)"]),
    "texts in bytes": (lambda: compute([b"a"]), ["predictions[0]", "bytes", ".decode()"]),
    "paths": (lambda: compute([Path("a.txt")]), ["predictions[0]", ".read_text()"]),
    "None in a list": (
        lambda: compute(["a", None]),
        ["predictions[1]", "NoneType", "Row 2, counted from 1, is empty", "leave it out"],
    ),
    "None first": (lambda: add_batch([None, "a"]), ["predictions[0]", "Row 1, counted from 1"]),
    "NaN in a column": (
        lambda: compute(pd.Series(["a", float("nan")])),
        ["predictions[1]", "Row 2, counted from 1, is empty"],
    ),
    "NA in a column": (
        lambda: compute(pd.Series(["a", pd.NA], dtype="string")),
        ["predictions[1]", "Row 2, counted from 1, is empty"],
    ),
    "None among conversations": (
        lambda: compute([TALK, None], chat_template=CONCATENATES),
        ["predictions[1]", "conversation", "Row 2, counted from 1, is empty"],
    ),
    "None among contexts": (
        lambda: compute(TEXTS, contexts=["a", None]),
        ["contexts[1]", "Row 2, counted from 1, is empty", "pass ''"],
    ),
    "a text among conversations": (
        lambda: compute([TALK, "Hi"], chat_template=CONCATENATES),
        ["predictions[1]", "All are texts, or all are conversations"],
    ),
    "one context for all": (
        lambda: compute(TEXTS, contexts="a"),
        ["contexts must be a list of texts", "[text]"],
    ),
    "fewer contexts than texts": (
        lambda: compute(TEXTS, contexts=["a"]),
        ["one prompt for each text", "more texts, beyond 1"],
    ),
    "parts of a message": (
        lambda: compute([PARTS], chat_template=CONCATENATES),
        ["can only concatenate str", "list of parts", '"".join(part["text"] for part in'],
    ),
    "parts of a message that are printed": (
        lambda: compute([PARTS], chat_template=PRINTS),
        ["prints the content", "as a list", '"".join(part["text"] for part in'],
    ),
    # The model and its tokenizer.
    "no tokenizer": (
        lambda: compute(TEXTS, model_id=None, model=tiny()[0]),
        ["model= goes with the tokenizer", f"AutoTokenizer.from_pretrained({TINY!r})"],
    ),
    "no tokenizer, and none is known": (
        lambda: compute(TEXTS, model_id=None, model=model_without_a_place()),
        ["model= goes with the tokenizer", "pass tokenizer="],
    ),
    "the name of a tokenizer": (
        lambda: compute(TEXTS, model_id=None, model=tiny()[0], tokenizer="gpt2"),
        ["tokenizer must be", "got str", "AutoTokenizer.from_pretrained('gpt2')"],
    ),
    "a processor": (
        lambda: compute(TEXTS, tokenizer=SimpleNamespace(tokenizer=tiny()[1])),
        ["tokenizer must be", "Pass its .tokenizer"],
    ),
    "the name of a model as model=": (
        lambda: compute(TEXTS, model_id=None, model="gpt2", tokenizer=tiny()[1]),
        ["model must be", "got str", "model_id="],
    ),
    "a model as model_id=": (
        lambda: compute(TEXTS, model_id=tiny()[0]),
        ["model_id must be a name or a path", "got LlamaForCausalLM.", "goes to model="],
    ),
    "texts without a model": (
        lambda: compute(TEXTS, model_id=None),
        ["Texts need a model", "model_id="],
    ),
    "texts and references": (lambda: compute(TEXTS, references=TEXTS), ["without references"]),
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
    "prompts=": (lambda: compute(TEXTS, prompts=TEXTS), ["'prompts'", "called contexts"]),
    "pretrained=": (
        lambda: Perplexity().compute(predictions=TEXTS, pretrained=TINY),
        ["'pretrained'", "model_id="],
    ),
    "save_base without a path": (lambda: call("save_base", TEXTS), ["path is missing"]),
    "a misspelt option": (
        lambda: compute(TEXTS, max_len=5),
        ["'max_len'", "Did you mean max_length?", "The arguments are predictions, "],
    ),
    "top_k of compute": (lambda: compute(TEXTS, top_k=5), ["'top_k'", "It goes to score"]),
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
        lambda: compute(TEXTS, shift=True),
        ["shift= goes with logits and references="],
    ),
    "an option of texts with logits": (
        lambda: compute(np.zeros((1, 2, 3)), model_id=None, references=[[0, 1]], window=5),
        ["window= goes with texts and model_id="],
    ),
    "attention_mask= of compute": (
        lambda: compute(torch.zeros(1, 2, 3), model_id=None, attention_mask=ids(1, 2)),
        ["'attention_mask'", "sample_weight=", "-100 into the references"],
    ),
    "attention_mask= of add_batch": (
        lambda: add_batch(torch.zeros(1, 2, 3), references=ids(1, 2), attention_mask=ids(1, 2)),
        ["'attention_mask'", "sample_weight=", "-100 into the references"],
    ),
    "labels=": (
        lambda: compute(torch.zeros(1, 2, 3), model_id=None, labels=ids(1, 2)),
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
    "float labels": (
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
COMMAND = {}
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
