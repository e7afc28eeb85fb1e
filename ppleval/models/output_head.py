"""The output layer of a model: find it, check it, and make the logits of a few rows with it.

Logits then exist only for scored rows, a few at a time. A probe shows whether the layer, with the
cap or the scale that the configuration states, gives the model's own logits. For a model that
changes its logits in another way, `find_output_layer` returns None; its own logits are then used.

Each later pass is looked at, too: the layer runs once, for a single position, and the logits have
to be what it gives. So a change of logits stays unseen only if it leaves alone those of the first
position of each batch, and all of those in the probe.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ppleval.logits.dtensors import whole_of
from ppleval.logits.outputs import IDENTITY, LogitTransform, is_positive
from ppleval.logits.product import Product
from ppleval.logits.threads import use_one_thread_after_fork
from ppleval.models.sharding import class_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
logger = logging.getLogger(__name__)

LARGE = 300  # the largest logit of the rows that show a soft cap; Gemma's cap is 30
# Of products of float32 with one another, and of a cap or a scale in another order of operations.
ROUNDING = 1e-5


class OutputLayerError(RuntimeError):
    """In a forward pass the output layer did not run once, or did not give the model's logits."""


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

    def scores(self, output: torch.Tensor) -> torch.Tensor:
        """The model's logits of the layer's output, in float32 or float64."""
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        return self.transform(output if self.bias is None else output + self.bias)


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
        OutputLayerError: the layer did not run once, as in a model that predicts several tokens
            ahead or makes its logits in chunks, or something was done to what it gave.
    """
    use_one_thread_after_fork()
    seen, outputs, owner = [], [], threading.get_ident()

    def replace_input(module, args):
        if threading.get_ident() != owner:  # a forward pass of the user's, in another thread
            return None
        seen.append(args[0])
        return (args[0][:1, :1] if at_layer is None else at_layer(args[0]), *args[1:])

    def keep_output(module, args, output):
        if threading.get_ident() == owner:
            outputs.append(whole_of(output).clone())  # the model may change it in place

    # Before other hooks, which run again where the layer is called alone; but behind those that
    # collect its weight.
    handles = (
        []
        if head is None
        else [
            head.layer.register_forward_pre_hook(replace_input, prepend=not head.is_inside),
            head.layer.register_forward_hook(keep_output),
        ]
    )
    try:
        output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(f"The model {type(model).__name__} returned no logits.")
    logits = whole_of(logits)
    if head is None:
        return None, logits
    if len(outputs) != 1:
        raise OutputLayerError(f"it runs {len(outputs)} times in a forward pass")
    if not _are_logits(logits, head, outputs[0]):
        raise OutputLayerError("something is done to what it gives")
    return seen[0], logits


def find_output_layer(
    model: "PreTrainedModel", inputs: Mapping[str, Any], is_inside: bool = False
) -> OutputLayer | None:
    """The output layer of a model, or None if no layer gives the model's own logits.

    Args:
        inputs: what the model is called with, for a single row of various ids.
        is_inside: whether weights are whole in the model's own forward pass only.
    """
    layer, bias = stated_output_layer(model), _stated_bias(model)
    if isinstance(layer, nn.Module):
        for transform in dict.fromkeys([IDENTITY, _stated_transform(model.config)]):
            head = OutputLayer(layer, transform, bias, is_inside)
            if _runs_alone(model, head, inputs):
                return head
    return None


def stated_output_layer(model: "PreTrainedModel") -> nn.Module | None:
    """What the model says its output layer is."""
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # A call of FSDP 1's wrapper collects the weight, which is whole where the layer in it runs.
    is_wrapped = "FullyShardedDataParallel" in class_names(layer)
    return layer.module if is_wrapped else layer  # pyright: ignore[reportOptionalMemberAccess]


def _runs_alone(model: "PreTrainedModel", head: OutputLayer, inputs: Mapping[str, Any]) -> bool:
    """Whether the layer gives alone what the model has as logits, also where they are large.

    It makes two passes: one as later ones are, and one with the logits of all positions.
    """
    prepared: list[tuple[torch.Tensor, torch.Tensor]] = []

    def prepare(hidden: torch.Tensor) -> torch.Tensor:
        try:
            prepared.append(_call_alone(head, hidden))
        # A layer of another kind may fail, in any way, outside of the model's forward pass. The
        # model's own logits serve as well.
        except Exception as error:
            logger.info("The output layer cannot be called alone: %s", error)
        return hidden[:1, :1]

    try:
        hidden, _ = run(model, inputs, head, prepare if head.is_inside else None)
        if hidden is not None and not head.is_inside:
            prepare(hidden)
        # Inside, it is made in any case, because other processes make it, too.
        _, logits = run(model, inputs, head, lambda own: prepared[0][0] if prepared else own)
    except Exception as error:
        if head.is_inside and not isinstance(error, OutputLayerError):
            raise  # other processes may wait within this pass
        logger.info("The output layer cannot be used alone: %s", error)
        return False
    return bool(prepared) and _are_close_by_rows(logits, prepared[0][1])


def _call_alone(head: OutputLayer, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """These hidden states (1, T, H) with two large ones behind them, and the logits of all.

    Large ones are noise, whose logits show a soft cap: it changes small ones by less than a
    rounding error.

    Raises:
        ValueError: hidden states that are not (B, T, H), or a layer that mixes their rows.
    """
    if hidden.dim() != 3:
        raise ValueError("it does not run on (B, T, H)")
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn((1, 2, hidden.shape[-1]), generator=generator, device="cpu")
    noise = noise.to(hidden.device, hidden.dtype)
    if not _is_by_rows(head.call, noise):
        raise ValueError("a row of its output depends on other rows")
    large = noise * (LARGE / head.call(noise).abs().max().clamp(min=1e-6))
    rows = torch.cat([hidden, large], 1)
    return rows, head.scores(head.call(rows))


def _are_logits(logits: torch.Tensor, head: OutputLayer, output: torch.Tensor) -> bool:
    """Whether the model did nothing to the output of its layer but what is stated.

    If nothing is stated, logits are the output to the last bit, in every dtype. Else they are
    rounded up to three times, each time by half an epsilon of the dtype at most.
    """
    if logits.shape != output.shape:
        return False
    expected = head.scores(output).to(logits)
    if head.bias is None and head.transform.is_identity:
        return torch.allclose(logits, expected, rtol=0, atol=0, equal_nan=True)
    coarse = max(map(torch.finfo, (output.dtype, logits.dtype)), key=lambda info: info.eps)
    # Numbers below `tiny` have fewer digits.
    rtol, atol = max(ROUNDING, 2 * coarse.eps), coarse.tiny
    return torch.allclose(logits, expected, rtol=rtol, atol=atol, equal_nan=True)


def _are_close_by_rows(logits: torch.Tensor, alone: torch.Tensor) -> bool:
    """Whether logits are those of another call of the layer, up to the rounding of a product."""
    tolerance = max(ROUNDING, 4 * torch.finfo(logits.dtype).eps)
    errors = (logits - alone.to(logits)).abs().amax(-1)
    return not (errors > tolerance * logits.abs().amax(-1)).any()


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
