"""What people do wrong, and what they are told: one table of calls and words of their errors.

Read each error aloud: it names the argument, what was expected, what came, and what to do.
"""

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
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


# What the mistake is -> (a call that makes it, words that its error has).
LOADING = {}
TEXT_INPUTS = {}
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
TRAINER = {}
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
