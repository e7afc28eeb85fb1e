"""Train the bundled language model from the English prose that every CPython brings.

Here live the corpus, the tokenizer and the training loop, in reading order. The weights, the
tokenizer and the held-out documents are written beside this file:

    python tiny_model/train.py                      # about ten minutes on 2 CPU cores
    python tiny_model/train.py --steps 3 --out trial
"""

import argparse
import ast
import hashlib
import json
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCAB_SIZE = 3072
CONTEXT = 512
BATCH_SIZE = 8
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
HELD_OUT_SHARE = 1 / 24  # about 60 kB, enough to know the bits per byte to about 2 %


# --- corpus -------------------------------------------------------------------------------------


def unwrap(text: str) -> str:
    """Join the hard-wrapped lines of each prose paragraph; indented ones (code, tables) stay."""
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(
        p if any(line[:1] in " *>-=+" for line in p.splitlines()) else " ".join(p.split())
        for p in paragraphs
        if p.strip()
    )


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of each help topic, and of each standard module's docstrings, in fixed order."""
    for name in sorted(topics):
        yield f"topics/{name}", unwrap(topics[name])
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # bad on purpose, such as templates
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        text = "\n\n".join(unwrap(doc) for node in nodes if (doc := ast.get_docstring(node)))
        if len(text) > 200:
            yield f"stdlib/{name.as_posix()}", text


def split() -> tuple[list[str], list[tuple[str, str]]]:
    """Training texts, and (name, text) of the held-out documents.

    The split is by a hash of the name, so that it is the same on every machine. A paragraph of a
    held-out document (the language reference repeats itself) is removed from the training texts,
    and a paragraph is trained on once.
    """
    training, held_out = [], []
    for name, text in documents():
        share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
        (held_out if share < HELD_OUT_SHARE else training).append((name, text))

    def key(paragraph: str) -> str:
        return " ".join(paragraph.split())

    seen = {key(p) for _, text in held_out for p in text.split("\n\n")}
    texts = []
    for _, text in training:
        kept = []
        for paragraph in text.split("\n\n"):
            if key(paragraph) not in seen:
                seen.add(key(paragraph))
                kept.append(paragraph)
        if kept:
            texts.append("\n\n".join(kept))
    return texts, held_out


# --- tokenizer ----------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts BOS in front of every text, as Llama's does."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, VOCAB_SIZE, min_frequency=2, special_tokens=[BOS, EOS, PAD], show_progress=False
    )
    backend = bpe._tokenizer
    backend.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


# --- model --------------------------------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, stream: torch.Tensor, steps: int) -> None:
    """AdamW on random crops of the token stream; the learning rate warms up, then falls to 0."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        warm_up, progress = min(1.0, (step + 1) / 40), step / steps
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * warm_up * 0.5 * (1 + math.cos(math.pi * progress))
        offsets = torch.randint(len(stream) - CONTEXT - 1, (BATCH_SIZE,))
        ids = torch.stack([stream[i : i + CONTEXT + 1] for i in offsets.tolist()])
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.perf_counter() - start
            print(f"step {step:5d}  nll {loss.item():.3f} nats  {seconds:5.0f} s", flush=True)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer, texts: list[str]) -> float:
    """Independent of perplexity.py on purpose: blocks of CONTEXT, BOS in front of each."""
    model.eval()
    nll_sum = 0.0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        for i in range(0, len(ids), CONTEXT - 1):
            block = torch.tensor([tokenizer.bos_token_id, *ids[i : i + CONTEXT - 1]])
            logits = model(block[None, :-1], use_cache=False).logits[0]
            nll_sum += F.cross_entropy(logits.double(), block[1:], reduction="sum").item()
    return nll_sum / math.log(2) / sum(len(text.encode()) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()

    random.seed(0)
    torch.manual_seed(0)
    texts, held_out = split()
    tokenizer = train_tokenizer(texts)
    random.shuffle(texts)
    encoded = tokenizer(texts).input_ids
    stream = torch.tensor([i for ids in encoded for i in [*ids, tokenizer.eos_token_id]])
    model = build_model(tokenizer)
    print(
        f"{len(texts)} training documents, {sum(map(len, texts)) / 1e6:.2f} M characters, "
        f"{len(stream) / 1e3:.0f} k tokens; {len(held_out)} held out; "
        f"{model.num_parameters() / 1e6:.2f} M parameters"
    )
    train(model, stream, args.steps)

    args.out.mkdir(parents=True, exist_ok=True)
    # Stored in float16 to halve the download; the config keeps float32, so it loads as float32.
    model.half().save_pretrained(args.out)
    config_path = args.out / "config.json"
    config = json.loads(config_path.read_text()) | {"dtype": "float32"}
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(args.out)
    with open(args.out / "held_out.jsonl", "w", encoding="utf-8") as file:
        for name, text in held_out:
            file.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")

    saved = LlamaForCausalLM.from_pretrained(args.out)
    bits = bits_per_byte(saved, tokenizer, [text for _, text in held_out])
    print(f"held-out bits per byte: {bits:.4f} ({saved.dtype})")


if __name__ == "__main__":
    main()
