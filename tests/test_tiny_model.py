"""The bundled model: loads offline, is small, as good as its card says, and can be rebuilt."""

import re
import subprocess
import sys

import pytest
import torch
from support import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = ROOT / "tiny_model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL)


def test_it_is_small_and_loads_as_float32(model, tokenizer):
    assert (MODEL / "model.safetensors").stat().st_size <= 5_000_000
    assert 2000 <= len(tokenizer) <= 4000
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)


def test_the_tokenizer_keeps_every_text(tokenizer):
    for text in (
        "A plain sentence.",
        "  spaces\n\tand tabs ",
        "naïve 漢字 🎉 \u202eabc",
        "\x00\x7f",
    ):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_make_run_prints_the_bits_per_byte_of_the_cards():
    (arguments,) = re.findall(r"(?m)^run:.*\n\t@.*/ppleval (.*)\n", (ROOT / "Makefile").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "ppleval", *arguments.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    bits = float(re.search(r"bits per byte +([\d.]+)", done.stdout).group(1))
    assert bits < 1.9
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert float(re.search(r"\*\*([\d.]+)\*\* \(perplexity", card).group(1)) == bits
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    shown = re.search(r"\$ make run\n(.*?)```", page, re.DOTALL)
    assert shown.group(1) == done.stdout


def test_it_predicts_english_better_than_noise(model, tokenizer):
    def nll(text):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            return model(ids, labels=ids).loss.item()

    assert nll("Return the number of items in the list.") < nll("list the in items of number the.")
