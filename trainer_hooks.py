"""The two functions that a transformers Trainer takes to report the corpus perplexity.

The first turns the logits of a batch into two numbers for each example, on the device where they
are, before Trainer gathers and keeps anything; the second adds up what was gathered. accelerate,
which every Trainer has, is imported where it is used: the other parts of the metric do without.
"""

import warnings

import numpy as np
import torch

from .batches import reduce_batch
from .nll import IGNORE_INDEX
from .options import Options
from .totals import NllTotals


class TrainerHooks:
    """`preprocess_logits_for_metrics` and `compute_metrics` of one Trainer.

    With `batch_eval_metrics=True` sums are kept from one batch to the next, here and not in the
    metric, and dropped after the last batch or when a batch raises.

    Args:
        options: what is scored. Labels of -100 never are, because Trainer pads with them.
    """

    def __init__(self, options: Options):
        self._options = options.replace(ignore_index=(*options.ignore_index, IGNORE_INDEX))
        self._start(None)

    def _start(self, evaluation: tuple | None) -> None:
        self._evaluation = evaluation
        self._totals = NllTotals()
        self._num_reduced = 0  # examples that this process has turned into sums
        self._num_examples = 0  # of which the sums came back, from all processes

    def preprocess_logits_for_metrics(self, logits, labels) -> torch.Tensor:
        """nll_sum (nats) and number of scored tokens of each example: (B, 2), float64.

        Args:
            logits: (B, T, V), or a tuple of outputs that holds them.
            labels: (B, T), or a tuple of which they are the first.

        Raises:
            TypeError, ValueError: no logits, no labels, or ones that do not fit.
        """
        if self._evaluation != (evaluation := _current_evaluation()):
            self._start(evaluation)
        try:
            logits, labels = _find_logits(logits), _find_labels(labels)
            if logits.shape[:2] != labels.shape:
                raise ValueError(
                    f"The logits have the shape {tuple(logits.shape)}, the labels "
                    f"{tuple(labels.shape)}; they must be (B, T, V) and (B, T). A model that adds "
                    "positions of its own, as prompt tuning does, needs labels for them: -100."
                )
            sums = reduce_batch(logits, labels, None, self._options)
        except (TypeError, ValueError) as error:
            self._start(None)
            if "predictions" in str(error) or "references" in str(error):
                error.add_note("predictions are the logits of a batch, references its labels.")
            raise
        rows = torch.from_numpy(np.stack([sums.nll_sums, sums.weight_sums], axis=1))
        rows[_first_repeated_row(len(rows)) :] = 0
        self._num_reduced += len(rows)
        # A gather needs them on the device. MPS, which has no float64, runs one process only.
        return rows if logits.device.type == "mps" else rows.to(logits.device)

    def compute_metrics(
        self, eval_prediction, compute_result: bool = True
    ) -> dict[str, float | int]:
        """The result, without its signature: what a Trainer logs are numbers.

        Args:
            eval_prediction: its `predictions` are what the other hook returned, gathered.
            compute_result: False for all but the last batch, with `batch_eval_metrics=True`.

        Raises:
            ValueError: predictions that are not from the other hook.
        """
        rows = _gathered_rows(eval_prediction.predictions)
        undefined = np.isnan(rows[:, 0]).nonzero()[0]
        if len(undefined) > 0:
            warnings.warn(
                f"The logits of example {self._num_examples + undefined[0]} hold NaN or +inf where "
                "they are scored, so the perplexity is NaN.",
                stacklevel=2,
            )
        nll_sums, num_tokens = rows[:, 0], rows[:, 1]
        self._totals += NllTotals.from_sequences(nll_sums, num_tokens, int(num_tokens.sum()))
        self._num_examples += len(rows)
        if not compute_result:
            return {}
        totals = self._totals
        if self._num_examples < self._num_reduced:
            self._warn_of_dropped_examples()
        self._start(None)
        if totals.num_tokens == 0:
            warnings.warn(
                "No token was scored, so the perplexity is NaN: every label is ignored.",
                stacklevel=2,
            )
        return totals.result()

    def _warn_of_dropped_examples(self) -> None:
        """Trainer drops what accelerate repeated, and that is never right on one process."""
        from accelerate.state import PartialState

        if PartialState().num_processes == 1:
            warnings.warn(
                f"Trainer passed on {self._num_examples} of {self._num_reduced} examples that were "
                "evaluated; the perplexity is of these. It counts by the dataloader that "
                "accelerate has prepared last: prepare that of get_eval_dataloader, too, and let "
                "its collator make one row of each example.",
                stacklevel=3,
            )


