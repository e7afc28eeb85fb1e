"""The texts of a corpus -> its result, and what a user should be warned of."""

import math
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Protocol

from ppleval.distributed import Processes
from ppleval.stats.groups import by_group, check_number, grouped
from ppleval.stats.pairs import PairSums
from ppleval.stats.totals import Result, TextSums, guessing_remark
from ppleval.texts.compare import TextComparer
from ppleval.user_warnings import warn_user

# Why a model may fit texts worse than guesses; what is scored of them is not the user's doing.
REASONS_OF_TEXTS = (
    "an untrained model, the tokenizer of another model, or texts of a kind or a language that it "
    "was not trained on"
)


class Scorer(Protocol):
    """What makes a result of texts: a `TextScorer`, or a `ByteComparer` of two models."""

    @property
    def vocab_sizes(self) -> tuple[int, ...]: ...
    @property
    def shortened_contexts(self) -> str: ...
    def signature(self, with_contexts: bool) -> str: ...
    def sums(
        self,
        texts: Iterable[str],
        contexts: Iterable[str] | None = None,
        *,
        batch_size: int | None = ...,
        progress: bool = ...,
        num_before: int = ...,
        processes: Processes = ...,
    ) -> Iterator[tuple[str, TextSums]]: ...
    def result(self, sums: Sequence[TextSums], with_contexts: bool) -> Result: ...


def corpus_result(
    scorer: Scorer,
    texts: Iterable[str],
    contexts: Iterable[str] | None,
    groups: Sequence[str] | None,
    *,
    batch_size: int | None,
    progress: bool,
    processes: Processes,
) -> Result:
    """The result of all texts; the user is warned of what is odd in them.

    Args:
        groups: the name of each text's group, or None. The others are those of `TextScorer.sums`.

    Raises:
        TypeError, ValueError, ConnectionError: as `TextScorer.sums`; or there are not as many
            groups as texts.
    """
    # First, so that it is that of the weights that score.
    signature = scorer.signature(with_contexts=contexts is not None)
    scored = scorer.sums(
        texts, contexts, batch_size=batch_size, progress=progress, processes=processes
    )
    sums = list(map(itemgetter(1), scored))
    result = result_of(scorer, sums, groups, signature, with_contexts=contexts is not None)
    for remark in _warnings(result, sums, scorer, with_contexts=contexts is not None):
        warn_user(remark)
    return result


def result_of(
    scorer: Scorer,
    sums: Sequence[TextSums],
    groups: Sequence[str] | None,
    signature: str,
    with_contexts: bool,
) -> Result:
    """The result of `compute` or `compare`, from the sums of all texts, and that of each group.

    Raises:
        ValueError: there are not as many groups as texts, or fewer texts than the saved base has.
    """
    if isinstance(scorer, TextComparer):
        scorer.check_number(len(sums))
    result = scorer.result(sums, with_contexts)
    if groups is not None:
        check_number(groups, len(sums))
        result |= grouped(by_group(sums, groups), lambda texts: scorer.result(texts, with_contexts))
    return {**result, "signature": signature}


def remarks(result: Result, sums: Sequence[TextSums], scorer: Scorer, name: str) -> Iterator[str]:
    """What a user should be told of the numbers of each model, in sentences.

    Args:
        result: that of the texts with these sums.
        name: what the texts are called, such as "predictions".
    """
    sides = {"": sums}
    if _are_pairs(sums):
        sides["base_"] = [text.base for text in sums if isinstance(text, PairSums)]
    for (side, texts), vocab_size in zip(sides.items(), scorer.vocab_sizes, strict=True):
        undefined = [i for i, text in enumerate(texts) if math.isnan(text.nll_sum)]
        if undefined:
            which = "base" if side else "model"
            what = "what compares with it" if side else "the perplexity"
            yield f"The {which} gives NaN for {name}[{undefined[0]}], so {what} is NaN."
        remark = guessing_remark(
            f"{side}perplexity", result[f"{side}mean_nll"], math.log(vocab_size), REASONS_OF_TEXTS
        )
        if remark is not None:
            yield remark


def _warnings(
    result: Result,
    sums: Sequence[TextSums],
    scorer: Scorer,
    with_contexts: bool,
) -> Iterator[str]:
    name = "texts" if _are_pairs(sums) else "predictions"  # that of the argument
    empty = [i for i, text in enumerate(sums) if text.num_tokens == 0]
    if empty:
        yield (
            f"{len(empty)} of {len(sums)} texts have no token to score, the first of them "
            f"{name}[{empty[0]}]; they have perplexity NaN and are left out of the sums."
        )
    yield from remarks(result, sums, scorer, name)
    truncated = [i for i, text in enumerate(sums) if text.context_truncated]
    if with_contexts and truncated:
        yield (
            f"{len(truncated)} of {len(sums)} contexts {scorer.shortened_contexts}; the first of "
            f"them is contexts[{truncated[0]}]."
        )


def _are_pairs(sums: Sequence[TextSums]) -> bool:
    """Whether these are the sums of texts under two models."""
    return len(sums) > 0 and isinstance(sums[0], PairSums)
