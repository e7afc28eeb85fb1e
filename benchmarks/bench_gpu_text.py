"""How many tokens a second do texts and a model of 1 billion parameters give on a GPU?

A random model of Llama 3.2 1B's shape in bfloat16, built on the card from its configuration, and
2,000 texts of unequal length, from the bundled model's held-out text: this module, lm-eval with the
batch size "auto", and the bare products of the model's weights with as many rows.

    python benchmarks/bench_gpu_text.py [--tiny]

--tiny: another shape and fewer texts, to try this script without a GPU.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from bench_text import held_out
from report import ROOT, environment, table, write_section
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
TINY_SHAPE = SHAPE | {
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NUM_TEXTS, TINY_NUM_TEXTS = 2000, 40
MEAN_TOKENS, MOST_TOKENS = 400, 4000
PRODUCT_ROWS = 8192
THIS, LM_EVAL = "this module", "lm-eval loglikelihood_rolling, batch size auto"


def make_model(shape: dict, device: str) -> PreTrainedModel:
    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def make_texts(tokenizer, num_texts: int) -> tuple[list[str], int]:
    """Pieces of prose, log-normal lengths in random order, and their tokens in all."""
    prose = tokenizer("\n\n".join(held_out()), add_special_tokens=False, verbose=False).input_ids
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(0.0, 1.0, num_texts)
    lengths = np.clip(lengths * MEAN_TOKENS / lengths.mean(), 3, MOST_TOKENS).astype(int)
    starts = rng.integers(0, len(prose) - MOST_TOKENS, num_texts)
    texts = [tokenizer.decode(prose[s : s + n]) for s, n in zip(starts, lengths, strict=True)]
    found = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return texts, sum(map(len, found))


def seconds_of(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(model: PreTrainedModel, device: str) -> float:
    """Tokens a second that all products of the model with its weights take, with nothing between.

    Attention, which depends on the context, is left out.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    rows = {
        size: torch.randn(PRODUCT_ROWS, size, dtype=torch.bfloat16, device=device)
        for size in {weight.shape[1] for weight in weights}
    }

    def run() -> None:
        for weight in weights:
            F.linear(rows[weight.shape[1]], weight)

    with torch.inference_mode():
        times = [seconds_of(run, device) for _ in range(6)]
    return PRODUCT_ROWS / statistics.median(times[1:])


def scorers(model: PreTrainedModel, tokenizer) -> dict[str, Callable[[list[str]], float]]:
    """By name, what gives the sum of nll of texts, in nats."""
    ppl = evaluate.load(str(ROOT / "perplexity.py"))

    def run_this(texts: list[str]) -> float:
        result = ppl.compute(predictions=texts, model=model, tokenizer=tokenizer)
        return result["mean_nll"] * result["num_tokens"]

    found = {THIS: run_this}
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        return found
    # "auto" tries batches of 64 x 8192 tokens and smaller, which takes a CPU for ever.
    batch_size = "auto" if model.device.type == "cuda" else 4
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def run_lm_eval(texts: list[str]) -> float:
        requests = [
            Instance("loglikelihood_rolling", {}, (text,), i, (None, None, None))
            for i, text in enumerate(texts)
        ]
        return -sum(lm.loglikelihood_rolling(requests, disable_tqdm=True))

    return found | {LM_EVAL: run_lm_eval}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="try the script; writes nothing")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_model")
    model = make_model(TINY_SHAPE if args.tiny else SHAPE, device)
    texts, num_tokens = make_texts(tokenizer, TINY_NUM_TEXTS if args.tiny else NUM_TEXTS)
    products = product_rate(model, device)
    methods = scorers(model, tokenizer)
    times: dict[str, list[float]] = {name: [] for name in methods}
    sums = {}
    for run in methods.values():
        run(texts[:50])  # kernels are compiled and batch sizes found
    for _ in range(args.rounds):
        for name, run in methods.items():

            def run_all(name=name, run=run) -> None:
                sums[name] = run(texts)

            times[name].append(seconds_of(run_all, device))
    rates = {name: num_tokens / statistics.median(found) for name, found in times.items()}
    rows = [
        [
            name,
            f"{rate:,.0f}",
            f"{rates[THIS] / rate:.2f}",
            f"{rate / products:.2f}",
            f"{sums[name]:.1f}",
        ]
        for name, rate in rates.items()
    ]
    header = ["", "tokens/s", "this module's / its", "share of the bare products", "nll sum"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    body = (
        f"{environment(['torch', 'transformers'])}"
        f"- device: {torch.cuda.get_device_name() if device == 'cuda' else 'none'}\n\n"
        f"{parameters:,} parameters in bfloat16, {len(texts):,} texts, {num_tokens:,} tokens; "
        f"medians of {args.rounds} rounds.\n\n{table(header, rows)}\n"
        "lm-eval also counts the start token that the bundled tokenizer puts in front of a text.\n"
    )
    if args.tiny:
        print(body)
    else:
        write_section("Texts and a model on a GPU (bench_gpu_text.py)", body)


if __name__ == "__main__":
    main()
