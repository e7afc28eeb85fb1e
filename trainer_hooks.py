"""The two functions that a transformers Trainer takes to report the corpus perplexity.

The first turns the logits of a batch into a few sums for each row, on the device where they are,
before Trainer gathers and keeps anything; the second adds up what was gathered. accelerate and
transformers, which every Trainer has, are imported where they are used: the other parts of the
metric do without.
"""

import math
import warnings
from collections.abc import Mapping, Sized
from dataclasses import astuple, fields, replace
from itertools import chain
from operator import index

import numpy as np
import torch
from torch.utils.data import BatchSampler, SequentialSampler

from .batches import reduce_batch
from .nll import IGNORE_INDEX
from .options import Options
from .tensors import is_scored
from .totals import NllTotals

# The columns of a row that crosses processes: its totals, which merge by addition.
FIELDS = fields(NllTotals)


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
        self._logits_at = None  # their place among the outputs, once a batch has told it
        self._num_batches = 0  # that this process has turned into sums
        self._num_reduced = 0  # rows of these
        self._repeats = None  # why examples may count more than once
        self._drops_rows = False  # whether accelerate cuts a batch of one process
        self._num_examples = 0  # rows of which the sums came back, from all processes

    def preprocess_logits_for_metrics(self, logits, labels) -> torch.Tensor:
        """The totals of each row: (B, 7), float64; first nll_sum (nats) and number of tokens.

        A row is one sequence, except where a collator lays all documents of a batch into one row:
        there each document is one. Their lengths are read from the dataset. Where they are not to
        be had, the interval is NaN, and so is the nll_sum of a row that may hold repeated examples.

        Args:
            logits: (B, T, V), or a tuple of outputs that holds them.
            labels: (B, T), or a tuple of which they are the first.

        Raises:
            TypeError, ValueError: no logits, no labels, or ones that do not fit.
        """
        if self._evaluation != (evaluation := _current_evaluation()):
            self._start(evaluation)
        try:
            labels = _find_labels(labels)
            logits = self._find_logits(logits, labels)
            if logits.shape[:2] != labels.shape:
                raise ValueError(
                    f"The logits have the shape {tuple(logits.shape)}, the labels "
                    f"{tuple(labels.shape)}; they must be (B, T, V) and (B, T). A model that adds "
                    "positions of its own, as prompt tuning does, needs labels for them: -100."
                )
            rows = [astuple(totals) for totals in self._reduce(logits, labels)]
            rows = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(FIELDS))
        except (TypeError, ValueError) as error:
            self._start(None)
            if "predictions" in str(error) or "references" in str(error):
                error.add_note("predictions are the logits of a batch, references its labels.")
            raise
        self._num_batches += 1
        self._num_reduced += len(rows)
        self._drops_rows |= _drops_rows(len(rows))
        self._repeats = self._repeats or _unseen_repeats()
        # A gather needs them on the device. MPS, which has no float64, runs one process only.
        return rows if logits.device.type == "mps" else rows.to(logits.device)

    def _find_logits(self, outputs, labels: torch.Tensor) -> torch.Tensor:
        """The logits among a model's outputs, whose names Trainer does not pass on.

        They are the floats (B, T, V) that fit labels (B, T). Of several, such as encoder or hidden
        states of equal length, they are the one that has a column for each scored label. The batch
        that tells their place tells it for the whole evaluation.

        Raises:
            ValueError: no output, or more than one may be the logits.
        """
        candidates = _float_outputs(outputs)
        fitting = {at: c for at, c in candidates.items() if c.shape[:2] == labels.shape}
        if len(fitting) == 0:
            return next(iter(candidates.values()))
        if self._logits_at not in fitting:
            if len(fitting) > 1:
                scored = labels[is_scored(labels, self._options.unscored_ids)]
                if len(scored) == 0:
                    return next(iter(fitting.values()))
                wide = {at: c for at, c in fitting.items() if c.shape[2] > scored.max()}
                if len(wide) > 1:
                    raise ValueError(_several_logits(wide))
                fitting = wide or fitting
            self._logits_at = next(iter(fitting))
        return fitting[self._logits_at]

    def _reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> list[NllTotals]:
        """The totals of each of B rows, of which repeated examples are no part."""
        examples = _examples_of(self._num_batches)
        packed = _rows_hold_documents(len(labels), examples)
        lengths = _document_lengths(examples, labels) if packed else None
        if lengths is not None:
            documents = (part[0, : sum(lengths)].split(lengths) for part in (logits, labels))
            sums = reduce_batch(*documents, None, self._options)
            return [_totals(sums.nll_sums, sums.weight_sums)]
        sums = reduce_batch(logits, labels, None, self._options)
        rows = [
            _totals([nll_sum], [weight_sum])
            for nll_sum, weight_sum in zip(sums.nll_sums, sums.weight_sums, strict=True)
        ]
        if packed:
            rows = [_without_interval(row) for row in rows]
        num_real = _num_real_rows(len(rows))
        if num_real is None:
            return [NllTotals(nll_sum=math.nan)] * len(rows)
        return rows[:num_real] + [NllTotals()] * (len(rows) - num_real)

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
        self._warn_of_nan(rows)
        sums = rows.sum(axis=0)
        self._totals += NllTotals(*(f.type(value) for f, value in zip(FIELDS, sums, strict=True)))
        self._num_examples += len(rows)
        if not compute_result:
            return {}
        totals = self._totals
        if self._repeats is not None:
            warnings.warn(f"{self._repeats} The confidence interval is NaN.", stacklevel=2)
            totals = _without_interval(totals)
        if self._drops_rows and self._num_examples < self._num_reduced:
            self._warn_of_dropped_examples()
            totals = replace(totals, nll_sum=math.nan)
        self._start(None)
        if totals.num_tokens == 0:
            warnings.warn(
                "No token was scored, so the perplexity is NaN: every label is ignored.",
                stacklevel=2,
            )
        return totals.result()

    def _warn_of_nan(self, rows: np.ndarray) -> None:
        nll_sums, num_tokens, squares = rows[:, 0], rows[:, 1], rows[:, 2]
        undefined = (np.isnan(nll_sums) & (num_tokens > 0)).nonzero()[0]
        if len(undefined) > 0:
            warnings.warn(
                f"The logits of example {self._num_examples + undefined[0]} hold NaN or +inf where "
                "they are scored, so the perplexity is NaN.",
                stacklevel=3,
            )
        if (np.isnan(nll_sums) & (num_tokens == 0)).any():
            warnings.warn(
                "accelerate has repeated examples to fill up the last batches, and which ones "
                "cannot be told, because the rows of a batch are no examples: the perplexity is "
                "NaN. Set per_device_eval_batch_size=1, or let the collator make one row of each "
                "example.",
                stacklevel=3,
            )
        if (np.isnan(squares) & ~np.isnan(nll_sums)).any():
            warnings.warn(
                "A row holds several documents, and where each begins is not known, so the "
                "confidence interval is NaN. It is known where the dataset has a length and "
                "input_ids, is read in its order, the collator makes one row of a batch, and the "
                "labels are -100 where a document begins.",
                stacklevel=3,
            )

    def _warn_of_dropped_examples(self) -> None:
        warnings.warn(
            f"Trainer passed on {self._num_examples} of {self._num_reduced} examples that were "
            "evaluated, so the perplexity is NaN. It counts by the dataloader that accelerate has "
            "prepared last: prepare that of get_eval_dataloader, too, and let its collator make "
            "one row of each example.",
            stacklevel=3,
        )


