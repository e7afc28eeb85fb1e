"""Which process scores which texts when, from lengths alone."""

import random

from text_oracles import (
    TEXTS,
    TINY,
    ids_of,
)

from ppleval.texts import schedule as texts_schedule


def test_each_rank_scores_about_as_much():
    shares = texts_schedule.shares
    rng = random.Random(0)
    lengths = [rng.randrange(5000) for _ in range(100)]
    for num_ranks in (1, 3, 8):
        shared = shares(lengths, num_ranks)
        assert sorted(i for share in shared for i in share) == list(range(100))
        loads = [sum(lengths[i] for i in share) for share in shared]
        assert max(loads) < 1.1 * sum(loads) / num_ranks
    assert sum(map(len, shares(lengths[:2], 3))) == 2
    assert sorted(map(len, shares([1000] + [10] * 90, 2))) == [1, 90]


def test_a_generator_is_read_in_portions(ppl, monkeypatch):
    monkeypatch.setattr(texts_schedule, "TEXTS_AT_ONCE", 3)
    scorer = ppl.text_scorer(model_id=TINY)
    read = []
    scored = scorer.score(read.append(i) or text for i, text in enumerate(TEXTS))
    next(scored)
    assert read == [0, 1, 2]
    assert len(list(scored)) == len(TEXTS) - 1


def test_the_first_portions_are_small(ppl):
    """So that a slow model has something to show, and to resume from, early."""
    schedule = texts_schedule
    sizes = [
        len(portion) for portion in schedule.portions((("x" * 1024, None)) for _ in range(600))
    ]
    assert sizes == [4, 8, 16, 32, 64, 128, 256, 92]


def test_batches_are_packed_under_a_budget_of_tokens(ppl, models):
    model, tokenizer = models["llama"]
    texts = ["word " * (i % 10 + 1) for i in range(4000)]  # none longer than the context
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer)
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    try:
        list(scorer.score(texts))
    finally:
        handle.remove()
    budget = scorer.model.tokens_per_batch
    assert all(rows * length <= budget for rows, length in shapes)
    assert sum(rows for rows, _ in shapes) >= len(texts)
    # Sorted by length and full: hardly more padded tokens, and batches, than there have to be; the
    # last batch of each portion is not full.
    padded = sum(rows * length for rows, length in shapes)
    assert padded < 1.1 * sum(len(ids_of(tokenizer, text)) for text in texts)
    num_portions = len(list(texts_schedule.portions((text, None) for text in texts)))
    assert num_portions == 5
    assert len(shapes) <= padded / budget + num_portions
