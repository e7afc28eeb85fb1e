"""The demo as its visitors use it: over its API and many at once."""

import gc
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import safehttpx
from demo_models import LABEL, load_absent_by
from demo_server import OTHER, PROSE, TINY, ask, serving, threads_that_score, wait_for, with_queue
from gradio.utils import get_upload_folder
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from support import ROOT, free_port, random_batch

from demo import handlers, models, queueing, server, service
from demo.conversation import read_conversation
from ppleval import Perplexity


def score(client, text, model=LABEL):
    """The sentence, and what the JSON holds."""
    line, data = client.predict(text, model, api_name="/score")
    return line, json.loads(data)


@pytest.mark.parametrize("text", [PROSE, "naïve 漢字 🎉\nשלום e\u0301", "x", "\x07\x1b \u202e"])
def test_score_gives_the_numbers_of_compute(client, text):
    _, data = score(client, text)
    expected = Perplexity().compute(predictions=[text], model_id=TINY)
    result = data["result"]
    for name in ("perplexity", "mean_nll", "bits_per_byte", "word_perplexity", "num_tokens"):
        found = math.nan if result[name] is None else result[name]
        assert found == pytest.approx(expected[name], rel=1e-6, nan_ok=True)
    assert result["signature"] == expected["signature"].replace(TINY, "tiny_model")
    bits = [token["bits"] for token in data["tokens"] if token["bits"] is not None]
    assert np.mean(bits) == pytest.approx(expected["bits_per_token"], rel=1e-6)


def test_score_under_another_model(client, other_model):
    _, data = score(client, PROSE, OTHER)
    expected = Perplexity().compute(predictions=[PROSE], model_id=str(other_model))
    assert data["result"]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)


@pytest.mark.parametrize("route", ["run", "api"])
@pytest.mark.parametrize("name", ["score", "conversation", "compare", "logits", "example"])
def test_no_way_goes_around_the_queue(url, route, name):
    told = httpx.post(f"{url}gradio_api/{route}/{name}", json={"data": []})
    assert (told.status_code, "join the queue" in told.text) == (404, True)


def test_a_conversation_over_the_api(client, settings):
    pasted = settings.conversation_examples[0].text
    line, data = client.predict(pasted, LABEL, api_name="/conversation")
    data = json.loads(data)
    (expected,) = Perplexity().score(
        [read_conversation(pasted)],
        model_id=TINY,
        chat_template=settings.models[0].chat_template,
    )
    assert line.startswith(f"**Perplexity {expected.perplexity:.1f}**: as uncertain as a choice")
    assert data["result"]["num_bytes"] == expected.sums.num_bytes
    assert len(data["turns"]) == 4
    scored = [i for first, stop in data["turns"] for i in range(first, stop)]
    assert scored == [i for i, nll in enumerate(expected.nll) if not math.isnan(nll)]
    told = message_of(lambda: client.predict("<b>Hi</b>", LABEL, api_name="/conversation"))
    assert "The first line, &#x27;&lt;b&gt;Hi&lt;/b&gt;&#x27;, begins no turn" in told


def test_compare_two_models(client, other_model):
    line, table, pair = client.predict(PROSE, LABEL, "", OTHER, api_name="/compare")
    pair = json.loads(pair)
    expected = Perplexity().compare([PROSE], base_id=TINY, model_id=str(other_model))
    assert f"**Model A, {LABEL}, is less surprised, by " in line
    for name in ("base_bits_per_byte", "bits_per_byte"):
        assert f"<td>{expected[name]:.3f}</td>" in table
    assert (pair["a"]["model"], pair["b"]["model"]) == (LABEL, OTHER)
    count, ln2 = expected["num_tokens"], math.log(2)
    assert sum(pair["kl"]) == pytest.approx(count * expected["mean_kl"] / ln2, rel=1e-4)
    differences = sum(piece["difference"] for piece in pair["pieces"])
    mean = expected["mean_nll"] - expected["base_mean_nll"]
    assert differences == pytest.approx(count * mean / ln2, rel=1e-4)


def test_compare_needs_text_a(client):
    told = message_of(lambda: client.predict(" ", LABEL, PROSE, LABEL, api_name="/compare"))
    assert "There is no text A. Type or paste one." in told


