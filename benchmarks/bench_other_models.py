"""How fast are pseudo-perplexities and encoder-decoders beside minicons and lmppl, on a CPU?

A BERT of 5 million parameters and a T5 of 6, random, and 64 sentences. Each library runs in a
process of its own, in turn; the time is that of the call, with the model in memory. The peers want
other packages than this module, so --peer-python names the Python that has them.

    python benchmarks/bench_other_models.py --peer-python path/to/venv/bin/python
"""

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from report import ROOT, environment, table, write_section
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

NUM_TEXTS, VOCAB_SIZE, CONTEXT = 64, 4000, 128
REPEATS = 8  # of the sentences, for the encoder-decoder
ORIGINAL, WORDS, LABELS = 'pseudo="original"', 'pseudo="within_word_l2r"', "encoder-decoder"
BATCH_SIZE = 16  # of the peers: texts for minicons and for T5, masked copies for lmppl
BERT = {"vocab_size": VOCAB_SIZE, "hidden_size": 256, "num_hidden_layers": 4}
BERT |= {"num_attention_heads": 4, "intermediate_size": 1024, "max_position_embeddings": CONTEXT}
T5 = {"vocab_size": VOCAB_SIZE, "d_model": 256, "d_kv": 64, "d_ff": 1024, "num_heads": 4}
T5 |= {"num_layers": 3, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}


def make_texts() -> list[str]:
    """Lines of prose of 40 to 160 characters that the bundled model was not trained on."""
    rows = (ROOT / "tiny_model" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for row in rows for line in json.loads(row)["text"].splitlines()]
    chosen = [line for line in lines if 40 <= len(line) <= 160 and line.isascii()]
    return chosen[:: len(chosen) // NUM_TEXTS][:NUM_TEXTS]


def make_bert(directory: Path, texts: list[str]) -> None:
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = list(names.values())
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    save_tokenizer(directory, tokenizer, trainer, texts, names, "[CLS] $A [SEP]")
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT, initializer_range=0.1)
    transformers.BertForMaskedLM(config).save_pretrained(directory)


def make_t5(directory: Path, texts: list[str]) -> None:
    names = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500,
        special_tokens=list(names.values()),
        unk_token="<unk>",
        show_progress=False,
    )
    save_tokenizer(directory, tokenizer, trainer, texts, names, "$A </s>")
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)).save_pretrained(directory)


def save_tokenizer(directory, tokenizer, trainer, texts, names, around) -> None:
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in around.split() if name != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(around, special_tokens=ids)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    ).save_pretrained(directory)


# Each takes the task, a model's directory and the texts, loads what it needs, and gives what to
# time: it returns the nll of all texts in nats. The source of a text is the one before it.


def this_module(task: str, model: str, texts: list[str]) -> Callable[[], float]:
    import evaluate

    ppl = evaluate.load(str(ROOT / "perplexity.py"))
    options: dict = {"predictions": texts, "model_id": model, "device": "cpu"}
    if task == LABELS:
        options["contexts"] = texts[-1:] + texts[:-1]
    else:
        options["pseudo"] = "original" if task == ORIGINAL else "within_word_l2r"

    def run() -> float:
        result = ppl.compute(**options)
        return result["mean_nll"] * result["num_tokens"]

    return run


def minicons(task: str, model: str, texts: list[str]) -> Callable[[], float]:
    from minicons import scorer

    def summed(scores: torch.Tensor) -> float:
        return scores.sum(0).item()

    parts = [slice(i, i + BATCH_SIZE) for i in range(0, len(texts), BATCH_SIZE)]
    if task == LABELS:
        # By its name, the model would lose the rows of its output layer that have no token.
        t5 = transformers.T5ForConditionalGeneration.from_pretrained(model).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        s2s, sources = scorer.Seq2SeqScorer(t5, "cpu", tokenizer=tokenizer), texts[-1:] + texts[:-1]
        return lambda: (
            -sum(
                sum(s2s.conditional_score(sources[part], texts[part], reduction=summed))
                for part in parts
            )
        )
    mlm = scorer.MaskedLMScorer(model, "cpu")
    metric = "original" if task == ORIGINAL else "within_word_l2r"
    return lambda: (
        -sum(
            sum(mlm.sequence_score(texts[part], reduction=summed, PLL_metric=metric))
            for part in parts
        )
    )


