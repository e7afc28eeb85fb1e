"""A model is loaded whole, from its own directory, or not at all.

Where a checkpoint lacks a weight, transformers puts random numbers in its place and goes on; a
score would depend on them. What its loading report lists is refused here, but for tensors that hold
nothing learned, and weights that no score depends on. Which arguments name a model is not known
here.
"""

import copy
import itertools
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_peft_available

from ppleval.logits.tensors import is_dtensor
from ppleval.models.language_model import num_embeddings
from ppleval.models.places import NAMES_SHOWN, adapter_settings, base_of_adapter
from ppleval.models.probe import NUM_IDS, random_ids
from ppleval.shown import listed, shown

# Entries of a configuration that transformers hands to the package `kernels`, if it names one.
IMPLEMENTATION = re.compile(r"implementation(_internal)?$")
# A folder that no model has: transformers looks there for an adapter, and loads the base alone.
NO_FOLDER = "without an adapter"


def load_whole(
    auto_class: Any, model_id: str | os.PathLike, where: dict, kwargs: dict, num_ids: int = 0
) -> PreTrainedModel:
    """The model, or the adapter with its base, that `from_pretrained` of the class loads.

    Args:
        auto_class: of transformers, for models of one kind.
        where: the arguments that tell where its files are, which the adapter and its base share.
        kwargs: these and all others of `from_pretrained`.
        num_ids: how many ids the tokenizer has, to which an adapter may have extended its base.

    Raises:
        ValueError: a checkpoint, a base or an adapter lacks weights, or has some of other shapes;
            without trust_remote_code, a configuration that names a kernel; an index that leads out
            of its directory.
    """
    # Shapes that differ are then reported with their names, and refused here.
    kwargs = kwargs | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    adapter_where = where | (kwargs.pop("adapter_kwargs", None) or {})
    base = base_of_adapter(model_id, adapter_where)
    of_weights = model_id if base is None else base
    _check_shards(Path(of_weights, where.get("subfolder") or ""))
    if not kwargs.get("trust_remote_code"):
        _check_kernels(of_weights, where, kwargs)
    if base is None:
        model, report = auto_class.from_pretrained(model_id, **kwargs)
        _check_report(model, report, "its checkpoint")
        return model
    if not is_peft_available():
        raise ValueError("it is an adapter, which needs PEFT: pip install peft")
    # Together they would give the adapter's report only.
    name = kwargs.pop("adapter_name", None)
    model, report = auto_class.from_pretrained(
        base, **kwargs, adapter_kwargs={"subfolder": NO_FOLDER}
    )
    _check_report(model, report, f"the base of its adapter, {shown(base)},")
    if "disk" in getattr(model, "hf_device_map", {}).values():  # transformers drops what goes there
        raise ValueError("its adapter cannot be on disk, where device_map= puts parts of its base")
    known = num_embeddings(model.get_input_embeddings(), model.config)
    is_longer = known < num_ids and _is_of_longer_base(model_id, where, known, num_ids)
    if is_longer:
        _lengthen(model, known, num_ids)
    report = model.load_adapter(
        os.fspath(model_id), name, adapter_kwargs=adapter_where, ignore_mismatched_sizes=True
    )
    _check_report(model, report.to_dict(), "its adapter")
    if is_longer:
        _check_added_ids(model, known, num_ids)
    return model


def _is_of_longer_base(model_id: str | os.PathLike, where: dict, known: int, num_ids: int) -> bool:
    """Whether an adapter was made for its base with `num_ids` embeddings, which now has `known`."""
    from peft.utils import load_peft_weights

    trained = (adapter_settings(model_id, where) or {}).get("trainable_token_indices") or []
    trained = itertools.chain(*trained.values()) if isinstance(trained, dict) else trained
    if any(known <= token_id < num_ids for token_id in trained):
        return True
    weights = load_peft_weights(os.fspath(model_id), device="cpu", **where)
    return any(num_ids in weight.shape for weight in weights.values())


