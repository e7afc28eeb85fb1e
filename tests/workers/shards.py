"""What the metric makes of logits that several ranks share; tests/test_nll_shards.py reads it.

    PYTHONPATH=.:tests python tests/workers/shards.py OUT

Rank r writes OUT.r, a JSON object of {case: result or error}. A result is a dict of numbers:
`deviation` from what one process makes of the whole (relative, at least to 1), and where it was
counted `bytes_per_token`.
"""

import datetime
import functools
import itertools
import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppleval import Perplexity

TIMEOUT_S = 20
CASES = {}  # name -> function
MESH_CASES = {}  # the same for 2 x 2 ranks


class SentBytes(TorchDispatchMode):
    """Counts what goes into and comes out of collectives, of any kind."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # seen again as what it does on its local tensors
        if "c10d" in func.namespace:
            tensors = (leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf))
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def case(cases=CASES, **fixed):
    """Register a function as a case, with its keywords in the name."""

    def register(function):
        name = "-".join([function.__name__, *map(str, fixed.values())])
        assert name not in cases
        cases[name] = functools.partial(function, **fixed)
        return function

    return register


def mesh(*shape):
    return init_device_mesh("cpu", shape or (dist.get_world_size(),))


def rows(batch=5, length=7, vocab_size=11, seed=0, scale=3.0):
    """Logits (B, T, V) and targets (B, T), some of them ignored, equal on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, length, vocab_size, generator=generator)
    targets = torch.randint(vocab_size, (batch, length), generator=generator)
    targets[torch.rand(batch, length, generator=generator) < 0.2] = -100
    return logits, targets


def deviation(found, expected) -> float:
    """The largest, relative where the expected is above 1; inf where NaN or inf differ."""
    if isinstance(found, DTensor):
        found = found.full_tensor()
    if isinstance(found, float | int):
        found, expected = torch.tensor(float(found)), torch.tensor(float(expected))
    assert found.shape == expected.shape
    found, expected = found.double(), expected.double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    gaps = ((found - expected).abs() / expected.abs().clamp(min=1)).where(~same, 0)
    return float(gaps.nan_to_num(nan=math.inf).max()) if gaps.numel() > 0 else 0.0


def of_results(found: dict, expected: dict) -> float:
    """The largest deviation of two results of `compute`."""
    assert set(found) == set(expected)
    gaps = [0.0]
    for name, value in expected.items():
        if isinstance(value, dict):
            gaps.append(of_results(found[name], value))
        elif isinstance(value, str):
            assert found[name] == value
        else:
            gaps.append(deviation(found[name], value))
    return max(gaps)


def counted(function, *args, **kwargs):
    """(result, bytes)"""
    with SentBytes() as sent:
        found = function(*args, **kwargs)
    return found, sent.total


def own_columns(whole, dim=-1):
    """(columns of this rank, the first of them), uneven, and not in the order of the ranks."""
    size = dist.get_world_size()
    edges = [0, *(1 + 2 * i for i in range(size - 1)), whole.shape[dim]]
    number = size - 1 - dist.get_rank()
    start, end = edges[number : number + 2]
    return whole.narrow(dim, start, end - start), start


PLACEMENTS = {
    "vocab": Shard(-1),
    "batch": Shard(0),
    "sequence": Shard(1),
    "copies": Replicate(),
}


# --- token_nll and token_stats --------------------------------------------------------------------


@case(dtype="float32", vocab_size=11)
@case(dtype="float32", vocab_size=2)  # fewer columns than ranks
@case(dtype="bfloat16", vocab_size=11)
@case(dtype="float64", vocab_size=11)
@case(dtype="float32", vocab_size=5003)  # several blocks
def dtensors(ppl, dtype, vocab_size):
    logits, targets = rows(vocab_size=vocab_size)
    logits = logits.to(getattr(torch, dtype))
    expected, stats = ppl.token_nll(logits, targets), ppl.token_stats(logits, targets)
    gaps = []
    for placement in PLACEMENTS.values():
        spread = distribute_tensor(logits, mesh(), [placement])
        nll = ppl.token_nll(spread, targets)
        of_rows = Replicate() if placement == Shard(-1) else placement
        assert nll.placements == (of_rows,)
        assert nll.dtype == expected.dtype
        gaps.append(deviation(nll, expected))
        found = ppl.token_stats(spread, distribute_tensor(targets, mesh(), [Shard(0)]))
        assert found.rank.dtype == torch.int32
        gaps += map(deviation, found.tensors, stats.tensors)
    return {"deviation": max(gaps)}


