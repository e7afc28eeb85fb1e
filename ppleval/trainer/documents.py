"""Where the documents lie in a row that holds several of them. No logits, no sums.

DataCollatorWithFlattening and TRL lay documents one behind the other. Only the labels of such a row
reach the hooks, and a label may be masked anywhere, so the lengths are read from the dataset again.
"""

from collections.abc import Mapping
from itertools import chain
from operator import index

import numpy as np
import torch
from torch.utils.data import SequentialSampler

from ppleval.logits.tensors import IGNORE_INDEX
from ppleval.trainer.batches import EvalBatch


def may_share_rows(batch: EvalBatch, num_rows: int) -> bool:
    """Whether a row may hold several documents: several examples, or one that TRL has packed."""
    from transformers import DataCollatorWithFlattening

    if num_rows == 1 and _is_padding_free(batch):
        return True
    if batch.examples is None:
        return num_rows == 1 and isinstance(batch.collator, DataCollatorWithFlattening)
    return num_rows < len(batch.examples)


def document_lengths(batch: EvalBatch, labels: torch.Tensor) -> list[int] | None:
    """Tokens of each document in the batch, without the documents that accelerate has repeated.

    Args:
        labels: (B, T), of the batch.

    Returns:
        None if the dataset does not tell them, or if they do not fit the labels.
    """
    examples, sampler = batch.examples, batch.sampler
    if examples is None or sampler is None or len(labels) > 1:
        return None
    if not isinstance(sampler.sampler, SequentialSampler):
        return None
    try:  # Some datasets cannot be read twice.
        size = len(batch.dataset)
        documents = [
            _lengths_in(example, _is_padding_free(batch))
            for example in _read(batch.dataset, [i % size for i in examples])
        ]
    except Exception:
        return None
    if not _fit([*chain(*documents)], labels[0]):
        return None
    return [*chain(*documents[: max(size - examples.start, 0)])]


def _is_padding_free(batch: EvalBatch) -> bool:
    """Whether the collator is TRL's that lays the examples of a batch into one row."""
    return bool(getattr(batch.collator, "padding_free", False))


def _read(dataset, indices: list[int]) -> list[Mapping]:
    """The examples, read as a DataLoader reads them."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    return [dataset[i] for i in indices]


def _lengths_in(example: Mapping, padding_free: bool) -> list[int]:
    """Tokens of each document in an example; TRL's packing lays several into one."""
    if padding_free and "seq_lengths" in example:
        return [index(length) for length in example["seq_lengths"] if length > 0]
    return [len(example["input_ids"])]


def _fit(lengths: list[int], labels: torch.Tensor) -> bool:
    """Whether each document begins with a label of -100, with only padding behind the last."""
    starts, labels = np.cumsum([0, *lengths]), labels.cpu()
    if starts[-1] > len(labels):
        return False
    return bool((labels[starts[:-1]] == IGNORE_INDEX).all()) and bool(
        (labels[starts[-1] :] == IGNORE_INDEX).all()
    )
