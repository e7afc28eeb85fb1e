"""Fixtures of the demo: its server in this process, and a browser."""

import shutil
import socket
import threading
import time

import pytest
import torch
from demo_models import ABSENT, settings_with
from demo_server import OTHER, TINY, serving
from gradio_client import Client
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from demo import service
from demo.settings import Model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


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


@pytest.fixture(scope="module")
def url(settings, outside):
    with serving(settings) as (_, url):
        yield url


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


@pytest.fixture
def held(monkeypatch, settings):
    """Scores that run until they are released; those of `endless` until they are stopped. The
    example with which a page opens is scored at once."""
    running, release = [], threading.Event()

    def score_of(scorer, text, progress):
        if text == settings.examples[0].text:
            return real(scorer, text, progress)
        running.append(text)
        deadline = time.monotonic() + 120  # where nothing stops it
        while (text == "endless" and time.monotonic() < deadline) or not release.is_set():
            progress(1, 2)
            time.sleep(0.01)
        return real(scorer, text, progress)

    real = service._score_of
    monkeypatch.setattr(service, "_score_of", score_of)
    yield running, release
    release.set()


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