def _accelerate() -> tuple:
    """Its place in a dataloader, and this process among others."""
    from accelerate.state import GradientState, PartialState

    return GradientState(), PartialState()


def _current_evaluation() -> tuple:
    """Tells one evaluation from the next, also where the first was interrupted.

    The dataloader is another one, or with persistent workers the same one again; then accelerate
    still counts the pass that was not finished.
    """
    state, _ = _accelerate()
    return id(state.active_dataloader), len(state.dataloader_references)


def _unseen_repeats() -> str | None:
    """Why some of several processes may have evaluated the same examples, where nothing tells."""
    state, process = _accelerate()
    if process.num_processes == 1:
        return None
    if state.active_dataloader is None:
        return (
            "accelerate has not prepared the evaluation dataloader, so each process may have "
            "evaluated all examples. Return accelerator.prepare(dataloader) from "
            "get_eval_dataloader."
        )
    dataset = getattr(state.active_dataloader, "dataset", None)
    if state.end_of_dataloader and type(dataset).__name__ == "IterableDatasetShard":
        return (
            "Each process reads the evaluation stream by itself, so accelerate may have repeated "
            "examples to fill up the last batches, and these count. Let one process read it for "
            'all: accelerator_config={"dispatch_batches": True}.'
        )
    return None


def _drops_rows(num_rows: int) -> bool:
    """Whether Trainer drops some of the rows of one process, where accelerate repeats none.

    `gather_for_metrics` takes rows for examples, of which the last batch has `remainder`.
    """
    state, process = _accelerate()
    at_end = process.num_processes == 1 and state.end_of_dataloader
    return at_end and 0 < state.remainder < num_rows


