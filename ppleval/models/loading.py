"""Where a model comes from: the arguments that name it, how it is loaded, the one that is kept."""

import contextlib
import functools
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from ppleval.distributed import Processes
from ppleval.logits.threads import use_one_thread_after_fork
from ppleval.models.kinds import CausalModel, Seq2SeqModel
from ppleval.models.language_model import (
    LanguageModel,
    check_model,
    check_tokenizer,
    tokenizer_errors,
)
from ppleval.models.places import (
    ADAPTER_CONFIG,
    base_of_adapter,
    check_place,
    has_tokenizer,
    no_directory,
)
from ppleval.models.probe import HINT_AT_PSEUDO
from ppleval.models.saved_base import check_saved
from ppleval.models.weights import load_whole, shards_of
from ppleval.shown import listed, shown, shown_message

# What places a model, so that it is not moved.
PLACING_KWARGS = {"device_map", "quantization_config", "tp_plan", "tp_size", "distributed_config"}
# What damaged files raise -> what is wrong, where the error does not say it or gives bad advice.
DAMAGES = {
    SafetensorError: "a file of its weights is damaged, or was not copied whole",
    EOFError: "a file of its weights is empty, or was not copied whole",
    pickle.UnpicklingError: "a file of its weights is damaged, or a pickle that would run code, "
    "which is never done; use one that was saved as .safetensors",
    RecursionError: "a JSON file of it is nested too deeply",
}
# What a model and its tokenizer are both loaded with.
SHARED_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
# With these the files of the directory are others, or not needed.
OWN_FILES = {"config", "gguf_file"}
# Hundreds of names, in errors of transformers.
LONG_LIST = re.compile(r"[\w./'\"-]+(, [\w./'\"-]+){20,}")


