"""Does the module give the nll of a plain loop, for every family of causal language models?

The families are those that AutoModelForCausalLM maps to in the installed transformers, each tiny
and random (tiny_families.py). They score texts shorter and much longer than their context, at
several batch sizes and with both padding sides. The plain loop runs the same windows one by one,
unpadded, and takes the log-softmax in float64. A family is

    equal      |nll - nll of the loop| <= 2e-5 max(1, nll of the loop) for every token
    refused    the module says in a ValueError or TypeError why it does not score the model
    failed     anything else
    not built  transformers does not build it here, or it does not run on token ids alone

The line also says where the model itself gives tokens other probabilities than alone in a row.

    python benchmarks/sweep_models.py                   # all, and variants: two minutes
    python benchmarks/sweep_models.py phi3 prophetnet   # these, and their variants

Exit status 1 where one failed.
"""

import argparse
import copy
import itertools
import logging
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Before evaluate and transformers are imported, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"

import datasets
import evaluate
import torch
from report import ROOT
from tiny_families import CONTEXT, NAMES, build

TOLERANCE = 2e-5
SHORT = 7  # tokens of a row that is put beside one of CONTEXT tokens
STRIDE = CONTEXT // 2  # the module's, where none is given
BATCH_SIZES = (None, 1, 2)
TEXTS = [
    "Hello!",
    "Return the number of items in the list; raise ValueError if there are none. " * 4,
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "naïve façade — 漢字かな",
    "a",
    "Two lines\n\n  and indentation\twith a tab  ",
    "for i in range(10):\n    print(i)\n" * 3,
]


@dataclass(frozen=True)
class Outcome:
    """What became of a family."""

    verdict: str  # "equal", "refused", "failed" or "not built"
    largest: float | None = None  # difference of an nll, relative to max(1, nll)
    output_layer: str = ""
    reason: str = ""

    def __str__(self) -> str:
        largest = "" if self.largest is None else f"{self.largest:.1e}"
        return f"{self.verdict:<10}{largest:<9}{self.output_layer:<20}{self.reason}".rstrip()


def plain_windows(num_ids: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, stop): ids[first:stop] are scored, given ids[start:] before them."""
    stops = [*range(CONTEXT + 1, num_ids, STRIDE), num_ids]
    for first, stop in itertools.pairwise([1, *stops]):
        yield max(0, stop - CONTEXT - 1), first, stop


@torch.no_grad()
def log_probs(model, ids: list[int], **inputs) -> torch.Tensor:
    """Of every next token, (T, V), float64, of one row without padding."""
    logits = model(input_ids=torch.tensor([ids]), **inputs).logits[0]
    return logits.double().log_softmax(-1)


def plain_nll(model, ids: list[int]) -> torch.Tensor:
    """Oracle: nll (T - 1,) of ids[1:], float64, one unpadded window at a time.

    As the text itself, each window begins with the start token, ids[0].
    """
    found = []
    for start, first, stop in plain_windows(len(ids)):
        rows = log_probs(model, [ids[0], *ids[start + 1 : stop - 1]])[first - 1 - start :]
        found.append(-rows.gather(1, torch.tensor(ids[first:stop])[:, None])[:, 0])
    return torch.cat(found)


def largest_difference(ppl, model, tokenizer, expected: list[torch.Tensor]) -> float:
    """Of the module to the plain loop, over all tokens, batch sizes and padding sides."""
    largest = 0.0
    for tokenizer.padding_side in ("right", "left"):
        for batch_size in BATCH_SIZES:
            scores = ppl.score(TEXTS, model=model, tokenizer=tokenizer, batch_size=batch_size)
            for score, nll in zip(scores, expected, strict=True):
                relative = (torch.tensor(score.nll).double() - nll).abs() / nll.clamp(min=1)
                largest = max(largest, float(relative.nan_to_num(nan=torch.inf).max()))
    return largest


def output_layer(language_model) -> str:
    """How the module gets logits: "head", with its scale and cap, or the model's own."""
    if language_model.head is None:
        return "own logits"
    scores = language_model.head.transform
    scale = "" if scores.logit_scale == 1 else f" x {scores.logit_scale:.3g}"
    return f"head{scale}" + ("" if scores.softcap is None else f", cap {scores.softcap:.3g}")