def _without_interval(totals: NllTotals) -> NllTotals:
    """The same perplexity; its interval, which needs the squares, is NaN."""
    return replace(totals, nll_sum_sq=math.nan, weight_sum_sq=math.nan, nll_weight_sum=math.nan)


def _totals(nll_sums, num_tokens) -> NllTotals:
    return NllTotals.from_sequences(nll_sums, num_tokens, int(np.sum(num_tokens)))


def _examples_of(batch: int) -> range | None:
    """This process's examples in `batch`, in the sampler's order; repeated ones lie behind its end.

    Returns:
        None where their number is not known.
    """
    state, process = _accelerate()
    outer = getattr(state.active_dataloader, "batch_sampler", None)
    sampler = getattr(outer, "batch_sampler", outer)  # accelerate's, of one process
    if type(sampler) is not BatchSampler:
        return None
    splits = any(getattr(a, "split_batches", False) for a in (outer, state.active_dataloader))
    size = sampler.batch_size // (process.num_processes if splits else 1)
    first = (batch * process.num_processes + process.process_index) * size
    # Only the last batch may have fewer.
    if size == 1 or not state.end_of_dataloader or getattr(outer, "even_batches", False):
        return range(first, first + size)
    dispatched = process.num_processes > 1 and outer is sampler
    if dispatched or not isinstance(sampler.sampler, Sized):
        return None
    return range(first, min(first + size, len(sampler.sampler)))


def _rows_hold_documents(num_rows: int, examples: range | None) -> bool:
    """Whether a row may hold several documents: several examples, or one that TRL has packed."""
    from transformers import DataCollatorWithFlattening

    collator = _collator()
    if num_rows == 1 and getattr(collator, "padding_free", False):
        return True
    if examples is None:
        return num_rows == 1 and isinstance(collator, DataCollatorWithFlattening)
    return num_rows < len(examples)


def _collator():
    collator = getattr(_accelerate()[0].active_dataloader, "collate_fn", None)
    return getattr(collator, "data_collator", collator)  # Trainer's wrapper drops columns


