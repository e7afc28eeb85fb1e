"""A causal language model -> the nll of the next tokens, without logits for a whole batch.

The decoder runs on padded batches; the output layer (text_head.py) then runs on the positions that
are scored only, a few at a time. A probe tells whether the model is causal, and whether its batches
may hold several rows.
"""

import bisect
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .identity import quantization_name
from .nll_linear import launch_rows
from .nll_outputs import TokenStats
from .nll_threads import use_one_thread_after_fork
from .nll_transform import IDENTITY
from .tensors import is_dtensor, to_device
from .text_head import are_close, find_output_layer, run, stated_output_layer

logger = logging.getLogger(__name__)

# One for each model, however many metrics share it.
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


# Padded tokens that the decoder reads at once, which bounds the memory of a batch.
TOKENS_ON_CPU = 2048
TOKENS_ON_ACCELERATOR = 16384
LOGITS_PER_BATCH = 2**26  # elements, where a model's own logits are used: 256 MB in float32
# model_max_length of a tokenizer that knows no limit is 1e30. Contexts of 10^7 tokens exist.
NO_LIMIT = 10**9
# For a model that states no context length: one that needs little memory.
DEFAULT_CONTEXT = 2048


# What configurations call their context length.
STATED_CONTEXTS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions",
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """The input of one window: the model reads ids[:-1], and ids[first:] are scored."""

    ids: Sequence[int]
    first: int


