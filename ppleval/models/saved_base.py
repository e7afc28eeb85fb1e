"""The base of a comparison on disk: what entered its output layer for each token, and that layer.

A directory holds `base.json` (the settings), `output_layer.safetensors`, and `texts-*.safetensors`
with the rows of some texts each. A row is the hidden state, in the model's own dtype, or the logits
where no output layer was found that can be kept. Each file appears complete or not at all, the
settings first, so an interrupted run can be continued wherever it was.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ppleval.distributed import T
from ppleval.logits.output_layer import OutputRows
from ppleval.logits.outputs import LogitTransform
from ppleval.logits.product import Product
from ppleval.models.language_model import Span
from ppleval.models.sharding import ModelRanks

FORMAT = "perplexity base 1"
SETTINGS_FILE, LAYER_FILE = "base.json", "output_layer.safetensors"
UNFINISHED = "unfinished-"  # begins the names of directories in which files are written
BYTES_PER_FILE = 2**26


CONTINUE = "Call save_base once more, which continues it."


class _Place(NamedTuple):
    """Where the rows of a text are."""

    path: Path
    start: int
    stop: int
    fingerprint: int


class SavedBase:
    """A base that `BaseWriter` wrote. It is read as a `LanguageModel` is run.

    Args:
        path: the directory.
        device: that of the model it is compared with, on which the output layer is applied.

    Raises:
        ValueError: no saved base, or a torn one.
    """

    tokenizer = None
    takes_batches = True
    tokens_per_batch = num_embeddings = sys.maxsize

    def __init__(self, path: str | os.PathLike, device: torch.device | str = "cpu"):
        self.path, self.device = Path(path), torch.device(device)
        self.stated = _read_settings(self.path)
        self.name = str(self.stated["model"]["model"])
        self.vocab_size = int(self.stated["vocab_size"])
        self.context_length = int(self.stated["reading"]["window"])
        self._transform = LogitTransform(**self.stated["transform"])
        self._layer = None
        if self.stated["kind"] == "hidden":
            if self.stated["num_texts"] is None and not (self.path / LAYER_FILE).exists():
                raise ValueError(f"The base at {self.path} is not complete. {CONTINUE}")
            file = _tensors(self.path / LAYER_FILE)
            layer = {name: file.get_tensor(name).to(self.device) for name in set(file.keys())}
            self._layer = Product(layer["weight"], layer.get("bias"))
        self._places = _places(self.path, self.stated["num_texts"])
        self._files: dict[Path, safe_open] = {}

    @staticmethod
    def is_at(path: str | os.PathLike) -> bool:
        """Whether there is a saved base."""
        return Path(path, SETTINGS_FILE).is_file()

    @property
    def num_texts(self) -> int:
        """How many texts are there; numbers 0 to num_texts - 1."""
        return len(self._places)

    def settings(self) -> dict[str, str | int | None]:
        """What a signature says of the model that was saved."""
        return self.stated["model"]

    def check_reading(self, settings: dict) -> None:
        """Raises ValueError if the texts are read with other settings than those of the base."""
        for name, saved in self.stated["reading"].items():
            if settings[name] != saved:
                raise ValueError(
                    f"The base at {self.path} was saved with {name} {saved}, and the texts are now "
                    f"read with {name} {settings[name]}. Pass the same settings, or save it again."
                )

    def check_text(self, number: int, ids: Sequence[int]) -> None:
        """Raises ValueError if a text is not the one that was saved under this number."""
        if number >= self.num_texts:
            advice = "Pass the same texts, or save it again."
            if self.stated["num_texts"] is None:
                advice = f"It is not complete. {CONTINUE}"
            raise ValueError(
                f"The base at {self.path} has {self.num_texts} texts, and there are more. {advice}"
            )
        if self._places[number].fingerprint != fingerprint(ids):
            raise ValueError(
                f"The base at {self.path} is of other texts, or of another tokenizer: text "
                f"{number} has other tokens than the one saved."
            )

    def check_number(self, num_texts: int) -> None:
        """Raises ValueError if there are fewer texts than were saved."""
        if num_texts < self.num_texts:
            raise ValueError(
                f"The base at {self.path} has {self.num_texts} texts, and {num_texts} were "
                "compared with it. Pass the same texts, or save a base of these."
            )

    def check_ids(self, ids: Sequence[int]) -> None:
        """All ids were read when the base was saved."""

    def batch_key(self, num_inputs: int) -> int:
        """Nothing depends on a batch any more."""
        return 0

    ranks = ModelRanks()  # this process reads it alone

    def keep_step(self) -> None:
        """No other process waits for it."""

    def running(self) -> AbstractContextManager:
        """Where `read` may be called, as for a model: anywhere."""
        return contextlib.nullcontext()

    def with_rows(self, spans: Sequence[Span], use: Callable[[OutputRows], T]) -> T:
        """What `use` makes of these rows, as for a model."""
        return use(self.read(spans))

    def read(self, spans: Sequence[Span]) -> OutputRows:
        """The saved rows of spans of checked texts."""
        rows = torch.cat([self._rows(span) for span in spans]).to(self.device)
        targets = [token_id for span in spans for token_id in span.targets]
        return OutputRows(
            rows,
            torch.arange(len(rows), device=self.device),
            torch.tensor(targets, device=self.device),
            self._layer or (lambda logits: logits),
            self._transform,
            self.vocab_size,
        )

    def _rows(self, span: Span) -> torch.Tensor:
        number, first = span.place
        place = self._places[number]
        file = self._files.get(place.path)
        if file is None:
            file = self._files[place.path] = _tensors(place.path)
        ids_scored = file.get_slice("scored")[place.start : place.stop]
        start = place.start + int(torch.searchsorted(ids_scored, first))
        return file.get_slice("rows")[start : start + len(span.targets)]


class BaseWriter:
    """Writes a base text by text, in their order; continues one of the same settings.

    Args:
        path: a directory, which is made.
        settings: of the model, and of how texts are read, as `TextScorer` has them.
        layer: the output layer whose inputs are kept, or None if logits are.
        transform: what makes scores of the logits.
        vocab_size: their number.

    Raises:
        ValueError: there is a base of other settings, a torn one, or something else.
        OSError: the disk is full, or cannot be written to. What is complete stays, as when the
            process is killed, and the same calls continue it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        model: dict,
        reading: dict,
        layer: Product | None,
        transform: LogitTransform,
        vocab_size: int,
    ):
        self.path = Path(path)
        self._stated = {
            "format": FORMAT,
            "model": model,
            "reading": reading,
            "kind": "logits" if layer is None else "hidden",
            "transform": vars(transform),
            "vocab_size": vocab_size,
            "num_texts": None,  # until it is complete
        }
        self._texts: list[tuple[Sequence[int], np.ndarray, torch.Tensor]] = []
        self._bytes = 0
        check_place(self.path)
        is_new = not SavedBase.is_at(self.path)
        if is_new:
            self._write_settings()
        stated = _read_settings(self.path) | {"num_texts": None}
        if stated != json.loads(json.dumps(self._stated)):
            raise ValueError(
                f"{self.path} holds a base of another model or of other settings. Choose "
                "another path, or delete it."
            )
        if layer is not None and not (self.path / LAYER_FILE).exists():
            tensors = {"weight": layer.weight, "bias": layer.bias}
            kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
            _write(self.path / LAYER_FILE, kept)
        self.known = None if is_new else SavedBase(self.path)
        self.num_texts = 0 if self.known is None else self.known.num_texts

    def add(self, ids: Sequence[int], scored: np.ndarray, rows: torch.Tensor) -> None:
        """Keep the next text.

        Args:
            ids: all that the model read.
            scored: (n,) numbers of the scored ones, ascending.
            rows: (n, ...) what entered the output layer for each of them, or its logits.
        """
        self._texts.append((ids, scored, rows))
        self._bytes += rows.nbytes
        if self._bytes >= BYTES_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what was added."""
        if not self._texts:
            return
        all_ids, scored, rows = zip(*self._texts, strict=True)
        targets = [np.asarray(ids)[places] for ids, places in zip(all_ids, scored, strict=True)]
        rows = [part for part in rows if len(part) > 0]  # an empty text has no shape of rows
        tensors = {
            "rows": torch.cat(rows) if rows else torch.zeros(0),
            "scored": _int64(np.concatenate(scored)),
            "ids": _int64(np.concatenate(targets)),
            "counts": _int64(np.array([len(places) for places in scored])),
            "fingerprints": _int64(np.array([fingerprint(ids) for ids in all_ids])),
        }
        _write(self.path / f"texts-{self.num_texts:09d}.safetensors", tensors)
        self.num_texts += len(self._texts)
        self._texts, self._bytes = [], 0

    def finish(self) -> None:
        """Write the rest, mark the base as complete, and delete what killed calls left."""
        self.flush()
        self._stated["num_texts"] = self.num_texts
        self._write_settings()
        for left in self.path.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _write_settings(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with _complete(self.path / SETTINGS_FILE) as part:
            part.write_text(json.dumps(self._stated, indent=1) + "\n")


def check_saved(path: str | os.PathLike) -> None:
    """Raises ValueError if there is no saved base, or one without some of its texts."""
    path = Path(path)
    _places(path, _read_settings(path)["num_texts"])


def check_place(path: str | os.PathLike) -> None:
    """Raises ValueError if there is something else than a base, or the start of one."""
    path = Path(path)
    if not path.exists() or SavedBase.is_at(path):
        return
    if not path.is_dir() or not all(_is_unfinished(entry) for entry in path.iterdir()):
        raise ValueError(f"{path} exists, and is no saved base. Choose another path.")


def _is_unfinished(entry: Path) -> bool:
    """Whether this is where a killed call wrote the first file of a base."""
    return (
        entry.name.startswith(UNFINISHED)
        and entry.is_dir()
        and {part.name for part in entry.iterdir()} <= {SETTINGS_FILE}
    )


def fingerprint(ids: Sequence[int]) -> int:
    """A hash of token ids."""
    digest = hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _read_settings(path: Path) -> dict:
    try:
        stated = json.loads((path / SETTINGS_FILE).read_text())
        if stated["format"] == FORMAT:
            return stated
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{path} is no saved base: {SETTINGS_FILE} there does not state the format {FORMAT!r}. "
        "save_base writes one; the name or the directory of a model goes to base_id=."
    )


def _places(path: Path, num_texts: int | None) -> list[_Place]:
    """The place of each text, by its number; of all texts, where their number is known."""
    places: list[_Place] = []
    missing = (
        f"{path} lacks a part of its texts, from number {{}} on. Delete it, and save it again."
    )
    for file in sorted(path.glob("texts-*.safetensors")):
        if file.name != f"texts-{len(places):09d}.safetensors":
            raise ValueError(missing.format(len(places)))
        tensors = _tensors(file)
        start = 0
        for count, known in zip(
            tensors.get_tensor("counts").tolist(),
            tensors.get_tensor("fingerprints").tolist(),
            strict=True,
        ):
            places.append(_Place(file, start, start + count, known))
            start += count
    if num_texts is not None and len(places) != num_texts:
        raise ValueError(missing.format(len(places)))
    return places


def _tensors(path: Path) -> safe_open:
    """An open file of tensors."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is missing or torn ({error}). Delete the base, and save it again."
        ) from error


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file of tensors, which appears when it is complete."""
    with _complete(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)


@contextlib.contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """Where to write a file that appears when it is complete, though the process may be killed.

    Raises:
        OSError: it cannot be written; its message names the file.
    """
    try:
        # A directory, because save_file writes to temporary files of its own beside the given one.
        with TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as directory:
            part = Path(directory, path.name)
            yield part
            os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _int64(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))
