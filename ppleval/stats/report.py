"""What the result of a corpus shows of its totals. It is plain values, so it needs no model."""

from collections.abc import Sequence
from dataclasses import dataclass

from ppleval.stats.positions import position_results
from ppleval.stats.texts import TextTotals
from ppleval.stats.totals import Result


@dataclass(frozen=True)
class TextReport:
    """What the result of texts depends on besides their sums.

    has_max_length: whether it tells how many texts were cut.
    has_contexts: whether it tells how many contexts were cut.
    drops_tail: whether it tells how many tokens the preset dropped at the end.
    tokens_are_independent: whether it has the error bar of llama.cpp.
    edges: of the buckets by position; none if not asked for.
    window: tokens that the model reads at once.
    """

    has_max_length: bool
    has_contexts: bool
    drops_tail: bool
    tokens_are_independent: bool
    edges: Sequence[int]
    window: int

    def result(self, totals: TextTotals) -> Result:
        """The result of `compute`, without its signature and without the list of perplexities."""
        result = totals.result()
        if not self.has_max_length:
            del result["num_truncated"]
        if not self.has_contexts:
            del result["num_truncated_contexts"]
        if not self.drops_tail:
            del result["num_dropped_tokens"]
        if self.tokens_are_independent:
            error = totals.standard_error_of_tokens
            result["perplexity_standard_error"] = result["perplexity"] * error
        if self.edges:
            result["positions"] = position_results(totals.positions, self.edges, self.window)
        return result
