"""The output layer in tiles against the logits of the whole layer, in float64."""

import math

import pytest
import torch
from support import reference_nll

from ppleval.logits import tiles as nll_tiles
from ppleval.logits.outputs import LogitTransform
from ppleval.logits.product import Product

IDENTITY = LogitTransform()


def make(num_rows, hidden_size, vocab_size, dtype=torch.float32):
    """Hidden states, a weight that gives logits of size 1, and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5
    return hidden, weight.to(dtype), torch.randint(vocab_size, (num_rows,), generator=generator)


def found_nll(hidden, weight, targets, bias=None, transform=IDENTITY, dtype=torch.float32):
    return nll_tiles.product_nll(hidden, Product(weight, bias), targets, transform, dtype)


# The last tile of 50257 columns and of 1100 rows is not full.
@pytest.mark.parametrize(
    ("num_rows", "vocab_size"), [(600, 1000), (1, 1), (3, 8193), (1100, 50257), (40, 262144)]
)
@pytest.mark.parametrize("hidden_size", [64, 1024])
def test_float32_is_within_2e_6_nats_of_float64(num_rows, vocab_size, hidden_size):
    hidden, weight, targets = make(num_rows, hidden_size, vocab_size)
    targets[::2] = (hidden[::2] @ weight.t()).argmax(1)
    expected = reference_nll(hidden.double() @ weight.double().t(), targets)
    found = found_nll(hidden, weight, targets)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_weights(dtype):
    hidden, weight, targets = make(600, 300, 20_000, dtype)
    expected = reference_nll(hidden.double() @ weight.double().t(), targets)
    exact = dtype == torch.float64
    found = found_nll(hidden, weight, targets, dtype=torch.float64 if exact else torch.float32)
    tolerance = 1e-12 if exact else 2e-6
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_bias_scale_and_softcap(logit_scale, softcap):
    hidden, weight, targets = make(520, 40, 3001)
    bias = torch.linspace(-5, 5, 3001)
    scores = (hidden.double() @ weight.double().t() + bias) * logit_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    found = found_nll(hidden, weight, targets, bias, LogitTransform(logit_scale, softcap))
    expected = reference_nll(scores, targets)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)


def test_columns_of_probability_zero():
    hidden, weight, targets = make(4, 8, 30_000)
    bias = torch.zeros(30_000)
    bias[:20_000] = -math.inf  # whole tiles of it
    targets[:] = torch.tensor([25_000, 20_000, 29_999, 3])
    expected = reference_nll((hidden.double() @ weight.double().t()) + bias, targets)
    assert expected[3] == math.inf
    torch.testing.assert_close(
        found_nll(hidden, weight, targets, bias).double(), expected, rtol=0, atol=2e-6
    )


def test_rows_without_a_probability():
    hidden, weight, targets = make(5, 8, 20_000)
    hidden[1, 2], hidden[3, 0] = math.nan, math.inf
    found = found_nll(hidden, weight, targets)
    assert found.isnan().tolist() == [False, True, False, True, False]
    assert found_nll(hidden, weight, targets, torch.full((20_000,), -math.inf)).isnan().all()


def test_a_certain_prediction_has_no_negative_nll():
    hidden, weight, targets = make(200, 16, 10_000)
    weight[targets] = 20 * hidden
    found = found_nll(hidden, weight, targets)
    assert (found >= 0).all()
    assert found.median() < 1e-6


def test_the_number_of_threads_changes_no_bit():
    hidden, weight, targets = make(700, 64, 50257, torch.bfloat16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(found_nll(hidden, weight, targets))
            found.append(found_nll(hidden.float(), weight.float(), targets))
    finally:
        torch.set_num_threads(before)
    for i in range(2, len(found)):
        assert torch.equal(found[i], found[i - 2])
