"""Short hashes for the signature, which tell models, or tokenizers, of the same name apart.

They are cheap enough for every call: they take a few numbers of each weight, and read a tokenizer's
rules once. They show a training step, another checkpoint or quantisation, or an adapter that was
switched off, but perhaps not a single changed weight.
"""

import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Set
from types import MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ppleval.logits.tensors import is_dtensor, to_host
from ppleval.models.sharding import ModelRanks

if TYPE_CHECKING:
    from transformers import PreTrainedModel
NUMBERS_OF_A_WEIGHT = 16
DIGITS = 8
# Entries of a configuration that change no number; weights have their dtypes themselves.
NAMES = {"_name_or_path", "transformers_version", "architectures", "distributed_config", "dtype"}
# What PEFT's layers keep in private attributes, which are missing until they are first set.
ADAPTER_STATE = ("active_adapters", "disable_adapters")
# Attributes of modules that change no number: of training, of where a model comes from and runs,
# and PEFT's note of how a layer was made.
IDLE = {"training", "gradient_checkpointing", "name_or_path", "hf_device_map", "kwargs"}
# Where something is, in its description.
PLACE = re.compile(r"device\([^)]*\)| at 0x[0-9a-f]+")
# Whose hooks change no number: they record outputs, or ask for gradients.
RECORDERS = ("transformers.", "peft.")

# Tokenizer -> (the state that may change, its hash): to write one of 150,000 tokens takes a second.
_TOKENIZERS: WeakKeyDictionary = WeakKeyDictionary()


def weights_id(model: "PreTrainedModel") -> str:
    """A hash of what takes part in a forward pass: the configuration, the modules (`modules_of`),
    and the names, shapes and some numbers of all weights.

    It is the same on every machine, device and process. Offloaded weights count by name and shape
    only; of a model that several processes hold together the configuration alone counts, because
    each has other weights, and some of them for the time of a forward pass only.
    """
    names, samples = [repr(_plain_config(model.config.to_dict()))], []
    if ModelRanks.of(model).is_alone:
        names += modules_of(model)
        parts = _Parts(model)
        for name, tensor in _weights(model):
            shape = None if is_lazy(tensor) else tensor.shape
            context = _context(tensor) if hasattr(tensor, "__tensor_flatten__") else ""
            names.append(f"{parts.path(name)} {shape} {context}")
            samples += _samples(tensor)
    digest = hashlib.sha256("\n".join(names).encode())
    for sample in to_host(*samples):
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def _plain_config(entries: dict) -> list:
    """The entries that may change a number, in an order of their own; those of parts as well."""
    found = []
    for name, value in entries.items():
        if name not in NAMES:
            found.append((str(name), _plain_config(value) if isinstance(value, dict) else value))
    return sorted(found)


def modules_of(model: nn.Module) -> list[str]:
    """What each module does with its weights.

    This is its class, its plain attributes (which adapters are on, how they are scaled, what is
    merged), the dtypes of buffers that are not stored (`model.to(torch.bfloat16)` rounds rotary
    frequencies too), its hooks, and a `forward` of its own.
    """
    parts = _Parts(model)
    found = []
    for path, module in model.named_modules():
        does = _calls(module)
        if not parts.is_around(path):  # the base: PEFT's own modules pass on what they get
            does += [type(module).__name__, *parts.attributes(module), *_buffer_dtypes(module)]
        found += [f"{parts.path(path)}: {' '.join(does)}"] if does else []
    return found


