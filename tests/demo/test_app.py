"""The demo as its visitors use it: over its API, many at once, and in a browser."""

import base64
import contextlib
import csv
import gc
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import gradio
import httpx
import numpy as np
import pytest
import safehttpx
import torch
from demo_models import ABSENT, LABEL, load_absent_by, loaded, settings_with
from gradio.utils import get_upload_folder
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from support import ROOT, free_port, random_batch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from demo import handlers, models, queueing, server, service, views
from demo.conversation import read_conversation
from demo.page import make_page
from demo.pair_data import pair_data
from demo.score_view import ADDRESS
from demo.settings import Model
from ppleval import Perplexity
from ppleval.show import heatmap

TINY = str(ROOT / "tiny_model")
OTHER = "Other"
PROSE = "Return the number of items in the list. If the list is empty, the result is zero. " * 4


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A second model: GPT-2, random, with the bundled tokenizer."""
    directory = tmp_path_factory.mktemp("other")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def settings(other_model):
    return settings_with(Model(OTHER, str(other_model), None, None, None, "random", None), ABSENT)


@pytest.fixture(scope="module", autouse=True)
def upload_folder(tmp_path_factory):
    """A folder for uploads that no other server on this machine writes to."""
    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("gradio"))
        patch.setenv("GRADIO_TEMP_DIR", directory)
        yield directory


@pytest.fixture(scope="module")
def outside():
    """Every address outside this machine that this process asked for."""
    asked, patch = [], pytest.MonkeyPatch()
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def watched_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "localhost",
            "::1",
        ):
            asked.append(address)
            raise OSError("no network in tests")
        return connect(self, address)

    def watched_resolve(host, *args, **kwargs):
        if host not in ("127.0.0.1", "localhost", None):
            asked.append(host)
            raise socket.gaierror("no network in tests")
        return resolve(host, *args, **kwargs)

    patch.setattr(socket.socket, "connect", watched_connect)
    patch.setattr(socket, "getaddrinfo", watched_resolve)
    yield asked
    patch.undo()


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


@pytest.fixture(scope="module")
def url(settings, outside):
    with serving(settings) as (_, url):
        yield url


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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


@pytest.fixture
def held(monkeypatch, settings):
    """Scores that run until they are released; those of `endless` until they are stopped. The
    example with which a page opens is scored at once."""
    running, release = [], threading.Event()

    def score_of(scorer, text, progress):
        if text == settings.examples[0].text:
            return real(scorer, text, progress)
        running.append(text)
        deadline = time.monotonic() + 20  # where nothing stops it
        while (text == "endless" and time.monotonic() < deadline) or not release.is_set():
            progress(1, 2)
            time.sleep(0.01)
        return real(scorer, text, progress)

    real = service._score_of
    monkeypatch.setattr(service, "_score_of", score_of)
    yield running, release
    release.set()


def ask(url, text, address="192.0.2.1", **more):
    """Send a text to be scored, as a proxy would."""
    headers = {"X-Forwarded-For": f"198.51.100.1, {address}"}
    body = {"data": [text, LABEL], **more}
    return httpx.post(f"{url}gradio_api/call/score", json=body, headers=headers)


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


def threads_that_score():
    """How many work for `Metrics.score`, or wait there."""
    stacks = (traceback.extract_stack(frame) for frame in sys._current_frames().values())
    return sum(
        any((line.filename, line.name) == (service.__file__, "score") for line in stack)
        for stack in stacks
    )


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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def profile(browser):
    """One for all pages, so that Gradio's files are fetched once."""
    return browser.new_context(viewport={"width": 1200, "height": 900})


@pytest.fixture
def page(profile, url):
    """A page that sends no request elsewhere, and logs no error."""
    page = profile.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(error.stack))
    page.goto(url)
    yield page
    page.close()
    assert [r for r in requests if not r.startswith((url, "data:", "blob:"))] == []
    assert errors == []


def press(page, name):
    page.get_by_role("button", name=name).click()


