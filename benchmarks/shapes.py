"""Every distinct convolution of the ResNets for ImageNet and for 32x32 images: one table for every benchmark."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

import resnet_fused

MODELS = {
    "resnet18": 224,
    "resnet34": 224,
    "resnet50": 224,
    "resnet101": 224,
    "resnet152": 224,
    "resnext50_32x4d": 224,
    "wide_resnet50_2": 224,
    "resnet20": 32,
    "resnet32": 32,
    "resnet44": 32,
    "resnet56": 32,
    "resnet110": 32,
}
"""Model names and the side of the images that they are made for."""


@dataclass(frozen=True)
class Layer:
    """One convolution by its geometry, for one image of ``height`` x ``width`` pixels."""

    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    groups: int

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the output."""
        p, q = ((size + 2 * self.padding - self.kernel) // self.stride + 1 for size in (self.height, self.width))
        return p, q

    @property
    def flops(self) -> int:
        """Floating-point operations per image; a multiply-accumulate is two."""
        p, q = self.output
        return 2 * p * q * self.out_channels * self.kernel**2 * self.in_channels // self.groups


@cache
def layers(model: str) -> dict[Layer, int]:
    """The distinct layers of ``model`` (a key of :data:`MODELS`) in order, with how often each occurs."""
    found: Counter[Layer] = Counter()

    def record(conv: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(conv, nn.Conv2d) and isinstance(conv.padding, tuple)
        channels, height, width = args[0].shape[1:]
        geometry = conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.groups
        found[Layer(channels, conv.out_channels, height, width, *geometry)] += 1

    with torch.device("meta"), resnet_fused.implementation("eager"), torch.no_grad():
        network = getattr(resnet_fused, model)().eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(record)
        network(torch.empty(1, 3, MODELS[model], MODELS[model]))
    return dict(found)


def distinct() -> list[Layer]:
    """The distinct layers of all :data:`MODELS`."""
    return list(dict.fromkeys(layer for model in MODELS for layer in layers(model)))
