"""Read the arrays of a stranger's file: every size is checked before anything is decoded.

The file is .npz (zipped .npy, never pickled) or .safetensors. It holds `logits`, `labels` and
optionally `sample_weight`.
"""

import io
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
# Each position (b, t) takes some 60 bytes besides its logits, however small the vocabulary is.
MOST_POSITIONS = 1_000_000
MOST_WORDS = 1_000_000  # V. The metric takes several float32 copies of a row.
READ_BYTES = 2**20  # of an archive at once. zipfile copies what it reads.
MOST_ARRAYS = 100  # entries of a file, read or not
# The longest header of a .npy file that is read. A plain array's header has about 120 bytes.
HEADER_BYTES = 4096
NUMPY_DTYPES = (
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
)  # fmt: skip
SAFETENSORS_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
}  # fmt: skip


def read_logits_file(path: Path, array_mb: int) -> dict:
    """The arrays (.npz) or tensors (.safetensors) of a file, by name.

    Args:
        path: the file. Its suffix tells its kind.
        array_mb: the most megabytes (10^6 bytes) that all arrays may take.

    Raises:
        ValueError: with a sentence for the person who sent the file.
    """
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix.lower() not in readers:
        raise ValueError("The file must be an .npz or a .safetensors file.")
    return readers[path.suffix.lower()](path, array_mb * 10**6)


def _check_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse impossible or too large shapes before any data is read."""
    for name, shape in shapes.items():
        if not all(type(size) is int and 0 < size < 2**31 for size in shape):
            raise ValueError(f"{name} has a size of 0, or one that is no number.")
    logits, labels = shapes["logits"], shapes["labels"]
    if len(logits) != 3 or labels != logits[:2]:
        raise ValueError(
            "logits must have the shape (B, T, V) and labels (B, T), got "
            f"{_shown(logits)} and {_shown(labels)}."
        )
    if shapes.get("sample_weight", labels) not in (labels, labels[:1]):
        weights = _shown(shapes["sample_weight"])
        raise ValueError(f"sample_weight must have the shape (B, T) or (B,), got {weights}.")
    if logits[2] > MOST_WORDS:
        raise ValueError(
            f"The vocabulary has {logits[2]:,} tokens; here at most {MOST_WORDS:,} can be read."
        )
    if math.prod(labels) > MOST_POSITIONS:
        raise ValueError(
            f"The file has {math.prod(labels):,} tokens; here at most {MOST_POSITIONS:,} can be "
            "read. Send fewer sequences, or use the module itself."
        )


def _shown(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) < 5 else f"{len(shape)} dimensions"


def _wanted(names) -> Iterator[str]:
    """The names of the arrays to read; the file may hold others."""
    if len(names) > MOST_ARRAYS:
        raise ValueError(f"The file holds more than {MOST_ARRAYS} arrays.")
    for name in REQUIRED:
        if name not in names:
            found = ", ".join(found[:40] for found in sorted(names)[:5]) or "nothing"
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
            headers = {name: _read_header(archive, members[name], name) for name in wanted}
            _check_shapes({name: shape for name, (shape, *_) in headers.items()})
            return {
                name: _read_npy(archive, members[name], name, *header)
                for name, header in headers.items()
            }
    # zipfile raises RuntimeError for encryption and for an unknown compression method.
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        RuntimeError,
        EOFError,
        OSError,
    ) as error:
        raise ValueError("The file is no .npz archive, or is damaged or encrypted.") from error


def _read_header(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str
) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether in Fortran order, dtype, length of the header in bytes)."""
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
        if dtype.newbyteorder("=").name not in NUMPY_DTYPES:
            raise ValueError(f"{name} must hold numbers, of a usual kind.")
        if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise ValueError(f"{name} states a shape that does not fit the size of its data.")
        return shape, fortran_order, dtype, file.tell()


def _read_npy(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    name: str,
    shape: tuple[int, ...],
    fortran_order: bool,
    dtype: np.dtype,
    header_bytes: int,
) -> np.ndarray:
    # torch needs a writable array.
    data = bytearray(info.file_size - header_bytes)
    with archive.open(info) as file:
        assert isinstance(file, io.BufferedIOBase)  # `open` is declared to return less: IO[bytes]
        file.read(header_bytes)
        rest = memoryview(data)
        while len(rest):
            count = file.readinto(rest[:READ_BYTES])
            if count == 0:
                raise ValueError(f"{name} states a shape that does not fit the size of its data.")
            rest = rest[count:]
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
    return array if dtype.isnative else array.byteswap(inplace=True).view(dtype.newbyteorder("="))


def _read_safetensors(path: Path, limit: int) -> dict:
    try:
        with safe_open(path, framework="pt") as file:
            wanted = list(_wanted(file.keys()))
            shapes, num_bytes = {}, 0
            for name in wanted:
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in SAFETENSORS_BYTES:
                    raise ValueError(f"{name} must hold numbers, of a usual kind.")
                shapes[name] = tuple(tensor.get_shape())
                num_bytes += math.prod(shapes[name]) * SAFETENSORS_BYTES[tensor.get_dtype()]
            _check_shapes(shapes)
            _check_size(num_bytes, limit)
            return {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            "The file is no .safetensors file, or its header does not fit its data."
        ) from error


def write_example(path: Path) -> None:
    """Write a small .npz file to try: four sequences of five tokens over a vocabulary of eight."""
    rng = np.random.default_rng(0)
    labels = rng.integers(8, size=(4, 5))
    logits = rng.normal(size=(4, 5, 8)).astype(np.float32)
    logits[np.arange(4)[:, None], np.arange(5), labels] += 2  # a model that is often right
    labels[1, 3:] = -100  # padding
    np.savez(path, logits=logits, labels=labels, sample_weight=np.array([1.0, 0.5, 1.0, 1.0]))
