"""One model, one corpus, every convention: the table of docs/why_numbers_differ.md.

    python examples/why_numbers_differ.py [--peers] [--write]

prints what stands between the page's markers, or writes it there. `--peers` adds what lm-eval and
torchmetrics themselves give; `pip install ".[bench]"` installs them. Nothing is random; no number
is typed by hand.
"""

import argparse
import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from huggingface_hub.utils import disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from ppleval import Perplexity

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "why_numbers_differ.md"
TINY = ROOT / "tiny_model"
CONTEXT = 512
BATCH_SIZE = 8  # the default of TrainingArguments

PPL = Perplexity()
MODEL = AutoModelForCausalLM.from_pretrained(TINY).eval()
TOKENIZER = AutoTokenizer.from_pretrained(TINY)
HELD_OUT = TINY / "held_out.jsonl"
TEXTS = tuple(
    json.loads(line)["text"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()
)
LINES = tuple(line for text in TEXTS for line in text.split("\n") if line.strip())


@dataclass(frozen=True)
class Convention:
    """A way to a number, why it differs from this module's, and who uses it."""

    name: str
    measure: Callable[[], float]
    why: str
    in_use: str


@functools.cache
def result(texts: tuple[str, ...] = TEXTS, **options) -> dict:
    """What this module gives."""
    return PPL.compute(predictions=texts, model=MODEL, tokenizer=TOKENIZER, **options)


def in_bfloat16() -> float:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    return PPL.compute(predictions=TEXTS, model=model, tokenizer=TOKENIZER)["perplexity"]


@torch.no_grad()
def mean_of_windows(stride: int) -> float:
    """The recipe as it was before https://github.com/huggingface/transformers/pull/34387."""
    ids = TOKENIZER("\n\n".join(TEXTS), return_tensors="pt", verbose=False).input_ids
    losses, previous = [], 0
    for start in range(0, ids.shape[1], stride):
        stop = min(start + CONTEXT, ids.shape[1])
        window = ids[:, start:stop]
        labels = window.clone()
        labels[:, : previous - start] = -100
        losses.append(MODEL(window, labels=labels).loss.item())
        previous = stop
        if stop == ids.shape[1]:
            break
    return sum(losses) / len(losses)


def exp_eval_loss(rows: list[list[int]], batch_size: int = BATCH_SIZE) -> float:
    """What people print after `trainer.evaluate()`, on one process."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model=MODEL,
            args=TrainingArguments(
                output_dir=directory,
                per_device_eval_batch_size=batch_size,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
            ),
            data_collator=DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
            eval_dataset=[{"input_ids": row} for row in rows],
        )
        trainer.remove_callback(PrinterCallback)
        return math.exp(trainer.evaluate()["eval_loss"])


def cut_ids() -> list[list[int]]:
    """The texts' ids, BOS in front, cut to the context."""
    return TOKENIZER(list(TEXTS), truncation=True, max_length=CONTEXT).input_ids


def blocks() -> list[list[int]]:
    """All ids, a BOS before each text, in blocks as run_clm.py makes them."""
    ids = [i for row in TOKENIZER(list(TEXTS), verbose=False).input_ids for i in row]
    return [ids[i : i + CONTEXT] for i in range(0, len(ids) - CONTEXT + 1, CONTEXT)]


@functools.cache
def padded_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits (B, T, V), ids (B, T), ids with -100 at the padding), of the cut texts."""
    batch = TOKENIZER(
        list(TEXTS), truncation=True, max_length=CONTEXT, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = MODEL(**batch).logits
    return logits, batch.input_ids, batch.input_ids.masked_fill(batch.attention_mask == 0, -100)


def padding_scored() -> float:
    logits, ids, _ = padded_batch()
    return PPL.compute(predictions=logits, references=ids, shift=True)["perplexity"]


def labels_not_shifted() -> float:
    logits, _, labels = padded_batch()
    return PPL.compute(predictions=logits, references=labels)["perplexity"]


CONVENTIONS = [
    Convention(
        "**this module**",
        lambda: result()["perplexity"],
        "all tokens of all texts count alike; windows of 512, stride 256",
        "`ppl.compute(predictions=texts, model_id=...)`",
    ),
    Convention(
        '`preset="evaluate"`, `max_length=512`: `mean_perplexity`',
        lambda: result(preset="evaluate", max_length=CONTEXT)["mean_perplexity"],
        "the mean of the texts' perplexities, texts cut to the context",
        "the metric that `evaluate.load` downloads",
    ),
    Convention(
        '`preset="lm-eval"`: `perplexity`',
        lambda: result(preset="lm-eval")["perplexity"],
        "disjoint windows; behind its own BOS it scores the one that the tokenizer adds",
        "the sum behind the next three, which lm-eval prints",
    ),
    Convention(
        '`preset="lm-eval"`: `word_perplexity`',
        lambda: result(preset="lm-eval")["word_perplexity"],
        "the same sum of nll, divided by the words between white space",
        "lm-eval's wikitext and Pile tasks",
    ),
    Convention(
        '`preset="lm-eval"`: `byte_perplexity`',
        lambda: result(preset="lm-eval")["byte_perplexity"],
        "the same sum of nll, divided by the bytes",
        "the same",
    ),
    Convention(
        '`preset="lm-eval"`: `bits_per_byte`',
        lambda: result(preset="lm-eval")["bits_per_byte"],
        "the base-2 logarithm of the row above",
        "the same",
    ),
    Convention(
        '`preset="hf-docs"`',
        lambda: result(preset="hf-docs")["perplexity"],
        "joins the texts, so that only the first begins without context; stride 256",
        "the recipe of transformers' documentation",
    ),
    Convention(
        '`preset="gptq"`',
        lambda: result(preset="gptq")["perplexity"],
        "joins the texts; disjoint chunks, the first token of each and the tail unscored",
        "papers on quantisation and pruning (GPTQ, SparseGPT, Wanda)",
    ),
    Convention(
        '`preset="llama.cpp"`',
        lambda: result(preset="llama.cpp")["perplexity"],
        "joins the texts; scores only the second half of each chunk, which has context",
        "`llama-perplexity`, tables of GGUF files",
    ),
    Convention(
        "mean of the texts' perplexities",
        lambda: result()["mean_perplexity"],
        "a short, hard text counts as much as a long, easy one",
        "`mean_perplexity`; the metric in the second row averages so, too, but over cut texts",
    ),
    Convention(
        "each line a text",
        lambda: result(LINES)["perplexity"],
        "each line begins without context",
        "wikitext as `datasets` has it, a row for each line",
    ),
    Convention(
        "each line a text, mean of their perplexities",
        lambda: result(LINES)["mean_perplexity"],
        "both: a few short, hard lines outweigh the rest",
        "the wikitext example in the card of that metric",
    ),
    Convention(
        "mean of the windows' means",
        lambda: math.exp(mean_of_windows(stride=CONTEXT // 2)),
        '`preset="hf-docs"`, but the first and the last window count as much as the others',
        "transformers' documentation before #34387 (2024), and copies of it",
    ),
    Convention(
        f"`exp(eval_loss)`, texts cut to 512 tokens, batches of {BATCH_SIZE}",
        lambda: exp_eval_loss(cut_ids()),
        "averages the means of batches; the ends of long texts are missing",
        "fine-tuning with `Trainer`",
    ),
    Convention(
        f"`exp(eval_loss)`, joined texts in blocks of 512, batches of {BATCH_SIZE}",
        lambda: exp_eval_loss(blocks()),
        "the chunks of GPTQ, but a BOS joins the texts, and is scored",
        "`run_clm.py` of transformers",
    ),
    Convention(
        "`word_perplexity`",
        lambda: result()["word_perplexity"],
        "the sum of nll, divided by the words, not the tokens",
        "papers on wikitext-103 and the Penn Treebank, lm-eval",
    ),
    Convention(
        "`byte_perplexity`",
        lambda: result()["byte_perplexity"],
        "the sum of nll, divided by the bytes",
        "lm-eval, byte-level models",
    ),
    Convention(
        "`bits_per_token`",
        lambda: result()["bits_per_token"],
        "the base-2 logarithm of the perplexity",
        "fairseq's `nll_loss`",
    ),
    Convention(
        "`bits_per_byte`",
        lambda: result()["bits_per_byte"],
        "the sum of nll in bits, divided by the bytes",
        "the Pile, lm-eval, nanochat",
    ),
    Convention(
        "`mean_nll`",
        lambda: result()["mean_nll"],
        "the natural logarithm of the perplexity",
        "training logs, as 'loss' or 'log perplexity'",
    ),
    Convention(
        "2 to the power of `mean_nll`",
        lambda: 2 ** result()["mean_nll"],
        "a mistake: nats are taken for bits",
        "Catalyst's `PerplexityCallback`, many scripts",
    ),
    Convention(
        "without BOS (`add_start_token=False`)",
        lambda: result(add_start_token=False)["perplexity"],
        "the first token of a text is not scored, and no other sees the start",
        "models whose tokenizer adds none, such as GPT-2",
    ),
    Convention(
        "BOS before a text only (`start_each_window=False`)",
        lambda: result(start_each_window=False)["perplexity"],
        "later windows of a long text begin in its middle, which this model does not mind",
        "scripts that slide a window; Gemma breaks so (transformers #29250, #40524)",
    ),
    Convention(
        "texts cut to the context (`max_length=512`)",
        lambda: result(max_length=CONTEXT)["perplexity"],
        "scores the beginnings of texts only, where there is least context",
        "lmppl, `truncation=True` of a tokenizer",
    ),
    Convention(
        "disjoint windows (`stride=512`)",
        lambda: result(stride=CONTEXT)["perplexity"],
        "the first tokens of a window have almost no context",
        "lm-eval, GPTQ",
    ),
    Convention(
        "more overlap (`stride=64`)",
        lambda: result(stride=64)["perplexity"],
        "behind the first window, each token has nearly a whole window of context",
        "papers that slide a window (Shortformer, ALiBi)",
    ),
    Convention(
        "shorter windows (`window=128`)",
        lambda: result(window=128)["perplexity"],
        "no token sees more than 128 tokens",
        "`max_length` of lm-eval, `-c` of llama.cpp",
    ),
    Convention(
        "bfloat16 weights",
        in_bfloat16,
        "weights and hidden states keep 8 significant bits; logits stay in float32",
        "most checkpoints of large models",
    ),
    Convention(
        "padding scored, texts cut to 512 tokens, one batch",
        padding_scored,
        "a mistake: the labels are the padded ids, and nothing ever taught the model to pad",
        "axolotl (#3988); mlx-lm before #1855 scored one token of it in each text",
    ),
    Convention(
        "labels not shifted, texts cut to 512 tokens",
        labels_not_shifted,
        "a mistake: asks for the token that the model reads, not for the next",
        "llm-foundry before #288; torchmetrics and Keras leave the shift to the caller",
    ),
]
OURS = CONVENTIONS[0].name


def table(header: list[str], aligned: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, aligned, *rows])


def shown(number: float) -> str:
    return f"{number:,.2f}" if number >= 10 else f"{number:.3f}"


def conventions(numbers: dict[str, float]) -> str:
    """The corpus in one line, and the table."""
    counts = (
        f"The corpus: {result()['num_sequences']} texts, {result()['num_tokens']:,} tokens, "
        f"{result()['num_words']:,} words, {result()['num_bytes']:,} bytes."
    )
    rows = [
        [c.name, shown(numbers[c.name]), shown(numbers[c.name] / numbers[OURS]), c.why, c.in_use]
        for c in CONVENTIONS
    ]
    header = ["convention", "number", "ratio", "why it differs", "where it is in use"]
    return f"{counts}\n\n{table(header, ['---', '---:', '---:', '---', '---'], rows)}"


def units_key(ours: float) -> list[list[str]]:
    """What tells a number of another unit."""
    tokens_per_word = result()["num_tokens"] / result()["num_words"]
    tokens_per_byte = result()["num_tokens"] / result()["num_bytes"]
    bits = math.log2(ours)
    return [
        ["ln yours / ln ours = tokens / words", "word perplexity", shown(tokens_per_word)],
        ["ln yours / ln ours = tokens / bytes", "byte perplexity", shown(tokens_per_byte)],
        ["ln yours / ln ours = ln 2", "2 to the power of nats", shown(math.log(2))],
        ["yours = ln ours", "the loss, in nats per token", shown(math.log(ours))],
        ["yours = log2 ours", "bits per token", shown(bits)],
        ["yours = log2 ours × tokens / bytes", "bits per byte", shown(bits * tokens_per_byte)],
    ]


def other_key(numbers: dict[str, float]) -> list[list[str]]:
    """What tells another mean, a loss of Trainer, cut texts, a mistake."""
    cut, sizes = cut_ids(), (1, 2, BATCH_SIZE)
    losses = ", ".join(f"{shown(exp_eval_loss(cut, size))} at {size}" for size in sizes)
    ratios = [number / numbers[OURS] for name, number in numbers.items() if name != OURS]
    near = [ratio for ratio in ratios if 0.9 < ratio < 1.1]
    return [
        [
            "yours = our `mean_perplexity`: the less equal the texts, the larger",
            "the mean of the texts' perplexities",
            f"{shown(result()['mean_perplexity'] / numbers[OURS])} times ours",
        ],
        ["yours moves with the batch size", "`exp(eval_loss)`, or scored padding", losses],
        [
            "yours counts fewer tokens than our `num_tokens`",
            "texts cut to the context, as here, or llama.cpp, which scores half of them",
            f"{sum(len(row) - 1 for row in cut):,} tokens",
        ],
        [
            "yours is larger than the vocabulary: a uniform guess is better",
            "word perplexity, unshifted labels, or scored padding",
            f"{MODEL.config.vocab_size:,} entries",
        ],
        [
            "yours is within a tenth of ours",
            "other windows, no BOS, joined or cut texts: try the presets",
            f"{shown(min(near))} to {shown(max(near))} times ours",
        ],
    ]


def key(numbers: dict[str, float]) -> str:
    header = ["you find", "you have", "on this corpus"]
    rows = units_key(numbers[OURS]) + other_key(numbers)
    return table(header, ["---", "---", "---"], rows)


def lm_eval_numbers() -> dict[str, float]:
    """{metric: number} of a task over the corpus, as lm-eval's own wikitext task is defined."""
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    datasets.disable_progress_bars()

    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    with tempfile.TemporaryDirectory() as directory:
        files = {"test": str(HELD_OUT)}
        task = {
            "task": "held_out",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": directory},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in metrics],
        }
        lm = HFLM(pretrained=str(TINY), device="cpu", batch_size=BATCH_SIZE)
        results = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)["results"]
    return {name: results["held_out"][f"{name},none"] for name in metrics}


