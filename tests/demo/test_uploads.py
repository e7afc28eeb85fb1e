"""What is left of uploads after a sweep."""

import asyncio
import os
import time

import pytest

from demo import uploads


def put(folder, name, age_s, size=10):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def left(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_is_old_is_deleted(tmp_path):
    """Also what lies beside Gradio's directories: temporary files of uploads that broke off."""
    for name, age_s in (("a/x", 3500), ("b/x", 3700), ("tmp1", 3500), ("tmp2", 3700)):
        put(tmp_path, name, age_s)
    os.utime(tmp_path / "b", (0, 0))
    os.utime(tmp_path / "a", (0, 0))
    uploads.sweep(tmp_path, 1000)
    assert left(tmp_path) == {"a/x", "tmp1"}
    (tmp_path / "new").mkdir()
    os.utime(tmp_path / "b", (0, 0))  # its file has just been deleted
    uploads.sweep(tmp_path, 1000)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "new", "tmp1"}


@pytest.mark.parametrize(
    ("most_bytes", "names"), [(35, {"a", "b", "c"}), (20, {"a", "b"}), (9, set())]
)
def test_the_oldest_go_first_when_there_is_too_much(tmp_path, most_bytes, names):
    for name, age_s in (("c", 30), ("a", 10), ("b", 20)):
        put(tmp_path, name, age_s)
    uploads.sweep(tmp_path, most_bytes)
    assert left(tmp_path) == names


def test_small_files_are_counted_too(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MOST_FILES", 3)
    for i in range(5):
        put(tmp_path, str(i), 100 - i, size=0)
    uploads.sweep(tmp_path, 1000)
    assert left(tmp_path) == {"2", "3", "4"}


def test_a_server_sweeps_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "EVERY_S", 0.01)

    async def served():
        async with uploads.swept(tmp_path, 1000):
            for name in ("one", "two"):
                put(tmp_path, name, 4000)
                async with asyncio.timeout(10):
                    while left(tmp_path):
                        await asyncio.sleep(0.005)

    asyncio.run(served())
