"""A masked language model, which predicts a masked token from those on both sides."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForMaskedLM

from .tensors import to_device
from .text_head import are_close, run
from .text_model import LanguageModel, Span, padded
from .text_probe import NUM_IDS, probe_padding, random_ids


class MaskedModel(LanguageModel):
    """A masked model: a probe shows that it looks at both sides."""

    kind, auto_class = "masked language model", AutoModelForMaskedLM

    def _check_kind(self) -> None:
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{self.name} is an encoder-decoder; pseudo= needs a {self.kind}. "
                "An encoder-decoder is scored without it, with contexts= for its encoder."
            )
        if self.tokenizer.mask_token_id is None:
            raise ValueError(
                f"The tokenizer of {self.name} has no mask token; pseudo= needs a {self.kind}."
            )

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
