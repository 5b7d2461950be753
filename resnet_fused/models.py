"""ResNets of these blocks: torchvision's nine for ImageNet, and those of the ResNet paper for 32x32 images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import functional
from resnet_fused.modules import BasicBlock, Bottleneck, PaddedShortcut

MODELS = dict.fromkeys(
    [
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
    ],
    224,
) | dict.fromkeys(["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"], 32)
"""The names of all models, each with the side of the images that it is made for."""


class ResNet(nn.Module):
    """A ResNet for large images, with torchvision's constructor arguments, initialisation and state-dict keys.

    ``x`` [N, 3, H, W] -> logits [N, num_classes]. ``zero_init_residual``: the last gamma of each block starts at zero,
    so that a fresh block is relu(shortcut). He et al. 2015 (arXiv:1512.03385), table 1; the stride on the 3x3
    convolution as in torchvision ("v1.5").
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        dilate = replace_stride_with_dilation or (False, False, False)
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation must have 3 elements; got {dilate}")
        self.norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes, self.dilation = 64, 1
        self.groups, self.base_width = groups, width_per_group
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = self.norm_layer(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(block, 64, layers[0])
        self.layer2 = self._stage(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._stage(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._stage(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        _initialise(self, zero_init_residual)

    def _stage(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, count: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation, stride = self.dilation * stride, 1
        out = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != out:
            downsample = nn.Sequential(nn.Conv2d(self.inplanes, out, 1, stride, bias=False), self.norm_layer(out))
        common = (self.groups, self.base_width)
        blocks = [block(self.inplanes, planes, stride, downsample, *common, first_dilation, self.norm_layer)]
        blocks += [block(out, planes, 1, None, *common, self.dilation, self.norm_layer) for _ in range(1, count)]
        self.inplanes = out
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv_bn_act_pool(x, self.conv1, self.bn1, self.maxpool)  # type: ignore[arg-type]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarResNet(nn.Module):
    """A ResNet for 32x32 images: three stages of 16, 32 and 64 channels, shortcuts without parameters (option A).

    ``x`` [N, 3, H, W] -> logits [N, num_classes]. ``depth`` = 6n + 2 for n blocks a stage. He et al. 2015
    (arXiv:1512.03385), section 4.2.
    """

    def __init__(self, depth: int, num_classes: int = 10, zero_init_residual: bool = False) -> None:
        super().__init__()
        count, rest = divmod(depth - 2, 6)
        if rest or count < 1:
            raise ValueError(f"depth must be 6n + 2 for some n >= 1; got {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, count)
        self.layer2 = self._stage(16, 32, count)
        self.layer3 = self._stage(32, 64, count)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        _initialise(self, zero_init_residual)

    @staticmethod
    def _stage(inplanes: int, planes: int, count: int) -> nn.Sequential:
        widens = planes != inplanes
        first = BasicBlock(
            inplanes, planes, 2 if widens else 1, PaddedShortcut(inplanes, planes, stride=2) if widens else None
        )
        return nn.Sequential(first, *(BasicBlock(planes, planes) for _ in range(1, count)))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv_bn_act(x, self.conv1, self.bn1)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _initialise(model: nn.Module, zero_init_residual: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if zero_init_residual:
        for module in model.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(module.get_submodule(f"bn{module.depth}").weight)  # type: ignore[arg-type]


def resnet18(**options: Any) -> ResNet:
    """ResNet-18. ``options``: those of :class:`ResNet`."""
    return ResNet(BasicBlock, [2, 2, 2, 2], **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34. ``options``: those of :class:`ResNet`."""
    return ResNet(BasicBlock, [3, 4, 6, 3], **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50. ``options``: those of :class:`ResNet`."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **options)


def resnet101(**options: Any) -> ResNet:
    """ResNet-101. ``options``: those of :class:`ResNet`."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **options)


def resnet152(**options: Any) -> ResNet:
    """ResNet-152. ``options``: those of :class:`ResNet`."""
    return ResNet(Bottleneck, [3, 8, 36, 3], **options)


def resnext50_32x4d(**options: Any) -> ResNet:
    """ResNeXt-50 with 32 groups of 4 channels (Xie et al. 2016, arXiv:1611.05431). ``options``: as :class:`ResNet`."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **{"groups": 32, "width_per_group": 4, **options})


def resnext101_32x8d(**options: Any) -> ResNet:
    """ResNeXt-101 with 32 groups of 8 channels (Xie et al. 2016, arXiv:1611.05431). ``options``: as :class:`ResNet`."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **{"groups": 32, "width_per_group": 8, **options})


def wide_resnet50_2(**options: Any) -> ResNet:
    """Wide ResNet-50-2 (Zagoruyko and Komodakis 2016, arXiv:1605.07146). ``options``: as :class:`ResNet`."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **{"width_per_group": 128, **options})


def wide_resnet101_2(**options: Any) -> ResNet:
    """Wide ResNet-101-2 (Zagoruyko and Komodakis 2016, arXiv:1605.07146). ``options``: as :class:`ResNet`."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **{"width_per_group": 128, **options})


def resnet20(**options: Any) -> CifarResNet:
    """ResNet-20 for 32x32 images. ``options``: those of :class:`CifarResNet`."""
    return CifarResNet(20, **options)


def resnet32(**options: Any) -> CifarResNet:
    """ResNet-32 for 32x32 images. ``options``: those of :class:`CifarResNet`."""
    return CifarResNet(32, **options)


def resnet44(**options: Any) -> CifarResNet:
    """ResNet-44 for 32x32 images. ``options``: those of :class:`CifarResNet`."""
    return CifarResNet(44, **options)


def resnet56(**options: Any) -> CifarResNet:
    """ResNet-56 for 32x32 images. ``options``: those of :class:`CifarResNet`."""
    return CifarResNet(56, **options)


def resnet110(**options: Any) -> CifarResNet:
    """ResNet-110 for 32x32 images. ``options``: those of :class:`CifarResNet`."""
    return CifarResNet(110, **options)
