"""What the metric does on each of several ranks; tests/test_processes.py reads it.

    PYTHONPATH=.:tests python tests/workers/sync.py OUT

Rank r writes OUT.r, a JSON object of {case: result or error}.
"""

import functools
import json
import math
import os
import re
import sys
from pathlib import Path

import evaluate
import torch
import torch.distributed as dist
from support import ROOT, random_batch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
)
from workers import trainer

from ppleval import Perplexity
from ppleval.texts import schedule

TINY = {"model_id": str(ROOT / "tiny_model")}
# Of very unequal length, and one that has nothing to score.
TEXTS = ["Return the number of items in the list.", "", "The cat. " * 300, "No.", "naïve 漢字 🎉"]
SHORT_TEXTS = [text[:120] for text in TEXTS]
ROWS = trainer.make_rows(shift=True)
NAMES = ["code", "none", "prose", "prose", "other"]
CONTEXTS = ["", "Question: ", "The dog. ", "Yes or no? ", "Hm. "]


def batches(rank: int) -> list[dict]:
    """Two batches on the first rank, one on the second, with weights and a row that is NaN."""
    made = []
    for seed in (0, 1) if rank == 0 else (2,):
        logits, targets = random_batch(batch=2 + seed, seed=seed)
        weights = torch.rand(targets.shape, generator=torch.manual_seed(seed))
        made.append({"predictions": logits, "references": targets, "sample_weight": weights})
    return made


def add(ppl, rank: int) -> None:
    for batch in batches(rank):
        ppl.add_batch(**batch)


def sync_then_compute(rank):
    ppl = Perplexity()
    add(ppl, rank)
    ppl.sync()
    return ppl.compute() | {"pending": len(ppl)}


def compute_with_sync(rank):
    ppl = Perplexity()
    add(ppl, rank)
    first = ppl.compute(sync=True)
    add(ppl, rank)
    assert ppl.compute(sync=True) == first
    return first


def last_batch_in_compute(rank):
    ppl = Perplexity()
    *earlier, last = batches(rank)
    for batch in earlier:
        ppl.add_batch(**batch)
    return ppl.compute(**last, sync=True)


def add_with_groups(ppl, rank: int) -> None:
    """Some groups on both ranks, some on one."""
    for number, batch in enumerate(batches(rank)):
        names = [f"rank {rank}", "both", "both", f"batch {number}"]
        ppl.add_batch(**batch, groups=names[: len(batch["references"])])


def batches_with_groups(rank):
    ppl = Perplexity()
    add_with_groups(ppl, rank)
    return ppl.compute(sync=True)


def groups_on_one_only(rank):
    ppl = Perplexity()
    (add_with_groups if rank == 0 else add)(ppl, rank)
    return ppl.compute(sync=True)


def texts_with_groups(rank):
    options = {"groups": NAMES, "positions": True}
    return Perplexity().compute(predictions=TEXTS, **TINY, **options, sync=True)


def one_rank_without_any(rank):
    ppl = Perplexity()
    if rank == 0:
        add(ppl, rank)
    return ppl.compute(sync=True)


def no_rank_with_any(rank):
    Perplexity().compute(sync=True)


def not_asked_for(rank):
    ppl = Perplexity()
    add(ppl, rank)
    return ppl.compute()


def nothing_scored_and_infinity(rank):
    ppl = Perplexity()
    target = -100 if rank == 0 else 0
    ppl.add_batch(predictions=torch.tensor([[[-math.inf, 0.0]]]), references=[[target]])
    return ppl.compute(sync=True)


def twice(rank):
    ppl = Perplexity()
    add(ppl, rank)
    ppl.sync()
    ppl.sync()


def more_after_sync(rank):
    ppl = Perplexity()
    add(ppl, rank)
    ppl.sync()
    add(ppl, rank)


def merge_after_sync(rank):
    synced, other = Perplexity(), Perplexity()
    add(synced, rank)
    add(other, rank)
    synced.sync()
    try:
        other.merge(synced)
    except ValueError:
        synced.merge(other)


def a_bad_batch_on_one(rank):
    logits, targets = random_batch(vocab_size=11)
    targets[0, 0] = 11 if rank == 1 else 0
    Perplexity().compute(predictions=logits, references=targets, sync=True)


def texts_pending_on_one(rank):
    ppl = Perplexity()
    if rank == 1:
        ppl.add_batch(predictions=TEXTS)
    else:
        add(ppl, rank)
    ppl.compute(sync=True)


def different_options(rank):
    ppl = Perplexity(shift=rank == 1)
    add(ppl, rank)
    ppl.compute(sync=True)


def reset_after_sync(rank):
    ppl = Perplexity()
    add(ppl, rank)
    ppl.sync()
    ppl.reset()
    add(ppl, rank)
    return ppl.compute(sync=True)


def pending_texts(rank):
    ppl = Perplexity()
    ppl.add_batch(predictions=TEXTS)
    ppl.sync()


def texts(rank):
    return Perplexity().compute(predictions=TEXTS, **TINY, sync=True)