@torch.no_grad()
def _lengthen(model: PreTrainedModel, known: int, num_ids: int) -> None:
    """Give the embeddings and the output layer rows for more ids, as AutoPeftModel does; of NaN, so
    that it shows where the adapter has no numbers for them."""
    model.resize_token_embeddings(num_ids, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for weight in () if layer is None else layer.parameters():
            weight[known:] = torch.nan


@torch.no_grad()
def _check_added_ids(model: PreTrainedModel, known: int, num_ids: int) -> None:
    """Raises ValueError if an adapter does not have all weights of the ids that it adds."""
    added = torch.arange(known, num_ids, device=model.device)
    lost = {
        "embeddings": model.get_input_embeddings()(added),
        "rows of the output layer": _logits(model, known)[..., known:],
    }
    names = [name for name, found in lost.items() if found.isnan().any()]
    if names:
        ids = f"id {known}" if num_ids == known + 1 else f"ids {known} to {num_ids - 1}"
        raise ValueError(
            f"its tokenizer has {ids}, which its base has not, and the adapter does not hold their "
            f"{' and '.join(names)}; PEFT would make them up. Where it was "
            "trained, save what merge_and_unload returns; or pass model=."
        )


def _check_kernels(name: str | os.PathLike, where: dict, kwargs: dict) -> None:
    """Raises ValueError for a configuration that names a kernel of the Hub, which is code.

    transformers would download and run it where the package `kernels` is installed, in some
    versions without `trust_remote_code`. What a user passes in `kwargs` is the user's choice.
    """
    config = kwargs.get("config", name)
    if isinstance(config, PretrainedConfig) or kwargs.get("gguf_file") is not None:
        return
    entries, _ = PretrainedConfig.get_config_dict(config, **where)
    for entry, kernel in _kernels_in(entries):
        raise ValueError(
            f"{shown(entry)} in its config.json names {shown(kernel)}, a kernel on the Hub, which "
            "is code. Delete the entry, or pass trust_remote_code=True if you trust that code"
        )


def _kernels_in(entries: dict, entry: str | None = None) -> Iterator[tuple[str, str]]:
    """The entries of a configuration that name a kernel, as "owner/name", with it.

    Args:
        entry: of which these are the values, one for each part of the model.
    """
    for name, value in entries.items():
        found = str(name) if IMPLEMENTATION.search(str(name)) else entry
        if isinstance(value, dict):
            yield from _kernels_in(value, found)
        elif found is not None and isinstance(value, str) and "/" in value:
            yield found, value


def _check_shards(directory: Path) -> None:
    """Raises ValueError for an index in a directory that names weights outside of it.

    Their files may be links, as in the Hub's cache; those on the Hub are checked by its library.
    """
    for index in sorted(directory.glob("*.index.json")):
        for file in shards_of(index):
            if os.path.isabs(file) or ".." in Path(file).parts:
                raise ValueError(
                    f"{shown(index.name)} leads out of its directory, to {shown(file)}"
                )


def shards_of(index: Path) -> set[str]:
    """The files that a checkpoint's index names; none where it names none, which loading tells."""
    files = entries_of(index).get("weight_map")
    return {str(file) for file in files.values()} if isinstance(files, dict) else set()


def entries_of(path: Path) -> dict:
    """What a JSON file holds; nothing without one that can be read and holds an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_report(model: PreTrainedModel, report: dict[str, Collection], owner: str) -> None:
    """Raises ValueError where transformers reports that `owner` lacks weights."""
    missing = _unshared(model, sorted(report["missing_keys"]))
    if all(_is_computed(model, name) for name in missing) or _are_idle(model, missing):
        missing = []
    mismatched = [
        f"{name} ({_shape(saved)}, not {_shape(expected)})"
        for name, saved, expected in sorted(report["mismatched_keys"])
    ]
    if missing or mismatched:
        unknown = sorted(report["unexpected_keys"])
        raise ValueError(_does_not_fit(model, owner, missing, mismatched, unknown))


def _unshared(model: PreTrainedModel, missing: list[str]) -> list[str]:
    """Those that are not also there under another name, as PEFT's tokens of tied layers are."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(weight) for name, weight in weights.items() if name not in missing}
    return [name for name in missing if id(weights.get(name)) not in loaded]


def _does_not_fit(
    model: PreTrainedModel,
    owner: str,
    missing: list[str],
    mismatched: list[str],
    unknown: list[str],
) -> str:
    """One line: what is wrong with the weights of `owner`, why that may be, and what to do."""
    kind = type(model).__name__
    found = [
        f"{len(names)} {what} ({listed(names, NAMES_SHOWN)})"
        for what, names in (
            ("missing", missing),
            ("of another shape", mismatched),
            ("of names that it does not know", unknown),
        )
        if names
    ]
    message = (
        f"{owner} does not have all weights of {kind}, and transformers would put random numbers "
        f"in their place: {', '.join(found)}. "
    )
    saved = getattr(model.config, "architectures", None) or [kind]
    if kind not in saved:
        message += f"Its configuration says that it was saved as {listed(saved, NAMES_SHOWN)}. "
    return f"{message}Save it whole with save_pretrained, or complete it yourself and pass model=."


def _shape(sizes: Collection[int]) -> str:
    return "x".join(map(str, sizes))


@torch.no_grad()
def _is_computed(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor follows from the configuration, as sinusoidal positions and masks do.

    Made again it is the same; and not one number throughout, as norms and biases are made.
    """
    owner_name, _, own_name = name.rpartition(".")
    if not owner_name:
        return False
    found = getattr(model.get_submodule(owner_name), own_name)
    if found.is_meta or is_dtensor(found) or bool((found == found.flatten()[0]).all()):
        return False
    remade = copy.deepcopy(model.get_submodule(owner_name))
    getattr(remade, own_name).zero_()
    with torch.random.fork_rng():
        _innermost(model, owner_name)._init_weights(remade)
    return torch.equal(getattr(remade, own_name), found)


def _innermost(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost of the models around a module, which knows how its weights are made."""
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)]
    return [module for module in around if isinstance(module, PreTrainedModel)][-1]


@torch.no_grad()
def _are_idle(model: PreTrainedModel, names: list[str]) -> bool:
    """Whether the logits are the same with NaN for these weights, as for a pooler's.

    Not asked of layers, experts and whatever else stands in a list: which of them run may depend on
    the text.
    """
    if any(_is_in_list(model, name) for name in names):
        return False
    state = model.state_dict()
    weights = [state[name] for name in names]
    if any(w.is_meta or is_dtensor(w) or not w.is_floating_point() for w in weights):
        return False
    kept = [weight.clone() for weight in weights]
    try:
        num_ids = num_embeddings(model.get_input_embeddings(), model.config)
        before = _logits(model, num_ids)
        for weight in weights:
            weight.fill_(torch.nan)
        return torch.equal(_logits(model, num_ids), before)
    except (RuntimeError, ValueError, TypeError):  # does not read ids alone
        return False
    finally:
        for weight, values in zip(weights, kept, strict=True):
            weight.copy_(values)


def _is_in_list(model: PreTrainedModel, name: str) -> bool:
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))
    return any(isinstance(module, (nn.ModuleList, nn.ModuleDict)) for module in around)


def _logits(model: Any, num_ids: int) -> torch.Tensor:
    """Of some of the first `num_ids` ids, which the decoder of an encoder-decoder reads as well."""
    ids = random_ids(NUM_IDS // 2, num_ids, num_rows=1)
    inputs = {"input_ids": ids.to(model.device)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model(**inputs).logits
