"""Compile the kernels, as each of their launches would on a GPU, without one; launch nothing.

    export PYTHONPATH=.:tests TRITON_INTERPRET=0
    python tests/workers/compile_kernels.py CAPABILITY DIRECTORY

Prints one line of JSON for each kernel: its loads of 16 bytes, the registers of a thread, and the
bytes of stack, to which a thread spills. DIRECTORY is for what is compiled.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ppleval.logits import outputs as reduction
from ppleval.logits import triton_kernel as nll_triton
from ppleval.logits.outputs import LogitTransform

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

ALIGNED, ODD = 128256, 50257
CASES = {
    "bfloat16, aligned": ((600, ALIGNED), torch.bfloat16, {}),
    "bfloat16, odd": ((600, ODD), torch.bfloat16, {}),
    "float32, aligned": ((600, ALIGNED), torch.float32, {}),
    "float32, odd": ((600, ODD), torch.float32, {}),
    "float16, shared": ((3, ODD), torch.float16, {}),
    "bfloat16, softcap": ((600, ALIGNED), torch.bfloat16, {"transform": LogitTransform(0.5, 30.0)}),
    "bfloat16, probabilities": ((600, ODD), torch.bfloat16, {"from_logits": False}),
    "bfloat16, all outputs": ((600, ALIGNED), torch.bfloat16, {"with_all": True}),
    "float32, all outputs, shared": ((3, ODD), torch.float32, {"with_all": True}),
    "float32, 64 blocks": ((600, 262144), torch.float32, {}),
    "float32, 64 blocks, shared": ((3, 262144), torch.float32, {}),
    "float32, vocabulary of 1": ((2, 1), torch.float32, {}),
    "float32, columns apart": ((600, 1000, 2), torch.float32, {}),
}


class NoGpu:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_by(function) -> list:
    """The kernels that calling `function` would launch."""
    kernels = []
    run = triton.JITFunction.run

    def compile_only(self, *args, **kwargs):
        kernels.append(run(self, *args, **kwargs | {"warmup": True}))

    triton.JITFunction.run = compile_only
    try:
        function()
    finally:
        triton.JITFunction.run = run
    return kernels


def describe(name: str, kernel, directory: Path) -> dict:
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    code = subprocess.run(
        [TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    return {
        "case": name,
        "kernel": kernel.name,
        "wide_loads": len(re.findall(r"LDG\.E\.128", code)),
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "block_layouts": block_layouts(kernel.asm["ttgir"]),
    }


def block_layouts(code: str) -> list[str]:
    """How what is known of 64 blocks is spread over threads where it is added up."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, flags=re.MULTILINE))
    sums = re.findall(r"arith\.addf.*?\}\) : \(tensor<64xf32, (#\w+)>\)", code, flags=re.DOTALL)
    return sorted({layouts[name] for name in sums})


def main(capability: str, directory: str) -> None:
    driver.set_active(NoGpu(int(capability)))
    for name, (shape, dtype, options) in CASES.items():
        logits = torch.empty(shape, dtype=dtype)
        logits = logits[..., 0] if logits.dim() == 3 else logits
        size = len(logits)
        out = reduction.TokenStats.empty(
            size, torch.float32, logits.device, with_all=options.pop("with_all", False)
        )
        targets, scored = torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.bool)
        arguments = (logits, targets, scored, out)
        options = {"from_logits": True} | options
        for kernel in compiled_by(lambda a=arguments, o=options: nll_triton.reduce(*a, **o)):
            print(json.dumps(describe(name, kernel, Path(directory))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
