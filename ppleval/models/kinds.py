"""A causal language model, which predicts each next token."""

import bisect
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerBase,
)

from ppleval.logits.tensors import to_device
from ppleval.models.language_model import LanguageModel, Span, num_embeddings, padded
from ppleval.models.output_head import are_close, run
from ppleval.models.probe import (
    NUM_IDS,
    probe,
    probe_padding,
    random_ids,
    rotary_lengths,
    source_length,
    tolerance_of,
)


class CausalModel(LanguageModel):
    """A causal model: a probe shows that it is one."""

    kind, auto_class = "causal language model", AutoModelForCausalLM

    def _check_kind(self) -> None:
        config = self.model.config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"{self.name} is an encoder-decoder; a {self.kind} is needed.")
        self._length_limits, self._remembers_lengths = rotary_lengths(config)

    def _probe(self) -> tuple[int, bool]:
        def read(inputs: torch.Tensor) -> torch.Tensor:
            return self._checked(self._logits(inputs), tuple(inputs.shape))

        return probe(self.model, read, self.name, self.num_embeddings, self.context_length)

    def batch_key(self, num_inputs: int) -> int:
        """Windows may share a batch only if their numbers of inputs have the same key.

        LongRoPE (Phi-3) has one set of rotary factors for short and one for long batches, so that
        the longest row would choose for all.
        """
        return bisect.bisect_left(self._length_limits, num_inputs)

    def _model_inputs(self, spans: Sequence[Span]) -> dict[str, torch.Tensor]:
        """The ids alone.

        Padded on the right, whatever the tokenizer says: a causal model does not see what stands
        behind a token, and the positions 0, 1, 2... that it counts by itself are right. So there is
        no attention mask: with one, rows of padding are NaN in some models in float64, and others
        take no batch. The padding repeats an id of the row, because at a padding id transformers
        warns that there is no mask.
        """
        inputs = padded([span.inputs for span in spans])
        if self._remembers_lengths:
            self._logits(inputs[:1, :1])
        return self._call_with(inputs)

    def _logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        _, logits = run(self.model, self._call_with(inputs))
        return logits

    def _call_with(self, inputs: torch.Tensor) -> dict[str, Any]:
        # Keys and values are not needed again; not every kind of model has a cache.
        use_cache = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        return {"input_ids": to_device(inputs, self.device), **use_cache}


class MaskedModel(LanguageModel):
    """A masked model: a probe shows that it looks at both sides."""

    kind, auto_class = "masked language model", AutoModelForMaskedLM

    def _check_kind(self) -> None:
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{self.name} is an encoder-decoder; pseudo= needs a {self.kind}. "
                "An encoder-decoder is scored without it, with contexts= for its encoder."
            )
        check_has_mask(self.name, self.tokenizer)

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token."""
        mask_id = self.tokenizer.mask_token_id
        assert isinstance(mask_id, int)
        return mask_id

    def _probe(self) -> tuple[int, bool]:
        length = min(NUM_IDS, self.context_length)
        ids, others = random_ids(length, self.num_embeddings).tolist()
        half = (length + 1) // 2
        short, takes_batches = probe_padding(
            self.model, self._logits, self.name, [ids[:half], others]
        )
        # Of the same shape, so that those of a causal model are the same to the last bit or nearly.
        first, other = (self._logits([ids[:half] + end])[0] for end in (ids[half:], others[half:]))
        if are_close(first[:half], other[:half], 1e-6):
            raise ValueError(
                f"The model {self.name} does not look at the tokens behind the one that it "
                f"predicts, as causal models do not; pseudo= needs a {self.kind}."
            )
        return short.shape[-1], takes_batches

    def _logits(self, rows: list[list[int]]) -> torch.Tensor:
        spans = [Span(row, [], []) for row in rows]
        _, logits = run(self.model, self._model_inputs(spans))
        return self._checked(logits, (len(rows), max(map(len, rows))))

    def _model_inputs(self, spans: Sequence[Span]) -> dict[str, torch.Tensor]:
        """The ids, padded on the right, and the mask that hides the padding."""
        rows = [span.inputs for span in spans]
        mask = padded([[1] * len(row) for row in rows], padding=0)
        return {
            "input_ids": to_device(padded(rows), self.device),
            "attention_mask": to_device(mask, self.device),
        }


def check_has_mask(name: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if the tokenizer of the model of this name has no mask token."""
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"The tokenizer of {name} has no mask token; pseudo= needs a {MaskedModel.kind}."
        )


