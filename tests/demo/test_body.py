"""What a request may send, message by message as a server hands it on."""

import asyncio
import os
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from demo_models import settings_with

from demo import body
from demo.settings import Limits

SETTINGS = replace(settings_with(), limits=Limits(1_000, 100, 1, 2, 1, 1))
MOST = 22_000  # two texts of 1,000 characters as \uXXXX, and 10,000 for the rest
UPLOAD = "/gradio_api/upload"


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def ask(folder):
    return lambda *args, **kwargs: asyncio.run(answer(folder, *args, **kwargs))


def bounded(folder, app):
    return body.BoundedBody(app, SETTINGS, folder)


def scope_of(path, root_path="", method="POST", query=b"", client="192.0.2.1"):
    headers = [(b"content-type", b"multipart/form-data; boundary=limit")]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root_path,
        "headers": headers,
        "query_string": query,
        "client": (client, 5000),
    }


async def answer(folder, messages, path="/gradio_api/call/score", *args, **kwargs):
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

    await bounded(folder, app)(scope_of(path, *args, **kwargs), receive, send)
    return (sent[0]["status"] if sent else None), b"".join(got), taken


def trickle(size):
    """A body byte by byte."""
    for i in range(size):
        yield {"type": "http.request", "body": b"%d" % (i % 10), "more_body": i < size - 1}


def test_a_body_within_the_limit_gets_through_as_it_came(ask):
    status, got, _ = ask(trickle(MOST))
    assert status == 200
    assert got == b"0123456789" * (MOST // 10)
    assert ask(iter([{"type": "http.request"}]), method="GET")[:2] == (200, b"")


def test_no_more_than_the_limit_is_read(ask):
    assert ask(trickle(10**9)) == (413, b"", MOST + 1)


def test_a_trickle_takes_no_more_memory_than_its_bytes(ask):
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
def test_an_upload_passes_up_to_the_size_of_a_file(ask, path, root_path):
    block = {"type": "http.request", "body": bytes(2**20), "more_body": True}
    last = {"type": "http.request", "body": b"", "more_body": False}
    status, got, _ = ask([block, last], path, root_path)
    assert status == 200
    assert len(got) == 2**20
    with pytest.raises(body.MultiPartException, match="maximum allowed size of 1 MB"):
        ask([block, block, last], path, root_path)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload/",
        "/gradio_api/upload/x",
        "//gradio_api/upload",
        "/gradio_api//upload",
        "/gradio_api/./upload",
        "/gradio_api/UPLOAD",
        "/demogradio_api/upload",
        "/demo/demo/gradio_api/upload",
        "/other/gradio_api/upload",
        "/upload",
    ],
)
def test_another_path_is_no_upload(ask, path):
    assert ask(trickle(10**9), path, root_path="/demo") == (413, b"", MOST + 1)


def test_who_leaves_early_is_not_answered(ask):
    half = {"type": "http.request", "body": b"{", "more_body": True}
    assert ask([half, {"type": "http.disconnect"}]) == (None, b"", 2)
    with pytest.raises(body.MultiPartException, match="broke off"):
        ask([half, {"type": "http.disconnect"}], UPLOAD)


def part(name, content=b"x"):
    head = f'--limit\r\nContent-Disposition: form-data; name="{name}"; filename="a.npz"\r\n\r\n'
    return head.encode() + content + b"\r\n"


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_the_files_of_an_upload_are_counted(ask, size):
    """However the body is cut into messages."""

    def messages(count):
        form = b"".join(part("files") for _ in range(count)) + b"--limit--\r\n"
        for i in range(0, len(form), size):
            more = i + size < len(form)
            yield {"type": "http.request", "body": form[i : i + size], "more_body": more}

    assert ask(messages(4), UPLOAD)[0] == 200
    with pytest.raises(body.MultiPartException, match="Upload one file at once"):
        ask(messages(5), UPLOAD)


def test_an_upload_is_a_form(folder):
    async def upload():
        sent = []

        async def send(message):
            sent.append(message)

        scope = scope_of(UPLOAD) | {"headers": [(b"content-type", b"application/json")]}
        await bounded(folder, None)(scope, None, send)
        return sent

    start, answer = asyncio.run(upload())
    assert (start["status"], answer["body"]) == (400, b"An upload is a form with a file.")


def test_too_slow_an_upload_is_stopped(folder, monkeypatch):
    monkeypatch.setattr(body, "UPLOAD_S", 0.05)

    async def upload():
        async def app(scope, receive, send):
            await receive()

        await bounded(folder, app)(scope_of(UPLOAD), asyncio.Event().wait, None)

    with pytest.raises(body.MultiPartException, match=r"The upload took longer than 0\.05 s"):
        asyncio.run(upload())


def test_too_many_uploads_at_once_are_refused(folder):
    """Two of one visitor, four of all; and their places are free again afterwards."""
    go_on, statuses = asyncio.Event(), []

    async def app(scope, receive, send):
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def upload_all():
        served = bounded(folder, app)
        tasks = [
            asyncio.create_task(served(scope_of(UPLOAD, client=f"192.0.2.{last}"), None, send))
            for last in (1, 1, 1, 2, 2, 3)
        ]
        while sum(task.done() for task in tasks) < 2:
            await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [False, False, True, False, False, True]
        go_on.set()
        await asyncio.gather(*tasks)
        await served(scope_of(UPLOAD), None, send)

    asyncio.run(upload_all())
    assert statuses == [429, 429, 200, 200, 200, 200, 200]


def test_an_upload_makes_room_for_itself(ask, folder):
    """2 MB in all, so 1 MB besides a file of 1 MB."""
    for name, age_s in (("old", 20), ("new", 10)):
        (folder / name).write_bytes(bytes(600_000))
        os.utime(folder / name, (time.time() - age_s,) * 2)
    last = {"type": "http.request", "body": b"", "more_body": False}
    assert ask([last], UPLOAD)[0] == 200
    assert [path.name for path in folder.iterdir()] == ["new"]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/deep_link",
        "/demo/gradio_api/deep_link",
        "/gradio_api/deep_link/",
        "/gradio_api/process_recording",
        "/gradio_api/component_server",
        "/monitoring",
        "/monitoring/summary",
    ],
)
def test_what_is_closed(ask, path):
    assert ask([], path, root_path="/demo") == (403, b"", 0)


def test_long_addresses_are_refused(ask):
    """Gradio keeps the names of sessions and of uploads, which may stand there."""
    whole = [{"type": "http.request", "body": b"", "more_body": False}]
    assert ask(whole, "/" + "x" * 999, query=b"x" * 1000)[0] == 200
    assert ask([], "/" + "x" * 1000, query=b"x" * 1000) == (414, b"", 0)
    assert ask([], UPLOAD, query=b"upload_id=" + b"x" * 2000) == (414, b"", 0)