def violations(page):
    """What axe-core finds on the page: WCAG and its best practices."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    return [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]


def choose_example(page, example):
    """Gradio asks the server for the text."""
    press(page, example.label)
    typed = "text => [...document.querySelectorAll('textarea')].some(box => box.value === text)"
    page.wait_for_function(typed, arg=example.text)


def score_text(page, text):
    """Type a text, score it, and wait for its heatmap; another was there before."""
    page.get_by_label("Text", exact=True).fill(text)
    press(page, "Score")
    tokens = page.locator(".surprisal .text").filter(has_text=text).locator("b")
    tokens.first.wait_for()
    return tokens


def test_models_that_cannot_be_used_are_not_offered(page, settings):
    page.get_by_text("Not available at the moment: Absent.").first.wait_for()
    page.get_by_label("Model", exact=True).first.click()
    names = page.get_by_role("listbox").get_by_role("option").all_inner_texts()
    assert [name.strip(" ✓\n") for name in names] == [
        f"{model.label}: {model.description}" for model in settings.models[:2]
    ]


def test_type_score_and_hover(page):
    tokens = score_text(page, PROSE)
    result = Perplexity().compute(predictions=[PROSE], model_id=TINY)
    assert tokens.count() == result["num_tokens"]
    assert f"Perplexity {result['perplexity']:.1f}" in page.locator(".verdict").first.inner_text()
    tip = "(token) => getComputedStyle(token, '::after').content"
    assert tokens.nth(3).evaluate(tip) == "none"  # nothing pops up unasked
    tokens.nth(3).hover()
    assert "bits" in tokens.nth(3).evaluate(tip)
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate(FOCUSED)


def test_words_in_place_of_tokens(page):
    tokens = score_text(page, PROSE)
    assert tokens.count() > len(PROSE.split())
    page.get_by_label("of each", exact=True).select_option("word")
    shown = page.locator(".surprisal .text").text_content()
    words = page.locator(".surprisal .text b")
    assert (shown, words.count()) == (PROSE, len(PROSE.split()))
    (expected,) = Perplexity().score([PROSE], model_id=TINY, corrected=True)
    words.nth(3).click()
    told = page.get_by_label("One word", exact=True).inner_text()
    word = expected.words[3]
    assert f"“ {word.text}” {word.nll / math.log(2):.2f} bits" in told
    assert f"corrected for where words end: {word.corrected_nll / math.log(2):.2f} bits" in told


TOASTS = "[data-testid=toast-body]"
RESULTS = ".surprisal:visible, .statistics:visible"


def ask_on(page, tab, text):
    """Ask for a score on a tab, whose button is returned with that to stop it."""
    page.get_by_role("tab", name=tab).click()
    label, action = {
        "Text": ("Text", "Score"),
        "Conversation": ("Conversation", "Score"),
        "Compare": ("Text A", "Compare"),
    }[tab]
    page.get_by_role("textbox", name=label, exact=True).fill(text)
    if tab == "Compare":  # two texts: one after the other
        page.get_by_label("Text B").fill("Another text.")
    button = page.get_by_role("button", name=action, exact=True)
    button.click()
    return button, page.get_by_role("button", name="Stop", exact=True)


@pytest.mark.parametrize("tab", ["Text", "Conversation", "Compare"])
def test_stop_in_the_browser(page, held, tab):
    """By the keyboard: no error, no old result, and the next score at once."""
    running, release = held
    page.locator(".chart .line").first.wait_for()
    assert page.get_by_role("button", name="Stop", exact=True).is_disabled()
    text = "User: Go on.\nAssistant: endless" if tab == "Conversation" else "endless"
    button, stop = ask_on(page, tab, text)
    wait_for(lambda: running and stop.is_enabled())
    page.wait_for_timeout(500)  # until Gradio's progress has faded in
    assert violations(page) == []
    stop.press("Enter")
    told = page.get_by_role("status").filter(has_text="Stopped. Nothing was scored.")
    told.wait_for()
    wait_for(lambda: threads_that_score() == 0 and stop.is_disabled())
    assert button.evaluate(FOCUSED)
    assert page.locator(f"{RESULTS}, {TOASTS}").count() == 0
    assert page.locator("[data-testid=status-tracker]:not(.hide):visible").count() == 0
    assert violations(page) == []
    release.set()
    ask_on(page, tab, "User: Name it.\nAssistant: A list.")
    page.locator(".surprisal:visible b").first.wait_for()
    assert (told.count(), stop.is_disabled()) == (0, True)


def test_a_request_that_waits_is_stopped(browser, settings, outside, held):
    running, release = held
    with serving(with_queue(settings)) as (demo, url):
        page = browser.new_page()
        page.goto(url)
        events = [ask(url, text).json()["event_id"] for text in "abcd"]
        wait_for(lambda: threads_that_score() == 4)
        _, stop = ask_on(page, "Text", "mine")
        wait_for(lambda: len(demo._queue) == 1)
        stop.click()
        page.get_by_text("Stopped. Nothing was scored.").wait_for()
        wait_for(lambda: len(demo._queue) == 0 and stop.is_disabled())
        assert page.locator(TOASTS).count() == 0
        release.set()
        for event in events:
            assert "complete" in httpx.get(f"{url}gradio_api/call/score/{event}").text
        page.close()
    assert "mine" not in running


def test_stop_before_the_server_has_the_request(page, held):
    """On a slow line: it is stopped as soon as it is there."""
    wait_for(lambda: page.locator(".chart .line").count())
    page.route("**/queue/join*", lambda route: time.sleep(1) or route.continue_())
    _, stop = ask_on(page, "Text", "endless")
    stop.click()
    page.get_by_text("Stopped. Nothing was scored.").wait_for()
    wait_for(lambda: threads_that_score() == 0 and stop.is_disabled())
    assert page.locator(f"{RESULTS}, {TOASTS}").count() == 0


def test_pressing_twice_asks_once(page, held):
    page.locator(".chart .line").first.wait_for()
    before = page.evaluate("history.length")
    page.get_by_label("Text", exact=True).fill("endless")
    page.get_by_role("button", name="Score").dblclick()
    page.keyboard.press("Control+Enter")
    wait_for(lambda: held[0])
    stop = page.get_by_role("button", name="Stop", exact=True)
    assert stop.is_enabled()
    stop.click()
    page.get_by_text("Stopped. Nothing was scored.").wait_for()
    wait_for(lambda: threads_that_score() == 0)
    assert held[0] == ["endless"]
    assert page.evaluate("history.length") == before + 1


def test_an_error_makes_the_button_ready(page):
    page.locator(".chart .line").first.wait_for()
    _, stop = ask_on(page, "Text", "word " * 5000)
    page.get_by_text("25,000 characters; here at most 20,000").wait_for()
    wait_for(stop.is_disabled)
    score_text(page, "Another text.")


def test_who_closes_the_page_frees_the_place(browser, url, held):
    page = browser.new_page()
    page.goto(url)
    ask_on(page, "Text", "endless")
    wait_for(lambda: held[0])
    page.close()
    wait_for(lambda: threads_that_score() == 0)


def link_of(url, tab, values):
    """A link as any program can make it."""
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(values if isinstance(values, bytes) else json.dumps(values).encode())
    return f"{url}#{tab}={base64.urlsafe_b64encode(packed + packer.flush()).decode().rstrip('=')}"


CROWD = "".join(chr(0x4E00 + i * 37 % 20_000) for i in range(1_900))  # hardly compressible
MARKUP = "</textarea><img src=x onerror=alert(1)><script>alert(2)</script> \u202e"


@pytest.mark.parametrize(
    "text",
    [f"The list.\n\n  Its items.\t{MARKUP} naïve 漢字 🎉 e\u0301 \x07", CROWD, PROSE[:80] * 250],
    ids=["all kinds", "many letters", "20,000 characters"],
)
def test_the_address_restores_a_text(page, browser, text):
    """What one browser scored, another one shows."""
    ask_on(page, "Text", text)
    page.locator(".surprisal b").first.wait_for()
    page.wait_for_function("location.hash.startsWith('#text=')")
    other = browser.new_page()
    asked, dialogs = [], []
    other.on("request", lambda request: asked.append(request))
    other.on("dialog", lambda dialog: dialogs.append(dialog) or dialog.dismiss())
    other.goto(page.url)
    other.locator(".surprisal b").first.wait_for()
    assert other.get_by_label("Text", exact=True).input_value() == text
    shown = [p.locator(".verdict").first.inner_text() for p in (page, other)]
    assert shown[0] == shown[1]
    assert other.locator(".notice").inner_text() == ""
    assert (other.url, dialogs) == (page.url, [])
    fragment = page.url.partition("#")[2]
    sent = [f"{r.url} {r.post_data} {r.all_headers()}" for r in asked]
    assert any("/queue/join" in request for request in sent)
    assert [request for request in sent if fragment[:40] in request.partition("#")[0]] == []
    other.close()


def test_half_a_character_in_an_address(page):
    """A lone surrogate is told, as without an address, and restored."""
    page.locator(".chart .line").first.wait_for()
    set_text = """box => { box.value = "a" + String.fromCharCode(0xD800);
      box.dispatchEvent(new Event("input", { bubbles: true })); }"""
    page.get_by_label("Text", exact=True).evaluate(set_text)
    press(page, "Score")
    page.get_by_text("half a character").first.wait_for()
    page.reload()
    page.get_by_text("half a character").first.wait_for()
    code = "box => [box.value.length, box.value.charCodeAt(1)]"
    assert page.get_by_label("Text", exact=True).evaluate(code) == [2, 0xD800]


def test_an_address_restores_each_tab(page, url, settings):
    talk = settings.conversation_examples[0].text
    page.goto(link_of(url, "conversation", {"conversation": talk, "model": LABEL}))
    page.locator(".surprisal:visible b.unscored").first.wait_for()
    assert page.get_by_role("tab", name="Conversation").get_attribute("aria-selected") == "true"
    assert page.get_by_role("textbox", name="Conversation").input_value() == talk
    page.get_by_role("tab", name="Text").click()  # where the page is as it opens
    page.locator(".surprisal:visible b").first.wait_for()
    values = {"text_a": "The list.", "model_a": LABEL, "text_b": "", "model_b": OTHER}
    page.goto(link_of(f"{url}?__theme=dark", "compare", values))
    page.get_by_text("is less surprised, by").wait_for()
    assert page.get_by_label("Model B").input_value() == f"{OTHER}: random"
    page.goto(f"{url}?__theme=light#logits")
    page.get_by_role("button", name="Compute").wait_for()
    assert page.locator(".notice").inner_text() == ""


def test_back_and_forward(page, url):
    """From text to text, from tab to tab, and from another site."""
    page.locator(".surprisal b").first.wait_for()
    example = page.get_by_label("Text", exact=True).input_value()
    score_text(page, "First text.")
    score_text(page, "Second text.")
    ask_on(page, "Compare", "Third text.")
    page.get_by_text("surprises its model less").wait_for()
    page.get_by_role("tab", name="Logits").click()
    press(page, "Compute")
    page.get_by_text("There is no file").first.wait_for()
    page.wait_for_function("location.hash === '#logits'")

    def check(text):
        page.locator(".surprisal:visible div").filter(has_text=text).first.wait_for()
        label = "Text A" if text == "Third text." else "Text"
        assert page.get_by_label(label, exact=True).input_value() == text

    page.goto("about:blank")
    page.go_back()
    page.get_by_role("button", name="Compute").wait_for()
    for text in ("Third text.", "Second text.", "First text.", example):
        page.go_back()
        check(text)
    assert page.url == url
    for text in ("First text.", "Second text."):
        page.go_forward()
        check(text)
    page.goto("about:blank")
    page.go_back()
    check("Second text.")
    page.reload()
    check("Second text.")
    length = page.evaluate("history.length")
    press(page, "Score")  # the same again is no new entry
    check("Second text.")
    assert page.evaluate("history.length") == length


def test_back_stops_what_runs(page, held):
    running, release = held
    page.locator(".surprisal b").first.wait_for()
    example = page.get_by_label("Text", exact=True).input_value()
    ask_on(page, "Text", "endless")
    wait_for(lambda: running)
    release.set()
    page.go_back()
    page.locator(".surprisal div").filter(has_text=example).wait_for()
    wait_for(lambda: threads_that_score() == 0)
    assert page.locator(TOASTS).count() == 0


UNREADABLE = "The link could not be read, so it changed nothing here."
UNLISTED = "The link asks for a model that is not on the list. Choose one, and press the button."


@pytest.mark.parametrize(
    "fragment",
    ["#top", "#/a/b", "#text", "#text=", "#text=AAAA", "#text=%3Cb%3E", "#text=<b>", "#constructor",
     "#__proto__=AAAA", "#" + "x" * 10_000, "#text=" + "A" * 600_000],
    ids=lambda fragment: fragment[:20],
)  # fmt: skip
def test_an_address_of_something_else(page, url, settings, fragment):
    page.goto("about:blank")
    page.goto(url + fragment)
    page.get_by_role("status").filter(has_text=UNREADABLE).wait_for()
    page.locator(".surprisal b").first.wait_for()
    assert page.get_by_label("Text", exact=True).input_value() == settings.examples[0].text
    page.evaluate("location.hash = ''")
    page.locator(".notice:empty").wait_for(state="attached")


@pytest.mark.parametrize(
    "values",
    [[], None, "text", {"text": "a"}, {"text": ["a"], "model": LABEL}, {"text": "a", "model": 1},
     b'{"text": "\xff", "model": "x"}', b"{" + b" " * 10**8],
    ids=lambda values: str(values)[:20],
)  # fmt: skip
def test_an_address_with_other_values(page, url, settings, values):
    """The last one becomes 100 MB."""
    page.goto("about:blank")
    page.goto(link_of(url, "text", values))
    page.get_by_role("status").filter(has_text=UNREADABLE).wait_for()
    assert page.get_by_label("Text", exact=True).input_value() == settings.examples[0].text
    assert violations(page) == []


def test_an_address_with_a_model_that_is_not_listed(page, url):
    """The text is there, and nothing is scored under another model."""
    dialogs = []
    page.on("dialog", lambda dialog: dialogs.append(dialog) or dialog.dismiss())
    page.goto("about:blank")
    page.goto(link_of(url, "text", {"text": MARKUP, "model": MARKUP}))
    page.get_by_role("status").filter(has_text=UNLISTED).wait_for()
    assert page.get_by_label("Text", exact=True).input_value() == MARKUP
    choice = page.get_by_label("Model", exact=True).first
    assert choice.input_value() == f"{LABEL}: 2.4M parameters, Python documentation"
    assert page.locator(".surprisal b").count() == 0
    assert page.locator(".gradio-container img, .gradio-container script").count() == 0
    press(page, "Score")
    page.locator(".surprisal b").first.wait_for()
    assert page.locator(".notice").inner_text() == ""
    assert dialogs == []


@pytest.mark.parametrize("is_allowed", [True, False])
def test_copy_link(browser, url, is_allowed):
    """By the keyboard; where a browser keeps the clipboard to itself, the address has the link."""
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    if is_allowed:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
    else:
        page.add_init_script("navigator.clipboard.writeText = () => Promise.reject()")
    page.goto(f"{url}?__theme=light")
    page.locator(".surprisal b").first.wait_for()
    page.get_by_label("Text", exact=True).fill("A text to pass on.")
    button = page.locator("#text-copy")
    widths = [button.bounding_box()["width"]]
    button.press("Enter")
    told = "Link copied" if is_allowed else "In the address"
    page.get_by_role("status").filter(has_text=told).wait_for()
    page.locator("#text-copy", has_text=told).wait_for()
    widths.append(button.bounding_box()["width"])
    assert violations(page) == []
    link = page.evaluate("navigator.clipboard.readText()") if is_allowed else page.url
    page.locator("#text-copy", has_text="Copy link").wait_for()
    assert widths[0] == widths[1]
    assert link.startswith(f"{url}?__theme=light#text=")
    page.goto("about:blank")
    page.goto(link)
    page.locator(".surprisal div", has_text="A text to pass on.").wait_for()
    context.close()


def test_a_link_in_a_narrow_window(browser, url):
    """As one that is magnified: Gradio has the last tabs in a menu there."""
    page = browser.new_page(viewport={"width": 320, "height": 700})
    page.set_default_timeout(10000)
    values = {"text_a": "The list.", "model_a": LABEL, "text_b": "A list.", "model_b": LABEL}
    page.goto(link_of(url, "compare", values))
    page.locator(".pair b").first.wait_for()
    for button in page.locator(".asking:visible button").all():
        box = button.bounding_box()
        assert box["x"] + box["width"] <= 320
    page.close()


SHIFTS = """new PerformanceObserver((list) => {
  for (const { value } of list.getEntries()) window.shifted = (window.shifted ?? 0) + value;
}).observe({ type: "layout-shift", buffered: true })"""


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_jumps(browser, url, width):
    """Neither while the page opens nor when another text is scored: a cumulative layout shift below
    0.05, where web.dev calls 0.1 good."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.add_init_script(SHIFTS)
    page.goto(url)
    page.locator(".chart path:visible").first.wait_for()
    score_text(page, PROSE * 10)
    page.wait_for_timeout(500)
    assert page.evaluate("window.shifted ?? 0") < 0.05
    page.close()


