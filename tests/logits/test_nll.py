"""token_nll against torch's cross entropy in float64, over dtypes, shapes, strides and ignores."""

import math
import warnings

import numpy as np
import pytest
import torch
from support import random_rows as rows
from support import reference_nll

from ppleval import Perplexity
from ppleval.logits import nll as nll_module

token_nll = nll_module.token_nll


# 1 row and a vocabulary of 1: the degenerate ends. 50257: GPT-2's, odd, so that rows are unaligned.
# 151936: Qwen's, more than one row does not fit one block of a single thread. 300 rows of 4097:
# several blocks, the last one partial.
SHAPES = [(1, 1), (1, 7), (65, 128), (300, 4097), (40, 50257), (9, 151936)]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_cross_entropy_within_1e_5_nats(shape, dtype):
    logits, targets = rows(*shape, dtype)
    nll = token_nll(logits, targets)
    assert nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(nll.double(), reference_nll(logits, targets), rtol=0, atol=tolerance)


# 262144: the error of one sum over all columns would be 2e-5 or more. 131074: two pieces. 131101 is
# a prime, of which there are no pieces.
@pytest.mark.parametrize("vocab_size", [131074, 131101, 262144])
@pytest.mark.parametrize("kind", ["rows", "apart", "bfloat16", "-inf first"])
def test_the_largest_vocabularies(vocab_size, kind):
    logits, targets = rows(24, vocab_size, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if kind == "apart":
        wide = torch.zeros(24, vocab_size + 3)
        wide[:, :vocab_size] = logits
        logits = wide[:, :vocab_size]
    if kind == "-inf first":
        logits[3, :70000] = -math.inf
        logits[4] = -math.inf
        targets[3] = 100_000
    targets[5] = -100
    found = nll_module.token_stats(logits, targets)
    only = token_nll(logits, targets)
    scored = (targets != -100) & (logits.amax(-1) > -math.inf)
    assert only[~scored].nan_to_num(0).count_nonzero() == 0
    logits, targets = logits[scored], targets[scored]
    log_probs = logits.double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e300)).sum(-1)
    expected = {"nll": reference_nll(logits, targets), "lse": logits.double().logsumexp(-1)}
    for name, values in (expected | {"entropy": entropy}).items():
        near = {"rtol": 0, "atol": 1e-5, "msg": name}
        torch.testing.assert_close(getattr(found, name)[scored].double(), values, **near)
    torch.testing.assert_close(only[scored].double(), expected["nll"], rtol=0, atol=5e-6)
    ranks = 1 + (logits > logits.gather(1, targets[:, None])).sum(-1)
    assert torch.equal(found.rank[scored].long(), ranks)


# In one piece and in two.
@pytest.mark.parametrize("vocab_size", [600, 131072])
@pytest.mark.parametrize("size", [1e5, 3e38, -3e38])
def test_logits_beside_which_everything_else_vanishes(vocab_size, size):
    logits, targets = rows(6, vocab_size)
    logits[:2] += size
    logits[2:] = size * (logits[2:] > 0)
    targets[2:] = logits[2:].argmax(-1)
    found = nll_module.token_stats(logits, targets)
    log_probs = logits.double().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    for name, values in {"nll": reference_nll(logits, targets), "entropy": entropy}.items():
        near = {"rtol": 0, "atol": 1e-5, "msg": name}
        torch.testing.assert_close(getattr(found, name).double(), values, **near)
    assert torch.equal(found.rank, (logits > logits.gather(1, targets[:, None])).sum(-1).int() + 1)


@pytest.mark.parametrize(
    ("dtype", "ignored"), [(torch.uint8, -100), (torch.int8, 261), (torch.uint16, -100)], ids=str
)
def test_narrow_integers_are_not_ignored_for_their_last_bits(dtype, ignored):
    # -100 is 156 in the last 8 bits, 65436 in the last 16; 261 is 5.
    target = {torch.uint8: 156, torch.int8: 5, torch.uint16: 65436}[dtype]
    logits, _ = rows(1, 70000)
    targets = torch.tensor([target])
    found = token_nll(logits, targets.to(dtype), ignore_index=ignored)
    assert found.item() == pytest.approx(reference_nll(logits, targets).item(), abs=1e-5)


