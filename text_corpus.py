"""The texts of a corpus -> its result, and what a user should be warned of."""

import math
from collections.abc import Iterable, Iterator, Sequence

from .processes import Processes
from .text_comparison import ByteComparer
from .text_scoring import TextScorer
from .totals import Result, TextSums


def corpus_result(
    scorer: TextScorer | ByteComparer,
    texts: Iterable[str],
    contexts: Iterable[str] | None,
    *,
    batch_size: int | None,
    progress: bool,
    processes: Processes,
) -> tuple[Result, list[str]]:
    """The result of all texts, and warnings; the arguments are those of `TextScorer.sums`."""
    # First, so that it is that of the weights that score.
    signature = scorer.signature(with_contexts=contexts is not None)
    scored = scorer.sums(
        texts, contexts, batch_size=batch_size, progress=progress, processes=processes
    )
    sums = [sums for _, sums in scored]
    result = scorer.result(sums, signature, with_contexts=contexts is not None)
    return result, list(_warnings(sums, scorer, with_contexts=contexts is not None))


def _warnings(
    sums: Sequence[TextSums], scorer: TextScorer | ByteComparer, with_contexts: bool
) -> Iterator[str]:
    empty = [i for i, text in enumerate(sums) if text.num_tokens == 0]
    if empty:
        yield (
            f"{len(empty)} of {len(sums)} texts have no token to score, the first of them "
            f"predictions[{empty[0]}]; they have perplexity NaN and are left out of the sums."
        )
    undefined = [i for i, text in enumerate(sums) if math.isnan(text.nll_sum)]
    if undefined:
        yield f"The model gives NaN for predictions[{undefined[0]}], so the perplexity is NaN."
    truncated = [i for i, text in enumerate(sums) if text.context_truncated]
    if with_contexts and truncated:
        yield (
            f"{len(truncated)} of {len(sums)} contexts are longer than the window of "
            f"{scorer.window} tokens, the first of them contexts[{truncated[0]}]; they were cut "
            "from the left."
        )
