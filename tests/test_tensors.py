"""What moves tensors between devices."""

import torch
from conftest import sibling

tensors = sibling("tensors")


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
