"""The two functions that make a transformers Trainer report the corpus perplexity.

The first turns the logits of a batch into a few sums for each row, on their device, before Trainer
gathers and keeps anything. The second adds up the gathered sums.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields, replace

import numpy as np
import torch

from ppleval.distributed import Processes
from ppleval.logits.inputs import reduce_batch
from ppleval.logits.options import Options
from ppleval.logits.tensors import IGNORE_INDEX, check_kind, ignored_ids
from ppleval.stats.totals import REASONS_OF_LOGITS, NllTotals, guessing_remark
from ppleval.trainer.batches import EvalBatch, EvalLoop
from ppleval.trainer.documents import document_lengths, may_share_rows
from ppleval.trainer.groups import EvaluatedGroups, check_loggable
from ppleval.trainer.outputs import LogitsFinder, find_labels, labels_are_input_ids, vocab_size_of
from ppleval.user_warnings import warn_user

# A row that crosses processes holds the fields of NllTotals, which merge by addition.
NUM_SUMS = len(fields(NllTotals))


@dataclass
class _Evaluation:
    """One pass over the evaluation set: its sums so far, and what puts them in doubt."""

    key: int | None  # of the loop that evaluates
    options: Options
    logits: LogitsFinder
    groups: EvaluatedGroups | None  # None if not asked for
    totals: NllTotals = field(default_factory=NllTotals)
    vocab_size: int = 0  # of the logits that this process has reduced
    num_batches: int = 0  # reduced by this process
    may_end: bool = True  # whether no batch may follow
    num_reduced: int = 0  # rows of the batches, over all processes
    num_gathered: int = 0  # rows that Trainer has passed on, from all processes
    repeats: str | None = None  # why some examples may count more than once
    loses_rows: bool = False  # whether Trainer may drop rows that are no repeats


class TrainerHooks:
    """`preprocess_logits_for_metrics` and `compute_metrics` of one Trainer.

    What belongs to one evaluation is known from the run of Trainer's `evaluation_loop` that calls
    the hooks, whatever other dataloaders begin or end meanwhile. So with `batch_eval_metrics=True`,
    where sums are kept from one batch to the next, no other evaluation gets them. Called by
    themselves, the hooks drop them after a call with `compute_result=True`.
    A batch that raises drops them, too.

    Args:
        options: what is scored. Labels of -100 never are, because Trainer pads with them.
        asks_model: whether the model that Trainer evaluates decides about `options.shift`.
        groups: one name for each example of the evaluation set, in its order.
        processes: those that read different examples; None for what accelerate says.

    Raises:
        ValueError: a name whose metrics would replace others.
    """

    def __init__(
        self,
        options: Options,
        asks_model: bool = False,
        groups: Sequence[str] | None = None,
        processes: Processes | None = None,
    ):
        if groups is not None:
            check_loggable(groups)
        ids = (*ignored_ids(options.ignore_index), IGNORE_INDEX)
        self._options = replace(options, ignore_index=ids)
        self._asks_model = asks_model
        self._groups = groups
        self._processes = processes
        self._has_told_of_guessing = False
        # By the key of the loop: an evaluation may begin inside of another.
        self._evaluations: dict[int | None, _Evaluation] = {}

    def _evaluation_of(self, loop: EvalLoop | None) -> _Evaluation:
        """The evaluation of a loop, or of hooks that are called by themselves."""
        key = None if loop is None else loop.key
        if key not in self._evaluations:
            options, model = self._options, None if loop is None else loop.trainer.model
            if self._asks_model and model is not None:
                options = replace(options, shift=labels_are_input_ids(model))
            groups = None if self._groups is None else EvaluatedGroups(self._groups)
            vocab_size = None if model is None else vocab_size_of(model)
            logits = LogitsFinder(options.unscored_ids, vocab_size)
            self._evaluations[key] = _Evaluation(key, options, logits, groups)
        return self._evaluations[key]

    def _drop_ended(self, loops: list[EvalLoop]) -> None:
        """Drop all evaluations but those of the loops that run, the innermost first."""
        running = {None, *(loop.key for loop in loops)}
        # subtle: the key of a loop that was interrupted may come again. Then this is batch 0.
        if loops and loops[0].step < self._evaluation_of(loops[0]).num_batches:
            running.remove(loops[0].key)
        self._evaluations = {key: e for key, e in self._evaluations.items() if key in running}

    def preprocess_logits_for_metrics(self, logits, labels) -> torch.Tensor:
        """The totals of each row: (B, 7), float64; first nll_sum (nats) and number of tokens.

        A row is one sequence. If a collator lays all documents of a batch into one row, each
        document is a sequence; their lengths are read from the dataset. If these are unknown, the
        interval is NaN. The nll_sum of a row is NaN if some of it may be repeated examples. With
        groups, (B, 8): the last is the place of the row's example, NaN if unknown.

        Args:
            logits: (B, T, V), or a tuple of outputs that holds them.
            labels: (B, T), or a tuple that begins with them.

        Raises:
            TypeError, ValueError: no logits, no labels, or ones that do not fit.
        """
        self._drop_ended(loops := EvalLoop.running())
        loop = loops[0] if loops else None
        evaluation = self._evaluation_of(loop)
        number = evaluation.num_batches if loop is None else loop.step
        batch = EvalBatch.read(number, loop, self._processes)
        try:
            labels = find_labels(labels)
            logits = evaluation.logits.find(logits, labels)
            totals = _reduce(logits, labels, batch, evaluation.options)
        except (TypeError, ValueError) as error:
            del self._evaluations[evaluation.key]
            if "predictions" in str(error) or "references" in str(error):
                error.add_note("predictions are the logits of a batch, references its labels.")
            raise
        evaluation.vocab_size = max(evaluation.vocab_size, logits.shape[-1])
        evaluation.num_batches += 1
        evaluation.may_end = batch.is_last is not False
        evaluation.num_reduced += len(totals) * batch.num_ranks
        evaluation.loses_rows |= batch.loses_rows(len(totals))
        evaluation.repeats = evaluation.repeats or batch.unseen_repeats()
        sums = np.array([astuple(row) for row in totals], dtype=np.float64).reshape(-1, NUM_SUMS)
        blank = np.array(astuple(NllTotals()), dtype=np.float64)
        if evaluation.groups is not None:
            places = evaluation.groups.places(batch, len(sums))
            sums, blank = np.column_stack([sums, places]), np.append(blank, math.inf)
        rows = torch.from_numpy(batch.counted_once(sums, blank))
        # A gather needs them on the device. MPS, which has no float64, runs one process only.
        return rows if logits.device.type == "mps" else rows.to(logits.device)

    def compute_metrics(
        self, eval_prediction, compute_result: bool | None = None
    ) -> dict[str, float | int]:
        """The result, without its signature, because a Trainer logs numbers.

        With `batch_eval_metrics=True` it is that of all batches so far, and empty if more are to
        come. If that is unknown it is not empty: Trainer reports the last that it gets.

        Args:
            eval_prediction: its `predictions` are what the other hook returned, gathered.
            compute_result: given with `batch_eval_metrics=True`: whether this is the last batch.
                Of a Trainer it says nothing, because Trainer asks the dataloader that began last.

        Raises:
            ValueError: predictions that are not from the other hook.
        """
        loop = next(iter(EvalLoop.running()), None)
        evaluation = self._evaluation_of(loop)
        num_columns = NUM_SUMS + (evaluation.groups is not None)
        rows = _gathered_rows(eval_prediction.predictions, num_columns)
        _warn_of_nan(rows, evaluation.num_gathered)
        evaluation.totals += NllTotals.of(rows[:, :NUM_SUMS].sum(axis=0).tolist())
        if evaluation.groups is not None:
            evaluation.groups.add(rows)
        evaluation.num_gathered += len(rows)
        if compute_result is not None and loop is not None:
            compute_result = evaluation.may_end
        if compute_result is False:
            return {}
        if loop is None:
            del self._evaluations[None]
        totals = evaluation.totals
        if evaluation.repeats is not None:
            warn_user(f"{evaluation.repeats} The confidence interval is NaN.")
            totals = _without_interval(totals)
        if evaluation.loses_rows and evaluation.num_gathered < evaluation.num_reduced:
            _warn_of_dropped_rows(evaluation)
            totals = replace(totals, nll_sum=math.nan)
        if totals.num_tokens == 0:
            warn_user("No token was scored, so the perplexity is NaN: every label is ignored.")
        self._warn_of_guessing(totals, evaluation.vocab_size)
        by_group = {} if evaluation.groups is None else evaluation.groups.result()
        return totals.result() | by_group

    def _warn_of_guessing(self, totals: NllTotals, vocab_size: int) -> None:
        """Warn, on behalf of compute_metrics, of a perplexity above the size of the vocabulary;
        once, because the first evaluations of a training from scratch are all of that kind."""
        if self._has_told_of_guessing or vocab_size == 0:
            return
        guess_nll = math.log(vocab_size)
        remark = guessing_remark("perplexity", totals.mean_nll, guess_nll, REASONS_OF_LOGITS)
        if remark is not None:
            self._has_told_of_guessing = True
            warn_user(remark)


def _reduce(
    logits: torch.Tensor, labels: torch.Tensor, batch: EvalBatch, options: Options
) -> list[NllTotals]:
    """The totals of each of B rows; those of repeated examples are zero."""
    # A DTensor is refused: its rows would count once for each process that Trainer gathers of.
    check_kind(logits, "predictions")
    shared = may_share_rows(batch, len(labels))
    lengths = document_lengths(batch, labels) if shared else None
    if lengths is not None:
        documents = [part[0, : sum(lengths)].split(lengths) for part in (logits, labels)]
        sums = reduce_batch(documents[0], documents[1], None, options)
        return [_totals(sums.nll_sums, sums.weight_sums)]
    sums = reduce_batch(logits, labels, None, options)
    rows = [
        _totals(nll_sum, weight_sum)
        for nll_sum, weight_sum in zip(
            sums.nll_sums[:, None], sums.weight_sums[:, None], strict=True
        )
    ]
    if shared:
        rows = [_without_interval(row) for row in rows]
    num_real = batch.num_real_rows(len(rows))
    if num_real is None:
        return [NllTotals(nll_sum=math.nan)] * len(rows)
    return rows[:num_real] + [NllTotals()] * (len(rows) - num_real)


def _totals(nll_sums: np.ndarray, num_tokens: np.ndarray) -> NllTotals:
    return NllTotals.from_sequences(nll_sums, num_tokens, int(num_tokens.sum()))


def _without_interval(totals: NllTotals) -> NllTotals:
    """The totals without their squares: the perplexity stays, its interval is NaN."""
    return replace(totals, nll_sum_sq=math.nan, weight_sum_sq=math.nan, nll_weight_sum=math.nan)


def _gathered_rows(predictions, num_columns: int) -> np.ndarray:
    """(N, num_columns) float64, from one array or, with eval_do_concat_batches=False, a list."""
    parts = predictions if isinstance(predictions, list) else [predictions]
    parts = [part.cpu() if isinstance(part, torch.Tensor) else part for part in parts]
    for part in parts:
        if np.ndim(part) != 2 or np.shape(part)[1] != num_columns:
            raise ValueError(
                f"compute_metrics takes the sums (N, {num_columns}) of "
                f"preprocess_logits_for_metrics, got {type(part).__name__} {np.shape(part)}. "
                "Give Trainer both: Trainer(..., **ppl.trainer_hooks()), and leave "
                "eval_use_gather_object=False."
            )
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])


def _warn_of_nan(rows: np.ndarray, num_before: int) -> None:
    """Warn, on behalf of compute_metrics, of sums that are NaN; `num_before` rows came before."""
    nll_sums, num_tokens, squares = rows[:, 0], rows[:, 1], rows[:, 2]
    undefined = (np.isnan(nll_sums) & (num_tokens > 0)).nonzero()[0]
    if len(undefined) > 0:
        warn_user(
            f"The logits of example {num_before + undefined[0]} hold NaN or +inf where they are "
            "scored, so the perplexity is NaN."
        )
    if (np.isnan(nll_sums) & (num_tokens == 0)).any():
        warn_user(
            "accelerate has repeated examples to fill up the last batches. Which ones is unknown, "
            "because the rows of a batch are not examples, so the perplexity is NaN. Set "
            "per_device_eval_batch_size=1, or let the collator make one row of each example."
        )
    if (np.isnan(squares) & ~np.isnan(nll_sums)).any():
        warn_user(
            "A row holds several documents, and where each begins is not known, so the confidence "
            "interval is NaN. It is known if the dataset has a length and input_ids and is read "
            "in its order, the collator makes one row of a batch, and the labels are -100 where a "
            "document begins."
        )


def _warn_of_dropped_rows(evaluation: _Evaluation) -> None:
    warn_user(
        f"Trainer passed on {evaluation.num_gathered} of {evaluation.num_reduced} rows that were "
        "evaluated, so the perplexity is NaN. It counts by the dataloader of accelerate that began "
        "last, such as that of the training: return accelerator.prepare(dataloader) from "
        "get_eval_dataloader, and begin no other during an evaluation."
    )