def texts_streamed(rank):
    return Perplexity().compute(predictions=(text for text in TEXTS), **TINY, sync=True)


def texts_added(rank):
    ppl = Perplexity()
    ppl.add_batch(predictions=TEXTS[:2])
    return ppl.compute(predictions=TEXTS[2:], **TINY, sync=True)


def texts_in_portions(rank):
    schedule.TEXTS_AT_ONCE = 1
    try:
        return Perplexity().compute(predictions=TEXTS, **TINY, sync=True)
    finally:
        schedule.TEXTS_AT_ONCE = 2048


def texts_with_contexts(rank):
    return Perplexity().compute(predictions=TEXTS, contexts=CONTEXTS, **TINY, sync=True)


@functools.cache
def other_models():
    """pseudo -> arguments of `compute`: a masked model, and without pseudo= an encoder-decoder."""
    tokenizer = AutoTokenizer.from_pretrained(TINY["model_id"])
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(5)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 2}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = {"eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(**sizes, **layers, intermediate_size=32))
    bart = BartConfig(**sizes, **heads, **ends, d_model=16, encoder_layers=1, decoder_layers=1)
    named = {"tokenizer": tokenizer, "contexts": CONTEXTS}
    return {
        "original": {"model": bert.eval(), **named, "pseudo": "original"},
        None: {"model": BartForConditionalGeneration(bart).eval(), **named},
    }


def texts_masked(rank):
    return Perplexity().compute(predictions=SHORT_TEXTS, **other_models()["original"], sync=True)


def texts_with_sources(rank):
    return Perplexity().compute(predictions=SHORT_TEXTS, **other_models()[None], sync=True)


def texts_joined(rank):
    return Perplexity().compute(predictions=TEXTS, preset="hf-docs", **TINY, sync=True)


def one_text(rank):
    return Perplexity().compute(predictions=TEXTS[:1], **TINY, sync=True)


def own_texts(rank):
    return Perplexity().compute(predictions=TEXTS[rank : rank + 2], **TINY)


def different_texts(rank):
    Perplexity().compute(predictions=[f"Text of rank {rank}."], **TINY, sync=True)


def different_numbers_of_texts(rank):
    Perplexity().compute(predictions=TEXTS[: 3 + rank], **TINY, sync=True)


def different_settings(rank):
    Perplexity().compute(predictions=TEXTS, **TINY, window=64 + rank, sync=True)


def bad_text_everywhere(rank):
    Perplexity().compute(predictions=["good", 5], **TINY, sync=True)


def bad_text_on_one(rank):
    Perplexity().compute(predictions=["good", 5 if rank == 1 else "bad"], **TINY, sync=True)


def model_that_fails_on_one(rank):
    ppl = Perplexity()
    scorer = ppl.text_scorer(**TINY)

    def fail(*args, **kwargs):
        raise ZeroDivisionError("no memory, say")

    if rank == 1:
        scorer.model.launch = fail
    ppl.compute(predictions=TEXTS, **TINY, sync=True)


def loop_of_the_docs(rank):
    page = (ROOT / "docs" / "processes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (block,) = [block for block in blocks if "Accelerator(" in block]
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(ROWS, batch_size=2, collate_fn=trainer.collate)
    names = {"evaluate": evaluate, "torch": torch, "model": trainer.llama(), "loader": loader}
    os.environ["ACCELERATE_USE_CPU"] = "true"  # which `accelerate launch --cpu` sets
    os.chdir(ROOT)
    exec(block, names)
    model = names["model"].eval()
    return names["result"] | {"true": trainer.expected_perplexity(model, ROWS, True, 1)}


CASES = [
    sync_then_compute,
    compute_with_sync,
    last_batch_in_compute,
    batches_with_groups,
    groups_on_one_only,
    one_rank_without_any,
    no_rank_with_any,
    not_asked_for,
    loop_of_the_docs,
    nothing_scored_and_infinity,
    twice,
    more_after_sync,
    merge_after_sync,
    a_bad_batch_on_one,
    texts_pending_on_one,
    different_options,
    compute_with_sync,  # as before, after all these errors
    reset_after_sync,
    pending_texts,
    texts,
    texts_streamed,
    texts_added,
    texts_in_portions,
    texts_with_contexts,
    texts_masked,
    texts_with_sources,
    texts_joined,
    texts_with_groups,
    one_text,
    own_texts,
    different_texts,
    different_numbers_of_texts,
    different_settings,
    bad_text_everywhere,
    bad_text_on_one,
    model_that_fails_on_one,
    texts,  # as before, after all these errors
]


def main() -> None:
    results = {}
    try:
        Perplexity().sync()
    except ValueError as error:
        results["not_connected"] = f"ValueError: {error}"
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for case in CASES:
        try:
            results[case.__name__] = case(rank)
        except (ValueError, TypeError, ConnectionError, ZeroDivisionError) as error:
            results[case.__name__] = f"{type(error).__name__}: {error}"
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
