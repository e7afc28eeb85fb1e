"""Serve the page within its bounds, and end in order."""

import os
import signal
import tempfile
import threading
import time
from pathlib import Path

from gradio.queueing import Queue
from starlette.middleware import Middleware

from demo.body import BoundedBody
from demo.look import CSS, theme
from demo.page import Page, make_page
from demo.score_view import routes
from demo.service import Metrics
from demo.settings import Settings
from demo.uploads import swept

SESSIONS = 10  # whose states Gradio keeps; they hold nothing of a visitor, see `Page`
FINISH_S, REFUSE_S = 3, 1  # at the end, for what runs; and then for the answer that it is stopped
SEND_S = 0.5  # for the last answers to get out


def launch(page: Page, settings: Settings, folder: Path, **more) -> tuple:
    """Start to serve the page. Nothing leaves the machine.

    Args:
        folder: where Gradio keeps uploads. What is in it and old is deleted.
    """
    # uvicorn would read the visitor's address from a header. See `address_of`.
    os.environ["FORWARDED_ALLOW_IPS"] = ""
    most_bytes = settings.limits.uploads_mb * 2**20
    return page.launch(
        app_kwargs={
            "middleware": [Middleware(BoundedBody, settings, folder)],
            "lifespan": lambda _: swept(folder, most_bytes),
            "routes": routes(),
        },
        theme=theme(settings.theme),
        css=CSS,
        max_file_size=f"{settings.limits.file_mb}mb",
        state_session_capacity=SESSIONS,
        enable_monitoring=False,
        run_history=False,
        share=False,
        ssr_mode=False,
        show_error=False,
        footer_links=[],
        **more,
    )


def serve(settings: Settings) -> None:
    """Serve the page until SIGINT or SIGTERM; then finish or refuse what runs, within 10 s.

    The folder of uploads is this server's own, and deleted at the end.
    """
    is_over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: is_over.set())
    with tempfile.TemporaryDirectory(prefix="perplexity-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        metrics = Metrics(settings)
        page = make_page(settings, metrics)
        launch(page, settings, Path(folder), prevent_thread_lock=True)
        is_over.wait()
        end(page, metrics)


def end(page: Page, metrics: Metrics) -> None:
    """Finish or refuse what runs, refuse what waits, and close the server."""
    metrics.end(FINISH_S)
    deadline = time.monotonic() + FINISH_S + REFUSE_S
    while _is_busy(page._queue) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(SEND_S)
    page.close(verbose=False)


def _is_busy(queue: Queue) -> bool:
    return len(queue) > 0 or any(job is not None for job in queue.active_jobs)
