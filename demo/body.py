"""What a request may ask for and send, checked before Gradio reads it."""

import asyncio
import time
from pathlib import Path

from python_multipart.multipart import parse_options_header
from starlette.formparsers import MultiPartException
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse

from demo.addresses import address_of
from demo.settings import Limits, Settings
from demo.uploads import sweep

UPLOAD = "/gradio_api/upload"
# Here Gradio would fetch any address for anyone, keep a visitor's page or video on the disk for
# ever, call a component, or tell how many others use the page.
CLOSED = (
    "/gradio_api/file=http",
    "/gradio_api/file/http",
    "/gradio_api/deep_link",
    "/gradio_api/process_recording",
    "/gradio_api/component_server",
    "/monitoring",
)
FRAME_BYTES = 10_000  # of a request, besides its texts or its file
ADDRESS_BYTES = 2_000  # of a request's path and query; Gradio keeps names of sessions and uploads
UPLOAD_S = 300  # for one upload
UPLOADS, UPLOADS_OF_ONE = 4, 2  # at once: of all visitors, and of one
PARTS = 4  # of an upload: its file, and what programs may add


def most_bytes(limits: Limits) -> int:
    """The most bytes of a request: two texts, each character as \\uXXXX, and what is around."""
    return 2 * 6 * limits.text_characters + FRAME_BYTES


class BoundedBody:
    """Refuses requests that are larger than two texts, or one uploaded file, may be.

    Gradio limits each file of an upload, but not the number of files, the other fields, or the
    bodies of calls. It keeps fields and bodies in memory.
    """

    def __init__(self, app, settings: Settings, folder: Path):
        limits = settings.limits
        self._app = app
        self._folder = folder  # of uploads
        self._file_mb = limits.file_mb
        self._uploads_bytes = (limits.uploads_mb - limits.file_mb) * 2**20  # and one more
        self._most = most_bytes(limits)
        self._proxies = settings.queue.proxies
        self._uploading: list[str] = []  # the addresses

    async def __call__(self, scope, receive, send) -> None:
        """Answer an ASGI request, or pass it on to the app."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A proxy may leave its prefix on the path.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if len(scope["path"]) + len(scope["query_string"]) > ADDRESS_BYTES:
            await PlainTextResponse("The address is too long.", 414)(scope, receive, send)
        elif path.startswith(CLOSED):
            await PlainTextResponse("Not here.", 403)(scope, receive, send)
        elif (scope["method"], path) == ("POST", UPLOAD):
            await self._upload(scope, receive, send)
        else:
            await self._take(scope, receive, send)

    async def _upload(self, scope, receive, send) -> None:
        request = HTTPConnection(scope)
        _, options = parse_options_header(request.headers.get("content-type", ""))
        if b"boundary" not in options:
            await PlainTextResponse("An upload is a form with a file.", 400)(scope, receive, send)
            return
        address = address_of(request, self._proxies)
        theirs = self._uploading.count(address)
        if theirs >= UPLOADS_OF_ONE or len(self._uploading) >= UPLOADS:
            answer = PlainTextResponse("Too many uploads at once. Try again in a minute.", 429)
            await answer(scope, receive, send)
            return
        self._uploading.append(address)
        try:
            await asyncio.to_thread(sweep, self._folder, self._uploads_bytes)
            await self._app(scope, self._bounded(receive, options[b"boundary"]), send)
        finally:
            self._uploading.remove(address)

    def _bounded(self, receive, boundary: bytes):
        """Pass the messages of an upload on as they come, up to the limits.

        Gradio catches MultiPartException and no other: it deletes what it wrote, and answers 413 if
        the message says 'maximum allowed size'.
        """
        deadline = time.monotonic() + UPLOAD_S
        between = b"\r\n--" + boundary  # the parts, and behind the last
        size, parts, end, more = 0, 0, b"", True

        async def counted():
            nonlocal size, parts, end, more
            if not more:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                raise MultiPartException(f"The upload took longer than {UPLOAD_S} s.") from None
            if message["type"] == "http.disconnect":
                raise MultiPartException("The upload broke off.")
            body = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(body)
            if size > self._file_mb * 2**20 + FRAME_BYTES:
                raise MultiPartException(
                    f"The upload exceeds the maximum allowed size of {self._file_mb} MB."
                )
            parts += (end + body).count(between)
            end = (end + body)[1 - len(between) :]  # may hold the beginning of the next
            if parts > PARTS:
                raise MultiPartException("Upload one file at once.")
            return message

        return counted

    async def _take(self, scope, receive, send) -> None:
        """Read the body, then pass it on whole. Many small messages would take more memory."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                answer = PlainTextResponse("The request is too large.", status_code=413)
                await answer(scope, receive, send)
                return
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay():
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)
