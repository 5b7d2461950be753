"""ResNets of pre-activation blocks, with timm's names and keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from resnet_fused.modules import PreActBlock, PreActBottleneck

MODELS = dict.fromkeys([f"resnet{depth}_v2" for depth in (18, 34, 50, 101, 152)], 224)
"""The names of all models, each with the side of the images that it is made for."""


class ResNetV2(nn.Module):
    """A pre-activation ResNet for large images, with the state-dict keys of timm's ``resnetv2_*`` with batch norm.

    ``x`` [N, 3, H, W] -> logits [N, num_classes]. ``layers`` and ``channels``: the blocks of each stage, and the
    channels of their outputs. ``zero_init_last``: the last filter of each block starts at zero, so that a fresh block
    is its shortcut. He et al. 2016 (arXiv:1603.05027); the stride on the 3x3 convolution, initialised as in timm.
    """

    def __init__(
        self,
        block: type[PreActBlock] | type[PreActBottleneck],
        layers: Sequence[int],
        channels: Sequence[int],
        num_classes: int = 1000,
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        if len(layers) != len(channels) or not layers:
            raise ValueError(f"layers and channels must have as many elements; got {layers} and {channels}")
        self.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 64, 7, 2, 3, bias=False), pool=nn.MaxPool2d(3, 2, 1)))
        width, stages = 64, []
        for i, (count, out) in enumerate(zip(layers, channels, strict=True)):
            blocks = [block(width, out, 1 if i == 0 else 2), *(block(out, out) for _ in range(1, count))]
            stages.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks))))
            width = out
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), fc=nn.Conv2d(width, num_classes, 1)))
        _initialise(self, zero_init_last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stages(self.stem(x))))
        return torch.flatten(self.head(x), 1)


def _initialise(model: ResNetV2, zero_init_last: bool) -> None:
    head = cast(nn.Conv2d, model.head.get_submodule("fc"))
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module is not head:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(cast(Tensor, head.bias))
    if zero_init_last:
        for module in model.modules():
            if isinstance(module, PreActBlock | PreActBottleneck):
                nn.init.zeros_(cast(nn.Conv2d, module.get_submodule(f"conv{module.depth}")).weight)


def resnet18_v2(**options: Any) -> ResNetV2:
    """Pre-activation ResNet-18, timm's ``resnetv2_18``. ``options``: the last two of :class:`ResNetV2`."""
    return ResNetV2(PreActBlock, [2, 2, 2, 2], _BASIC, **options)


def resnet34_v2(**options: Any) -> ResNetV2:
    """Pre-activation ResNet-34, timm's ``resnetv2_34``. ``options``: as of :func:`resnet18_v2`."""
    return ResNetV2(PreActBlock, [3, 4, 6, 3], _BASIC, **options)


def resnet50_v2(**options: Any) -> ResNetV2:
    """Pre-activation ResNet-50, timm's ``resnetv2_50``. ``options``: as of :func:`resnet18_v2`."""
    return ResNetV2(PreActBottleneck, [3, 4, 6, 3], _WIDE, **options)


def resnet101_v2(**options: Any) -> ResNetV2:
    """Pre-activation ResNet-101, timm's ``resnetv2_101``. ``options``: as of :func:`resnet18_v2`."""
    return ResNetV2(PreActBottleneck, [3, 4, 23, 3], _WIDE, **options)


def resnet152_v2(**options: Any) -> ResNetV2:
    """Pre-activation ResNet-152, timm's ``resnetv2_152``. ``options``: as of :func:`resnet18_v2`."""
    return ResNetV2(PreActBottleneck, [3, 8, 36, 3], _WIDE, **options)


_BASIC = (64, 128, 256, 512)
_WIDE = (256, 512, 1024, 2048)
