"""Two models that read the same tokens, run side by side as if they were one."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from ppleval.logits.tensors import to_host
from ppleval.logits.two_models import PairStats, compare_rows
from ppleval.models.identity import tokenizer_id
from ppleval.models.language_model import LanguageModel, Span
from ppleval.models.saved_base import SavedBase
from ppleval.models.sharding import ModelRanks


class ScoredModel(Protocol):
    """What scores texts: a `LanguageModel`, or a `ModelPair`, whose methods say what each does."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    context_length: int
    num_embeddings: int
    vocab_size: int
    takes_batches: bool

    @property
    def tokens_per_batch(self) -> int: ...
    @property
    def ranks(self) -> ModelRanks: ...
    def settings(self) -> dict[str, str | int | None]: ...
    def check_ids(self, ids: Sequence[int]) -> None: ...
    def batch_key(self, num_inputs: int) -> object: ...
    def keep_step(self) -> None: ...
    def launch(
        self,
        spans: Sequence[Span],
        dtype: str = ...,
        backend: str = ...,
        top_k: int | None = ...,
        share_of: torch.Tensor | None = ...,
    ) -> Callable[[], Sequence[Any]]: ...


class ModelPair:
    """A model and the base that it is compared with, run like one model.

    Raises:
        ValueError: the two are one object, and its weights are whole in its own forward pass only,
            in which that of the base runs.
    """

    def __init__(self, model: LanguageModel, base: LanguageModel | SavedBase):
        is_itself = isinstance(base, LanguageModel) and base.model is model.model
        if is_itself and not model.ranks.layers_run_alone:
            raise ValueError(
                f"The base of {model.name} is the same object, which under FSDP and ZeRO-3 cannot "
                "run inside of itself. Pass another model as base=."
            )
        self.model, self.base = model, base
        # Those that run; a saved base did when it was saved.
        self._running = [each for each in (model, base) if isinstance(each, LanguageModel)]
        self.name = f"{model.name} (base {base.name})"
        self.tokenizer = model.tokenizer
        self.context_length = min(model.context_length, base.context_length)
        self.takes_batches = all(each.takes_batches for each in self._running)
        # A padded vocabulary has rows for which the other model has none.
        self.vocab_size = min(model.vocab_size, base.vocab_size)
        most = min(each.num_embeddings for each in self._running)
        self.num_embeddings = min(most, self.vocab_size)

    @property
    def base_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The base's tokenizer, if it may give other ids than the model's."""
        if not isinstance(self.base, LanguageModel):
            return None
        other = self.base.tokenizer
        return None if tokenizer_id(other) == tokenizer_id(self.tokenizer) else other

    @property
    def tokens_per_batch(self) -> int:
        """How many tokens a batch may hold, padding included."""
        return min(each.tokens_per_batch for each in self._running)

    @property
    def ranks(self) -> ModelRanks:
        """The processes that hold one of the two models together with this one."""
        if not isinstance(self.base, LanguageModel):
            return self.model.ranks
        return self.model.ranks.beside(self.base.ranks)

    def keep_step(self) -> None:
        """Make a forward pass of both models, for processes that need these in theirs."""
        for each in self._running:
            each.keep_step()

    def settings(self) -> dict[str, str | int | None]:
        """What a signature says of the two models, in their present state."""
        found = self.model.settings()
        found |= {f"base_{name}": value for name, value in self.base.settings().items()}
        if self.model.vocab_size != self.base.vocab_size:
            found["common_ids"] = self.vocab_size
        return found

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises ValueError for an id that one of the two models does not have."""
        for each in self._running:
            each.check_ids(ids)
        if ids and max(ids) >= self.vocab_size:
            raise ValueError(
                f"The tokenizer gives id {max(ids)}, but the two models have only the ids below "
                f"{self.vocab_size} in common."
            )

    def batch_key(self, num_inputs: int) -> tuple[int, ...]:
        """Windows may share a batch only if their numbers of inputs have the same key."""
        return tuple(each.batch_key(num_inputs) for each in self._running)

    def launch(
        self,
        spans: Sequence[Span],
        dtype: str = "float32",
        backend: str = "auto",
        top_k: int | None = None,
        share_of: torch.Tensor | None = None,
    ) -> Callable[[], list[PairStats]]:
        """Start to compare a batch of spans; calling what is returned gives the results.

        Args:
            spans, dtype: as for `LanguageModel.launch`.
            backend, top_k, share_of: not used; the statistics are always `PairStats`.
        """
        with ExitStack() as stack:
            # In one order, whichever is the base: another thread may compare them the other way.
            for each in sorted(self._running, key=id):
                stack.enter_context(each.running())
            stats = self.model.with_rows(
                spans,
                lambda rows: self.base.with_rows(
                    spans, lambda base_rows: compare_rows(rows, base_rows, dtype)
                ),
            )

        def results() -> list[PairStats]:
            on_host = stats.with_tensors(to_host(*stats.tensors))
            return on_host.split([len(span.targets) for span in spans])

        return results


def same_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers share a vocabulary: what both know has the same id in both.

    One of the two may know more, as that of a model to which special tokens were added.

    Raises:
        ValueError: they know the same tokens by other ids.
    """
    if tokenizer is other or tokenizer_id(tokenizer) == tokenizer_id(other):
        return True
    own_ids, other_ids = tokenizer.get_vocab(), other.get_vocab()
    common = own_ids.keys() & other_ids.keys()
    if common and all(own_ids[token] == other_ids[token] for token in common):
        return True
    if own_ids.keys() == other_ids.keys():
        moved = min(token for token in common if own_ids[token] != other_ids[token])
        raise ValueError(
            "The tokenizers of the two models have the same tokens, but under other ids: "
            f"{moved!r} is {own_ids[moved]} for the model and {other_ids[moved]} for the base. One "
            "of them does not belong to its model. Pass tokenizer= and base_tokenizer=."
        )
    return False
