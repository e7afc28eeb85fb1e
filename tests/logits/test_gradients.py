"""The gradients of token_nll and linear_token_nll against autograd's of F.cross_entropy in float64.

The tolerance for 16 bits is one rounding of the float64 gradient of the same inputs.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from support import random_rows
from torch.autograd import gradcheck, gradgradcheck
from transformers import LlamaConfig, LlamaForCausalLM

from ppleval import Perplexity
from ppleval.logits import gradients as linear_gradients
from ppleval.logits.nll import token_nll
from ppleval.logits.output_layer import linear_token_nll

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYER_OPTIONS = [{}, {"logit_scale": 0.25}, {"softcap": 2.0}, {"logit_scale": 3.0, "softcap": 5.0}]


def layer(num_rows, hidden_size, vocab_size, dtype=torch.float64, seed=0):
    """hidden (N, H), weight (V, H), bias (V,), which require gradients, and targets (N,)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_rows, hidden_size), (vocab_size, hidden_size), (vocab_size,)
    scales = 1.0, 2 / hidden_size**0.5, 1.0
    tensors = [
        (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    return *tensors, torch.randint(vocab_size, (num_rows,), generator=generator).to(DEVICE)


def weights_of(targets, seed=3):
    """What the loss multiplies each nll with, as far apart as masks and rewards make them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(targets.shape, generator=generator).to(targets.device)


def gradients(function, inputs, targets):
    """Those of sum(weight nll) for each input."""
    nll = function(*inputs)
    return torch.autograd.grad((weights_of(targets) * nll).sum(), inputs)


def expected_gradients(function, inputs, targets):
    """The same in float64, of the same values."""
    return gradients(function, [i.detach().double().requires_grad_() for i in inputs], targets)


def cross_entropy(logits, targets):
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return nll.view(targets.shape)


def layer_logits(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    logits = F.linear(hidden, weight, bias) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def assert_rounded_once(found, expected, of_largest=0.0):
    """Within one rounding of float64, and the error of the precision that it is computed in."""
    info = torch.finfo(found.dtype)
    # In float32 a score that lies 16 to 32 below its row's maximum is off by up to 1e-6.
    # In float64 the error is that of the reference, which adds up a row in one go.
    computed = 1e-11 if found.dtype == torch.float64 else 2e-6
    tolerance = (info.eps / 2 + computed) * expected.abs() + info.smallest_normal * info.eps / 2
    tolerance += of_largest * expected.abs().max()
    excess = (found.double() - expected).abs() - tolerance
    assert excess.max() <= 0, f"off by {excess.max()} more than one rounding"


@pytest.mark.parametrize("shape", [(7,), (2, 3), ()], ids=str)
def test_gradcheck_of_logits(shape):
    logits = torch.randn(*shape, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, shape)
    if targets.numel() > 2:
        targets.view(-1)[2] = -100
    assert gradcheck(lambda x: token_nll(x, targets), logits)


def test_gradcheck_of_probabilities():
    scores = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (7,))
    targets[2] = -100

    def nll(x):  # does not divide by the sum, so the gradient of that is seen, too
        return token_nll(x.exp() / 40, targets, from_logits=False)

    with pytest.warns(UserWarning, match="do not sum to 1"):
        assert gradcheck(nll, scores)


@pytest.mark.parametrize("options", LAYER_OPTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck_of_an_output_layer(options, with_bias):
    hidden, weight, bias, targets = layer(7, 5, 11)
    targets[2] = -100
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    assert gradcheck(
        lambda h, w, b=None: linear_token_nll(h, w, targets, bias=b, **options), inputs
    )


def test_a_second_derivative_is_refused():
    hidden, weight, _, targets = layer(4, 3, 5)
    match = "cannot be differentiated again, as create_graph=True asks for"
    for nll in (
        lambda h, w: linear_token_nll(h, w, targets),
        lambda h, w: token_nll(h @ w.t(), targets),
    ):
        with pytest.raises(NotImplementedError, match=match):
            gradgradcheck(nll, (hidden, weight))


# 1000: several rows in one block. 40 rows of 50257: several blocks. 151936: wider than a piece that
# is added up in one go. 262144: there the sum of torch's own softmax is off by 5e-5.
@pytest.mark.parametrize("shape", [(70, 1000), (40, 50257), (5, 151936), (3, 262144)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_every_dtype_are_rounded_once(shape, dtype):
    logits, targets = random_rows(*shape, dtype)
    logits[1] = torch.linspace(-5, 5, shape[1])  # here the target has nearly all
    targets[1] = shape[1] - 1
    logits[1, targets[1]] = 24
    logits = logits.to(DEVICE).requires_grad_()
    targets = targets.to(DEVICE)
    (found,) = gradients(lambda x: token_nll(x, targets), [logits], targets)
    (expected,) = expected_gradients(lambda x: cross_entropy(x, targets), [logits], targets)
    assert found.dtype == dtype
    # The reference loses 1 - p[target] to rounding where p[target] is nearly 1.
    of_largest = 1e-15 if dtype == torch.float64 else 0.0
    assert_rounded_once(found, expected, of_largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_of_every_dtype_are_rounded_once(dtype):
    logits, targets = random_rows(30, 3000)
    probabilities = logits.softmax(-1).to(dtype).clamp(min=1e-6).requires_grad_()

    def reference(p):
        return p.sum(-1).log() - p.gather(1, targets[:, None]).squeeze(1).log()

    (found,) = gradients(
        lambda p: token_nll(p, targets, from_logits=False), [probabilities], targets
    )
    (expected,) = expected_gradients(reference, [probabilities], targets)
    finite = expected.abs() < torch.finfo(dtype).max  # 1/p may be more than a float16 holds
    assert finite.double().mean() > 0.99
    assert_rounded_once(found[finite], expected[finite])


# 400 rows of 50257 are two blocks of rows, and a weight of 100 columns has two parts.
@pytest.mark.parametrize("shape", [(50, 24, 1000), (400, 100, 50257)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_output_layer_of_every_dtype(shape, dtype):
    *inputs, targets = layer(*shape, dtype)
    targets[3::5] = -100
    options = {"logit_scale": 0.5, "softcap": 4.0}
    found = gradients(
        lambda h, w, b: linear_token_nll(h, w, targets, bias=b, **options), inputs, targets
    )
    expected = expected_gradients(
        lambda h, w, b: cross_entropy(layer_logits(h, w, b, **options), targets), inputs, targets
    )
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == dtype
        # Sums of many products: their error is one of the largest, not of each sum.
        assert_rounded_once(own, other, of_largest=1e-14 if dtype == torch.float64 else 2e-6)
    assert found[0][3::5].count_nonzero() == 0


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1)], ids=str)
def test_only_what_requires_a_gradient_gets_one(wanted):
    *inputs, targets = layer(6, 4, 30)
    function = lambda h, w, b: linear_token_nll(h, w, targets, bias=b)  # noqa: E731
    expected = gradients(function, inputs, targets)
    leaves = [tensor.detach() for tensor in inputs]
    for i in wanted:
        leaves[i].requires_grad_()
    (weights_of(targets) * function(*leaves)).sum().backward()
    for i, leaf in enumerate(leaves):
        if i in wanted:
            assert torch.equal(leaf.grad, expected[i])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["all", "first", "alternating", "runs"])
def test_rows_without_a_gradient_are_zero_and_not_read(pattern, dtype):
    logits, targets = random_rows(50, 30000, dtype)
    number = torch.arange(50)
    ignored = {
        "all": number >= 0,
        "first": number == 0,
        "alternating": number % 2 == 0,
        "runs": number % 20 < 11,
    }[pattern]
    (expected,) = gradients(lambda x: token_nll(x, targets), [logits.requires_grad_()], targets)
    bad = logits.detach().masked_fill(ignored[:, None], math.nan).requires_grad_()
    marked = targets.masked_fill(ignored, -100)
    (by_target,) = gradients(lambda x: token_nll(x, marked), [bad], targets)
    (by_weight,) = gradients(lambda x: token_nll(x, targets)[~ignored].sum(), [bad], targets[:0])
    assert by_target[ignored].count_nonzero() == 0
    assert by_weight[ignored].count_nonzero() == 0
    assert torch.equal(by_target[~ignored], expected[~ignored])
    assert by_weight.isfinite().all()


def test_infinite_and_nan_rows():
    inf = math.inf
    logits = torch.zeros(5, 4)
    logits[0, 1] = -inf  # the target has no probability
    logits[1, 2] = -inf  # another id has none
    logits[2] = -inf
    logits[3, 0] = math.nan
    logits.requires_grad_()
    targets = torch.ones(5, dtype=torch.int64)
    nll = token_nll(logits, targets)
    assert nll[0] == inf
    (found,) = torch.autograd.grad(nll.sum(), logits)
    assert found[0].tolist() == pytest.approx([1 / 3, -1, 1 / 3, 1 / 3])
    assert found[1].tolist() == pytest.approx([1 / 3, -2 / 3, 0, 1 / 3])
    assert found[2:4].isnan().all()
    (kept,) = torch.autograd.grad(token_nll(logits, targets)[[1, 4]].sum(), logits)
    assert torch.equal(kept[1], found[1])
    assert kept[[0, 2, 3]].count_nonzero() == 0


def test_probabilities_of_zero():
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([2, 0])
    with pytest.warns(UserWarning, match="do not sum to 1"):
        nll = token_nll(probabilities, targets, from_logits=False)
    (found,) = torch.autograd.grad(nll.sum(), probabilities)
    assert found[0].tolist() == [1, 1, -math.inf]
    assert found[1].isnan().all()


def test_a_nan_row_of_weight_0_does_not_reach_the_weight():
    hidden, weight, bias, targets = layer(6, 4, 30, torch.float32)
    with torch.no_grad():
        hidden[2, 1] = math.nan
    nll = linear_token_nll(hidden, weight, targets, bias=bias)
    nll[~nll.isnan()].mean().backward()
    assert hidden.grad[2].count_nonzero() == 0
    for tensor in (hidden, weight, bias):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :-1],
        lambda x: x[..., 3:20],
        lambda x: x.permute(2, 1, 0),
        lambda x: x[::2, 1::2],
        lambda x: x[:1, :1].expand(4, 6, 32),
        lambda x: x[0, 0],
        lambda x: x[:0],
    ],
    ids=["positions", "ids", "transposed", "every other", "expanded", "one row", "none"],
)
def test_strides(view):
    logits = torch.randn(4, 6, 32, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 3, view(logits).shape[:-1])
    (found,) = gradients(lambda x: token_nll(view(x), targets), [logits], targets)
    if targets.numel() == 0:
        assert found.count_nonzero() == 0
        return
    (expected,) = gradients(
        lambda x: cross_entropy(view(x)[None], targets[None])[0], [logits], targets
    )
    torch.testing.assert_close(found, expected)


def test_strides_of_an_output_layer():
    hidden, weight, bias, targets = layer(24, 6, 50)
    targets = targets.view(2, 12)[:, 1::2]

    def views(h, w, b):  # every other position, a transposed weight, one bias for all
        return h.view(2, 12, 6)[:, 1::2], w.t().contiguous().t(), b[:1].expand(50)

    def nll(*inputs):
        h, w, b = views(*inputs)
        return linear_token_nll(h, w, targets, bias=b)

    found = gradients(nll, (hidden, weight, bias), targets)
    expected = gradients(
        lambda *inputs: cross_entropy(layer_logits(*views(*inputs)), targets),
        (hidden, weight, bias),
        targets,
    )
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)


def test_empty_inputs():
    for num_rows, hidden_size in ((0, 4), (3, 0)):
        hidden, weight, bias, targets = layer(num_rows, max(hidden_size, 1), 5)
        hidden, weight = (t.detach()[:, :hidden_size].requires_grad_() for t in (hidden, weight))
        linear_token_nll(hidden, weight, targets, bias=bias).sum().backward()
        assert hidden.grad.shape == (num_rows, hidden_size)
        assert weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype):
    if DEVICE != "cpu":
        pytest.skip("threads share out the work on a CPU only")
    *inputs, targets = layer(500, 70, 40000, dtype)
    targets[5::3] = -100
    logits = layer_logits(*inputs).detach()[:60].requires_grad_()
    probabilities = logits.detach().softmax(-1).requires_grad_()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            own = [
                *gradients(lambda x: token_nll(x, targets[:60]), [logits], targets[:60]),
                *gradients(
                    lambda p: token_nll(p, targets[:60], from_logits=False),
                    [probabilities],
                    targets[:60],
                ),
                *gradients(
                    lambda h, w, b: linear_token_nll(h, w, targets, bias=b), inputs, targets
                ),
            ]
            found.append(own)
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for values, expected in zip(others, found[0], strict=True):
            assert torch.equal(values, expected)


@pytest.mark.parametrize("linear", [False, True])
def test_the_nll_is_that_without_a_gradient(linear):
    *inputs, targets = layer(300, 20, 5000, torch.float32)
    targets[::7] = -100

    def nll():
        if linear:
            return linear_token_nll(inputs[0], inputs[1], targets, bias=inputs[2], softcap=3.0)
        return token_nll(layer_logits(*inputs), targets)

    found = nll()
    assert found.requires_grad
    with torch.no_grad():
        expected = nll()
    assert not expected.requires_grad
    assert torch.equal(found, expected)
    for tensor in inputs:
        tensor.requires_grad_(False)
    assert nll().grad_fn is None
    found.mul_(2)  # the caller may go on in place
    found.sum().backward()


def test_arrays_beside_a_tensor_that_requires_a_gradient():
    hidden, weight, _, targets = layer(6, 4, 30)
    (expected,) = gradients(lambda w: linear_token_nll(hidden, w, targets), [weight], targets)
    arrays = hidden.detach().cpu().numpy(), targets.cpu().numpy()
    if DEVICE == "cpu":
        (found,) = gradients(lambda w: linear_token_nll(arrays[0], w, arrays[1]), [weight], targets)
        assert torch.equal(found, expected)


def test_float64_reduction_and_autocast():
    logits, targets = random_rows(6, 50, torch.bfloat16)
    logits.requires_grad_()
    (found,) = gradients(lambda x: token_nll(x, targets, dtype="float64"), [logits], targets)
    (expected,) = expected_gradients(lambda x: cross_entropy(x, targets), [logits], targets)
    assert_rounded_once(found, expected)
    *inputs, targets = layer(300, 20, 5000, torch.float32)
    function = lambda h, w, b: linear_token_nll(h, w, targets, bias=b)  # noqa: E731
    expected = gradients(function, inputs, targets)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = gradients(function, inputs, targets)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


def largest_tensors(loss, inputs):
    """The bytes of the storages that the backward pass makes, the largest first."""
    made, given = set(), {tensor.data_ptr() for tensor in inputs}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                made.add((storage.nbytes(), storage.data_ptr()))
            return result

    with Watch():
        torch.autograd.grad(loss, inputs)
    return [size for size, pointer in sorted(made, reverse=True) if pointer not in given]


def test_nothing_but_the_gradient_has_the_size_of_the_logits():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # other threads are not watched
    try:
        logits, targets = random_rows(300, 50257)
        nll = token_nll(logits.requires_grad_(), targets)
        first, second, *_ = largest_tensors(nll.sum(), [logits])
        assert first == logits.nbytes
        assert second < logits.nbytes / 10
        hidden, weight, _, targets = layer(2000, 8, 50257, torch.float32)
        nll = linear_token_nll(hidden, weight, targets)
        first, *_ = largest_tensors(nll.sum(), [hidden, weight])
        assert first <= 4 * linear_gradients.LOGITS_ON_CPU < 4 * 2000 * 50257
    finally:
        torch.set_num_threads(before)


def trained_loss(nll_of):
    """The loss of a tiny Llama after some steps; nll_of: hidden, weight, targets -> nll."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(DEVICE)
    # A text whose next id follows from this one, so that there is something to learn.
    ids = (torch.arange(33) * 7 + torch.arange(8)[:, None] * 31) % 500
    ids = ids.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    losses = []
    for _ in range(30):
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        loss = nll_of(hidden, model.lm_head.weight, ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_training_loop_reaches_the_loss_of_cross_entropy():
    ppl = Perplexity()
    found = trained_loss(ppl.linear_token_nll)
    expected = trained_loss(lambda h, w, y: cross_entropy(F.linear(h, w), y))
    assert expected[-1] < expected[0] / 2
    assert found == pytest.approx(expected, abs=1e-4)
