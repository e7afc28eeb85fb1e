"""evaluate.load finds the library: beside the script, installed, on a Hub; or says what is missing.

Where only its place matters the library is a small stand-in, so that loads take no seconds.
"""

import doctest
import http.server
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluate
import pytest
from support import ROOT, SCRIPT, load

import ppleval

LIBRARY = '''
__version__ = "0.0"

class Perplexity:
    def __init__(self, **options):
        self.options = options

    def compute(self):
        """Compute.

        Args: none.
        """
        return "{value}"

    def add(self):
        """Add."""

    def add_batch(self):
        """Add."""
'''
# Loads it where nothing was imported yet, and prints its value and place.
PROGRAM = """
import sys
import evaluate
print(evaluate.load(sys.argv[1]).compute(), *sys.modules["ppleval"].__path__, sep="\\n")
"""
ABROAD = """
import multiprocessing, sys
import evaluate

def options(ppl):
    return ppl.options, ppl.compute()

if __name__ == "__main__":
    ppl = evaluate.load(sys.argv[1], shift=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(options, [ppl]))
"""


def module():
    """The copy of perplexity.py that evaluate imports, of this repository."""
    return sys.modules[type(load()).__module__]


def write_library(home: Path, value: str) -> None:
    """Put a stand-in beside the script, or change the one that is there."""
    (home / "ppleval").mkdir(parents=True, exist_ok=True)
    (home / "ppleval" / "__init__.py").write_text(LIBRARY.format(value=value))


@pytest.fixture(scope="module")
def script():
    """perplexity.py, and the digest that stands in it."""
    return Path(SCRIPT).read_text("utf-8"), module()


@pytest.fixture
def clone(script):
    """Make a repository of the script and a stand-in, which agree."""

    def clone(home: Path, value: str = "a") -> Path:
        write_library(home, value)
        text, metric = script
        old, new = metric.DIGEST, metric.digest_of(home / "ppleval")
        assert f'DIGEST = "{old}"' in text
        (home / "perplexity.py").write_text(text.replace(old, new), "utf-8")
        return home

    return clone