def test_compare_two_texts(client):
    text = f"{PROSE}It is new."
    line, table, pair = client.predict(PROSE, LABEL, text, LABEL, api_name="/compare")
    pair = json.loads(pair)
    assert "surprises its model less" in line
    for name, each in (("a", PROSE), ("b", text)):
        (score,) = Perplexity().score([each], model_id=TINY)
        assert f"<td>{len(score.tokens)}</td>" in table
        bits = [token["bits"] for token in pair[name]["tokens"]]
        assert bits == pytest.approx([nll / math.log(2) for nll in score.nll], rel=1e-4, abs=1e-6)
    only_b = [piece["b"] for piece in pair["pieces"] if piece["a"] is None]
    added = "".join(pair["b"]["tokens"][i]["token"] for piece in only_b for i in range(*piece))
    assert added.strip() == "It is new."


def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return handle_file(str(path))


@pytest.mark.parametrize("shift", [False, True])
def test_logits_give_the_numbers_of_compute(client, tmp_path, shift):
    logits, labels = random_batch()
    labels[0, 2], labels[1, 3] = 3, -100
    weights = np.array([1.0, 0.25, 2.0])
    file = save_npz(tmp_path / "a.npz", logits=logits, labels=labels, sample_weight=weights)
    table, result = client.predict(file, True, "-100, 3", "4", shift, api_name="/logits")
    expected = Perplexity().compute(
        predictions=logits,
        references=labels,
        sample_weight=weights,
        ignore_index=(-100, 3),
        mask_token_id=4,
        shift=shift,
    )
    assert result == expected
    assert f"| perplexity | {expected['perplexity']:.6g} |" in table


def test_the_example_file_can_be_computed(client):
    path = client.predict(api_name="/example")
    _, result = client.predict(handle_file(path), True, "-100", "", False, api_name="/logits")
    with np.load(path) as arrays:
        expected = Perplexity().compute(
            predictions=arrays["logits"],
            references=arrays["labels"],
            sample_weight=arrays["sample_weight"],
        )
    assert result == expected


def test_warnings_of_the_metric_stand_above_the_table(client, tmp_path):
    logits = np.zeros((1, 2, 3))
    file = save_npz(tmp_path / "a.npz", logits=logits, labels=[[-100, -100]])
    table, result = client.predict(file, True, "-100", "", False, api_name="/logits")
    assert table.startswith("⚠ No token was scored")
    assert result["perplexity"] is None
    logits[0, 0, 0] = math.nan
    file = save_npz(tmp_path / "b.npz", logits=logits, labels=[[0, 1]])
    table, _ = client.predict(file, True, "", "", False, api_name="/logits")
    assert table.startswith("⚠ logits[0, 0] holds NaN")


def test_nothing_of_a_visitor_is_kept_or_told(client, settings):
    assert client.config["run_history"] is False
    assert client.config["analytics_enabled"] is False
    assert client.config["max_file_size"] == settings.limits.file_mb * 2**20


@pytest.mark.parametrize("way", ["fetched", "left", "left in one session"])
def test_a_visit_leaves_little_in_memory(settings, outside, monkeypatch, way):
    """The last two results that nobody fetched stay, 1 MB each here; of all others some 10 kB of
    entries in Gradio's tables."""
    large = lambda *_: f"{time.monotonic()}" + "x" * 2**20  # noqa: E731
    monkeypatch.setattr(handlers, "score_data", large)
    monkeypatch.setattr(queueing, "MOST_SESSIONS", 5)
    monkeypatch.setattr(server, "SESSIONS", 2)  # 100 kB each, although they hold nothing
    session = {"session_hash": "one"} if way == "left in one session" else {}

    def visit():
        sent = {"data": ["The list.", LABEL], **session}
        event = asker.post("call/score", json=sent).json()["event_id"]
        if way == "fetched":
            assert "x" * 2**20 in asker.get(f"call/score/{event}").text
        wait_for(lambda: not page._queue.event_ids_to_events)

    def held_after(visits):
        for _ in range(visits):
            visit()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    with (
        serving(with_queue(settings, size=2)) as (page, url),
        httpx.Client(base_url=f"{url}gradio_api") as asker,
    ):
        tracemalloc.start()
        try:
            first = held_after(3)  # more than are kept
            assert held_after(6) - first < 6 * 50_000
            assert len(page._queue.pending_event_ids_session) <= 5
        finally:
            tracemalloc.stop()


