"""A causal language model -> the nll of the next tokens, without logits for a whole batch.

The decoder runs on padded batches. The output layer then runs on the positions that are scored
only, a few at a time, so that logits exist for those few. A probe tells whether that, with the cap
or the scale that a configuration states, gives the model's own logits. Models that change them in
another way, and models whose output layer is not found, use the logits that they return.
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
from .nll import launch, use_one_thread_after_fork
from .nll_linear import LogitsBuffer, is_positive, rows_at_once
from .tensors import is_dtensor, to_device, to_host

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


@dataclass(frozen=True)
class ScoredSpan:
    """nll of ids[first:] of a span, in nats, with what else was asked for."""

    nll: torch.Tensor  # (scored,) on the CPU
    entropy: torch.Tensor | None = None  # (scored,) of the prediction, nats
    rank: torch.Tensor | None = None  # (scored,) 1 + the number of likelier tokens
    expected_ids: torch.Tensor | None = None  # (scored, top_k)
    expected_nll: torch.Tensor | None = None  # (scored, top_k)


@dataclass(frozen=True)
class _Scores:
    """What a model makes of the output of its last layer, see `nll.launch`."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        scores = logits * self.logit_scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


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
        # Forward passes put a hook on the model, which passes of another thread would run into.
        self._lock = _LOCKS.setdefault(model, threading.RLock())
        with self._lock:
            self._probe()

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
        return self._probed == self._state()

    def _state(self) -> tuple:
        """What the findings of the probe depend on: the configuration, the embeddings, and the
        output layer with the modules around it, their `forward` and their hooks."""
        head = _output_layer(self.model)
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
        if self._head is None:
            budget = min(budget, LOGITS_PER_BATCH // self._vocab_size)
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
    ) -> Callable[[], list[ScoredSpan]]:
        """Start to score a batch of spans; calling what is returned gives the results.

        An accelerator works on while the next batch is made ready, until the results are called
        for. With a number for `top_k`, they hold the entropy of each prediction, the rank of the
        token that came, and so many of the likeliest tokens.
        """
        with self._lock, self.evaluating():
            return self._launch(spans, dtype, backend, top_k)

    def _launch(
        self, spans: Sequence[Span], dtype: str, backend: str, top_k: int | None
    ) -> Callable[[], list[ScoredSpan]]:
        with torch.device("cpu"):  # whatever torch's default is: it is moved as a whole
            inputs, rows, places, targets = _padded(spans)
        if self._remembers_lengths:
            self._logits(inputs[:1, :1])
        hidden, logits = self._forward(to_device(inputs, self.device))
        source = logits if self._head is None else hidden
        rows, places, targets = (to_device(part, source.device) for part in (rows, places, targets))
        selected = source[rows, places]  # (scored, H or V)
        options = {"dtype": dtype, "backend": backend, "with_all": top_k is not None}
        options |= {"logit_scale": self._scores.logit_scale, "softcap": self._scores.softcap}
        launched, columns = [], []
        at_once = rows_at_once(self._vocab_size, source.device)
        for part, part_targets in zip(selected.split(at_once), targets.split(at_once), strict=True):
            part = part if self._head is None else self._project(part)
            all_of_it = torch.ones_like(part_targets, dtype=torch.bool)
            launched.append(launch(part, part_targets, all_of_it, **options))
            found = [launched[-1].stats.nll]
            if top_k is not None:
                stats = launched[-1].stats
                values, ids = part.topk(min(top_k, self._vocab_size), -1)
                # Neither a positive scale nor a cap changes the order.
                expected_nll = stats.lse[:, None] - self._scores(values.to(stats.lse.dtype))
                found += [stats.entropy, stats.rank, ids, expected_nll]
            columns.append(found)

        def results() -> list[ScoredSpan]:
            on_host = to_host(
                *(torch.cat(column) for column in zip(*columns, strict=True)),
                *(part.faults for part in launched),
            )
            for part, faults in zip(launched, on_host[-len(launched) :], strict=True):
                part.check(int(faults))
            counts = [len(span.ids) - span.first for span in spans]
            split = [column.split(counts) for column in on_host[: -len(launched)]]
            return [ScoredSpan(*values) for values in zip(*split, strict=True)]

        return results

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) of hidden states (n, H)."""
        head = self._head
        if _is_plain_product(head) and head.weight.dtype == hidden.dtype:
            return self._buffer.product(hidden, head.weight, head.bias)
        return head(hidden)

    def _forward(
        self, inputs: torch.Tensor, head_input: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(hidden states that reach the output layer, logits) of input ids (B, T).

        There is no attention mask: a causal model does not see the padding on the right. With one,
        rows of padding are NaN in some models in float64, and others take no batch.

        Where there is an output layer it is given `head_input`, or else one position only, so that
        the logits are those of that, not of the batch.
        """
        use_one_thread_after_fork()
        seen = []

        def replace_input(module, args):
            seen.append(args[0])
            return (args[0][:1, :1] if head_input is None else head_input, *args[1:])

        handle = None if self._head is None else self._head.register_forward_pre_hook(replace_input)
        # Keys and values are not needed again; not every kind of model has a cache.
        use_cache = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        try:
            output = self.model(input_ids=inputs, **use_cache)
        finally:
            if handle is not None:
                handle.remove()
        logits = getattr(output, "logits", None)
        if logits is None:
            raise ValueError(f"The model {self.name} returned no logits.")
        return (seen[-1] if seen else None), logits

    @torch.inference_mode()
    def _probe(self) -> None:
        """Find out whether the model is causal, what its batches may hold, and how its logits come
        from its output layer."""
        self._buffer, self._head, self._scores = LogitsBuffer(), None, _Scores()
        with self.evaluating():
            self._length_limits, self._remembers_lengths = _rotary_facts(self.model.config)
            self._check_logits()
            head = _output_layer(self.model)
            self._probed = self._state()
            # The layers of a sharded model run in its own forward pass only, and what fails on one
            # process would leave the others waiting.
            if isinstance(head, nn.Module) and not is_sharded(self.model):
                for scores in dict.fromkeys([_Scores(), _stated_scores(self.model.config)]):
                    if self._is_the_output(head, scores):
                        self._head, self._scores = head, scores
                        return
        logger.warning(
            "The logits of %s are not those of its output layer; they are used as the model "
            "returns them, which takes more memory.",
            self.name,
        )

    def _logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of ids (B, T), on the CPU in float32."""
        _, logits = self._forward(inputs.to(self.device))
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

    def _check_logits(self) -> None:
        """The logits of a token must not depend on the tokens behind it, nor on the batch."""
        length = min(24, self.context_length)
        generator = torch.Generator("cpu").manual_seed(0)
        ids, others = torch.randint(
            self.num_embeddings, (2, length), generator=generator, device="cpu"
        )
        # One changed token at the end is not enough: ProphetNet looks ahead from the first ones.
        kept = [length] + [k for k in (2, 6, 12, length - 1) if k < length]
        rows = torch.stack([torch.cat([ids[:k], others[k:]]) for k in kept])
        self.takes_batches = True
        try:
            logits = self._logits(rows)
        except RuntimeError:  # XLNet's masks, for one, are of single rows
            self.takes_batches = False
            logits = torch.cat([self._logits(row[None]) for row in rows])
        self._vocab_size = logits.shape[-1]
        # Quantised activations share a scale with those of other tokens.
        tolerance = 0.1 if _is_quantised(self.model) else 1e-3
        for k, row in zip(kept, logits, strict=True):
            if not _close(row[:k], logits[0, :k], tolerance):
                raise ValueError(
                    f"The model {self.name} looks at the tokens behind the one that it predicts, "
                    "as masked language models and encoders do; a causal language model is needed."
                )
        # 16 bits are rounded differently in a batch of another shape.
        tolerance = 1e-3 if self.dtype in ("float32", "float64") else 0.03
        half = (length + 1) // 2
        alone = self._logits(rows[:1, :half])[0]
        self.takes_batches = self.takes_batches and _close(alone, logits[0, :half], tolerance)
        if not self.takes_batches:
            if not _close(*(self._logits(rows[:1]) for _ in range(2)), tolerance):
                raise ValueError(
                    f"The model {self.name} gives other logits for the same ids at each call, as "
                    "Reformer does without hash_seed; a perplexity would be random."
                )
            logger.warning(
                "The logits of %s depend on the other rows of a batch; its windows are scored one "
                "by one, which takes longer.",
                self.name,
            )

    def _is_the_output(self, head: nn.Module, scores: _Scores) -> bool:
        """Whether the model's logits are scores(head(hidden states)), also where those are large.

        Soft-capping changes small logits by less than a rounding error, so a large input is put
        into the output layer.
        """
        inputs = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        self._head = head
        try:
            hidden, _ = self._forward(inputs)
            if hidden is None or hidden.dim() != 3:
                return False
            generator = torch.Generator("cpu").manual_seed(0)
            noise = torch.randn(hidden.shape, generator=generator, device="cpu")
            noise = noise.to(hidden.device, hidden.dtype)
            if not _is_by_rows(head, noise):
                return False
            scale = 300 / head(noise).abs().max().clamp(min=1e-6)
            expected = scores(head(noise * scale))
            _, logits = self._forward(inputs, head_input=noise * scale)
            return logits.shape == expected.shape and torch.allclose(
                logits.float(), expected.float(), rtol=1e-3, atol=0.05, equal_nan=True
            )
        # A layer of another kind may not run outside of the model's own forward pass. What it
        # raises is its own, and the model's logits serve as well.
        except Exception as error:
            logger.info("The output layer of %s cannot be called alone: %s", self.name, error)
            return False
        finally:
            self._head = None


def _padded(spans: Sequence[Span]) -> tuple[torch.Tensor, ...]:
    """Input ids (B, T), and of each token to be scored the row, the place of the hidden state that
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
    counts = torch.tensor([len(span.ids) - span.first for span in spans])
    rows = torch.repeat_interleave(torch.arange(len(spans)), counts)
    places = torch.cat([torch.arange(span.first - 1, len(span.ids) - 1) for span in spans])
    targets = torch.cat([torch.tensor(span.ids[span.first :]) for span in spans])
    return inputs, rows, places, targets


