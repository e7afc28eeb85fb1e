"""Where the name of a model leads: to a directory, to an adapter and its base, or to the Hub; and
what is wrong there, told before anything is loaded."""

import json
import os
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from ppleval.shown import listed

ADAPTER_CONFIG = "adapter_config.json"
# One of these is in every directory with a tokenizer.
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json",
    "vocab.txt",
)  # fmt: skip
SECONDS_FOR_HUB = 5  # to answer at all
NAMES_SHOWN = 5  # of files or tensors in an error
HOW_TO_LOAD_GGUF = (
    "Pass the directory of the checkpoint that it was made of; or load it yourself, by "
    "AutoModelForCausalLM.from_pretrained(directory, gguf_file=name), and so the tokenizer, and "
    "pass model= and tokenizer=."
)
# Arguments of `cached_file` with which it returns None where there is nothing.
QUIET = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def check_place(model_id: str | os.PathLike, where: dict) -> None:
    """Raises ValueError, which says why, if nothing can be loaded from there.

    Args:
        model_id: a name on the Hub, or a directory.
        where: the arguments that tell where its files are, such as `subfolder`.
    """
    name = os.fspath(model_id)
    if not os.path.isdir(name):
        _check_name(name, where)
        return
    directory = os.path.join(name, where.get("subfolder") or "")
    if not os.path.isdir(directory):
        raise ValueError(f"{no_directory(directory)}.")
    files = sorted(entry.name for entry in os.scandir(directory))
    if ADAPTER_CONFIG not in files and "config.json" not in files:
        raise ValueError(_holds_no_model(directory, files))
    base = base_of_adapter(model_id, where)
    if base is not None and not _may_be_there(os.fspath(base), where):
        raise ValueError(_has_lost(os.fspath(base)))


def no_directory(name: str) -> str:
    """The words for a directory that does not exist, with the place that was looked at."""
    return f"there is no directory {os.path.abspath(name)}"


def _check_name(name: str, where: dict) -> None:
    """Raises ValueError for a name that is no directory, and cannot be on the Hub either."""
    if os.path.isfile(name):
        directory = os.path.dirname(os.path.abspath(name))
        raise ValueError(
            f"it is a GGUF file. {HOW_TO_LOAD_GGUF}"
            if name.endswith(".gguf")
            else f"it is a file. Pass the directory that it is in, {directory}."
        )
    if name.startswith("~"):
        raise ValueError(f"~ is not expanded here. Pass {os.path.expanduser(name)}.")
    if _is_path(name):
        raise ValueError(
            f"{no_directory(name)}. Pass one that exists, or a name on the Hub, such as "
            "openai-community/gpt2."
        )
    if not _may_be_there(name, where):
        raise ValueError(f"{no_directory(name)}, and the Hub, where it might be, does not answer.")


def _holds_no_model(directory: str, files: list[str]) -> str:
    advice = "Pass the directory that save_pretrained wrote, such as a Trainer's checkpoint-500."
    if any(file.endswith(".gguf") for file in files):
        advice = f"GGUF is read in another way. {HOW_TO_LOAD_GGUF}"
    return (
        f"{os.path.abspath(directory)} has neither config.json, as a model has, nor "
        f"{ADAPTER_CONFIG}; it holds {listed(files, NAMES_SHOWN) if files else 'nothing'}. {advice}"
    )


def _has_lost(base: str) -> str:
    return (
        f"it is an adapter, and its base is gone: {no_directory(base)}. Put it there, or write "
        f"where it is into {ADAPTER_CONFIG}, as base_model_name_or_path."
    )


def _may_be_there(name: str, where: dict) -> bool:
    """Whether this is a directory, or may be a name on the Hub.

    Of one that begins like a path here the Hub is asked first: where it cannot be reached,
    transformers would ask it for one file after the other, and wait for each.
    """
    if os.path.isdir(name):
        return True
    if _is_path(name):
        return False
    return not os.path.isdir(os.path.dirname(name)) or _may_be_on_hub(name, where)


def _is_path(name: str) -> bool:
    """Whether this can only be a path: on the Hub there are a name, or an owner and a name."""
    is_path = os.path.isabs(name) or name.startswith(".") or name.endswith("/")
    return is_path or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def _may_be_on_hub(name: str, where: dict) -> bool:
    """Whether the Hub's cache has it, or the Hub answers, which says more when it is loaded."""
    folder = repo_folder_name(repo_id=name, repo_type="model")
    if os.path.isdir(os.path.join(where.get("cache_dir") or constants.HF_HUB_CACHE, folder)):
        return True
    if where.get("local_files_only"):
        return False
    try:
        HfApi().model_info(name, timeout=SECONDS_FOR_HUB, token=where.get("token"))
    except HfHubHTTPError:  # an answer
        return True
    except Exception:  # those of the network are of whichever HTTP library is used
        return False
    return True


def adapter_settings(model_id: str | os.PathLike, where: dict) -> dict | None:
    """What the configuration of an adapter says; None where `model_id` names no adapter.

    Raises:
        ValueError: the file cannot be read.
    """
    path = find_adapter_config_file(os.fspath(model_id), **where)
    if path is None:
        return None
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no JSON object")
    return settings


def base_of_adapter(model_id: str | os.PathLike, where: dict) -> str | os.PathLike | None:
    """The model that an adapter changes: of a directory that holds both the same one, else the one
    that its configuration names. None where `model_id` names no adapter.

    Raises:
        ValueError: the configuration names none, or a directory that is gone, or cannot be read.
    """
    settings = adapter_settings(model_id, where)
    if settings is None:
        return None
    if Path(model_id, where.get("subfolder", ""), "config.json").is_file():
        return model_id
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(
            f"base_model_name_or_path in its {ADAPTER_CONFIG} names no base; write there which "
            "model it was trained on"
        )
    if _is_path(base) and not os.path.isdir(base):
        raise ValueError(_has_lost(base))
    return base


def has_tokenizer(model_id: str | os.PathLike, where: dict) -> bool:
    """Whether there are files of a tokenizer."""
    name = os.fspath(model_id)
    return any(cached_file(name, file, **where, **QUIET) is not None for file in TOKENIZER_FILES)
