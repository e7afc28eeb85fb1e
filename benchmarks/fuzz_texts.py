"""Does the metric give the numbers of a plain float64 loop for random texts, models and options?

A seed makes a tiny model (Llama, GPT-2, other families; a bias, a bigram table, a cache, a
temperature, banned ids behind the output layer), a tokenizer, texts and options, and calls compute,
score or compare; now and then with bad input, which must be refused and change nothing. Expected is
the loop of fuzz_text_loop.py: one window at a time.

    python benchmarks/fuzz_texts.py --calls 1000 --seed 0     # five minutes
    python benchmarks/fuzz_texts.py --only 17                 # one seed, with its traceback

Exit status 1 where a call was wrong or crashed.
"""

import copy
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fuzz_runs import Calls, RefusedByLoopError, WrongError, main, state_of_metric

# isort: split
import numpy as np
import torch
import transformers
from fuzz_bad_calls import make_bad_call_of_texts
from fuzz_models import leave_in_training, random_model, random_pair, random_tokenizer
from fuzz_text_loop import LoopedText, Scene, check_options, joined, score_by_loop
from fuzz_text_results import wrong_of_compare, wrong_of_compute, wrong_of_score
from huggingface_hub.utils import disable_progress_bars

from ppleval import Perplexity

PIECES = [
    "The quick brown fox jumps over the lazy dog", "Return the number of items.", "for i in range(",
    "naïve façade", "漢字かな", "🎉🎉", "👩‍👩‍👧", "Привет, мир!", "مرحبا بالعالم", "a",
    "e\u0301", "ﬁ", "ß", "İ", " ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200b",
    "\ufeff", "\x00", "\x1b[0m", "<s>", "</s>", "<unk>", "<|bos|>", "<|eos|>", "<|pad|>", "<0x0A>",
    "▁", "Ġ", "1234567890", "...", "https://example.org/?q=1&r=2", "ValueError", "don't",
]  # fmt: skip


@dataclass
class Case:
    """A call: texts and options, and what the loop needs beside them."""

    scene: Scene
    model: torch.nn.Module  # the one that is passed; that of the scene is a copy of it
    texts: list[str]
    contexts: list[str] | None
    groups: list[str] | None
    how: dict[str, Any]  # options that change no number

    def arguments(self) -> dict[str, Any]:
        """By name: the model, and all options."""
        named = {"model": self.model, "tokenizer": self.scene.tokenizer}
        return named | self.scene.options | self.how

    def named(self, method: str) -> str:
        """The call, as a report names it."""
        return f"{method} of {type(self.model).__name__}, {self.scene.options}, {self.how}"


# --- what is random ---


def random_text(rng: np.random.Generator) -> str:
    """Empty, short, or long enough for several windows; white space and special tokens, too."""
    if rng.random() < 0.07:
        return str(rng.choice(["", " ", "\n\n"]))
    pieces = rng.choice(PIECES, int(rng.integers(1, 8)))
    text = str(rng.choice(["", " "])).join(pieces.tolist())
    return text * int(rng.integers(2, 6)) if rng.random() < 0.15 else text


