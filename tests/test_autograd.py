"""Training a block: outputs, gradients and running statistics against fp64, for every form of block and road."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_fused import BasicBlock, Bottleneck, ResidualBlock
from tests.training import DEVICE, check, draw

ROADS = ["triton", "mixed"]


def projection(inplanes: int, planes: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def pooled() -> nn.Module:
    """The shortcut of ResNet-D: an average pool in front of the projection."""
    return nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(12, 24, 1, bias=False), nn.BatchNorm2d(24))


BLOCKS = {
    "basic": (lambda: BasicBlock(12, 12), (2, 12, 5, 3)),
    "basic, projection": (lambda: BasicBlock(12, 20, 2, projection(12, 20, 2)), (2, 12, 5, 7)),
    "bottleneck": (lambda: Bottleneck(16, 4), (2, 16, 3, 5)),
    "bottleneck, projection": (lambda: Bottleneck(12, 6, 2, projection(12, 24, 2)), (2, 12, 7, 5)),
    "bottleneck, projection with stride 1": (lambda: Bottleneck(12, 6, 1, projection(12, 24, 1)), (2, 12, 3, 4)),
    "bottleneck, groups": (lambda: Bottleneck(16, 4, groups=4, base_width=64), (2, 16, 3, 4)),
    "bottleneck, dilation": (lambda: Bottleneck(16, 4, dilation=2), (2, 16, 5, 4)),
    "one unit": (lambda: ResidualBlock(16, [(16, 3)]), (2, 16, 5, 3)),
    "four units": (lambda: ResidualBlock(12, [(8, 1), (8, 3), (8, 3), (12, 1)]), (2, 12, 3, 4)),
    "padded identity": (lambda: ResidualBlock(12, [(20, 3), (20, 3)], "pad", stride=2), (2, 12, 5, 7)),
    "5x5 and bias": (
        lambda: ResidualBlock(12, [nn.Conv2d(12, 8, 5, padding=2), nn.Conv2d(8, 12, 1)]),
        (2, 12, 4, 3),
    ),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_training_step_in_fp32(name, road):
    build, shape = BLOCKS[name]
    check(*draw(build, shape, torch.float32), road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["basic, projection", "bottleneck", "bottleneck, projection", "padded identity"])
def test_a_training_step_in_fp16(name, road):
    build, shape = BLOCKS[name]
    check(*draw(build, shape, torch.float16), road)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter cannot do arithmetic in bfloat16")
@pytest.mark.parametrize("road", ROADS)
def test_a_training_step_in_bf16(road):
    for build, shape in BLOCKS.values():
        check(*draw(build, shape, torch.bfloat16), road)
