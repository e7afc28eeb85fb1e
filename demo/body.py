"""A limit on the size of requests, applied before Gradio reads them."""

from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse

from demo.settings import Limits

UPLOAD = "/gradio_api/upload"
# Here Gradio would fetch any address for anyone, and keep a visitor's page on the disk forever.
CLOSED = ("/gradio_api/file=http", "/gradio_api/file/http", "/gradio_api/deep_link")
FRAME_BYTES = 10_000  # of a request, besides its texts or its file


class BoundedBody:
    """Refuses requests that are larger than two texts, or one uploaded file, may be.

    Gradio limits each file of an upload, but not the number of files, the other fields, or the
    bodies of calls. It keeps fields and bodies in memory.
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
        """Pass the messages of an upload on as they come, up to the limit.

        Gradio catches MultiPartException and no other: it deletes what it wrote, and answers 413 if
        the message says 'maximum allowed size'.
        """
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