def test_float16_tails_stay_finite_where_log_of_softmax_gives_inf():
    logits = torch.tensor([[40.0, 0.0]], dtype=torch.float16)
    target = torch.tensor([1])
    assert -torch.log(torch.softmax(logits, -1))[0, 1] == math.inf
    assert token_nll(logits, target).item() == pytest.approx(40.0, abs=1e-5)


def test_dtype_float64_reduces_float32_logits_in_float64():
    logits, targets = rows(20, 1000)
    nll = token_nll(logits, targets, dtype="float64")
    assert nll.dtype == torch.float64
    torch.testing.assert_close(nll, reference_nll(logits, targets), rtol=0, atol=1e-12)


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("pattern", ["none", "all", "first", "last", "alternating", "runs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ignored_rows_are_zero_and_have_no_effect(pattern, dtype, from_logits):
    logits, targets = rows(50, 30000, dtype)  # several blocks of rows
    if not from_logits:
        logits = logits.float().softmax(-1).to(dtype)
    number = torch.arange(50)
    ignored = {
        "none": number < 0,
        "all": number >= 0,
        "first": number == 0,
        "last": number == 49,
        "alternating": number % 2 == 0,
        "runs": number % 20 < 11,
    }[pattern]
    expected = token_nll(logits, targets, from_logits=from_logits).masked_fill(ignored, 0)
    targets = targets.masked_fill(ignored, -100)
    logits = logits.masked_fill(ignored[:, None], math.nan)
    nll = token_nll(logits, targets, from_logits=from_logits)
    torch.testing.assert_close(nll, expected, rtol=0, atol=0)


def test_several_ignored_ids_one_of_them_inside_the_vocabulary():
    logits, targets = rows(5, 4)
    targets = torch.tensor([0, 1, -100, 3, -1])
    nll = token_nll(logits, targets, ignore_index=(0, -100, -1))
    assert (nll == 0).tolist() == [True, False, True, False, True]
    expected = reference_nll(logits[[1, 3]], targets[[1, 3]])
    torch.testing.assert_close(nll[[1, 3]].double(), expected, rtol=0, atol=1e-6)


def strided(kind):
    base = torch.randn(4, 6, 32, 2, generator=torch.Generator().manual_seed(1))
    return {
        "slice of positions": base[:, :-1, :, 0],
        "slice of vocabulary": base[..., 0][..., 3:20],
        "vocabulary outside": base[..., 0].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every other row": base[::2, 1::2, :, 1],
        "expanded": base[:1, :1, :, 0].expand(4, 6, 32),
        "four dimensions": base.permute(0, 3, 1, 2),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "slice of positions",
        "slice of vocabulary",
        "vocabulary outside",
        "every other row",
        "expanded",
        "four dimensions",
    ],
)
@pytest.mark.parametrize("ignore", [False, True])
def test_strides(kind, ignore):
    logits = strided(kind)
    targets = torch.randint(logits.shape[-1], logits.shape[:-1])
    expected = reference_nll(logits.contiguous(), targets)
    if ignore:
        targets[..., 1] = -100
        expected[..., 1] = 0
    torch.testing.assert_close(token_nll(logits, targets).double(), expected, rtol=0, atol=1e-5)


def test_more_than_2_to_the_31_elements():
    # One row repeated by a stride of 0: the element offsets are real, the memory is not.
    logits, _ = rows(1, 50257)
    num_rows = 2**31 // 50257 + 5
    targets = torch.full((num_rows,), -100)
    targets[-4:] = torch.tensor([0, 1, 50256, 77])
    nll = token_nll(logits.expand(num_rows, -1), targets)
    expected = reference_nll(logits.expand(4, -1), targets[-4:])
    torch.testing.assert_close(nll[-4:].double(), expected, rtol=0, atol=1e-5)
    assert nll[:-4].count_nonzero() == 0


def test_large_storage_offsets():
    # Real memory on both sides of 2^31 elements, in one byte each.
    if not hasattr(torch, "float8_e4m3fn"):
        pytest.skip("this torch has no float8")
    num_rows, vocab_size = 8200, 2**18
    logits = torch.empty(num_rows, vocab_size, dtype=torch.float8_e4m3fn)
    last = rows(3, vocab_size, torch.float8_e4m3fn)[0]
    logits[-3:] = last
    targets = torch.full((num_rows,), -100)
    targets[-3:] = torch.tensor([5, 6, 7])
    nll = token_nll(logits, targets)[-3:]
    expected = reference_nll(last, targets[-3:])
    torch.testing.assert_close(nll.double(), expected, rtol=0, atol=1e-5)


def test_the_callers_tensors_are_not_changed():
    logits, targets = rows(30, 500)
    targets[::3] = -100
    logits.requires_grad_()
    logits_before, targets_before = logits.detach().clone(), targets.clone()
    token_nll(logits, targets)
    assert torch.equal(logits.detach(), logits_before)
    assert torch.equal(targets, targets_before)


def test_inside_inference_mode_and_autocast():
    logits, targets = rows(30, 500)
    expected = token_nll(logits, targets)
    with torch.inference_mode():
        assert torch.equal(token_nll(logits + 0, targets), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_nll(logits, targets), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_logits(dtype):
    inf = math.inf
    logits = torch.full((4, 5000), -inf, dtype=dtype)
    logits[0, 4000:] = 0  # a leading block of -inf
    logits[1, 0] = 0  # all the probability on one token
    logits[2, :2] = 0  # the target has none
    targets = torch.tensor([4500, 0, 7, 0])  # the last row has no probability at all
    nll = token_nll(logits, targets)
    assert nll[:3].tolist() == pytest.approx([math.log(1000), 0.0, inf])
    assert math.copysign(1, nll[1]) == 1
    assert nll[3].isnan()


def test_nan_is_kept():
    logits, targets = rows(3, 10)
    logits[1, 4] = math.nan
    assert token_nll(logits, targets).isnan().tolist() == [False, True, False]


def test_log_probabilities_are_logits():
    logits, targets = rows(30, 500)
    torch.testing.assert_close(
        token_nll(logits.log_softmax(-1), targets), token_nll(logits, targets)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_probabilities(dtype):
    logits, targets = rows(30, 40)
    probabilities = logits.softmax(-1).to(dtype)
    taken = probabilities.double().gather(1, targets[:, None]).squeeze(1)
    expected = probabilities.double().sum(-1).log() - taken.log()
    nll = token_nll(probabilities, targets, from_logits=False)
    torch.testing.assert_close(nll.double(), expected, rtol=0, atol=1e-5)


def test_probability_zero_is_not_clipped():
    probabilities = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    nll = token_nll(probabilities, torch.tensor([1, 1]), from_logits=False)
    assert nll.tolist() == [math.inf, 0.0]


def test_unnormalised_probabilities_are_normalised_with_a_warning():
    probabilities = torch.tensor([[3.0, 1.0]]).repeat(300, 20000)  # several blocks
    with pytest.warns(UserWarning, match="do not sum to 1") as caught:
        nll = token_nll(probabilities, torch.zeros(300).long(), from_logits=False)
    assert len(caught) == 1
    torch.testing.assert_close(nll, torch.full((300,), math.log(80000 / 3)))


def test_one_unnormalised_row_among_several_blocks_is_told_of():
    probabilities = torch.full((300, 20000), 1 / 20000)
    probabilities[0, 0] += 0.1
    with pytest.warns(UserWarning, match="do not sum to 1"):
        token_nll(probabilities, torch.zeros(300).long(), from_logits=False)


def test_bfloat16_softmax_is_near_enough_to_one():
    probabilities = rows(50, 50257, scale=1.0)[0].softmax(-1).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_nll(probabilities, torch.zeros(50, dtype=torch.int64), from_logits=False)


@pytest.mark.parametrize("bad", [-0.1, math.inf, math.nan])
def test_from_logits_false_refuses_what_is_no_probability(bad):
    with pytest.raises(ValueError, match="pass from_logits=True"):
        token_nll(torch.tensor([[0.5, bad]]), torch.tensor([0]), from_logits=False)


def test_out_of_range_targets_name_the_place_and_the_id():
    logits, targets = rows(6, 10)
    targets[4] = 10
    with pytest.raises(ValueError, match=r"targets\[1, 1\] is 10, outside .* pass ignore_index=10"):
        token_nll(logits.view(2, 3, 10), targets.view(2, 3))
    targets[4] = -100
    with pytest.raises(ValueError, match=r"is -100, outside the vocabulary of 10 ids"):
        token_nll(logits, targets, ignore_index=None)


@pytest.mark.parametrize(
    ("logits", "targets", "error", "match"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2).long(), TypeError, "floating-point"),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, "integer token ids, got torch.float32"),
        (torch.zeros(2, 3), torch.zeros(2).bool(), TypeError, "integer token ids"),
        (torch.zeros(2, 3), torch.zeros(3).long(), ValueError, r"\(2, 3\) and \(3,\)"),
        (torch.zeros(()), torch.zeros(()).long(), ValueError, "vocab_size"),
        (torch.zeros(2, 3), "ab", TypeError, "targets must hold numbers"),
        ([[0.0], [1.0, 2.0]], [0, 0], ValueError, "logits must be rectangular"),
    ],
)
def test_errors(logits, targets, error, match):
    with pytest.raises(error, match=match):
        token_nll(logits, targets)


