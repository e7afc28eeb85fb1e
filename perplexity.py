# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Perplexity as a metric of Hugging Face evaluate: `evaluate.load("perplexity.py")`.

Everything is done by the library ppleval, whose class this metric is made of. evaluate copies this
one file into a cache and imports the copy, so the file first finds the library that belongs to it.
"""

# The methods of evaluate's class take any keyword; these name theirs.
# pyright: reportIncompatibleMethodOverride=false

import hashlib
import importlib.util
import inspect
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import datasets
import evaluate
import evaluate.config
import filelock
import huggingface_hub

# Of the library that this file was made with; `make digest` writes it.
DIGEST = "a423150387244370"


def digest_of(folder: Path) -> str:
    """A hash of the places and texts of a library's Python files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        text = path.read_bytes().replace(b"\r\n", b"\n")  # git writes the former on Windows
        digest.update(f"{path.relative_to(folder).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]


def find_library() -> ModuleType:
    """ppleval with the digest above, imported under its own name, wherever it is.

    If nothing else is found, the one beside the original of this file is taken although it was
    changed since, with a warning.

    Raises:
        ImportError: there is none, or another one is imported already.
    """
    imported = sys.modules.get("ppleval")
    if imported is None:
        for folder in all_folders():
            if digest_of(folder) == DIGEST:
                return import_library(folder)
    elif digest_of(folder_of(imported)) == DIGEST:
        return imported
    beside = next(folders_beside(), None)
    if imported is not None and (beside is None or not beside.samefile(folder_of(imported))):
        raise ImportError(
            f"This perplexity.py needs ppleval with the digest {DIGEST}, and ppleval "
            f"{imported.__version__} of {folder_of(imported)} is imported already, with the digest "
            f"{digest_of(folder_of(imported))}. A process can use one of them."
        )
    if beside is None:
        raise ImportError(
            f"ppleval with the digest {DIGEST} was not found: not installed, not beside the file "
            "that was loaded, not on the Hub. Load perplexity.py where its whole repository is, or "
            "install that: pip install ."
        )
    warnings.warn(
        f"{beside} was changed since perplexity.py beside it was made. It is used as it is; "
        "`make digest` makes the two agree.",
        stacklevel=2,
    )
    return imported or import_library(beside)


def folder_of(library: ModuleType) -> Path:
    """Where an imported library lies."""
    return Path(library.__path__[0])


def import_library(folder: Path) -> ModuleType:
    """Import the library of a folder as ppleval. The search path is left alone."""
    spec = importlib.util.spec_from_file_location(
        "ppleval", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    sys.modules["ppleval"] = library
    spec.loader.exec_module(library)
    return library


def all_folders() -> Iterator[Path]:
    """Where the library may be, from what is installed to what has to be fetched."""
    spec = importlib.util.find_spec("ppleval")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    yield from folders_beside()
    yield from folders_on_hub()


def folders_beside() -> Iterator[Path]:
    """ppleval beside the original of this file, which `evaluate.load` was asked for.

    Its place is kept beside the copy, for processes that import the copy by its name, as those do
    that get a pickled metric. evaluate keeps it, too, but a relative one as it is, and of equal
    scripts that of the first.
    """
    kept = Path(__file__).with_name("original_place")
    original = original_asked_for()
    if original is None:
        original = kept.read_text("utf-8") if kept.is_file() else original_noted_by_evaluate()
    elif not kept.is_file() or kept.read_text("utf-8") != original:
        write_if_possible(kept, original)
    for path in (__file__, original):
        if path is not None and Path(path).with_name("ppleval").is_dir():
            yield Path(path).with_name("ppleval")


def original_asked_for() -> str | None:
    """The script that `evaluate.load`, which imports this file right now, was asked for."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not evaluate.load.__code__:
        frame = frame.f_back
    path = None if frame is None else Path(frame.f_locals["path"]).absolute()
    if path is None or not path.exists():  # a name on the Hub
        return None
    return str(path / f"{path.name}.py" if path.is_dir() else path)


def original_noted_by_evaluate() -> str | None:
    """The script that this file is a copy of, as evaluate noted it beside the copy."""
    # Where evaluate puts it: under ~/.pyenv it is ~/.json, for the copies of all scripts.
    note = Path(__file__.split(".py")[0] + ".json")
    if not note.exists():
        return None
    found = json.loads(note.read_text("utf-8"))
    is_of_this = os.path.realpath(found["local file path"]) == os.path.realpath(__file__)
    return os.path.abspath(found["original file path"]) if is_of_this else None


def write_if_possible(path: Path, text: str) -> None:
    """Write a file as a whole, for whoever reads it meanwhile; nothing in a read-only folder."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(text, "utf-8")
        new.replace(path)
    except OSError:
        pass


def folders_on_hub() -> Iterator[Path]:
    """ppleval of the Hub's repository that this file came from, at the same revision; fetched once.

    Its folder is named by the digest, so it is right for each revision that has the same library.
    """
    original = original_noted_by_evaluate()  # in the cache of downloads, beside its address
    note = None if original is None else Path(f"{original}.json")
    if note is None or not note.exists():
        return
    url = json.loads(note.read_text("utf-8"))["url"]
    found = re.match(r"(https?://[^/]+)/spaces/([^/]+/[^/]+)/resolve/([^/]+)/", url)
    if found is None:
        return
    folder = Path(evaluate.config.HF_EVALUATE_CACHE, f"ppleval-{DIGEST}")
    if not folder.is_dir():
        # Of processes that start at once, one fetches the files.
        with filelock.FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                fetch_library(folder, *found.groups())
    yield folder


def fetch_library(folder: Path, endpoint: str, repo: str, revision: str) -> None:
    """Bring ppleval from the Hub, by one request for each file; snapshot_download makes two."""
    info = huggingface_hub.HfApi(endpoint).space_info(repo, revision=revision)
    names = [file.rfilename for file in info.siblings or []]
    names = [name for name in names if name.startswith("ppleval/") and name.endswith(".py")]

    def fetch(name: str) -> None:
        url = huggingface_hub.hf_hub_url(
            repo, name, repo_type="space", revision=info.sha, endpoint=endpoint
        )
        response = huggingface_hub.utils.get_session().get(
            url, headers=huggingface_hub.utils.build_hf_headers()
        )
        response.raise_for_status()
        path = Path(new, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(response.content)

    with tempfile.TemporaryDirectory(dir=folder.parent) as new, ThreadPoolExecutor(8) as pool:
        list(pool.map(fetch, names))
        if digest_of(Path(new, "ppleval")) == DIGEST:
            Path(new, "ppleval").rename(folder)


if TYPE_CHECKING:
    import ppleval
    from ppleval.stats.runs import Run
else:
    ppleval = find_library()

_DESCRIPTION = """\
Perplexity: exp of the mean negative log-likelihood that a language model gives to the tokens of a \
corpus. It takes logits or probabilities, with masks, weights and the causal shift, or texts and a \
model, and gives the corpus value with a 95% confidence interval. The range is [1, inf]; lower is \
better.
"""

_CITATION = """\
@article{jelinek1977perplexity,
  author  = {Jelinek, F. and Mercer, R. L. and Bahl, L. R. and Baker, J. K.},
  title   = {Perplexity---a measure of the difficulty of speech recognition tasks},
  journal = {The Journal of the Acoustical Society of America},
  volume  = {62},
  number  = {S1},
  pages   = {S63},
  year    = {1977}
}
"""

# The arguments, the result and examples.
_, _, _KWARGS_DESCRIPTION = inspect.cleandoc(ppleval.Perplexity.compute.__doc__ or "").partition(
    "\n\n"
)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Perplexity(ppleval.Perplexity, evaluate.Metric):
    """Perplexity of the library ppleval, as a metric of evaluate."""

    def __init__(self, *args, **kwargs):
        # A keyword that evaluate does not have is an option. evaluate itself ignores unknown
        # keywords, but a misspelt option must not vanish like that.
        own = inspect.signature(evaluate.Metric.__init__).parameters
        ppleval.Perplexity.__init__(self, **{k: v for k, v in kwargs.items() if k not in own})
        evaluate.Metric.__init__(self, *args, **{k: v for k, v in kwargs.items() if k in own})
        # evaluate's copies of these, with more documentation, hide the library's, which has all.
        del self.add, self.add_batch, self.compute

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # Of one example in evaluate's sense: the logits (T, V) and the ids (T,) of a sequence.
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
            license="Apache-2.0",
            reference_urls=["https://huggingface.co/docs/transformers/perplexity"],
        )

    def _over_files(self, run: "Run") -> "Run | None":
        from ppleval.evaluate_files import add_over_files

        return add_over_files(run, self)

    def _shows_progress(self) -> bool:
        enabled = evaluate.utils.logging.is_progress_bar_enabled()
        return enabled and not datasets.utils.are_progress_bars_disabled()
