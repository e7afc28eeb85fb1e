"""What a user passes -> tensors, ids, dtypes and backends, checked. No arithmetic."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Hugging Face's and torch's label of a position that is not scored.
IGNORE_INDEX = -100
NO_LABEL = f"The label of a position that is not to be scored is {IGNORE_INDEX}."

BACKENDS = ("auto", "torch", "triton")


def as_tensor(value, name: str) -> torch.Tensor:
    """A tensor that shares the memory of `value` if it can, cut off from autograd.

    Raises:
        TypeError: anything but a dense array of numbers.
        ValueError: nested lists of unequal lengths.
    """
    value = of_dlpack(value, name)
    check_kind(value, name)
    if isinstance(value, torch.Tensor):
        return value.detach()
    # NumPy may not be able to read the tensors, and would drop the masks.
    is_list = isinstance(value, (list, tuple))
    if is_list and _holds(value, (torch.Tensor, np.ma.MaskedArray)):
        parts = [as_tensor(part, name) for part in value]
        if len({part.shape for part in parts}) > 1:
            raise ValueError(f"{name} must be rectangular, got tensors of unequal shapes.")
        return torch.stack(parts)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"{name} must be rectangular, got nested sequences of unequal lengths."
        ) from error
    # An array or column of arrays, or of numbers as pandas has its Int64.
    if array.dtype == object and array.ndim > 0 and not is_list:
        return as_tensor(array.tolist(), name)
    foreign = array.dtype.isbuiltin == 2  # added to NumPy by another library
    if foreign and array.dtype.name == "bfloat16":  # JAX's
        return as_tensor(array.view(np.uint16), name).view(torch.bfloat16)
    if array.dtype == object:
        raise TypeError(f"{name} must hold numbers, got {_without_numbers(value, array)}")
    if foreign or array.dtype.kind not in "fiub":
        numbers = "real numbers" if array.dtype.kind == "c" else "numbers"
        kind = type(value).__name__
        if not isinstance(value, (str, bytes)):
            kind += " of strings" if array.dtype.kind in "SU" else f" of {array.dtype}"
        raise TypeError(f"{name} must hold {numbers}, got {kind}.")
    return _shared(array)


def of_dlpack(value: Any, name: str) -> Any:
    """What has its numbers in `__dlpack__` alone, as a tensor; anything else as it is.

    Raises:
        TypeError: torch cannot read it.
    """
    # A class has the method, too, but no numbers.
    if hasattr(value, "__array__") or isinstance(value, type) or not hasattr(value, "__dlpack__"):
        return value
    try:
        return torch.from_dlpack(value)
    except Exception as error:  # of whatever kind the other library has
        raise TypeError(
            f"{name} is {type(value).__name__}, which torch.from_dlpack cannot read: {error}. Pass "
            "a tensor or a NumPy array."
        ) from error


def _without_numbers(value, array: np.ndarray) -> str:
    """What an error calls a value that NumPy has read as objects, and what to do about it."""
    for attribute in ("logits", "weight"):  # of a model's output, and of a layer
        if hasattr(value, attribute):
            return f"{type(value).__name__}. Pass its .{attribute}."
    for entry in array.flat if array.ndim > 0 else ():
        if entry is None or type(entry).__name__ == "NAType":  # pandas need not be installed
            return f"{entry}. {NO_LABEL}"
    return "None." if value is None else f"{type(value).__name__} of objects."


def _shared(array: np.ndarray) -> torch.Tensor:
    """A tensor of the same memory, or a copy if torch does not take the array as it is."""
    if array.dtype.kind == "f" and array.itemsize > 8:  # long double
        array = array.astype(np.float64)
    if not array.dtype.isnative or min(array.strides, default=0) < 0:
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        # torch warns that writing to a read-only array is undefined; nothing here writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def check_kind(value, name: str) -> None:
    """Raises TypeError for tensors and arrays that are more or less than dense numbers."""
    if isinstance(value, torch.Tensor):
        problem = _problem_of_tensor(value)
    elif isinstance(value, np.ma.MaskedArray):
        problem = "a masked array, whose mask would be lost; use ignore_index or weight 0"
    elif hasattr(value, "todense"):  # SciPy's and others
        problem = "sparse; pass it dense: .todense()"
    else:
        return
    if problem is not None:
        raise TypeError(f"{name} is {problem}.")


def is_dtensor(value: Any) -> bool:
    """Whether it is a tensor that is spread over processes; told by its method, because torch may
    lack the class."""
    return isinstance(value, torch.Tensor) and hasattr(value, "full_tensor")


def _problem_of_tensor(tensor: torch.Tensor) -> str | None:
    if tensor.is_nested:
        return "a nested tensor; pass the list of its parts: .unbind()"
    if hasattr(tensor, "get_mask"):
        return (
            "a MaskedTensor, whose mask would be lost; pass .get_data(), and use ignore_index or "
            "weight 0"
        )
    if is_dtensor(tensor):
        return (
            "a DTensor, which is spread over processes; pass .full_tensor(), or .to_local() where "
            "each process has sequences of its own"
        )
    if tensor.layout != torch.strided:
        return f"of the layout {tensor.layout}; pass it dense: .to_dense()"
    if tensor.is_quantized:
        return f"quantized, {tensor.dtype}; pass .dequantize()"
    if tensor.is_meta:
        return "on the device 'meta', which holds no numbers"
    return None


def _holds(value: Sequence, kinds: tuple[type, ...]) -> bool:
    """Whether a nested list holds anything of these types."""
    types = set(map(type, value))
    if any(issubclass(kind, kinds) for kind in types):
        return True
    if not any(issubclass(kind, (list, tuple)) for kind in types):
        return False
    return any(isinstance(part, (list, tuple)) and _holds(part, kinds) for part in value)


def check_types(
    logits: torch.Tensor, targets: torch.Tensor, logits_name: str, targets_name: str
) -> None:
    """Raises TypeError unless logits are floating point and targets are integers."""
    if not logits.is_floating_point():
        message = (
            f"{logits_name} must be floating-point logits or probabilities, got {logits.dtype}."
        )
        if not logits.is_complex() and logits.dtype != torch.bool:
            message += f" Token ids belong into {targets_name}."
        raise TypeError(message)
    if targets.numel() == 0:
        return  # an empty list has no type of its own
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        message = f"{targets_name} must be integer token ids, got {targets.dtype}"
        if targets.dtype == torch.bool:
            raise TypeError(f"{message}. A mask goes into sample_weight.")
        if targets.is_floating_point() and targets.float().isnan().any():
            raise TypeError(f"{message} with NaN. {NO_LABEL}")
        raise TypeError(f"{message}.")


def ignored_ids(ignore_index: int | Sequence[int] | None) -> tuple[int, ...]:
    """`ignore_index` as a tuple of ids.

    Raises:
        TypeError: anything but an integer, a sequence of integers or None.
        ValueError: an integer that no tensor can hold.
    """
    if ignore_index is None:
        return ()
    if isinstance(ignore_index, int) or np.ndim(ignore_index) == 0:
        values = [ignore_index]
    else:
        values = ignore_index
    ids = []
    for i in values:
        if isinstance(i, bool) or not isinstance(i, (int, np.integer)):
            raise TypeError(
                f"ignore_index must be an integer, several integers or None, got {ignore_index!r}."
            )
        if not -(2**63) <= i < 2**63:
            raise ValueError(f"ignore_index must fit into 64 bits, got {i}.")
        ids.append(int(i))
    return tuple(ids)


def is_scored(targets: torch.Tensor, ignore_index: int | Sequence[int] | None) -> torch.Tensor:
    """Bool tensor, True where the target is not an ignored id."""
    # subtle: compared in a narrower type, such as uint8, an id would wrap around to another.
    targets = targets.to(torch.int64)
    scored = torch.ones_like(targets, dtype=torch.bool)
    for ignored_id in ignored_ids(ignore_index):
        scored &= targets != ignored_id
    return scored


def reduction_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """torch.float32 or torch.float64, given as itself or by name.

    Raises:
        ValueError: any other dtype.
    """
    for allowed in (torch.float32, torch.float64):
        if dtype == allowed or dtype == str(allowed).removeprefix("torch."):
            return allowed
    raise ValueError(f'dtype must be "float32" or "float64", got {dtype!r}.')


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; a copy from the CPU to CUDA does not wait for the work under way.

    This is safe in this direction: CUDA has read the host's memory when the call returns. (CUDA
    Runtime API, "API synchronization behavior".)
    """
    not_waiting = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.to(device, non_blocking=not_waiting)


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors on the CPU, in one copy from each device, because every copy waits for it."""
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
    # Cloned, because a view of another dtype must begin at a multiple of its size.
    return [
        part.clone().view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(copied, tensors, strict=True)
    ]