def torchmetrics_number() -> float:
    """Its perplexity of the cut texts; shifting and -100 are up to its caller."""
    from torchmetrics.text import Perplexity

    logits, _, labels = padded_batch()
    metric = Perplexity(ignore_index=-100)
    for i in range(0, len(labels), BATCH_SIZE):
        metric.update(logits[i : i + BATCH_SIZE, :-1], labels[i : i + BATCH_SIZE, 1:])
    return metric.compute().item()


def peers(numbers: dict[str, float]) -> str:
    """The packages' own numbers, each beside the row of the first table that stands for it."""
    found = [
        (f"lm_eval {version('lm_eval')}, `{name}`", number, f'`preset="lm-eval"`: `{name}`')
        for name, number in lm_eval_numbers().items()
    ]
    name = f"torchmetrics {version('torchmetrics')}, labels shifted, `ignore_index=-100`"
    found.append((name, torchmetrics_number(), "texts cut to the context (`max_length=512`)"))
    rows = [[name, f"{n:.4f}", row, f"{numbers[row]:.4f}"] for name, n, row in found]
    header = ["measured with", "its number", "row above", "this module's"]
    return table(header, ["---", "---:", "---", "---:"], rows)


def put(page: str, name: str, content: str) -> str:
    """The page with `content` between the markers of that name.

    Raises:
        ValueError: the page does not have them once.
    """
    pattern = rf"(<!-- {name} -->\n)(?:.*?\n)?(<!-- end of {name} -->)"
    page, count = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page needs <!-- {name} --> and <!-- end of {name} --> once.")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="also run lm-eval and torchmetrics")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    disable_progress_bars()
    numbers = {convention.name: convention.measure() for convention in CONVENTIONS}
    sections = {"conventions": conventions(numbers), "key": key(numbers)}
    if args.peers:
        sections["peers"] = peers(numbers)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        for name, content in sections.items():
            page = put(page, name, content)
        PAGE.write_text(page, encoding="utf-8")
        return
    for name, content in sections.items():
        print(f"<!-- {name} -->\n{content}\n<!-- end of {name} -->\n")


if __name__ == "__main__":
    main()
