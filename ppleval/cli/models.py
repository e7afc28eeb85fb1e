"""How the command loads models: its options -> the arguments of `Perplexity` -> a scorer."""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ppleval.texts.compare import ByteComparer, TextComparer
    from ppleval.texts.engine import TextScorer
# What --quantization takes, and the package that it needs.
QUANTIZATIONS = {
    "bnb-8bit": "bitsandbytes",
    "bnb-4bit": "bitsandbytes",
    "torchao-int8": "torchao",
}


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add these options to the parser's."""
    group.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="round the weights when they are loaded [no]"
    )
    group.add_argument(
        "--device-map",
        metavar="MAP",
        help="spread the model over this process's cards, such as auto",
    )
    group.add_argument(
        "--tensor-parallel", type=int, metavar="N", help="share each copy among N processes [1]"
    )


@contextlib.contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Where a model is loaded: transformers shows its bars on a terminal, and nowhere else."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def placing_kwargs(args: argparse.Namespace, num_processes: int) -> dict:
    """The arguments of `from_pretrained` that place a model.

    Raises:
        ValueError: processes and options that do not go together.
    """
    if args.device_map is not None:
        if num_processes > 1:
            raise ValueError(
                "--device-map gives one process all cards; here are "
                f"{num_processes} processes. Start one, or use --tensor-parallel {num_processes}."
            )
        return {"device_map": args.device_map}
    size = args.tensor_parallel
    if size in (None, 1):
        return {}
    if num_processes % size > 0:
        raise ValueError(
            f"--tensor-parallel {size} needs a number of processes that it divides, here it is "
            f"{num_processes}. Start them by torchrun --nproc-per-node {size} -m "
            "ppleval ..."
        )
    # transformers' DistributedConfig.
    return {"distributed_config": {"tp_size": size, "dp_replicate_size": num_processes // size}}


def quantization_kwargs(
    args: argparse.Namespace, placing: dict, device: "torch.device | str | None"
) -> dict:
    """The arguments of `from_pretrained` that round a model's weights, and place it.

    Args:
        placing: those that place it, if there are any.
        device: where it is without them; None for CUDA where there is one, else the CPU.

    Raises:
        ModuleNotFoundError: without the package that does it.
    """
    name = args.quantization
    if name is None:
        return {}
    package = QUANTIZATIONS[name]
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"--quantization {name} needs {package}: pip install {package}")
    import torch  # here, so that --help answers at once

    # A quantised model is not moved, and transformers leaves one of torchao on the CPU.
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    placing = placing or {"device_map": {"": str(device)}}
    return {"quantization_config": _quantization(name, args.dtype), **placing}


def _quantization(name: str, dtype: str | None) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "bnb-4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype or "bfloat16",
        )
    # An optional package, which need not be there where types are checked.
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

    return TorchAoConfig(Int8WeightOnlyConfig())


def model_options(
    args: argparse.Namespace, placing: dict, device: "torch.device | None" = None
) -> dict[str, Any]:
    """The arguments of `Perplexity` that all commands give.

    Args:
        placing: those of `from_pretrained` that place the model.
        device: where it is without --device.
    """
    named = {"dtype": args.dtype, "revision": args.revision}
    model_kwargs = {name: value for name, value in named.items() if value is not None}
    device = device if args.device is None else args.device
    return {
        "model_id": args.model,
        "device": device,
        "model_kwargs": model_kwargs | placing | quantization_kwargs(args, placing, device),
        "trust_remote_code": args.trust_remote_code,
        "preset": args.preset,
        "window": args.window,
        "stride": args.stride,
        "max_length": args.max_length,
        "add_start_token": not args.no_start_token,
        "chat_template": None if args.chat_template is None else template(args.chat_template),
    }


def template(path: Path) -> str:
    """The text of a chat template."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--chat-template {path} is not UTF-8 text: {error}.") from error


def load_scorer(
    args: argparse.Namespace, options: dict[str, Any], num_processes: int
) -> "TextScorer":
    """The scorer of `ppleval compute`."""
    from ppleval.metric import Perplexity  # with torch

    return Perplexity().text_scorer(sync=num_processes > 1, **options)


def load_comparer(
    args: argparse.Namespace, options: dict[str, Any], num_processes: int
) -> "TextComparer | ByteComparer":
    """The comparer of `ppleval compare`, with a base that is saved or loaded, too."""
    from ppleval.metric import Perplexity
    from ppleval.models.saved_base import SavedBase

    base: dict[str, Any] = {"base": args.base}
    if not SavedBase.is_at(args.base):
        base = {"base_id": args.base, "base_kwargs": placing_kwargs(args, num_processes)}
    return Perplexity().text_comparer(sync=num_processes > 1, **base, **options)
