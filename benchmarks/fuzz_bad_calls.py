"""Calls with bad input or a bad option for both fuzzers: each has to be refused, and to change
nothing."""

import functools
import math
from collections.abc import Callable
from typing import Any

from fuzz_runs import Calls, state_of_metric

# isort: split
import numpy as np
import torch
from fuzz_logit_loop import as_tuple


def _more(array: Any, axis: int) -> np.ndarray:
    array = np.asarray(array)
    return np.concatenate([array, array.take([0], axis)], axis)


# Each makes bad input of a batch of 2 sequences of 3 tokens and 5 ids, all scored.
BAD_LOGITS: dict[str, Callable[[dict], dict]] = {
    "float ids": lambda b: b | {"references": b["references"].astype(float)},
    "bool ids": lambda b: b | {"references": b["references"] > 0},
    "ids as strings": lambda b: b | {"references": b["references"].astype(str)},
    "integer logits": lambda b: b | {"predictions": b["predictions"].astype(int)},
    "complex logits": lambda b: b | {"predictions": b["predictions"] * 1j},
    "logits as strings": lambda b: b | {"predictions": b["predictions"].astype(str).tolist()},
    "a dict": lambda b: b | {"predictions": {"logits": b["predictions"]}},
    "one string": lambda b: b | {"predictions": "text"},
    "a number": lambda b: b | {"predictions": 3.0},
    "a number for ids": lambda b: b | {"references": 3},
    "a number for ids of a list": lambda b: {
        "predictions": [*b["predictions"]], "references": 3
    },
    "an array without an axis": lambda b: b | {"predictions": np.array(0.5)},
    "such an array for ids": lambda b: {
        "predictions": [*b["predictions"]], "references": np.array(3)
    },
    "a dict of weights of a list": lambda b: b | {
        "predictions": [*b["predictions"]], "sample_weight": {0: 1.0, 1: 2.0}
    },
    "None among listed weights": lambda b: b | {
        "predictions": [*b["predictions"]], "sample_weight": [None, 1.0]
    },
    "such a tensor for ids": lambda b: {
        "predictions": [*b["predictions"]], "references": torch.tensor(3)
    },
    "bytes": lambda b: b | {"predictions": b"text"},
    "an object": lambda b: b | {"predictions": object()},
    "a set of ids": lambda b: b | {"references": {0, 1, 2}},
    "no ids": lambda b: b | {"references": None},
    "no logits": lambda b: b | {"predictions": None},
    "a position more": lambda b: b | {"predictions": _more(b["predictions"], 1)},
    "a label more": lambda b: b | {"references": _more(b["references"], 1)},
    "a sequence more": lambda b: b | {"predictions": _more(b["predictions"], 0)},
    "a list more": lambda b: b | {"references": _more(b["references"], 0).tolist()},
    "flat logits": lambda b: b | {"predictions": b["predictions"][0]},
    "an axis more": lambda b: b | {"predictions": b["predictions"][None]},
    "flat ids": lambda b: b | {"references": b["references"].ravel()},
    "torn rows": lambda b: b | {"predictions": [[[0.0, 1.0], [0.0]], [[0.0, 1.0], [1.0, 0.0]]]},
    "strings among arrays": lambda b: b | {"predictions": [b["predictions"][0], "text"]},
    "None among arrays": lambda b: b | {"predictions": [b["predictions"][0], None]},
    "ids of other lengths": lambda b: b | {"references": [[0, 1, 2], [0, 1]]},
    "a masked array": lambda b: b | {"predictions": np.ma.masked_array(b["predictions"])},
    "a sparse tensor": lambda b: b | {"predictions": torch.tensor(b["predictions"]).to_sparse()},
    "a tensor without numbers": lambda b: b | {"predictions": torch.zeros(2, 3, 5, device="meta")},
    "a vocabulary of one": lambda b: {
        "predictions": b["predictions"][..., :1], "references": 0 * b["references"]
    },
    "an id too large": lambda b: b | {"references": b["references"] + 5},
    "weights of another shape": lambda b: b | {"sample_weight": np.ones((2, 4))},
    "a number for weights": lambda b: b | {"sample_weight": 2.0},
    "a number for weights of a list": lambda b: b | {
        "predictions": [*b["predictions"]], "sample_weight": 2.0
    },
    "a dict of weights": lambda b: b | {"sample_weight": {"a": 1.0, "b": 2.0}},
    "weights in a string": lambda b: b | {"sample_weight": "12"},
    "too many weights": lambda b: b | {"sample_weight": [1.0, 1.0, 1.0]},
    "a negative weight": lambda b: b | {"sample_weight": [1.0, -1.0]},
    "a NaN for a weight": lambda b: b | {"sample_weight": [math.nan, 1.0]},
    "weights as strings": lambda b: b | {"sample_weight": ["1", "2"]},
    "complex weights": lambda b: b | {"sample_weight": np.ones(2) * 1j},
    "None among weights": lambda b: b | {"sample_weight": [None, 1.0]},
    "too few groups": lambda b: b | {"groups": ["a"]},
    "one group for all": lambda b: b | {"groups": "ab"},
    "a fraction for a group": lambda b: b | {"groups": ["a", 1.5]},
    "None for a group": lambda b: b | {"groups": ["a", None]},
}  # fmt: skip

# Options that no call with logits takes.
BAD_OPTIONS_OF_LOGITS: dict[str, dict] = {
    "ignore_index": {"ignore_index": 1.5},
    "ignore_index as string": {"ignore_index": "-100"},
    "a bool among ids": {"ignore_index": (0, True)},
    "ids beyond 64 bits": {"ignore_index": 2**70},
    "several mask tokens": {"mask_token_id": [1]},
    "shift": {"shift": "yes"},
    "from_logits": {"from_logits": 1},
    "dtype": {"dtype": "float16"},
    "backend": {"backend": "cuda"},
    "an unknown option": {"ignore_indices": -100},
    "contexts without a model": {"contexts": ["a", "b"]},
    "a batch size without a model": {"batch_size": 2},
}


