"""The probability of some ids together, against log-softmax in float64."""

import math

import pytest
import torch
from support import random_rows

from ppleval.logits import mass as nll_share
from ppleval.logits import output_layer as nll_linear
from ppleval.logits.outputs import LogitTransform
from ppleval.logits.product import Product

IDENTITY = LogitTransform()


def share_of_logits(logits, ids, transform=IDENTITY, dtype="float32"):
    everywhere = torch.arange(len(logits))
    outputs = nll_linear.OutputRows(
        logits, everywhere, everywhere, lambda rows: rows, transform, logits.shape[1]
    )
    return nll_share.share_nll(outputs, torch.tensor(ids, dtype=torch.int64), dtype)


def reference(scores, ids):
    return -scores.double().log_softmax(-1)[:, ids].logsumexp(-1)


# One id, some, all but one; 200 rows of the largest vocabulary pass in several blocks.
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "ids"),
    [
        (1, 3, [2]),
        (5, 1000, range(0, 1000, 3)),
        (5, 1000, range(999)),
        (200, 262144, range(100, 262144, 2)),
    ],
)
def test_shares_of_logits(num_rows, vocab_size, ids):
    logits, _ = random_rows(num_rows, vocab_size)
    before = logits.clone()
    found = share_of_logits(logits, list(ids))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference(logits, list(ids)), rtol=1e-6, atol=1e-6)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("given", "precision", "expected", "tolerance"),
    [
        (torch.bfloat16, "float32", torch.float32, 1e-6),
        (torch.float32, "float64", torch.float64, 1e-13),
        (torch.float64, "float32", torch.float64, 1e-13),
    ],
)
def test_precision_is_that_of_the_reduction_or_of_the_logits(given, precision, expected, tolerance):
    logits, _ = random_rows(4, 50, given)
    found = share_of_logits(logits, [3, 7, 8], dtype=precision)
    assert found.dtype == expected
    torch.testing.assert_close(
        found.double(), reference(logits, [3, 7, 8]), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_shares_under_an_output_layer(softcap):
    generator = torch.Generator().manual_seed(0)
    shapes = (40, 16), (300, 16), (300,)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    transform = LogitTransform(0.5, softcap)
    positions = torch.tensor([3, 0, 39, 39])
    outputs = nll_linear.OutputRows(
        hidden, positions, positions, Product(weight, bias), transform, 300
    )
    found = nll_share.share_nll(outputs, torch.arange(0, 300, 2), "float32")
    scores = transform(hidden.double() @ weight.double().t() + bias.double())[positions]
    torch.testing.assert_close(
        found.double(), reference(scores, range(0, 300, 2)), rtol=1e-5, atol=1e-5
    )


def test_a_distance_between_logits_and_0_costs_no_digits():
    """GPT-2's logits are about -100; a share near 1 has a nll near 0."""
    logits = torch.tensor([[0.0, 0.0, -10.0], [0.0, -80.0, -80.0]])
    for offset in (0.0, -1000.0):
        found = share_of_logits(logits + offset, [0, 1])
        expected = [math.log1p(math.exp(-10) / 2), math.log1p(math.exp(-80))]
        assert found.tolist() == pytest.approx(expected, abs=1e-7)
    # Below the smallest float.
    assert share_of_logits(torch.tensor([[0.0, -200.0]]), [1]).item() == 200


def test_ids_that_cannot_come_or_are_none():
    logits = torch.tensor([[0.0, -math.inf, 1.0]])
    assert share_of_logits(logits, [1]).item() == math.inf
    assert share_of_logits(logits, []).item() == math.inf
    assert share_of_logits(logits[:0], [1]).tolist() == []
