"""A language model of any kind -> the nll of some tokens, without logits for a whole batch.

The model runs on padded batches up to its output layer (output_head.py), which then runs on the
scored positions only, a few at a time. What a model of one kind is fed with, and what a probe has
to show of it, is in kinds.py and its like.
"""

import itertools
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppleval.distributed import T, naming_lost_ranks
from ppleval.logits.kernels import Reduction
from ppleval.logits.mass import share_nll
from ppleval.logits.output_layer import OutputRows, launch_rows
from ppleval.logits.outputs import IDENTITY, TokenStats
from ppleval.logits.tensors import to_device
from ppleval.models.identity import modules_of, quantization_name, tokenizer_id, weights_id
from ppleval.models.output_head import OutputLayerError, find_output_layer, run
from ppleval.models.probe import (
    check_shape,
    check_whole_vocabulary,
    context_length,
    dtype_of,
    probed_state,
    random_ids,
    weight_shape,
)
from ppleval.models.sharding import ModelRanks
from ppleval.shown import shown, shown_message

logger = logging.getLogger(__name__)

# One for each model, however many metrics share it.
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()

# Padded tokens that the decoder reads at once, which bounds the memory of a batch.
# On a CPU the activations of more tokens leave the cache: a GPT-2 of 45 million parameters took 27%
# longer with 2048, and 5% longer with 256.
TOKENS_ON_CPU = 512
TOKENS_ON_ACCELERATOR = 16384
LOGITS_PER_BATCH = 2**26  # elements, where a model's own logits are used: 256 MB in float32
# Ids that show whether the output layer gives the logits, and elements of these logits: at 150,000
# ids in the vocabulary 55 positions, of 32 MB in float32.
IDS_OF_PROBE = 64
LOGITS_OF_PROBE = 2**23


@dataclass(frozen=True)
class Span:
    """What the model reads for one window, and what is scored there."""

    inputs: Sequence[int]  # ids
    rows: Sequence[int]  # of each scored token the input whose output predicts it
    targets: Sequence[int]  # the ids of the scored tokens
    place: tuple[int, int] = (0, 0)  # the number of the text, and that of targets[0] in it
    source: Sequence[int] = ()  # ids that the encoder of an encoder-decoder reads


# Of which nothing is scored.
EMPTY_SPAN = Span([0, 0], [], [], source=[0])


