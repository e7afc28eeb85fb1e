"""Random tokenizers and tiny random language models for fuzz_texts.py; nothing here scores.

Tokenizers are built here, of four kinds, with and without BOS, or the bundled one. Models are a
Llama or a GPT-2 with something behind the output layer or without, or a family of tiny_families.py.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import transformers
from report import ROOT
from tiny_families import CONTEXT, build
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "Return the number of items in the list; raise ValueError if there are none.",
    "for i in range(10):\n    print(i)\n",
    "naïve façade — 漢字かな 🎉🎉 Привет, мир! مرحبا",
    "It was the best of times, it was the worst of times.",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = 330  # of a tokenizer built here, at most; the alphabet of bytes has 256
FAMILIES = (
    "bloom", "cohere", "falcon", "gemma2", "gpt_neo", "gpt_neox", "granite", "mamba", "mistral",
    "mpt", "olmo2", "opt", "phi3:longrope", "qwen3", "llama:dynamic", "stablelm",
)  # fmt: skip


# --- tokenizers ---


def byte_level(texts: list[str]) -> Tokenizer:
    """As GPT-2's: every byte has a token, a space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, texts, trainers.BpeTrainer, SPECIAL, VOCABULARY, initial_alphabet=alphabet)
    return tokenizer


def word_level(texts: list[str]) -> Tokenizer:
    """Whole words and signs; others are unknown, and white space has no token."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    train(tokenizer, texts, trainers.WordLevelTrainer, SPECIAL, VOCABULARY)
    return tokenizer


def byte_fallback(texts: list[str]) -> Tokenizer:
    """As Llama 2's: pieces, and a token for each byte of what has none."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    replace = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse()])
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    train(tokenizer, texts, trainers.BpeTrainer, [*SPECIAL, *of_bytes], VOCABULARY + 100)
    return tokenizer


def train(tokenizer: Tokenizer, texts: list[str], trainer: type, special, size: int, **options):
    """Train a tokenizer in place; the same at each call."""
    settings = {"special_tokens": special, "vocab_size": size, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainer(**settings, **options))