def forget_imports(monkeypatch) -> None:
    """As in a new process."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("ppleval", "evaluate_modules"):
            monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def find(script, monkeypatch, tmp_path):
    """Load a metric as a new process would: its value, and where its library lies."""
    cache = evaluate.config.HF_MODULES_CACHE
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    # Neither the library of this repository, nor what other tests loaded.
    left_out = ("", str(ROOT), str(cache))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in left_out])
    monkeypatch.chdir(tmp_path)

    def find(path, imported: Path | None = None) -> tuple[str, Path]:
        forget_imports(monkeypatch)
        monkeypatch.setattr(
            sys,
            "meta_path",
            [
                finder
                for finder in sys.meta_path
                if "editable" not in getattr(finder, "__name__", "")
            ],
        )
        if imported is not None:
            with monkeypatch.context() as patch:
                patch.syspath_prepend(imported)
                import ppleval  # noqa: F401
        value = evaluate.load(str(path)).compute()
        return value, Path(sys.modules["ppleval"].__path__[0])

    return find


@pytest.fixture
def run(tmp_path):
    """Run a program with these arguments, with a fresh cache."""

    def run(*arguments, program=PROGRAM, **environment):
        path = tmp_path / "program.py"
        path.write_text(program)
        done = subprocess.run(
            [sys.executable, path, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""} | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_by_file(find, clone, tmp_path):
    home = clone(tmp_path / "clone")
    assert find(home / "perplexity.py") == ("a", home / "ppleval")


def test_by_directory(find, clone, tmp_path):
    home = clone(tmp_path / "perplexity")
    assert find(home) == ("a", home / "ppleval")


def test_by_a_relative_path_and_then_from_another_directory(find, clone, tmp_path, monkeypatch):
    home = clone(tmp_path / "one" / "clone")
    for place, path in ((home, "perplexity.py"), (tmp_path, "one/clone/perplexity.py")):
        monkeypatch.chdir(place)
        assert find(path) == ("a", home / "ppleval")


def test_the_place_is_known_where_the_copy_is_imported_by_its_name(
    find, clone, tmp_path, monkeypatch
):
    home = clone(tmp_path / "one" / "clone")
    monkeypatch.chdir(home)
    find("perplexity.py")
    name = evaluate.loading.evaluation_module_factory("perplexity.py").module_path
    monkeypatch.chdir(tmp_path)
    forget_imports(monkeypatch)
    importlib.import_module(name)
    assert sys.modules["ppleval"].__path__ == [str(home / "ppleval")]


def test_two_clones_of_one_version_and_different_code(find, clone, tmp_path):
    first, second = clone(tmp_path / "first", "a"), clone(tmp_path / "second", "b")
    for home, value in ((first, "a"), (second, "b"), (first, "a")):
        assert find(home / "perplexity.py") == (value, home / "ppleval")


def test_a_clone_that_is_being_edited(find, clone, tmp_path):
    home = clone(tmp_path / "clone")
    find(home / "perplexity.py")
    write_library(home, "b")
    with pytest.warns(UserWarning, match=f"{home / 'ppleval'} was changed since perplexity.py"):
        assert find(home / "perplexity.py") == ("b", home / "ppleval")
    with pytest.warns(UserWarning, match="was changed since perplexity.py beside it was made"):
        assert find(home / "perplexity.py", imported=home) == ("b", home / "ppleval")


def test_a_clone_that_was_deleted(find, clone, tmp_path):
    first, second = clone(tmp_path / "first"), clone(tmp_path / "second")
    assert find(first / "perplexity.py") == ("a", first / "ppleval")
    shutil.rmtree(first)
    assert find(second / "perplexity.py") == ("a", second / "ppleval")


def test_a_script_without_its_library(find, clone, tmp_path):
    home = clone(tmp_path / "clone")
    shutil.rmtree(home / "ppleval")
    with pytest.raises(ImportError, match="was not found: not installed, not beside the file"):
        find(home / "perplexity.py")


def test_one_that_fits_is_taken_where_it_is_installed(find, clone, tmp_path, monkeypatch):
    home, installed = clone(tmp_path / "clone"), clone(tmp_path / "installed")
    shutil.rmtree(home / "ppleval")
    monkeypatch.syspath_prepend(installed)
    assert find(home / "perplexity.py") == ("a", installed / "ppleval")


def test_one_that_does_not_fit_is_passed_over(find, clone, tmp_path, monkeypatch):
    home, installed = clone(tmp_path / "clone"), clone(tmp_path / "installed", "b")
    monkeypatch.syspath_prepend(installed)
    assert find(home / "perplexity.py") == ("a", home / "ppleval")


def test_one_that_is_imported_already(find, clone, tmp_path):
    home, same = clone(tmp_path / "clone"), clone(tmp_path / "same")
    assert find(home / "perplexity.py", imported=same) == ("a", same / "ppleval")
    other = clone(tmp_path / "other", "b")
    with pytest.raises(ImportError, match=f"ppleval 0.0 of {other / 'ppleval'} is imported"):
        find(home / "perplexity.py", imported=other)


def test_a_cache_whose_path_contains_py(find, clone, tmp_path, monkeypatch):
    """evaluate's note lies outside, and is the first script's."""
    cache = tmp_path / ".pyenv" / "cache"
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(cache))
    first, second = clone(tmp_path / "first", "a"), clone(tmp_path / "second", "b")
    for home, value in ((first, "a"), (second, "b"), (first, "a")):
        assert find(home / "perplexity.py") == (value, home / "ppleval")
    assert (tmp_path / ".json").exists()


def test_a_cache_that_cannot_be_written(find, clone, tmp_path):
    home = clone(tmp_path / "clone")
    find(home / "perplexity.py")
    (place,) = tmp_path.rglob("original_place")
    place.unlink()
    place.mkdir()  # where root, too, can write no file
    assert find(home / "perplexity.py") == ("a", home / "ppleval")


def test_pickled_to_a_process_that_is_spawned(run, clone, tmp_path):
    home = clone(tmp_path / "one" / "clone")
    path = os.path.relpath(home / "perplexity.py", tmp_path)
    assert run(path, program=ABROAD) == ["({'shift': True}, 'a')"]


def test_two_metrics_in_one_process():
    first, second = load(), load(shift=True)
    assert type(first) is type(second)
    first.add_batch(predictions=[[[0.0, 2.0]]], references=[[1]])
    assert (len(first), len(second)) == (1, 0)


class Hub(http.server.ThreadingHTTPServer):
    """user/perplexity on a server that has only this repository's files; it counts requests."""

    def __init__(self, home: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.home, self.requests, self.lock = home, [], threading.Lock()

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self.thread.join()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_EVALUATE_OFFLINE": "0",
            "HF_HUB_OFFLINE": "0",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": "127.0.0.1",
        }