def _output_layer(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


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


def _is_plain_product(layer: nn.Module) -> bool:
    """Whether to call the layer is to multiply with its weight, and nothing more.

    Adapters, quantised and sharded weights, hooks and offloading need the call.
    """
    changed = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return (
        type(layer) is nn.Linear
        and type(layer.weight) in (nn.Parameter, torch.Tensor)
        and not changed
        and not _has_any_global_hook()
    )


def _is_by_rows(layer: nn.Module, hidden: torch.Tensor) -> bool:
    """Whether a row of the output depends on its own input only.

    Where activations are quantised by one scale for all, a small row vanishes beside a large one.
    """
    small = hidden[:, :1] / 100
    beside = layer(torch.cat([small, hidden], 1))[:, :1]
    return _close(layer(small), beside, 0.03)


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


def _close(logits: torch.Tensor, others: torch.Tensor, tolerance: float) -> bool:
    """Whether logits differ by less than that part of the largest; not judged by NaN."""
    return not (logits - others).abs().max() > tolerance * logits.abs().max()


def _stated_scores(config) -> _Scores:
    """What a configuration says of the logits: a cap as Gemma 2 has it, a factor as Cohere's, or a
    divisor as Granite's."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = {}
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        value = getattr(config, name, None)  # MPT's logit_scale, for one, may be a string
        stated[name] = float(value) if is_positive(value) else None
    return _Scores(
        logit_scale=(stated["logit_scale"] or 1.0) / (stated["logits_scaling"] or 1.0),
        softcap=stated["final_logit_softcapping"],
    )
