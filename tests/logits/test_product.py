"""Logits of an output layer that is a weight and a bias."""

import pytest
import torch

from ppleval.logits import product as nll_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def weights(vocab_size, hidden_size, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5
    return weight.to(DEVICE, dtype), torch.randn(vocab_size, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_logits_are_not_rounded_to_16_bits(dtype, with_bias):
    weight, bias = weights(100_000, 70, dtype)  # more than is upcast at once
    assert weight.numel() > nll_product.UPCAST_AT_ONCE
    hidden = torch.randn(3, 70, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    logits = nll_product.Product(weight, bias if with_bias else None)(hidden)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = hidden.double() @ weight.double().t() + (bias.double() if with_bias else 0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=tolerance)


def test_one_row_takes_the_memory_of_one():
    weight, _ = weights(1000, 4, torch.float32)
    product = nll_product.Product(weight, None)
    for num_rows, most in ((1, 1), (3, 3), (2, 3)):
        logits = product(torch.zeros(num_rows, 4, device=DEVICE))
        assert logits.shape == (num_rows, 1000)
        assert logits.untyped_storage().nbytes() == 4000 * most
