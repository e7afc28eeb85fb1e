"""A tensor that several processes hold together -> which part this one has, and who has the rest.

DTensors and their placements are told by their methods, because torch may lack the classes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ppleval.distributed import ALONE, Attempt, Processes, T
from ppleval.logits.tensors import is_dtensor


@dataclass(frozen=True)
class Part:
    """What this process has of a tensor with a vocabulary, such as logits (..., V).

    `rows` is its place in all other dimensions together; without any it has all rows.
    """

    local: Any  # as the user passed it, or the local tensor of a DTensor
    whole: Any  # the DTensor, or None
    vocab_start: int  # the id of its first column
    rows: tuple[slice, ...]
    expected_shape: tuple[int, ...] | None  # that torch gives the part of a DTensor
    column_groups: tuple[Processes, ...]  # of each, the processes have other columns
    row_groups: tuple[Processes, ...]  # of each, the processes have other rows
    groups: tuple[Processes, ...]  # these and those that have copies; of more than one process
    is_first: bool  # one process of all that hold a part is

    @property
    def given(self) -> Any:
        """What the user passed."""
        return self.local if self.whole is None else self.whole

    def attempt(self, function: Callable[..., T], *args) -> Attempt[T]:
        """Call a function here, for a collective of these processes, as `Processes.attempt`."""
        return (*self.groups, ALONE)[0].attempt(function, *args)

    def check_shape(self, name: str) -> None:
        """Raises ValueError for a local tensor that is not of the size that torch gives it."""
        if self.expected_shape is not None and tuple(self.local.shape) != self.expected_shape:
            raise ValueError(
                f"{name} is a DTensor of {tuple(self.local.shape)} here, where torch's Shard gives "
                f"{self.expected_shape} of {tuple(self.whole.shape)}. Parts of other sizes go to "
                "token_nll as plain tensors, with vocab_start and process_group."
            )

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of this part's rows, as a DTensor if the part is of one, replicated where the
        vocabulary is sharded."""
        if self.whole is None:
            return values
        shape = self.whole.shape[:-1]
        # torch has moved its module; the DTensor's own has the class of the same version.
        replicate = sys.modules[type(self.whole).__module__].Replicate()
        vocab_dim = self.whole.dim() - 1
        placements = [
            replicate if p.is_replicate() or p.dim % self.whole.dim() == vocab_dim else p
            for p in self.whole.placements
        ]
        stride = torch.empty(shape, device="meta").stride()
        return type(self.whole).from_local(
            values, self.whole.device_mesh, placements, run_check=False, shape=shape, stride=stride
        )


def part_of(
    value, name: str, vocab_start: int | None, process_group, vocab_dim: int = -1
) -> Part | None:
    """This process's part of a tensor; None if it has the whole.

    Args:
        value: a DTensor, or with `vocab_start` the local columns.
        name: for errors.
        vocab_start: the id of the first local column; a DTensor knows it.
        process_group: the processes that have the other columns; a DTensor knows them.
        vocab_dim: the dimension that is the vocabulary.

    Raises:
        TypeError: a placement that is neither Shard nor Replicate, a group that is none.
        ValueError: only one of vocab_start and process_group, either of them with a DTensor, or a
            device mesh that this process is not in.
    """
    if (vocab_start is None) != (process_group is None):
        raise ValueError(
            "vocab_start, the id of the first column here, and process_group, the processes that "
            "have the others, go together."
        )
    if is_dtensor(value):
        if vocab_start is not None:
            raise ValueError(
                f"{name} is a DTensor, which knows its place: leave out vocab_start and "
                "process_group."
            )
        if value.dim() == 0:
            raise ValueError(f"{name} must have a vocabulary, got a DTensor without dimensions.")
        return _part_of_dtensor(value, name, vocab_dim % value.dim())
    if vocab_start is None:
        return None
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, (int, np.integer)):
        raise TypeError(f"vocab_start must be an integer, got {vocab_start!r}.")
    group = Processes.of_group(process_group)
    groups = (group,) if group.size > 1 else ()
    return Part(value, None, int(vocab_start), (), None, groups, (), groups, group.rank == 0)


def _part_of_dtensor(tensor: Any, name: str, vocab_dim: int) -> Part:
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"{name} is a DTensor on a device mesh that this process is not in.")
    extents = [slice(0, size) for size in tensor.shape]
    column_groups, row_groups, groups = [], [], []
    for number, placement in enumerate(tensor.placements):
        # A strided shard is that of a parameter under FSDP and tensor parallelism.
        is_shard = placement.is_shard() and not hasattr(placement, "split_factor")
        if not is_shard and not placement.is_replicate():
            raise TypeError(
                f"{name} is a DTensor with the placement {placement}; pass "
                ".redistribute(placements=) with Shard and Replicate only."
            )
        group = Processes.of_group(mesh.get_group(number))
        if group.size > 1:
            groups.append(group)
        if is_shard:
            dim = placement.dim % tensor.dim()
            extents[dim] = _chunk(extents[dim], group.size, coordinate[number])
            if group.size > 1:
                (column_groups if dim == vocab_dim else row_groups).append(group)
    local = tensor.detach().to_local()
    if hasattr(local, "trigger_wait"):  # of a collective under way, as redistribute leaves it
        local = local.wait()
    return Part(
        local,
        tensor,
        extents[vocab_dim].start,
        tuple(extent for dim, extent in enumerate(extents) if dim != vocab_dim),
        tuple(extent.stop - extent.start for extent in extents),
        tuple(column_groups),
        tuple(row_groups),
        tuple(groups),
        not any(coordinate),
    )


def _chunk(extent: slice, num_parts: int, number: int) -> slice:
    """One of the parts of an extent, as torch.chunk cuts; the last may be smaller or empty."""
    size = -(-(extent.stop - extent.start) // num_parts)
    first, end = (min(extent.start + n * size, extent.stop) for n in (number, number + 1))
    return slice(first, end)


def whole_of(value):
    """A DTensor as a plain tensor of the whole, gathered; anything else as it is."""
    return value.full_tensor() if is_dtensor(value) else value
