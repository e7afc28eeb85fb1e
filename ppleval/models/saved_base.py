"""The base of a comparison on disk: what entered its output layer for each token, and that layer.

A directory holds `base.json` (the settings), `output_layer.safetensors`, and `texts-*.safetensors`
with the rows of some texts each. A row is the hidden state, in the model's own dtype, or the logits
where no output layer was found that can be kept. Each file appears complete or not at all, the
settings first, so an interrupted run can be continued wherever it was. Each holds a checksum, also
of the settings, which is compared when the file is first read.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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

FORMAT = "perplexity base 2"
SETTINGS_FILE, LAYER_FILE = "base.json", "output_layer.safetensors"
UNFINISHED = "unfinished-"  # begins the names of directories in which files are written
LEFT_BY_KILLED = re.compile(rf"{UNFINISHED}[a-z0-9_]{{8}}")  # those names, as tempfile makes them
BYTES_PER_FILE = 2**26
MOST_SETTINGS_BYTES = 2**20
# The tensors of a file of texts that hold integers, one dimension each.
PER_TOKEN, PER_TEXT = ("scored", "ids"), ("counts", "fingerprints")

CONTINUE = "Call save_base once more, which continues it."


class _Place(NamedTuple):
    """Where the rows of a text are."""

    path: Path
    start: int
    stop: int
    fingerprint: int


class SavedBase:
    """A base that `BaseWriter` wrote; `with_rows` gives what the model made of texts.

    Args:
        path: the directory.
        device: that of the model it is compared with, on which the output layer is applied.

    Raises:
        ValueError: no saved base, one that is not complete, or a damaged one. The rows of a file,
            which may be large, are checked when the first of them is read.
    """

    def __init__(self, path: str | os.PathLike, device: torch.device | str = "cpu"):
        self.path, self.device = Path(path), torch.device(device)
        self.stated = _read_settings(self.path)
        self.name = str(self.stated["model"]["model"])
        self.vocab_size = self.stated["vocab_size"]
        self.context_length = self.stated["reading"]["window"]
        self._transform = LogitTransform(**self.stated["transform"])
        row_size = _row_size(self.path, self.stated)
        self._layer = self._read_layer() if self.stated["kind"] == "hidden" else None
        self._places = _places(self.path, self.stated["num_texts"], row_size)
        self._files: dict[Path, safe_open] = {}

    def _read_layer(self) -> Product:
        """The output layer, on the device."""
        tensors = _checked_tensors(
            _tensors(self.path / LAYER_FILE), self.path / LAYER_FILE, self.stated
        )
        if not all(tensor.is_floating_point() for tensor in tensors.values()):
            raise damaged(self.path, f"{LAYER_FILE} must hold floating-point numbers")
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        return Product(tensors["weight"], tensors.get("bias"))

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
        saved = self.stated["reading"]
        for name in settings | saved:
            then, now = saved.get(name), settings.get(name)
            if then != now:
                raise ValueError(
                    f"The base at {self.path} was saved with {name} {then}, and the texts are now "
                    f"read with {name} {now}. Pass the same settings, or save it again."
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
        file = self._file(place.path)
        scored = file.get_slice("scored")[place.start : place.stop].numpy()
        start = place.start + int(np.searchsorted(scored, first))
        rows = slice(start, start + len(span.targets))
        expected = first + np.asarray(span.rows) - span.rows[:1]
        found = scored[start - place.start :][: len(expected)]
        ids = file.get_slice("ids")[rows].numpy()
        if not (np.array_equal(found, expected) and np.array_equal(ids, span.targets)):
            raise damaged(
                self.path, f"{place.path.name} holds other tokens for text {number} than it has"
            )
        return file.get_slice("rows")[rows]

    def _file(self, path: Path) -> safe_open:
        """An open file of texts, whose contents are checked when it is opened."""
        if path not in self._files:
            file = _tensors(path)
            _checked_tensors(file, path, self.stated)
            self._files[path] = file
        return self._files[path]


class BaseWriter:
    """Writes a base text by text, in their order; continues one of the same settings.

    Args:
        path: a directory, which is made.
        settings: of the model, and of how texts are read, as `TextScorer` has them.
        layer: the output layer whose inputs are kept, or None if logits are.
        transform: what makes scores of the logits.
        vocab_size: their number.

    Raises:
        ValueError: there is a base of other settings, a damaged one, or something else.
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
            _write(self.path / LAYER_FILE, kept, self._stated)
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
        _write(self.path / f"texts-{self.num_texts:09d}.safetensors", tensors, self._stated)
        self.num_texts += len(self._texts)
        self._texts, self._bytes = [], 0

    def finish(self) -> None:
        """Write the rest, mark the base as complete, and delete what killed calls left."""
        self.flush()
        self._stated["num_texts"] = self.num_texts
        self._write_settings()
        for left in self.path.glob(f"{UNFINISHED}*"):
            if LEFT_BY_KILLED.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)  # which follows no link

    def _write_settings(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with _complete(self.path / SETTINGS_FILE) as part:
            stated = self._stated | {"checksum": _settings_checksum(self._stated)}
            part.write_text(json.dumps(stated, indent=1) + "\n")


def check_saved(path: str | os.PathLike) -> None:
    """Raises ValueError if there is no saved base, or one that is not whole; reads no rows."""
    path = Path(path)
    stated = _read_settings(path)
    _places(path, stated["num_texts"], _row_size(path, stated))


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


def damaged(path: Path, what: str) -> ValueError:
    """The error of a base whose files are not what was written."""
    return ValueError(f"{path} is a damaged base: {what}. Delete it, and save it again.")


def _read_settings(path: Path) -> dict:
    """What `base.json` states, without its checksum.

    Raises:
        ValueError: it is no saved base, one of another version, or a damaged one.
    """
    try:
        with open(path / SETTINGS_FILE, "rb") as file:
            stated = json.loads(file.read(MOST_SETTINGS_BYTES))
    except (OSError, ValueError, RecursionError):
        stated = {}
    found = stated.get("format") if isinstance(stated, dict) else None
    if not isinstance(found, str) or not re.fullmatch(r"perplexity base \d{1,3}", found):
        raise ValueError(
            f"{path} is no saved base, or a damaged one: {SETTINGS_FILE} there does not state the "
            f"format {FORMAT!r}. save_base writes one; the name or the directory of a model goes "
            "to base_id=."
        )
    if found != FORMAT:
        raise ValueError(
            f"The base at {path} was saved by another version of this library, in the format "
            f"{found!r} instead of {FORMAT!r}. Delete it, and save it again."
        )
    if stated.pop("checksum", None) != _settings_checksum(stated):
        raise damaged(path, f"{SETTINGS_FILE} does not fit its checksum")
    wrong = _wrong_settings(stated)
    if wrong:
        raise damaged(path, f"{SETTINGS_FILE} has no valid {', '.join(wrong)}")
    return stated


def _wrong_settings(stated: dict) -> list[str]:
    """The names of the settings that `BaseWriter` does not write so."""

    def is_count(value) -> bool:
        return type(value) is int and 0 < value < 2**63

    def are_plain(values) -> bool:
        return isinstance(values, dict) and all(
            re.fullmatch("[a-z_]{1,40}", name)
            and (value is None or isinstance(value, str | int | float))
            for name, value in values.items()
        )

    def is_transform(values) -> bool:
        if not isinstance(values, dict) or values.keys() != vars(LogitTransform()).keys():
            return False
        try:
            LogitTransform(**values)
            return all(value is None or float(value) > 0 for value in values.values())
        except (ValueError, OverflowError):
            return False

    valid = {
        "format": lambda value: value == FORMAT,
        "model": lambda value: are_plain(value) and isinstance(value.get("model"), str),
        "reading": lambda value: are_plain(value) and is_count(value.get("window")),
        "kind": lambda value: value in ("hidden", "logits"),
        "transform": is_transform,
        "vocab_size": is_count,
        "num_texts": lambda value: value is None or is_count(value),
    }
    return [name for name, is_valid in valid.items() if not is_valid(stated.get(name, ""))]


def _row_size(path: Path, stated: dict) -> int:
    """How many numbers a row of a base has: those that its output layer takes, or logits.

    Raises:
        ValueError: the layer is not there, or does not fit the vocabulary.
    """
    if stated["kind"] == "logits":
        return stated["vocab_size"]
    if stated["num_texts"] is None and not (path / LAYER_FILE).exists():
        raise ValueError(f"The base at {path} is not complete. {CONTINUE}")
    tensors = _tensors(path / LAYER_FILE)
    shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    hidden_size = (*shapes.get("weight", ()), 0, 0)[1]
    vocab_size = stated["vocab_size"]
    expected = {"weight": (vocab_size, hidden_size), "bias": (vocab_size,)}
    if "weight" not in shapes or any(expected.get(n) != shapes[n] for n in shapes):
        raise damaged(
            path,
            f"{LAYER_FILE} must hold a weight (vocab_size, hidden_size), perhaps with a bias, "
            f"for a vocabulary of {vocab_size} ids",
        )
    return hidden_size


def _places(path: Path, num_texts: int | None, row_size: int) -> list[_Place]:
    """The place of each text, by its number; of all texts, where their number is known.

    Args:
        row_size: how many numbers a row has.
    """
    places: list[_Place] = []
    missing = "a part of its texts is missing, from number {} on"
    for file in sorted(path.glob("texts-*.safetensors")):
        if file.name != f"texts-{len(places):09d}.safetensors":
            raise damaged(path, missing.format(len(places)))
        tensors = _tensors(file)
        _check_shapes(tensors, file, row_size)
        start = 0
        counts = tensors.get_tensor("counts").tolist()
        if min(counts) < 0 or sum(counts) != tensors.get_slice("ids").get_shape()[0]:
            raise damaged(path, f"the counts in {file.name} do not add up to its rows")
        known = tensors.get_tensor("fingerprints").tolist()
        for count, known_ids in zip(counts, known, strict=True):
            places.append(_Place(file, start, start + count, known_ids))
            start += count
    if num_texts is not None and len(places) != num_texts:
        raise damaged(path, missing.format(len(places)))
    return places


def _check_shapes(tensors: safe_open, path: Path, row_size: int) -> None:
    """Raises ValueError unless a file of texts has the tensors that `BaseWriter` writes."""
    names = {"rows", *PER_TOKEN, *PER_TEXT}
    if set(tensors.keys()) != names:
        raise damaged(path.parent, f"{path.name} must hold {', '.join(sorted(names))}")
    slices = {name: tensors.get_slice(name) for name in names}
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    (num_rows, *_), (num_texts, *_) = (*shapes["ids"], 0), (*shapes["counts"], 0)
    expected: dict[str, tuple] = dict.fromkeys(PER_TOKEN, (num_rows,))
    expected |= dict.fromkeys(PER_TEXT, (num_texts,))
    expected["rows"] = (num_rows, row_size) if num_rows > 0 else (0,)
    if shapes != expected or num_texts == 0:
        raise damaged(
            path.parent,
            f"{path.name} must hold a row of {row_size} numbers, an id and a place for each token, "
            "and a count and a fingerprint for each text",
        )
    if any(slices[name].get_dtype() != "I64" for name in (*PER_TOKEN, *PER_TEXT)):
        raise damaged(path.parent, f"{path.name} must hold integers of 64 bits, but for its rows")
    if not slices["rows"][:0].is_floating_point():
        raise damaged(path.parent, f"the rows of {path.name} must be floating-point numbers")


def _tensors(path: Path) -> safe_open:
    """An open file of tensors."""
    if not path.is_file():  # a pipe would be waited for
        raise damaged(path.parent, f"{path.name} is missing, or no regular file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise damaged(path.parent, f"{path.name} is no whole file of tensors") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error}.") from error


def _checked_tensors(file: safe_open, path: Path, stated: dict) -> dict[str, torch.Tensor]:
    """All tensors of a file of the base.

    Raises:
        ValueError: they do not fit the file's checksum.
    """
    tensors = {name: file.get_tensor(name) for name in set(file.keys())}
    if (file.metadata() or {}).get("sha256") != _checksum(tensors, path.name, stated):
        raise damaged(path.parent, f"{path.name} does not fit its checksum")
    return tensors


def _checksum(tensors: Mapping[str, torch.Tensor], name: str, stated: dict) -> str:
    """A hash of the tensors of a file, of its name, and of the base's settings, so that the file of
    another base does not fit either."""
    digest = hashlib.sha256(f"{name} {_settings_checksum(stated | {'num_texts': None})}".encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel() > 0:  # an empty one has no bytes to view
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings_checksum(stated: dict) -> str:
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def _write(path: Path, tensors: dict[str, torch.Tensor], stated: dict) -> None:
    """Write a file of tensors with its checksum, which appears when it is complete."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _complete(path) as part:
        save_file(tensors, part, {"sha256": _checksum(tensors, path.name, stated)})


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