def plain_batch(rng: np.random.Generator, options: dict) -> dict:
    """Arguments that are right: 2 sequences of 3 tokens and 5 ids, none of them ignored."""
    unscored = {*as_tuple(options["ignore_index"]), *as_tuple(options["mask_token_id"])}
    scored = [i for i in range(5) if not {i, i + 5} & unscored]
    values = rng.random((2, 3, 5))
    return {
        "predictions": (values / values.sum(-1, keepdims=True)).astype(np.float32),
        "references": rng.choice(scored, (2, 3)),
    }


def make_bad_call_of_logits(rng: np.random.Generator, calls: Calls, metric, options: dict) -> None:
    """One call with bad input or a bad option; it has to be refused, and to change nothing."""
    passed = plain_batch(rng, options)
    pending = functools.partial(state_of_metric, metric)
    kind = rng.random()
    if kind < 0.7:
        name = str(rng.choice(list(BAD_LOGITS)))
        bad = BAD_LOGITS[name](passed)
        calls.make_refused(lambda: metric.add_batch(**bad), f"add_batch with {name}", pending)
    elif kind < 0.9:
        name = str(rng.choice(list(BAD_OPTIONS_OF_LOGITS)))
        bad = passed | BAD_OPTIONS_OF_LOGITS[name]
        calls.make_refused(lambda: metric.compute(**bad), f"compute with {name}", pending)
    else:
        other = type(metric)(**options | {"shift": not options["shift"]})
        wrong = other if kind < 0.95 else "a metric"
        calls.make_refused(lambda: metric.merge(wrong), "merge with another", pending)


# What a call with texts has to refuse, of texts that are right.
BAD_TEXTS: dict[str, Callable[[list], dict]] = {
    "one string": lambda texts: {"predictions": "text"},
    "a table": lambda texts: {"predictions": {"text": texts}},
    "a number": lambda texts: {"predictions": 3},
    "a number among texts": lambda texts: {"predictions": [*texts, 3]},
    "None among texts": lambda texts: {"predictions": [*texts, None]},
    "bytes among texts": lambda texts: {"predictions": [*texts, b"text"]},
    "half a surrogate pair": lambda texts: {"predictions": [*texts, "\ud83d"]},
    "ids": lambda texts: {"predictions": [*texts, [1, 2, 3]]},
    "no texts": lambda texts: {"predictions": []},
    "too few contexts": lambda texts: {"predictions": texts, "contexts": []},
    "too many contexts": lambda texts: {"predictions": texts, "contexts": ["a"] * 99},
    "one context": lambda texts: {"predictions": texts, "contexts": "context"},
    "None among contexts": lambda texts: {"predictions": texts, "contexts": [None] * len(texts)},
    "too many groups": lambda texts: {"predictions": texts, "groups": ["a"] * 99},
    "one group for all": lambda texts: {"predictions": texts, "groups": "a"},
    "references": lambda texts: {"predictions": texts, "references": texts},
    "weights": lambda texts: {"predictions": texts, "sample_weight": [1.0] * len(texts)},
}
BAD_OPTIONS_OF_TEXTS: dict[str, Any] = {
    "window": [0, -1, 1.5, "8", True, 10**9],
    "stride": [0, -1, 2.5, 10**9],
    "max_length": [0, -3, 1.5],
    "batch_size": [0, -1, 1.5, "2"],
    "add_start_token": [-1, 1.5, "<s>", None, 10**9],
    "start_each_window": [1, "yes"],
    "join_contexts": ["both", None],
    "preset": ["gpt2", 1, ["lm-eval"]],
    "positions": [(1, 2), (0, 0), (0, -1), "0", 3, (0, 1.5)],
    "dtype": ["float16", "int8", 32],
    "backend": ["cuda", None],
    "pseudo": ["original", "masked", True],
    "roles": ["assistant", ("user",)],
    "chat_template": ["{{ messages }}", 3],
    "tokenizer": [None, "gpt2", 3],
    "model": ["gpt2", 3],
    "model_id": ["gpt2"],
    "device": ["cpu"],
    "shift": [True],
    "windows": [8],
}


def make_bad_call_of_texts(
    rng: np.random.Generator, calls: Calls, metric, model, tokenizer, texts: list[str]
) -> None:
    """A call with bad texts or a bad option; it has to be refused, and to change nothing."""
    named = {"model": model, "tokenizer": tokenizer}
    if len(metric) > 0 and rng.random() < 0.1:
        logits = {"predictions": np.zeros((1, 2, 4)), "references": [[0, 1]]}
        what, call = "add_batch of logits", functools.partial(metric.add_batch, **logits)
    elif rng.random() < 0.5:
        name = str(rng.choice(list(BAD_TEXTS)))
        arguments = named | BAD_TEXTS[name](texts)
        what, call = f"compute with {name}", functools.partial(metric.compute, **arguments)
    else:
        name = str(rng.choice(list(BAD_OPTIONS_OF_TEXTS)))
        value = BAD_OPTIONS_OF_TEXTS[name][rng.integers(len(BAD_OPTIONS_OF_TEXTS[name]))]
        method = [metric.score, metric.compare, metric.compute][rng.integers(3)]
        arguments = named | {name: value}
        arguments |= {"base": model} if method == metric.compare else {}
        arguments["predictions"] = texts
        what = f"{method.__name__} with {name}={value!r}"
        call = functools.partial(method, **arguments)
    calls.make_refused(call, what, functools.partial(state_of_metric, metric))
