"""Perplexity of the bundled model on the documents that were kept out of its training.

This is what `make run` runs: logits from a model, through `evaluate.load`, to one number with its
error bar. Everything is read from this repository; no network is used.
"""

import json
import math
from pathlib import Path

import evaluate
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent


@torch.inference_mode()
def next_token_logits(model, ids: list[int], bos: int) -> torch.Tensor:
    """Logits (len(ids), V) for each token of a document, block by block of the model's context."""
    context = model.config.max_position_embeddings
    blocks = [ids[start : start + context] for start in range(0, len(ids), context)]
    inputs = [torch.tensor([[bos, *block[:-1]]]) for block in blocks]
    return torch.cat([model(block).logits[0] for block in inputs])


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_model")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny_model")
    ppl = evaluate.load(str(ROOT / "perplexity.py"))

    lines = (ROOT / "tiny_model" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ppl.add(prediction=next_token_logits(model, ids, tokenizer.bos_token_id), reference=ids)
    result = ppl.compute()

    num_bytes = sum(len(text.encode()) for text in texts)
    bits_per_byte = result["mean_nll"] * result["num_tokens"] / math.log(2) / num_bytes
    low, high = result["perplexity_ci_low"], result["perplexity_ci_high"]
    print(f"Bundled model ({model.num_parameters() / 1e6:.1f} M parameters) on held-out text")
    print(f"  perplexity      {result['perplexity']:10.2f}   95% interval {low:.2f} to {high:.2f}")
    print(f"  bits per token  {result['bits_per_token']:10.3f}")
    print(f"  bits per byte   {bits_per_byte:10.3f}")
    print(f"  documents       {result['num_sequences']:10,}")
    print(f"  tokens          {result['num_tokens']:10,}")
    print(f"  bytes           {num_bytes:10,}")
    print(f"  {result['signature']}")


if __name__ == "__main__":
    main()
