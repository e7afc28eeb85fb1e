# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The evaluate.Metric: what users call, and the result they get. The arithmetic is in its siblings.

evaluate's loader copies only the siblings that this file itself imports, so all are named here,
and no comment may stand behind such an import.
"""

import inspect
import warnings
from dataclasses import asdict, fields

import datasets
import evaluate

from .batches import reduce_batch
from .nll import token_nll
from .options import Options
from .totals import NllTotals

_DESCRIPTION = """\
Perplexity: exp of the mean negative log-likelihood that a language model gives to the tokens of a \
corpus. It takes logits or probabilities, with masks, weights and the causal shift, and gives the \
corpus value with a 95% confidence interval. The range is [1, inf); lower is better.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: logits of shape (B, T, V): B sequences, T tokens, a vocabulary of V. Tensors on any
        device, arrays, nested lists, or B sequences of unequal length, each (T_i, V).
    references: token ids of shape (B, T), or B sequences of T_i ids.
    sample_weight: weights (B, T), or (B,) for one per sequence; fractions are allowed. Default 1.

Options, here and at `evaluate.load`:
    from_logits (bool): predictions are scores before softmax, or log-probabilities (True, the
        default), or probabilities, which are divided by their row sum (False).
    ignore_index (int, several, or None): references with such an id are not scored. Default -100.
    mask_token_id (int or None): one more id that is not scored, such as the padding. Default None.
    shift (bool): True if references are the input ids of a causal model: position t of the logits
        is then scored against id t+1. Default False.
    dtype (str): precision of the reduction, "float32" or "float64". Default "float32".

Returns:
    perplexity: exp(mean_nll), over all scored tokens of the corpus.
    mean_nll: nats per token.
    bits_per_token: mean_nll / ln 2.
    perplexity_ci_low, perplexity_ci_high: its 95% confidence interval, with each sequence as one
        independent sample; NaN for fewer than two sequences.
    num_tokens, num_sequences: how many were scored.
    signature: every setting that changes the number.