def _current_evaluation() -> tuple:
    """Tells one evaluation from the next, also where the first was interrupted.

    The dataloader is another one, or with persistent workers the same one again; then accelerate
    still counts the pass that was not finished.
    """
    from accelerate.state import GradientState

    state = GradientState()
    return id(state.active_dataloader), len(state.dataloader_references)


def _first_repeated_row(num_rows: int) -> int:
    """Where the rows begin that only fill up this process's part of the last batch.

    accelerate repeats examples so that all processes have equally many. Trainer drops them when it
    gathers (`gather_for_metrics`), but Seq2SeqTrainer does not (`gather`).
    """
    from accelerate.state import GradientState, PartialState

    state = GradientState()
    if not state.end_of_dataloader:
        return num_rows
    dataloader, process = state.active_dataloader, PartialState()
    if process.num_processes == 1:
        return num_rows
    if type(dataloader.dataset).__name__ == "IterableDatasetShard":
        warnings.warn(
            "Each process reads the evaluation stream by itself, so accelerate may have repeated "
            "examples to fill up the last batches, and these count. Let one process read it for "
            'all: accelerator_config={"dispatch_batches": True}.',
            stacklevel=3,
        )
    if state.remainder <= 0:
        return num_rows
    # A stream that one process reads for all does not know the size of its batches.
    batch_size = getattr(dataloader, "total_batch_size", num_rows * process.num_processes)
    if num_rows * process.num_processes != batch_size:
        warnings.warn(
            f"The last batch of this process has {num_rows} rows, where accelerate counts "
            f"{batch_size} examples for {process.num_processes} processes, so "
            "examples that it repeated to fill up the batch may count. A collator must make one "
            "row of each example.",
            stacklevel=3,
        )
        return num_rows
    return max(0, state.remainder - process.process_index * num_rows)


def _find_logits(outputs) -> torch.Tensor:
    """The logits among the outputs of a model, where hidden states or an aux_loss may be, too."""
    candidates = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    for tensor in candidates:
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 3 and tensor.is_floating_point():
            return tensor
    found = [
        f"{tuple(tensor.shape)} {tensor.dtype}"
        if isinstance(tensor, torch.Tensor)
        else type(tensor).__name__
        for tensor in candidates
    ]
    raise ValueError(
        f"No logits (B, T, V) among the model's outputs, which are {', '.join(found) or 'none'}. "
        'Keep them: in TRL with loss_type="nll", in Seq2SeqTrainer with '
        "predict_with_generate=False, everywhere with prediction_loss_only=False."
    )


def _find_labels(labels) -> torch.Tensor:
    if isinstance(labels, (tuple, list)) and len(labels) > 0:
        labels = labels[0]
    if not isinstance(labels, torch.Tensor):
        raise ValueError(
            "The evaluation set has no labels, or not all that args.label_names lists. For a "
            "causal model they are the input ids, as DataCollatorForLanguageModeling(tokenizer, "
            "mlm=False) gives them."
        )
    return labels


def _gathered_rows(predictions) -> np.ndarray:
    """(N, 2) float64, from one array, or with eval_do_concat_batches=False from a list of them."""
    parts = predictions if isinstance(predictions, list) else [predictions]
    parts = [part.cpu() if isinstance(part, torch.Tensor) else part for part in parts]
    for part in parts:
        if np.ndim(part) != 2 or np.shape(part)[1] != 2:
            raise ValueError(
                "compute_metrics takes the sums (N, 2) of preprocess_logits_for_metrics, got "
                f"{type(part).__name__} {np.shape(part)}. Give Trainer both: "
                "Trainer(..., **ppl.trainer_hooks()), and leave eval_use_gather_object=False."
            )
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])
