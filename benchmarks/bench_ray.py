"""Does `--engine ray` give the number of one process, through kills, and in how much time?
How much memory does the driver take over a million texts?

    python benchmarks/bench_ray.py
    python benchmarks/bench_ray.py --only memory
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from report import ROOT, environment, peak_mb_since_start, start_of_peak_mb, table, write_section

sys.path.insert(0, str(ROOT))

TINY = ROOT / "tiny_model"
NUM_TEXTS, NUM_WORKERS = 20_000, 2
MILLION = 1_000_000
PACKAGES = ["torch", "transformers", "ray", "pyarrow"]


def write_texts(path: Path, count: int, longest: int) -> Path:
    """Pieces of the bundled documents, of 8 to `longest` characters, as a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    lines = (TINY / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    source = "".join(json.loads(line)["text"] for line in lines)
    draw = random.Random(0)
    starts = (draw.randrange(len(source) - longest) for _ in range(count))
    texts = [source[start : start + draw.randint(8, longest)] for start in starts]
    parquet.write_table(pa.table({"text": texts}), path)
    return path


def score(*arguments, disturb: Callable[[subprocess.Popen], None] | None = None) -> dict:
    """Run the command, disturb it, and return its result with the seconds that it took.

    A run that is killed has no result.
    """
    command = [sys.executable, "-m", "ppleval", "compute", "--model", TINY, "--json", *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if disturb is not None:
        disturb(process)
    out, err = process.communicate()
    found = json.loads(out) if process.returncode == 0 else {}
    return found | {"seconds": time.perf_counter() - start, "said": err}


def chunks(directory: Path) -> dict[str, int]:
    """The finished chunks in a directory of --per-text, each with the time of its last change."""
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("[!_]*.parquet")}


def after_chunks(count: int, directory: Path, act: Callable) -> Callable:
    """To disturb a run as soon as it has written this many chunks."""

    def disturb(process: subprocess.Popen) -> None:
        while len(chunks(directory)) < count:
            if process.poll() is not None:
                raise RuntimeError("The run ended before it could be disturbed.")
            time.sleep(0.05)
        act(process)

    return disturb


def kill_a_worker(process: subprocess.Popen) -> None:
    """End one of the processes that hold a model, by SIGKILL."""
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if "ChunkScorer" in child.name()).kill()


def kill_all(process: subprocess.Popen) -> None:
    """End the driver and all processes of the cluster, by SIGKILL."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for child in children:
        if child.is_running():
            child.kill()


def compare(directory: Path) -> str:
    """One process, two workers, and two workers through kills."""
    data = write_texts(directory / "texts.parquet", NUM_TEXTS, longest=160)
    one_text = write_texts(directory / "one.parquet", 1, longest=160)
    ray = ["--engine", "ray", "--workers", NUM_WORKERS]
    outputs = [directory / name for name in ("plain", "worker", "all")]
    starts = [score(one_text)["seconds"], score(one_text, *ray)["seconds"]]
    single = score(data)
    double = score(data, *ray, "--per-text", outputs[0])
    num_chunks = len(chunks(outputs[0]))
    middle = num_chunks // 2
    wounded = score(
        data,
        *[*ray, "--per-text", outputs[1]],
        disturb=after_chunks(middle, outputs[1], kill_a_worker),
    )
    score(data, *ray, "--per-text", outputs[2], disturb=after_chunks(middle, outputs[2], kill_all))
    before = chunks(outputs[2])
    resumed = score(data, *ray, "--per-text", outputs[2], "--resume")
    after = chunks(outputs[2])
    again = sum(after[name] != written for name, written in before.items())
    rows = [
        [
            name,
            f"{found['seconds']:.0f}",
            f"{found['perplexity']:.12f}",
            f"{abs(found['perplexity'] / single['perplexity'] - 1):.0e}",
        ]
        for name, found in (
            ("one process", single),
            (f"{NUM_WORKERS} workers", double),
            (f"{NUM_WORKERS} workers, one killed in the middle", wounded),
            (f"{NUM_WORKERS} workers, all killed in the middle, then --resume", resumed),
        )
    ]
    net = [found["seconds"] - start for found, start in zip((single, double), starts, strict=True)]
    return (
        f"{NUM_TEXTS:,} texts of 8 to 160 characters, {single['num_tokens']:,} tokens, the bundled "
        "model. The seconds are of the whole command, in the last row of the second one. "
        "The machine is shared: other programs ran.\n\n"
        + table(["", "seconds", "perplexity", "relative difference"], rows)
        + f"\nOf one text the command takes {starts[0]:.0f} s with one process and "
        f"{starts[1]:.0f} s with {NUM_WORKERS} workers. Without that, {NUM_WORKERS} workers are "
        f"{net[0] / net[1]:.2f} times as fast as one process, which has all cores to itself. When "
        f"all were killed, {len(before)} of {num_chunks} chunks were there; the second run wrote "
        f'{again} of them again, and said: "{resumed["said"].strip()}".\n'
    )


def small_model(directory: Path) -> Path:
    """A Llama of one layer, with the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def memory(directory: Path) -> str:
    """The driver's memory after each tenth of a million texts."""
    from ppleval.ray.cluster import cluster
    from ppleval.ray.files import Job, score_files
    from ppleval.ray.totals import CorpusTotals

    data = write_texts(directory / "million.parquet", MILLION, longest=24)
    job = Job(
        options={"model_id": str(small_model(directory / "model"))},
        lines=False,
        column="text",
        group_by=None,
        context_column=None,
        batch_size=None,
        per_text=str(directory / "out"),
        directory=str(directory),
    )
    seen: list[tuple[int, float]] = []
    add = CorpusTotals.add

    def add_and_measure(totals, answer):
        add(totals, answer)
        if totals.texts.num_texts >= (len(seen) + 1) * MILLION // 10:
            held_mb = psutil.Process().memory_info().rss / 1e6
            seen.append((totals.texts.num_texts, held_mb))

    CorpusTotals.add = add_and_measure
    start = time.perf_counter()
    with cluster(NUM_WORKERS), job.output().prepared(resume=False):
        start_of_peak_mb()
        totals = score_files(job, [str(data)], NUM_WORKERS, device=None)
        peak = peak_mb_since_start()
    seconds = time.perf_counter() - start
    rows = [[f"{count:,}", f"{held_mb:.0f}"] for count, held_mb in seen]
    return (
        f"{totals.texts.num_texts:,} texts of 8 to 24 characters, "
        f"{totals.texts.nll.num_tokens:,} tokens, a random Llama of one layer, in {seconds:.0f} s "
        f"and {totals.num_answers} chunks. What the process of the command holds, most of it the "
        f"code of torch and Ray:\n\n" + table(["texts", "MB"], rows) + f"\nPeak: {peak:.0f} MB.\n"
    )


def main() -> int:
    """Measure, and write the sections of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["compare", "memory"])
    only = parser.parse_args().only
    sections = {
        "compare": ("Ray: two workers, kills and resumption", compare),
        "memory": ("Ray: memory of the driver over a million texts", memory),
    }
    for name, (title, measure) in sections.items():
        if only in (None, name):
            with tempfile.TemporaryDirectory() as directory:
                body = measure(Path(directory))
            write_section(title, f"{environment(PACKAGES)}\n{body}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