def lmppl(task: str, model: str, texts: list[str]) -> Callable[[], float]:
    from lmppl import EncoderDecoderLM, MaskedLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lengths = [len(tokenizer(t, add_special_tokens=task == LABELS).input_ids) for t in texts]
    if task == LABELS:
        s2s, sources = EncoderDecoderLM(model, num_gpus=0), texts[-1:] + texts[:-1]
        run = functools.partial(s2s.get_perplexity, sources, texts, batch_size=BATCH_SIZE)
    elif task == ORIGINAL:
        # Without a length it cannot batch texts of different ones; it pads all to it.
        longest = max(lengths) + 8
        mlm = MaskedLM(model, num_gpus=0, max_length=longest)
        run = functools.partial(mlm.get_perplexity, texts, batch_size=BATCH_SIZE)
    else:
        raise ValueError(f"lmppl has no {task}")
    return lambda: sum(n * math.log(value) for n, value in zip(lengths, run(), strict=True))


METHODS = {"this module": this_module, "minicons": minicons, "lmppl": lmppl}


def run_on_transformers_5() -> None:
    """Give the peers what transformers 5 no longer has, and take away what it does not accept."""
    if not hasattr(PreTrainedTokenizerBase, "batch_encode_plus"):
        PreTrainedTokenizerBase.batch_encode_plus = PreTrainedTokenizerBase.__call__

    def without_removed(load):
        def loading(*args, use_auth_token=None, low_cpu_mem_usage=None, **kwargs):
            return load(*args, **kwargs)

        return loading

    for name in ("AutoModelForMaskedLM", "T5ForConditionalGeneration"):
        kind = getattr(transformers, name)
        kind.from_pretrained = without_removed(kind.from_pretrained)


def in_own_process(python: str, name: str, task: str, model: Path, texts: Path) -> dict | None:
    """What a method took and gave in a process of its own, None where it cannot run here."""
    command = [python, __file__, "--run", name, "--task", task, "--model", model, "--texts", texts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"{name}, {task}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measured(name: str, task: str, model: str, texts: list[str]) -> dict:
    if name != "this module":
        run_on_transformers_5()
    torch.set_num_threads(os.cpu_count() or 1)  # lmppl sets one
    texts = texts * REPEATS if task == LABELS else texts  # its passes are few
    run = METHODS[name](task, model, texts)
    run()
    start = time.perf_counter()
    nll_sum = run()
    return {"seconds": time.perf_counter() - start, "nll_sum": nll_sum}


def bench(task: str, model: Path, texts: Path, peer_python: str, rounds: int) -> list[list[str]]:
    runs: dict[str, list[dict]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        for name, found in runs.items():
            python = sys.executable if name == "this module" else peer_python
            run = in_own_process(python, name, task, model, texts)
            if run is not None:
                found.append(run)
    own = statistics.median(run["seconds"] for run in runs["this module"])
    rows = []
    for name, found in runs.items():
        if found:
            seconds = [run["seconds"] for run in found]
            spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
            ratio = f"{statistics.median(seconds) / own:.2f}"
            rows.append([f"{task}, {name}", spread, ratio, f"{found[0]['nll_sum']:.3f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=sys.executable, help="has minicons and lmppl")
    parser.add_argument("--rounds", type=int, default=3)
    for hidden in ("--run", "--task", "--model", "--texts"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        texts = json.loads(Path(args.texts).read_text())
        print(json.dumps(measured(args.run, args.task, args.model, texts)))
        return
    with tempfile.TemporaryDirectory() as directory:
        folder, texts = Path(directory), make_texts()
        make_bert(folder / "bert", texts)
        make_t5(folder / "t5", texts)
        (folder / "texts.json").write_text(json.dumps(texts))
        rows = []
        for task in (ORIGINAL, WORDS, LABELS):
            model = folder / ("t5" if task == LABELS else "bert")
            rows += bench(task, model, folder / "texts.json", args.peer_python, args.rounds)
    header = ["", "seconds", "time / this module's", "nll sum"]
    write_section(
        "Masked models and encoder-decoders on a CPU (bench_other_models.py)",
        f"{environment(['torch', 'transformers', 'evaluate'])}\n{len(texts)} sentences, "
        f"{REPEATS} times as many for the encoder-decoder; "
        f"best and worst of {args.rounds} rounds, ratios of medians.\n\n{table(header, rows)}\n"
        "lmppl turns masked ids back into text and tokenises that again, which changes the context "
        "and the positions where a word has several tokens. minicons reads sources without their "
        "end of sequence, and does not score that of a text.",
    )


if __name__ == "__main__":
    main()
