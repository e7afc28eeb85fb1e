"""The processes of one launch (torchrun, accelerate), and what passes between them.

Each rank attempts its part, then all meet in one collective:

    mine = processes.attempt(read, path)
    everyone = processes.gather(mine)

A rank that fails takes part in the collective too, so no other rank waits for it: it raises its own
error there, and the others raise ConnectionError.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")
U = TypeVar("U")


def num_launched() -> int:
    """How many processes run together, whether they are connected yet or not."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Processes:
    """This process's rank among `size` processes; by default it is alone."""

    rank: int = 0
    size: int = 1
    group: "dist.ProcessGroup | None" = None  # None for torch.distributed's default group

    @classmethod
    def launched(cls) -> "Processes":
        """All processes of torch.distributed's default group, or one alone without a launch.

        Raises:
            ValueError: several processes were launched, but are not connected.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        if num_launched() > 1:
            raise ValueError(
                "sync: several processes were launched, but torch.distributed is not initialised. "
                "Create accelerate.Accelerator(), or call torch.distributed.init_process_group()."
            )
        return cls()

    @classmethod
    def to_sync(cls, sync: bool, process_group: "dist.ProcessGroup | None" = None) -> "Processes":
        """The processes that divide texts, or add up their sums: with `sync` the group, or all.

        Raises:
            TypeError: `sync` that is not True or False, or a group that is none.
            ValueError: as `launched` and `of_group`, or a group without `sync`.
        """
        if not isinstance(sync, bool):
            raise TypeError(f"sync must be True or False, got {sync!r}.")
        if process_group is not None and not sync:
            raise ValueError("process_group goes with sync=True: it says which processes do that.")
        if process_group is not None:
            return cls.of_group(process_group)
        return cls.launched() if sync else ALONE

    @classmethod
    def of_group(cls, group: "dist.ProcessGroup") -> "Processes":
        """The processes of a group.

        Raises:
            TypeError: anything but a group.
            ValueError: a group that this process is not in.
        """
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                "process_group must be one of torch.distributed's process groups that this process "
                f"is in, such as torch.distributed.group.WORLD, got {group!r}."
            )
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def attempt(self, function: Callable[..., T], *args) -> "Attempt[T]":
        """Call a function here, for a collective that tells the other ranks whether it failed.

        A process that is alone has nobody to tell: its error is raised at once.
        """
        if self.size == 1:
            return Attempt(function(*args))
        try:
            return Attempt(function(*args))
        except Exception as error:
            return Attempt(error=error)

    def call_together(self, function: Callable[..., T], *args) -> T:
        """What a function returns here, once it has returned on every rank.

        Raises:
            Exception, ConnectionError: as `gather`.
        """
        if self.size == 1:
            return function(*args)
        return self.require_all(self.attempt(function, *args))

    def sum(self, mine: "Attempt[Sequence[float]]", count: int, settings: str) -> list[float]:
        """The sums of all ranks' numbers in float64, equal on each rank.

        Args:
            mine: `count` numbers.
            settings: what the numbers depend on.

        Raises:
            Exception: the error of this rank's attempt.
            ValueError: the settings of the ranks differ.
            ConnectionError: another rank's attempt failed, or another rank is gone.
        """
        if self.size == 1:
            return list(mine.value)
        # One all-reduce for everything: a rank that fails leaves no other rank waiting here or in
        # the next collective. sum(h) and sum(h^2) of a hash h show whether all settings agree.
        settings_hash = zlib.crc32(settings.encode()) % 4096
        values = [0.0] * (count + 2) + [1]
        if mine.error is None:
            values = [*mine.value, settings_hash, settings_hash**2, 0]
        total = self.all_reduce(torch.tensor(values, dtype=torch.float64, device="cpu"), "sum")
        *sums, hash_sum, hash_sum_sq, num_failed = total.tolist()
        if mine.error is not None:
            raise mine.error
        if num_failed > 0:
            raise ConnectionError(f"{num_failed:.0f} of {self.size} ranks failed.")
        if self.size * hash_sum_sq != hash_sum**2:
            raise ValueError(f"The ranks have different settings; here they are {settings}.")
        return sums

    def largest(self, mine: "Attempt[int]") -> int:
        """The largest of all ranks' numbers, none below 0.

        Raises:
            Exception: the error of this rank's attempt.
            ConnectionError: another rank's attempt failed, or another rank is gone.
        """
        if self.size == 1:
            return mine.value
        values = [0, 1] if mine.error is not None else [mine.value, 0]
        number, failed = self.all_reduce(torch.tensor(values, device="cpu"), "max").tolist()
        if failed:  # on all ranks alike, which now tell why
            self.gather(mine)
        return number

    @property
    def members(self) -> list[int]:
        """The ranks of these processes in the default group, in order."""
        if self.size == 1 and self.group is None:
            return [self.rank]
        return dist.get_process_group_ranks(self.group or dist.group.WORLD)

    def all_reduce(self, values: torch.Tensor, kind: Literal["sum", "max"]) -> torch.Tensor:
        """The sums, or the maxima, of all ranks' values, on their device; equal on each rank.

        Raises:
            ConnectionError: another rank is gone.
        """
        if self.size == 1:
            return values
        # "cuda:nccl", or "cpu:gloo,cuda:nccl": where the values are, else the host if possible.
        config = dist.get_backend_config(self.group)
        devices = [part.partition(":")[0] for part in config.split(",")]
        device = next((d for d in (values.device.type, "cpu") if d in devices), devices[0])
        # A copy, because it is written to.
        found = values.to(device=device, copy=True, memory_format=torch.contiguous_format)
        with naming_lost_ranks():
            operation = dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX
            dist.all_reduce(found, op=operation, group=self.group)
        return found.to(values.device)

    def gather(self, mine: "Attempt[T]") -> list[T]:
        """The values of all ranks, in the order of the ranks.

        Raises:
            Exception: the error of this rank's attempt.
            ConnectionError: another rank's attempt failed, or another rank is gone.
        """
        if self.size == 1:
            return [mine.value]
        error = None if mine.error is None else f"{type(mine.error).__name__}: {mine.error}"
        everyone: list = [None] * self.size
        with naming_lost_ranks():
            dist.all_gather_object(everyone, (mine.returned, error), group=self.group)
        if mine.error is not None:
            raise mine.error
        for rank, (_, error) in enumerate(everyone):
            if error is not None:
                raise ConnectionError(f"Rank {rank} failed: {error}")
        return [value for value, _ in everyone]

    def require_all(self, mine: "Attempt[T]") -> T:
        """This rank's value, once every rank has one.

        Raises:
            Exception, ConnectionError: as `gather`.
        """
        self.gather(mine.then(lambda value: None))  # the value may be large
        return mine.value

    def require_equal(self, mine: "Attempt[T]", message: str) -> T:
        """This rank's value, if every rank has the same; hashes of their `repr` are compared.

        Raises:
            ValueError: the values differ; it says `message`.
            Exception, ConnectionError: as `gather`.
        """
        if len(set(self.gather(mine.then(_hash)))) > 1:
            raise ValueError(message)
        return mine.value


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """What a function returned on this rank, or the error that it raised."""

    returned: T | None = None
    error: Exception | None = None

    @property
    def value(self) -> T:
        """What the function returned.

        Raises:
            Exception: its error.
        """
        if self.error is not None:
            raise self.error
        return cast("T", self.returned)  # None only where the function returned None

    def then(self, function: Callable[[T], U]) -> "Attempt[U]":
        """`function(value)`, or the same error. The function must not fail."""
        if self.error is not None:
            return Attempt(error=self.error)
        return Attempt(function(self.value))


ALONE = Processes()


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Say that a rank is gone; torch.distributed's errors speak of sockets. Others pass."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            "Another rank is gone, or needs longer than the timeout that the process group was "
            f"initialised with: {reason}"
        ) from error
