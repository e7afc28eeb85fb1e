"""What a Trainer passes to its hooks -> the logits and the labels, and how these fit together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ppleval.logits.tensors import is_scored

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LogitsFinder:
    """Finds the logits among a model's outputs, whose names Trainer does not pass on.

    They are the floats (B, T, V) that fit labels (B, T). Other outputs may fit, too, such as
    encoder or hidden states of equal length; the logits have a column for each scored label. Once a
    batch has told their place among the outputs, it holds for the whole evaluation.

    Args:
        unscored_ids: labels that are not scored.
        vocab_size: that of the model; None if it is not known.
    """

    def __init__(self, unscored_ids: Sequence[int], vocab_size: int | None = None):
        self._unscored_ids = unscored_ids
        self._vocab_size = vocab_size
        self._place: int | None = None

    def find(self, outputs, labels: torch.Tensor) -> torch.Tensor:
        """The logits (B, T, V) that belong to labels (B, T).

        Raises:
            ValueError: no output or several may be the logits, or they do not fit the labels.
        """
        candidates = _float_outputs(outputs)
        fitting = {i: c for i, c in candidates.items() if c.shape[:2] == labels.shape}
        if not fitting:
            raise ValueError(_misfit(next(iter(candidates.values())), labels))
        if self._place not in fitting:
            if len(fitting) > 1:
                scored = labels[is_scored(labels, self._unscored_ids)]
                if len(scored) == 0:  # any of them gives a sum of 0
                    return next(iter(fitting.values()))
                fitting = _wide_enough(fitting, int(scored.max()))
            self._place = next(iter(fitting))
        self._check_width(logits := fitting[self._place], labels)
        return logits

    def _check_width(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Raises ValueError for hidden states, which are no logits of the model's vocabulary."""
        width = logits.shape[2]
        if self._vocab_size is None or width >= self._vocab_size:
            return
        scored = labels[is_scored(labels, self._unscored_ids)]
        if len(scored) > 0 and int(scored.max()) >= width:
            raise ValueError(
                f"The model's output {tuple(logits.shape)} has {width} numbers for each token, and "
                f"its vocabulary {self._vocab_size} ids: these are hidden states, no logits "
                "(B, T, V). Evaluate a model with a language-model head, and let its forward "
                "return the logits."
            )


def find_labels(labels) -> torch.Tensor:
    """The labels, which are the first of several tensors.

    Raises:
        ValueError: no labels.
    """
    if isinstance(labels, (tuple, list)) and len(labels) > 0:
        labels = labels[0]
    if not isinstance(labels, torch.Tensor):
        raise ValueError(
            "The evaluation set has no labels, or not all that args.label_names lists. For a "
            "causal model they are the input ids, as DataCollatorForLanguageModeling(tokenizer, "
            "mlm=False) gives them."
        )
    return labels


def labels_are_input_ids(model: nn.Module) -> bool:
    """Whether a label stands where the model reads it, so that it is predicted one place before.

    Those of an encoder-decoder and of a masked model stand where they are predicted. Of a model of
    no class that transformers knows, they are taken for input ids.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    inner = _of_transformers(model)
    if inner is None:
        return True
    if getattr(inner.config, "is_encoder_decoder", False):
        return False
    # XLM has one class for both kinds.
    is_causal = _is_made_by(MODEL_FOR_CAUSAL_LM_MAPPING, inner)
    return is_causal or not _is_made_by(MODEL_FOR_MASKED_LM_MAPPING, inner)


def vocab_size_of(model: nn.Module) -> int | None:
    """How many ids a model of transformers predicts, as its configuration says; None if unknown."""
    return getattr(getattr(_of_transformers(model), "config", None), "vocab_size", None)


def _of_transformers(model: nn.Module) -> "PreTrainedModel | None":
    """The model itself, which adapters, torch.compile and the like wrap."""
    from transformers import PreTrainedModel

    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)


def _is_made_by(mapping, model: nn.Module) -> bool:
    """Whether the model is of the class that an AutoModel's mapping has for its configuration."""
    return isinstance(model, mapping.get(type(model.config), ()))


def _float_outputs(outputs) -> dict[int, torch.Tensor]:
    """The tensors that may be logits, by their places; hidden_states and the like are tuples."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    candidates = {
        i: tensor
        for i, tensor in enumerate(outputs)
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 3 and tensor.is_floating_point()
    }
    if candidates:
        return candidates
    found = [
        f"{tuple(tensor.shape)} {tensor.dtype}"
        if isinstance(tensor, torch.Tensor)
        else type(tensor).__name__
        for tensor in outputs
    ]
    raise ValueError(
        f"No logits (B, T, V) among the model's outputs, which are {', '.join(found) or 'none'}. "
        'Keep them: in TRL 1.7 to 1.14 with loss_type="nll", in Seq2SeqTrainer with '
        "predict_with_generate=False, everywhere with prediction_loss_only=False."
    )


def _wide_enough(candidates: dict[int, torch.Tensor], label: int) -> dict[int, torch.Tensor]:
    """The one candidate with a column for the label; all of them if there is none."""
    wide = {i: c for i, c in candidates.items() if c.shape[2] > label}
    if len(wide) > 1:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in wide.values())
        raise ValueError(
            f"Of the model's outputs, those of the shapes {shapes} may all be the logits "
            "(B, T, V). Let Trainer leave the others out: list their names, and past_key_values, "
            "in model.config.keys_to_ignore_at_inference. A model that returns a tuple must return "
            "the loss and the logits only."
        )
    return wide or candidates


def _misfit(logits: torch.Tensor, labels: torch.Tensor) -> str:
    message = (
        f"The logits have the shape {tuple(logits.shape)}, the labels {tuple(labels.shape)}; they "
        "must be (B, T, V) and (B, T)."
    )
    if labels.dim() != 2 or len(labels) != len(logits):
        return f"{message} Both need one row for each example of the batch."
    more = logits.shape[1] - labels.shape[1]
    if more < 0:
        return (
            f"{message} {-more} positions have no logits: let the model return those of all "
            "positions, without logits_to_keep, and cut or shift neither; the hooks shift by "
            "themselves."
        )
    return (
        f"{message} If the labels were shifted beforehand, leave that to the hooks. A model that "
        "puts positions of its own in front, as prompt tuning does, gets its labels as they are, "
        f'and the hook gets {more} more, of -100: hook = hooks["preprocess_logits_for_metrics"]; '
        "Trainer(..., preprocess_logits_for_metrics=lambda logits, labels: hook(logits, "
        f"torch.nn.functional.pad(labels, ({more}, 0), value=-100)))."
    )
