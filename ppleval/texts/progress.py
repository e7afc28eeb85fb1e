"""The progress of scoring: a bar for people, or a function that is called with numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm.auto import tqdm


class Progress:
    """A bar with the perplexity so far (True), nothing (False), or calls of a function.

    The function gets the number of tokens scored and their total. How many tokens a text has is
    known once its portion is read, so the total is an estimate until then: it is such that tokens
    over total is the part of the texts that is done, which only grows, and is 1 at the end. Without
    a number of texts the bar has no total, and that of the function is of what was read so far.

    Args:
        shown: which of these.
        num_texts: how many texts there are, in all portions; None if that is not known.
    """

    def __init__(self, shown: bool | Callable[[int, int], None], num_texts: int | None = None):
        self._tell = shown if callable(shown) else None
        # Left out where it is shown, so that TQDM_DISABLE counts.
        hidden: dict[str, Any] = {} if shown is True else {"disable": True}
        self._bar = tqdm(unit="tok", desc="perplexity", **hidden)
        self._num_texts = num_texts
        self._texts_before, self._texts = 0, 0  # those of earlier portions, and of this one
        self._before, self._expected = 0, 0  # tokens, likewise
        self._done = 0
        self._shown = 0, 0  # done and total
        self._nll_sum, self._weight_sum = 0.0, 0.0

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def begin(self, num_texts: int, num_tokens: int) -> None:
        """Begin a portion of texts.

        Args:
            num_texts: how many there are, also those that other processes score.
            num_tokens: how many of their tokens are scored here.
        """
        self._texts_before += self._texts
        self._texts = num_texts
        self._before, self._expected = self._done, num_tokens

    def add(self, nll: np.ndarray, weight: float) -> None:
        """Count these tokens, which are scored now; `show` follows."""
        self._done += len(nll)
        if not self._bar.disable:
            self._nll_sum += float(nll.sum(dtype=np.float64)) * weight
            self._weight_sum += len(nll) * weight

    def show(self) -> None:
        """Show what was added; once for a batch, because it takes longer than to add a text."""
        total = self._estimated_total()
        self._shown = self._done, total
        if not self._bar.disable:
            with np.errstate(all="ignore"):
                perplexity = np.exp(np.divide(self._nll_sum, self._weight_sum))
            self._bar.set_postfix(perplexity=f"{perplexity:.4g}", refresh=False)
            self._bar.total = None if self._num_texts is None else total
            self._bar.update(self._done - self._bar.n)
        if self._tell is not None:
            self._tell(self._done, total)

    def _estimated_total(self) -> int:
        """How many tokens there are, if the other texts have as many as those that are done."""
        if self._num_texts is None:
            return self._before + self._expected
        scored, expected = self._done - self._before, self._expected
        if expected == 0:  # of empty texts, or a share without any
            scored = expected = 1
        # Texts that are done, times `expected`, in whole numbers: that is exact.
        texts = self._texts_before * expected + self._texts * scored
        if texts == 0:  # the first batch held no token that is scored
            return expected
        total = self._done * self._num_texts * expected // texts
        done_before, total_before = self._shown
        if done_before > 0:  # rounding must not turn it back
            total = min(total, self._done * total_before // done_before)
        return max(total, self._done)
