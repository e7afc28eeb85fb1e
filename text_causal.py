"""A causal language model, which predicts each next token."""

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .tensors import to_device
from .text_head import run
from .text_lengths import rotary_lengths
from .text_model import LanguageModel, Span, padded
from .text_probe import probe


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
