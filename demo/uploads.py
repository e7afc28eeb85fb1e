"""The folder of what visitors upload: not too much of it, and nothing old. No Gradio here."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

OLD_S = 3600
EVERY_S = 600
MOST_FILES = 1000


def sweep(folder: Path, most_bytes: float) -> None:
    """Delete what is older than an hour, and the oldest files while there are too many.

    The time is that of the last change, so that a file which is being uploaded is a new one.
    """
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # Gradio moves files
            if path.is_file():
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    kept, oldest = 0, time.time() - OLD_S
    for i, (changed, size, path) in enumerate(sorted(found, reverse=True)):
        kept += size
        if changed < oldest or kept > most_bytes or i >= MOST_FILES:
            path.unlink(missing_ok=True)
    for directory in folder.iterdir():
        # Not a new one, which is empty until Gradio moves a file there.
        if directory.is_dir() and directory.stat().st_mtime < oldest:
            with contextlib.suppress(OSError):  # it holds a newer file
                directory.rmdir()


@contextlib.asynccontextmanager
async def swept(folder: Path, most_bytes: float) -> AsyncIterator[None]:
    """Sweep every ten minutes."""

    async def repeat():
        while True:
            await asyncio.to_thread(sweep, folder, most_bytes)
            await asyncio.sleep(EVERY_S)

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
