"""What tells two models, or two tokenizers, of one name apart: short hashes for the signature.

Cheap enough for every call: a few numbers of each weight, a few entries of a vocabulary. So a
training step, another checkpoint or another quantisation shows; one changed number may not.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .tensors import is_dtensor, to_host

NUMBERS_OF_A_WEIGHT = 16
ENTRIES_OF_A_VOCABULARY = 512
DIGITS = 8


def weights_id(model: nn.Module) -> str:
    """Of the names, shapes and some numbers of all weights; the same on every machine and device.

    Weights that accelerate has offloaded, or that are sharded, count by name and shape.
    """
    names, samples = [], []
    for name, tensor in _weights(model):
        names.append(f"{name} {tuple(tensor.shape)}")
        samples += _samples(tensor)
    digest = hashlib.sha256("\n".join(names).encode())
    for sample in to_host(*samples):
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the buffers that are stored with them, as those of GPTQ and AWQ are."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def _samples(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Some numbers of a tensor as bytes, evenly spaced; none where they are not to be had."""
    if is_dtensor(tensor):  # of which each process holds other numbers
        return []
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's, which consist of tensors
        names, _ = tensor.__tensor_flatten__()
        return [sample for name in names for sample in _samples(getattr(tensor, name))]
    if tensor.is_meta or tensor.is_quantized or tensor.numel() == 0:
        return []
    flat = tensor.detach().reshape(-1)
    return [flat[:: max(1, len(flat) // NUMBERS_OF_A_WEIGHT)].contiguous().view(torch.uint8)]


def tokenizer_id(tokenizer) -> str:
    """Of the size, the special tokens, some entries and the rules of a tokenizer."""
    size = len(tokenizer)
    ids = list(range(0, size, max(1, size // ENTRIES_OF_A_VOCABULARY)))
    rules = getattr(tokenizer, "backend_tokenizer", None)
    names = ("normalizer", "pre_tokenizer", "post_processor")
    parts = (
        size,
        tokenizer.convert_ids_to_tokens(ids),
        sorted(map(str, tokenizer.all_special_tokens)),
        [repr(getattr(rules, name, None)) for name in names],
    )
    return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()[:DIGITS]


def quantization_name(config) -> str | None:
    """The method that a configuration states, such as "bitsandbytes"; None without one."""
    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return None
    stated = stated if isinstance(stated, dict) else stated.to_dict()
    method = stated.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def files_of(model_id: str, subfolder: str | None) -> tuple:
    """Name, size and time of each file of a model's directory; empty for a name on the Hub."""
    directory = Path(model_id, subfolder or "")
    if not directory.is_dir():
        return ()
    with os.scandir(directory) as entries:
        stats = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
