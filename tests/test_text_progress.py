"""The progress of scoring, for people and for functions."""

import datasets
from text_oracles import (
    TEXTS,
    TINY,
)


def test_a_function_is_told_of_the_progress(ppl):
    told = []
    scorer = ppl.text_scorer(model_id=TINY)
    scored = list(scorer.score(TEXTS, progress=lambda *counts: told.append(counts)))
    total = sum(text.sums.num_tokens for text in scored)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_progress_follows_the_switches_of_both_libraries(ppl, capsys):
    def shown():
        ppl.compute(predictions=TEXTS, model_id=TINY)
        return capsys.readouterr().err

    ppl.compute(predictions=TEXTS, model_id=TINY)
    capsys.readouterr()
    bar = shown()
    assert "tok/s" in bar
    assert "perplexity=" in bar
    datasets.disable_progress_bars()
    try:
        assert shown() == ""
    finally:
        datasets.enable_progress_bars()
