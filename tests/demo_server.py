"""The demo's server in this process, what is asked of it, and what runs there."""

import contextlib
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import httpx
from demo_models import LABEL, loaded
from gradio.utils import get_upload_folder
from support import ROOT

from demo import server, service
from demo.page import make_page

TINY = str(ROOT / "tiny_model")
OTHER = "Other"
PROSE = "Return the number of items in the list. If the list is empty, the result is zero. " * 4


def with_queue(settings, **changes):
    return replace(settings, queue=replace(settings.queue, concurrency=1, **changes))


@contextlib.contextmanager
def serving(settings, wait=True):
    """The page and its address; each model has been tried once, unless `wait` is False."""
    metrics = loaded(settings) if wait else service.Metrics(settings)
    page = make_page(settings, metrics)
    folder = Path(get_upload_folder())
    _, url, _ = server.launch(page, settings, folder, prevent_thread_lock=True, quiet=True)
    try:
        yield page, url
    finally:
        page.close()
        metrics.end(0)


def wait_for(condition):
    """Wait until it is true; a hundred seconds are for slow machines."""
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(url, text, address="192.0.2.1", **more):
    """Send a text to be scored, as a proxy would."""
    headers = {"X-Forwarded-For": f"198.51.100.1, {address}"}
    body = {"data": [text, LABEL], **more}
    return httpx.post(f"{url}gradio_api/call/score", json=body, headers=headers)


def threads_that_score():
    """How many work for `Metrics.score`, or wait there."""
    stacks = (traceback.extract_stack(frame) for frame in sys._current_frames().values())
    return sum(
        any((line.filename, line.name) == (service.__file__, "score") for line in stack)
        for stack in stacks
    )
