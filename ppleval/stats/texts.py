"""Sums of texts that merge by addition -> the result of a corpus.

A corpus of any length is a dozen numbers, so a program that adds up what others scored keeps no
text. What needs single texts, such as their list of perplexities, is not here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest

import numpy as np

from ppleval.stats.positions import position_results
from ppleval.stats.totals import NllTotals, Result, TextSums, exp_or_inf


@dataclass(frozen=True)
class TextTotals:
    """Sums over texts. The empty object, `TextTotals()`, is the zero of `+`."""

    nll: NllTotals = field(default_factory=NllTotals)  # each text is a sequence
    unweighted_nll_sum: float = 0.0  # nats
    token_nll_sq_sum: float = 0.0  # nats^2, of single tokens, unweighted
    perplexity_sum: float = 0.0  # of the texts in which something was scored
    num_texts: int = 0
    num_bytes: int = 0
    num_words: int = 0
    num_truncated: int = 0
    num_truncated_contexts: int = 0
    num_dropped_tokens: int = 0
    positions: tuple[NllTotals, ...] = ()  # of each bucket; none if not asked for

    @classmethod
    def of(cls, texts: Iterable[TextSums]) -> "TextTotals":
        """The totals of texts, from the sums of each."""
        texts = list(texts)
        positions = [text.positions for text in texts if len(text.positions) > 0]
        buckets = np.stack(positions, axis=2) if positions else ()
        return cls(
            nll=NllTotals.from_sequences(
                [text.nll_sum for text in texts],
                [text.weight_sum for text in texts],
                sum(text.num_tokens for text in texts),
            ),
            unweighted_nll_sum=sum(text.unweighted_nll_sum for text in texts),
            token_nll_sq_sum=sum(text.token_nll_sq_sum for text in texts),
            perplexity_sum=sum(text.perplexity for text in texts if text.weight_sum > 0),
            num_texts=len(texts),
            num_bytes=sum(text.num_bytes for text in texts),
            num_words=sum(text.num_words for text in texts),
            num_truncated=sum(text.truncated for text in texts),
            num_truncated_contexts=sum(text.context_truncated for text in texts),
            num_dropped_tokens=sum(text.num_dropped_tokens for text in texts),
            positions=tuple(NllTotals.from_sequences(*bucket) for bucket in buckets),
        )

    def __add__(self, other: "TextTotals") -> "TextTotals":
        if not isinstance(other, TextTotals):
            return NotImplemented
        both = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        buckets = zip_longest(*both.pop("positions"), fillvalue=NllTotals())
        return TextTotals(
            **{name: one + another for name, (one, another) in both.items()},
            positions=tuple(one + another for one, another in buckets),
        )

    @property
    def num_empty(self) -> int:
        """Texts in which nothing was scored."""
        return self.num_texts - self.nll.num_sequences

    @property
    def standard_error_of_tokens(self) -> float:
        """Standard error of mean_nll as llama.cpp has it, which takes tokens as independent, nats.

        sqrt((E[nll^2] - E[nll]^2) / (n - 1)) over n tokens; NaN for fewer than two. It is too
        small, because the tokens of a text are not independent.
        (tools/perplexity/perplexity.cpp in ggml-org/llama.cpp.)
        """
        count = self.nll.num_tokens
        if count < 2:
            return math.nan
        variance = self.token_nll_sq_sum / count - (self.unweighted_nll_sum / count) ** 2
        return math.sqrt(max(variance, 0.0) / (count - 1))

    def result(self) -> Result:
        """The result of a corpus.

        bits_per_byte = nll_sum / ln 2 / bytes, byte_perplexity = exp(nll_sum / bytes) and
        word_perplexity = exp(nll_sum / words) are over all texts. mean_perplexity is the mean of
        those of the texts, without the texts in which nothing was scored.
        """
        nll_sum, num_scored = self.unweighted_nll_sum, self.nll.num_sequences
        nll_per_byte = nll_sum / self.num_bytes if self.num_bytes > 0 else math.nan
        nll_per_word = nll_sum / self.num_words if self.num_words > 0 else math.nan
        return {
            **self.nll.result(),
            "mean_perplexity": self.perplexity_sum / num_scored if num_scored > 0 else math.nan,
            "bits_per_byte": nll_per_byte / math.log(2),
            "byte_perplexity": exp_or_inf(nll_per_byte),
            "word_perplexity": exp_or_inf(nll_per_word),
            "num_bytes": self.num_bytes,
            "num_words": self.num_words,
            "num_truncated": self.num_truncated,
            "num_truncated_contexts": self.num_truncated_contexts,
            "num_dropped_tokens": self.num_dropped_tokens,
        }


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
