"""What the fuzzers share: calls by their seeds, what a call must leave alone, counts and reports.

A seed stands for one call of the metric, and for the calls that prepare it. The call is

    equal      the result is that of the plain loop
    refused    a TypeError or ValueError of the module, one sentence that ends with a full stop,
               where the loop refuses the input, too; and nothing has changed
    wrong      another result; bad input taken, good input refused; something changed
    crashed    any other error

Nothing here knows of logits or texts. This file is imported before evaluate and transformers,
which read the environment once.
"""

import argparse
import os
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from report import ROOT

LIBRARY = ROOT / "ppleval"
VERDICTS = ("equal", "refused", "wrong", "crashed")
Watched = Callable[[], dict[str, Any]]


class RefusedByLoopError(Exception):
    """The plain loop's answer to input that the module has to refuse."""


class WrongError(Exception):
    """The module did something else than the plain loop."""


class CrashedError(Exception):
    """The module raised something that is no sentence of its own."""


@dataclass
class Calls:
    """The calls of one seed: what they are watched for, and the sentences of those refused."""

    watched: Watched = dict
    sentences: list[str] = field(default_factory=list)

    def make(self, call: Callable[[], Any], what: str) -> Any:
        """The result of a call that has to be answered.

        Raises:
            WrongError: it was refused, or changed something that it must leave alone.
            CrashedError: it raised anything else.
        """
        result, sentence = self._answer(call, what)
        if sentence is not None:
            raise WrongError(f"{what} was refused: {sentence}")
        return result

    def attempt(self, call: Callable[[], Any], what: str) -> Any:
        """The result of a call that may be refused; None where it was.

        Raises:
            WrongError: it changed something that it must leave alone.
            CrashedError: it raised anything else than a sentence.
        """
        return self._answer(call, what)[0]

    def make_refused(self, call: Callable[[], Any], what: str, pending: Watched = dict) -> None:
        """Make a call that has to be refused; `pending` is watched, too.

        Raises:
            WrongError, CrashedError: as `make`; or it was answered.
        """
        before = pending()
        result, sentence = self._answer(call, what)
        if sentence is None:
            raise WrongError(f"{what} was not refused, but gave {_shortened(result)}")
        _check_same(before, pending(), f"{what}, which was refused, changed")

    def _answer(self, call: Callable[[], Any], what: str) -> tuple[Any, str | None]:
        """(the result, None), or (None, the sentence of a refusal)."""
        before = state_of_process() | self.watched()
        result, sentence = None, None
        try:
            result = call()
        except Exception as error:
            if not is_sentence_of_module(error):
                raise CrashedError(f"{what}: {type(error).__name__}: {error}") from error
            sentence = str(error)
            self.sentences.append(sentence)
        _check_same(before, state_of_process() | self.watched(), f"{what} changed")
        return result, sentence


def is_sentence_of_module(error: Exception) -> bool:
    """Whether a user can read what was wrong: raised in a file of the library, with a full stop."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_here = Path(frames[-1].filename).is_relative_to(LIBRARY)
    text = str(error)
    return isinstance(error, TypeError | ValueError) and raised_here and text.endswith((".", ".]"))


def state_of_process() -> dict[str, Any]:
    """What no call may change, by its name."""
    return {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "NumPy's random state": repr(np.random.get_state()[1:]),
        "Python's random state": random.getstate(),
        "the warning filters": list(warnings.filters),
        "the gradient mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "torch's defaults": (torch.get_default_dtype(), torch.get_num_threads()),
    }


def state_of_metric(metric) -> dict[str, str]:
    """What was added to a metric; whether a NaN was warned of is no part of it."""
    pending = metric._pending.__getstate__()
    pending.pop("_warned_of_nan", None)
    return {"what was added": repr(pending), "the number of sequences": repr(len(metric))}


def _check_same(before: dict, after: dict, what: str) -> None:
    for name, value in before.items():
        if after[name] != value:
            raise WrongError(f"{what} {name}")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 300 else f"{text[:300]}..."


@dataclass(frozen=True)
class Outcome:
    """What became of the call of one seed."""

    seed: int
    verdict: str  # one of VERDICTS
    what: str = ""  # of a refusal its sentence; what is wrong
    refused_before: tuple[str, ...] = ()  # the sentences of the calls before it


def outcome_of(one_call: Callable[[int, Calls], bool], seed: int) -> Outcome:
    """Make the calls of a seed; `one_call` says whether the last one was answered."""
    calls = Calls()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            was_answered = one_call(seed, calls)
    except WrongError as error:
        return Outcome(seed, "wrong", str(error))
    except CrashedError as error:
        return Outcome(seed, "crashed", str(error))
    if was_answered:
        return Outcome(seed, "equal", "", tuple(calls.sentences))
    return Outcome(seed, "refused", calls.sentences[-1], tuple(calls.sentences[:-1]))


def failures(one_call: Callable[[int, Calls], bool], seeds: Iterable[int]) -> list[Outcome]:
    """The seeds whose call was wrong or crashed."""
    outcomes = [outcome_of(one_call, seed) for seed in seeds]
    return [outcome for outcome in outcomes if outcome.verdict in ("wrong", "crashed")]


def kind_of(sentence: str) -> str:
    """A sentence without what differs from call to call: its numbers, names and values."""
    text = re.sub(
        r"(?:/[\w.+-]+)+|<[^>]*>|\([^()]*\)|\[[^\[\]]*\]|'[^']*'|\"[^\"]*\"|-?\b\d[\w.+-]*",
        "_",
        sentence,
    )
    return text if len(text) <= 90 else f"{text[:87]}..."


def main(one_call: Callable[[int, Calls], bool], description: str) -> None:
    """Run a fuzzer from the command line; exit status 1 where a call was wrong or crashed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--calls", type=int, default=1000, help="number of seeds [1000]")
    parser.add_argument("--seed", type=int, default=0, help="the first seed [0]")
    parser.add_argument("--only", type=int, metavar="SEED", help="this seed only, with traceback")
    given = parser.parse_args()
    torch.set_num_threads(1)  # of tiny matrices more threads make slower work
    if given.only is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            was_answered = one_call(given.only, Calls())
        print(f"seed {given.only}: {'equal' if was_answered else 'refused'}")
        return
    start, outcomes = time.perf_counter(), []
    for seed in range(given.seed, given.seed + given.calls):
        outcomes.append(outcome_of(one_call, seed))
        if outcomes[-1].verdict in ("wrong", "crashed"):
            print(f"seed {seed} {outcomes[-1].verdict}: {outcomes[-1].what}", flush=True)
    print(summary(outcomes, time.perf_counter() - start))
    sys.exit(any(outcome.verdict in ("wrong", "crashed") for outcome in outcomes))


def summary(outcomes: list[Outcome], seconds: float) -> str:
    """The counts of verdicts, and of refusals by their kind, as lines of text."""
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS)
    before = sum(len(outcome.refused_before) for outcome in outcomes)
    kinds = Counter(
        kind_of(sentence)
        for outcome in outcomes
        for sentence in (
            *outcome.refused_before,
            *([outcome.what] if outcome.verdict == "refused" else []),
        )
    )
    lines = [f"{number:>6}  {kind}" for kind, number in kinds.most_common()]
    head = f"{len(outcomes)} calls: {counts}; {before} refused before them; {seconds:.0f} s"
    return "\n".join([head, "refused, by kind:", *lines])
