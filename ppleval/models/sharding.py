"""A model -> the processes that hold it together: which read the same texts, which go in step.

Tensor, expert and pipeline parallelism divide the work on one batch, so the ranks of such a model
read the same texts. FSDP and ZeRO-3 divide the weights only: each rank reads texts of its own, but
collects weights from the others in each forward pass, so all make equally many.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ppleval.distributed import ALONE, Processes
from ppleval.logits.tensors import is_dtensor


@dataclass(frozen=True)
class ModelRanks:
    """The processes that hold a model together with this one; by default there are none."""

    same: tuple[Processes, ...] = ()  # of each group, all read the same batches
    in_step: Processes = ALONE  # all make equally many forward passes
    layers_run_alone: bool = True  # else weights are whole in the model's own pass (FSDP, ZeRO-3)
    is_pipeline: bool = False  # whether each process has other layers

    @classmethod
    def of(cls, model: nn.Module) -> "ModelRanks":
        """The processes that hold a model, as its modules and parameters tell."""
        if not _are_connected():
            return cls()
        states = [_data_parallel(part) for part in (*model.modules(), *model.parameters())]
        shards = {group for state in states if state is not None for group in state.shards}
        copies = {group for state in states if state is not None for group in state.copies}
        # On a mesh of several dimensions, FSDP's own are not those of the work on a batch.
        known = {frozenset(group.members) for group in shards | copies}
        same = {group for group in _groups_of_work(model) if frozenset(group.members) not in known}
        return cls(
            tuple(sorted(same, key=lambda group: group.members)),
            _largest(shards),
            all(state is None for state in states),
            hasattr(model, "_pp_stage"),
        )

    @property
    def is_alone(self) -> bool:
        """Whether this process holds the whole model, and needs no other in a forward pass."""
        return self.layers_run_alone and not self.same and self.in_step.size == 1

    def beside(self, other: "ModelRanks") -> "ModelRanks":
        """The processes that hold two models of which this one holds both."""
        return ModelRanks(
            tuple(dict.fromkeys(self.same + other.same)),
            _largest({self.in_step, other.in_step}),
            self.layers_run_alone and other.layers_run_alone,
            self.is_pipeline or other.is_pipeline,
        )

    def copies(self, processes: Processes) -> list[list[int]]:
        """The ranks, among these processes, of each copy of the model; all processes call this.

        Raises:
            ValueError: some of those that make each forward pass together are not among them.
            ConnectionError: another rank failed, or is gone.
        """
        copies: list[set[int]] = []
        for ranks in processes.gather(processes.attempt(self._of_this_copy, processes)):
            joined = set(ranks).union(*(copy for copy in copies if copy & ranks))
            copies = [copy for copy in copies if not copy & ranks] + [joined]
        return sorted(map(sorted, copies))

    def _of_this_copy(self, processes: Processes) -> set[int]:
        members = processes.members
        if self.in_step.size > 1 and not set(self.in_step.members) <= set(members):
            raise ValueError(
                f"process_group holds the ranks {members}, but the ranks {self.in_step.members} "
                "share the weights of the model (FSDP, ZeRO-3) and make each forward pass "
                "together. Pass a group that holds all of these, or leave process_group out."
            )
        tied = {rank for group in self.same for rank in group.members if rank in members}
        return {processes.rank} | {members.index(rank) for rank in tied}

    def same_beyond(self, processes: Processes) -> list[Processes]:
        """Of the groups that read the same batches those that reach beyond these processes."""
        members = set(processes.members)
        return [group for group in self.same if not set(group.members) <= members]


def cast_dtype(model: nn.Module) -> torch.dtype | None:
    """What FSDP casts the weights of a model to in a forward pass; None where it does not."""
    for module in model.modules() if _are_connected() else ():
        kinds, policy = class_names(module), None
        if "FullyShardedDataParallel" in kinds:
            policy = module.mixed_precision
        elif "FSDPModule" in kinds:
            policy = module._get_fsdp_state()._mp_policy  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        dtype = getattr(policy, "param_dtype", None)
        if dtype is not None:
            return dtype
    return None


def _are_connected() -> bool:
    return dist.is_available() and dist.is_initialized()


def class_names(part: Any) -> set[str]:
    """By which FSDP's modules are told, because torch may lack their classes."""
    return set(map(attrgetter("__name__"), type(part).__mro__))


@dataclass(frozen=True)
class _DataParallel:
    """What FSDP or ZeRO-3 says of a module or a parameter: who has the rest, who has copies."""

    shards: set[Processes]
    copies: set[Processes]


def _data_parallel(part: Any) -> _DataParallel | None:
    """None for a part that neither manages."""
    kinds = class_names(part)
    if "FullyShardedDataParallel" in kinds:
        shards, copies = part.process_group, getattr(part, "_inter_node_pg", None)
    elif "FSDPModule" in kinds:
        group = part._get_fsdp_state()._fsdp_param_group
        mesh = getattr(group, "mesh_info", None)  # None for a module without weights of its own
        shards = getattr(mesh, "shard_process_group", None)
        copies = getattr(mesh, "replicate_process_group", None)
    elif hasattr(part, "ds_id"):
        shards, copies = getattr(part, "ds_process_group", None), None
    else:
        return None
    return _DataParallel(_of_several(shards), _of_several(copies))


def _groups_of_work(model: Any) -> Iterator[Processes]:
    """The groups over which parameters are spread, and that of a pipeline's stages."""
    for parameter in model.parameters():
        if is_dtensor(parameter):
            mesh = parameter.device_mesh
            for number, placement in enumerate(parameter.placements):
                if not placement.is_replicate():
                    yield from _of_several(mesh.get_group(number))
    stage = getattr(model, "_pp_stage", None)  # transformers' own
    if stage is not None:
        yield from _of_several(stage.pp_group)


def _of_several(group: "dist.ProcessGroup | None") -> set[Processes]:
    """The processes of a group; none if there is no group, or a single process in it."""
    found = ALONE if group is None else Processes.of_group(group)
    return {found} if found.size > 1 else set()


def _largest(groups: set[Processes]) -> Processes:
    """The group that holds all others; all processes of the launch if none does."""
    several = [group for group in groups if group.size > 1]
    largest = max(several, key=lambda group: group.size, default=ALONE)
    if all(set(group.members) <= set(largest.members) for group in several):
        return largest
    return Processes.launched()