def test_a_result_that_waited_too_long_is_told(settings, outside):
    with serving(with_queue(settings, size=2)) as (page, url):
        events = []
        for text in ("One.", "Two.", "Three."):
            body = {"data": [text, LABEL]}
            sent = httpx.post(f"{url}gradio_api/call/score", json=body)
            events.append(sent.json()["event_id"])
            wait_for(lambda: not page._queue.event_ids_to_events)
        answers = [httpx.get(f"{url}gradio_api/call/score/{event}").text for event in events]
    assert "Nobody fetched this result" in answers[0]
    assert ["event: complete" in answer for answer in answers] == [False, True, True]


def test_a_visit_leaves_nothing_on_the_disk(url, upload_folder):
    body = {"data": ["My secret.", LABEL], "session_hash": "mine"}
    event = httpx.post(f"{url}gradio_api/call/score", json=body).json()["event_id"]
    assert "complete" in httpx.get(f"{url}gradio_api/call/score/{event}").text
    assert httpx.get(f"{url}gradio_api/deep_link?session_hash=mine").status_code == 403
    assert not list(Path(upload_folder).rglob("state.json"))


def test_nothing_of_a_visit_is_kept_for_the_session(settings, outside):
    with serving(settings) as (page, url):
        assert "secret" in answer_of(url, "queue", "score", ["My secret.", LABEL])
        (state,) = page.app.state_holder.session_data.values()
    kept = str(list(state.components))
    assert "Return the number" in kept  # of the page, as it was built
    assert "secret" not in kept


def test_each_visitor_has_a_quota(settings, outside, held):
    """Of requests that wait and that run together."""
    running, release = held
    with serving(with_queue(settings, per_address=2, proxies=1)) as (page, url):
        taken = [ask(url, "one"), ask(url, "two")]
        wait_for(lambda: running)
        refused = ask(url, "three")
        taken += [ask(url, "four", "192.0.2.2")]
        release.set()
        for answer in taken:
            event = answer.json()["event_id"]
            assert "complete" in httpx.get(f"{url}gradio_api/call/score/{event}").text
        wait_for(lambda: not page._queue.event_ids_to_events)
        assert ask(url, "five").status_code == 200
        named = ask(url, "six", "192.0.2.3", session_hash="x" * 101)
    assert refused.status_code == 429
    assert "2 requests from your address wait or run already" in refused.json()["detail"]
    assert (named.status_code, named.json()["detail"]) == (
        400,
        "The name of the session is too long.",
    )


