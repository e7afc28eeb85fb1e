"""Files from strangers: good ones are read, bad ones are refused before they are decoded."""

import io
import json
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import random_batch

from demo import logits_file


def read(path, array_mb=10):
    return logits_file.read_logits_file(path, array_mb)


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=True)
    return buffer.getvalue()


def npy_header(shape, descr="<f4") -> bytes:
    buffer = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def zipped(path, **members: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


LABELS = npy(np.zeros((2, 3), dtype=np.int64))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_npz(tmp_path, dtype):
    logits, labels = (array.numpy() for array in random_batch())
    path = tmp_path / "a.npz"
    weights = np.array([1.0, 0.5, 0.0])
    save = np.savez if dtype is np.float32 else np.savez_compressed
    save(path, logits=logits.astype(dtype), labels=labels, sample_weight=weights, more=["x"])
    found = read(path)
    assert set(found) == {"logits", "labels", "sample_weight"}
    assert np.array_equal(found["logits"], logits.astype(dtype))
    assert found["logits"].dtype.isnative
    assert np.array_equal(found["labels"], labels)
    assert np.array_equal(found["sample_weight"], weights)


def test_fortran_order(tmp_path):
    logits = np.arange(24.0).reshape(2, 3, 4)
    path = tmp_path / "a.npz"
    np.savez(path, logits=np.asfortranarray(logits), labels=np.zeros((2, 3), int))
    assert np.array_equal(read(path)["logits"], logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_safetensors(tmp_path, dtype):
    logits, labels = random_batch(dtype=dtype)
    path = tmp_path / "a.safetensors"
    save_file({"logits": logits, "labels": labels, "more": torch.zeros(1)}, path)
    found = read(path)
    assert set(found) == {"logits", "labels"}
    assert torch.equal(found["logits"], logits)
    assert torch.equal(found["labels"], labels)


def test_the_example(tmp_path):
    path = tmp_path / "example.npz"
    logits_file.write_example(path)
    found = read(path)
    assert found["logits"].shape == (4, 5, 8)
    assert set(found) == {"logits", "labels", "sample_weight"}


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (print, ("pickled code ran",))


def test_pickled_arrays_are_not_read(tmp_path, capsys):
    evil = npy(np.array([Bomb()], dtype=object))
    path = zipped(tmp_path / "a.npz", logits=evil, labels=LABELS)
    with pytest.raises(ValueError, match="logits holds pickled Python objects"):
        read(path)
    assert "pickled code ran" not in capsys.readouterr().out


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    size = 400_000_000
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("logits.npy", "w", force_zip64=True) as file:
            file.write(npy_header((1, 1, size // 4)))
            for _ in range(size // 10**7):
                file.write(bytes(10**7))
        archive.writestr("labels.npy", LABELS)
    assert path.stat().st_size < 5_000_000
    tracemalloc.start()
    with pytest.raises(ValueError, match="take 400 MB; here at most 10 MB"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_size_that_lies(tmp_path):
    """The entry states few bytes, and the data goes on for more."""
    path = zipped(tmp_path / "a.npz", logits=npy(np.zeros((2, 3, 50_000))), labels=LABELS)
    data = path.read_bytes()
    size = struct.pack("<I", 2 * 3 * 50_000 * 8 + 128)
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, struct.pack("<I", 2 * 3 * 4 * 8 + 128)))
    with pytest.raises(ValueError, match="damaged|does not fit"):
        read(path)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (npy_header((10**6, 10**6, 10**6)), "logits states a shape that does not fit"),
        (npy_header((2, 3, 4)) + bytes(95), "logits states a shape that does not fit"),
        (npy_header((2, -3, 4)), "logits states a shape that does not fit"),
        (npy_header((-2, -3, 4)) + bytes(96), "logits has a size of 0, or one that is no number"),
        (npy_header((2**40, 0, 5)), "logits has a size of 0"),
        (npy_header((True, 3, 4)) + bytes(48), "logits has a size of 0, or one that is no number"),
        (npy_header((2, 3, 1, 4)) + bytes(96), "logits must have the shape"),
        (npy_header((1,) * 60) + bytes(4), "logits must have the shape .* got 60 dimensions"),
        (npy_header((3, 2, 4)) + bytes(96), r"got \(3, 2, 4\) and \(2, 3\)"),
        (npy_header((2, 3, 4), "<U7") + bytes(2 * 3 * 4 * 28), "logits must hold numbers"),
        (npy_header((2, 3, 4), "<c8") + bytes(2 * 3 * 4 * 8), "logits must hold numbers"),
        (npy_header((2, 3, 4), "<f16") + bytes(2 * 3 * 4 * 16), "logits must hold numbers"),
        (npy_header((2, 3, 4), [("a", "<f4")]) + bytes(96), "logits must hold numbers"),
        (b"", "no plain NumPy array"),
        (b"\x93NUMPY\x01\x00", "no plain NumPy array"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "no plain NumPy array"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': 1/0}  ", "no plain NumPy array"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 60_000) + b" " * 60_000, "no plain NumPy"),
        (b"not an array", "no plain NumPy array"),
    ],
)
def test_broken_arrays(tmp_path, logits, message):
    path = zipped(tmp_path / "a.npz", logits=logits, labels=LABELS)
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 and so on", b"plain text"])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_no_such_file_at_all(tmp_path, data, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"The file is no .{suffix}"):
        read(path)


def test_a_truncated_archive(tmp_path):
    path = zipped(tmp_path / "a.npz", logits=npy(np.random.rand(2, 3, 400)), labels=LABELS)
    data = bytearray(path.read_bytes())
    data[200:1000] = bytes(800)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read(path)


def safetensors(path, header: dict, data: bytes, length: int | None = None):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize(
    ("shape", "offsets", "length"),
    [
        ([2, 3, 4], [0, 10**12], None),
        ([10**6, 10**6, 10**6], [0, 96], None),
        ([2, 3, 4], [50, 146], None),
        ([2, 3, 4], [0, 96], 2**62),
        ([2, 3, 4], [0, 96], 10**8),
        ([2**63, 2**63, 2], [0, 0], None),
    ],
)
def test_a_safetensors_header_that_lies(tmp_path, shape, offsets, length):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    path = safetensors(tmp_path / "a.safetensors", {"logits": entry}, bytes(96), length)
    with pytest.raises(ValueError, match="its header does not fit its data"):
        read(path)


def test_safetensors_beyond_the_limit(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"logits": torch.zeros(1, 3, 10**6), "labels": torch.zeros(1, 3).long()}, path)
    with pytest.raises(ValueError, match="take 12 MB; here at most 10 MB"):
        read(path)


@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_reading_takes_no_more_memory_than_the_arrays(tmp_path, dtype):
    """Of a file that is small because all its numbers are equal."""
    path = tmp_path / "a.npz"
    size = 10_000_000
    zeros = np.zeros((1, 5, size // 20), dtype)
    np.savez_compressed(path, logits=zeros, labels=np.zeros((1, 5), np.int64))
    del zeros
    assert path.stat().st_size < 20_000
    tracemalloc.start()
    found = read(path, array_mb=11)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["logits"].shape == (1, 5, size // 20)
    assert peak < size + 4_000_000


def test_a_huge_vocabulary(tmp_path):
    """The metric takes several float32 copies of a row: 2.6 GB for one of 63,000,000."""
    path = tmp_path / "a.npz"
    logits = np.zeros((1, 2, 1_000_001), np.float16)
    np.savez_compressed(path, logits=logits, labels=np.zeros((1, 2), np.int8))
    with pytest.raises(ValueError, match="vocabulary has 1,000,001 tokens; here at most 1,000,000"):
        read(path)


def test_many_positions_of_a_tiny_vocabulary(tmp_path):
    """They take memory by themselves, however few bytes their logits have."""
    path = tmp_path / "a.npz"
    many = np.zeros((1, 2_000_000), dtype=np.int8)
    np.savez_compressed(path, logits=many[..., None].astype(np.float16), labels=many)
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match="has 2,000,000 tokens; here at most 1,000,000"):
        read(path)


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, logits=np.zeros((2, 3, 4)), labels=np.zeros((2, 3), int), sample_weight=[1.0])
    with pytest.raises(ValueError, match=r"sample_weight must have the shape .* got \(1,\)"):
        read(path)


def test_very_many_arrays_and_long_names(tmp_path):
    path = zipped(tmp_path / "a.npz", **{f"n{i}": b"" for i in range(101)})
    with pytest.raises(ValueError, match="more than 100 arrays"):
        read(path)
    path = zipped(tmp_path / "b.npz", **{"x" * 60_000: b""})
    with pytest.raises(ValueError, match="it holds x") as error:
        read(path)
    assert len(str(error.value)) < 200


def test_arrays_that_are_missing_and_other_kinds_of_files(tmp_path):
    path = zipped(tmp_path / "a.npz", labels=LABELS, scores=LABELS)
    with pytest.raises(ValueError, match="needs the arrays logits and labels; it holds labels, sc"):
        read(path)
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="it holds x"):
        read(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"must be an \.npz or a \.safetensors file"):
        read(tmp_path / "a.pt")