def random_options(rng: np.random.Generator, context: int, size: int) -> dict[str, Any]:
    """Options that change the number; a few of them do not go together."""
    found: dict[str, Any] = {}
    chosen = {
        "preset": lambda: str(rng.choice(["evaluate", "lm-eval", "hf-docs", "gptq", "llama.cpp"])),
        "window": lambda: int(rng.integers(1, context + 2 if rng.random() < 0.1 else context + 1)),
        "stride": lambda: int(rng.integers(1, context + 1)),
        "add_start_token": lambda: [False, True, int(rng.integers(size))][rng.integers(3)],
        "start_each_window": lambda: bool(rng.integers(2)),
        "max_length": lambda: int(rng.integers(1, 30)),
        "join_contexts": lambda: str(rng.choice(["text", "ids"])),
        "positions": lambda: [True, (0, 1, 5), (0,), (0, 100)][rng.integers(4)],
        "dtype": lambda: str(rng.choice(["float32", "float64"])),
    }
    for name, choose in chosen.items():
        if rng.random() < 0.25:
            found[name] = choose()
    if "preset" in found and rng.random() < 0.8:  # presets take few options
        found = {"preset": found["preset"]}
    if found.get("preset") in ("gptq", "llama.cpp") and rng.random() < 0.8:
        found["window"] = int(rng.integers(3, max(4, context // 2)))
    if "window" in found and "stride" in found and rng.random() < 0.8:
        found["stride"] = min(found["stride"], found["window"])
    return found


def random_case(rng: np.random.Generator) -> Case:
    """A call of a random model on random texts."""
    model, tokenizer, context = random_pair(rng)
    leave_in_training(rng, model)
    options = random_options(rng, context, len(tokenizer))
    texts = [random_text(rng) for _ in range(rng.integers(1, 8))]
    contexts = groups = None
    if rng.random() < 0.2:
        contexts = [random_text(rng) for _ in texts]
    if rng.random() < 0.2:
        groups = [str(rng.choice(["a", "b"])) for _ in texts]
    how: dict[str, Any] = {}
    if rng.random() < 0.5:
        how["batch_size"] = int(rng.integers(1, 5))
    if rng.random() < 0.3:
        how["backend"] = str(rng.choice(["auto", "torch"]))
    if rng.random() < 0.2:
        tokenizer.padding_side = "left"
    own = copy.deepcopy(model).eval()  # what a model keeps must not reach the module
    return Case(Scene(own, tokenizer, context, options), model, texts, contexts, groups, how)


# --- what a call must leave alone ---


def state_of(*models: torch.nn.Module) -> dict[str, Any]:
    """Of every module its mode and hooks, of every parameter what may change."""
    modules = [module for model in models for module in model.modules()]
    return {
        "the model's mode": [module.training for module in modules],
        "the model's hooks": [
            [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]
            for module in modules
        ],
        "the model's forward": ["forward" in vars(module) for module in modules],
        "the model's parameters": [
            (parameter._version, parameter.requires_grad, parameter.grad is None)
            for model in models
            for parameter in model.parameters()
        ],
    }


# --- the calls of a seed ---


def loop_over(case: Case, scene: Scene | None = None) -> list[LoopedText]:
    """Each text, or the one that they are joined to, by the loop.

    Raises:
        RefusedByLoopError: options or texts that are refused.
    """
    scene = scene or case.scene
    check_options(scene, case.contexts, case.groups)
    texts = joined(scene, case.texts)
    contexts = case.contexts or [None] * len(texts)
    return [score_by_loop(scene, *pair) for pair in zip(texts, contexts, strict=True)]


def answer(calls: Calls, metric, what: str, call: Callable, loop: Callable) -> tuple[Any, Any]:
    """(the result of a call, that of the loop); (None, None) where both refuse it."""
    try:
        expected = loop()
    except RefusedByLoopError:
        calls.make_refused(call, what, functools.partial(state_of_metric, metric))
        return None, None
    return calls.make(call, what), expected


def call_compute(rng: np.random.Generator, calls: Calls, metric, case: Case) -> bool:
    """`compute`, with some of the texts added before; whether it was answered."""
    added = int(rng.integers(len(case.texts) + 1)) if rng.random() < 0.3 else 0
    groups = case.groups
    if added:
        of_added = None if groups is None else groups[:added]
        calls.make(
            lambda: metric.add_batch(predictions=case.texts[:added], groups=of_added), "add_batch"
        )
    form = [list, tuple, iter][rng.integers(3)]
    arguments = case.arguments() | {"contexts": case.contexts}
    if groups is not None:
        arguments["groups"] = groups[added:]
    if rng.random() < 0.5:
        make_bad_call_of_texts(rng, calls, metric, case.model, case.scene.tokenizer, case.texts)
    call = functools.partial(metric.compute, predictions=form(case.texts[added:]), **arguments)
    what = case.named("compute")
    result, texts = answer(calls, metric, what, call, lambda: loop_over(case))
    if result is None:
        return False
    if len(metric) != 0:
        raise WrongError(f"{len(metric)} texts are left after compute")
    raise_if(wrong_of_compute(case.scene, groups, result, texts), case)
    return True


def call_score(rng: np.random.Generator, calls: Calls, metric, case: Case) -> bool:
    """`score`; whether it was answered."""
    case.groups = None
    arguments = case.arguments() | {"contexts": case.contexts, "top_k": int(rng.integers(3))}
    call = functools.partial(metric.score, case.texts, **arguments)
    what = case.named("score")
    scores, texts = answer(calls, metric, what, call, lambda: loop_over(case))
    if scores is None:
        return False
    raise_if(wrong_of_score(scores, texts), case)
    return True


def read_alike(tokenizer, other) -> bool:
    """Whether two tokenizers know what both know by the same ids.

    Raises:
        RefusedByLoopError: they know the same tokens, but by other ids.
    """
    own, others = tokenizer.get_vocab(), other.get_vocab()
    common = own.keys() & others.keys()
    if common and all(own[token] == others[token] for token in common):
        return True
    if own.keys() == others.keys():
        raise RefusedByLoopError("the same tokens by other ids")
    return False


def compare_by_loop(case: Case, base: Scene) -> list[list[LoopedText]]:
    """The texts of both sides of a comparison.

    Raises:
        RefusedByLoopError: as `loop_over`; two tokenizers that do not go together.
    """
    own = case.scene
    alike = read_alike(own.tokenizer, base.tokenizer)
    if alike:  # they read as much as the one that reads less, and predict what both know
        own.context = base.context = min(own.context, base.context)
        sizes = [scene.model.get_output_embeddings().weight.shape[0] for scene in (own, base)]
        own.num_ids = base.num_ids = min(sizes)
    elif own.options.get("positions"):
        raise RefusedByLoopError("positions of models with different tokens")
    sides = [loop_over(case), loop_over(case, base)]
    if alike and [text.ids for text in sides[0]] != [text.ids for text in sides[1]]:
        raise RefusedByLoopError("tokenizers that give other ids")
    if alike and any(max(text.ids, default=0) >= min(sizes) for text in sides[0]):
        raise RefusedByLoopError("an id that one of the two does not have")
    return sides


def call_compare(rng: np.random.Generator, calls: Calls, metric, case: Case) -> bool:
    """`compare` with a base of the same tokenizer, or of another; whether it was answered."""
    tokenizer, others = case.scene.tokenizer, {}
    if rng.random() < 0.3:
        tokenizer = others["base_tokenizer"] = random_tokenizer(rng)
    base = random_model(rng, len(tokenizer))
    leave_in_training(rng, base)
    calls.watched = functools.partial(state_of, case.model, base)
    context = base.config.max_position_embeddings
    other = Scene(copy.deepcopy(base).eval(), tokenizer, context, case.scene.options)
    arguments = case.arguments() | {"contexts": case.contexts, "groups": case.groups, "base": base}
    call = functools.partial(metric.compare, case.texts, **arguments, **others)
    loop = functools.partial(compare_by_loop, case, other)
    result, sides = answer(calls, metric, case.named("compare"), call, loop)
    if result is None:
        return False
    raise_if(wrong_of_compare(case.scene, other, result, sides), case)
    return True


def raise_if(wrong: list[str], case: Case) -> None:
    """Raises WrongError if anything is wrong."""
    if wrong:
        raise WrongError(f"{'; '.join(wrong[:4])}: {case.named('call')}")


def one_call(seed: int, calls: Calls) -> bool:
    """Make the calls of a seed; whether the last one was answered."""
    rng = np.random.default_rng(seed)
    case, metric = random_case(rng), Perplexity()
    calls.watched = functools.partial(state_of, case.model)
    call = [call_compute, call_compute, call_compute, call_score, call_compare][rng.integers(5)]
    return call(rng, calls, metric, case)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    logging.getLogger().setLevel(logging.ERROR)  # of "its own logits are used"
    disable_progress_bars()
    main(one_call, __doc__.splitlines()[0])