class LanguageModel(ABC):
    """A model and its tokenizer, checked and probed once.

    Raises:
        TypeError: a model without input embeddings.
        ValueError: a model of another kind, or that returns no logits.
    """

    kind: ClassVar[str]  # as errors name it
    auto_class: ClassVar[Any]  # of transformers, which loads it

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None = None
    ):
        self.model, self.tokenizer = model, tokenizer
        self.name = shown(name or _name_of(model))
        _check_has_weights(model, self.name)
        self._check_kind()
        self.embeddings = _input_embeddings(model, self.name, self.kind)
        self.ranks = ModelRanks.of(model)
        # Forward passes put a hook on the model, which passes of another thread would run into.
        self._lock = _LOCKS.setdefault(model, threading.RLock())
        with self.running():
            try:
                self.num_embeddings = self._count_embeddings()
                self.context_length = context_length(model, tokenizer)
                self.vocab_size, self.takes_batches = self._probe_together()
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.name} cannot be called with the ids of a text, as a {self.kind} is: "
                    f"{error}"
                ) from error
            is_inside = not self.ranks.layers_run_alone
            self.head = (
                None
                if self.ranks.is_pipeline
                else find_output_layer(model, self._model_inputs([self._example()]), is_inside)
            )
            self._probed_state = self._state()
        if not self.takes_batches:
            logger.warning(
                "The logits of %s depend on the other rows of a batch; its windows are scored one "
                "by one, which takes longer.",
                self.name,
            )
        if self.head is None:
            self._warn_of_own_logits(
                "come from the last of several processes"
                if self.ranks.is_pipeline
                else "are not those of its output layer"
            )

    def _probe_together(self) -> tuple[int, bool]:
        """What `_probe` finds of a model that several processes may hold together.

        Raises:
            ValueError: the processes cannot divide the work on a text among them.
            ConnectionError: another rank is gone.
        """
        if self.ranks.is_alone:
            return self._probe()
        try:
            with naming_lost_ranks():
                return self._probe()
        except RuntimeError as error:
            if not self.ranks.same or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            sizes = ", ".join(str(group.size) for group in self.ranks.same)
            raise ValueError(
                f"{self.name} cannot be run by processes that share its layers ({sizes} of them): "
                f"{error}. Their number has to divide its numbers of attention heads and of "
                "key-value heads."
            ) from error

    @property
    def device(self) -> torch.device:
        """The device of the model's input."""
        # Offloaded weights are on no device; accelerate's hook knows where they run.
        hook = getattr(self.embeddings, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
        weights = itertools.chain(self.embeddings.parameters(), self.model.parameters())
        weight = next(weights, None)
        return torch.device("cpu") if weight is None else weight.device

    def settings(self) -> dict[str, str | int | None]:
        """What a signature says of the model, in its present state."""
        with self._lock:  # outside of a forward pass, which has a hook of its own
            return {
                "model": self.name,
                "weights": weights_id(self.model),
                "model_dtype": dtype_of(self.model),
                "quantization": quantization_name(self.model),
                "tokenizer": tokenizer_id(self.tokenizer),
            }

    @property
    def is_current(self) -> bool:
        """Whether the model is as it was when probed, except for the values of its weights."""
        with self._lock:  # as for `settings`
            return self._probed_state == self._state()

    def _state(self) -> tuple:
        ranks = ModelRanks.of(self.model)
        modules = modules_of(self.model) if ranks.is_alone else []
        longest = getattr(self.tokenizer, "model_max_length", None)  # may be the context length
        return probed_state(self.model), ranks, modules, longest

    @property
    def tokens_per_batch(self) -> int:
        """How many tokens a batch may hold, padding included."""
        budget = TOKENS_ON_CPU if self.device.type == "cpu" else TOKENS_ON_ACCELERATOR
        if self.head is None:
            budget = min(budget, LOGITS_PER_BATCH // self.vocab_size)
        return max(budget, 1)

    def _count_embeddings(self) -> int:
        """How many ids the model reads."""
        return num_embeddings(self.embeddings, self.model.config)

    def check_ids(self, ids: Sequence[int], num_embeddings: int | None = None) -> None:
        """Raises ValueError for an id without an embedding; by default of those of the targets."""
        most = self.num_embeddings if num_embeddings is None else num_embeddings
        if ids and max(ids) >= most:
            raise ValueError(
                f"The tokenizer gives id {max(ids)}, but the model {self.name} has {most} "
                "embeddings: this tokenizer is not the model's."
            )

    def batch_key(self, num_inputs: int) -> int:
        """Windows may share a batch only if their numbers of inputs have the same key."""
        return 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Where the model, and what `read` returns, may be used: by this thread alone, and without
        dropout. Modules that were training are set back to training afterwards."""
        # FSDP keeps tensors from one pass to the next, also to one with gradients.
        no_gradient = torch.inference_mode if self.ranks.layers_run_alone else torch.no_grad
        with self._lock, no_gradient():
            training = list(filter(attrgetter("training"), self.model.modules()))
            if training:
                self.model.eval()
            try:
                yield
            finally:
                for module in training:
                    module.training = True

    def launch(
        self,
        spans: Sequence[Span],
        dtype: str = "float32",
        backend: str = "auto",
        top_k: int | None = None,
        share_of: torch.Tensor | None = None,
    ) -> Callable[[], list[TokenStats]]:
        """Start to score a batch of spans; calling what is returned gives the results.

        An accelerator works on while the next batch is made ready, until the results are called
        for: of each span the statistics of its targets, on the CPU. With a number for `top_k`, they
        are all that there are, with the `top_k` likeliest ids; else nll only. With ids (k,) for
        `share_of`, also how likely one of them was in each place.
        """

        def reduced(outputs: OutputRows) -> tuple[Reduction, list[torch.Tensor]]:
            shares = [] if share_of is None else [share_nll(outputs, share_of, dtype)]
            with_all = {"with_all": top_k is not None, "top_k": top_k or 0}
            return launch_rows(outputs, dtype=dtype, backend=backend, **with_all), shares

        with self.running():
            reduction, shares = self.with_rows(spans, reduced)

        def results() -> list[TokenStats]:
            stats, *on_host = reduction.on_host(*shares)
            stats = replace(stats, share_nll=on_host[0]) if on_host else stats
            return stats.split([len(span.targets) for span in spans])

        return results

    def with_rows(self, spans: Sequence[Span], use: Callable[[OutputRows], T]) -> T:
        """What `use` makes of the rows of a batch, where their logits can be made: under FSDP and
        ZeRO-3 inside of the forward pass; where `running`."""
        if self.head is None or not self.head.is_inside:
            return use(self.read(spans))
        found: list[T] = []

        def at_layer(hidden: torch.Tensor) -> torch.Tensor:
            found.append(use(self._rows(spans, hidden)))
            return hidden[:1, :1]

        try:
            run(self.model, self._model_inputs(spans), self.head, at_layer)
        except OutputLayerError as error:
            self._use_own_logits(error)
            return use(self.read(spans))
        return found[0]

    def read(self, spans: Sequence[Span]) -> OutputRows:
        """What the model makes of a batch of spans, for each target; where `running`, and of a
        model that is not sharded."""
        try:
            hidden, logits = run(self.model, self._model_inputs(spans), self.head)
            return self._rows(spans, logits if hidden is None else hidden)
        except OutputLayerError as error:
            self._use_own_logits(error)
            return self.read(spans)

    def _rows(self, spans: Sequence[Span], rows: torch.Tensor) -> OutputRows:
        """`rows` are hidden states (B, T, H), or logits where no output layer was found.

        Raises:
            OutputLayerError: hidden states of other positions than those of the spans.
        """
        head, length = self.head, max(len(span.inputs) for span in spans)
        if head is not None and rows.shape[:-1] != (len(spans), length):
            raise OutputLayerError("it runs on a part of the positions")
        positions: list[int] = []
        targets: list[int] = []
        for i, span in enumerate(spans):
            positions += map((i * length).__add__, span.rows)
            targets += span.targets
        return OutputRows(
            rows.flatten(0, 1),
            to_device(_int64(positions), rows.device),
            to_device(_int64(targets), rows.device),
            (lambda logits: logits) if head is None else head.to_logits(rows.dtype),
            IDENTITY if head is None else head.transform,
            self.vocab_size,
        )

    def keep_step(self) -> None:
        """Make a forward pass without a result, for processes that need this one in theirs."""
        with self.running():
            run(self.model, self._model_inputs([EMPTY_SPAN]))

    def _use_own_logits(self, error: OutputLayerError) -> None:
        """Give up the output layer, which did in a batch what it had not done in the probe.

        Raises:
            ValueError: other processes make each forward pass with this one, and would not make the
                pass that a second attempt takes.
        """
        if self.ranks.in_step.size > 1:
            raise ValueError(
                f"The output layer of {self.name} cannot be used alone: {error}, for some texts "
                "only. Processes that share its weights cannot score it; score it in one process, "
                "or pass its logits as predictions."
            ) from error
        self.head = None
        self._warn_of_own_logits(f"are not those of its output layer ({error})")

    def _warn_of_own_logits(self, reason: str) -> None:
        logger.warning(
            "The logits of %s %s; they are used as the model returns them, which takes more "
            "memory.",
            self.name,
            reason,
        )

    def _example(self) -> Span:
        """Random ids of the whole vocabulary, on which the output layer is tried."""
        most = max(1, LOGITS_OF_PROBE // self.vocab_size)
        length = min(IDS_OF_PROBE, self.context_length, most)
        ids = random_ids(length, self.num_embeddings)[0].tolist()
        return Span(ids, [], [], source=EMPTY_SPAN.source)

    def _checked(self, logits: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Logits (B, T, V) of ids of this shape (B, T), on the CPU in float32, for a probe.

        Raises:
            ValueError: they have another shape, or are those of a part of the vocabulary.
        """
        check_whole_vocabulary(self.model, logits.shape[-1], self.name)
        check_shape(logits, shape, self.name, self.kind, self.num_embeddings)
        return logits.float().cpu()

    @abstractmethod
    def _check_kind(self) -> None:
        """Raises ValueError for a model of another kind, as its configuration states it."""

    @abstractmethod
    def _probe(self) -> tuple[int, bool]:
        """The size of the vocabulary, and whether a row has the same logits beside other rows.

        Raises:
            ValueError: a model of another kind, or that gives no logits that can be used.
        """

    @abstractmethod
    def _model_inputs(self, spans: Sequence[Span]) -> dict[str, Any]:
        """What the model is called with for a batch of spans, by name; tensors on its device."""


def padded(rows: Sequence[Sequence[int]], padding: int | None = None) -> torch.Tensor:
    """Ids (B, T), on the CPU. Rows are padded on the right, with their own last id by default."""
    length = max(map(len, rows))
    ids: list[int] = []
    for row in rows:
        ids += row
        ids += [row[-1] if padding is None else padding] * (length - len(row))
    return _int64(ids).view(-1, length)


def _int64(numbers: list[int]) -> torch.Tensor:
    """(n,), on the CPU whatever torch's default device is; faster than torch.tensor."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64))


def check_model(model, name: str = "model") -> None:
    """Raises TypeError for anything but a model of transformers; `name` is the argument."""
    complete = hasattr(model, "config") and hasattr(model, "get_input_embeddings")
    if not isinstance(model, nn.Module) or not complete:
        raise TypeError(
            f"{name} must be a transformers model, got {type(model).__name__}. "
            f"A name or path goes to {name}_id=."
        )


def check_tokenizer(tokenizer, name: str = "tokenizer", model: nn.Module | None = None) -> None:
    """Raises TypeError for anything but a tokenizer of transformers; `name` is the argument."""
    if model is not None and tokenizer is None:
        raise TypeError(
            "model= goes with the tokenizer that the model was trained with: pass tokenizer="
            f"{_tokenizer_of(model) or '...'}, too."
        )
    if not callable(tokenizer) or not hasattr(tokenizer, "convert_ids_to_tokens"):
        hint = ""
        if isinstance(tokenizer, str | os.PathLike):
            hint = f" Load it: AutoTokenizer.from_pretrained({str(tokenizer)!r})."
        elif hasattr(tokenizer, "tokenizer"):  # a processor, which reads images or sounds, too
            hint = " Pass its .tokenizer."
        raise TypeError(
            f"{name} must be a transformers tokenizer, got {type(tokenizer).__name__}.{hint}"
        )


@contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Raise ValueError where a tokenizer fails.

    The package `tokenizers` raises bare Exceptions. Where its code panics, as a damaged
    tokenizer.json can make it do, comes a BaseException, which passes by every `except Exception`.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = shown_message(error)
        raise ValueError(f"The tokenizer fails, its files may be damaged: {reason}") from error


def _check_has_weights(model: nn.Module, name: str) -> None:
    """Raises ValueError for weights on `meta` that no hook of accelerate brings from elsewhere."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    empty = [path for path, weight in model.named_parameters() if weight.is_meta]
    if empty:
        raise ValueError(
            f"The weights of {name} are not there: {empty[0]} and {len(empty) - 1} others are on "
            "the device meta, which holds shapes alone. Load the model on another, such as cpu."
        )


def _tokenizer_of(model: nn.Module) -> str | None:
    """How to load the tokenizer of where the model was loaded from; None if none is there."""
    place = getattr(model, "name_or_path", "")
    is_without = os.path.isdir(place) and not os.path.exists(
        os.path.join(place, "tokenizer_config.json")
    )
    return f"AutoTokenizer.from_pretrained({place!r})" if place and not is_without else None


def _name_of(model: PreTrainedModel) -> str:
    """What an object was loaded from, and the adapters that it got."""
    loaded_from = getattr(model, "name_or_path", "") or type(model).__name__
    return "+".join([loaded_from, *getattr(model, "peft_config", ())])


def _input_embeddings(model: PreTrainedModel, name: str, kind: str) -> nn.Module:
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    if not isinstance(embeddings, nn.Module):
        raise TypeError(f"{name} has no input embeddings; a {kind} is needed.")
    return embeddings


def num_embeddings(embeddings: nn.Module, config) -> int:
    """How many ids a layer of embeddings has, of a model with this configuration."""
    stated = getattr(embeddings, "num_embeddings", None)  # first: a sharded weight has another size
    if stated is not None:
        return stated
    shape = weight_shape(embeddings)
    return config.get_text_config().vocab_size if shape is None else shape[0]
