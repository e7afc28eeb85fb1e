"""What a few short runs show of a model: is it causal, does it take batches, is it deterministic?

Also the state that these findings depend on: a model that was changed since is probed again.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ppleval.logits.tensors import is_dtensor
from ppleval.models.identity import quantization_name
from ppleval.models.output_head import are_close, stated_output_layer
from ppleval.models.sharding import cast_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
NUM_IDS = 24  # of a probe; fewer where the context is shorter
# Where rows part. The last token alone would not do: ProphetNet looks ahead from the first ones.
PREFIXES = (2, 6, 12)
HINT_AT_PSEUDO = 'For the pseudo-perplexity of a masked one pass pseudo="within_word_l2r".'


def probe(
    model: "PreTrainedModel",
    read: Callable[[torch.Tensor], torch.Tensor],
    name: str,
    num_embeddings: int,
    context_length: int,
) -> tuple[int, bool]:
    """The size of the vocabulary, and whether a row has the same logits beside other rows.

    Args:
        model: the model, whose dtype and quantisation set the tolerances.
        read: gives the model's logits (B, T, V) of ids (B, T), on the CPU in float32.
        name: the model's, for errors.
        num_embeddings: how many ids the model reads.
        context_length: how many tokens it reads at once.

    Raises:
        ValueError: logits that depend on later tokens, or on chance.
    """
    length = min(NUM_IDS, context_length)
    prefixes, rows = _rows_that_begin_alike(length, num_embeddings)
    # Can the model read several rows at once?
    logits, takes_batches = _logits_of_rows(read, rows)
    # Is it causal? Then rows have the same logits as far as they are the same.
    _check_causal(logits, prefixes, name, tolerance=0.1 if quantization_name(model) else 1e-3)
    # Does a row have the same logits alone, and half as long?
    tolerance = tolerance_of(model)
    half = (length + 1) // 2
    alone = read(rows[:1, :half])[0]
    takes_batches = takes_batches and are_close(alone, logits[0, :half], tolerance)
    # If not, does at least the same row have the same logits?
    if not takes_batches and not are_close(read(rows[:1]), read(rows[:1]), tolerance):
        raise _is_random(name)
    return logits.shape[-1], takes_batches


def probe_padding(
    model: "PreTrainedModel",
    read: Callable[[list[list[int]]], torch.Tensor],
    name: str,
    rows: list[list[int]],
) -> tuple[torch.Tensor, bool]:
    """The logits (T, V) of the first row, and whether they are the same beside a longer row.

    Args:
        model: the model, whose dtype sets the tolerance.
        read: gives the model's logits (B, T, V) of padded rows, on the CPU in float32.
        name: the model's, for errors.
        rows: two rows of ids, the first the shorter one.

    Raises:
        ValueError: logits that depend on chance.
    """
    alone, tolerance = read(rows[:1])[0], tolerance_of(model)
    try:
        takes_batches = are_close(read(rows)[0, : len(alone)], alone, tolerance)
    except RuntimeError:  # of a model that reads single rows only
        takes_batches = False
    if not takes_batches and not are_close(read(rows[:1])[0], alone, tolerance):
        raise _is_random(name)
    return alone, takes_batches


def random_ids(length: int, num_embeddings: int, num_rows: int = 2) -> torch.Tensor:
    """Ids (num_rows, length) int64 on the CPU, at each call the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(num_embeddings, (num_rows, length), generator=generator, device="cpu")


def _rows_that_begin_alike(length: int, num_embeddings: int) -> tuple[list[int], torch.Tensor]:
    """Random ids (B, length), and how many of them each row shares with the first."""
    ids, others = random_ids(length, num_embeddings)
    prefixes = [length] + [prefix for prefix in (*PREFIXES, length - 1) if prefix < length]
    return prefixes, torch.stack([torch.cat([ids[:k], others[k:]]) for k in prefixes])


