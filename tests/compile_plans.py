"""``python -m tests.compile_plans``: compile the planned kernels of a sample of problems; fails where one does not."""

from __future__ import annotations

import random

import torch

from resnet_fused import functional, implementation
from resnet_fused.kernels.gpus import ARCHITECTURES, gpu_of
from resnet_fused.kernels.launch import FLOATS, Call, dry_run, observe

SAMPLE = 8


def unit(draw: random.Random) -> tuple[torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.Tensor]:
    groups = draw.choice([1, 1, 2, 32])
    ci, co = (groups * draw.randint(1, 256 // groups) for _ in range(2))
    size, dtype = draw.choice([1, 3, 5]), draw.choice(FLOATS)
    with torch.device("meta"):
        conv = torch.nn.Conv2d(ci, co, size, draw.randint(1, 2), draw.randint(0, size), groups=groups, dtype=dtype)
        bn = torch.nn.BatchNorm2d(co)
        x = torch.empty(draw.randint(1, 64), ci, draw.randint(7, 60), draw.randint(7, 60), dtype=dtype)
    return conv, bn, x.requires_grad_()


def main() -> None:
    draw, compiled = random.Random(0), set()
    for i in range(SAMPLE):
        arch, calls = ARCHITECTURES[i % len(ARCHITECTURES)], list[Call]()
        conv, bn, x = unit(draw)
        with implementation("triton"), dry_run(arch), observe(calls.append):
            functional.conv_bn_act(x, conv, bn).sum().backward()
        for call in calls:
            if call.kernel.__name__.startswith("conv_"):
                shared = call.compile(arch).metadata.shared
                assert shared <= gpu_of(arch).shared, (call.kernel.__name__, call.config, shared)
                compiled.add(call.kernel.__name__)
    assert compiled == {"conv_forward_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel"}


if __name__ == "__main__":
    main()
