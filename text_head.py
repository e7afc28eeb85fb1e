"""The output layer of a model: find it, check it, and make the logits of a few rows with it.

Logits then exist only for scored rows, a few at a time. A probe shows whether the layer, with the
cap or the scale that the configuration states, gives the model's own logits. For a model that
changes its logits in another way, `find_output_layer` returns None; its own logits are then used.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .dtensors import whole_of
from .nll_product import Product
from .nll_threads import use_one_thread_after_fork
from .nll_transform import IDENTITY, LogitTransform, is_positive
from .text_ranks import class_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputLayer:
    """The last layer of a model, and the transform from its output to the model's logits."""

    layer: nn.Module
    transform: LogitTransform
    bias: torch.Tensor | None = None  # (V,), which the model adds to the layer's output
    is_inside: bool = False  # whether its weight is whole in the model's own forward pass only

    def to_logits(self, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes logits (n, V), before the transform, of hidden states (n, H) of this dtype;
        each call may overwrite the logits of the last."""
        layer, bias = self.layer, self.bias
        one_bias = bias is None or getattr(layer, "bias", None) is None
        if one_bias and _is_plain_product(layer, self.is_inside) and layer.weight.dtype == dtype:
            return Product(layer.weight, layer.bias if bias is None else bias)
        return self.call if bias is None else lambda hidden: self.call(hidden) + bias

    def call(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output; one that several processes share is gathered."""
        # Inside, its hooks have run: they collect the weight, and replace the input.
        call = self.layer.forward if self.is_inside else self.layer
        return whole_of(call(hidden))


def run(
    model: "PreTrainedModel",
    inputs: Mapping[str, Any],
    head: OutputLayer | None = None,
    at_layer: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(hidden states that reach the output layer, logits) of one forward pass.

    Args:
        inputs: what the model is called with, by name.
        head: the output layer, if there is one.
        at_layer: gets these hidden states where the layer would run, and gives what it runs on; by
            default a single position, so that no logits exist for the whole batch.

    Raises:
        ValueError: the model returned no logits.
    """
    use_one_thread_after_fork()
    seen, owner = [], threading.get_ident()

    def replace_input(module, args):
        if threading.get_ident() != owner:  # a forward pass of the user's, in another thread
            return None
        seen.append(args[0])
        return (args[0][:1, :1] if at_layer is None else at_layer(args[0]), *args[1:])

    # Before other hooks, which run again where the layer is called alone; but behind those that
    # collect its weight.
    handle = (
        None
        if head is None
        else head.layer.register_forward_pre_hook(replace_input, prepend=not head.is_inside)
    )
    try:
        output = model(**inputs)
    finally:
        if handle is not None:
            handle.remove()
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(f"The model {type(model).__name__} returned no logits.")
    return (seen[-1] if seen else None), whole_of(logits)


def find_output_layer(
    model: "PreTrainedModel", inputs: Mapping[str, Any], is_inside: bool = False
) -> OutputLayer | None:
    """The output layer of a model, or None if no layer gives the model's own logits.

    Args:
        inputs: what the model is called with, for a single row.
        is_inside: whether weights are whole in the model's own forward pass only.
    """
    layer, bias = stated_output_layer(model), _stated_bias(model)
    if isinstance(layer, nn.Module):
        for transform in dict.fromkeys([IDENTITY, _stated_transform(model.config)]):
            head = OutputLayer(layer, transform, bias, is_inside)
            gives_the_logits = _gives_the_logits_inside if is_inside else _gives_the_logits
            if gives_the_logits(model, head, inputs):
                return head
    return None


def stated_output_layer(model: "PreTrainedModel") -> nn.Module | None:
    """What the model says its output layer is."""
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # A call of FSDP 1's wrapper collects the weight, which is whole where the layer in it runs.
    is_wrapped = "FullyShardedDataParallel" in class_names(layer)
    return layer.module if is_wrapped else layer  # pyright: ignore[reportOptionalMemberAccess]


def _gives_the_logits(
    model: "PreTrainedModel", head: OutputLayer, inputs: Mapping[str, Any]
) -> bool:
    """Whether the model's logits are those of its output layer, also where they are large."""
    try:
        hidden, _ = run(model, inputs, head)
        large, expected = _large_logits(head, hidden)
        _, logits = run(model, inputs, head, lambda _: large)
        return _are_equal(logits, expected)
    # A layer of another kind may fail, in any way, outside of the model's forward pass. The model's
    # own logits serve as well.
    except Exception as error:
        logger.info("The output layer cannot be called alone: %s", error)
        return False


def _gives_the_logits_inside(
    model: "PreTrainedModel", head: OutputLayer, inputs: Mapping[str, Any]
) -> bool:
    """The same, of a layer whose weight is whole in the model's own forward pass only.

    It makes one such pass whatever it finds, because other processes make it, too.
    """
    found: list[torch.Tensor] = []

    def at_layer(hidden: torch.Tensor) -> torch.Tensor:
        try:
            large, expected = _large_logits(head, hidden)
        except Exception as error:
            logger.info("The output layer cannot be called alone: %s", error)
            return hidden
        found.append(expected)
        return large

    _, logits = run(model, inputs, head, at_layer)
    return bool(found) and _are_equal(logits, found[0])


def _large_logits(
    head: OutputLayer, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise like these hidden states, so large that its logits show a soft cap, which changes small
    ones by less than a rounding error; and these logits.

    Raises:
        ValueError: hidden states that are not (B, T, H), or a layer that mixes their rows.
    """
    if hidden is None or hidden.dim() != 3:
        raise ValueError("it does not run on (B, T, H)")
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator, device="cpu")
    noise = noise.to(hidden.device, hidden.dtype)
    if not _is_by_rows(head.call, noise):
        raise ValueError("a row of its output depends on other rows")
    large = noise * (300 / head.call(noise).abs().max().clamp(min=1e-6))
    logits = head.call(large)
    return large, head.transform(logits if head.bias is None else logits + head.bias)


def _are_equal(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    return logits.shape == expected.shape and torch.allclose(
        logits.float(), expected.float(), rtol=1e-3, atol=0.05, equal_nan=True
    )


def _is_plain_product(layer: nn.Module, is_inside: bool) -> TypeGuard[nn.Linear]:
    """Whether a call of the layer does nothing but multiply with its weight and add its bias.

    Adapters, quantised and sharded weights, hooks and offloading need the call. Of hooks, those
    that collect the weight have run inside of a forward pass.
    """
    hooks = layer._forward_hooks or layer._forward_pre_hooks or _has_any_global_hook()
    return (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward  # FSDP gives it a class of its own
        and "forward" not in vars(layer)
        and type(layer.weight) in (nn.Parameter, torch.Tensor)
        and (is_inside or not hooks)
    )


def _is_by_rows(layer: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> bool:
    """Whether a row of the output depends on its own input only.

    If all activations are quantised with one scale, a small row vanishes beside a large one.
    """
    small = hidden[:, :1] / 100
    beside = layer(torch.cat([small, hidden], 1))[:, :1]
    return are_close(layer(small), beside, 0.03)


def _stated_transform(config: "PretrainedConfig") -> LogitTransform:
    """The cap (Gemma 2), factor (Cohere) or divisor (Granite) of logits in a configuration."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = {}
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        value = getattr(config, name, None)  # MPT's logit_scale, for one, may be a string
        stated[name] = float(value) if is_positive(value) else None
    return LogitTransform(
        logit_scale=(stated["logit_scale"] or 1.0) / (stated["logits_scaling"] or 1.0),
        softcap=stated["final_logit_softcapping"],
    )


def _stated_bias(model: "PreTrainedModel") -> torch.Tensor | None:
    """(V,): what BART and Marian add to the output of their layer."""
    bias = getattr(model, "final_logits_bias", None)
    return bias.flatten() if isinstance(bias, torch.Tensor) else None


def are_close(logits: torch.Tensor, others: torch.Tensor, tolerance: float) -> bool:
    """Whether logits differ by at most `tolerance` times the largest; True if any is NaN."""
    return not (logits - others).abs().max() > tolerance * logits.abs().max()
