"""A causal language model -> the nll of the next tokens, without logits for a whole batch.

The decoder runs on padded batches. The output layer then runs on the positions that are scored
only, a few at a time, so that logits exist for those few. A probe tells whether that, with the cap
or the scale that a configuration states, gives the model's own logits. Models that change them in
another way, and models whose output layer is not found, use the logits that they return.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .linear_nll import LogitsBuffer, is_positive, rows_at_once
from .nll import launch
from .tensors import to_device, to_host

logger = logging.getLogger(__name__)

# One for each model, however many metrics share it.
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


# Padded tokens that the decoder reads at once, which bounds the memory of a batch.
TOKENS_ON_CPU = 2048
TOKENS_ON_ACCELERATOR = 16384
LOGITS_PER_BATCH = 2**26  # elements, where a model's own logits are used: 256 MB in float32
# model_max_length of a tokenizer that knows no limit is 1e30.
NO_LIMIT = 10**6
# For a model that states no context length: one that needs little memory.
DEFAULT_CONTEXT = 2048


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


def load_language_model(
    model_id: str,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | torch.device | None,
    model_kwargs: dict,
    trust_remote_code: bool,
) -> "LanguageModel":
    """Load a model, and its tokenizer unless one is given, from the Hub, its cache or a directory.

    Args:
        device: whatever torch takes; "gpu" for "cuda". None for CUDA where there is one, else the
            CPU. Not used where `model_kwargs` place the model (device_map, quantization_config).
        model_kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

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
    return LanguageModel(
        model, tokenizer, model_id if revision is None else f"{model_id}@{revision}"
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
        self.embeddings = model.get_input_embeddings()
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
        return self.embeddings.weight.device if device is None else torch.device(device)

    @property
    def is_current(self) -> bool:
        """Whether the model is still what was probed: the same layers, of the same dtype."""
        return self._probed == self._layers()

    def _layers(self) -> tuple:
        ends = self.model.get_input_embeddings(), _output_layer(self.model)
        return (self.model.dtype, *((id(end), type(end), _shape(end)) for end in ends))

    @property
    def dtype(self) -> str:
        """Of the parameters, as in "bfloat16"."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def context_length(self) -> int:
        """How many tokens the model reads at once, as its config or else its tokenizer says."""
        config = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            length = getattr(config, name, None)
            if isinstance(length, int) and 0 < length < NO_LIMIT:
                return length
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
        self.model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises ValueError for an id that the model has no embedding for."""
        if ids and max(ids) >= self.embeddings.weight.shape[0]:
            raise ValueError(
                f"The tokenizer gives id {max(ids)}, but the model {self.name} has "
                f"{self.embeddings.weight.shape[0]} embeddings: this tokenizer is not the model's."
            )

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
        with self._lock:
            return self._launch(spans, dtype, backend, top_k)

    def _launch(
        self, spans: Sequence[Span], dtype: str, backend: str, top_k: int | None
    ) -> Callable[[], list[ScoredSpan]]:
        with torch.device("cpu"):  # whatever torch's default is: it is moved as a whole
            inputs, mask, rows, places, targets = _padded(spans)
        inputs, mask = to_device(inputs, self.device), to_device(mask, self.device)
        hidden, logits = self._forward(inputs, mask)
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
        # Called, not multiplied with, where calling does more: adapters, quantisation, hooks.
        head = self._head
        changed = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
        if type(head) is not nn.Linear or changed or head.weight.dtype != hidden.dtype:
            return head(hidden)
        return self._buffer.product(hidden, head.weight, head.bias)

    def _forward(
        self, inputs: torch.Tensor, mask: torch.Tensor, head_input: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(hidden states that reach the output layer, logits) of input ids (B, T).

        Where there is an output layer it is given `head_input`, or else one position only, so that
        the logits are those of that, not of the batch.
        """
        seen = []

        def replace_input(module, args):
            seen.append(args[0])
            return (args[0][:1, :1] if head_input is None else head_input, *args[1:])

        handle = None if self._head is None else self._head.register_forward_pre_hook(replace_input)
        # Keys and values are not needed again; not every kind of model has a cache.
        use_cache = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        try:
            output = self.model(input_ids=inputs, attention_mask=mask, **use_cache)
        finally:
            if handle is not None:
                handle.remove()
        logits = getattr(output, "logits", None)
        if logits is None:
            raise ValueError(f"The model {self.name} returned no logits.")
        return (seen[-1] if seen else None), logits

    @torch.inference_mode()
    def _probe(self) -> None:
        """Find out whether the model is causal, and how its logits come from its output layer."""
        self._buffer, self._head, self._scores = LogitsBuffer(), None, _Scores()
        with self.evaluating():
            self._check_causal()
            head = _output_layer(self.model)
            self._probed = self._layers()
            if isinstance(head, nn.Module):
                for scores in dict.fromkeys([_Scores(), _stated_scores(self.model.config)]):
                    if self._is_the_output(head, scores):
                        self._head, self._scores = head, scores
                        return
        logger.warning(
            "The logits of %s are not those of its output layer; they are used as the model "
            "returns them, which takes more memory.",
            self.name,
        )

    def _check_causal(self) -> None:
        """The logits of a token must not depend on the tokens behind it."""
        length = min(8, self.context_length)
        vocab_size = self.embeddings.weight.shape[0]
        inputs = torch.arange(length).remainder(vocab_size).repeat(2, 1)
        inputs[1, -1] = (inputs[1, -1] + vocab_size // 2) % vocab_size
        mask = torch.ones_like(inputs)
        _, logits = self._forward(inputs.to(self.device), mask.to(self.device))
        if logits.dim() != 3 or logits.shape[:2] != inputs.shape:
            raise ValueError(
                f"The model {self.name} returned logits of shape {tuple(logits.shape)} for input "
                f"ids of shape {tuple(inputs.shape)}; a causal language model is needed."
            )
        self._vocab_size = logits.shape[-1]
        before, after = logits[0, :-1].float(), logits[1, :-1].float()
        if (before - after).abs().max() > 1e-3 * before.abs().max():
            raise ValueError(
                f"The model {self.name} looks at the tokens behind the one that it predicts, as "
                "masked language models and encoders do; a causal language model is needed."
            )

    def _is_the_output(self, head: nn.Module, scores: _Scores) -> bool:
        """Whether the model's logits are scores(head(hidden states)), also where those are large.

        Soft-capping changes small logits by less than a rounding error, so a large input is put
        into the output layer.
        """
        inputs = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        self._head = head
        try:
            hidden, _ = self._forward(inputs, torch.ones_like(inputs))
            if hidden is None or hidden.dim() != 3:
                return False
            generator = torch.Generator("cpu").manual_seed(0)
            noise = torch.randn(hidden.shape, generator=generator, device="cpu")
            noise = noise.to(hidden.device, hidden.dtype)
            scale = 300 / head(noise).abs().max().clamp(min=1e-6)
            expected = scores(head(noise * scale))
            _, logits = self._forward(inputs, torch.ones_like(inputs), head_input=noise * scale)
        finally:
            self._head = None
        return logits.shape == expected.shape and torch.allclose(
            logits.float(), expected.float(), rtol=1e-3, atol=0.05, equal_nan=True
        )


def _padded(spans: Sequence[Span]) -> tuple[torch.Tensor, ...]:
    """Input ids and attention mask (B, T), and of each token to be scored the row, the place of the
    hidden state that predicts it, and the id, (scored,) each.

    Padded on the right, whatever the tokenizer says: a causal model does not see what stands behind
    a token, and the positions 0, 1, 2... that it counts by itself are right. The padding id is any
    valid one.
    """
    length = max(len(span.ids) for span in spans) - 1
    inputs = torch.zeros(len(spans), length, dtype=torch.int64)
    mask = torch.zeros_like(inputs)
    for row, span in enumerate(spans):
        inputs[row, : len(span.ids) - 1] = torch.tensor(span.ids[:-1])
        mask[row, : len(span.ids) - 1] = 1
    counts = torch.tensor([len(span.ids) - span.first for span in spans])
    rows = torch.repeat_interleave(torch.arange(len(spans)), counts)
    places = torch.cat([torch.arange(span.first - 1, len(span.ids) - 1) for span in spans])
    targets = torch.cat([torch.tensor(span.ids[span.first :]) for span in spans])
    return inputs, mask, rows, places, targets


def _output_layer(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _shape(layer: nn.Module | None) -> tuple[int, ...] | None:
    weight = getattr(layer, "weight", None)
    return None if weight is None else tuple(weight.shape)


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
