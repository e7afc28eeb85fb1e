"""A bound on what a request may send, before Gradio reads it."""

from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse

from demo.settings import Limits

UPLOAD = "/gradio_api/upload"
# Here Gradio would fetch any address for anybody, and write a visitor's page to the disk for good.
CLOSED = ("/gradio_api/file=http", "/gradio_api/file/http", "/gradio_api/deep_link")
FRAME_BYTES = 10_000  # of a request, beside its texts or its file


class BoundedBody:
    """Refuses what cannot be a request for two texts, or the upload of a file, within the limits.

    Gradio bounds each file of an upload, but not their number, nor the fields beside them, nor the
    bodies of calls, and keeps the latter two in memory.
    """

    def __init__(self, app, limits: Limits):
        self._app = app
        self._file_mb = limits.file_mb
        self._most = 2 * 6 * limits.text_characters + FRAME_BYTES  # each character as \uXXXX

    async def __call__(self, scope, receive, send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A proxy may leave its prefix on the path.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith(CLOSED):
            await PlainTextResponse("Not here.", status_code=403)(scope, receive, send)
        elif (scope["method"], path) == ("POST", UPLOAD):
            await self._app(scope, self._bounded(receive), send)
        else:
            await self._take(scope, receive, send)

    def _bounded(self, receive):
        """The messages of an upload as they come. Gradio catches this exception alone: it deletes
        what it wrote, and answers 413 where the message says 'maximum allowed size'."""
        size, more = 0, True

        async def counted():
            nonlocal size, more
            message = await receive()
            if more and message["type"] == "http.disconnect":
                raise MultiPartException("The upload broke off.")
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size > self._file_mb * 2**20 + FRAME_BYTES:
                raise MultiPartException(
                    f"The upload exceeds the maximum allowed size of {self._file_mb} MB."
                )
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
