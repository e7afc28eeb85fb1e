"""The module arrives whole: by file, by directory, from a Hub, and its docs run."""

import doctest
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import evaluate
import numpy as np
import pytest
from conftest import ROOT, SCRIPT, load

UNIFORM = {"predictions": np.zeros((1, 2, 4)), "references": [[0, 3]]}


def test_by_file():
    assert evaluate.load(SCRIPT).compute(**UNIFORM)["perplexity"] == pytest.approx(4)


def test_by_directory(tmp_path):
    directory = tmp_path / "perplexity"
    directory.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, directory)
    assert evaluate.load(str(directory)).compute(**UNIFORM)["perplexity"] == pytest.approx(4)


def test_from_a_hub(tmp_path):
    """Another process loads user/perplexity from a server that has only this repository's files."""

    class Hub(http.server.SimpleHTTPRequestHandler):
        prefix = "/spaces/user/perplexity/resolve/main/"
        served = []

        def translate_path(self, path):
            return str(ROOT / path.removeprefix(self.prefix))

        def do_HEAD(self):
            self.answer(super().do_HEAD)

        def do_GET(self):
            self.answer(super().do_GET)

        def answer(self, serve):
            if self.path.startswith(self.prefix):
                self.served.append(self.path.removeprefix(self.prefix))
                serve()
            else:
                self.send_error(404)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    program = (
        "import evaluate, numpy as np\n"
        "ppl = evaluate.load('user/perplexity')\n"
        "print(ppl.compute(predictions=np.zeros((1, 2, 4)), references=[[0, 3]])['perplexity'])\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_EVALUATE_OFFLINE": "0",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(4)
    copied = {path.name for path in (tmp_path / "home").rglob("user--perplexity/*/*.py")}
    assert {"perplexity.py", "nll.py", "totals.py", "batches.py", "options.py"} <= copied
    assert copied - {"__init__.py"} <= set(Hub.served)
    others = ("app.py", "cli.py", "demo/", "metric_package.py", "text_files.py")
    assert [path for path in Hub.served if path.startswith(others)] == []


def test_the_examples_of_the_docs_run(monkeypatch):
    """As evaluate's own test suite runs them: at least two, all right."""
    monkeypatch.chdir(ROOT)
    module = sys.modules[type(load()).__module__]
    results = doctest.testmod(module)
    assert results.failed == 0
    assert results.attempted > 2


def test_methods_explain_themselves(ppl):
    for method in (ppl.compute, ppl.add_batch, ppl.add):
        assert "ignore_index" in method.__doc__
    assert ppl.description.startswith("Perplexity: exp of the mean")
    assert set(ppl.features) == {"predictions", "references"}


def test_siblings_are_imported_so_that_the_loader_finds_them():
    """Each sibling that perplexity.py needs, directly or not, stands in it at column 0."""
    lines = Path(SCRIPT).read_text().splitlines()
    named = {line.split()[1][1:] for line in lines if line.startswith("from .")}
    needed, queue = set(), ["perplexity"]
    while queue:
        text = (ROOT / f"{queue.pop()}.py").read_text()
        names = re.findall(r"(?m)^from \.(\w+) import", text)
        for line in re.findall(r"(?m)^from \. import (.*)", text):
            names += line.split(", ")
        queue += set(names) - needed
        needed |= set(names)
    assert named == needed