@case()
def rows_of_nan_and_infinity(ppl):
    logits, targets = rows()
    inf, nan = math.inf, math.nan
    targets = targets.clamp(min=0)
    logits[0, 0, 3], logits[0, 1, 10], logits[0, 2, 0] = nan, inf, -inf
    logits[0, 3], logits[0, 4, :6], logits[0, 5, 6:] = -inf, -inf, -inf
    logits[1, 0], logits[1, 1, 1:] = nan, -inf
    targets[0, 2] = 0  # whose probability is 0
    targets[1, 1] = 0  # whose probability is 1
    logits[2] = 1e5 * logits[2]
    expected, stats = ppl.token_nll(logits, targets), ppl.token_stats(logits, targets)
    assert expected.isnan().sum() == 4
    assert expected.isinf().sum() >= 1
    spread = distribute_tensor(logits, mesh(), [Shard(2)])
    found = ppl.token_stats(spread, targets)
    defined = ~expected.isnan()
    gaps = [deviation(ppl.token_nll(spread, targets), expected)]
    for values, true in zip(found.tensors, stats.tensors, strict=True):
        gaps.append(deviation(values.full_tensor()[defined], true[defined]))
    return {"deviation": max(gaps), "entropy of NaN": float(found.entropy.full_tensor()[0, 0])}


@case()
def one_row(ppl):
    logits, _ = rows()
    spread = distribute_tensor(logits[0, 0], mesh(), [Shard(0)])
    expected = ppl.token_nll(logits[0, 0], torch.tensor(4))
    return {"deviation": deviation(ppl.token_nll(spread, torch.tensor(4)), expected)}


@case()
def nothing_to_score(ppl):
    logits, targets = rows()
    spread = distribute_tensor(logits, mesh(), [Shard(-1)])
    found = ppl.token_nll(spread, torch.full_like(targets, -100))
    return {"deviation": deviation(found, torch.zeros(targets.shape))}


@case(dtype="float32")
@case(dtype="bfloat16")
def probabilities(ppl, dtype):
    logits, targets = rows()
    values = logits.softmax(-1).to(getattr(torch, dtype))
    values[0, 0, targets[0, 0].clamp(min=0)] = 0
    expected = ppl.token_nll(values, targets, from_logits=False)
    gaps = []
    for placement in PLACEMENTS.values():
        spread = distribute_tensor(values, mesh(), [placement])
        gaps.append(deviation(ppl.token_nll(spread, targets, from_logits=False), expected))
    return {"deviation": max(gaps)}


@case(with_all=False)
@case(with_all=True)
def plain_columns(ppl, with_all):
    logits, targets = rows(batch=20, length=60)
    function = ppl.token_stats if with_all else ppl.token_nll
    expected = function(logits, targets)
    columns, start = own_columns(logits)
    options = {"vocab_start": start, "process_group": dist.group.WORLD}
    found, sent = counted(function, columns, targets, **options)
    pairs = zip(found.tensors, expected.tensors, strict=True) if with_all else [(found, expected)]
    gap = max(deviation(*pair) for pair in pairs)
    return {"deviation": gap, "bytes_per_token": sent / int((targets != -100).sum())}


@case()
def bytes_of_dtensors(ppl):
    """The most of any placement."""
    logits, targets = rows(batch=20, length=60)
    most = 0.0
    for placement in PLACEMENTS.values():
        spread = distribute_tensor(logits, mesh(), [placement])
        _, sent = counted(ppl.token_nll, spread, targets)
        _, of_compute = counted(ppl.compute, predictions=spread, references=targets)
        most = max(most, sent, of_compute)
    return {"bytes_per_token": most / int((targets != -100).sum())}


# --- an output layer ------------------------------------------------------------------------------


def layer(dtype="float32", vocab_size=11):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 7, 4, generator=generator)
    weight, bias = (
        torch.randn(vocab_size, 4, generator=generator),
        torch.randn(vocab_size, generator=generator),
    )
    dtype = getattr(torch, dtype)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


