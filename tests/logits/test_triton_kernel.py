"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import PYTHONPATH, ROOT, random_batch, random_rows, reference_nll

from ppleval import Perplexity
from ppleval.logits import kernels as nll_launch
from ppleval.logits import nll
from ppleval.logits import outputs as reduction
from ppleval.logits import triton_kernel as nll_triton
from ppleval.logits.outputs import LogitTransform

pytest.importorskip("triton", reason="Triton is made for Linux")
# The interpreter's NumPy says what is meant to happen: infinity less itself, times 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF = math.inf


@pytest.fixture(scope="module", autouse=True)
def patched_once():
    """For NumPy, Triton's language is patched here, and not in every call of a kernel's function,
    which would be most of the time of these tests."""
    if DEVICE == "cuda":
        yield
        return
    from triton.language import standard
    from triton.runtime import interpreter

    # Triton finds what to patch in the globals of a function; these two see `tl` and `tl.core`.
    scopes = [interpreter._patch_lang(f.fn) for f in (nll_triton._row_kernel, standard.max)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        yield
    for scope in reversed(scopes):
        scope.restore()


def rows(num_rows, vocab_size, dtype=torch.float32):
    return tuple(part.to(DEVICE) for part in random_rows(num_rows, vocab_size, dtype))


def reduce(logits, targets, scored=None, with_all=False, **options):
    """(what the kernels write into poisoned outputs, the faults)."""
    size = targets.numel()
    scored = torch.ones(size, dtype=torch.bool, device=DEVICE) if scored is None else scored
    device = torch.device(DEVICE)
    out = reduction.TokenStats.empty(size, torch.float32, device, with_all=with_all)
    for values in out.tensors:
        values.fill_(-77)
    options = {"from_logits": True} | options
    faults = nll_triton.reduce(logits, targets.flatten(), scored.flatten(), out, **options)
    return out, int(faults)


def assert_all_near(out, logits, targets, tolerance=1e-5):
    """nll, lse, entropy and rank against float64 of the same logits."""
    logits, targets = logits.cpu(), targets.cpu()
    log_probs = logits.double().log_softmax(-1)
    expected = {
        "nll": reference_nll(logits, targets),
        "lse": logits.double().logsumexp(-1),
        "entropy": -(log_probs.exp() * log_probs.clamp(min=-1e300)).sum(-1),
    }
    for name, values in expected.items():
        found = getattr(out, name).cpu().double()
        torch.testing.assert_close(found, values, rtol=0, atol=tolerance, msg=name)
    target_logits = logits.gather(1, targets[:, None])
    assert torch.equal(out.rank.cpu(), 1 + (logits > target_logits).sum(-1, dtype=torch.int32))


# 1 and 7: less than a load of a thread. 128: one load of each thread, and aligned. 32001: an odd
# number of columns, so that every row begins elsewhere. 50257: GPT-2's, several blocks in both
# widths. 1 and 3 rows are shared by several programs, 65 of the two large ones by some; 9 rows take
# 73 programs as 65 take 528, and begin at every alignment where the number of columns is odd.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 128, 32001, 50257])
@pytest.mark.parametrize(("num_rows", "num_programs"), [(1, 528), (3, 528), (9, 73)])
def test_all_outputs_against_float64(num_rows, num_programs, vocab_size, dtype, monkeypatch):
    monkeypatch.setattr(nll_triton, "NUM_PROGRAMS", num_programs)
    logits, targets = rows(num_rows, vocab_size, dtype)
    out, faults = reduce(logits, targets, with_all=True)
    assert faults == 0
    assert_all_near(out, logits, targets)
    only, _ = reduce(logits, targets)
    assert torch.equal(only.nll, out.nll)
    assert (out.nll >= 0).all()


def test_the_largest_vocabularies():
    logits, targets = rows(2, 300_001, torch.bfloat16)
    assert_all_near(reduce(logits, targets, with_all=True)[0], logits, targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [32000, 50257])
def test_sharing_a_row_does_not_change_a_bit(vocab_size, dtype, monkeypatch):
    logits, targets = rows(5, vocab_size, dtype)
    shared, _ = reduce(logits, targets, with_all=True)
    monkeypatch.setattr(nll_triton, "NUM_PROGRAMS", 1)  # one for each row
    alone, _ = reduce(logits, targets, with_all=True)
    monkeypatch.setattr(nll_triton, "NUM_PROGRAMS", 12)  # of several blocks each
    some, _ = reduce(logits, targets, with_all=True)
    for name in ("nll", "lse", "entropy", "rank"):
        assert torch.equal(getattr(shared, name), getattr(alone, name))
        assert torch.equal(getattr(shared, name), getattr(some, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_any_batch(dtype):
    logits, targets = rows(70, 9000, dtype)
    together = reduce(logits, targets)[0].nll
    for i in (0, 1, 69):
        alone = reduce(logits[i : i + 1].clone(), targets[i : i + 1])[0].nll
        assert alone.item() == together[i].item()


def views(vocab_size=9001):
    """Views of every kind of stride, (..., V); V is odd and more than a block."""
    base = torch.randn(3, 4, vocab_size + 9, 2, generator=torch.Generator().manual_seed(1))
    base = base.to(DEVICE)
    one = base[..., 0].contiguous()
    return {
        "slice of positions": one[:, :-1],
        "slice of vocabulary": one[..., 3:-6],
        "columns apart": base[..., 1],
        "every other row": one[::2, 1::2],
        "expanded": one[:1, :1].expand(3, 4, vocab_size + 9),
        "vocabulary outside": one.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "four dimensions": base.permute(3, 0, 1, 2),
        "four that are no three": base[:, :3].permute(1, 3, 0, 2),
        "groups of an odd stride": one.view(-1).as_strided(
            (3, 3, vocab_size // 8 * 8), (3 * (vocab_size // 8 * 8) + 1, vocab_size // 8 * 8, 1)
        ),
        "one row of an odd start": one.view(-1)[5 : 5 + vocab_size][None],
    }


@pytest.mark.parametrize("kind", list(views(8)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(kind, dtype):
    logits = views()[kind]
    if dtype == torch.bfloat16:  # the same strides
        size = logits.untyped_storage().nbytes() // 4
        flat = torch.empty(0, dtype=torch.float32, device=DEVICE).set_(logits.untyped_storage())
        moved = flat[:size].to(dtype)
        logits = moved.as_strided(logits.shape, logits.stride(), logits.storage_offset())
    targets = torch.randint(logits.shape[-1], logits.shape[:-1]).to(DEVICE)
    found = nll.token_nll(logits, targets, backend="triton")
    expected = reference_nll(logits.contiguous().cpu(), targets.cpu())
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="asks the interpreter")
@pytest.mark.parametrize("kind", list(views(8)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # one of each width
def test_what_is_said_of_the_alignment_is_true(kind, dtype, monkeypatch):
    """On a GPU, a load that is not aligned as stated is a fault; the interpreter would not care."""
    from triton.runtime.interpreter import TensorHandle

    remainders = []

    def set_attr(self, key, values):
        if key == "tt.divisibility":
            remainders.append(self.data % values[0])

    monkeypatch.setattr(TensorHandle, "set_attr", set_attr)
    for vocab_size in (9001, 9008):
        for offset in range(3):
            base = views(vocab_size)[kind]
            logits = torch.empty(base.storage_offset() + 2 * base.untyped_storage().nbytes() // 4)
            logits = logits.to(dtype).as_strided(
                base.shape, base.stride(), base.storage_offset() + offset
            )
            targets = torch.zeros(logits.shape[:-1], dtype=torch.int64)
            nll_launch.launch(logits, targets, torch.ones_like(targets).bool(), backend="triton")
    if logits.stride(-1) == 1:
        assert len(remainders) > 0
    assert not any(remainder.any() for remainder in remainders)


@pytest.mark.skipif(DEVICE == "cuda", reason="looks at the launch instead of launching")
def test_a_single_row_is_aligned_whatever_its_stride(monkeypatch):
    seen = {}

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.update(options)

    monkeypatch.setattr(nll_triton, "_row_kernel", Recorder())
    monkeypatch.setattr(nll_triton, "_merge_kernel", Recorder())
    logits, targets = rows(3, 50257)
    reduce(logits, targets)
    assert not seen["ALIGNED"]
    reduce(logits[:1], targets[:1])
    assert seen["ALIGNED"]


def test_columns_beyond_2_to_the_31():
    base = torch.empty(20 * 2**27, dtype=torch.float16, device=DEVICE)
    logits = base.as_strided((2, 20), (1, 2**27))
    values, targets = rows(2, 20, torch.float16)
    logits.copy_(values)
    assert_all_near(reduce(logits, targets, with_all=True)[0], values, targets)


def test_offsets_beyond_2_to_the_31():
    # Rows of a matrix that is mostly never touched.
    base = torch.empty(2**31 + 2000, dtype=torch.float16, device=DEVICE)
    logits = base.as_strided((3, 1000), (2**30, 1))
    values, targets = rows(3, 1000, torch.float16)
    logits.copy_(values)
    assert_all_near(reduce(logits, targets, with_all=True)[0], values, targets)


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("pattern", ["none", "all", "first", "last", "alternating"])
@pytest.mark.parametrize("num_programs", [1, 528])
def test_rows_that_are_not_scored(pattern, from_logits, num_programs, monkeypatch):
    monkeypatch.setattr(nll_triton, "NUM_PROGRAMS", num_programs)
    logits, targets = rows(6, 20000)
    if not from_logits:
        logits = logits.softmax(-1)
    number = torch.arange(6, device=DEVICE)
    scored = {
        "none": number < 0,
        "all": number >= 0,
        "first": number != 0,
        "last": number != 5,
        "alternating": number % 2 == 0,
    }[pattern]
    full, _ = reduce(logits, targets, from_logits=from_logits)
    expected = full.nll.where(scored, 0)
    logits = logits.masked_fill(~scored[:, None], math.nan)
    targets = targets.where(scored, 10**12)  # what stands there is no target
    out, faults = reduce(logits, targets, scored, from_logits=from_logits, with_all=from_logits)
    assert faults == 0
    assert torch.equal(out.nll, expected)
    if from_logits:
        for values in (out.lse, out.entropy, out.rank):
            assert (values[~scored] == 0).all()


def test_several_ignored_ids_one_of_them_inside_the_vocabulary():
    logits, _ = rows(5, 4)
    targets = torch.tensor([0, 1, -100, 3, -1], device=DEVICE)
    found = nll.token_nll(logits, targets, ignore_index=(0, -100, -1), backend="triton").cpu()
    assert (found == 0).tolist() == [True, False, True, False, True]
    expected = reference_nll(logits[[1, 3]].cpu(), targets[[1, 3]].cpu())
    torch.testing.assert_close(found[[1, 3]].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_programs", [1, 528])
def test_infinite_logits(dtype, num_programs, monkeypatch):
    monkeypatch.setattr(nll_triton, "NUM_PROGRAMS", num_programs)
    vocab_size = 40001  # three blocks and more
    logits = torch.full((7, vocab_size), -INF, dtype=dtype)
    logits[0, -1000:] = 0  # leading blocks of -inf
    logits[1, 0] = 0  # all the probability on one token
    logits[2, :2] = 0  # the target has none
    logits[4] = 0
    logits[4, 17000:18000] = -INF  # in the middle
    logits[5] = 0
    logits[5, 30000] = INF
    logits[6] = 0
    logits[6, :20000] = -INF  # half of all
    targets = torch.tensor([vocab_size - 500, 0, 7, 0, 0, 0, 25000])  # row 3 is -inf throughout
    out, faults = reduce(logits.to(DEVICE), targets.to(DEVICE), with_all=True)
    assert faults == 0
    found = out.nll.tolist()
    expected = [math.log(1000), 0.0, INF, math.nan, math.log(39001), math.nan, math.log(20001)]
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert math.copysign(1, found[1]) == 1
    entropies = [math.log(1000), 0.0, math.log(2), math.nan]
    assert out.entropy[:4].tolist() == pytest.approx(entropies, rel=1e-6, nan_ok=True)
    assert out.rank.tolist()[:3] == [1, 1, 3]
    assert out.lse[3].item() == -INF


@pytest.mark.parametrize("place", [0, 8191, 8192, 16383, 17000])
@pytest.mark.parametrize("num_programs", [1, 528])
def test_nan_is_kept_wherever_it_stands(place, num_programs, monkeypatch):
    monkeypatch.setattr(nll_triton, "NUM_PROGRAMS", num_programs)
    logits, targets = rows(3, 17001, torch.bfloat16)
    targets[1] = 5
    logits[1, place] = math.nan
    assert reduce(logits, targets)[0].nll.isnan().tolist() == [False, True, False]
    logits[1] = math.nan
    assert reduce(logits, targets)[0].nll.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("offset", [-1000.0, 0.0, 1000.0])
def test_a_constant_added_to_the_logits_changes_nothing(offset):
    logits, targets = rows(4, 20000)
    logits = (logits * 1024).round() / 1024  # so that adding 1000 is exact
    expected = reduce(logits, targets)[0].nll
    assert torch.equal(reduce(logits + offset, targets)[0].nll, expected)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_confident_predictions_are_never_negative(backend):
    logits, targets = rows(50, 1000)
    logits.scatter_(1, targets[:, None], 40.0)
    found = nll.token_stats(logits, targets, backend=backend)
    for values in (found.nll, found.entropy):
        assert ((values >= 0) & (values < 1e-6)).all()


@pytest.mark.parametrize("num_programs", [1, 528])
@pytest.mark.parametrize("bad", [20000, -1, -100, 2**40, -(2**63)])
def test_targets_out_of_range_are_poisoned_and_flagged(bad, num_programs, monkeypatch):
    monkeypatch.setattr(nll_triton, "NUM_PROGRAMS", num_programs)
    logits, targets = rows(3, 20000)
    targets[1] = bad
    out, faults = reduce(logits, targets, with_all=True)
    assert faults == reduction.OUT_OF_RANGE
    assert out.nll.isnan().tolist() == [False, True, False]
    assert (out.lse[1], out.entropy[1], out.rank[1]) == (0, 0, 0)
    with pytest.raises(ValueError, match=rf"targets\[1\] is {bad}, outside the vocabulary"):
        nll.token_nll(logits, targets, ignore_index=None, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_programs", [1, 528])
def test_probabilities(dtype, num_programs, monkeypatch):
    monkeypatch.setattr(nll_triton, "NUM_PROGRAMS", num_programs)
    logits, targets = rows(5, 20001)
    probabilities = logits.softmax(-1).to(dtype)
    exact = probabilities.cpu().double()
    taken = exact.gather(1, targets.cpu()[:, None]).squeeze(1)
    out, faults = reduce(probabilities, targets, from_logits=False)
    assert faults == 0
    expected = exact.sum(-1).log() - taken.log()
    torch.testing.assert_close(out.nll.cpu().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (-1e-3, reduction.NO_PROBABILITY),
        (math.nan, reduction.NO_PROBABILITY),
        (INF, reduction.NO_PROBABILITY | reduction.UNNORMALISED),
        (0.02, reduction.UNNORMALISED),
        (0.005, 0),
    ],
)
@pytest.mark.parametrize("num_programs", [1, 528])
def test_what_is_no_probability(value, fault, num_programs, monkeypatch):
    monkeypatch.setattr(nll_triton, "NUM_PROGRAMS", num_programs)
    probabilities = torch.full((3, 20000), 1 / 20000, device=DEVICE)
    probabilities[1, 19999] += value
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert reduce(probabilities, targets, from_logits=False)[1] == fault


def test_probability_zero_is_not_clipped():
    probabilities = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], device=DEVICE)
    targets = torch.ones(3, dtype=torch.int64, device=DEVICE)
    found = reduce(probabilities, targets, from_logits=False)[0].nll.tolist()
    assert found == pytest.approx([INF, 0.0, math.nan], nan_ok=True)


# A cap of 1000 leaves logits nearly as they are, which takes a tanh that is exact near 0.
@pytest.mark.parametrize(
    ("logit_scale", "softcap"), [(0.25, None), (1.0, 5.0), (2.0, 30.0), (1.0, 1000.0)]
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_scaled_and_capped_logits(logit_scale, softcap, backend):
    logits, targets = rows(4, 20001)
    logits[2, :100] = INF  # the cap makes them finite
    logits[3, :100] = -INF
    scores = logits.cpu().double() * logit_scale
    if softcap is None:
        logits, targets, scores = logits[:2], targets[:2], scores[:2]
    else:
        scores = softcap * torch.tanh(scores / softcap)
    before = logits.clone()
    scored = torch.ones_like(targets, dtype=torch.bool)
    options = {"transform": LogitTransform(logit_scale, softcap), "backend": backend}
    stats = nll_launch.launch(logits, targets, scored, with_all=True, **options).result()
    assert stats.nll.isfinite().all()
    expected = reference_nll(scores, targets.cpu())
    torch.testing.assert_close(stats.nll.cpu().double(), expected, rtol=0, atol=1e-5)
    expected = scores.logsumexp(-1)
    near = {"rtol": 1e-7, "atol": 1e-5}  # of which float32 holds 1000
    torch.testing.assert_close(stats.lse.cpu().double(), expected, **near)
    # Scores that float32 does not tell apart may change their places.
    ranks = 1 + (scores > scores.gather(1, targets.cpu()[:, None])).sum(-1)
    assert (stats.rank.cpu() - ranks)[:2].abs().max() <= 2
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_torch_backend_gives_the_same(dtype):
    logits, targets = rows(20, 5001, dtype)
    logits[3, :4000] = -INF
    targets[3], targets[4] = 4500, -100
    logits[5] = -INF
    logits[6, 7] = math.nan
    found = nll.token_stats(logits, targets, backend="triton")
    expected = nll.token_stats(logits, targets, backend="torch")
    assert found.nll[5:7].isnan().all()
    for name in ("nll", "lse", "entropy"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5, equal_nan=True
        )
    sure = torch.arange(20, device=DEVICE) != 6  # with NaN there is no order
    assert torch.equal(found.rank[sure], expected.rank[sure])


def test_compute_on_the_kernels():
    logits, targets = random_batch(4, 9, 3001, dtype=torch.bfloat16)
    targets[0, 3:] = -100
    weights = torch.rand(4, 9)
    options = {"shift": True, "sample_weight": weights}
    batch = {"predictions": logits.to(DEVICE), "references": targets.to(DEVICE)} | options
    found = Perplexity().compute(**batch, backend="triton")
    expected = Perplexity().compute(**batch, backend="torch")
    assert "|backend:triton|" in found["signature"]
    for name in ("perplexity", "perplexity_ci_low", "perplexity_ci_high", "num_tokens"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


def test_bad_batches_leave_what_was_accumulated():
    ppl = Perplexity(backend="triton")
    logits, targets = (part.to(DEVICE) for part in random_batch())
    ppl.add_batch(predictions=logits, references=targets)
    bad = targets.clone()
    bad[1, 2] = 11
    with pytest.raises(ValueError, match=r"references\[1, 2\] is 11, outside"):
        ppl.add_batch(predictions=logits, references=bad)
    with pytest.raises(ValueError, match=r"sample_weight\[0\] must be finite, not neg"):
        ppl.add_batch(predictions=logits, references=targets, sample_weight=-targets - 1.0)
    nan = logits.clone()
    nan[2, 1, 0] = math.nan
    result = ppl.compute()
    assert result["num_sequences"] == 3
    with pytest.warns(UserWarning, match=r"predictions\[2, 1\] holds NaN"):
        assert math.isnan(ppl(predictions=nan, references=targets))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logits": torch.float64}, "was asked to reduce float64 in float64"),
        ({"dtype": "float64"}, "was asked to reduce float32 in float64"),
    ],
)
def test_float64_is_refused_by_name_and_goes_to_torch_by_itself(change, match):
    logits, targets = rows(3, 50, change.pop("logits", torch.float32))
    with pytest.raises(ValueError, match=match):
        nll.token_nll(logits, targets, backend="triton", **change)
    assert nll.token_nll(logits, targets, **change).dtype == torch.float64


def run_without_interpreter(code, **environment):
    environment = os.environ | {"TRITON_INTERPRET": "0"} | environment
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="asks what happens where there is no GPU")
def test_without_gpu_and_interpreter_the_name_is_an_error():
    code = (
        "import torch\nfrom ppleval import Perplexity\nppl = Perplexity()\n"
        "print(ppl.token_nll(torch.zeros(1, 4), torch.tensor([0])).item())\n"
        "ppl.compute(predictions=torch.zeros(1, 1, 4), references=[[0]], backend='triton')"
    )
    done = run_without_interpreter(code)
    assert float(done.stdout) == pytest.approx(math.log(4))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ValueError: backend=\"triton\" cannot run: the logits are on the device 'cpu', and it "
        "needs CUDA, or on a CPU TRITON_INTERPRET=1 in the environment before the first import. "
        'backend="auto" finds another.'
    )


def test_without_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('none here')")
    code = (
        "import torch\nfrom ppleval import Perplexity\nppl = Perplexity()\n"
        "print(ppl.token_nll(torch.zeros(1, 4), torch.tensor([0])).item())\n"
        "ppl.token_nll(torch.zeros(1, 4), torch.tensor([0]), backend='triton')"
    )
    done = run_without_interpreter(code, PYTHONPATH=str(tmp_path))
    assert float(done.stdout) == pytest.approx(math.log(4))
    assert "Triton is not installed (pip install triton)" in done.stderr.splitlines()[-1]


def test_auto_goes_on_with_torch_where_triton_fails(monkeypatch, caplog):
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(nll_triton, "reduce", fail)
    monkeypatch.setattr(nll_launch, "_triton_failed", False)  # and so it is again after this test
    logits, targets = rows(3, 50)
    arguments = (logits, targets, torch.ones_like(targets, dtype=torch.bool))
    out = reduction.TokenStats.empty(3, torch.float32, logits.device, with_all=False)
    options = {"from_logits": True}
    assert nll_launch._by_triton(*arguments, out, may_fail=True, **options) is None
    assert "no C compiler" in caplog.text
    assert nll_launch._triton_failed
    with pytest.raises(RuntimeError, match="no C compiler"):
        nll.token_nll(logits, targets, backend="triton")
    if DEVICE == "cuda":
        calls.clear()
        nll.token_nll(logits, targets)
        assert not calls


def test_auto_does_not_take_running_out_of_memory_for_a_failure_of_triton(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("no memory")

    monkeypatch.setattr(nll_triton, "reduce", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="no memory"):
        nll_launch._by_triton(may_fail=True)
    assert not nll_launch._triton_failed


COMPILE_KERNELS = ROOT / "tests" / "workers" / "compile_kernels.py"


def compile_for(capability: int, directory: Path) -> subprocess.CompletedProcess:
    """Compile for the GPUs of this compute capability."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(directory)}
    return subprocess.run(
        [sys.executable, COMPILE_KERNELS, str(capability), directory],
        env=os.environ | environment | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=600,
    )


# H100 and H200; A100.
@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.long)])
def test_every_launch_compiles_without_spilling(tmp_path, capability):
    done = compile_for(capability, tmp_path)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 16
    layouts = {
        (kernel["case"], kernel["kernel"]): kernel["block_layouts"]
        for kernel in kernels
        if kernel["block_layouts"]
    }
    # Whether one program adds up the 64 blocks of a row, or that after several: in the same order.
    assert list(layouts) == [
        ("float32, 64 blocks", "_row_kernel"),
        ("float32, 64 blocks, shared", "_merge_kernel"),
    ]
    assert len(set(map(tuple, layouts.values()))) == 1
    for kernel in kernels:
        assert kernel["stack_bytes"] == 0, kernel
        if kernel["kernel"] == "_merge_kernel" or "1" in kernel["case"].split():
            continue
        if kernel["case"] != "float32, columns apart":
            # Four loads of 16 bytes of each thread for a block, also where rows begin anywhere.
            assert kernel["wide_loads"] >= 4, kernel
        if "all outputs" not in kernel["case"]:
            assert kernel["registers"] <= 64, kernel


gpu_only = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


@gpu_only
def test_auto_takes_triton_on_cuda(monkeypatch):
    taken = []
    reduce = nll_triton.reduce
    monkeypatch.setattr(nll_triton, "reduce", lambda *a, **k: taken.append(1) or reduce(*a, **k))
    nll.token_nll(*rows(3, 50))
    assert taken


@gpu_only
def test_launching_does_not_wait_for_the_device():
    logits, targets = rows(64, 50257, torch.bfloat16)
    scored = targets != 3
    nll_launch.launch(logits, targets, scored)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        nll_launch.launch(logits, targets, scored)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
def test_add_batch_waits_once(monkeypatch):
    logits, targets = rows(64, 50257, torch.bfloat16)
    batch = {"predictions": logits[None], "references": targets[None]}
    ppl = Perplexity(shift=True)
    ppl.add_batch(**batch)  # compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as caught:
            ppl.add_batch(**batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1


@gpu_only
def test_the_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    logits, targets = rows(3, 50257)
    found = nll.token_nll(logits.to("cuda:1"), targets, backend="triton")
    assert found.device == torch.device("cuda:1")
    torch.testing.assert_close(found.cpu().double(), reference_nll(logits.cpu(), targets.cpu()))
