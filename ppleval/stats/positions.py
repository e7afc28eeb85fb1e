"""Results by position: tokens in buckets of how many tokens the model could see before them."""

from collections.abc import Sequence

import numpy as np

from ppleval.stats.totals import NllTotals, Result


def bucket_edges(positions: bool | Sequence[int], window: int) -> list[int]:
    """The least context of each bucket; none for False.

    Args:
        positions: True for 0, 1, 2-3, 4-7 and so on up to the window; or the edges themselves.
        window: tokens that the model reads at once, in tokens.
    """
    if positions is False:
        return []
    if positions is True:
        return [0, *(2**power for power in range(window.bit_length()))]
    return list(positions)


def bucket_labels(edges: Sequence[int], window: int) -> list[str]:
    """The contexts of each bucket, such as "4-7"."""
    lasts = [*(edge - 1 for edge in edges[1:]), max(window, edges[-1])]
    return [
        str(first) if first == last else f"{first}-{last}"
        for first, last in zip(edges, lasts, strict=True)
    ]


def bucket_sums(
    contexts: np.ndarray, nll: np.ndarray, weights: np.ndarray, edges: Sequence[int]
) -> np.ndarray:
    """(buckets, 3): sum of weighted nll in nats, of weights, and number of tokens with a weight.

    Args:
        contexts: (n,) how many tokens the model could see before each.
        nll, weights: (n,).
        edges: ascending, the first is 0.
    """
    bucket = np.searchsorted(edges, contexts, side="right") - 1
    counted = weights > 0  # 0 inf is NaN
    columns = nll[counted] * weights[counted], weights[counted], np.ones(counted.sum())
    return np.stack(
        [np.bincount(bucket[counted], column, len(edges)) for column in columns], axis=1
    )


def position_results(buckets: Sequence[NllTotals], edges: Sequence[int], window: int) -> Result:
    """The result of each bucket, by its label."""
    labels = bucket_labels(edges, window)
    return {label: totals.result() for label, totals in zip(labels, buckets, strict=True)}