Examples:

    A uniform guess over four tokens has perplexity 4:

    >>> import evaluate, numpy as np
    >>> ppl = evaluate.load("perplexity.py")
    >>> result = ppl.compute(predictions=np.zeros((2, 3, 4)), references=np.zeros((2, 3), int))
    >>> round(result["perplexity"], 6), result["num_tokens"]
    (4.0, 6)

    Batches add up; what is -100 is not scored:

    >>> logits = np.array([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    >>> ppl.add_batch(predictions=logits, references=[[0, 1]])
    >>> ppl.add_batch(predictions=logits, references=[[2, -100]])
    >>> {name: value if isinstance(value, int) else round(value, 4)
    ...  for name, value in ppl.compute().items() if name != "signature"}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'perplexity': 2.7461, 'mean_nll': 1.0102, 'bits_per_token': 1.4574,
     'perplexity_ci_low': 0.5509, 'perplexity_ci_high': 13.6884,
     'num_tokens': 3, 'num_sequences': 2}

    Probabilities, as keras_hub takes them:

    >>> rng = np.random.RandomState(42)
    >>> target, probabilities = rng.randint(10, size=[2, 5]), rng.uniform(size=(2, 5, 10))
    >>> probabilities /= probabilities.sum(-1, keepdims=True)
    >>> result = ppl.compute(predictions=probabilities, references=target, from_logits=False)
    >>> round(result["perplexity"], 4)
    14.3525
"""

_CITATION = """\
@article{jelinek1977perplexity,
  author  = {Jelinek, F. and Mercer, R. L. and Bahl, L. R. and Baker, J. K.},
  title   = {Perplexity---a measure of the difficulty of speech recognition tasks},
  journal = {The Journal of the Acoustical Society of America},
  volume  = {62},
  number  = {S1},
  pages   = {S63},
  year    = {1977}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Perplexity(evaluate.Metric):
    """Corpus perplexity from logits or probabilities; see `compute`.

    Every batch is reduced to a few sums in the call that brings it, so logits are never stored and
    never pass through Arrow, and a single process writes no file. A call that raises changes
    nothing that was accumulated.
    """

    token_nll = staticmethod(token_nll)

    def __init__(self, *args, **kwargs):
        # What is no keyword of evaluate's is an option. evaluate itself swallows the keywords that
        # it does not know; a misspelt option must not vanish like that.
        own = inspect.signature(evaluate.Metric.__init__).parameters
        self._options = Options().replace(**{k: v for k, v in kwargs.items() if k not in own})
        super().__init__(*args, **{k: v for k, v in kwargs.items() if k in own})
        self.reset()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # One example, as evaluate has it: the logits (T, V) and the ids (T,) of a sequence.
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
            license="Apache-2.0",
            reference_urls=["https://huggingface.co/docs/transformers/perplexity"],
        )

    def reset(self) -> None:
        """Forget what was accumulated."""
        self._totals = NllTotals()
        self._num_batches = 0  # tells an empty run from one in which nothing was scored
        self._num_examples = 0
        self._warned_of_nan = False

    def __len__(self) -> int:
        """Number of sequences accumulated since the last `compute` or `reset`."""
        return self._num_examples

    def add_batch(self, *, predictions=None, references=None, sample_weight=None) -> None:
        """Accumulate a batch of sequences.

        Raises:
            TypeError, ValueError: input of the wrong type, shape or range; nothing is added.
        """
        self._accumulate(*self._reduce(predictions, references, sample_weight, self._options))

    def add(self, *, prediction=None, reference=None, sample_weight=None) -> None:
        """Accumulate one sequence: logits (T, V), ids (T,), and a weight or T of them.

        Raises:
            TypeError, ValueError: input of the wrong type, shape or range; nothing is added.
        """
        weights = None if sample_weight is None else [sample_weight]
        self.add_batch(predictions=[prediction], references=[reference], sample_weight=weights)

    def __call__(self, *, predictions=None, references=None, sample_weight=None) -> float:
        """Accumulate a batch, and return the perplexity of that batch alone.

        Raises:
            TypeError, ValueError: input of the wrong type, shape or range; nothing is added.
        """
        totals, num_examples = self._reduce(predictions, references, sample_weight, self._options)
        self._accumulate(totals, num_examples)
        return totals.perplexity

    def merge(self, other: "Perplexity") -> None:
        """Add what `other` has accumulated; `other` keeps it.

        Raises:
            TypeError: `other` is not of this class.
            ValueError: its options differ from these.
        """
        if not isinstance(other, Perplexity):
            raise TypeError(f"merge takes another Perplexity, got {type(other).__name__}.")
        if other._options != self._options:
            raise ValueError(
                "merge takes a metric with the same options; these are "
                f"{self._options.signature}, those of the other {other._options.signature}."
            )
        self._accumulate(other._totals, other._num_examples, other._num_batches)

    def compute(
        self, *, predictions=None, references=None, sample_weight=None, **options
    ) -> dict[str, float | int | str] | None:
        """Perplexity of what was accumulated and of the batch given here; then start afresh.

        Raises:
            TypeError, ValueError: input of the wrong type, shape or range, or nothing to compute
                from, or options that differ from those of the batches accumulated; what was
                accumulated stays as it was.
        """
        options = self._options.replace(**options)
        if self._num_batches and options != self._options:
            raise ValueError(
                f"compute was given other options ({options.signature}) than the batches added "
                f"before it ({self._options.signature}). Give the options to evaluate.load, or "
                "call reset() first."
            )
        totals, num_batches = self._totals, self._num_batches
        if predictions is not None or references is not None:
            batch_totals, _ = self._reduce(predictions, references, sample_weight, options)
            totals, num_batches = totals + batch_totals, num_batches + 1
        if self.num_process > 1:
            gathered = self._gather(totals, num_batches)
            if gathered is None:
                self.reset()
                return None
            totals, num_batches = gathered
        if num_batches == 0:
            raise ValueError(
                "Nothing to compute: pass predictions and references, or call add_batch first."
            )
        result = self._compute(totals=totals, options=options)
        self.reset()
        return result

    def _compute(self, *, totals: NllTotals, options: Options) -> dict[str, float | int | str]:
        if totals.num_tokens == 0:
            warnings.warn(
                "No token was scored, so the perplexity is NaN: every reference is ignored or has "
                "weight 0.",
                stacklevel=3,
            )
        ci_low, ci_high = totals.perplexity_interval
        return {
            "perplexity": totals.perplexity,
            "mean_nll": totals.mean_nll,
            "bits_per_token": totals.bits_per_token,
            "perplexity_ci_low": ci_low,
            "perplexity_ci_high": ci_high,
            "num_tokens": totals.num_tokens,
            "num_sequences": totals.num_sequences,
            "signature": options.signature,
        }

    def _reduce(
        self, predictions, references, sample_weight, options: Options
    ) -> tuple[NllTotals, int]:
        """The totals of a batch, and the number of its sequences."""
        sums = reduce_batch(predictions, references, sample_weight, options)
        if sums.nan_place is not None and not self._warned_of_nan:
            self._warned_of_nan = True
            sequence, position = sums.nan_place
            warnings.warn(
                f"predictions[{sequence}, {position}] holds NaN or +inf, or no probability at all: "
                "its nll is NaN, and so is the perplexity.",
                stacklevel=3,
            )
        totals = NllTotals.from_sequences(sums.nll_sums, sums.weight_sums, sums.num_tokens)
        return totals, len(sums.nll_sums)

    def _accumulate(self, totals: NllTotals, num_examples: int, num_batches: int = 1) -> None:
        self._totals += totals
        self._num_examples += num_examples
        self._num_batches += num_batches

    def _gather(self, totals: NllTotals, num_batches: int) -> tuple[NllTotals, int] | None:
        """The sums over all processes, on process 0; None on the others."""
        exchange = _Exchange(
            cache_dir=self._data_dir_root,
            num_process=self.num_process,
            process_id=self.process_id,
            experiment_id=self.experiment_id,
            timeout=self.timeout,
        )
        row = {**asdict(totals), "num_batches": num_batches}
        sums = exchange.compute(**{name: [value] for name, value in row.items()})
        if sums is None:
            return None
        num_batches = sums.pop("num_batches")
        return NllTotals(**sums), num_batches


class _Exchange(evaluate.Metric):
    """Carries one row of sums per process through evaluate's own file protocol.

    It stands below Perplexity because evaluate.load takes the first class of a module.
    """

    def _info(self) -> evaluate.MetricInfo:
        kinds = {field.name: field.type for field in fields(NllTotals)} | {"num_batches": int}
        features = {
            name: datasets.Value("int64" if kind is int else "float64")
            for name, kind in kinds.items()
        }
        return evaluate.MetricInfo(
            description="", citation="", features=datasets.Features(features)
        )

    def _compute(self, **columns):
        return {name: sum(values) for name, values in columns.items()}
