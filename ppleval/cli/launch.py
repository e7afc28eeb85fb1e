"""The processes that torchrun, accelerate or MPI started beside this one."""

import datetime
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ppleval.distributed import Processes


# What launchers say the number of processes in: torchrun and accelerate, and three kinds of MPI.
SIZES_OF_LAUNCHES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def is_one_of_several() -> bool:
    """Whether a launcher started more processes than this one."""
    return any(int(os.environ.get(name, "1")) != 1 for name in SIZES_OF_LAUNCHES)


def join_launch() -> "tuple[Processes, torch.device | None]":
    """Connect the processes of this launch; return them and, of several, this one's device."""
    from ppleval.distributed import ALONE, Processes

    if not is_one_of_several():
        return ALONE, None
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available(),
        # The other ranks wait for one that scores a long text. A dead rank loses its connection,
        # and the launcher sees it, so no short timeout is needed.
        timeout=datetime.timedelta(hours=2),
    )
    return Processes.launched(), state.device
