"""A bound on what a request may send, before it is read."""

from starlette.responses import PlainTextResponse


class BoundedBody:
    """Refuses what cannot be a request for a text of so many characters, before it is all read.

    Gradio bounds uploads by itself, but not the bodies of calls, which it keeps while they wait.
    """

    def __init__(self, app, text_characters: int):
        self._app = app
        self._most = 2 * 6 * text_characters + 10_000  # two texts, each character as \uXXXX

    async def __call__(self, scope, receive, send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"].endswith("/upload"):
            await self._app(scope, receive, send)
            return
        messages, size = [], 0
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            if size > self._most:
                answer = PlainTextResponse("The request is too large.", status_code=413)
                await answer(scope, receive, send)
                return

        async def replay():
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)
