"""Short hashes for the signature, which tell models, or tokenizers, of the same name apart.

They are cheap enough for every call: they take a few numbers of each weight, and read a tokenizer's
rules once. They show a training step, another checkpoint or quantisation, but perhaps not a single
changed number.
"""

import hashlib
from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .tensors import is_dtensor, to_host
from .text_ranks import ModelRanks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUMBERS_OF_A_WEIGHT = 16
DIGITS = 8
# Entries of a configuration that change no number.
NAMES = ("_name_or_path", "transformers_version", "architectures", "distributed_config")

# Tokenizer -> (the state that may change, its hash): to write one of 150,000 tokens takes a second.
_TOKENIZERS: WeakKeyDictionary = WeakKeyDictionary()


def weights_id(model: "PreTrainedModel") -> str:
    """A hash of the configuration, and of the names, shapes and some numbers of all weights.

    It is the same on every machine, device and process. Offloaded weights count by name and shape
    only; of a model that several processes hold together the configuration alone counts, because
    each has other weights, and some of them for the time of a forward pass only.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in NAMES}
    names, samples = [repr(sorted(config.items()))], []
    if ModelRanks.of(model).is_alone:
        names.append(repr(getattr(model, "active_adapters", None)))
        for name, tensor in _weights(model):
            names.append(f"{name} {None if is_lazy(tensor) else tensor.shape}")
            samples += _samples(tensor)
    digest = hashlib.sha256("\n".join(names).encode())
    for sample in to_host(*samples):
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each weight.

    These are the parameters, the buffers that are stored with them (GPTQ, AWQ), and the packed
    weights of torch's own quantised layers, which `layer.weight()` returns.
    """
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer
        packed = getattr(module, "weight", None)
        if isinstance(packed, (MethodType, nn.Module)):
            yield f"{prefix}.weight", packed()


def _samples(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Some evenly spaced numbers of a tensor as bytes; none where they cannot be read."""
    if is_dtensor(tensor):  # of a single process
        tensor = tensor.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    if is_lazy(tensor):
        return []
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:  # torchao's tensors consist of others
        names, _ = flatten()
        return [sample for name in names for sample in _samples(getattr(tensor, name))]
    if tensor.is_quantized:
        return _samples(tensor.int_repr())
    plain = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
    if not plain or tensor.numel() == 0:
        return []
    size = tensor.numel()
    places = torch.arange(0, size, max(1, size // NUMBERS_OF_A_WEIGHT), device=tensor.device)
    # A flat view would copy a transposed weight.
    found = tensor.detach()[torch.unravel_index(places, tensor.shape)] if tensor.dim() else tensor
    return [found.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)]


def tokenizer_id(tokenizer) -> str:
    """A hash of the vocabulary, the special tokens and the rules of a tokenizer."""
    rules = getattr(tokenizer, "backend_tokenizer", None)
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    state = (
        size,
        sorted(map(str, getattr(tokenizer, "all_special_tokens", ()))),
        getattr(tokenizer, "split_special_tokens", None),
        repr(getattr(rules, "normalizer", None)),
        repr(getattr(rules, "post_processor", None)),
    )
    known = _TOKENIZERS.get(tokenizer)
    if known is None or known[0] != state:
        if rules is not None:
            # Without the padding and the truncation, which stand first: a user's call may set them.
            whole = rules.to_str().partition('"added_tokens"')[2]
        else:
            whole = repr(
                sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else ""
            )
        known = state, short_hash(repr((state, whole)))
        _TOKENIZERS[tokenizer] = known
    return known[1]


def short_hash(text: str) -> str:
    """A hash of a text, such as a chat template."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:DIGITS]


def quantization_name(config) -> str | None:
    """The method that a configuration states, such as "bitsandbytes"; None without one."""
    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return None
    stated = stated if isinstance(stated, dict) else stated.to_dict()
    method = stated.get("quant_method", "unknown")
    return str(getattr(method, "value", method))
