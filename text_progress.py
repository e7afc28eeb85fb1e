"""The progress of scoring: a bar for people, or a function that is called with numbers."""

from collections.abc import Callable

import numpy as np
from tqdm.auto import tqdm


class Progress:
    """A bar with the perplexity so far (True), nothing (False), or calls of a function.

    The function gets the number of tokens scored and their total.
    """

    def __init__(self, shown: bool | Callable[[int, int], None]):
        self._tell = shown if callable(shown) else None
        self._bar = tqdm(unit="tok", desc="perplexity", disable=shown is not True)
        self._done, self._total = 0, 0
        self._nll_sum, self._weight_sum = 0.0, 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()

    def expect(self, num_tokens: int) -> None:
        """Raise the total by this many tokens."""
        self._total += num_tokens
        self._bar.total = self._total

    def add(self, nll: np.ndarray, weight: float) -> None:
        """Count these tokens, which are scored now; `show` follows."""
        self._done += len(nll)
        if not self._bar.disable:
            self._nll_sum += float(nll.sum(dtype=np.float64)) * weight
            self._weight_sum += len(nll) * weight

    def show(self) -> None:
        """Show what was added; once for a batch, because it takes longer than to add a text."""
        if not self._bar.disable:
            with np.errstate(all="ignore"):
                perplexity = np.exp(np.divide(self._nll_sum, self._weight_sum))
            self._bar.set_postfix(perplexity=f"{perplexity:.4g}", refresh=False)
            self._bar.update(self._done - self._bar.n)
        if self._tell is not None:
            self._tell(self._done, self._total)