@case(dtype="float32", backend="auto", vocab_size=11)
@case(dtype="bfloat16", backend="auto", vocab_size=11)
@case(dtype="float64", backend="auto", vocab_size=11)
@case(dtype="float32", backend="auto", vocab_size=2)
@case(dtype="float32", backend="auto", vocab_size=20001)  # several tiles
def output_layers(ppl, dtype, backend, vocab_size):
    hidden, weight, bias = layer(dtype, vocab_size)
    targets = rows(vocab_size=vocab_size)[1]
    gaps = []
    for added, more in itertools.product((None, bias), ({}, {"softcap": 3.0, "logit_scale": 0.5})):
        expected = ppl.linear_token_nll(hidden, weight, targets, bias=added, **more)
        spread = distribute_tensor(weight, mesh(), [Shard(0)])
        found = ppl.linear_token_nll(hidden, spread, targets, bias=added, **more)
        gaps.append(deviation(found, expected))
        if added is not None:
            added = distribute_tensor(added, mesh(), [Shard(0)])
        copies = distribute_tensor(hidden, mesh(), [Replicate()])
        found = ppl.linear_token_nll(copies, spread, targets, bias=added, **more)
        gaps.append(deviation(found, expected))
    return {"deviation": max(gaps)}


@case()
def plain_output_layer(ppl):
    hidden, weight, bias = layer()
    hidden, targets = hidden.repeat(8, 5, 1), rows(batch=40, length=35)[1]
    expected = ppl.linear_token_nll(hidden, weight, targets, bias=bias)
    columns, start = own_columns(weight, 0)
    options = {"vocab_start": start, "process_group": dist.group.WORLD}
    options["bias"] = own_columns(bias, 0)[0]
    found, sent = counted(ppl.linear_token_nll, hidden, columns, targets, **options)
    num_tokens = int((targets != -100).sum())
    return {"deviation": deviation(found, expected), "bytes_per_token": sent / num_tokens}


# --- add_batch and compute ------------------------------------------------------------------------


@case(shift=False)
@case(shift=True)
def batches(ppl, shift):
    """Without sync every rank has the result of the whole, with it each token counts once."""
    gaps = []
    for weights in (None, torch.rand(5, 7, generator=torch.manual_seed(2)), torch.rand(5)):
        if weights is not None:  # equal on all ranks
            dist.broadcast(weights, 0)
        for placement in PLACEMENTS.values():
            alone, whole, synced = (
                Perplexity(shift=shift),
                Perplexity(shift=shift),
                Perplexity(shift=shift),
            )
            for seed in (0, 1):
                logits, targets = rows(seed=seed)
                spread = distribute_tensor(logits, mesh(), [placement])
                arguments = {"references": targets, "sample_weight": weights}
                arguments["groups"] = [f"{seed}", "a", "a", "b", "b"]
                alone.add_batch(predictions=logits, **arguments)
                whole.add_batch(predictions=spread, **arguments)
                arguments["references"] = distribute_tensor(targets, mesh(), [Shard(1)])
                synced.add_batch(predictions=spread, **arguments)
            expected = alone.compute()
            gaps.append(of_results(whole.compute(), expected))
            gaps.append(of_results(synced.compute(sync=True), expected))
    return {"deviation": max(gaps)}


@case()
def shared_and_own(ppl):
    """A batch that the ranks share, and then one that each has for itself."""
    logits, targets = rows()
    alone = Perplexity()
    alone.add_batch(predictions=logits, references=targets)
    for rank in range(dist.get_world_size()):
        more, more_targets = rows(seed=10 + rank)
        alone.add_batch(predictions=more, references=more_targets)
    ppl.add_batch(predictions=distribute_tensor(logits, mesh(), [Shard(1)]), references=targets)
    more, more_targets = rows(seed=10 + dist.get_rank())
    ppl.add_batch(predictions=more, references=more_targets)
    ppl.sync()
    return {"deviation": of_results(ppl.compute(), alone.compute())}


@case()
def merged_and_called(ppl):
    logits, targets = rows()
    spread = distribute_tensor(logits, mesh(), [Shard(-1)])
    expected = ppl(predictions=logits, references=targets)
    ppl.reset()
    gap = deviation(ppl(predictions=spread, references=targets), expected)
    other = Perplexity()
    other.merge(ppl)
    found = other.compute(sync=True)
    assert found["num_sequences"] == 5
    return {"deviation": max(gap, deviation(found["perplexity"], expected))}


@case()
def compute_probabilities(ppl):
    logits, targets = rows()
    values = logits.softmax(-1)
    options = {"references": targets, "from_logits": False}
    expected = ppl.compute(predictions=values, **options)
    gaps = []
    for placement in PLACEMENTS.values():
        spread = distribute_tensor(values, mesh(), [placement])
        gaps.append(of_results(ppl.compute(predictions=spread, **options), expected))
    return {"deviation": max(gaps)}