@pytest.mark.parametrize(("width", "fragment"), [(390, "#foreign"), (1280, "")])
def test_nothing_jumps_for_a_link_or_a_stop(browser, url, held, width, fragment):
    """On a phone once the page is there: Gradio draws its parts one after the other."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.add_init_script(SHIFTS)
    link = link_of(url, "text", {"text": "The list.", "model": LABEL})
    page.goto(url + fragment if fragment else link)
    stop = page.get_by_role("button", name="Stop", exact=True)
    if fragment:
        page.locator(".surprisal b").first.wait_for()
    else:
        wait_for(stop.is_enabled)
        stop.click()
        page.get_by_text("Stopped. Nothing was scored.").wait_for()
    if width == 390:
        page.evaluate("window.shifted = 0")
    ask_on(page, "Text", "endless")
    wait_for(lambda: "endless" in held[0])
    stop.click()
    page.get_by_text("Stopped. Nothing was scored.").wait_for()
    page.locator("#text-copy").click()
    page.wait_for_timeout(2500)  # until that button has its name again
    assert page.evaluate("window.shifted ?? 0") < 0.05
    page.close()


def test_no_old_result_beside_a_new_text(page, held):
    """Neither while that is scored nor after an error; and the progress stands in one place."""
    results = page.locator(".surprisal:visible, .verdict p:visible")
    page.locator(".surprisal:visible").first.wait_for()
    assert results.count() == 3
    page.get_by_label("Text", exact=True).fill(PROSE)
    press(page, "Score")
    page.get_by_text("1 of 2 tokens").wait_for()
    assert page.locator("[data-testid=status-tracker]:not(.hide):visible").count() == 1
    assert results.count() == 0
    held[1].set()
    page.locator(".surprisal:visible").wait_for()
    page.get_by_label("Text", exact=True).fill("word " * 5000)
    press(page, "Score")
    page.get_by_text("25,000 characters; here at most 20,000").wait_for()
    assert results.count() == 0


def test_the_heatmap_on_paper_and_in_forced_colours(page):
    tokens = score_text(page, PROSE * 10)
    ground = "(token) => getComputedStyle(token).backgroundColor"
    grounds = [tokens.nth(i).evaluate(ground) for i in range(3)]
    assert len(set(grounds)) == 3
    box = page.locator(".surprisal .text")
    is_whole = "(box) => box.scrollHeight === box.clientHeight"
    assert not box.evaluate(is_whole)
    page.emulate_media(media="print")
    assert box.evaluate(is_whole)
    assert tokens.first.evaluate("(token) => getComputedStyle(token).printColorAdjust") == "exact"
    assert page.locator("textarea:visible, .surprisal b:visible").count() == tokens.count()
    page.emulate_media(media="screen", forced_colors="active")
    assert [tokens.nth(i).evaluate(ground) for i in range(3)] == grounds


FOCUSED = "(token) => token === document.activeElement"


def test_the_panel_of_one_token(page):
    """Pinned by a click or a key: its figures are those of `score`."""
    tokens = score_text(page, PROSE.strip())
    (expected,) = Perplexity().score([PROSE.strip()], model_id=TINY, top_k=service.TOP_K)
    panel = page.get_by_label("One token", exact=True)
    most = int(np.argmax(expected.nll))  # pinned at first
    assert f"{expected.nll[most] / math.log(2):.2f} bits" in panel.inner_text()

    def check(i):
        told = panel.inner_text()
        bits = expected.nll[i] / math.log(2)
        assert f"“{expected.tokens[i]}” {bits:.2f} bits" in told
        assert f"rank {expected.ranks[i]:,}" in told
        assert f"entropy of the prediction {expected.entropy[i] / math.log(2):.2f} bits" in told
        before = expected.text[: expected.offsets[i][0]].rstrip()
        read = panel.locator(".read").inner_text().strip()
        if read.startswith("… "):  # the last of it, whole words
            assert 70 < len(read) <= 92
            assert before.endswith(f" {read[2:]}")
        else:
            assert read == (before or "nothing")
        bars = panel.locator("li")
        assert bars.count() == service.TOP_K
        for j, (token, nll) in enumerate(expected.expected[i]):
            shown = heatmap.visible(token, line_ends=False)
            assert f"“{shown}”" in bars.nth(j).inner_text()
            width = bars.nth(j).evaluate("bar => bar.style.getPropertyValue('--percent')")
            assert float(width.strip("%")) == pytest.approx(100 * math.exp(-nll), rel=0.06)

    tokens.nth(3).click()
    check(3)
    tokens.first.focus()
    for key, i in (("ArrowRight", 1), ("End", len(expected.nll) - 1), ("Home", 0)):
        page.keyboard.press(key)
        assert tokens.nth(i).evaluate(FOCUSED)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    check(1)
    assert page.locator(".text .pinned").count() == 1
    assert [tokens.nth(i).get_attribute("tabindex") for i in range(3)] == ["-1", "0", "-1"]


def test_a_tooltip_can_be_reached_and_closed(page):
    """WCAG 1.4.13: the mouse may enter it, and Escape closes it."""
    tokens = score_text(page, PROSE)
    is_open = """(token) => {
      const { content, display } = getComputedStyle(token, "::after");
      return content !== "none" && display !== "none"; }"""
    tokens.nth(3).hover()
    box = tokens.nth(3).bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] - 20, steps=10)
    assert tokens.nth(3).evaluate("(token) => token.matches(':hover')")
    assert tokens.nth(3).evaluate(is_open)
    page.keyboard.press("Escape")
    page.wait_for_timeout(100)  # in which another token, now under the mouse, could open its own
    assert not any(token.evaluate(is_open) for token in tokens.all())
    page.mouse.move(0, 0)
    tokens.nth(4).focus()
    assert tokens.nth(4).evaluate(is_open)


def test_control_enter_scores(page):
    page.locator(".surprisal b").first.wait_for()
    box = page.get_by_label("Text", exact=True)
    box.fill("Another text.")
    box.press("Control+Enter")
    page.locator(".surprisal .text", has_text="Another text.").wait_for()


def test_what_a_screen_reader_is_told(page):
    """The result, the name of the chart, and the text as a text."""
    page.get_by_role("status").filter(has_text="as uncertain as a choice").wait_for()
    page.get_by_label("Surprisal along the text in bits, of each token", exact=True).wait_for()
    assert page.locator(".surprisal .text [role], .surprisal b[aria-label]").count() == 0


ARABIC = "تعيد الدالة عدد العناصر"


def test_a_text_that_runs_from_right_to_left(page):
    """In the box and in the heatmap; its letters stay joined, and the arrow keys go with it."""
    box = page.get_by_label("Text", exact=True)
    assert box.evaluate("box => getComputedStyle(box).unicodeBidi") == "plaintext"
    tokens = score_text(page, ARABIC)
    assert page.locator(".surprisal .text").inner_text() == ARABIC
    lefts = [tokens.nth(i).bounding_box()["x"] for i in range(tokens.count())]
    assert lefts == sorted(lefts, reverse=True)
    right = page.locator(".surprisal .text").evaluate("div => div.getBoundingClientRect().right")
    assert right - lefts[0] < 50
    joined = """div => {
      const widthOf = (element) => {
        const all = document.createRange(); all.selectNodeContents(element);
        return all.getBoundingClientRect().width; };
      const plain = div.cloneNode(); plain.textContent = div.textContent; div.after(plain);
      const difference = Math.abs(widthOf(div) - widthOf(plain));
      plain.remove(); return difference; }"""
    assert page.locator(".surprisal .text").evaluate(joined) < 1
    head = page.locator(".panel strong")
    figure = "strong => strong.lastChild.textContent.trim().split(' ')[1]"
    assert head.evaluate(figure) == "bits"
    assert head.locator("bdi").bounding_box()["x"] == head.bounding_box()["x"]
    tokens.first.focus()
    page.keyboard.press("ArrowLeft")
    assert tokens.nth(1).evaluate(FOCUSED)


def test_markup_in_the_text_stays_text(page):
    text = "<img src=x onerror=alert(1)><script>alert(2)"
    dialogs = []
    page.on("dialog", lambda dialog: dialogs.append(dialog) or dialog.dismiss())
    score_text(page, text)
    assert page.locator(".surprisal img, .surprisal script").count() == 0
    assert (
        page.locator(".surprisal .text").inner_text()
        == "<img src=x onerror=alert(1)><script>aler" + "t(2)"
    )
    assert dialogs == []


def test_the_page_opens_with_an_example_and_its_score(page, settings):
    """And says what the number means."""
    first = settings.examples[0].text
    assert page.get_by_label("Text", exact=True).input_value() == first
    page.locator(".surprisal b").first.wait_for()
    assert page.locator(".surprisal .text").inner_text() == first
    perplexity = Perplexity().compute(predictions=[first], model_id=TINY)["perplexity"]
    verdict = page.locator(".verdict").first.inner_text()
    assert f"as uncertain as a choice among {perplexity:.0f} equally likely tokens" in verdict
    assert "On Python documentation that it was not trained on, this model has 71." in verdict
    choice = page.get_by_label("Model", exact=True).first.input_value()
    assert choice == f"{LABEL}: 2.4M parameters, Python documentation"


def test_a_page_opens_before_its_model_is_loaded(settings, outside, monkeypatch):
    """The text is there, its score is not; a later visitor sees both."""
    release, metrics_load = threading.Event(), models._load
    monkeypatch.setattr(models, "PATIENCE_S", 0)
    monkeypatch.setattr(models, "_load", lambda model: release.wait(60) and metrics_load(model))
    metrics = service.Metrics(settings)
    first = handlers.make_handlers(settings, metrics)["first"]
    assert first() == gradio.skip()
    release.set()
    wait_for(lambda: LABEL not in metrics.models.absent())
    line, data = first()
    assert "**Perplexity 23.1**" in line
    monkeypatch.setattr(metrics, "score", None)  # once is enough
    assert first()[1] is data
    metrics.end(0)


def test_an_example_and_an_over_long_text(page, settings):
    choose_example(page, settings.examples[2])
    press(page, "Score")
    page.get_by_text("9,030 equally likely").wait_for()
    page.get_by_label("Text", exact=True).fill("word " * 5000)
    press(page, "Score")
    page.get_by_text("25,000 characters; here at most 20,000").wait_for()
    assert "Traceback" not in page.content()


def test_a_conversation_in_the_browser(page, url, settings):
    for theme in ("light", "dark"):
        page.goto(f"{url}?__theme={theme}")
        page.get_by_role("tab", name="Conversation").click()
        choose_example(page, settings.conversation_examples[0])
        press(page, "Score")
        grey = page.locator(".surprisal b.unscored:visible").first
        grey.wait_for()
        scored = page.locator(".surprisal b:not(.unscored):visible").first
        colour = "(token) => getComputedStyle(token).color"
        assert grey.evaluate(colour) != scored.evaluate(colour)
        assert grey.evaluate(CONTRAST) >= 4.5
        assert violations(page) == []
        assert (
            "Assistant:↵\nIt returns the" in page.locator(".surprisal:visible .text").inner_text()
        )


def compare_texts(page, text_a, text_b, model_b=LABEL):
    """The pieces of both sides."""
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Text A").fill(text_a)
    page.get_by_label("Text B").fill(text_b)
    if model_b != LABEL:
        # Gradio's list logs an error if it changes while it is open.
        page.get_by_text("Not available at the moment: Absent.").last.wait_for()
        page.get_by_label("Model B").fill(model_b)
        page.get_by_role("option", name=model_b).click()
    press(page, "Compare")
    sides = page.locator(".panes:visible section")
    sides.first.wait_for()
    return sides.nth(0).locator("b"), sides.nth(1).locator("b")


REVISED = PROSE.replace("is empty", "is not empty", 1)
COLOUR = "(e) => [e.classList.contains('more'), e.classList.contains('less'), e.style.cssText]"


def test_compare_in_the_browser(page):
    a, b = compare_texts(page, PROSE, REVISED)
    assert page.locator(".panes h2").all_inner_texts() == [f"A {LABEL}", f"B {LABEL}"]
    assert page.locator(".panes .text").nth(1).inner_text().startswith(REVISED[:60])
    assert page.locator(".score:visible table tr").count() == 5  # the statistics
    page.wait_for_timeout(500)  # Gradio fades a result in
    assert violations(page) == []
    # What only B has, and what both have behind it.
    alone = page.locator(".panes b.alone")
    assert alone.all_inner_texts() == ["not"]
    number = b.all_inner_texts().index("not")
    assert a.nth(number - 1).inner_text() == "is"
    alone.hover()
    tip = "(e) => getComputedStyle(e, '::after').content"
    assert "only in B" in alone.evaluate(tip)
    assert page.locator(".panes .pointed").count() == 1
    b.nth(number + 1).hover()
    assert a.nth(number).evaluate("(e) => e.classList.contains('pointed')")
    assert "A: " in b.nth(number + 1).evaluate(tip)
    # Each side has the colour of its own difference.
    of_a, of_b = a.nth(number).evaluate(COLOUR), b.nth(number + 1).evaluate(COLOUR)
    assert of_a == [of_b[1], of_b[0], of_b[2]]
    assert of_a[0] != of_a[1]
    page.get_by_label("Colour by").locator("visible=true").select_option("surprisal")
    assert not any(a.nth(number).evaluate(COLOUR)[:2])


def test_the_keys_of_a_comparison(page):
    """Each side is one stop of the tab key; what is chosen on one is shown for both."""
    a, b = compare_texts(page, PROSE, REVISED)
    assert page.locator('.panes [tabindex="0"]').count() == 2
    number = b.all_inner_texts().index("not")
    a.nth(0).focus()
    page.keyboard.press("Tab")
    assert b.nth(0).evaluate(FOCUSED)
    for _ in range(number + 1):
        page.keyboard.press("ArrowRight")
    assert b.nth(number + 1).evaluate(FOCUSED)
    page.keyboard.press("Enter")
    pinned = page.locator(".panes .pinned")
    assert pinned.all_inner_texts() == ["empty", "empty"]
    panel = page.locator(".panel:visible")
    head = panel.locator(".both").inner_text()
    assert re.search(r"“ empty” \d+\.\d\d bits (more|less) in B", head)
    assert panel.locator("ol").count() == 2
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert pinned.all_inner_texts() == ["not"]
    assert panel.inner_text().startswith("“ not” only in B")
    page.keyboard.press("End")
    assert b.last.evaluate(FOCUSED)
    # A tooltip of the focus in B is not in the way of one in A, and closes by Escape.
    a.nth(1).scroll_into_view_if_needed()
    a.nth(1).hover()
    tooltip = "(e) => getComputedStyle(e, '::after').display"
    assert (a.nth(1).evaluate(tooltip), b.last.evaluate(tooltip)) == ("block", "none")
    page.keyboard.press("Escape")
    assert a.nth(1).evaluate(tooltip) == "none"


def test_both_sides_scroll_to_the_same_place(page):
    """B has some more in the middle, so that its places are others; neither moves the other."""
    lines = [f"Line {i} is one of many lines.\n" for i in range(60)]
    more = [f"This text number {i} is in B alone.\n" for i in range(20)]
    a, b = compare_texts(page, "".join(lines), "".join([*lines[:30], *more, *lines[30:]]))
    boxes = page.locator(".panes .text")

    def scroll(side, share):
        """Of the way; where both then are."""
        to = "(box, share) => (box.scrollTop = share * (box.scrollHeight - box.clientHeight))"
        boxes.nth(side).evaluate(to, share)
        page.wait_for_timeout(100)
        tops = [boxes.nth(i).evaluate("(box) => box.scrollTop") for i in (0, 1)]
        page.wait_for_timeout(300)
        assert [boxes.nth(i).evaluate("(box) => box.scrollTop") for i in (0, 1)] == tops
        return tops

    def line(tokens, number):
        return tokens.nth(
            [i for i, t in enumerate(tokens.all_inner_texts()) if t == "many"][number]
        )

    def height(tokens, number):
        return line(tokens, number).bounding_box()["y"]

    assert scroll(0, 0.25)[1] > 0
    assert height(a, 18) == pytest.approx(height(b, 18), abs=15)
    scroll(1, 0.8)
    assert height(a, 47) == pytest.approx(height(b, 47), abs=15)
    room = "(box) => box.scrollHeight - box.clientHeight"
    assert scroll(0, 1)[1] == pytest.approx(boxes.nth(1).evaluate(room), abs=1)
    assert scroll(1, 0) == [0, 0]
    # A click on one side shows its place on the other, and moves nothing under the mouse.
    tops = scroll(0, 0.5)
    line(a, 29).click()
    page.wait_for_timeout(200)
    assert boxes.nth(0).evaluate("(box) => box.scrollTop") == tops[0]
    frame, shown = boxes.nth(1).bounding_box(), page.locator(".panes .pinned").nth(1).bounding_box()
    assert frame["y"] <= shown["y"] <= frame["y"] + frame["height"]


def saved_table(page):
    with page.expect_download() as download:
        page.locator("button:visible", has_text="Save CSV").click()
    assert download.value.suggested_filename == "comparison.csv"
    with open(download.value.path(), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_comparison_as_a_table(page):
    compare_texts(page, "It is new.", "It is not new.", OTHER)
    rows = saved_table(page)
    assert "".join(row["a_text"] for row in rows) == "It is new."
    assert "".join(row["b_text"] for row in rows) == "It is not new."
    (added,) = (row for row in rows if row["a_text"] == "" and row["b_text"].strip() == "not")
    assert (added["a_start"], added["difference"]) == ("", "")
    last = rows[-1]
    assert float(last["difference"]) == pytest.approx(
        float(last["b_bits"]) - float(last["a_bits"]), rel=1e-4
    )


DRAW = """async ([address, pair]) => {
  const { makePairView } = await import(`${address}/pair.js`);
  const view = makePairView();
  document.querySelector("main").replaceChildren(view.article);
  view.draw(pair);
}"""


def test_sides_that_cannot_be_aligned(page, url):
    """The tokens of a slow tokenizer have no places; some are infinitely surprising."""
    scores = Perplexity().score(["It is new.", "It is not new."], model_id=TINY)
    a, b = (views.LabelledScore("x", replace(score, offsets=None), "", {}) for score in scores)
    pair = pair_data(a, b)
    assert pair["pieces"] is None
    page.evaluate(DRAW, [f"{url.rstrip('/')}{ADDRESS}", pair])
    assert page.locator("main .text").all_inner_texts() == ["It is new.", "It is not new."]
    page.get_by_text("cannot be aligned").wait_for()
    assert page.get_by_label("Colour by").input_value() == "surprisal"
    assert page.locator("main .panes :is(.less, .more, .alone)").count() == 0
    first = page.locator("main .panes b").nth(1)
    first.hover()
    assert "in A" in first.get_attribute("data-tip")
    assert saved_table(page)[-1]["b_text"] == "."


def test_infinite_differences(page, url):
    scores = Perplexity().score(["It is new."] * 2, model_id=TINY)
    worse = replace(scores[0], nll=[math.inf] * len(scores[0].nll))
    a, b = (views.LabelledScore("x", score, "", {}) for score in (worse, scores[1]))
    page.evaluate(DRAW, [f"{url.rstrip('/')}{ADDRESS}", pair_data(a, b)])
    assert "infinite bits less in B" in page.locator("main .panel").inner_text()
    assert page.locator("main .panes .more").count() == len(scores[0].tokens)
    assert "Infinity" in {row["a_bits"] for row in saved_table(page)}
    assert {float(row["difference"]) for row in saved_table(page)} == {-math.inf}


def test_a_comparison_on_paper_and_in_forced_colours(page):
    a, _ = compare_texts(page, PROSE * 10, "", OTHER)
    ground = "(token) => getComputedStyle(token).backgroundColor"
    grounds = [a.nth(i).evaluate(ground) for i in range(3)]
    page.emulate_media(media="print")
    for box in page.locator(".panes .text").all():
        assert box.evaluate("(box) => box.scrollHeight === box.clientHeight")
    page.emulate_media(media="screen", forced_colors="active")
    assert [a.nth(i).evaluate(ground) for i in range(3)] == grounds


@pytest.mark.parametrize(("width", "is_beside"), [(1280, True), (640, True), (600, False)])
def test_both_sides_are_seen_without_a_jump(browser, url, width, is_beside):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.add_init_script(SHIFTS)
    page.goto(url)
    page.locator(".chart path:visible").first.wait_for()
    before = page.evaluate("window.shifted ?? 0")
    compare_texts(page, PROSE, REVISED)
    page.wait_for_timeout(500)
    assert page.evaluate("window.shifted ?? 0") - before < 0.05
    a, b = (page.locator(".panes .text").nth(i).bounding_box() for i in (0, 1))
    assert (a["y"] == b["y"]) == is_beside
    assert (a["x"] == b["x"]) != is_beside
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_upload_and_bad_upload(page, tmp_path):
    page.get_by_role("tab", name="Logits").click()
    press(page, "Make a small example file")
    page.locator("a[download='example.npz']").wait_for()
    press(page, "Compute")
    page.get_by_role("cell", name="perplexity", exact=True).wait_for()
    page.get_by_label("Clear").click()
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"no archive")
    page.locator("input[type=file]").set_input_files(str(bad))
    page.locator("a[download='bad.npz']").wait_for()
    press(page, "Compute")
    page.get_by_text("The file is no .npz archive").wait_for()


# The contrast of an element's colour to the first ground behind it that has one.
CONTRAST = """(element) => {
  const paint = document.createElement("canvas").getContext("2d");
  const channels = (colour) => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
    return paint.getImageData(0, 0, 1, 1).data;
  };
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  let ground = element;
  while (ground && channels(getComputedStyle(ground).backgroundColor)[3] < 255)
    ground = ground.parentElement;
  const behind = luminance(channels(getComputedStyle(ground).backgroundColor));
  const front = luminance(channels(getComputedStyle(element).color));
  return (Math.max(front, behind) + 0.05) / (Math.min(front, behind) + 0.05);
}"""


def test_a_text_under_two_models_in_the_browser(page, url):
    """The colours of the legend are the strongest that a token can have."""
    for theme in ("light", "dark"):
        page.goto(f"{url}?__theme={theme}")
        text = "Return the number <b>of</b> items."
        tokens, _ = compare_texts(page, text, "", OTHER)
        assert page.locator(".panes .text").all_inner_texts() == [text, text]
        tokens.nth(3).hover()
        tip = tokens.nth(3).evaluate("e => getComputedStyle(e, '::after').content")
        assert re.search(r"bits (more|less) in A", tip)
        assert "KL(A‖B) " in tip
        assert tip.count("expected “") == 2
        for element in page.locator(".surprisal:visible :is(i, b)").all():
            assert element.evaluate(CONTRAST) >= 4.5, element.evaluate("e => e.outerHTML")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1600])
def test_the_page_fits(browser, url, theme, width):
    """No sideways scrolling, a label on every control, and the contrast that WCAG 2.2 asks for."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(f"{url}?__theme={theme}")
    page.locator(".surprisal b").first.wait_for()
    for tab in ("Text", "Conversation", "Compare", "Logits"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for control in page.locator("textarea:visible, input:visible").all():
            named = control.evaluate(
                "c => !!(c.labels?.length || c.ariaLabel || c.getAttribute('aria-labelledby'))"
            )
            assert named, control.evaluate("c => c.outerHTML")
        if width > 390:
            assert violations(page) == []
        words = (
            "[role=tab][aria-selected=true], button.primary:visible, .surprisal b:visible, "
            "[data-testid='block-info']:visible"
        )
        for element in page.locator(words).all():
            assert element.evaluate(CONTRAST) >= 4.5, element.evaluate("e => e.outerHTML")
    page.close()


def test_the_server_asked_no_other_host(client, outside):
    """In all tests of this file before this one."""
    assert outside == []