class Handler(http.server.BaseHTTPRequestHandler):
    """What of the Hub's protocol evaluate and huggingface_hub use."""

    COMMIT = "1" * 40

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        with self.server.lock:
            self.server.requests.append(f"{self.command} {self.path}")
        body = self.file()
        body = self.api() if body is None else body
        self.send_response(200 if body is not None else 404)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
            if "/v0.4.6/" in self.path:
                self.send_header("X-Error-Code", "RevisionNotFound")
            body = b""
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body)}-{hash(body)}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def file(self) -> bytes | None:
        for revision in ("main", self.COMMIT):
            prefix = f"/spaces/user/perplexity/resolve/{revision}/"
            if self.path.startswith(prefix):
                path = self.server.home / self.path.removeprefix(prefix)
                return path.read_bytes() if path.is_file() else None
        return None

    def api(self) -> bytes | None:
        path = self.path.partition("?")[0]
        files = [path for path in self.server.home.rglob("*") if path.is_file()]
        names = [path.relative_to(self.server.home).as_posix() for path in files]
        if path.startswith("/api/spaces/user/perplexity/tree/"):
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in zip(names, files, strict=True)
            ]
            return json.dumps(rows).encode()
        if path.startswith("/api/spaces/user/perplexity"):
            siblings = [{"rfilename": name} for name in names]
            info = {"id": "user/perplexity", "sha": self.COMMIT, "siblings": siblings}
            return json.dumps(info | {"private": False, "disabled": False}).encode()
        return None

    def log_message(self, *args):
        pass


def test_from_a_hub(run, clone, tmp_path):
    """One request for each file of the library, so that 120 are enough for it as it is."""
    home = clone(tmp_path / "hub")
    files = ["ppleval/__init__.py", "ppleval/stats/__init__.py", "ppleval/stats/totals.py"]
    (home / "ppleval" / "stats").mkdir()
    for name in files[1:]:
        (home / name).touch()
    with Hub(clone(home)) as hub:
        value, folder = run("user/perplexity", **hub.environment)
        assert value == "a"
        assert Path(folder).is_relative_to(tmp_path / "home")
        of_library = [line for line in hub.requests if "/ppleval/" in line]
        assert len(of_library) == len(files)
        num_others = len(hub.requests) - len(files)
        assert num_others + len(list((ROOT / "ppleval").rglob("*.py"))) <= 120
        num_cold = len(hub.requests)
        assert run("user/perplexity", **hub.environment) == [value, folder]
        assert len(hub.requests) - num_cold <= 4
        offline = hub.environment | {"HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
        num_warm = len(hub.requests)
        assert run("user/perplexity", **offline) == [value, folder]
        assert len(hub.requests) == num_warm


@pytest.mark.long
def test_processes_that_load_from_a_hub_at_once(run, clone, tmp_path):
    """One of them fetches the library."""
    with Hub(clone(tmp_path / "hub")) as hub, ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(run, "user/perplexity", **hub.environment) for _ in range(3)]
        assert {task.result()[0] for task in tasks} == {"a"}
        fetched = [line for line in hub.requests if "GET" in line and "/ppleval/" in line]
        assert len(fetched) == 1


def test_the_examples_of_the_docs_run(monkeypatch):
    """As evaluate's own test suite runs them: at least two, all right."""
    monkeypatch.chdir(ROOT)
    results = doctest.testmod(module())
    assert results.failed == 0
    assert results.attempted > 2


def test_methods_explain_themselves():
    ppl, alone = load(), ppleval.Perplexity()
    for name in ("compute", "add", "add_batch", "__call__", "score"):
        method, same = getattr(ppl, name), getattr(alone, name)
        assert method.__doc__ == same.__doc__
        assert inspect.signature(method) == inspect.signature(same)
    assert ppl.inputs_description in inspect.cleandoc(ppl.compute.__doc__)
    assert "ignore_index (int" in ppl.inputs_description
    assert ppl.description.startswith("Perplexity: exp of the mean")
    assert set(ppl.features) == {"predictions", "references"}
    assert repr(ppl) == repr(alone)


def test_the_metric_has_what_the_library_has():
    """Its class adds only what evaluate asks for."""
    own = set(vars(type(load()))) - {"__module__", "__doc__"}
    assert own == {"__init__", "_info", "_over_files", "_shows_progress"}
    assert isinstance(load(), (ppleval.Perplexity, evaluate.Metric))