@pytest.mark.parametrize("proxies", [None, 1])
def test_who_forges_a_header_gains_nothing(settings, outside, held, proxies):
    """Neither without a proxy, nor by what stands in front of what the proxy wrote."""
    address = (f"192.0.2.{i}" if proxies is None else f"192.0.2.{i}, 192.0.2.9" for i in range(9))
    with serving(with_queue(settings, per_address=1, proxies=proxies)) as (_, url):
        answers = [ask(url, "text", next(address)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]


def function_of(url, name):
    """The number of an endpoint."""
    (number,) = (
        function["id"]
        for function in httpx.get(f"{url}config").json()["dependencies"]
        if function["api_name"] == name
    )
    return number


def leave(url, event):
    """Wait for a result as a page does, and close the connection before it comes."""
    with httpx.stream("GET", f"{url}gradio_api/call/score/{event}", timeout=20) as answer:
        assert answer.status_code == 200


def cancel(url, event, session=None):
    """What Gradio's client does. The session of a request that names none is its own."""
    number = function_of(url, "score")
    body = {"session_hash": session or event, "fn_index": number, "event_id": event}
    assert httpx.post(f"{url}gradio_api/cancel", json=body).status_code == 200


def stop(url, event, session=None):
    """What the button Stop does."""
    number = function_of(url, "stop_mine")
    body = {"session_hash": session or event, "fn_index": number, "data": []}
    assert httpx.post(f"{url}gradio_api/run/predict", json=body).status_code == 200


@pytest.mark.parametrize("end", [stop, cancel, leave])
@pytest.mark.parametrize("state", ["runs", "waits in its thread", "waits in the queue"])
def test_what_nobody_waits_for_is_stopped(settings, outside, held, end, state):
    """At once, and its place is free for others. One text is scored at once; four runs are threads,
    because a model may have to be loaded."""
    running, release = held
    release.set()
    with serving(with_queue(settings)) as (page, url):
        count = {"runs": 1, "waits in its thread": 2, "waits in the queue": 5}[state]
        events = [ask(url, "endless").json()["event_id"] for _ in range(count)]
        wait_for(lambda: running and len(page._queue) == max(0, count - 4))
        wait_for(lambda: threads_that_score() == min(count, 4))
        started = time.monotonic()
        for event in reversed(events):
            end(url, event)
            wait_for(lambda event=event: event not in page._queue.event_ids_to_events)
        assert score(Client(url, verbose=False), "text")[1]["result"]["num_tokens"] > 0
        assert time.monotonic() - started < 10  # endless takes 20 s
        assert running == ["endless", "text"]
        wait_for(lambda: all(job is None for job in page._queue.active_jobs))
        wait_for(lambda: not threads_that_score())


def test_the_endpoints_that_are_told(client):
    """Buttons call others, which are private."""
    told = client.view_api(return_format="dict")["named_endpoints"]
    assert set(told) == {"/score", "/conversation", "/compare", "/logits", "/example"}


def test_nobody_stops_the_run_of_another(settings, outside, held):
    """Not even who knows the number of their request."""
    running, release = held
    with serving(with_queue(settings)) as (page, url):
        mine = ask(url, "mine", session_hash="mine").json()["event_id"]
        wait_for(lambda: running)
        for session in ("theirs", "", "None", "*", mine):
            for end in (stop, cancel):
                end(url, "x", session)
        release.set()
        assert "complete" in httpx.get(f"{url}gradio_api/call/score/{mine}").text
        assert "theirs" not in page._queue.pending_event_ids_session


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_in_order(settings, outside, held, monkeypatch, number):
    """What runs is finished if that is soon, what waits is refused, uploads are deleted."""
    running, release = held
    started, answers, ended = [], {}, []
    launch, before = (
        server.launch,
        {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)},
    )

    def watched_launch(page, settings, folder, **more):
        started.append((launch(page, settings, folder, quiet=True, **more)[1], folder))

    def fetch(text, event):
        answers[text] = httpx.get(f"{started[0][0]}gradio_api/call/score/{event}", timeout=20).text

    def visit():
        wait_for(lambda: started)
        url, folder = started[0]
        httpx.post(f"{url}gradio_api/upload", files=[("files", ("a.npz", b"x"))]).raise_for_status()
        wait_for(lambda: list(folder.rglob("a.npz")))
        with ThreadPoolExecutor(3) as pool:
            for text in ("soon", "endless", "waits"):
                pool.submit(fetch, text, ask(url, text).json()["event_id"])
                wait_for(lambda text=text: text == "waits" or text in running)
            ended.append(time.monotonic())
            os.kill(os.getpid(), number)
            release.set()

    monkeypatch.setattr(server, "launch", watched_launch)
    monkeypatch.setattr(server, "FINISH_S", 1)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # to be set back
    settings = replace(settings, queue=replace(settings.queue, concurrency=2))
    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        server.serve(settings)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert time.monotonic() - ended[0] < 10
    visitor.join(20)
    assert "event: complete" in answers["soon"]
    for text in ("endless", "waits"):
        assert "The demo is being restarted. Try again in a minute." in answers[text]
    assert not started[0][1].exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(started[0][0])


def test_loading_a_model_keeps_nobody_from_scoring(settings, outside, monkeypatch):
    """One text is scored at once, and the model Absent takes longer to load than this test."""
    over = threading.Event()

    def of_absent():
        assert over.wait(60)
        raise ValueError("not there")

    load_absent_by(of_absent, monkeypatch)
    monkeypatch.setattr(models, "PATIENCE_S", 60)  # of the one who waits
    with serving(with_queue(settings), wait=False) as (_, url):
        clients = [Client(url, verbose=False) for _ in range(2)]
        with ThreadPoolExecutor(8) as pool:
            try:
                asked = [
                    pool.submit(message_of, lambda: score(clients[0], "text", "Absent"))
                    for _ in range(6)
                ]
                assert (
                    pool.submit(score, clients[1], "text").result(20)[1]["result"]["num_tokens"] > 0
                )
                wait_for(lambda: sum(one.done() for one in asked) == 5)
            finally:
                over.set()
    told = sorted(one.result() for one in asked)
    assert "Absent cannot be loaded at the moment. Choose another model." in told[0]
    assert told[1:] == ["Absent is being loaded. Try again in a minute."] * 5


