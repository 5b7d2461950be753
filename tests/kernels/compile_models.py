"""``python -m tests.kernels.compile_models ARCH MODEL ...``: compile what the models launch; print it as JSON."""

from __future__ import annotations

import json
import re
import sys
from itertools import product

import torch

import resnet_fused
from benchmarks import shapes
from resnet_fused.commands.cost_machine_code import resources
from resnet_fused.commands.tune_trial import Candidate, rehearse
from resnet_fused.kernels.launch import Call, dry_run, observe
from resnet_fused.plan.problem import Problem

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
TRAINED = ["resnet20", "resnet18", "resnet50", "resnext50_32x4d"]
INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma")


def launches(arch: int, number_format: str, models: list[str], batches: tuple[int, ...], training: bool) -> list[Call]:
    """The distinct kernels of the models, in inference or in a training step, on every road."""
    torch.backends.cudnn.allow_tf32 = number_format == "tf32"
    calls: list[Call] = []
    for road in ("triton", "mixed"):
        with resnet_fused.implementation(road), dry_run(arch), observe(calls.append), torch.set_grad_enabled(training):
            for name, batch in product(models, batches):
                with torch.device("meta"):
                    model = getattr(resnet_fused, name)().train(training)
                    model.to(DTYPES[number_format], memory_format=torch.channels_last)
                    side = shapes.MODELS[name]
                    logits = model(torch.empty(batch, 3, side, side, dtype=DTYPES[number_format]))
                if training:
                    logits.sum().backward()
    return list({call.specialization(): call for call in calls}.values())


def describe(call: Call, arch: int, number_format: str) -> dict:
    compiled = call.compile(arch)
    registers, spilled = resources(compiled)
    return {
        "kernel": call.kernel.__name__,
        "number_format": number_format,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared": compiled.metadata.shared,
        "contracted_sums": contracted_sums(compiled.asm["ptx"]),
        "ptx_instructions": [name for name in INSTRUCTIONS if name in compiled.asm["ptx"]],
        "arguments": {name: value for name, value in call.arguments.items() if isinstance(value, int | str)},
    }


def contracted_sums(ptx: str) -> int:
    """Multiply-adds whose addend came from another lane: each lane of a sum would round a product of its own."""
    exchanged: set[str] = set()
    found = 0
    for line in ptx.splitlines():
        name, _, operands = line.strip().rstrip(";").partition(" ")
        registers = re.findall(r"%\w+", operands)
        if name.startswith("shfl.") or (name.startswith("mov.b") and exchanged & set(registers[1:])):
            exchanged |= set(registers[:2] if operands.strip().startswith("{") else registers[:1])
        elif registers:
            found += name.startswith("fma.") and operands.rpartition(",")[2].strip() in exchanged
            exchanged -= set(registers[:1])
    return found


def main() -> None:
    """Compile what the models launch in inference, and in training those of TRAINED.

    fp16 differs from bf16 in the name of an instruction only, so that one GPU of each kind of tensor core will do. So
    it will for fp32 in training, with tiles that are smaller than those of 16 bits everywhere.
    """
    arch, models = int(sys.argv[1]), sys.argv[2:]
    each_kind = arch in (80, 90)
    # Of a tile with few columns, a thread holds one row.
    narrow = Problem(
        *(2, 9, 8, 16, 16, 3, 3, (1, 1), (1, 1), (1, 1), 1, torch.bfloat16, False, "training", True, False, arch)
    )
    calls = [call for way in ("fused", "mixed") for call in rehearse(narrow, Candidate(way))[0]]
    found = [describe(call, arch, "bfloat16") for call in calls]
    for name in DTYPES:
        if name != "float16" or each_kind:
            found += [describe(call, arch, name) for call in launches(arch, name, models, (1, 64), training=False)]
        if name == "bfloat16":
            trained, batches = (TRAINED, (1, 64)) if each_kind else (TRAINED[:3], (64,))
            found += [describe(call, arch, name) for call in launches(arch, name, trained, batches, training=True)]
        elif name != "float16" and each_kind:
            found += [describe(call, arch, name) for call in launches(arch, name, TRAINED[2:3], (64,), training=True)]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
