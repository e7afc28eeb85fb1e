"""Two models on the same texts: token by token where both read the same tokens, else by bytes.

A `TextComparer` yields `TokenPairSums`, a `ByteComparer` `PairSums`; stats/pairs.py makes the
results of them.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ppleval.logits.options import signature
from ppleval.models.pair import ModelPair
from ppleval.models.saved_base import SavedBase
from ppleval.show.heatmap import difference_heatmap
from ppleval.stats.pairs import (
    PairSums,
    TokenPairSums,
    pair_result,
    position_pair_results,
    token_pair_errors,
    token_pair_result,
)
from ppleval.stats.totals import Result, TextSums, exp_or_inf
from ppleval.texts.encoding import EncodedText
from ppleval.texts.engine import TextScorer
from ppleval.texts.score import Draft, decoder


@dataclass(frozen=True)
class TextComparison:
    """One text under two models, token by token.

    The lists have one entry for each token of the text; start token and context are left out, and
    numbers are NaN, strings empty where nothing was scored.
    """

    text: str
    tokens: list[str]
    offsets: list[tuple[int, int]] | None  # characters [start, end)
    nll: list[float]  # of the model, nats
    base_nll: list[float]  # nats
    kl: list[float]  # of the base's prediction from the model's, nats
    top: list[str]  # the token that the model expected most
    base_top: list[str]
    sums: TokenPairSums

    @property
    def perplexity_ratio(self) -> float:
        """exp of the mean nll under the model less that under the base; NaN if nothing scored."""
        if self.sums.weight_sum == 0:
            return float("nan")
        return exp_or_inf((self.sums.nll_sum - self.sums.base.nll_sum) / self.sums.weight_sum)

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return difference_heatmap(self)


class PairDraft(Draft):
    """The comparison of a text, filled with the `PairStats` of its windows."""

    def sums(self, name: str = "nll") -> TokenPairSums:
        """The text's part in the result of a corpus."""
        own, base = super().sums(name), super().sums("base_nll")
        nll, weights = self._scored("nll")
        base_nll, kl, reverse_kl, top, base_top = (
            self._scored(name)[0] for name in ("base_nll", "kl", "reverse_kl", "top", "base_top")
        )
        counts = weights > 0
        weights, kl = weights[counts], kl[counts]
        return TokenPairSums(
            **vars(own),
            base=base,
            kl_sum=float(kl @ weights),
            reverse_kl_sum=float(reverse_kl[counts] @ weights),
            same_top_sum=float((top == base_top)[counts] @ weights),
            nll_product_sum=float(nll @ base_nll),
            kl=kl.astype(np.float32),
            delta_p=(np.exp(-nll) - np.exp(-base_nll))[counts].astype(np.float32),
        )

    def comparison(self, decode: Callable[[int], str]) -> TextComparison:
        """The comparison as callers get it; `decode` gives the string of an id."""
        text = self.encoded
        return TextComparison(
            text=text.text,
            tokens=list(map(decode, text.ids[text.num_prefix :])),
            offsets=text.offsets(),
            nll=self._column("nll").tolist(),
            base_nll=self._column("base_nll").tolist(),
            kl=self._column("kl").tolist(),
            top=self._tokens("top", decode),
            base_top=self._tokens("base_top", decode),
            sums=self.sums(),
        )

    def _tokens(self, name: str, decode: Callable[[int], str]) -> list[str]:
        """The tokens of the ids under this name in `PairStats`; empty where nothing was scored."""
        ids = self._column(name).tolist()
        return ["" if math.isnan(token_id) else decode(int(token_id)) for token_id in ids]


class TextComparer(TextScorer):
    """Compares a model with a base that reads the same tokens, under one set of options.

    Raises:
        TypeError, ValueError: as `TextScorer`, or a saved base that was read with other settings.
    """

    new_draft, sums_type = PairDraft, TokenPairSums
    model: ModelPair

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """How many ids the model and the base choose among: those that both have."""
        return self.model.vocab_size, self.model.vocab_size

    def result(self, sums: Sequence[TextSums], with_contexts: bool) -> Result:
        """The result of `compare` without its signature, from the sums of texts."""
        pairs = [text for text in sums if isinstance(text, TokenPairSums)]
        result = token_pair_result(pairs)
        if self.rules.tokens_are_independent:
            result |= token_pair_errors(pairs)
        if self.rules.drops_tail:
            result["num_dropped_tokens"] = sum(text.num_dropped_tokens for text in pairs)
        if self.edges:
            result["positions"] = position_pair_results(pairs, self.edges, self.window)
        return result

    def comparisons(
        self,
        texts: Iterable[str],
        contexts: Iterable[str] | None = None,
        *,
        batch_size: int | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> Iterator[TextComparison]:
        """The comparison of each text, in the order of the texts; arguments as for `score`."""
        decode = decoder(self.model.tokenizer)
        for draft in self.drafts(texts, contexts, batch_size=batch_size, progress=progress):
            assert isinstance(draft, PairDraft)  # because of new_draft
            yield draft.comparison(decode)

    def _new_draft(self, number: int, text: EncodedText, to_the_end: bool) -> Draft:
        draft = super()._new_draft(number, text, to_the_end)
        if isinstance(self.model.base, SavedBase):
            self.model.base.check_text(number, text.ids)
        return draft

    def check_number(self, num_texts: int) -> None:
        """Raises ValueError if a saved base has more texts than were compared with it."""
        if isinstance(self.model.base, SavedBase):
            self.model.base.check_number(num_texts)


class ByteComparer:
    """Compares two models with different tokens: bits per byte, paired text by text.

    It is a `Scorer` of corpus.py.

    Raises:
        ValueError: results by position are asked for.
    """

    sums_type = PairSums

    def __init__(self, scorer: TextScorer, base: TextScorer):
        if scorer.edges:
            raise ValueError("positions= needs two models with the same tokens; these differ.")
        self.scorer, self.base = scorer, base
        self.options, self.window, self.edges = scorer.options, scorer.window, scorer.edges
        self.shortened_contexts = scorer.shortened_contexts
        self.vocab_sizes = scorer.vocab_sizes + base.vocab_sizes

    def signature(self, with_contexts: bool) -> str:
        """Every setting that changes the numbers, in one line."""
        own, base = (side.settings(with_contexts) for side in (self.scorer, self.base))
        return signature(own | {f"base_{name}": value for name, value in base.items()})

    def sums(self, texts, contexts=None, **options) -> Iterator[tuple[str, PairSums]]:
        """Each text with its sums under both models; arguments and errors as `TextScorer.sums`."""
        # A list stays one, of which the progress knows the length.
        texts, base_texts = (
            (texts, texts) if isinstance(texts, Collection) else itertools.tee(texts)
        )
        contexts, base_contexts = (None, None) if contexts is None else itertools.tee(contexts)
        base = self.base.sums(base_texts, base_contexts, **{**options, "progress": False})
        for (text, own), (_, other) in zip(
            self.scorer.sums(texts, contexts, **options), base, strict=True
        ):
            yield text, PairSums(**vars(own), base=other)

    def result(self, sums: Sequence[TextSums], with_contexts: bool) -> Result:
        """The result of `compare` without its signature, from the sums of texts."""
        pairs = [text for text in sums if isinstance(text, PairSums)]
        result = pair_result(pairs)
        if self.options.rules.drops_tail:
            for side, texts in (("", pairs), ("base_", [text.base for text in pairs])):
                dropped = sum(text.num_dropped_tokens for text in texts)
                result[f"{side}num_dropped_tokens"] = dropped
        return result