def changes(model, ids: list[int]) -> dict[str, Callable[[], torch.Tensor]]:
    """What must not matter to a causal model -> how its log-probabilities change with it.

    They are those of the first SHORT tokens; each comes from a fresh copy of the model.
    """
    rows = torch.tensor([ids[:SHORT] + [0] * (CONTEXT - SHORT), ids[:CONTEXT]])
    mask = torch.ones_like(rows)
    mask[0, SHORT:] = 0

    def first_of(batch: torch.Tensor, before: torch.Tensor | None = None, **inputs) -> torch.Tensor:
        fresh = copy.deepcopy(model)
        if before is not None:
            fresh(input_ids=before)
        logits = fresh(input_ids=batch, **inputs).logits[0, :SHORT]
        return logits.double().log_softmax(-1)

    short, long = rows[:1, :SHORT], rows[1:]
    alone = first_of(short)
    return {
        "chance": lambda: first_of(long) - first_of(long),
        "the tokens behind, or the length": lambda: first_of(long) - alone,
        "a longer call before": lambda: first_of(short, before=long) - alone,
        "a second row": lambda: first_of(rows[:, :SHORT]) - alone,
        "right padding with a mask": lambda: first_of(rows, attention_mask=mask) - alone,
        "right padding without one": lambda: first_of(rows) - alone,
    }


@torch.no_grad()
def reactions(model, ids: list[int]) -> str:
    """What the model itself reacts to though it must not, and by how many nats at most.

    In float64 where the model runs in it, so that rounding is not taken for a reaction.
    """
    try:
        model = copy.deepcopy(model).double()
        log_probs(model, ids[:CONTEXT])
    except RuntimeError:  # a family that computes a part of itself in float32
        model = model.float()
    found = []
    for name, change in changes(model, ids).items():
        try:
            nats = float(change().abs().max())
        except (RuntimeError, ValueError, IndexError) as error:
            found.append(f"{name} ({first_line(error)})")
            continue
        if not nats <= TOLERANCE:  # NaN is one, too
            found.append(f"{name} ({nats:.1e})")
    if not found:
        return ""
    return f"the model itself, in {str(model.dtype)[6:]}, reacts to {'; '.join(found)}"


def first_line(error: Exception) -> str:
    """Its type, and what it says first."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def frames_of(error: Exception) -> tuple[str | None, str]:
    """file:line of the last frame in this project's modules, None without, and of the last one."""
    modules = {path.name for path in ROOT.glob("*.py")}
    frames = [
        (Path(frame.filename).name, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    places = [f"{file}:{line}" for file, line in frames]
    own = [place for place, (file, _) in zip(places, frames, strict=True) if file in modules]
    return (own[-1] if own else None), places[-1]


def failure(error: Exception, own_reactions: str) -> Outcome:
    """What an error of the module stands for: a sentence of its own is a refusal."""
    own, last = frames_of(error)
    refused = isinstance(error, TypeError | ValueError) and own == last
    what = str(error) if refused else f"{first_line(error)} ({own}, {last})"
    reason = f"{what} | {own_reactions}" if own_reactions else what
    return Outcome("refused" if refused else "failed", reason=reason)


def outcome(ppl, name: str) -> Outcome:
    """Build a family, score with it, and compare."""
    try:
        model, tokenizer = build(name)
        rows = [tokenizer(text).input_ids for text in TEXTS]
        # A copy: what a model keeps from call to call must not reach the module.
        expected = [plain_nll(copy.deepcopy(model), row) for row in rows]
    except Exception as error:
        return Outcome("not built", reason=f"{first_line(error)} ({frames_of(error)[1]})")
    if not all(nll.isfinite().all() for nll in expected):
        return Outcome("not built", reason="the plain loop's nll is not finite")
    own_reactions = reactions(model, rows[1])
    try:
        largest = largest_difference(ppl, model, tokenizer, expected)
        scorer = ppl.text_scorer(model=model, tokenizer=tokenizer)
    except Exception as error:
        return failure(error, own_reactions)
    verdict = "equal" if largest <= TOLERANCE else "failed"
    return Outcome(verdict, largest, output_layer(scorer.model), own_reactions)


def chosen(names: list[str]) -> list[str]:
    """Families with their variants, and variants, in the order of NAMES."""
    unknown = set(names) - set(NAMES)
    if unknown:
        sys.exit(f"Unknown families: {', '.join(sorted(unknown))}. See NAMES in tiny_families.py.")
    return [name for name in NAMES if not names or {name, name.partition(":")[0]} & set(names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="families or variants [all]")
    names = chosen(parser.parse_args().names)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)  # of tiny matrices more threads make slower work
    ppl = evaluate.load(str(ROOT / "perplexity.py"))
    start = time.perf_counter()
    verdicts: Counter[str] = Counter()
    for name in names:
        found = outcome(ppl, name)
        verdicts[found.verdict] += 1
        print(f"{name:<26}{found}", flush=True)
    counts = ", ".join(f"{verdicts[v]} {v}" for v in ("equal", "refused", "failed", "not built"))
    print(f"{len(names)} configurations: {counts}, {time.perf_counter() - start:.0f} s")
    sys.exit(1 if verdicts["failed"] else 0)


if __name__ == "__main__":
    main()
