"""How the command loads a model: options for one that is too large for one card ->
`model_kwargs`."""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
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
