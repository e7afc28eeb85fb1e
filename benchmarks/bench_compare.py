"""What does it cost to compare two models, beside two perplexities?

    python benchmarks/bench_compare.py

Time: the texts and the model of bench_text.py, and a second one with other weights, each run in a
process of its own, interleaved. Memory: a GPT-2 shape with a vocabulary of 151,936, what a process
needs at its peak above what it holds once both models are loaded and have scored one text. Size: a
base on disk, per token.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import evaluate
import torch
from bench_text import HIDDEN_SIZE, make_model, make_texts
from report import environment, peak_mb_since_start, start_of_peak_mb, table, write_section
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
LARGE_VOCABULARY = 151_936


def load_models(directory: Path) -> tuple:
    """(model, base, tokenizer): two models of the same shape."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    base = AutoModelForCausalLM.from_pretrained(directory).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std())
    return model, base, tokenizer


def run(kind: str, directory: Path, texts: list[str], scratch: Path) -> dict:
    """Seconds, and MB at the peak above what both models hold."""
    ppl = evaluate.load(str(ROOT / "perplexity.py"))
    evaluate.utils.logging.disable_progress_bar()
    model, base, tokenizer = load_models(directory)
    names = {"model": model, "tokenizer": tokenizer}
    other = {"model": base, "tokenizer": tokenizer}
    first = texts[0][:200]
    if kind == "two perplexities":
        ppl.compute(predictions=[first], **names)
    elif kind == "saved base":
        ppl.save_base(texts, scratch, **other)
    else:
        ppl.compare([first], base=base, **names)
    held = start_of_peak_mb()  # what loading needed at its peak does not count
    start = time.perf_counter()
    if kind == "two perplexities":
        ppl.compute(predictions=texts, **names)
        ppl.compute(predictions=texts, **other)
    elif kind == "saved base":
        ppl.compare(texts, base=scratch, **names)
    else:
        ppl.compare(texts, base=base, **names)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "above_mb": peak_mb_since_start() - held}


def in_own_process(kind: str, directory: Path, texts_file: Path) -> dict:
    """What `run` gives in a fresh interpreter."""
    command = [sys.executable, __file__, "--run", kind]
    done = subprocess.run(
        [*command, "--model", str(directory), "--texts", str(texts_file)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def large_model(directory: Path) -> None:
    """A GPT-2 shape of two layers with a large vocabulary, random; the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_model")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=LARGE_VOCABULARY, n_embd=256, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def bench(directory: Path, rounds: int) -> str:
    """The tables."""
    small, large, texts_file = directory / "45m", directory / "large", directory / "texts.json"
    make_model(small)
    large_model(large)
    texts = make_texts()
    texts_file.write_text(json.dumps(texts))
    kinds = ["two perplexities", "comparison", "saved base"]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            found[kind].append(in_own_process(kind, small, texts_file)["seconds"])
    medians = {kind: statistics.median(seconds) for kind, seconds in found.items()}
    rows = [
        [kind, f"{medians[kind]:.1f}", f"{medians[kind] / medians['two perplexities']:.2f}"]
        for kind in kinds
    ]
    short = directory / "some.json"
    short.write_text(json.dumps(texts[:60]))
    memory = {kind: in_own_process(kind, large, short)["above_mb"] for kind in kinds}
    return (
        f"### {len(texts)} texts, GPT-2 shape of 45 M parameters, medians of {rounds} rounds\n\n"
        + table(["", "s", "time / two perplexities"], rows)
        + f"\n### Peak memory above both models, V = {LARGE_VOCABULARY}\n\n"
        + table(["", "MB"], [[kind, f"{value:.0f}"] for kind, value in memory.items()])
        + f"\nA saved base has {HIDDEN_SIZE} numbers of the model's dtype and 16 bytes per token.\n"
    )


def main() -> None:
    """Run the benchmark, or with --run one case of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("run", "model", "texts"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        texts = json.loads(Path(args.texts).read_text())
        with tempfile.TemporaryDirectory() as scratch:
            found = run(args.run, Path(args.model), texts, Path(scratch))
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as directory:
        parts = [environment(["torch", "transformers"]), bench(Path(directory), args.rounds)]
    write_section("Comparing two models on a CPU (bench_compare.py)", "\n\n".join(parts))


if __name__ == "__main__":
    main()
