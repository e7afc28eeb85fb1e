"""A corpus on a Ray cluster: the perplexity of all, and of each text beside your own columns.

    pip install ".[ray]"
    python examples/ray_corpus.py

It runs on the cluster that RAY_ADDRESS names, or on this machine. The command scores the file and
writes a table of sums, which has the file and the row of each text (docs/scale.md).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tiny_model"


def held_out_texts() -> list[dict]:
    """The first paragraphs of documents that the model was not trained on, with a group each."""
    lines = (MODEL / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    return [
        {"id": f"{i}-{j}", "text": text, "domain": "indented" if text[0] == " " else "flush"}
        for i, document in enumerate(documents)
        for j, text in enumerate(filter(None, document.split("\n\n")[:8]))
    ]


def score(data: Path, sums: Path) -> dict:
    """The result of a Parquet file; the sums of its texts go to a directory."""
    command = [sys.executable, "-m", "ppleval", "compute", "--engine", "ray", "--workers", "1"]
    options = ["--model", MODEL, "--group-by", "domain", "--per-text", sums, "--json"]
    done = subprocess.run([*command, *options, data], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def main() -> int:
    """Print the result, and the most surprising texts."""
    texts = held_out_texts()
    with tempfile.TemporaryDirectory() as folder:
        data, sums = Path(folder, "texts.parquet"), Path(folder, "sums")
        parquet.write_table(pa.Table.from_pylist(texts), data)
        result = score(data, sums)
        rows = [texts[of_text["row"]] | of_text for of_text in parquet.read_table(sums).to_pylist()]
    print(f"perplexity {result['perplexity']:.2f} over {result['num_tokens']} tokens")
    for name, part in sorted(result["groups"].items()):
        print(f"{name:10} {part['perplexity']:7.2f} over {part['num_tokens']} tokens")
    for row in sorted(rows, key=lambda row: -row["nll_sum"])[:3]:
        print(f"text {row['id']:5} {row['nll_sum']:7.2f} nats, {row['num_tokens']} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
