"""Logits -> the probability that some ids have together, such as those that begin a word.

A few rows at a time, as in output_layer.py.
"""

import torch

from ppleval.logits.output_layer import OutputRows, rows_at_once
from ppleval.logits.tensors import reduction_dtype


def share_nll(outputs: OutputRows, ids: torch.Tensor, dtype: str | torch.dtype) -> torch.Tensor:
    """Negative logarithm of the probability of all of `ids` together, in nats, for each row.

        nll = logsumexp(scores, -1) - logsumexp(scores[ids], -1)

    Args:
        outputs: the rows; their targets are not looked at.
        ids: (k,) int64, each once, in [0, vocab_size).
        dtype: "float32" or "float64", the precision of the reduction; float64 logits stay float64.

    Returns:
        (n,), on the device of the rows; inf where none of the ids can come, or there are none.
    """
    device, precision = outputs.rows.device, reduction_dtype(dtype)
    blocks = []
    for block in outputs.positions.split(rows_at_once(outputs.vocab_size, device)):
        logits = outputs.to_logits(outputs.rows[block])
        logits = logits.to(torch.promote_types(logits.dtype, precision))
        scores = outputs.transform.apply_(logits)
        # Both logarithms are then near 0, so that their difference has no more than their error.
        scores.sub_(scores.amax(1, keepdim=True))
        of_ids = scores.index_select(1, ids.to(scores.device))
        blocks.append((scores.logsumexp(1) - of_ids.logsumexp(1)).to(device))
    return torch.cat(blocks)
