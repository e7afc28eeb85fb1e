"""How far the scoring of texts has come: a bar for people, or a function that is told."""

from collections.abc import Callable

import numpy as np
from tqdm.auto import tqdm


class Progress:
    """A bar of the tokens scored, with the perplexity so far, or a function that is told."""

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
        """This many more tokens will be scored."""
        self._total += num_tokens
        self._bar.total = self._total

    def add(self, nll: np.ndarray, weight: float) -> None:
        """These tokens are scored."""
        self._nll_sum += float(nll.sum()) * weight
        self._weight_sum += len(nll) * weight
        with np.errstate(all="ignore"):
            perplexity = np.exp(np.divide(self._nll_sum, self._weight_sum))
        self._bar.set_postfix(perplexity=f"{perplexity:.4g}", refresh=False)
        self._bar.update(len(nll))
        self._done += len(nll)
        if self._tell is not None:
            self._tell(self._done, self._total)