def unigram(texts: list[str]) -> Tokenizer:
    """As T5's: pieces behind a mark for the space, which also stands in front of a text.

    Every part of a word that is short and comes twice is a piece: the library's own training is
    another at each call.
    """
    words = [f"▁{word}" for text in texts for word in text.split()]
    parts = [word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, i + 5)]
    counts = {part: number for part, number in Counter(parts).items() if number > 1}
    pieces = [(name, 0.0) for name in SPECIAL]
    pieces += [(part, math.log(number / len(parts))) for part, number in sorted(counts.items())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS: dict[str, Callable] = {
    "byte-level": byte_level,
    "word-level": word_level,
    "unigram": unigram,
    "byte-fallback": byte_fallback,
}


@functools.cache
def trained(kind: str, number: int) -> str:
    """A tokenizer as JSON, of a part of the corpus."""
    return KINDS[kind](CORPUS[number:] * 3).to_str()


def random_tokenizer(rng: np.random.Generator):
    """A tokenizer of any kind, with or without BOS, which it adds by itself or not."""
    if rng.random() < 0.25:
        return AutoTokenizer.from_pretrained(ROOT / "tiny_model")
    backend = Tokenizer.from_str(trained(str(rng.choice(list(KINDS))), int(rng.integers(3))))
    if rng.random() < 0.15:
        backend.normalizer = [normalizers.Lowercase(), normalizers.NFKC()][rng.integers(2)]
    has_bos = rng.random() < 0.75
    if has_bos and rng.random() < 0.5:
        single = "<s> $A" if rng.random() < 0.7 else "<s> $A </s>"
        ids = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
        backend.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    names = {"unk_token": "<unk>", "eos_token": "</s>"}
    if has_bos:
        names["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


# --- what stands behind the output layer ---
# Each makes, of a vocabulary, a function of the model's logits (B, T, V) and its ids (B, T).


def bias_behind(rng: np.random.Generator, size: int) -> Callable:
    """A number for each id; few ids have one, or all have a small one."""
    bias = torch.tensor(rng.normal(0, 0.05, size), dtype=torch.float32)
    if rng.random() < 0.5:
        bias = 60 * bias * torch.tensor(rng.random(size) < 0.1)
    return lambda logits, ids: logits + bias


def bigrams_behind(rng: np.random.Generator, size: int) -> Callable:
    """A number for each pair of neighbours; the first ids have none."""
    table = torch.tensor(rng.normal(0, 2, (size, size)), dtype=torch.float32)
    table[: rng.integers(1, 9)] = 0
    return lambda logits, ids: logits + table[ids]


def temperature_behind(rng: np.random.Generator, size: int) -> Callable:
    """All logits divided by a number."""
    temperature = float(rng.choice([0.7, 0.98, 1.5]))
    return lambda logits, ids: logits / temperature


def bans_behind(rng: np.random.Generator, size: int) -> Callable:
    """Some ids never come."""
    banned = torch.tensor(rng.random(size) < rng.choice([0.01, 0.1]))
    return lambda logits, ids: logits.masked_fill(banned, -torch.inf)


def cap_behind(rng: np.random.Generator, size: int) -> Callable:
    """A soft cap that no configuration states."""
    cap = float(rng.choice([2.0, 50.0]))
    return lambda logits, ids: cap * torch.tanh(logits / cap)


def cache_behind(rng: np.random.Generator, size: int) -> Callable:
    """A mixture with how often each id came before in the window."""
    share = float(rng.choice([0.01, 0.3]))

    def change(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen = torch.nn.functional.one_hot(ids, size).to(logits).cumsum(1)
        seen = seen / seen.sum(-1, keepdim=True)
        return ((1 - share) * logits.softmax(-1) + share * seen).log()

    return change


BEHIND = (
    bias_behind, bigrams_behind, temperature_behind, bans_behind, cap_behind, cache_behind
)  # fmt: skip


def changed(model_class: type, name: str, change: Callable) -> type:
    """A class of models that change their logits; `name` goes into its name."""

    class Changed(model_class):
        def forward(self, input_ids=None, **inputs):
            output = super().forward(input_ids=input_ids, **inputs)
            output.logits = change(output.logits, input_ids)
            return output

    Changed.__name__ = f"{name}{model_class.__name__}"
    return Changed


class HeadTwice(transformers.LlamaForCausalLM):
    """Also predicts the next but one token, with the same output layer."""

    def forward(self, input_ids=None, **inputs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        logits = self.lm_head(hidden)
        self.lm_head(torch.tanh(hidden))
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


class HeadInChunks(transformers.LlamaForCausalLM):
    """Runs its output layer on a few positions at a time."""

    def forward(self, input_ids=None, **inputs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        logits = torch.cat([self.lm_head(part) for part in hidden.split(5, dim=1)], dim=1)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


# --- models ---

PLAIN = {"gpt2": transformers.GPT2LMHeadModel, "llama": transformers.LlamaForCausalLM}


def small_config(rng: np.random.Generator, kind: str, size: int, context: int):
    """The configuration of a tiny model with this vocabulary and context."""
    tied = bool(rng.random() < 0.4)
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=context,
            bos_token_id=None, eos_token_id=None, tie_word_embeddings=tied,
        )  # fmt: skip
    return transformers.LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=context,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def random_model(rng: np.random.Generator, size: int) -> transformers.PreTrainedModel:
    """A tiny model of at least `size` ids, with or without something behind its output layer."""
    torch.manual_seed(int(rng.integers(2**31)))
    context = int(rng.integers(4, 40))
    size = size if rng.random() < 0.8 else -(-size // 64) * 64
    kind = rng.random()
    name = "gpt2" if kind > 0.1 and rng.random() < 0.4 else "llama"
    model_class = PLAIN[name]
    if kind < 0.1:
        model_class = HeadTwice if rng.random() < 0.5 else HeadInChunks
    elif kind < 0.5:
        behind = BEHIND[rng.integers(len(BEHIND))]
        model_class = changed(model_class, behind.__name__, behind(rng, size))
    model = model_class(small_config(rng, name, size, context))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(float(rng.choice([1.0, 8.0, 40.0])))
    return model


@functools.cache
def family(name: str) -> tuple[transformers.PreTrainedModel, int]:
    """A model of tiny_families.py, which reads the ids of the bundled tokenizer; and the length
    that this tokenizer states, for models that state none."""
    model, tokenizer = build(name)
    return model, tokenizer.model_max_length


def random_pair(rng: np.random.Generator):
    """(model, its tokenizer, its context length)."""
    if rng.random() < 0.15:
        model, length = family(str(rng.choice(FAMILIES)))
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_model", model_max_length=length)
        return model, tokenizer, CONTEXT
    tokenizer = random_tokenizer(rng)
    model = random_model(rng, len(tokenizer))
    return model, tokenizer, model.config.max_position_embeddings


def leave_in_training(rng: np.random.Generator, model: torch.nn.Module) -> None:
    """Put the model, or some of its modules, in training mode, as a user may have left them."""
    model.eval()
    if rng.random() < 0.3:
        for module in model.modules():
            module.training = bool(rng.random() < 0.5)
    elif rng.random() < 0.4:
        model.train()