def message_of(call) -> str:
    with pytest.raises(AppError) as error:
        call()
    message = str(error.value)
    for part in ("Traceback", str(ROOT), "/tmp", "site-packages"):
        assert part not in message
    return message


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        ("", LABEL, "There is no text"),
        (" \n ", LABEL, "There is no text"),
        ("x" * 20_001, LABEL, "20,001 characters; here at most 20,000"),
        ("漢" * 6_000, LABEL, "For Bundled model the text has 18,001 tokens; here at most"),
        ("text", "Absent", "Absent cannot be loaded at the moment"),
    ],
    ids=["no text", "blank", "too long", "too many tokens", "a model that is not there"],
)
def test_texts_that_are_refused(client, text, model, message):
    assert message in message_of(lambda: score(client, text, model))


@pytest.mark.parametrize("model", ["tiny_model", "../tiny_model", "gpt2", None])
def test_only_listed_models(client, model):
    message_of(lambda: score(client, "text", model))


@pytest.mark.parametrize("text", ["[1, 2]", '{"a": 1}', "NaN", "1e999", "5", "true"])
def test_what_is_no_text_is_not_scored(url, text):
    for name, data in (("score", f'[{text}, "{LABEL}"]'), ("compare", f'["a", "{LABEL}", {text}]')):
        call = f"{url}gradio_api/call/{name}"
        headers = {"Content-Type": "application/json"}
        sent = httpx.post(call, content=f'{{"data": {data}}}', headers=headers)
        event = sent.json()["event_id"]
        told = httpx.get(f"{call}/{event}").text
        assert "must be a text, a string in JSON, got" in told


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "gradio_api/call/score"),
        ("POST", "gradio_api/queue/join"),
        ("POST", "gradio_api/run/score"),
        ("POST", "gradio_api/call/upload"),
        ("POST", "gradio_api/call/v2/upload"),
        ("POST", "gradio_api/run/upload"),
        ("POST", "gradio_api/upload/"),
        ("POST", "/gradio_api/upload"),
        ("POST", "gradio_api/%75pload/"),
        ("POST", "gradio_api/upload%2f"),
        ("POST", "upload"),
        ("POST", "nowhere/gradio_api/upload"),
        ("PUT", "gradio_api/upload"),
        ("GET", "gradio_api/upload"),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_request_is_not_read(url, method, path, chunked):
    """10 MB of JSON that no endpoint takes, which Gradio would look at for seconds."""
    body = b'{"data": {"a": [' + b"0," * 5_000_000 + b"0]}}"
    sent = (body[i : i + 2**20] for i in range(0, len(body), 2**20)) if chunked else body
    headers = {"Content-Type": "application/json"}
    answer = httpx.request(method, url + path, content=sent, headers=headers)
    assert answer.status_code == 413


def uploads():
    """The files that uploads left on the disk."""
    return {file for file in Path(get_upload_folder()).rglob("*") if file.is_file()}


@pytest.mark.parametrize("part", [("files", ("a.npz", bytes(600_000))), ("field", "x" * 600_000)])
def test_many_parts_are_one_upload(settings, outside, part):
    """Gradio bounds each file, but neither their number nor the fields, which it keeps."""
    small = replace(settings, limits=replace(settings.limits, file_mb=1))
    before = uploads()
    name, content = part
    with serving(small) as (_, url):
        for count, status in ((1, 200), (2, 413)):
            parts = [(name, content if name == "files" else (None, content))] * count
            answer = httpx.post(f"{url}gradio_api/upload", files=parts)
            assert answer.status_code == status
    assert len(uploads() - before) <= 1  # the one that was answered with 200


def test_an_upload_that_breaks_off_leaves_no_file(url):
    before = uploads()
    address = url.removeprefix("http://").rstrip("/").split(":")
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.npz"\r\n\r\n'
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + part + bytes(300_000)
        )
        wait_for(lambda: uploads() - before)
    wait_for(lambda: not uploads() - before)


