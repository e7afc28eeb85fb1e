"""Does the metric give the numbers of a plain float64 loop for random logits, in any form?

A seed makes options, batches of random shapes, dtypes, masks and weights, and a way to hand them
over: add, add_batch, a call, merge, reset, and bad input in between, which must change nothing.
The last call is `compute`. Expected is the loop of fuzz_logit_loop.py: one token at a time.

    python benchmarks/fuzz_logits.py --calls 1000 --seed 0     # three minutes
    python benchmarks/fuzz_logits.py --only 17                 # one seed, with its traceback

Exit status 1 where a call was wrong or crashed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from fuzz_runs import Calls, WrongError, main, state_of_metric

# isort: split
import numpy as np
from fuzz_bad_calls import make_bad_call_of_logits
from fuzz_batches import random_batch, random_options, random_vocab_size
from fuzz_inputs import fingerprint
from fuzz_logit_loop import Added, Batch, is_refused_by_loop
from fuzz_oracle import is_between, mean_nll, wrong_groups, wrong_numbers

from ppleval import Perplexity


def take(calls: Calls, added: Added, options: dict, batch: Batch, call: Callable, metric) -> Any:
    """Make a call with a batch: taken, or refused where the loop refuses it. None where refused."""
    before = fingerprint(list(batch.passed.values()))
    what = f"{batch.dtype} {batch.form} of {[row.logits.shape for row in batch.sequences]}"
    if is_refused_by_loop(batch, options):
        calls.make_refused(call, what, functools.partial(state_of_metric, metric))
        result = None
    else:
        result = calls.make(call, what)
        added.add(batch, options)
    if fingerprint(list(batch.passed.values())) != before:
        raise WrongError(f"{what} was changed by the call")
    return result


def one_sequence(batch: Batch) -> dict[str, Any]:
    """The arguments of `add` for a batch of one sequence."""
    passed = {"prediction": batch.passed["predictions"][0], "reference": batch.sequences[0].ids}
    (sequence,) = batch.sequences
    if sequence.weights is not None:
        passed["sample_weight"] = sequence.weights
    return passed if sequence.group is None else passed | {"group": sequence.group}


def add_by_chance(rng, calls: Calls, metric, added: Added, options: dict, new_batch) -> None:
    """One of the ways to add to a metric, with a random batch."""
    kind = rng.random()
    if kind < 0.5:
        batch = new_batch()
        take(calls, added, options, batch, lambda: metric.add_batch(**batch.passed), metric)
    elif kind < 0.65:
        batch = new_batch(size=1)
        arguments = one_sequence(batch)
        take(calls, added, options, batch, lambda: metric.add(**arguments), metric)
    elif kind < 0.8:
        batch = new_batch()
        own = Added()
        grouped = batch.passed.get("groups") is not None
        call = metric.add_batch if grouped else metric
        value = take(calls, own, options, batch, lambda: call(**batch.passed), metric)
        added.add_all(own)
        if value is not None:
            check_value(value, own)
    else:
        other, batch = type(metric)(**options), new_batch()
        own = Added()
        take(calls, own, options, batch, lambda: other.add_batch(**batch.passed), other)
        before = state_of_metric(other)
        calls.make(lambda: metric.merge(other), "merge")
        if state_of_metric(other) != before:
            raise WrongError("merge changed the other metric")
        added.add_all(own)


def check_value(value: float, own: Added) -> None:
    """Raises WrongError unless the value of a call is the perplexity of its batch."""
    mean = mean_nll(own.scored)
    allowed = own.tolerance * (1 + mean) if math.isfinite(mean) else 0.0
    if not is_between(value, mean - allowed, mean + allowed):
        raise WrongError(f"the value of a call is {value}, not exp({mean})")


def one_call(seed: int, calls: Calls) -> bool:
    """Make the calls of a seed; whether the last one, `compute`, was answered."""
    rng = np.random.default_rng(seed)
    vocab_size = random_vocab_size(rng)
    options = random_options(rng, vocab_size)
    grouped = bool(rng.random() < 0.25)
    # Options may also come with `compute` alone, where nothing was added before.
    late = bool(rng.random() < 0.15)
    metric, added = Perplexity(**({} if late else options)), Added()
    new_batch = functools.partial(random_batch, rng, vocab_size, options, grouped)
    for _ in range(0 if late else rng.integers(4)):
        add_by_chance(rng, calls, metric, added, options, new_batch)
        if rng.random() < 0.3:
            make_bad_call_of_logits(rng, calls, metric, options)
        if rng.random() < 0.05:
            calls.make(metric.reset, "reset")
            added = Added()
    if late or rng.random() < 0.5 or added.num_batches == 0:
        batch = new_batch()
        call = functools.partial(metric.compute, **batch.passed, **(options if late else {}))
        result = take(calls, added, options, batch, call, metric)
    else:
        result = calls.make(metric.compute, "compute")
    if result is None:
        return False
    check_result(result, added, options, grouped)
    if len(metric) != 0:
        raise WrongError(f"{len(metric)} sequences are left after compute")
    return True


def check_result(result: dict, added: Added, options: dict, grouped: bool) -> None:
    """Raises WrongError unless the result is that of the loop."""
    wrong = wrong_numbers(result, added.scored, added.tolerance)
    if grouped and added.scored:
        groups = list(map(str, added.groups))
        wrong += wrong_groups(result, added.scored, groups, added.tolerance)
    if wrong:
        raise WrongError(f"{'; '.join(wrong)} ({options})")


if __name__ == "__main__":
    main(one_call, __doc__.splitlines()[0])