def _document_lengths(examples: range | None, labels: torch.Tensor) -> list[int] | None:
    """Tokens of each document of these examples, without those that accelerate repeated.

    Only the labels (B, T) of the batch reach the hooks, and they may be masked anywhere. So the
    examples are read once more, which transformers' and TRL's collators lay one behind the other.

    Returns:
        None where they are not to be had, or do not fit the labels.
    """
    if examples is None or len(labels) > 1:
        return None
    dataloader = _accelerate()[0].active_dataloader
    sampler = getattr(dataloader.batch_sampler, "batch_sampler", dataloader.batch_sampler)
    if not isinstance(sampler.sampler, SequentialSampler):
        return None
    dataset = dataloader.dataset
    try:  # A dataset of the user's need not bear a second reading.
        size = len(dataset)
        read = _read_again(dataset, [i % size for i in examples])
        documents = [_lengths_of(example) for example in read]
    except Exception:
        return None
    if not _fit([*chain(*documents)], labels[0]):
        return None
    return [*chain(*documents[: max(size - examples.start, 0)])]


def _read_again(dataset, indices: list[int]) -> list:
    """The examples, as a DataLoader reads them."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    return [dataset[i] for i in indices]


def _lengths_of(example: Mapping) -> list[int]:
    """Tokens of each document of an example; TRL's packing makes them several."""
    if getattr(_collator(), "padding_free", False) and "seq_lengths" in example:
        return [index(length) for length in example["seq_lengths"] if length > 0]
    return [len(example["input_ids"])]


def _fit(lengths: list[int], labels: torch.Tensor) -> bool:
    """Whether documents of these lengths fill a row: each begins with a label of -100.

    Behind them is nothing but padding.
    """
    starts, labels = np.cumsum([0, *lengths]), labels.cpu()
    if starts[-1] > len(labels):
        return False
    return bool((labels[starts[:-1]] == IGNORE_INDEX).all()) and bool(
        (labels[starts[-1] :] == IGNORE_INDEX).all()
    )


def _num_real_rows(num_rows: int) -> int | None:
    """The rows before those that only fill up this process's part of the last batch.

    accelerate repeats examples so that all processes have equally many. Trainer drops them when it
    gathers (`gather_for_metrics`), but Seq2SeqTrainer does not (`gather`).

    Returns:
        None where the rows are no examples and some, but not all of these are repeated.
    """
    state, process = _accelerate()
    if process.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return num_rows
    # Batches that one process reads for all do not tell their size.
    batch_size = getattr(
        state.active_dataloader, "total_batch_size", num_rows * process.num_processes
    )
    num_examples = batch_size // process.num_processes
    num_real = min(max(state.remainder - process.process_index * num_examples, 0), num_examples)
    if num_rows == num_examples or num_real == 0:
        return num_real
    # Trainer, which counts in examples, drops rows that are more than these.
    return num_rows if num_real == num_examples > num_rows else None


def _float_outputs(outputs) -> dict[int, torch.Tensor]:
    """The tensors that may be logits, by their places; hidden_states and the like are tuples."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    candidates = {
        at: tensor
        for at, tensor in enumerate(outputs)
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


def _several_logits(candidates: dict[int, torch.Tensor]) -> str:
    shapes = " and ".join(str(tuple(tensor.shape)) for tensor in candidates.values())
    return (
        f"Of the model's outputs, those of the shapes {shapes} may all be the logits (B, T, V). "
        "Let Trainer leave the others out: list their names, and past_key_values, in "
        "model.config.keys_to_ignore_at_inference. A model that returns a tuple must return the "
        "loss and the logits only."
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
    """(N, 7) float64, from one array, or with eval_do_concat_batches=False from a list of them."""
    parts = predictions if isinstance(predictions, list) else [predictions]
    parts = [part.cpu() if isinstance(part, torch.Tensor) else part for part in parts]
    for part in parts:
        if np.ndim(part) != 2 or np.shape(part)[1] != len(FIELDS):
            raise ValueError(
                f"compute_metrics takes the sums (N, {len(FIELDS)}) of "
                f"preprocess_logits_for_metrics, got {type(part).__name__} {np.shape(part)}. "
                "Give Trainer both: Trainer(..., **ppl.trainer_hooks()), and leave "
                "eval_use_gather_object=False."
            )
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])