class _Parts:
    """Names of a model's modules that do not depend on how it was loaded.

    They are those of the model that PEFT wraps, where it does, and have a number in place of an
    adapter's name, which whoever loads it may choose.
    """

    def __init__(self, model: Any):
        self._base = _path_of_base(model) if hasattr(model, "get_base_model") else ""
        adapters: Mapping[str, Any] = getattr(model, "peft_config", {})
        self._numbers = dict(zip(adapters, map(str, itertools.count()), strict=False))

    def is_around(self, path: str) -> bool:
        """Whether this is a module of PEFT around the base."""
        return path != self._base and f"{self._base}.".startswith(f"{path}." if path else "")

    def path(self, name: str) -> str:
        """The name of a module or a weight, in the base."""
        inside = name.removeprefix(self._base).removeprefix(".")
        if not self._numbers:
            return inside
        return ".".join(self._numbers.get(part, part) for part in inside.split("."))

    def attributes(self, module: nn.Module) -> Iterator[str]:
        """The plain attributes of a module, without what it keeps from one pass to the next."""
        is_adapted = type(module).__module__.startswith("peft.")
        numbers = self._numbers if is_adapted else {}
        for name in sorted({*vars(module), *(ADAPTER_STATE if is_adapted else ())}):
            if name.startswith("_") or name.endswith("_cached") or name in IDLE:
                continue
            value = _plain(getattr(module, name, None), numbers)
            if value is not None and value != []:  # some caches are empty at first
                yield f"{name}={json.dumps(value)}"


def _path_of_base(model: Any) -> str:
    """The name, in a model of PEFT, of the one that it wraps."""
    base = model.get_base_model()
    return next(path for path, module in model.named_modules() if module is base)


def _plain(value: Any, numbers: Mapping[str, str]) -> Any:
    """Numbers and strings, and containers of them, as JSON has them; None for all else.

    Strings that have a number are replaced by it.
    """
    if isinstance(value, str):
        return numbers.get(value, value)
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Mapping):
        value = value.items()
    if not isinstance(value, (list, tuple, Set)):
        return None
    items = []
    for item in value:
        items.append(_plain(item, numbers))
        if items[-1] is None:
            return None
    return sorted(items, key=repr) if isinstance(value, Set) else items


def _buffer_dtypes(module: nn.Module) -> Iterator[str]:
    """Of buffers that are not stored, and so are no weights."""
    for name in sorted(module._non_persistent_buffers_set):
        buffer = module._buffers.get(name)
        if buffer is not None and buffer.is_floating_point():
            yield f"{name}:{buffer.dtype}"


def _calls(module: nn.Module) -> list[str]:
    """The hooks of a module that may change its output, and a `forward` that is not its class's."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    calls = []
    for hook in hooks:
        name = _name_of(hook)
        if not name.startswith(RECORDERS):
            calls.append(name)
    forward = vars(module).get("forward")
    if forward is not None and _name_of(forward) != _name_of(type(module).forward):
        calls.append(_name_of(forward))
    return calls


def _name_of(function: Callable) -> str:
    """The module and name of a function, or of its class; without what accelerate puts around."""
    inner = inspect.unwrap(function)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{named.__module__}.{named.__qualname__}"


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


def _context(tensor: torch.Tensor) -> str:
    """What one of torchao's tensors says of itself, such as how it quantises activations."""
    if is_dtensor(tensor):
        return ""
    _, context = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
    return PLACE.sub("", repr(context))


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


def quantization_name(model: "PreTrainedModel") -> str | None:
    """How the weights are quantised; None if they are not.

    This is the method that the configuration states, such as "bitsandbytes", or else what the
    weights became in memory, such as "Int8Tensor" by torchao.
    """
    stated = getattr(model.config, "quantization_config", None)
    if stated is None:
        return "+".join(sorted(set(_quantised_forms(model)))) or None
    stated = stated if isinstance(stated, dict) else stated.to_dict()
    method = stated.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def _quantised_forms(model: nn.Module) -> Iterator[str]:
    """Of each quantised weight the name of its class, or of its dtype if the class is torch's."""
    for module in model.modules():
        packed = getattr(module, "weight", None)  # torch's layers have a method, which unpacks it
        if callable(packed) and getattr(packed, "__self__", module) is module:  # not an adapter's
            yield module._get_name()
    for weight in model.parameters():
        is_torchs = type(weight) in (nn.Parameter, torch.Tensor) or is_dtensor(weight)
        if not is_torchs and hasattr(weight, "__tensor_flatten__"):
            yield type(weight).__name__
        elif weight.dtype.itemsize == 1 or not (weight.is_floating_point() or weight.is_complex()):
            yield str(weight.dtype).removeprefix("torch.") if is_torchs else type(weight).__name__
