"""Arrays from a file that a stranger has sent: everything is bounded before anything is decoded.

.npz (zipped .npy, never pickled) and .safetensors, with `logits`, `labels` and, if it is there,
`sample_weight`.
"""

import lzma
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

REQUIRED = ("logits", "labels")
OPTIONAL = ("sample_weight",)
# The longest header of a .npy file that is read; that of a plain array has about 120 bytes.
HEADER_BYTES = 4096
DAMAGED = (zlib.error, lzma.LZMAError, EOFError, OSError)
SAFETENSORS_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8,
    "BOOL": 8,
}  # fmt: skip


def read_logits_file(path: Path, array_mb: int) -> dict:
    """The arrays (.npz) or tensors (.safetensors) of a file, by name.

    Args:
        path: the file, whose kind its suffix tells.
        array_mb: the most megabytes (10^6 bytes) that all arrays may take.

    Raises:
        ValueError: with a sentence for the person who sent the file.
    """
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix.lower() not in readers:
        raise ValueError("The file must be an .npz or a .safetensors file.")
    return readers[path.suffix.lower()](path, array_mb * 10**6)


def _wanted(names) -> Iterator[str]:
    """The arrays that are read, of those that are there; others are left alone."""
    for name in REQUIRED:
        if name not in names:
            found = ", ".join(sorted(names)[:10]) or "nothing"
            raise ValueError(f"The file needs the arrays logits and labels; it holds {found}.")
    yield from (name for name in REQUIRED + OPTIONAL if name in names)


def _check_size(num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise ValueError(
            f"The arrays take {num_bytes / 1e6:,.0f} MB; here at most {limit / 1e6:,.0f} MB can be "
            "read. Send fewer sequences, or use the module itself."
        )


def _read_npz(path: Path, limit: int) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            wanted = list(_wanted(members))
            # zipfile reads no more of a member than its entry states.
            _check_size(sum(members[name].file_size for name in wanted), limit)
            return {name: _read_npy(archive, members[name], name) for name in wanted}
    except (*DAMAGED, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError("The file is no .npz archive, or is damaged or encrypted.") from error


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> np.ndarray:
    with archive.open(info) as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran_order, dtype = read_header(file, max_header_size=HEADER_BYTES)
        except (ValueError, KeyError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"{name} in the file is no plain NumPy array.") from error
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled Python objects, which are not read.")
        if dtype.kind not in "fiub":
            raise ValueError(f"{name} must hold numbers, got {dtype}.")
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes != info.file_size - file.tell():
            raise ValueError(
                f"{name} states the shape {shape}, which does not fit the size of its data."
            )
        data = file.read(num_bytes)
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
    return array.astype(dtype.newbyteorder("="))  # a copy that can be written to, as torch wants


def _read_safetensors(path: Path, limit: int) -> dict:
    try:
        with safe_open(path, framework="pt") as file:
            wanted = list(_wanted(file.keys()))
            num_bytes = 0
            for name in wanted:
                tensor = file.get_slice(name)
                dtype = tensor.get_dtype()
                if dtype not in SAFETENSORS_BITS:
                    raise ValueError(f"{name} must hold numbers, got {dtype}.")
                num_bytes += math.prod(tensor.get_shape()) * SAFETENSORS_BITS[dtype] // 8
            _check_size(num_bytes, limit)
            return {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            "The file is no .safetensors file, or its header does not fit its data."
        ) from error


def write_example(path: Path) -> None:
    """A small .npz file to try: two sequences of five tokens over a vocabulary of eight."""
    rng = np.random.default_rng(0)
    labels = rng.integers(8, size=(2, 5))
    logits = rng.normal(size=(2, 5, 8)).astype(np.float32)
    logits[np.arange(2)[:, None], np.arange(5), labels] += 2  # a model that often is right
    labels[1, 3:] = -100  # padding
    np.savez(path, logits=logits, labels=labels, sample_weight=np.array([1.0, 0.5]))
