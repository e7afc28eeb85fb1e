"""Texts that several processes score: those of one launch, and those that hold a model together.

A process alone comes by nothing of this. `Processes` gives what all know; each round of the loops
below has its collectives in the same order on every rank.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ppleval.distributed import Attempt, Processes, naming_lost_ranks
from ppleval.stats.totals import TextSums
from ppleval.texts.inputs import num_characters
from ppleval.texts.progress import Progress
from ppleval.texts.schedule import Plan, Portion, shares
from ppleval.texts.score import Draft

if TYPE_CHECKING:
    from ppleval.texts.engine import Launch, TextScorer


def drafts_in_step(
    scorer: "TextScorer",
    found: Iterator[Portion],
    num_before: int,
    batch_size: int | None,
    to_the_end: bool,
    launch: "Launch",
    bar: Progress,
) -> Iterator[Draft]:
    """The complete draft of each text, of a model that several processes hold together.

    Processes in step with this one all make as many forward passes as the one that needs most, and
    go on with empty plans until all have come to the end.
    """
    ranks, settings = scorer.model.ranks, scorer.signature(with_contexts=False)
    for group in ranks.same:
        found = agreed_portions(found, settings, group)
    while True:
        mine = ranks.in_step.attempt(_next_plan, scorer, found, num_before, batch_size, to_the_end)
        most = ranks.in_step.largest(mine.then(_num_rounds))
        if most == 0:
            return
        plan = mine.value or Plan([], [], 0)
        num_before += len(plan.drafts)
        bar.begin(len(plan.drafts), plan.num_tokens)
        with naming_lost_ranks():
            yield from scorer.score_plan(plan, launch, bar, most - 1)


def _next_plan(
    scorer: "TextScorer",
    found: Iterator[Portion],
    num_before: int,
    batch_size: int | None,
    to_the_end: bool,
) -> Plan | None:
    portion = next(found, None)
    if portion is None:
        return None
    numbers = range(num_before, num_before + len(portion))
    return scorer.plan(portion, numbers, batch_size, to_the_end)


def _num_rounds(plan: Plan | None) -> int:
    return 0 if plan is None else 1 + len(plan.batches)


def shared_sums(
    scorer: "TextScorer",
    found: Iterator[Portion],
    num_before: int,
    batch_size: int | None,
    processes: Processes,
    copies: list[list[int]],
    bar: Progress,
) -> Iterator[tuple[str, TextSums]]:
    """Each text with its sums, in the order of the texts, which these processes share out.

    Args:
        copies: the ranks of each copy of the model; each copy scores a share of each portion.
    """
    (own,) = (i for i, copy in enumerate(copies) if processes.rank in copy)
    settings = scorer.signature(with_contexts=False)
    for group in scorer.model.ranks.same_beyond(processes):
        found = agreed_portions(found, f"{settings}, share {own} of {len(copies)}", group)
    for portion in agreed_portions(found, settings, processes):
        lengths = [num_characters(text) + len(context or "") for text, context in portion]
        shared = shares(lengths, len(copies))
        share = [portion[i] for i in shared[own]], [num_before + i for i in shared[own]]
        plan = processes.attempt(scorer.plan, *share, batch_size)
        everyone = processes.gather(_sums_of_share(scorer, plan, len(portion), bar, processes))
        # The ranks of one copy have the same texts; one of them answers.
        answers = itertools.chain(*(everyone[copy[0]] for copy in copies))
        sums = dict(zip(itertools.chain(*shared), answers, strict=True))
        num_before += len(portion)
        for i, (text, _) in enumerate(portion):
            yield text, sums[i]


def _sums_of_share(
    scorer: "TextScorer",
    plan: Attempt[Plan],
    num_texts: int,
    bar: Progress,
    processes: Processes,
) -> Attempt[list[TextSums]]:
    """The sums of the texts of a plan, once all processes that have to score it can."""
    ranks = scorer.model.ranks

    def sums_of(num_passes: int) -> list[TextSums]:
        bar.begin(num_texts, plan.value.num_tokens)
        drafts = scorer.score_plan(plan.value, scorer.launch, bar, num_passes)
        return [draft.sums() for draft in drafts]

    if ranks.is_alone:
        return processes.attempt(sums_of, 0)
    # A rank that fails in a forward pass leaves others waiting there, so it must not wait for these
    # in turn: what fails before does so on all, and what fails there ends this rank.
    most = processes.attempt(ranks.in_step.largest, plan.then(lambda plan: len(plan.batches)))
    num_passes = processes.require_all(most)
    with naming_lost_ranks():
        return Attempt(sums_of(num_passes))


def agreed_portions(
    portions: Iterator[Portion], settings: str, processes: Processes
) -> Iterator[Portion]:
    """The portions, each once all ranks are known to have the same one and the same settings.

    Raises:
        ValueError: the portions or the settings of the ranks differ.
        ConnectionError: another rank failed, or is gone.
    """
    with_settings = ((settings, portion) for portion in portions)
    while True:
        mine: Attempt[tuple[str, Portion] | None] = processes.attempt(next, with_settings, None)
        agreed = processes.require_equal(
            mine,
            "The ranks were given different texts, or different settings. Pass the same ones on "
            "every rank: sync=True shares them out, and ranks that hold one model together read "
            "them together.",
        )
        if agreed is None:  # the end
            return
        yield agreed[1]
