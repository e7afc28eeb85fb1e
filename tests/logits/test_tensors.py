"""Which tensors and arrays are taken, which refused; and what moves tensors between devices."""

import numpy as np
import pandas as pd
import pytest
import torch
from support import flat, random_batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ppleval import Perplexity
from ppleval.logits import tensors
from ppleval.logits.outputs import TokenStats

# torch's words on what is made here to be refused.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning"),
]


class ScipySparse:
    """As far as it matters: SciPy's matrices have no __array__ and no length."""

    def __init__(self, tensor):
        self._tensor = tensor

    def todense(self):
        return self._tensor.numpy()


class Foreign:
    """An array of a library that has no other way out than DLPack."""

    def __init__(self, tensor):
        self._tensor = tensor

    def __dlpack__(self, **options):
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._tensor.__dlpack_device__()


@pytest.fixture
def sharded():
    """Makes a DTensor, in a process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])
    torch.distributed.destroy_process_group()


# What it is made by, and the sentence that it is refused with.
REFUSED = {
    "COO": (torch.Tensor.to_sparse, r"layout torch.sparse_coo; pass it dense: \.to_dense\(\)"),
    "CSR": (torch.Tensor.to_sparse_csr, "layout torch.sparse_csr; pass it dense"),
    "SciPy": (ScipySparse, r"sparse; pass it dense: \.todense\(\)"),
    "meta": (lambda x: x.to("meta"), "on the device 'meta', which holds no numbers"),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
        r"quantized, torch.qint8; pass \.dequantize\(\)",
    ),
    "masked": (
        lambda x: torch.masked.masked_tensor(x, x == x),
        r"a MaskedTensor, whose mask would be lost; pass \.get_data\(\)",
    ),
    "DLPack that torch does not read": (
        lambda x: Foreign(None),
        "Foreign, which torch.from_dlpack cannot read: .* Pass a tensor or a NumPy array",
    ),
    "complex": (lambda x: x + 0j, "got torch.complex64"),
    "NumPy's complex": (lambda x: x.numpy() + 0j, "must hold real numbers, got ndarray of complex"),
    "DTensor": ("sharded", r"a DTensor, .* pass \.full_tensor\(\)"),
}
# The functions, and the argument of each that is replaced.
PLACES = [
    (function, argument)
    for function, arguments in {
        "compute": ("predictions", "references", "sample_weight"),
        "add": ("prediction", "reference", "sample_weight"),
        "token_nll": ("logits", "targets"),
        "token_stats": ("logits", "targets"),
        "linear_token_nll": ("hidden", "weight", "targets", "bias"),
    }.items()
    for argument in arguments
]

# What several processes may share.
TAKEN = [
    ("DTensor", "compute", "predictions"),
    ("DTensor", "token_nll", "logits"),
    ("DTensor", "token_stats", "logits"),
    ("DTensor", "linear_token_nll", "weight"),
]


def arguments_of(function):
    """Arguments that the function takes."""
    logits, targets = random_batch()
    weights = torch.ones(3, 7)
    if function == "compute":
        return {"predictions": logits, "references": targets, "sample_weight": weights}
    if function == "add":
        return {"prediction": logits[0], "reference": targets[0], "sample_weight": weights[0]}
    if function == "linear_token_nll":
        weight, bias = torch.ones(13, 11), torch.ones(13)
        return {"hidden": logits, "weight": weight, "targets": targets, "bias": bias}
    return {"logits": logits, "targets": targets}


@pytest.mark.parametrize(
    ("kind", "function", "argument"),
    [(kind, *place) for kind in REFUSED for place in PLACES if (kind, *place) not in TAKEN],
)
def test_what_cannot_be_read_is_refused_by_a_sentence(ppl, kind, function, argument, request):
    make, match = REFUSED[kind]
    if make == "sharded":
        make = request.getfixturevalue("sharded")
    arguments = arguments_of(function)
    value = arguments[argument]
    if value.dim() == 1 and kind == "CSR":
        pytest.skip("torch has no such thing")
    arguments[argument] = make(value)
    with pytest.raises(TypeError, match=rf"{argument}.* {match}"):
        getattr(ppl, function)(**arguments)


@pytest.mark.parametrize(("function", "argument"), [place for _, *place in TAKEN])
def test_a_dtensor_of_one_process_is_its_tensor(ppl, sharded, function, argument):
    """tests/test_nll_shards.py has several processes."""
    arguments = arguments_of(function)
    expected = getattr(ppl, function)(**arguments)
    arguments[argument] = sharded(arguments[argument])
    found = getattr(ppl, function)(**arguments)
    if function == "compute":
        assert found.pop("signature") == expected.pop("signature")
        assert found == pytest.approx(expected, rel=1e-6)
        return
    if function != "token_stats":
        found, expected = TokenStats(found), TokenStats(expected)
    for values, true in zip(found.tensors, expected.tensors, strict=True):
        values = values if function == "linear_token_nll" else values.full_tensor()
        torch.testing.assert_close(values, true, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize(("function", "argument"), PLACES[6:])
def test_nested_tensors_are_refused_where_no_list_is_taken(ppl, layout, function, argument):
    arguments = arguments_of(function)
    part = arguments[argument][:1]
    arguments[argument] = torch.nested.nested_tensor([part, part], layout=layout)
    with pytest.raises(TypeError, match=rf"{argument} is a nested tensor; .* \.unbind\(\)"):
        getattr(ppl, function)(**arguments)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_nested_tensors_are_the_list_of_their_sequences(layout, shift):
    batch = arguments_of("compute")
    ragged = {
        # Equal enough for an interval, which is not NaN then.
        name: [value[i, :n] for i, n in enumerate((6, 5, 7))]
        for name, value in batch.items()
    }
    ragged["sample_weight"][0] = 0.5 + torch.rand(6)
    nested = {
        name: torch.nested.nested_tensor(parts, layout=layout) for name, parts in ragged.items()
    }
    ppl = Perplexity(shift=shift)
    expected = ppl.compute(**ragged)
    assert expected["num_tokens"] == 18 - 3 * shift
    assert ppl.compute(**nested) == expected
    assert ppl.compute(**ragged | {"predictions": nested["predictions"]}) == expected
    with pytest.raises(ValueError, match="references must be rectangular"):
        ppl.compute(predictions=batch["predictions"], references=nested["references"])


# How a tensor is passed; tables have two dimensions.
OTHER_FORMS = {
    "memoryview": lambda x: memoryview(x.numpy()),
    "DLPack": Foreign,
    "table": lambda x: pd.DataFrame(x.numpy()),
    "table of nullable numbers": lambda x: pd.DataFrame(x.numpy()).astype(
        "Float64" if x.is_floating_point() else "Int64"
    ),
    "object array": lambda x: x.numpy().astype(object),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize(("function", "argument"), PLACES)
def test_other_forms_of_the_same_numbers(ppl, form, function, argument):
    """Whole, and one form for each sequence; the other arguments as tensors, or as a list."""
    arguments = arguments_of(function)
    for name, value in arguments.items():
        if value.is_floating_point():  # as pandas has it
            arguments[name] = value.double()
    value, call = arguments[argument], getattr(ppl, function)
    if "table" in form and value.dim() != 2:
        pytest.skip("a table has two dimensions")
    expected = call(**arguments)
    changed = [arguments | {argument: OTHER_FORMS[form](value)}]
    if function == "compute":
        listed = {name: list(other) for name, other in arguments.items()}
        changed.append(listed | {argument: OTHER_FORMS[form](value)})
        if "table" not in form:
            changed.append(listed | {argument: [OTHER_FORMS[form](part) for part in value]})
    for each in changed:
        found = call(**each)
        if isinstance(expected, dict):
            assert flat(found) == pytest.approx(flat(expected), rel=1e-12)
        elif isinstance(expected, TokenStats):
            assert all(map(torch.equal, found.tensors, expected.tensors))
        elif expected is not None:
            assert torch.equal(found, expected)


def test_a_class_is_no_array(ppl):
    with pytest.raises(TypeError, match="predictions must be a list .* got type"):
        ppl.compute(predictions=Foreign, references=[[0]])


def test_long_double_is_read_as_float64(ppl):
    logits, targets = random_batch(dtype=torch.float64)
    batch = {"predictions": logits.numpy(), "sample_weight": np.arange(1.0, 22).reshape(3, 7)}
    expected = ppl.compute(**batch, references=targets)
    batch = {name: value.astype(np.longdouble) for name, value in batch.items()}
    assert ppl.compute(**batch, references=targets) == expected
    with pytest.raises(TypeError, match="references must be integer token ids, got torch.float64"):
        ppl.compute(predictions=logits, references=targets.numpy().astype(np.longdouble))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("way", ["stacked", "listed"])
def test_float8_is_read_like_any_float(ppl, dtype, way):
    logits, targets = random_batch(dtype=dtype)
    targets[0, 2] = targets[1, 5] = -100  # so that rows are gathered
    expected = ppl.compute(predictions=logits.float(), references=targets)
    batch = {"predictions": logits, "references": targets}
    if way == "listed":
        batch = {name: list(value) for name, value in batch.items()}
    assert ppl.compute(**batch) == expected


def test_one_copy_brings_tensors_of_all_kinds():
    given = [
        torch.tensor([True, False, True]),  # so that what follows begins at an odd byte
        torch.randn(2, 3, dtype=torch.float64),
        torch.zeros(0, 4),
        torch.arange(6, dtype=torch.int32).view(2, 3).t(),
        torch.tensor(-7),
        torch.randn(5).bfloat16(),
    ]
    found = tensors.in_one_copy(given)
    for before, after in zip(given, found, strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)


def test_tensors_of_the_cpu_stay():
    given = [torch.zeros(3), torch.ones(2)]
    assert all(a is b for a, b in zip(tensors.to_host(*given), given, strict=True))
    assert tensors.to_device(given[0], torch.device("cpu")) is given[0]