@pytest.mark.parametrize(
    ("option", "error", "match"),
    [
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an integer"),
        ({"ignore_index": "pad"}, TypeError, "ignore_index must be an integer"),
        ({"ignore_index": 2**70}, ValueError, "ignore_index must fit into 64 bits"),
        ({"dtype": "bfloat16"}, ValueError, 'dtype must be "float32" or "float64"'),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options(option, error, match):
    logits, targets = rows(2, 3)
    with pytest.raises(error, match=match):
        token_nll(logits, targets, **option)


def test_arrays_of_every_kind():
    logits, targets = rows(6, 9)
    expected = token_nll(logits, targets)
    array, ids = logits.numpy(), targets.numpy()
    read_only = array.copy()
    read_only.flags.writeable = False
    for same in (array.tolist(), array[::-1].copy()[::-1], array.astype(">f4"), read_only):
        torch.testing.assert_close(token_nll(same, ids).float(), expected)
    for same in (ids.tolist(), ids.astype(np.uint8), ids.astype(np.int32)):
        torch.testing.assert_close(token_nll(array, same), expected)


def test_memory_order_of_the_targets():
    logits, targets = rows(6, 9)
    expected = token_nll(logits, targets).view(2, 3)
    transposed = targets.view(2, 3).t().contiguous().t()
    torch.testing.assert_close(token_nll(logits.view(2, 3, 9), transposed), expected)


def test_lists_of_tensors_that_numpy_cannot_read():
    logits, targets = rows(3, 9, torch.bfloat16)
    expected = token_nll(logits, targets)
    torch.testing.assert_close(token_nll(list(logits.requires_grad_()), list(targets)), expected)
    with pytest.raises(ValueError, match="logits must be rectangular, got tensors of unequal"):
        token_nll([torch.zeros(2), torch.zeros(3)], [0, 0])


def test_masked_arrays_are_refused():
    targets = np.ma.masked_array([0, 1], mask=[False, True])
    with pytest.raises(TypeError, match="targets is a masked array, whose mask would be lost"):
        token_nll(torch.zeros(2, 3), targets)


@pytest.mark.parametrize("from_logits", [True, False])
def test_one_row_without_further_dimensions(from_logits):
    logits, targets = rows(1, 5)
    logits = logits if from_logits else logits.softmax(-1)
    found = token_nll(logits[0], targets[0], from_logits=from_logits)
    assert found.shape == ()
    assert found == token_nll(logits, targets, from_logits=from_logits)[0]


def test_empty_inputs():
    assert token_nll(torch.zeros(0, 5), []).shape == (0,)
    assert token_nll(torch.zeros(0, 5), torch.zeros(0).long()).shape == (0,)
    assert token_nll(torch.zeros(2, 0, 5), torch.zeros(2, 0).long()).shape == (2, 0)


def test_the_module_offers_the_functional_form():
    logits, targets = rows(2, 3)
    assert torch.equal(Perplexity().token_nll(logits, targets), token_nll(logits, targets))
