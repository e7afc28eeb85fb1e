"""The plain loop that fuzz_texts.py compares with: one text and one window at a time.

It follows docs/texts.md and docs/processes.md: which ids a text has, which of them are scored, and
what the model sees before each. The model runs on one unpadded row, and the log-softmax of its own
logits is taken in float64.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fuzz_runs import RefusedByLoopError

# Options that a preset does not take.
WITHOUT = {
    "evaluate": ("window", "stride", "start_each_window"),
    "lm-eval": ("stride", "max_length", "start_each_window"),
    "hf-docs": ("max_length", "start_each_window"),
    "gptq": ("stride", "max_length", "start_each_window"),
    "llama.cpp": ("stride", "max_length", "start_each_window"),
    None: (),
}
JOINTS = {"hf-docs": "\n\n", "gptq": "\n\n", "llama.cpp": "\n"}


@dataclass
class Scene:
    """Everything that a loop over texts needs."""

    model: torch.nn.Module  # in evaluation mode
    tokenizer: Any
    context: int  # tokens that the model reads at once
    options: dict[str, Any]
    num_ids: int | None = None  # of which there are probabilities; None for all that the model has

    @property
    def preset(self) -> str | None:
        """Its name, None for none."""
        return self.options.get("preset")

    @property
    def window(self) -> int:
        """Tokens that are read at once."""
        longest = min(self.context, 2048) if self.preset == "gptq" else self.context
        return self.options.get("window") or longest

    @property
    def stride(self) -> int:
        """Tokens that a further window scores."""
        default = self.window if self.preset == "lm-eval" else self.window // 2 or 1
        return self.options.get("stride") or default


@dataclass
class LoopedText:
    """One text as the loop scores it: lists with an entry for each id, but for the last two."""

    ids: list[int]
    num_prefix: int  # ids in front of the text
    nll: list[float | None]  # nats; None where not scored
    weights: list[float]
    contexts: list[int]  # ids that the model sees before each
    windows: list[tuple[int, ...]]  # what the model read, and which ids it scored
    truncated: bool
    num_bytes: int | None = None  # None where it depends on how a character is divided
    num_words: int | None = None

    @property
    def scored(self) -> list[int]:
        """The numbers of the ids that are scored with a weight."""
        return [i for i, nll in enumerate(self.nll) if nll is not None and self.weights[i] > 0]


# --- ids ---


def start_id(scene: Scene) -> int | None:
    """The id that is put in front of each text; None for none."""
    start, tokenizer = scene.options.get("add_start_token", True), scene.tokenizer
    if scene.preset in ("hf-docs", "gptq") or start is False:
        return None
    if start is not True:
        return start
    bos = tokenizer.bos_token_id
    if scene.preset == "lm-eval" and bos is None:
        return tokenizer.eos_token_id
    if scene.preset == "llama.cpp" and tokenizer("a").input_ids[:1] != [bos]:
        return None
    return bos


def encoded(scene: Scene, text: str, context: str | None) -> tuple[list[int], list, int]:
    """(ids, their places [start, end) in characters of the text, ids in front of the text)."""
    start, tokenizer = start_id(scene), scene.tokenizer
    adds = scene.preset in ("lm-eval", "hf-docs", "gptq")
    if scene.preset == "lm-eval" and start is not None:
        spelt = tokenizer.decode([start])
        adds = not (spelt and text.startswith(spelt))
    how = {"add_special_tokens": adds, "return_offsets_mapping": True, "verbose": False}
    if scene.preset == "llama.cpp":
        how["split_special_tokens"] = True
    if context is None or scene.options.get("join_contexts") == "ids":
        before = [] if context is None else tokenizer(context, **how).input_ids
        found = tokenizer(text, **how)
        ids, places = before + found.input_ids, [(0, 0)] * len(before) + found.offset_mapping
        num_prefix = len(before)
    else:
        found = tokenizer(context + text, **how)
        ids, shift = found.input_ids, len(context)
        reached, num_prefix = 0, 0
        for _, end in found.offset_mapping:
            reached = max(reached, end)
            num_prefix += bool(context) and reached <= shift
        places = [(max(a - shift, 0), max(b - shift, 0)) for a, b in found.offset_mapping]
    twice = scene.preset in ("evaluate", "lm-eval", "llama.cpp")
    if start is not None and (twice or ids[:1] != [start]):
        ids, places, num_prefix = [start, *ids], [(0, 0), *places], num_prefix + 1
    return ids, places, num_prefix


# --- windows: (start, first, stop, weight); ids[first:stop] are scored given ids[start:] ---


def sliding(num_ids: int, window: int, stride: int, first: int) -> list[tuple]:
    """Each id once; a window begins as early as it can, and ends as late."""
    found, stop = [], window + 1 if first <= window else first + stride
    while first < num_ids:
        stop = min(stop, num_ids)
        found.append((max(0, stop - window - 1), first, stop, 1.0))
        first, stop = stop, stop + stride
    return found


def recipe(num_ids: int, window: int, stride: int) -> list[tuple]:
    """The loop of the transformers documentation, which weighs a mean by its new ids less one."""
    found, previous = [], 0
    for start in range(0, num_ids, stride):
        stop = min(start + window, num_ids)
        new = [i for i in range(start + 1, stop) if i >= previous]  # of the labels that are shifted
        if new:
            found.append((start, new[0], stop, (stop - previous - 1) / len(new)))
        previous = stop
        if stop == num_ids:
            break
    return found


def windows_of(scene: Scene, num_ids: int, first: int) -> list[tuple]:
    """The windows of a text.

    Raises:
        RefusedByLoopError: too few or too many ids for the preset.
    """
    window, stride = scene.window, scene.stride
    if scene.preset == "hf-docs":
        return recipe(num_ids, window, stride)
    if scene.preset in ("gptq", "llama.cpp"):
        chunks, skipped = (1, 1) if scene.preset == "gptq" else (2, window // 2 + 1)
        if num_ids < chunks * window or skipped >= window:
            raise RefusedByLoopError("too few tokens for the chunks of a preset")
        starts = range(0, num_ids - window + 1, window)
        return [(start, start + skipped, start + window, 1.0) for start in starts]
    if scene.preset == "evaluate" and num_ids > window:
        raise RefusedByLoopError("a text that is longer than the context")
    return sliding(num_ids, window, stride, first)


def read_from(scene: Scene, ids: list[int], start: int, stop: int) -> list[int]:
    """What the model reads of ids[start:stop]: all but the last, and the start token in place of
    the first id where the window begins inside the text."""
    inputs, first = ids[start : stop - 1], start_id(scene)
    replaces = scene.options.get("start_each_window")
    if replaces is None:
        replaces = scene.preset in (None, "llama.cpp")
    return [first, *inputs[1:]] if first is not None and replaces else inputs


@torch.no_grad()
def log_probs(scene: Scene, inputs: list[int]) -> np.ndarray:
    """Of each next id, (T, V), float64."""
    logits = scene.model(input_ids=torch.tensor([inputs])).logits[0, :, : scene.num_ids]
    return logits.double().log_softmax(-1).numpy()


# --- texts ---


def score_by_loop(scene: Scene, text: str, context: str | None = None) -> LoopedText:
    """Score one text.

    Raises:
        RefusedByLoopError: an id that the model does not have, or as `windows_of`.
    """
    ids, places, num_prefix = encoded(scene, text, context)
    limit = scene.options.get("max_length")
    all_places, truncated = places, limit is not None and len(ids) > limit
    ids, num_prefix = ids[:limit], min(num_prefix, limit or num_prefix)
    if ids and max(ids) >= scene.model.get_input_embeddings().weight.shape[0]:
        raise RefusedByLoopError("an id without an embedding")
    size = len(ids)
    found = LoopedText(ids, num_prefix, [None] * size, [1.0] * size, [0] * size, [], truncated)
    for start, first, stop, weight in windows_of(scene, size, max(1, num_prefix)):
        inputs = read_from(scene, ids, start, stop)
        found.windows.append((start, first, stop, *inputs))
        rows = log_probs(scene, inputs)
        for i in range(first, stop):
            found.nll[i] = -float(rows[i - 1 - start, ids[i]])
            found.weights[i], found.contexts[i] = weight, i - start
    _count(scene, found, text, all_places)
    return found


def _count(scene: Scene, found: LoopedText, text: str, places: list[tuple[int, int]]) -> None:
    """Bytes and words of the scored text; a token has the text from the end of the one before."""
    is_scored = [nll is not None for nll in found.nll]
    if not any(is_scored):
        found.num_bytes = found.num_words = 0
        return
    if scene.preset == "lm-eval":
        found.num_bytes, found.num_words = len(text.encode()), len(re.split(r"\s+", text))
        return
    ends = np.maximum.accumulate([0, *(end for _, end in places)]).tolist()
    size = len(found.ids)
    for i in range(1, len(places)):  # a character that is partly scored
        halves = is_scored[i - 1] != (is_scored[i] if i < size else False) if i <= size else False
        if halves and places[i][0] < ends[i] and places[i][1] > 0:
            return
    if not found.truncated:
        ends[size] = len(text)
    parts, before = [""], False
    for i in range(size):
        parts += [""] if is_scored[i] and not before else []
        parts[-1] += text[ends[i] : ends[i + 1]] if is_scored[i] else ""
        before = is_scored[i]
    found.num_bytes = sum(len(part.encode()) for part in parts)
    found.num_words = sum(len(part.split()) for part in parts)


def joined(scene: Scene, texts: Sequence[str]) -> list[str]:
    """The texts, as one where the preset joins them."""
    if scene.preset not in JOINTS:
        return list(texts)
    text = JOINTS[scene.preset].join(texts)
    return [text.removesuffix("\n") if scene.preset == "llama.cpp" else text]


def check_options(scene: Scene, contexts, groups) -> None:
    """Raises RefusedByLoopError for options that do not go together, or with the model."""
    options, preset = scene.options, scene.preset
    start = start_id(scene)
    refused = (
        any(options.get(name) is not None for name in WITHOUT[preset])
        or (preset in ("hf-docs", "gptq") and options.get("add_start_token", True) is not True)
        or scene.window > scene.context
        or not 1 <= scene.stride <= scene.window
        or (contexts is not None and preset not in (None, "evaluate"))
        or (groups is not None and preset in JOINTS)
        or (start is not None and start >= scene.model.get_input_embeddings().weight.shape[0])
    )
    if refused:
        raise RefusedByLoopError("options that do not go together")
