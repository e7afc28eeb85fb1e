"""What does rounding the weights do to a model? The bundled one against itself, at 8 and 4 bits.

    python examples/quantisation.py

Each row of a weight is rounded to 2^(bits-1) - 1 steps up to its largest entry, in plain torch;
bitsandbytes, GPTQ and AWQ do better at the same number of bits. docs/compare.md says what the
numbers mean for someone who has to decide.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppleval import Perplexity

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tiny_model"
CHARACTERS = 1500  # of a text, so that the held-out documents give some dozens
COLUMNS = (
    "perplexity",
    "ratio",
    "95% interval",
    "mean KL",
    "99% KL",
    "same top",
    "RMS change of p",
)


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> None:
    """Round every linear layer's weight (out, in) in place, each row with a scale of its own."""
    steps = 2 ** (bits - 1) - 1
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            scale = weight.abs().amax(1, keepdim=True) / steps
            weight.copy_((weight / scale).round() * scale)


def held_out_texts() -> list[str]:
    """Pieces of the documents that the model was not trained on."""
    lines = (MODEL / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    return [d[i : i + CHARACTERS] for d in documents for i in range(0, len(d), CHARACTERS)]


def compare_bits(bits: int) -> dict:
    """The result of `compare` for the rounded model."""
    rounded = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    # The input embedding shares its weight with the output layer; only the layer is quantised.
    rounded.lm_head.weight = nn.Parameter(rounded.lm_head.weight.detach().clone())
    round_weights(rounded, bits)
    ppl = Perplexity()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return ppl.compare(held_out_texts(), base_id=str(MODEL), model=rounded, tokenizer=tokenizer)


def main() -> int:
    """Print the table."""
    results = {f"{bits} bits": compare_bits(bits) for bits in (8, 6, 4)}
    base = next(iter(results.values()))["base_perplexity"]
    print(f"| | {' | '.join(COLUMNS)} |")
    print(f"|---|{'---:|' * len(COLUMNS)}")
    print(f"| as trained | {base:.2f} | 1 | | | | | |")
    for label, result in results.items():
        low, high = (result[f"perplexity_ratio_ci_{end}"] for end in ("low", "high"))
        cells = [
            f"{result['perplexity']:.2f}",
            f"{result['perplexity_ratio']:.4f}",
            f"{low:.4f} to {high:.4f}",
            f"{result['mean_kl']:.5f}",
            f"{result['kl_p99']:.4f}",
            f"{result['same_top']:.1%}",
            f"{result['rms_delta_p']:.2%}",
        ]
        print(f"| {label} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
