"""The processes of one launch (torchrun, accelerate), and what passes between them."""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's place among `size`; by default it is alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    def launched(cls) -> "Processes":
        """All processes of torch.distributed's default group; alone where nothing was launched.

        Raises:
            ValueError: several processes were launched, but they have not been connected.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "sync: several processes were launched, but torch.distributed is not initialised. "
                "Create accelerate.Accelerator(), or call torch.distributed.init_process_group()."
            )
        return cls()

    def add(self, make: Callable[[], Sequence[float]], count: int, settings: str) -> list[float]:
        """The sums over all ranks of the numbers that `make` gives, in float64; equal on each.

        Args:
            make: gives `count` numbers. If it raises on one rank, that one raises the same, and
                all others raise ConnectionError.
            settings: what the numbers depend on.

        Raises:
            ValueError: the settings of the ranks differ.
            ConnectionError: a rank failed, or is gone.
        """
        if self.size == 1:
            return list(make())
        # All is told in one all-reduce, so that a rank that fails does not leave others waiting,
        # nor meets them in the next one. sum(h) and sum(h^2) of a hash h show whether all agree.
        settings_hash = zlib.crc32(settings.encode()) % 4096
        error = None
        try:
            values = [*make(), settings_hash, settings_hash**2, 0]
        except Exception as failure:
            error, values = failure, [0.0] * (count + 2) + [1]
        # "cuda:nccl", or "cpu:gloo,cuda:nccl": the host where that is possible.
        config = dist.get_backend_config()
        device = "cpu" if "cpu:" in config else config.partition(":")[0]
        total = torch.tensor(values, dtype=torch.float64, device=device)
        with _naming_lost_ranks():
            dist.all_reduce(total)
        *sums, hash_sum, hash_sum_sq, num_failed = total.tolist()
        if error is not None:
            raise error
        if num_failed > 0:
            raise ConnectionError(f"{num_failed:.0f} of {self.size} ranks failed.")
        if self.size * hash_sum_sq != hash_sum**2:
            raise ValueError(f"The ranks have different settings; here they are {settings}.")
        return sums

    def exchange(self, make: Callable[[], T]) -> list[T]:
        """What `make` gives on each rank, in the order of the ranks.

        If it raises on one, that one raises the same, and all others raise ConnectionError.
        """
        if self.size == 1:
            return [make()]
        mine, error = None, None
        try:
            mine = make()
        except Exception as failure:
            error = failure
        told = None if error is None else f"{type(error).__name__}: {error}"
        everyone: list = [None] * self.size
        with _naming_lost_ranks():
            dist.all_gather_object(everyone, (mine, told))
        if error is not None:
            raise error
        for rank, (_, told) in enumerate(everyone):
            if told is not None:
                raise ConnectionError(f"Rank {rank} failed: {told}")
        return [made for made, _ in everyone]


ALONE = Processes()


@contextmanager
def _naming_lost_ranks() -> Iterator[None]:
    """torch.distributed's errors speak of sockets."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            "Another rank is gone, or needs longer than the timeout that the process group was "
            f"initialised with: {reason}"
        ) from error