def test_the_longest_text_that_is_allowed_gets_through(client):
    text = ("\N{PARTY POPPER} word " * 3000)[:20_000]
    assert "characters" not in message_of(lambda: score(client, text))


@pytest.mark.parametrize("model", [None, 5, ["x"], {"a": 1}])
def test_calls_of_the_wrong_kind(url, model):
    """A sentence comes back, or that the call is none; never a trace."""
    answer = httpx.post(f"{url}gradio_api/call/score", json={"data": ["text", model]})
    event = answer.json()["event_id"]
    told = httpx.get(f"{url}gradio_api/call/score/{event}").text
    assert "error" in told
    assert "Traceback" not in told
    assert str(ROOT) not in told


def test_files_that_are_refused(client, tmp_path):
    labels = np.zeros((1, 2), dtype=np.int64)

    def refused(file, ignore="-100", mask=""):
        call = lambda: client.predict(file, True, ignore, mask, False, api_name="/logits")  # noqa: E731
        return message_of(call)

    pickled = save_npz(tmp_path / "a.npz", logits=np.array([{}]), labels=labels)
    assert "logits holds pickled Python objects" in refused(pickled)

    beyond = save_npz(tmp_path / "b.npz", logits=np.zeros((1, 2, 3)), labels=labels + 3)
    assert "labels[0, 0] is 3, outside the vocabulary" in refused(beyond)

    markup = save_npz(tmp_path / "m.npz", **{"<img src='http://other.example/x'>": labels})
    assert "it holds &lt;img src=" in refused(markup)

    shapes = save_npz(tmp_path / "c.npz", logits=np.zeros((1, 2, 3)), labels=labels[:, :1])
    assert "logits must have the shape (B, T, V) and labels (B, T), got" in refused(shapes)

    bomb = tmp_path / "d.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("logits.npy", "w", force_zip64=True) as file:
            for _ in range(30):
                file.write(bytes(10**7))
        archive.writestr("labels.npy", b"")
    assert "take 300 MB; here at most 256 MB" in refused(handle_file(str(bomb)))

    liar = tmp_path / "e.safetensors"
    header = json.dumps(
        {"logits": {"dtype": "F32", "shape": [9, 9, 9], "data_offsets": [0, 10**9]}}
    )
    liar.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(100))
    assert "its header does not fit its data" in refused(handle_file(str(liar)))

    good = save_npz(tmp_path / "f.npz", logits=np.zeros((1, 2, 3)), labels=labels)
    wrong = "ignore_index must be a whole number, got &#x27;x&#x27;"
    assert wrong in refused(good, ignore="-100, x")
    assert "mask_token_id must be a whole number, got &#x27;1.5&#x27;" in refused(good, mask="1.5")
    assert "ignore_index takes at most 16 ids" in refused(good, ignore="1," * 16)
    assert len(refused(good, ignore="<b>" * 5000)) < 500
    assert "There is no file" in refused(None)


@pytest.fixture
def elsewhere(monkeypatch):
    """A web server that stands for one with a public address; it notes what it is asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/big.npz")
            else:
                self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()

    async def public(hostname):
        return "127.0.0.1"

    monkeypatch.setattr(safehttpx, "async_validate_url", public)  # Gradio refuses private ones
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def file_data(path, **more):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


REST = [True, "-100", "", False]  # of what /logits takes, behind its file


def answer_of(url, route, name, data):
    """What one of Gradio's ways to an endpoint answers."""
    body = {"data": data}
    if route == "call/v2":
        names = ["file", "from_logits", "ignore_index", "mask_token_id", "shift"]
        body = dict(zip(names, data, strict=True))
    if route != "queue":
        event = httpx.post(f"{url}gradio_api/{route}/{name}", json=body).json()["event_id"]
        return httpx.get(f"{url}gradio_api/{route}/{name}/{event}").text
    functions = httpx.get(f"{url}config").json()["dependencies"]
    (number,) = (f["id"] for f in functions if f["api_name"] == name)
    body |= {"fn_index": number, "session_hash": "elsewhere"}
    httpx.post(f"{url}gradio_api/queue/join", json=body)
    return httpx.get(f"{url}gradio_api/queue/data?session_hash=elsewhere").text