class Seq2SeqModel(LanguageModel):
    """An encoder-decoder of texts: a probe shows that its decoder is causal."""

    kind, auto_class = "sequence-to-sequence language model", AutoModelForSeq2SeqLM
    # Whether a mask hides padding ids, as a text may spell them, from the decoder, or shows all;
    # None where the model gets no mask. The probe sets it to what the model itself does for labels.
    _hides_padding: bool | None = None

    def _check_kind(self) -> None:
        name = getattr(self.model, "main_input_name", "input_ids")
        if name != "input_ids":
            raise ValueError(
                f"The encoder of {self.name} reads {name}, as those of speech and of images do; a "
                f"{self.kind} that reads text is needed."
            )
        self._start_id = getattr(self.model.config, "decoder_start_token_id", None)
        not_padding = int(getattr(self.model.config, "pad_token_id", None) == 0)
        try:
            self.decoder_inputs([not_padding])
        # The model's own method reads the configuration, in which the id may be missing.
        except (AttributeError, AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.name} does not tell what its decoder reads first: set "
                "config.decoder_start_token_id."
            ) from error

    def _count_embeddings(self) -> int:
        """How many ids the decoder reads."""
        of_decoder = getattr(self.model.get_decoder(), "get_input_embeddings", None)
        embeddings = None if of_decoder is None else of_decoder()
        embeddings = embeddings if isinstance(embeddings, nn.Module) else self.embeddings
        return num_embeddings(embeddings, self.model.config)

    @property
    def source_length(self) -> int:
        """How many tokens the encoder reads at once."""
        return source_length(self.model, self.tokenizer)

    @property
    def tokens_per_batch(self) -> int:
        """How many tokens a batch may hold, sources and padding included."""
        # Each half of the model reads about half of them.
        return 2 * super().tokens_per_batch

    def check_source(self, ids: Sequence[int]) -> None:
        """Raises ValueError for an id without an embedding in the encoder."""
        self.check_ids(ids, num_embeddings(self.embeddings, self.model.config))

    def decoder_inputs(self, labels: list[int]) -> list[int]:
        """What the decoder reads to predict these labels, as many ids."""
        if self._shift is None:
            assert self._start_id is not None  # as checked
            return [self._start_id, *labels[:-1]]
        return self._shift(labels=torch.tensor([labels], device="cpu"))[0].tolist()

    @property
    def _shift(self) -> Callable[..., torch.Tensor] | None:
        """The model's own method; M2M100, for one, has none."""
        return getattr(self.model, "prepare_decoder_input_ids_from_labels", None)

    @property
    def _padding_id(self) -> int | None:
        """What a mask may hide, also where a text spells it."""
        return getattr(self.model.config, "pad_token_id", None)

    def _probe_labels(self, source: list[int]) -> None:
        """Find whether the model itself, given labels, hides padding ids from its decoder.

        Raises:
            ValueError: given labels, its decoder reads something else than here.
        """
        ids = random_ids(min(NUM_IDS, self.context_length), self.num_embeddings)[0].tolist()
        vocab_size = self._logits([Span(ids, [], [], source=source)]).shape[-1]
        labels = [i % vocab_size for i in ids]
        if self._padding_id in range(vocab_size):
            labels[1::3] = [self._padding_id] * len(labels[1::3])
        # As users call it: T5Gemma hides padding ids only where it keeps no cache.
        given = {"input_ids": [source], "attention_mask": [[1] * len(source)], "labels": [labels]}
        tensors = {name: torch.tensor(rows, device=self.device) for name, rows in given.items()}
        own = self._checked(run(self.model, tensors)[1], (1, len(labels)))
        span = Span(self.decoder_inputs(labels), [], [], source=source)
        found: dict[bool | None, torch.Tensor] = {}
        for self._hides_padding in (None, False, True):
            with contextlib.suppress(TypeError):  # a model of one's own may take no such mask
                found[self._hides_padding] = self._logits([span])
        # The nearest, because a wrong mask may change less than 16 bits round. NaN is of a token
        # that is shown nothing.
        self._hides_padding = min(
            found, key=lambda way: (found[way].nan_to_num() - own.nan_to_num()).abs().max().item()
        )
        if not are_close(own, found[self._hides_padding], tolerance_of(self.model)):
            raise ValueError(
                f"The decoder of {self.name} reads something else for given labels than "
                f"{'its decoder_start_token_id and ' if self._shift is None else ''}the labels "
                "one place behind; pass its logits as predictions."
            )

    def _probe(self) -> tuple[int, bool]:
        num_sources = num_embeddings(self.embeddings, self.model.config)
        long, source = random_ids(min(NUM_IDS, self.source_length), num_sources).tolist()

        def read(inputs: torch.Tensor) -> torch.Tensor:
            return self._logits([Span(row, [], [], source=source) for row in inputs.tolist()])

        # What does the decoder read?
        self._probe_labels(source)
        # Is it causal?
        vocab_size, takes_batches = probe(
            self.model, read, self.name, self.num_embeddings, self.context_length
        )
        if not takes_batches:
            return vocab_size, False
        # Does a row have the same logits beside one with a longer source?
        targets = random_ids(min(NUM_IDS, self.context_length), self.num_embeddings)[0].tolist()

        def read_sources(sources: list[list[int]]) -> torch.Tensor:
            return self._logits([Span(targets, [], [], source=source) for source in sources])

        short = source[: (len(source) + 1) // 2]
        _, takes_batches = probe_padding(self.model, read_sources, self.name, [short, long])
        return vocab_size, takes_batches

    def _example(self) -> Span:
        num_sources = num_embeddings(self.embeddings, self.model.config)
        source = random_ids(min(NUM_IDS, self.source_length), num_sources)[0].tolist()
        return replace(super()._example(), source=source)

    def _logits(self, spans: list[Span]) -> torch.Tensor:
        _, logits = run(self.model, self._model_inputs(spans))
        return self._checked(logits, (len(spans), max(len(span.inputs) for span in spans)))

    def _model_inputs(self, spans: Sequence[Span]) -> dict[str, torch.Tensor | bool]:
        """The sources with the mask that hides their padding, and what the decoder reads. A batch
        needs no mask there: a causal decoder does not see what stands behind a token."""
        sources = [span.source for span in spans]
        read = padded([span.inputs for span in spans])
        inputs = {
            "input_ids": padded(sources),
            "attention_mask": padded([[1] * len(source) for source in sources], padding=0),
            "decoder_input_ids": read,
        }
        if self._hides_padding is not None:
            shown = read != self._padding_id if self._hides_padding else torch.ones_like(read)
            inputs["decoder_attention_mask"] = shown.long()
        tensors = {name: to_device(ids, self.device) for name, ids in inputs.items()}
        return {**tensors, "use_cache": False}
