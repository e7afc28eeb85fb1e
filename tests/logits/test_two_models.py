"""Two models' predictions of the same tokens, against full log-softmax in float64."""

import math

import pytest
import torch
from support import random_rows

from ppleval.logits import output_layer as nll_linear
from ppleval.logits import two_models as nll_pairs
from ppleval.logits.outputs import LogitTransform
from ppleval.logits.product import Product

IDENTITY = LogitTransform()


def of_logits(logits, targets, transform=IDENTITY):
    """What a model gives whose own logits are used."""
    everywhere = torch.arange(len(logits))
    return nll_linear.OutputRows(
        logits, everywhere, targets, lambda rows: rows, transform, logits.shape[1]
    )


def of_layer(hidden, weight, targets, bias=None, transform=IDENTITY):
    """What a model gives whose output layer is a product."""
    everywhere = torch.arange(len(hidden))
    return nll_linear.OutputRows(
        hidden, everywhere, targets, Product(weight, bias), transform, len(weight)
    )


def compare_logits(logits, base_logits, targets):
    return nll_pairs.compare_rows(
        of_logits(logits, targets), of_logits(base_logits, targets), "float32"
    )


def layer(num_rows, hidden_size, vocab_size, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5
    return hidden, weight.to(dtype)


def reference(scores, base_scores, targets):
    """Oracle: every statistic from both log-softmax in float64."""
    q, p = scores.double().log_softmax(-1), base_scores.double().log_softmax(-1)
    here = torch.arange(len(targets)), targets
    return {
        "nll": -q[here],
        "base_nll": -p[here],
        "kl": (p.exp() * (p - q)).sum(-1),
        "reverse_kl": (q.exp() * (q - p)).sum(-1),
        "top": scores.argmax(-1),
        "base_top": base_scores.argmax(-1),
    }


def assert_close(found, expected, atol=1e-6):
    for name, values in expected.items():
        assert getattr(found, name).dtype == values.dtype or name in ("nll", "base_nll")
        torch.testing.assert_close(
            getattr(found, name).double(), values.double(), rtol=1e-6, atol=atol, msg=name
        )


# Below, at and above a tile's 512 columns and rows; the largest vocabulary in use.
@pytest.mark.parametrize(
    ("num_rows", "vocab_size"), [(1, 1), (3, 7), (5, 512), (520, 1000), (30, 50257), (4, 262144)]
)
def test_logits(num_rows, vocab_size):
    logits, targets = random_rows(num_rows, vocab_size)
    base_logits, _ = random_rows(num_rows, vocab_size, seed=1)
    found = compare_logits(logits, base_logits, targets)
    assert_close(found, reference(logits, base_logits, targets), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_output_layers_of_different_width(dtype):
    hidden, weight = layer(600, 64, 5000, seed=0, dtype=dtype)
    base_hidden, base_weight = layer(600, 300, 5000, seed=1, dtype=dtype)
    targets = torch.randint(5000, (600,), generator=torch.Generator().manual_seed(2))
    found = nll_pairs.compare_rows(
        of_layer(hidden, weight, targets), of_layer(base_hidden, base_weight, targets), "float32"
    )
    expected = reference(
        hidden.double() @ weight.double().t(),
        base_hidden.double() @ base_weight.double().t(),
        targets,
    )
    assert_close(found, expected, atol=1e-12 if dtype == torch.float64 else 2e-6)


def test_a_layer_with_scale_cap_and_bias_beside_logits():
    hidden, weight = layer(70, 40, 3001, seed=0)
    bias, transform = torch.linspace(-3, 3, 3001), LogitTransform(0.5, 2.0)
    base_logits, targets = random_rows(70, 3001, torch.bfloat16)
    found = nll_pairs.compare_rows(
        of_layer(hidden, weight, targets, bias, transform),
        of_logits(base_logits, targets),
        "float32",
    )
    scores = transform(hidden.double() @ weight.double().t() + bias)
    assert_close(found, reference(scores, base_logits, targets), atol=2e-6)


def test_by_hand():
    """P = (1/2, 1/2) and Q = (3/4, 1/4), as in DEMAND's values; the target is the first."""
    base, model = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    targets = torch.tensor([0])
    found = nll_pairs.compare_rows(of_logits(model, targets), of_logits(base, targets), "float64")
    assert found.kl.item() == pytest.approx(0.1438410362, abs=1e-7)
    assert found.reverse_kl.item() == pytest.approx(0.1308120360, abs=1e-7)
    assert found.nll.item() == pytest.approx(math.log(4 / 3), abs=1e-7)


@pytest.mark.parametrize("vocab_size", [7, 5000])
def test_a_model_against_itself_is_at_no_distance(vocab_size):
    logits, targets = random_rows(40, vocab_size)
    hidden, weight = layer(40, 16, vocab_size, seed=0)
    for make in (lambda: of_logits(logits, targets), lambda: of_layer(hidden, weight, targets)):
        found = nll_pairs.compare_rows(make(), make(), "float32")
        assert (found.kl == 0).all()
        assert (found.reverse_kl == 0).all()
        assert torch.equal(found.nll, found.base_nll)
        assert torch.equal(found.top, found.base_top)


def test_a_constant_added_to_the_logits_changes_nothing():
    """As one model's logits lie far from those of the other: their distance cancels."""
    logits, targets = random_rows(20, 3000, torch.float64)
    base_logits, _ = random_rows(20, 3000, torch.float64, seed=1)
    pairs = [
        compare_logits((logits + shift).float(), base_logits.float(), targets) for shift in (0, 64)
    ]
    torch.testing.assert_close(pairs[1].kl, pairs[0].kl, rtol=0, atol=1e-5)


# In one tile, and in several; the largest a float32 holds is 3.4e38.
@pytest.mark.parametrize("vocab_size", [7, 2000])
@pytest.mark.parametrize("size", [3e38, -3e38, 1e30])
def test_logits_of_any_size(vocab_size, size):
    """Beside such numbers everything else vanishes, and a difference of two overflows."""
    base_logits, targets = random_rows(6, vocab_size)
    logits, _ = random_rows(6, vocab_size, seed=1)
    logits = size * (logits > 0)
    logits[:2] = size  # the same for all ids: uniform
    logits[2] = -size * (logits[2] != size)
    for model, base in ((logits, base_logits), (base_logits, logits)):
        found, expected = compare_logits(model, base, targets), reference(model, base, targets)
        for name in ("kl", "reverse_kl"):
            torch.testing.assert_close(getattr(found, name), expected[name], rtol=1e-6, atol=2e-6)


def test_models_that_hardly_differ():
    """A KL divergence of 1e-7 is right to 1e-8, and never below 0."""
    logits, targets = random_rows(200, 4000)
    noise, _ = random_rows(200, 4000, seed=1, scale=5e-4)
    found = nll_pairs.compare_rows(
        of_logits(logits + noise, targets), of_logits(logits, targets), "float32"
    )
    expected = reference(logits + noise, logits, targets)["kl"]
    assert expected.mean() < 2e-7
    assert found.kl.mean().item() == pytest.approx(expected.mean().item(), abs=1e-8)
    assert (found.kl >= 0).all()


@pytest.mark.parametrize("vocab_size", [6, 2000])
def test_zero_probabilities(vocab_size):
    """KL is infinite where the model rules out what the base allows, and only there."""
    infinite = -torch.inf
    logits, targets = torch.zeros(5, vocab_size), torch.zeros(5, dtype=torch.int64)
    base_logits = torch.zeros(5, vocab_size)
    logits[0, -1] = infinite  # the model excludes an id
    base_logits[1, -1] = infinite  # the base does
    logits[2, -1] = base_logits[2, -1] = infinite  # both do
    logits[3, 1:] = infinite  # whole tiles
    base_logits[4, 1:] = infinite
    base_logits[4, 1] = -200.0  # underflows, but is not 0
    logits[4, 1] = infinite
    found = compare_logits(logits, base_logits, targets)
    n = vocab_size
    expected = [math.inf, math.log(n / (n - 1)), 0.0, math.inf, math.inf]
    assert found.kl.tolist() == pytest.approx(expected, abs=1e-6)
    assert found.reverse_kl[:4].tolist() == pytest.approx(
        [math.log(n / (n - 1)), math.inf, 0.0, math.log(n)], abs=1e-6
    )


def test_nan_stays_in_its_row():
    logits, targets = random_rows(3, 1000)
    base_logits, _ = random_rows(3, 1000, seed=1)
    logits[1, 5] = math.nan
    found = compare_logits(logits, base_logits, targets)
    assert found.kl.isnan().tolist() == [False, True, False]
    assert found.nll.isnan().tolist() == [False, True, False]
    assert not found.base_nll.isnan().any()


def test_a_padded_vocabulary_is_compared_on_the_common_ids():
    logits, targets = random_rows(20, 1000)
    base_logits, _ = random_rows(20, 1030, seed=1)
    found = compare_logits(logits, base_logits, targets)
    assert_close(found, reference(logits, base_logits[:, :1000], targets), atol=2e-6)


def test_the_number_of_threads_changes_no_bit():
    hidden, weight = layer(700, 64, 9000, seed=0)
    base_hidden, base_weight = layer(700, 64, 9000, seed=1)
    targets = torch.randint(9000, (700,))
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            results.append(
                nll_pairs.compare_rows(
                    of_layer(hidden, weight, targets),
                    of_layer(base_hidden, base_weight, targets),
                    "float32",
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for mine, theirs in zip(results[0].tensors, other.tensors, strict=True):
            assert torch.equal(mine, theirs)
