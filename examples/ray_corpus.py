"""A Ray Dataset of your own: the perplexity of each text beside its other columns, and of all.

    pip install ".[ray]"
    python examples/ray_corpus.py

It runs on the cluster that RAY_ADDRESS names, or on this machine. Files are scored without a
program: `ppleval compute --engine ray`, which can also be resumed (docs/scale.md).
"""

import json
import sys
from pathlib import Path

from ppleval.ray.cluster import cluster
from ppleval.ray.datasets import result_of, with_sums

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


def main() -> int:
    """Print the result, and the most surprising texts."""
    with cluster():
        import ray

        dataset = ray.data.from_items(held_out_texts())
        scored = with_sums(dataset, model_id=str(MODEL), workers=1)
        scored = scored.materialize()  # a large one: write_parquet, then read_parquet
        result = result_of(scored, group_column="domain")
        rows = scored.take_all()
    print(f"perplexity {result['perplexity']:.2f} over {result['num_tokens']} tokens")
    for name, part in sorted(result["groups"].items()):
        print(f"{name:10} {part['perplexity']:7.2f} over {part['num_tokens']} tokens")
    for row in sorted(rows, key=lambda row: -row["nll_sum"])[:3]:
        print(f"text {row['id']:5} {row['nll_sum']:7.2f} nats, {row['num_tokens']} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