@pytest.mark.parametrize("route", ["call", "call/v2", "queue"])
def test_a_file_from_elsewhere_is_not_fetched(url, elsewhere, route):
    address, asked = elsewhere
    told = answer_of(url, route, "logits", [file_data(f"{address}/{route}.npz"), *REST])
    assert "Upload the file here" in told
    assert asked == []


def test_no_field_fetches_a_file(url, elsewhere):
    """Gradio looks for files in all of them, however deep."""
    address, asked = elsewhere
    files = [
        file_data(f"{address}/moved"),
        file_data(f"{address}/stream", is_stream=True),
        [{"a": file_data(f"{address}/deep")}],
    ]
    for file in files:
        for data in ([file, LABEL], ["text", file]):
            assert "Upload the file here" in answer_of(url, "call", "score", data)
    assert asked == []


def test_the_page_is_no_proxy(url, elsewhere):
    address, asked = elsewhere
    encoded = address.replace(":", "%3A", 1)
    for path in (f"{address}/big.npz", encoded, address.replace("http:", "https:")):
        for route in ("file=", "file/"):
            assert httpx.get(f"{url}gradio_api/{route}{path}").status_code == 403
            assert httpx.head(f"{url}gradio_api/{route}{path}").status_code == 403
    assert asked == []


def test_a_file_of_the_machine_is_not_read(client, url, tmp_path, upload_folder):
    secret = tmp_path / "secret.npz"
    np.savez(secret, logits=np.zeros((1, 2, 3)), labels=[[0, 1]])
    link = Path(upload_folder) / "link.npz"
    link.symlink_to(secret)
    for path in (secret, f"file://{secret}", f"{upload_folder}/../{secret.name}", link):
        told = answer_of(url, "call", "logits", [file_data(str(path)), *REST])
        assert "Upload the file here" in told
    uploaded = client.predict(handle_file(str(secret)), *REST, api_name="/logits")[1]
    assert uploaded["num_tokens"] == 2


def test_too_large_an_upload_is_refused(settings, tmp_path, outside):
    small = replace(settings, limits=replace(settings.limits, file_mb=1))
    with serving(small) as (_, url):
        path = tmp_path / "a.npz"
        path.write_bytes(bytes(1_500_000))
        client = Client(url, verbose=False)
        with pytest.raises(Exception, match="(?i)413|exceed|too large|maximum"):
            client.predict(handle_file(str(path)), True, "-100", "", False, api_name="/logits")


def test_what_takes_too_long_is_stopped(settings, outside, monkeypatch):
    clock = iter(range(0, 10**6, 1000))
    with serving(settings) as (_, url):
        monkeypatch.setattr(service, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        message = message_of(lambda: score(Client(url, verbose=False), PROSE))
    assert "This took longer than 60 s" in message


def test_twenty_visitors_at_once(client, url):
    texts = [f"Visitor {i} returns the number of items in list {i}. " * (1 + i) for i in range(20)]
    alone = [score(client, text)[1]["result"] for text in texts]
    clients = [Client(url, verbose=False) for _ in texts]
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda pair: score(*pair)[1], zip(clients, texts, strict=True)))
    for text, answer, expected in zip(texts, answers, alone, strict=True):
        found = answer["result"]
        assert answer["text"] == text
        assert found["signature"] == expected["signature"]
        for name in ("perplexity", "bits_per_byte", "num_tokens"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6)


def test_a_full_queue_is_told(settings, outside):
    def visit(client):
        try:
            return score(client, PROSE * 20)[1]["result"]["num_tokens"]
        except Exception as error:
            return str(error)

    with serving(with_queue(settings, size=2)) as (_, url):
        clients = [Client(url, verbose=False) for _ in range(20)]
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(visit, clients))
    told = [answer for answer in answers if isinstance(answer, str)]
    answered = {answer for answer in answers if not isinstance(answer, str)}
    assert len(answered) == 1  # the same for each
    assert told
    assert all("queue is full" in message.lower() for message in told), told


def test_the_program_answers():
    """On the port that Gradio's own variable names, its default being 7860."""
    port = free_port()
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, ROOT / "app.py"], env=environment, cwd="/")
    try:
        deadline = time.monotonic() + 90
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        config = Client(f"http://127.0.0.1:{port}", verbose=False).config
        assert config["title"] == "Perplexity"
        assert config["analytics_enabled"] is False
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_the_server_asked_no_other_host(client, outside):
    """In all tests of this file before this one."""
    assert outside == []
