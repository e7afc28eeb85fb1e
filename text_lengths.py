"""The lengths that a model's configuration states, which a probe is too short to see.

They are its context, and the lengths at which its rotary factors change.
"""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
        if "position" not in name.rpartition(".")[2] or not isinstance(module, nn.Embedding):
            continue
        if module.padding_idx is not None and module.num_embeddings == length:
            return module.padding_idx + 1 + hasattr(model.config, "ngram")
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
