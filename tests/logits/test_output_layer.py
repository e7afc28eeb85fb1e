"""linear_token_nll against the logits of the whole layer, in float64."""

import math

import pytest
import torch
from support import reference_nll

from ppleval.logits import nll
from ppleval.logits import output_layer as linear_nll

linear_token_nll = linear_nll.linear_token_nll
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def layer(num_rows, hidden_size, vocab_size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, hidden_size, generator=generator)
    weight = 3 * torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    return hidden.to(dtype).to(DEVICE), weight.to(dtype).to(DEVICE), targets.to(DEVICE)


def reference(hidden, weight, targets, bias=None, logit_scale=1.0, softcap=None):
    """nll of float64 logits of the same hidden states and weights."""
    logits = hidden.cpu().double() @ weight.cpu().double().t()
    logits = (logits if bias is None else logits + bias.cpu().double()) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return reference_nll(logits, targets.cpu())


def assert_near(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=tolerance)


# 500 rows of 50257: several parts of the buffer, the last one smaller. 1: one row, one id.
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (500, 32, 50257)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_nll_of_float64_logits(shape, dtype):
    hidden, weight, targets = layer(*shape, dtype)
    found = linear_token_nll(hidden, weight, targets)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(found, reference(hidden, weight, targets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_layer_itself_rounds_its_logits(dtype):
    hidden, weight, targets = layer(50, 256, 4000, dtype)
    rounded = nll.token_nll(hidden @ weight.t(), targets)
    expected = reference(hidden, weight, targets)
    assert (rounded.cpu().double() - expected).abs().max() > 1e-3
    assert_near(linear_token_nll(hidden, weight, targets), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_scale_and_softcap(dtype, backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is made for Linux")
    hidden, weight, targets = layer(9, 40, 3001, dtype)
    bias = torch.randn(3001, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    for options in (
        {"bias": bias},
        {"logit_scale": 0.25},
        {"softcap": 2.0},
        {"bias": bias, "logit_scale": 0.5, "softcap": 30.0},
    ):
        found = linear_token_nll(hidden, weight, targets, backend=backend, **options)
        assert_near(found, reference(hidden, weight, targets, **options))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("pattern", ["none", "all", "alternating"])
def test_ignored_rows_are_not_multiplied(pattern, backend, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is made for Linux")
    hidden, weight, targets = layer(60, 8, 5000)
    number = torch.arange(60, device=DEVICE)
    ignored = {"none": number < 0, "all": number >= 0, "alternating": number % 2 == 0}[pattern]
    expected = reference(hidden, weight, targets).masked_fill(ignored.cpu(), 0)
    multiplied = []
    # On a CPU threads multiply tiles, so the rows are counted where both ways take them.
    launch_rows = linear_nll.launch_rows

    def counted(outputs, **options):
        multiplied.append(len(outputs.positions))
        return launch_rows(outputs, **options)

    monkeypatch.setattr(linear_nll, "launch_rows", counted)
    found = linear_token_nll(
        hidden.masked_fill(ignored[:, None], math.nan),
        weight,
        targets.masked_fill(ignored, -100),
        backend=backend,
    )
    assert multiplied == [(~ignored).sum()]
    assert_near(found, expected)
    assert (found[ignored] == 0).all()


def test_the_bias_reaches_every_part():
    hidden, weight, targets = layer(400, 4, 50257)
    bias = torch.linspace(-5, 5, 50257, device=DEVICE)
    expected = reference(hidden, weight, targets, bias=bias)
    assert_near(linear_token_nll(hidden, weight, targets, bias=bias), expected)


def test_dtype_of_the_reduction():
    hidden, weight, targets = layer(5, 4, 30)
    nll = linear_token_nll(hidden, weight, targets, dtype="float64")
    assert nll.dtype == torch.float64
    logits = (hidden @ weight.t()).cpu()
    assert_near(nll, reference_nll(logits, targets.cpu()), tolerance=1e-6)


def test_several_dimensions_strides_and_ids():
    hidden, weight, targets = layer(24, 6, 50)
    hidden, targets = hidden.view(2, 12, 6)[:, 1::2], targets.view(2, 12)[:, 1::2]
    targets[0, 0], targets[1, 3] = 7, -1
    wide = torch.zeros(50, 12, device=DEVICE)
    wide[:, ::2] = weight
    found = linear_token_nll(hidden, wide[:, ::2], targets, ignore_index=(7, -1))
    scored = (targets != 7) & (targets != -1)
    assert found.shape == (2, 6)
    assert (found[~scored] == 0).all()
    assert_near(found[scored], reference(hidden[scored], weight, targets[scored]))


def test_memory_is_that_of_a_few_rows():
    hidden, weight, targets = layer(300, 4, 50257)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.untyped_storage().nbytes())
            return result

    with Watch():
        linear_token_nll(hidden, weight, targets)
    limit = linear_nll.LOGITS_ON_CPU if DEVICE == "cpu" else linear_nll.LOGITS_ELSEWHERE
    assert max(sizes) <= 4 * limit
    if DEVICE == "cpu":
        assert max(sizes) < 300 * 50257 * 4


def test_rows_at_once_fill_tiles_within_256_mib():
    for vocab_size in (1, 32000, 50257, 131072, 262144):
        num_rows = linear_nll.rows_at_once(vocab_size, torch.device("cuda"))
        assert num_rows % 128 == 0
        assert num_rows * vocab_size * 4 <= 2**28
    assert linear_nll.rows_at_once(10**9, torch.device("cpu")) == 1


def test_the_callers_tensors_are_not_changed():
    hidden, weight, targets = layer(5, 4, 30)
    weight.requires_grad_()
    before = weight.detach().clone()
    linear_token_nll(hidden, weight, targets, softcap=1.0)
    assert torch.equal(weight.detach(), before)


def test_out_of_range_targets_are_named():
    hidden, weight, targets = layer(200, 2, 50257)
    targets[190] = 50257
    message = r"targets\[9, 10\] is 50257, outside the vocabulary of 50257 ids"
    with pytest.raises(ValueError, match=message):
        linear_token_nll(hidden.view(10, 20, 2), weight, targets.view(10, 20))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"hidden": torch.zeros(3, 5)}, ValueError, r"\(3, 5\), \(30, 4\) and \(3,\)"),
        ({"targets": torch.zeros(2).long()}, ValueError, r"targets \(...\), got"),
        ({"weight": torch.zeros(30, 4).long()}, TypeError, "weight must be float16, bfloat16,"),
        ({"weight": torch.zeros(30, 4).to(torch.float8_e4m3fn)}, TypeError, "got torch.float8"),
        ({"bias": torch.zeros(30) * 1j}, TypeError, "bias must be float16.*complex64"),
        ({"targets": torch.zeros(3)}, TypeError, "targets must be integer token ids"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \(vocab_size,\), here \(30,\)"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive number or None, got 0.0"),
        ({"softcap": math.inf}, ValueError, "softcap must be a positive number or None, got inf"),
        ({"softcap": "30"}, ValueError, "softcap must be a positive number or None, got '30'"),
        ({"logit_scale": None}, ValueError, "logit_scale must be a positive number, got None"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be a positive number, got nan"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_errors(change, error, match):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(30, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(error, match=match):
        linear_token_nll(**arguments | change)