def _logits_of_rows(
    read: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """The logits of all rows, and whether the model reads them at once."""
    try:
        return read(rows), True
    except RuntimeError:  # of a model that reads single rows only
        return torch.cat([read(row[None]) for row in rows]), False


def _check_causal(logits: torch.Tensor, prefixes: list[int], name: str, tolerance: float) -> None:
    # Quantised activations, of the larger tolerance, share a scale with those of other tokens.
    for prefix, row in zip(prefixes, logits, strict=True):
        if not are_close(row[:prefix], logits[0, :prefix], tolerance):
            raise ValueError(
                f"The model {name} looks at the tokens behind the one that it predicts, "
                "as masked language models and encoders do; a causal language model is needed. "
                f"{HINT_AT_PSEUDO}"
            )


def _is_random(name: str) -> ValueError:
    return ValueError(
        f"The model {name} gives other logits for the same ids at each call, as "
        "Reformer does without hash_seed; a perplexity would be random."
    )


def tolerance_of(model: nn.Module) -> float:
    """For logits of the same tokens in batches of two shapes: 16 bits are rounded differently."""
    return 1e-3 if dtype_of(model) in ("float32", "float64") else 0.03


def check_shape(
    logits: torch.Tensor, expected: tuple[int, ...], name: str, kind: str, num_embeddings: int
) -> None:
    """Raises ValueError for logits that are not (B, T, V) for input ids of `expected` shape (B, T).

    `name` is the model's, and `kind` what it should be.
    """
    found = tuple(logits.shape)
    if logits.dim() == 3 and found[0] == expected[0] and found[1] > expected[1]:
        raise ValueError(
            f"The model {name} returned logits for {found[1]} positions of {expected[1]} "
            "input ids: it puts virtual tokens in front, as prompt tuning does, which is not "
            "supported. Score the model without them, or pass its logits as predictions."
        )
    if logits.dim() != 3 or found[:2] != expected:
        raise ValueError(
            f"The model {name} returned logits of shape {found} for input ids of shape "
            f"{expected}; a {kind} is needed."
        )
    if 2 * found[2] < num_embeddings:  # some have a few rows fewer than embeddings
        raise ValueError(
            f"The model {name} returned {found[2]} scores for each token, but reads "
            f"{num_embeddings} ids: it classifies tokens. A {kind} is needed."
        )


def check_whole_vocabulary(model: "PreTrainedModel", vocab_size: int, name: str) -> None:
    """Raises ValueError for logits of a part of the vocabulary, as a process has it that shares the
    output layer with others. `vocab_size` is how many there are, `name` the model's."""
    weight = getattr(stated_output_layer(model), "weight", None)
    if isinstance(weight, torch.Tensor) and is_dtensor(weight) and vocab_size < len(weight):
        raise ValueError(
            f"The model {name} returns logits for {vocab_size} of the {len(weight)} ids of its "
            "output layer, and each of several processes others. Give that layer the plan "
            "ColwiseParallel(output_layouts=Replicate()), so that all have those of all ids."
        )


def dtype_of(model: nn.Module) -> str:
    """The dtype of the parameters in a forward pass, such as "bfloat16"; "none" without any."""
    if next(model.parameters(), None) is None:
        return "none"
    return str(cast_dtype(model) or model.dtype).removeprefix("torch.")


def probed_state(model: "PreTrainedModel") -> tuple:
    """What the findings depend on: the dtype, the configuration, the embeddings, and the output
    layer with the modules around it, their `forward` and their hooks."""
    head = stated_output_layer(model)
    embeddings = model.get_input_embeddings()
    return (
        dtype_of(model),
        repr(model.config.to_dict()),
        (id(embeddings), type(embeddings), weight_shape(embeddings)),
        (id(head), type(head), weight_shape(head)),
        *map(_call_of, _path_to(model, head)),
    )


def weight_shape(layer: nn.Module | None) -> tuple[int, ...] | None:
    """The shape of a layer's weight; None without one."""
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else None


def _path_to(model: nn.Module, layer: nn.Module | None) -> list[nn.Module]:
    """The modules on the way from the model to one of its layers, both included."""
    found = [model]
    for name, module in model.named_modules():
        if module is layer and name:
            for part in name.split("."):
                found.append(getattr(found[-1], part))
            break
    return found


def _call_of(module: nn.Module) -> tuple:
    """What runs when the module is called."""
    # Cohere's forward, for one, has the scale of its logits from an attribute.
    numbers = {}
    for name, value in vars(module).items():
        if isinstance(value, (int, float, str)) and name != "training":
            numbers[name] = value
    return (
        id(module),
        type(module).forward,
        vars(module).get("forward"),
        tuple(module._forward_hooks.items()),
        tuple(module._forward_pre_hooks.items()),
        bool(_has_any_global_hook()),
        numbers,
    )


# What configurations call their context length.
STATED_CONTEXTS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions",
    "max_decoder_position_embeddings",
)  # fmt: skip
# model_max_length of a tokenizer that knows no limit is 1e30. Contexts of 10^7 tokens exist.
NO_LIMIT = 10**9
# For a model that states no context length: one that needs little memory.
DEFAULT_CONTEXT = 2048


def context_length(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many tokens the model reads at once, as its config or else its tokenizer says."""
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in STATED_CONTEXTS:
        length = getattr(config, name, None)
        if isinstance(length, int) and 0 < length < NO_LIMIT:
            return length - _positions_of_padding(model, length)
    length = getattr(tokenizer, "model_max_length", NO_LIMIT)
    return int(length) if length < NO_LIMIT else DEFAULT_CONTEXT


def source_length(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many tokens the encoder of an encoder-decoder reads at once."""
    stated = getattr(model.config, "max_encoder_position_embeddings", None)  # LED
    return context_length(model, tokenizer) if stated is None else stated


def _positions_of_padding(model: "PreTrainedModel", length: int) -> int:
    """How many of `length` positions no token can have.

    Those of RoBERTa and its kin begin behind the padding id. ProphetNet predicts from streams that
    are one position ahead.
    """
    for name, module in model.named_modules():
        padding_id = getattr(module, "padding_idx", None)
        if "position" not in name.rpartition(".")[2] or not isinstance(padding_id, int):
            continue
        # A sharded weight has another size; I-BERT's table is no nn.Embedding, and has no number.
        num_rows = getattr(module, "num_embeddings", None) or (weight_shape(module) or (0,))[0]
        if num_rows == length:
            return padding_id + 1 + hasattr(model.config, "ngram")
    return 0


def rotary_lengths(config: "PretrainedConfig") -> tuple[list[int], bool]:
    """Batch lengths at which the rotary factors change, and whether the model remembers a length.

    With dynamic NTK the factors stay those of the longest batch, until a shorter one resets them.
    """
    limits, remembers = set(), False
    found = [config.to_dict()]
    while found:
        for name, value in found.pop().items():
            if isinstance(value, dict):
                found.append(value)
            elif name == "original_max_position_embeddings" and isinstance(value, int):
                limits.add(value)
            elif name in ("rope_type", "type"):
                remembers = remembers or "dynamic" in str(value)
    return sorted(limits), remembers