def load_model(
    model_id: str,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | torch.device | None,
    model_kwargs: dict,
    trust_remote_code: bool,
) -> tuple[nn.Module, PreTrainedTokenizerBase, str]:
    """Load a model, and its tokenizer unless one is given, from the Hub, its cache or a directory.

    Args:
        device: whatever torch takes; "gpu" for "cuda". None for CUDA where there is one, else the
            CPU. Not used where `model_kwargs` place the model (device_map, quantization_config).
        model_kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model, its tokenizer, and their name with the revision.

    Raises:
        ValueError: the model or its tokenizer cannot be loaded, or is no causal language model.
    """
    use_one_thread_after_fork()  # transformers loads weights in threads of its own
    shared = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    tokenizer_kwargs = {name: model_kwargs[name] for name in shared if name in model_kwargs}
    try:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(
                model_id, trust_remote_code=trust_remote_code, **tokenizer_kwargs
            )
        model = AutoModelForCausalLM.from_pretrained(
            model_id, trust_remote_code=trust_remote_code, **model_kwargs
        )
        if not {"device_map", "quantization_config"} & set(model_kwargs):
            if device is None:
                device = "cuda" if torch.cuda.is_available() else "cpu"
            model.to("cuda" if device == "gpu" else device)
    # What torch and transformers raise for a model, a dtype or a device that they do not know.
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model_id={model_id!r} could not be loaded as a causal language model: {reason}"
        ) from error
    revision = model_kwargs.get("revision")
    return model, tokenizer, model_id if revision is None else f"{model_id}@{revision}"


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the model: tensor parallelism, FSDP or ZeRO-3."""
    parts = (is_dtensor(p) or hasattr(p, "ds_id") for p in model.parameters())
    # FSDP 2 has plain parameters for a while after a forward pass.
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    tensor_parallel = (getattr(model, "_tp_size", None) or 1) > 1  # transformers' own
    return tensor_parallel or any(parts) or bool(kinds & {"FullyShardedDataParallel", "FSDPModule"})


def check_whole(model: nn.Module) -> None:
    """Raises ValueError for a sharded model.

    Its processes have to run the same batches at the same time, so that texts cannot be shared out
    among them: they would wait for each other, or give wrong numbers.
    """
    if is_sharded(model):
        raise ValueError(
            "sync=True shares the texts out among processes that each hold the whole model, but "
            "this model is sharded (tensor parallelism, FSDP or ZeRO). Leave sync out and pass the "
            "same texts on every process, or load the whole model on each."
        )


class LanguageModel:
    """A model and its tokenizer, checked and probed once.

    Raises:
        TypeError: things that are no model or no tokenizer.
        ValueError: a model that is no causal one, or that returns no logits.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str | None = None
    ):
        complete = hasattr(model, "config") and hasattr(model, "get_input_embeddings")
        if not isinstance(model, nn.Module) or not complete:
            raise TypeError(
                f"model must be a transformers model, got {type(model).__name__}. "
                "A name or path goes to model_id=."
            )
        if not callable(tokenizer) or not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise TypeError(
                f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}."
            )
        self.model, self.tokenizer = model, tokenizer
        self.name = name or getattr(model, "name_or_path", "") or type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{self.name} is an encoder-decoder; a causal language model is needed."
            )
        self.embeddings = _input_embeddings(model, self.name)
        self._length_limits, self._remembers_lengths = _rotary_facts(model.config)
        # Forward passes put a hook on the model, which passes of another thread would run into.
        self._lock = _LOCKS.setdefault(model, threading.RLock())
        with self._lock, self.evaluating(), torch.inference_mode():
            self.vocab_size, self.takes_batches = self._probe()
            # The layers of a sharded model run in its own forward pass only, and what fails on one
            # process would leave the others waiting.
            self.head = None if is_sharded(model) else find_output_layer(model, self.device)
            self._probed = self._state()
        if not self.takes_batches:
            logger.warning(
                "The logits of %s depend on the other rows of a batch; its windows are scored one "
                "by one, which takes longer.",
                self.name,
            )
        if self.head is None:
            logger.warning(
                "The logits of %s are not those of its output layer; they are used as the model "
                "returns them, which takes more memory.",
                self.name,
            )

    @property
    def device(self) -> torch.device:
        """Where the model's input goes."""
        # Weights that accelerate has offloaded are on no device; its hook knows where they run.
        hook = getattr(self.embeddings, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
        weights = itertools.chain(self.embeddings.parameters(), self.model.parameters())
        weight = next(weights, None)
        return torch.device("cpu") if weight is None else weight.device

    @property
    def is_current(self) -> bool:
        """Whether the model is still what was probed, but for the values of its weights."""
        with self._lock:  # outside of a forward pass, which has a hook of its own
            return self._probed == self._state()

    def _state(self) -> tuple:
        """What the findings of the probe depend on: the configuration, the embeddings, and the
        output layer with the modules around it, their `forward` and their hooks."""
        head = stated_output_layer(self.model)
        embeddings = self.model.get_input_embeddings()
        return (
            self.dtype,
            repr(self.model.config.to_dict()),
            [(id(end), type(end), _shape(end)) for end in (embeddings, head)],
            [_calls(module) for module in _with_what_surrounds_it(self.model, head)],
        )

    @property
    def dtype(self) -> str:
        """Of the parameters, as in "bfloat16"; "none" where there are none."""
        if next(self.model.parameters(), None) is None:
            return "none"
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def context_length(self) -> int:
        """How many tokens the model reads at once, as its config or else its tokenizer says."""
        config = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in STATED_CONTEXTS:
            length = getattr(config, name, None)
            if isinstance(length, int) and 0 < length < NO_LIMIT:
                return length - _positions_of_padding(self.model, length)
        length = getattr(self.tokenizer, "model_max_length", NO_LIMIT)
        return int(length) if length < NO_LIMIT else DEFAULT_CONTEXT

    @property
    def tokens_per_batch(self) -> int:
        """The padded tokens that one batch may hold."""
        budget = TOKENS_ON_CPU if self.device.type == "cpu" else TOKENS_ON_ACCELERATOR
        if self.head is None:
            budget = min(budget, LOGITS_PER_BATCH // self.vocab_size)
        return max(budget, 1)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model without dropout; each module that was training trains on afterwards."""
        training = [module for module in self.model.modules() if module.training]
        if training:
            self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @property
    def num_embeddings(self) -> int:
        """How many ids the model reads."""
        return _num_embeddings(self.embeddings, self.model.config)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises ValueError for an id that the model has no embedding for."""
        if ids and max(ids) >= self.num_embeddings:
            raise ValueError(
                f"The tokenizer gives id {max(ids)}, but the model {self.name} has "
                f"{self.num_embeddings} embeddings: this tokenizer is not the model's."
            )

    def batch_key(self, num_inputs: int) -> int:
        """Windows of that many inputs may share a batch with windows of the same key only.

        LongRoPE (Phi-3) has one set of rotary factors for short and one for long batches, so that
        the longest row would choose for all.
        """
        return bisect.bisect_left(self._length_limits, num_inputs)

    @torch.inference_mode()
    def launch(
        self,
        spans: Sequence[Span],
        dtype: str = "float32",
        backend: str = "auto",
        top_k: int | None = None,
    ) -> Callable[[], list[TokenStats]]:
        """Start to score a batch of spans; calling what is returned gives the results.

        An accelerator works on while the next batch is made ready, until the results are called
        for: of each span the statistics of ids[first:], on the CPU. With a number for `top_k`, they
        are all that there are, with the `top_k` likeliest ids; else nll only.
        """
        with self._lock, self.evaluating():
            return self._launch(spans, dtype, backend, top_k)

    def _launch(
        self, spans: Sequence[Span], dtype: str, backend: str, top_k: int | None
    ) -> Callable[[], list[TokenStats]]:
        with torch.device("cpu"):  # whatever torch's default is: it is moved as a whole
            inputs, positions, targets = _padded(spans)
        if self._remembers_lengths:
            self._logits(inputs[:1, :1])
        head = self.head
        inputs = to_device(inputs, self.device)
        hidden, logits = run(self.model, inputs, None if head is None else head.layer)
        source = logits if head is None else hidden
        reduction = launch_rows(
            source.flatten(0, 1),
            to_device(positions, source.device),
            to_device(targets, source.device),
            (lambda logits: logits) if head is None else head,
            self.vocab_size,
            transform=IDENTITY if head is None else head.transform,
            dtype=dtype,
            backend=backend,
            with_all=top_k is not None,
            top_k=top_k or 0,
        )
        counts = [len(span.ids) - span.first for span in spans]

        def results() -> list[TokenStats]:
            (stats,) = reduction.on_host()
            return stats.split(counts)

        return results

    def _logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of ids (B, T), on the CPU in float32."""
        _, logits = run(self.model, inputs.to(self.device))
        self._check_shape(inputs, logits)
        return logits.float().cpu()

    def _check_shape(self, inputs: torch.Tensor, logits: torch.Tensor) -> None:
        found, expected = tuple(logits.shape), tuple(inputs.shape)
        if logits.dim() == 3 and found[0] == expected[0] and found[1] > expected[1]:
            raise ValueError(
                f"The model {self.name} returned logits for {found[1]} positions of {expected[1]} "
                "input ids: it puts virtual tokens in front, as prompt tuning does, which is not "
                "supported. Score the model without them, or pass its logits as predictions."
            )
        if logits.dim() != 3 or found[:2] != expected:
            raise ValueError(
                f"The model {self.name} returned logits of shape {found} for input ids of shape "
                f"{expected}; a causal language model is needed."
            )
        if 2 * found[2] < self.num_embeddings:  # some have a few rows fewer than embeddings
            raise ValueError(
                f"The model {self.name} returned {found[2]} scores for each token, but reads "
                f"{self.num_embeddings} ids: it classifies tokens. A causal language model is "
                "needed."
            )

    def _probe(self) -> tuple[int, bool]:
        """The size of the vocabulary, and whether the logits of a row do not depend on the others.

        Raises:
            ValueError: logits that depend on the tokens behind, or on chance.
        """
        length = min(24, self.context_length)
        generator = torch.Generator("cpu").manual_seed(0)
        ids, others = torch.randint(
            self.num_embeddings, (2, length), generator=generator, device="cpu"
        )
        # One changed token at the end is not enough: ProphetNet looks ahead from the first ones.
        kept = [length] + [k for k in (2, 6, 12, length - 1) if k < length]
        rows = torch.stack([torch.cat([ids[:k], others[k:]]) for k in kept])
        takes_batches = True
        try:
            logits = self._logits(rows)
        except RuntimeError:  # of a model that reads single rows only
            takes_batches = False
            logits = torch.cat([self._logits(row[None]) for row in rows])
        # Quantised activations share a scale with those of other tokens.
        tolerance = 0.1 if _is_quantised(self.model) else 1e-3
        for k, row in zip(kept, logits, strict=True):
            if not are_close(row[:k], logits[0, :k], tolerance):
                raise ValueError(
                    f"The model {self.name} looks at the tokens behind the one that it predicts, "
                    "as masked language models and encoders do; a causal language model is needed."
                )
        # 16 bits are rounded differently in a batch of another shape.
        tolerance = 1e-3 if self.dtype in ("float32", "float64") else 0.03
        half = (length + 1) // 2
        alone = self._logits(rows[:1, :half])[0]
        takes_batches = takes_batches and are_close(alone, logits[0, :half], tolerance)
        again = () if takes_batches else (self._logits(rows[:1]) for _ in range(2))
        if not takes_batches and not are_close(*again, tolerance):
            raise ValueError(
                f"The model {self.name} gives other logits for the same ids at each call, as "
                "Reformer does without hash_seed; a perplexity would be random."
            )
        return logits.shape[-1], takes_batches


def _padded(spans: Sequence[Span]) -> tuple[torch.Tensor, ...]:
    """Input ids (B, T), and of each token to be scored the position in B T of the hidden state that
    predicts it, and the id, (scored,) each.

    Padded on the right, whatever the tokenizer says: a causal model does not see what stands behind
    a token, and the positions 0, 1, 2... that it counts by itself are right. The padding repeats an
    id of the row, because at a padding id transformers warns that there is no mask.
    """
    length = max(len(span.ids) for span in spans) - 1
    inputs = torch.stack(
        [torch.tensor([*span.ids[:-1], *[span.ids[-2]] * (length + 1 - len(span.ids))])
         for span in spans]
    )  # fmt: skip
    positions = torch.cat(
        [
            torch.arange(span.first - 1, len(span.ids) - 1) + row * length
            for row, span in enumerate(spans)
        ]
    )
    targets = torch.cat([torch.tensor(span.ids[span.first :]) for span in spans])
    return inputs, positions, targets


def _input_embeddings(model: nn.Module, name: str) -> nn.Module:
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    if not isinstance(embeddings, nn.Module):
        raise TypeError(f"{name} has no input embeddings; a causal language model is needed.")
    return embeddings


def _num_embeddings(embeddings: nn.Module, config) -> int:
    stated = getattr(embeddings, "num_embeddings", None)  # first: a sharded weight has another size
    if stated is not None:
        return stated
    shape = _shape(embeddings)
    return config.get_text_config().vocab_size if shape is None else shape[0]


def _shape(layer: nn.Module | None) -> tuple[int, ...] | None:
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else None


def _is_quantised(model: nn.Module) -> bool:
    packed = any(callable(getattr(module, "weight", None)) for module in model.modules())
    return packed or quantization_name(model.config) is not None


def _with_what_surrounds_it(model: nn.Module, layer: nn.Module | None) -> list[nn.Module]:
    """The modules on the way from the model to one of its layers, both included."""
    names = (name for name, module in model.named_modules() if module is layer)
    parts = next(names, "").split(".")
    ways = (".".join(parts[:depth]) for depth in range(len(parts) + 1))
    return [model.get_submodule(way) for way in ways]


def _calls(module: nn.Module) -> tuple:
    """What runs when the module is called."""
    return (
        id(module),
        type(module).forward,
        vars(module).get("forward"),
        tuple(module._forward_hooks.items()),
        tuple(module._forward_pre_hooks.items()),
        bool(_has_any_global_hook()),
        # Cohere's forward, for one, has the scale of its logits from an attribute.
        {
            k: v
            for k, v in vars(module).items()
            if isinstance(v, (int, float, str)) and k != "training"
        },
    )


def _positions_of_padding(model: nn.Module, length: int) -> int:
    """How many of `length` positions no token can have.

    Those of RoBERTa and its kin begin behind the padding id. ProphetNet predicts from streams that
    are one position ahead.
    """
    for name, module in model.named_modules():
        named = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if named and module.padding_idx is not None and module.num_embeddings == length:
            return module.padding_idx + 1 + hasattr(model.config, "ngram")
    return 0


def _rotary_facts(config) -> tuple[list[int], bool]:
    """Lengths of a batch at which rotary factors change, as a configuration states them; and
    whether they stay those of the longest batch (dynamic NTK), until a shorter one resets them."""
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
