"""What a user passes -> tensors, ids and dtypes, checked. No arithmetic."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch


def as_tensor(value, name: str) -> torch.Tensor:
    """A tensor that shares the memory of `value` where that is possible, cut off from autograd.

    Raises:
        TypeError: strings and other things that are no numbers.
        ValueError: nested lists of unequal lengths.
    """
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be lost; use ignore_index or weight 0."
        )
    if _holds_tensors(value):
        parts = [as_tensor(part, name) for part in value]
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"{name} must be rectangular, got tensors of unequal shapes.")
        return torch.stack(parts)
    try:
        array = np.asarray(value)
        if array.dtype == object and array.ndim == 1:  # an array or a column of arrays
            array = np.asarray(list(array))
    except ValueError as error:
        raise ValueError(
            f"{name} must be rectangular, got nested sequences of unequal lengths."
        ) from error
    if array.dtype.name == "bfloat16":  # JAX's, which torch does not know from NumPy
        return as_tensor(array.view(np.uint16), name).view(torch.bfloat16)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold numbers, got {type(value).__name__} of {array.dtype}.")
    if not array.dtype.isnative or min(array.strides, default=0) < 0:  # torch takes neither
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        # torch warns that writing to a read-only array is undefined; nothing here writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _holds_tensors(value) -> bool:
    """Whether the first thing in nested lists is a tensor, which NumPy may not be able to read."""
    while isinstance(value, (list, tuple)) and len(value) > 0:
        value = value[0]
    return isinstance(value, torch.Tensor)


def check_types(
    logits: torch.Tensor, targets: torch.Tensor, logits_name: str, targets_name: str
) -> None:
    """Raises TypeError unless logits are floating point and targets are integers."""
    if not logits.is_floating_point():
        raise TypeError(
            f"{logits_name} must be floating-point logits or probabilities, got {logits.dtype}. "
            f"Token ids belong into {targets_name}."
        )
    if targets.numel() == 0:
        return  # an empty list has no type of its own
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"{targets_name} must be integer token ids, got {targets.dtype}.")


def ignored_ids(ignore_index: int | Sequence[int] | None) -> tuple[int, ...]:
    """`ignore_index` as a tuple of ids.

    Raises:
        TypeError: anything but an integer, a sequence of integers or None.
        ValueError: an integer that no tensor can hold.
    """
    if ignore_index is None:
        return ()
    ids = [ignore_index] if np.ndim(ignore_index) == 0 else list(ignore_index)
    if not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in ids):
        raise TypeError(
            f"ignore_index must be an integer, several integers or None, got {ignore_index!r}."
        )
    for i in ids:
        if not -(2**63) <= i < 2**63:
            raise ValueError(f"ignore_index must fit into 64 bits, got {i}.")
    return tuple(int(i) for i in ids)


def is_scored(targets: torch.Tensor, ignore_index: int | Sequence[int] | None) -> torch.Tensor:
    """Bool tensor, True where the target is none of the ignored ids."""
    # subtle: compared with a narrower type, such as uint8, an id would wrap around to another.
    targets = targets.to(torch.int64)
    scored = torch.ones_like(targets, dtype=torch.bool)
    for ignored_id in ignored_ids(ignore_index):
        scored &= targets != ignored_id
    return scored


def reduction_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """torch.float32 or torch.float64, from its name or itself.

    Raises:
        ValueError: any other dtype.
    """
    for allowed in (torch.float32, torch.float64):
        if dtype == allowed or dtype == str(allowed).removeprefix("torch."):
            return allowed
    raise ValueError(f'dtype must be "float32" or "float64", got {dtype!r}.')


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`, where a copy does not wait for work that is under way.

    CUDA has taken a copy of the host's memory when it returns, so that this is safe there, in this
    direction. (CUDA Runtime API, "API synchronization behavior".)
    """
    not_waiting = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.to(device, non_blocking=not_waiting)


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors on the CPU, by one copy from each device: every copy waits for the device."""
    on_host = list(tensors)
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        here = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        for i, copied in zip(here, in_one_copy([tensors[i] for i in here]), strict=True):
            on_host[i] = copied
    return on_host


def in_one_copy(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of one device, of any shapes and dtypes, on the CPU."""
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    copied = torch.cat(parts).cpu().split([len(part) for part in parts])
    # Cloned, because a view of another dtype has to begin at a multiple of its size.
    return [
        part.clone().view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(copied, tensors, strict=True)
    ]
