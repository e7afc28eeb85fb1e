"""The progress of scoring, for people and for functions."""

import os
import random
import subprocess
import sys
from contextlib import closing
from fractions import Fraction

import numpy as np
import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from other_models import make_tokenizer
from support import PYTHONPATH
from text_oracles import TEXTS, TINY, config_of, grown
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from ppleval.texts import progress as texts_progress

# In several portions, of 2^12 characters and more. The first texts and the last have no tokens.
WORDS = "Return the number of items in the list. " * 50
LENGTHS = random.Random(0).choices([3, 30, 300, 1500], k=36)
UNEQUAL = [*[""] * 2048, *(WORDS[:length] for length in LENGTHS), *[""] * 2049]


@pytest.fixture
def shown(monkeypatch):
    """What the bar is told: its number and its total at each update."""
    progress, told = texts_progress, []

    class Told(progress.tqdm):
        def update(self, n=1):
            super().update(n)
            told.append((self.n, self.total))

    monkeypatch.setattr(progress, "tqdm", Told)
    return told


def test_a_first_batch_without_a_token_that_is_scored():
    """As of the word that would follow a text, which is read by itself."""
    told = []
    with closing(texts_progress.Progress(lambda *numbers: told.append(numbers), 2)) as progress:
        progress.begin(2, 5)
        progress.show()
        progress.add(np.ones(5), 1.0)
        progress.show()
    assert told == [(0, 5), (5, 5)]


def check_runs_to_the_end(told):
    """Never back, and exactly to the end."""
    parts = [Fraction(done, total) for done, total in told if done > 0]
    assert len(parts) > 4
    assert parts == sorted(parts)
    assert parts[-1] == 1


@pytest.mark.parametrize("is_pending", [False, True])
def test_the_bar_of_a_list_runs_to_the_end(ppl, shown, is_pending):
    if is_pending:
        ppl.add_batch(predictions=UNEQUAL)
    with pytest.warns(UserWarning, match="have no token to score"):
        found = ppl.compute(
            predictions=None if is_pending else UNEQUAL, model_id=TINY, add_start_token=False
        )
    check_runs_to_the_end(shown)
    assert shown[-1] == (found["num_tokens"], found["num_tokens"])


def test_every_bar_of_a_list_runs_to_the_end(ppl, models, shown, tmp_path):
    model, tokenizer = models["llama"]
    named = {"model": model, "tokenizer": tokenizer}
    other_tokens = make_tokenizer("roberta")
    other = grown(AutoModelForCausalLM.from_config(config_of("gpt2", len(other_tokens))))
    texts = [text[:300] for text in UNEQUAL[2048:-2049]] * 2
    for call in (
        lambda: ppl.score(texts, **named),
        lambda: ppl.save_base(texts, tmp_path / "base", **named),
        lambda: ppl.compare(texts, **named, base=tmp_path / "base"),
        lambda: ppl.compare(texts, **named, base=other, base_tokenizer=other_tokens),
    ):
        shown.clear()
        call()
        check_runs_to_the_end(shown)


def test_the_bar_of_a_joined_text_runs_to_the_end(ppl, shown):
    ppl.compute(predictions=["a b c " * 500, "d"], model_id=TINY, preset="hf-docs", window=64)
    check_runs_to_the_end(shown)


def test_texts_of_unknown_number_have_no_total(ppl, shown):
    ppl.compute(predictions=(text for text in UNEQUAL[2048:-2049]), model_id=TINY)
    assert {total for _, total in shown} == {None}


def test_a_process_that_scores_a_share(shown):
    """Its part of the portion stands for the portion, also where it has no share of one."""
    with closing(texts_progress.Progress(True, num_texts=12)) as progress:
        for num_texts, num_tokens in [(3, 10), (6, 0), (3, 7)]:
            progress.begin(num_texts, num_tokens)
            for _ in range(num_tokens):
                progress.add(np.ones(1), 1.0)
                progress.show()
            if num_tokens == 0:
                progress.show()
    check_runs_to_the_end(shown)
    assert shown[9] == (10, 40)
    assert shown[10] == (10, 13)


def test_a_function_is_told_of_the_progress(ppl):
    told = []
    scorer = ppl.text_scorer(model_id=TINY)
    scored = list(scorer.score(TEXTS, progress=lambda *counts: told.append(counts)))
    total = sum(text.sums.num_tokens for text in scored)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


@pytest.mark.parametrize(
    ("disable", "enable"),
    [(disable_progress_bars, enable_progress_bars), (disable_progress_bar, enable_progress_bar)],
    ids=["huggingface_hub", "transformers"],
)
def test_progress_follows_the_switches_of_both_libraries(ppl, capsys, disable, enable):
    def shown():
        ppl.compute(predictions=TEXTS, model_id=TINY)
        return capsys.readouterr().err

    ppl.compute(predictions=TEXTS, model_id=TINY)
    capsys.readouterr()
    bar = shown()
    assert "tok/s" in bar
    assert "perplexity=" in bar
    disable()
    try:
        assert shown() == ""
    finally:
        enable()


def test_progress_follows_the_switch_of_tqdm():
    """Which tqdm reads where it is imported."""
    program = (
        "from ppleval.texts.progress import Progress\n"
        "bar = Progress(True, 1)\n"
        "bar.begin(1, 1), bar.show(), bar.close()"
    )

    def shown(value):
        environment = os.environ | {"PYTHONPATH": PYTHONPATH, "TQDM_DISABLE": value}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, capture_output=True, text=True).stderr

    assert "perplexity" in shown("")
    assert shown("1") == ""