@case(MESH_CASES, first="vocab", second="batch")
@case(MESH_CASES, first="batch", second="vocab")
@case(MESH_CASES, first="sequence", second="vocab")
@case(MESH_CASES, first="batch", second="sequence")
@case(MESH_CASES, first="vocab", second="vocab")
@case(MESH_CASES, first="batch", second="batch")
@case(MESH_CASES, first="copies", second="vocab")
def two_dimensions(ppl, first, second):
    logits, targets = rows(batch=21, length=61)
    both = mesh(2, 2)
    spread = distribute_tensor(logits, both, [PLACEMENTS[first], PLACEMENTS[second]])
    expected, stats = ppl.token_nll(logits, targets), ppl.token_stats(logits, targets)
    gaps = [deviation(ppl.token_nll(spread, targets), expected)]
    gaps += map(deviation, ppl.token_stats(spread, targets).tensors, stats.tensors)
    shifted = Perplexity(shift=True)
    whole = shifted.compute(predictions=logits, references=targets.clamp(min=0))
    options = {"predictions": spread, "references": targets.clamp(min=0)}
    found, sent = counted(shifted.compute, **options)
    gaps.append(of_results(found, whole))
    gaps.append(of_results(shifted.compute(**options, sync=True), whole))
    return {"deviation": max(gaps), "bytes_per_token": sent / targets.numel()}