@dataclass(frozen=True)
class ModelSource:
    """The arguments that name a model: `model_id`, which is loaded, or `model` and `tokenizer`.

    model_id: a name on the Hub, in its cache, or a directory.
    model, tokenizer: objects of transformers, used as and where they are. A tokenizer beside
        `model_id` takes the place of the model's own.
    device: whatever torch takes; "gpu" for "cuda". None for CUDA where there is one, else the CPU.
        Not used where `model_kwargs` place the model (PLACING_KWARGS).
    model_kwargs: passed to `from_pretrained` of the model's class.
    trust_remote_code: whether code that comes with the model may run.

    Raises:
        TypeError, ValueError: arguments that do not name one model, or do not go together.
    """

    model_id: str | os.PathLike | None = None
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    device: str | torch.device | None = None
    model_kwargs: dict | None = None
    trust_remote_code: bool = False
    argument: ClassVar[str] = "model_id"  # as errors name it

    def __post_init__(self) -> None:
        if (self.model_id is None) == (self.model is None):
            raise ValueError("Pass either model_id=, or model= and tokenizer=.")
        if self.model_id is not None and not isinstance(self.model_id, (str, os.PathLike)):
            raise TypeError(
                f"model_id must be a name or a path, got {type(self.model_id).__name__}. A model "
                "that is loaded goes to model=, with its tokenizer to tokenizer=."
            )
        if self.model is not None and (self.device is not None or self.model_kwargs):
            raise ValueError(
                "device= and model_kwargs= go with model_id=; model= is used as it is."
            )
        if not isinstance(self.model_kwargs, dict | None):
            raise TypeError(
                "model_kwargs must be a dict, such as {'dtype': 'bfloat16'}, got "
                f"{self.model_kwargs!r}."
            )

    def key(self) -> tuple:
        """Equal for sources that give the same model; it changes when its files do."""
        if self.model_id is None:
            return id(self.model), id(self.tokenizer)
        return (
            self.model_id,
            id(self.tokenizer),
            str(self.device),
            repr(sorted(self._kwargs.items())),
            self.trust_remote_code,
            *map(_files_of, self._directories()),
        )

    def _directories(self) -> list[str]:
        """Where the files are that are loaded: in the named directory, and that of an adapter's
        base."""
        own = self._kwargs.get("subfolder")
        of_adapter = (self._kwargs.get("adapter_kwargs") or {}).get("subfolder", own)
        found: list[str] = []
        roots: list[str | os.PathLike] = [self.model_id or ""]
        while roots:
            root = roots.pop()
            for subfolder in sorted({own or "", of_adapter or ""}):
                directory = os.path.realpath(os.path.join(root, subfolder))
                if directory in found:
                    continue
                found.append(directory)
                if os.path.exists(os.path.join(directory, ADAPTER_CONFIG)):
                    roots += _local_base(directory)
        return found

    @property
    def _kwargs(self) -> dict:
        return self.model_kwargs or {}

    def check(self) -> None:
        """Check what can be told before the model is loaded.

        Raises:
            TypeError: an object that is no model or no tokenizer.
            ValueError: there is no model at that place, or no such device or dtype.
        """
        if self.model is not None:
            check_model(self.model)
        if self.model is not None or self.tokenizer is not None:
            check_tokenizer(self.tokenizer, model=self.model)
        if self.model_id is None:
            return
        with self._naming_it():
            if not OWN_FILES & set(self._kwargs):
                check_place(self.model_id, self._where())
            if not PLACING_KWARGS & set(self._kwargs):
                torch.empty(0, device=self._placed_on)
            _check_dtype(self._kwargs.get("dtype"))

    @property
    def _placed_on(self) -> str | torch.device:
        """The device that the model is moved to."""
        if self.device is None:
            return "cuda" if torch.cuda.is_available() else "cpu"
        return "cuda" if self.device == "gpu" else self.device

    @contextlib.contextmanager
    def _naming_it(self, kind: type[LanguageModel] | None = None) -> Iterator[None]:
        """Raises ValueError, with the whole reason and what to do, where something cannot be loaded
        as a model of this kind."""
        try:
            yield
        # Damaged files, or an unknown model, dtype, device or token, raise whatever they happen to.
        except Exception as error:
            as_kind = "" if kind is None else f" as a {kind.kind}"
            hints = [] if kind is None else list(self._hints(kind))
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = LONG_LIST.sub(lambda names: listed(names[0].split(", ")), reason)
            reason = DAMAGES.get(type(error), reason)
            whole = " ".join([f"{reason.removesuffix('.')}." if hints else reason, *hints])
            raise ValueError(
                f"{self.argument}={shown(repr(self.model_id))} could not be loaded{as_kind}: "
                f"{shown_message(whole)}"
            ) from error

    def kind(self, kinds: Sequence[type[LanguageModel]]) -> type[LanguageModel]:
        """Which of the kinds the model is: an encoder-decoder if its configuration says so and that
        is one of them, else the first, which `load` and then the kind itself check.

        Raises:
            ValueError: an encoder-decoder, which is not among the kinds.
        """
        config = self._config()
        if not getattr(config, "is_encoder_decoder", False):
            return kinds[0]
        if Seq2SeqModel not in kinds:
            name = self.model_id or getattr(config, "name_or_path", "") or type(self.model).__name__
            raise ValueError(
                f"{shown(name)} is an encoder-decoder; a {kinds[0].kind} is needed here."
            )
        return Seq2SeqModel

    def _config(self) -> PretrainedConfig | None:
        """The configuration of the model, or of an adapter's base; None where there is none."""
        if self.model_id is None:
            return getattr(self.model, "config", None)
        if "config" in self._kwargs:
            return self._kwargs["config"]
        try:
            return AutoConfig.from_pretrained(
                base_of_adapter(self.model_id, self._where()) or self.model_id,
                trust_remote_code=self.trust_remote_code,
                **self._shared_kwargs(),
            )
        except Exception:  # `load` tells what is wrong, if anything is
            return None

    @property
    def name(self) -> str | None:
        """What is loaded, with its revision; None for `model=`."""
        if self.model_id is None:
            return None
        revision = self._kwargs.get("revision")
        return str(self.model_id) if revision is None else f"{self.model_id}@{revision}"

    def load(
        self, kind: type[LanguageModel], check: Callable[[PreTrainedTokenizerBase], None]
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer, which `check` looks at before the model is loaded.

        Raises:
            ValueError: the model or its tokenizer cannot be loaded, or is of another kind.
        """
        if self.model_id is None:
            assert self.model is not None  # as checked
            assert self.tokenizer is not None
            return self.model, self.tokenizer
        use_one_thread_after_fork()  # transformers loads weights in threads of its own
        with self._naming_it(kind):
            tokenizer = self.tokenizer
            if tokenizer is None:  # one without any token is not true
                tokenizer = self._load_tokenizer(self.model_id)
        check(tokenizer)
        with self._naming_it(kind):
            return self._load_model(self.model_id, kind, len(tokenizer)), tokenizer

    def _load_tokenizer(self, model_id: str | os.PathLike) -> PreTrainedTokenizerBase:
        """The tokenizer of the model; of an adapter without one that of its base."""
        places = [(model_id, self._shared_kwargs())]
        base = base_of_adapter(model_id, self._where())
        if base is not None:
            places += [(model_id, self._where()), (base, self._shared_kwargs())]
        name, where = next((place for place in places if has_tokenizer(*place)), places[0])
        with tokenizer_errors():
            return AutoTokenizer.from_pretrained(
                name, trust_remote_code=self.trust_remote_code, **where
            )

    def _shared_kwargs(self) -> dict:
        return {name: self._kwargs[name] for name in SHARED_KWARGS if name in self._kwargs}

    def _where(self) -> dict:
        """Where the files are that are named; of an adapter's base they may be elsewhere."""
        return self._shared_kwargs() | (self._kwargs.get("adapter_kwargs") or {})

    def _load_model(
        self, model_id: str | os.PathLike, kind: type[LanguageModel], num_ids: int
    ) -> PreTrainedModel:
        kwargs = self._kwargs | {"trust_remote_code": self.trust_remote_code}
        model = load_whole(kind.auto_class, model_id, self._shared_kwargs(), kwargs, num_ids)
        if not PLACING_KWARGS & set(self._kwargs):
            # transformers declares `to` without its `self`.
            model.to(self._placed_on)  # pyright: ignore[reportArgumentType]
        return model

    def _hints(self, kind: type[LanguageModel]) -> Iterator[str]:
        """What may help where the model cannot be loaded."""
        assert self.model_id is not None
        name = os.fspath(self.model_id)
        if kind is CausalModel and type(self._config()) in MODEL_FOR_MASKED_LM_MAPPING:
            yield HINT_AT_PSEUDO
        if not os.path.isdir(name):
            yield f"On this machine {no_directory(name)}."
        elif self.tokenizer is None and not has_tokenizer(name, self._shared_kwargs()):
            yield "It has no tokenizer: save one there by save_pretrained, or pass tokenizer=."


class _BaseModelSource(ModelSource):
    argument = "base_id"


@dataclass(frozen=True)
class BaseSource:
    """The arguments that name the base of a comparison: `base_id`, which is loaded, or `base`.

    base_id: as `model_id`.
    base: an object of transformers, or the path of a base that `save_base` wrote.
    base_tokenizer: that of the base; by default its own, or for an object that of the model.
    base_device, base_kwargs: as `device` and `model_kwargs`; the device is by default the same.

    Raises:
        TypeError, ValueError: arguments that do not name one base.
    """

    base_id: str | os.PathLike | None = None
    base: PreTrainedModel | str | os.PathLike | None = None
    base_tokenizer: PreTrainedTokenizerBase | None = None
    base_device: str | torch.device | None = None
    base_kwargs: dict | None = None

    def __post_init__(self) -> None:
        if (self.base_id is None) == (self.base is None):
            raise ValueError(
                "A comparison needs a base: pass base_id= (a name or a directory), or base= (a "
                "model, or the path that save_base wrote)."
            )
        if self.base is not None and (self.base_device is not None or self.base_kwargs):
            raise ValueError(
                "base_device= and base_kwargs= go with base_id=; base= is used as it is."
            )

        if not isinstance(self.base_kwargs, dict | None):
            raise TypeError(
                "base_kwargs must be a dict, such as {'dtype': 'bfloat16'}, got "
                f"{self.base_kwargs!r}."
            )
        if self.saved is not None and self.base_tokenizer is not None:
            raise ValueError(
                "base_tokenizer= does not go with a saved base, which holds token ids."
            )

    @property
    def saved(self) -> str | os.PathLike | None:
        """The path of a saved base."""
        return self.base if isinstance(self.base, (str, os.PathLike)) else None

    def check(self) -> None:
        """Check what can be told before a model is loaded.

        Raises:
            TypeError: an object that is no model or no tokenizer.
            ValueError: there is no model, or no saved base, at that place.
        """
        if self.base_tokenizer is not None:
            check_tokenizer(self.base_tokenizer, "base_tokenizer")
        if self.saved is not None:
            check_saved(self.saved)
        elif self.base is not None:
            check_model(self.base, "base")
        else:
            _BaseModelSource(
                self.base_id, device=self.base_device, model_kwargs=self.base_kwargs
            ).check()

    def model_source(self, model: ModelSource, tokenizer: PreTrainedTokenizerBase) -> ModelSource:
        """Where the base comes from, beside this model with its tokenizer."""
        device = model.device if self.base_device is None else self.base_device
        uses_that_of_model = self.base_tokenizer is None and self.base is not None
        assert not isinstance(self.base, (str, os.PathLike))  # that is `saved`
        return _BaseModelSource(
            model_id=self.base_id,
            model=self.base,
            tokenizer=tokenizer if uses_that_of_model else self.base_tokenizer,
            device=None if self.base_id is None else device,
            model_kwargs=self.base_kwargs,
            trust_remote_code=model.trust_remote_code,
        )


def _check_dtype(dtype) -> None:
    """Raises ValueError for the name of a dtype that torch does not have."""
    if isinstance(dtype, str) and dtype != "auto" and not hasattr(torch, dtype):
        raise ValueError(f"there is no dtype {dtype}. Pass one of torch's, such as bfloat16.")


def split_names(arguments: dict, *kinds: type) -> tuple[dict, ...]:
    """The arguments that are fields of each dataclass, and the others."""
    found, others = [], dict(arguments)
    for kind in kinds:
        own = {}
        for field in fields(kind):
            if field.name in arguments:
                own[field.name] = arguments[field.name]
                others.pop(field.name, None)
        found.append(own)
    return *found, others


def _files_of(directory: str) -> tuple:
    """The directory of a model, and path, size and time of its files; empty for a Hub name."""
    if not os.path.isdir(directory):
        return ()
    folders = {directory, os.path.join(directory, CHAT_TEMPLATE_DIR), *_shard_folders(directory)}
    found = []
    try:
        for folder in filter(os.path.isdir, folders):
            for entry in filter(os.DirEntry.is_file, os.scandir(folder)):
                stat = entry.stat()
                found.append((entry.path, stat.st_size, stat.st_mtime_ns))
    except OSError:  # not readable, or rewritten at this moment
        return ()
    return directory, *sorted(found)


def _shard_folders(directory: str) -> Iterator[str]:
    """Where a checkpoint's index says that its shards are."""
    for index in Path(directory).glob("*.index.json"):
        for shard in shards_of(index):
            yield os.path.join(directory, os.path.dirname(shard))


def _local_base(directory: str) -> Iterator[str | os.PathLike]:
    """The model that the adapter in a directory belongs to; nothing where it names none."""
    with contextlib.suppress(OSError, ValueError):  # `load` tells what is wrong
        base = base_of_adapter(directory, {})
        if base is not None:
            yield base


# Looks at a model's kind and its tokenizer before the model is loaded.
Check = Callable[[type[LanguageModel], PreTrainedTokenizerBase], None]


class KeptModel:
    """The last model that was asked for, loaded and probed once. Threads may ask at once."""

    def __init__(self):
        self._kept: tuple[tuple, LanguageModel] | None = None  # with the key of its source

    def get(
        self,
        source: ModelSource,
        processes: Processes,
        check: Check,
        kinds: tuple[type[LanguageModel], ...] = (CausalModel,),
    ) -> LanguageModel:
        """The model of `source`: the kept one if it is the same, else a new one, kept from now on.

        Args:
            processes: those that will share texts. If one of them has no model, all get an error.
            check: raises an error for a model that would be of no use; called before it is loaded.
            kinds: which it may be; the first, unless its configuration tells another.

        Raises:
            TypeError, ValueError: a model that cannot be loaded or used.
            ConnectionError: another process refused its model.
        """
        key = source.key()
        kept = self._kept  # read once: another thread may ask for another model meanwhile
        known = kept[1] if kept is not None and kept[0] == key else None
        known = known if isinstance(known, kinds) else None
        # Before the probe, which may run a model that these processes hold together.
        loaded = processes.call_together(self._loaded, source, kinds, known, check)
        if known is None or not known.is_current:
            kind, *parts = loaded
            known = kind(*parts)
            self._kept = key, known
        return known

    def _loaded(
        self,
        source: ModelSource,
        kinds: tuple[type[LanguageModel], ...],
        known: LanguageModel | None,
        check: Check,
    ) -> tuple:
        """The class of the model, and what it is made of: that of the known one, or a new one."""
        if known is not None:
            return type(known), known.model, known.tokenizer, known.name
        source.check()
        kind = source.kind(kinds)
        if source.model is None:
            self._kept = None  # makes room before the next one is loaded
        model, tokenizer = source.load(kind, functools.partial(check, kind))
        return kind, model, tokenizer, source.name
