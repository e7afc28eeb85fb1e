"""What a request may send, message by message as a server hands it on."""

import asyncio
import tracemalloc

import pytest

from demo import body
from demo.settings import Limits

LIMITS = Limits(1_000, 100, 1, 1, 1)
MOST = 22_000  # two texts of 1,000 characters as \uXXXX, and 10,000 for the rest


def ask(messages, path="/gradio_api/call/score", root_path="", method="POST"):
    """(status, what the app behind got, how many messages were taken)."""
    taken, sent, got = 0, [], []
    messages = iter(messages)

    async def app(scope, receive, send):
        while True:
            message = await receive()
            got.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        nonlocal taken
        taken += 1
        return next(messages)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "root_path": root_path, "headers": []}
    asyncio.run(body.BoundedBody(app, LIMITS)(scope, receive, send))
    return (sent[0]["status"] if sent else None), b"".join(got), taken


def trickle(size):
    """A body byte by byte."""
    for i in range(size):
        yield {"type": "http.request", "body": b"%d" % (i % 10), "more_body": i < size - 1}


def test_a_body_within_the_limit_gets_through_as_it_came():
    status, got, _ = ask(trickle(MOST))
    assert status == 200
    assert got == b"0123456789" * (MOST // 10)
    assert ask(iter([{"type": "http.request"}]), method="GET")[:2] == (200, b"")


def test_no_more_than_the_limit_is_read():
    assert ask(trickle(10**9)) == (413, b"", MOST + 1)


def test_a_trickle_takes_no_more_memory_than_its_bytes():
    tracemalloc.start()
    ask(trickle(10**9))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A growing bytearray is copied once in a while. A list of the messages took 4 MB.
    assert peak < 10 * MOST


@pytest.mark.parametrize(
    ("path", "root_path"),
    [
        ("/gradio_api/upload", ""),
        ("/gradio_api/upload", "/demo"),  # a proxy took the prefix off
        ("/demo/gradio_api/upload", "/demo"),
    ],
)
def test_an_upload_passes_up_to_the_size_of_a_file(path, root_path):
    block = {"type": "http.request", "body": bytes(2**20), "more_body": True}
    last = {"type": "http.request", "body": b"", "more_body": False}
    status, got, _ = ask([block, last], path, root_path)
    assert status == 200
    assert len(got) == 2**20
    with pytest.raises(body.MultiPartException, match="maximum allowed size of 1 MB"):
        ask([block, block, last], path, root_path)


@pytest.mark.parametrize("path", ["/gradio_api/upload/x", "/other/gradio_api/upload", "/upload"])
def test_another_path_is_no_upload(path):
    assert ask(trickle(10**9), path, root_path="/demo") == (413, b"", MOST + 1)


def test_who_leaves_early_is_not_answered():
    half = {"type": "http.request", "body": b"{", "more_body": True}
    assert ask([half, {"type": "http.disconnect"}]) == (None, b"", 2)
    with pytest.raises(body.MultiPartException, match="broke off"):
        ask([half, {"type": "http.disconnect"}], "/gradio_api/upload")