@case(MESH_CASES)
def a_mesh_for_each_half(ppl):
    """Two data-parallel copies, each with the vocabulary over two ranks, and batches of its own."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    alone = Perplexity()
    for seed in (0, 1):
        logits, targets = rows(seed=seed)
        alone.add_batch(predictions=logits, references=targets)
    logits, targets = rows(seed=both.get_local_rank("data"))
    ppl.add_batch(
        predictions=distribute_tensor(logits, both["tensor"], [Shard(-1)]), references=targets
    )
    return {"deviation": of_results(ppl.compute(sync=True), alone.compute())}


@case(MESH_CASES)
def an_error_in_one_row_of_the_mesh(ppl):
    logits, targets = rows()
    spread = distribute_tensor(logits, mesh(2, 2), [Shard(0), Shard(-1)])
    ppl.compute(predictions=spread, references=targets if dist.get_rank() > 0 else targets.float())


@case(MESH_CASES)
def a_bad_probability_in_one_row_of_the_mesh(ppl):
    logits, targets = rows()
    values = logits.softmax(-1)
    values[0, 0, 0], targets[0, 0] = -1, 1
    spread = distribute_tensor(values, mesh(2, 2), [Shard(0), Shard(-1)])
    ppl.token_nll(spread, targets, from_logits=False)


# --- errors ---------------------------------------------------------------------------------------


def error_case(function):
    """A case that raises; it gets logits that are sharded along the vocabulary, and targets."""

    def run(ppl):
        logits, targets = rows()
        function(ppl, distribute_tensor(logits, mesh(), [Shard(-1)]), targets)

    CASES[function.__name__] = run
    return function


@error_case
def target_beyond(ppl, logits, targets):
    targets[1, 2] = 11
    ppl.token_nll(logits, targets)


@error_case
def target_beyond_in_compute(ppl, logits, targets):
    targets[1, 2] = 11
    Perplexity(shift=True).compute(predictions=logits, references=targets)


@error_case
def target_beyond_plain_columns(ppl, logits, targets):
    columns, start = own_columns(logits.full_tensor())
    targets[1, 2] = -7
    ppl.token_nll(columns, targets, vocab_start=start, process_group=dist.group.WORLD)


@error_case
def other_targets_on_one(ppl, logits, targets):
    targets[0, 0] = dist.get_rank() == 1
    ppl.token_nll(logits, targets)


@error_case
def other_weights_on_one(ppl, logits, targets):
    weights = torch.ones(5)
    weights[0] += dist.get_rank() == 1
    ppl.add_batch(predictions=logits, references=targets, sample_weight=weights)


@error_case
def other_dtype_on_one(ppl, logits, targets):
    ppl.token_nll(logits, targets, dtype="float64" if dist.get_rank() == 1 else "float32")


@error_case
def float_targets_on_one(ppl, logits, targets):
    ppl.token_stats(logits, targets.float() if dist.get_rank() == 1 else targets)


@error_case
def no_references_on_one(ppl, logits, targets):
    ppl.add_batch(predictions=logits, references=None if dist.get_rank() == 1 else targets)


@error_case
def no_references_on_one_with_sync(ppl, logits, targets):
    references = None if dist.get_rank() == 1 else targets
    ppl.compute(predictions=logits, references=references, sync=True)


@error_case
def texts_pending_on_one(ppl, logits, targets):
    if dist.get_rank() == 1:
        ppl.add_batch(predictions=["A text."])
    ppl.compute(predictions=logits, references=targets, sync=True)


@error_case
def negative_weight(ppl, logits, targets):
    weights = torch.ones(5)
    weights[3] = -1
    targets[3] = 0
    ppl.compute(predictions=logits, references=targets, sample_weight=weights)


@error_case
def other_shape(ppl, logits, targets):
    ppl.compute(predictions=logits, references=targets[:, 1:])


@error_case
def negative_probability_on_one(ppl, logits, targets):
    values = logits.full_tensor().softmax(-1)
    values[0, 0, 0], targets[0, 0] = -1, 1
    spread = distribute_tensor(values, mesh(), [Shard(-1)])
    ppl.token_nll(spread, targets, from_logits=False)


@error_case
def partial_sums(ppl, logits, targets):
    spread = DTensor.from_local(logits.full_tensor(), mesh(), [Partial()])
    ppl.token_nll(spread, targets)


@error_case
def parts_of_other_sizes(ppl, logits, targets):
    whole = logits.full_tensor()
    columns, _ = own_columns(whole)
    spread = DTensor.from_local(
        columns, mesh(), [Shard(-1)], shape=whole.shape, stride=whole.stride()
    )
    ppl.token_nll(spread, targets)


@error_case
def gradient(ppl, logits, targets):
    ppl.token_nll(logits.detach().requires_grad_(), targets)


@error_case
def gradient_of_weight(ppl, logits, targets):
    hidden, weight, _ = layer()
    weight = distribute_tensor(weight, mesh(), [Shard(0)]).requires_grad_()
    ppl.linear_token_nll(hidden, weight, targets)


@error_case
def gap_in_the_vocabulary(ppl, logits, targets):
    columns, start = own_columns(logits.full_tensor())
    start += dist.get_rank() == 0  # which has the last columns
    ppl.token_nll(columns, targets, vocab_start=start, process_group=dist.group.WORLD)


@error_case
def start_without_group(ppl, logits, targets):
    ppl.token_nll(logits.to_local(), targets, vocab_start=0)


@error_case
def group_without_start(ppl, logits, targets):
    ppl.linear_token_nll(*layer()[:2], targets, process_group=dist.group.WORLD)


@error_case
def start_of_a_dtensor(ppl, logits, targets):
    ppl.token_stats(logits, targets, vocab_start=0, process_group=dist.group.WORLD)


@error_case
def no_group(ppl, logits, targets):
    ppl.token_nll(logits.to_local(), targets, vocab_start=0, process_group="all")


@error_case
def start_that_is_no_integer(ppl, logits, targets):
    ppl.token_nll(logits.to_local(), targets, vocab_start=0.5, process_group=dist.group.WORLD)


@error_case
def weight_along_hidden_size(ppl, logits, targets):
    hidden, weight, _ = layer()
    ppl.linear_token_nll(hidden, distribute_tensor(weight, mesh(), [Shard(1)]), targets)


@error_case
def sharded_hidden(ppl, logits, targets):
    hidden, weight, _ = layer()
    spread = distribute_tensor(weight, mesh(), [Shard(0)])
    ppl.linear_token_nll(distribute_tensor(hidden, mesh(), [Shard(0)]), spread, targets)


@error_case
def bias_of_another_size_on_one(ppl, logits, targets):
    hidden, weight, bias = layer()
    spread = distribute_tensor(weight, mesh(), [Shard(0)])
    ppl.linear_token_nll(hidden, spread, targets, bias=bias[: 2 if dist.get_rank() == 1 else None])


@error_case
def unknown_backend(ppl, logits, targets):
    ppl.token_nll(logits, targets, backend="cuda")


def main() -> None:
    # A rank that waits for another raises after this time.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    results = {}
    cases = MESH_CASES if dist.get_world_size() == 4 else CASES
    # Once more at the end: errors leave nothing behind that another call would meet.
    for name, function in [*cases.items(), next(iter(cases.items()))]:
        try:
            results[name] = function(Perplexity())
        except (ValueError, TypeError, ConnectionError) as error:
            results[name] = f"{type(error).__name__}: {error}"
    Path(f"{sys.argv[1]}.{dist.get_rank()}").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
