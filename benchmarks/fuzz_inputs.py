"""The same numbers in every form in which a user may pass them: logits, ids and weights.

A form is a function of the numbers of each sequence, NumPy arrays, to what is passed. It does not
change them: they were rounded to the dtype in which they are passed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
Arrays = list[np.ndarray]


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """The values as a dtype holds them, float64."""
    return torch.from_numpy(values).to(FLOATS[dtype]).double().numpy()


def tensors(arrays: Arrays, dtype: str) -> list[torch.Tensor]:
    """Each array as a tensor."""
    return [torch.from_numpy(array.copy()).to(FLOATS[dtype]) for array in arrays]


def transposed(batch: torch.Tensor) -> torch.Tensor:
    """The same numbers, in memory from the last axis to the first."""
    axes = tuple(reversed(range(batch.dim())))
    return batch.permute(axes).contiguous().permute(axes)


def sliced(batch: torch.Tensor) -> torch.Tensor:
    """The same numbers, as every second one of a larger tensor, between others."""
    larger = torch.full((*batch.shape[:-1], 2 * batch.shape[-1] + 1), 7.0, dtype=batch.dtype)
    larger[..., 1::2] = batch
    return larger[..., 1::2]


def needing_gradients(batch: torch.Tensor) -> torch.Tensor:
    """The same numbers, the output of an operation that autograd has recorded."""
    return batch.clone().requires_grad_() * 1


def expanded(batch: torch.Tensor) -> torch.Tensor:
    """The same numbers, without memory of its own for sequences that are all alike."""
    alike = len(batch) > 0 and bool((batch == batch[:1]).all())
    return batch[:1].expand(batch.shape) if alike else batch


def backwards(batch: np.ndarray) -> np.ndarray:
    """The same numbers, with a negative stride."""
    return batch[:, ::-1].copy()[:, ::-1]


def read_only(batch: np.ndarray) -> np.ndarray:
    """The same numbers, in memory that nobody may write to."""
    batch = batch.copy()
    batch.flags.writeable = False
    return batch


def big_endian(batch: np.ndarray) -> np.ndarray:
    """The same numbers, in the other order of bytes."""
    return batch.astype(batch.dtype.newbyteorder(">"))


def as_objects(arrays: list) -> np.ndarray:
    """An array of arrays, as a column of a table is."""
    box = np.empty(len(arrays), dtype=object)
    box[:] = arrays
    return box


OF_TENSOR: dict[str, Callable] = {
    "tensor": lambda batch: batch,
    "transposed": transposed,
    "sliced": sliced,
    "with gradients": needing_gradients,
    "expanded": expanded,
}
OF_ARRAY: dict[str, Callable] = {
    "array": lambda batch: batch,
    "backwards": backwards,
    "read-only": read_only,
    "big-endian": big_endian,
    "nested lists": lambda batch: batch.tolist(),
}
OF_SEQUENCES: dict[str, Callable] = {
    "list of tensors": list,
    "tuple of tensors": tuple,
    "list of arrays": lambda parts: [part.numpy() for part in parts],
    "objects": lambda parts: as_objects([part.numpy() for part in parts]),
    "list of nested lists": lambda parts: [part.tolist() for part in parts],
    "nested tensor": lambda parts: torch.nested.nested_tensor(list(parts)),
}


def forms_of(arrays: Arrays, dtype: str) -> list[str]:
    """The names of the forms in which sequences of these shapes and dtype can be passed."""
    lengths = {len(array) for array in arrays}
    names: list[str] = []
    if len(lengths) == 1:
        names += OF_TENSOR
        names += OF_ARRAY if dtype != "bfloat16" else []
    names += OF_SEQUENCES
    if dtype == "bfloat16":  # which NumPy does not have
        names = [name for name in names if name not in ("list of arrays", "objects")]
    if 0 in lengths or not lengths:  # an empty list does not tell its shape
        names = [name for name in names if "nested" not in name]
    # An array of arrays of one shape would be an array of more axes.
    return [name for name in names if name != "objects" or len(lengths) > 1]


def in_form(arrays: Arrays, dtype: str, name: str) -> Any:
    """The sequences (T_i, V) as a user passes them; lists are float64, whatever `dtype`."""
    parts = tensors(arrays, dtype)
    if name in OF_TENSOR:
        return OF_TENSOR[name](torch.stack(parts))
    if name in OF_ARRAY:
        return OF_ARRAY[name](torch.stack(parts).numpy())
    return OF_SEQUENCES[name](parts)


def is_float64(dtype: str, form: str) -> bool:
    """Whether the metric sees float64."""
    return dtype == "float64" or form in ("nested lists", "list of nested lists")


def ids_in_form(rng: np.random.Generator, ids: Arrays) -> Any:
    """Ids (T_i,) of each sequence, in a form and a dtype by chance."""
    all_ids = np.concatenate([np.zeros(0, np.int64), *ids])
    kinds = [np.int64, np.int32, np.int16, np.int8, np.uint8]
    limits = [(kind, np.iinfo(kind)) for kind in kinds]
    low, high = (all_ids.min(), all_ids.max()) if len(all_ids) else (0, 0)
    fitting = [kind for kind, limit in limits if limit.min <= low and high <= limit.max]
    kind = fitting[rng.integers(len(fitting))]
    parts = [row.astype(kind) for row in ids]
    if len({len(row) for row in ids}) == 1 and rng.random() < 0.7:
        batch = np.stack(parts)
        return [batch, torch.from_numpy(batch), batch.tolist()][rng.integers(3)]
    rows = [parts, [torch.from_numpy(row) for row in parts], [row.tolist() for row in parts]]
    return rows[rng.integers(3)]


def weights_in_form(rng: np.random.Generator, weights: Arrays, by_sequence: bool) -> Any:
    """Weights (T_i,) of each sequence, in a form by chance; one of each where it has one only."""
    if by_sequence:
        values = np.array([row[0] if len(row) else 1.0 for row in weights])
        return [values, torch.from_numpy(values), values.tolist()][rng.integers(3)]
    if len({len(row) for row in weights}) == 1 and rng.random() < 0.7:
        batch = np.stack(weights)
        return [batch, torch.from_numpy(batch), batch.tolist()][rng.integers(3)]
    return [weights, [row.tolist() for row in weights]][rng.integers(2)]


def fingerprint(value: Any) -> Any:
    """Equal for equal numbers in the same form, to see that a call left them alone."""
    if isinstance(value, torch.Tensor) and value.is_nested:
        return [fingerprint(part) for part in value.unbind()]
    if isinstance(value, torch.Tensor) and (value.layout != torch.strided or value.is_meta):
        return repr(value)
    if isinstance(value, torch.Tensor):
        raw = value.detach().double().numpy().tobytes()  # which keeps every float and small id
        return str(value.dtype), tuple(value.shape), value.requires_grad, raw
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [fingerprint(part) for part in value]
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, (list, tuple)):
        return [fingerprint(part) for part in value]
    return repr(value)
