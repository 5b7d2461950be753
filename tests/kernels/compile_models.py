"""``python -m tests.kernels.compile_models ARCH MODEL ...``: compile what the models launch; print it as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton

import resnet_fused
from resnet_fused.kernels.launch import Call, dry_run, observe

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma")


def launches(arch: int, number_format: str, models: list[str]) -> list[Call]:
    """The distinct kernels of the models at 224x224, for one image and for a batch that fills the GPU."""
    torch.backends.cudnn.allow_tf32 = number_format == "tf32"
    calls: list[Call] = []
    with resnet_fused.implementation("triton"), dry_run(arch), observe(calls.append), torch.inference_mode():
        for name in models:
            with torch.device("meta"):
                model = (
                    getattr(resnet_fused, name)().eval().to(DTYPES[number_format], memory_format=torch.channels_last)
                )
                for batch in (1, 64):
                    model(torch.empty(batch, 3, 224, 224, dtype=DTYPES[number_format]))
    return list({call.specialization(): call for call in calls}.values())


def describe(call: Call, arch: int, number_format: str) -> dict:
    compiled = call.compile(arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True)
    registers = re.search(r"REG:(\d+)", usage.stdout)
    assert registers is not None
    return {
        "number_format": number_format,
        "registers": int(registers[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code.stdout)),
        "shared": compiled.metadata.shared,
        "ptx_instructions": [name for name in INSTRUCTIONS if name in compiled.asm["ptx"]],
        "arguments": {name: value for name, value in call.arguments.items() if isinstance(value, int | str)},
    }


def main() -> None:
    arch, models = int(sys.argv[1]), sys.argv[2:]
    # fp16 differs from bf16 in the name of an instruction only: it is compiled for one GPU of each kind of tensor core.
    formats = [name for name in DTYPES if name != "float16" or arch in (80, 90)]
    kernels = [describe(call, arch, name) for name in formats for call in launches(arch, name, models)]
    json.dump(kernels, sys.stdout)


if __name__ == "__main__":
    main()
