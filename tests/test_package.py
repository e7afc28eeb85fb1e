"""`import ppleval`, and the command without work to do: quick, and without evaluate."""

import os
import subprocess
import sys

import pytest
from support import PYTHONPATH, ROOT

import ppleval


def run(program: str) -> str:
    """What a program prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_and_help_bring_neither_torch_nor_transformers():
    printed = run("""
import sys
import ppleval
from ppleval.cli.main import main

for argv in (["--help"], ["compare", "--help"], ["--version"], ["compute", "--limit", "1"]):
    try:
        main(argv)
    except SystemExit:
        pass
print({"torch", "transformers", "evaluate", "datasets", "numba"} & set(sys.modules))
""")
    assert "compute --model tiny_model book.txt" in printed
    assert printed.endswith(f"ppleval {ppleval.__version__}\nset()\n")


def test_without_evaluate_and_datasets():
    printed = run("""
import sys
sys.modules.update(dict.fromkeys(["evaluate", "datasets", "matplotlib", "pyarrow"]))  # no import
from ppleval import Perplexity

ppl = Perplexity()
print(ppl.compute(predictions=[[[0.0, 0.0]]], references=[[0]], shift=False)["perplexity"])
texts = ["Return the number of items.", "Return items number the of."]
result = ppl.compute(predictions=texts, model_id="tiny_model")
print([round(value) for value in result["perplexities"]])
print(len(ppl.score(texts, model_id="tiny_model")))
""")
    assert printed.splitlines() == ["2.0", "[32, 706]", "2"]


def test_public_names():
    assert set(ppleval.__all__) <= set(dir(ppleval))
    for name in ppleval.__all__:
        assert getattr(ppleval, name) is not None
    assert ppleval.Perplexity.token_nll is ppleval.token_nll
    with pytest.raises(AttributeError, match="module 'ppleval' has no attribute 'perplexity'"):
        _ = ppleval.perplexity
