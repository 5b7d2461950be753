"""Every distinct layer and block of the ResNets for ImageNet and for 32x32 images: one table for every benchmark."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models_v2
from resnet_fused.commands.shared import NETWORKS, network
from resnet_fused.modules import BasicBlock, Bottleneck, PaddedShortcut, PreActBlock, PreActBottleneck


@dataclass(frozen=True)
class LayerCase:
    """One convolution by its geometry, for one image of ``height`` x ``width`` pixels."""

    level: ClassVar[str] = "layer"

    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    groups: int

    @property
    def name(self) -> str:
        """Filter, stride, channels, groups and the size of the input."""
        step = f"/{self.stride}" if self.stride > 1 else ""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        channels = f"{self.in_channels}-{self.out_channels}"
        return f"{self.kernel}x{self.kernel}{step} {channels}{groups} at {self.height}x{self.width}"

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

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        return self.in_channels, self.height, self.width

    def build(self) -> nn.Sequential:
        """The layer as a unit: convolution, batch norm and ReLU."""
        geometry = self.kernel, self.stride, self.padding, 1, self.groups
        conv = nn.Conv2d(self.in_channels, self.out_channels, *geometry, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(self.out_channels), nn.ReLU(inplace=True))


@dataclass(frozen=True)
class BlockCase:
    """One residual block by the arguments of its constructor, for one image of ``height`` x ``width`` pixels.

    ``kind``: "basic" or "bottleneck". ``shortcut``: "identity", "projection" or "padded".
    """

    level: ClassVar[str] = "block"

    kind: str
    in_channels: int
    planes: int
    height: int
    width: int
    stride: int
    groups: int
    base_width: int
    shortcut: str

    @property
    def name(self) -> str:
        """Kind, stride, channels, groups, shortcut and the size of the input."""
        step = f"/{self.stride}" if self.stride > 1 else ""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        wide = f" of width {self.base_width}" if self.base_width != 64 else ""
        channels = f"{self.in_channels}-{self.planes * self._type.expansion}"
        return f"{self.kind}{step} {channels}{groups}{wide}, {self.shortcut}, at {self.height}x{self.width}"

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        return self.in_channels, self.height, self.width

    def build(self) -> BasicBlock | Bottleneck:
        """The block, freshly initialised."""
        out = self.planes * self._type.expansion
        shortcut: nn.Module | None = None
        if self.shortcut == "padded":
            shortcut = PaddedShortcut(self.in_channels, out, self.stride)
        elif self.shortcut == "projection":
            conv = nn.Conv2d(self.in_channels, out, 1, self.stride, bias=False)
            shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))
        return self._type(self.in_channels, self.planes, self.stride, shortcut, self.groups, self.base_width)

    @property
    def _type(self) -> type[BasicBlock] | type[Bottleneck]:
        return Bottleneck if self.kind == "bottleneck" else BasicBlock


@dataclass(frozen=True)
class PreActCase:
    """One pre-activation block by the arguments of its constructor, for one image of ``height`` x ``width`` pixels.

    ``kind``: "preact_basic" or "preact_bottleneck".
    """

    level: ClassVar[str] = "block"

    kind: str
    in_channels: int
    out_channels: int
    height: int
    width: int
    stride: int

    @property
    def name(self) -> str:
        """Kind, stride, channels, shortcut and the size of the input."""
        step = f"/{self.stride}" if self.stride > 1 else ""
        channels = f"{self.in_channels}-{self.out_channels}"
        shortcut = "identity" if self.stride == 1 and self.in_channels == self.out_channels else "projection"
        return f"{self.kind}{step} {channels}, {shortcut}, at {self.height}x{self.width}"

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        return self.in_channels, self.height, self.width

    def build(self) -> PreActBlock | PreActBottleneck:
        """The block, freshly initialised."""
        kind = PreActBottleneck if self.kind == "preact_bottleneck" else PreActBlock
        return kind(self.in_channels, self.out_channels, self.stride)


@dataclass(frozen=True)
class NetworkCase:
    """A whole model, a key of :data:`NETWORKS`, on images of ``size`` x ``size`` pixels, or as it is made for."""

    level: ClassVar[str] = "network"

    model: str
    size: int | None = None

    @property
    def name(self) -> str:
        """The model, and the size of the input where that is one's own."""
        return self.model if self.size is None else f"{self.model} at {self.size}x{self.size}"

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of the input."""
        side = self.size or NETWORKS[self.model]
        return 3, side, side

    def build(self) -> nn.Module:
        """torchvision's model, or timm's of pre-activation blocks, where it is installed and has one, else ours.

        With random weights.
        """
        try:
            if self.model in models_v2.MODELS:
                import timm

                return timm.create_model(f"resnetv2_{self.model.removeprefix('resnet').removesuffix('_v2')}")
            import torchvision.models as library
        except ImportError:
            return network(self.model)
        made: nn.Module = getattr(library, self.model, partial(network, self.model))()
        return made


Case = LayerCase | BlockCase | PreActCase | NetworkCase
"""What is benchmarked: each has its ``level`` and ``name``, the shape of its input ``image`` and a ``build()``."""


@cache
def layers(model: str, size: int | None = None) -> dict[LayerCase, int]:
    """The distinct layers of ``NetworkCase(model, size)`` in order, with how often each occurs.

    A convolution with a bias has no batch norm: it is the classifier.
    """
    found: Counter[LayerCase] = Counter()

    def record(conv: nn.Module, x: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d) and isinstance(conv.padding, tuple)
        if conv.bias is not None:
            return
        _, channels, height, width = x.shape
        geometry = conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.groups
        found[LayerCase(channels, conv.out_channels, height, width, *geometry)] += 1

    _visit(NetworkCase(model, size), (nn.Conv2d,), record)
    return dict(found)


@cache
def blocks(model: str) -> dict[BlockCase | PreActCase, int]:
    """The distinct residual blocks of ``model`` in order, with how often each occurs."""
    found: Counter[BlockCase | PreActCase] = Counter()

    def record(block: nn.Module, x: Tensor) -> None:
        if isinstance(block, PreActBlock | PreActBottleneck):
            found[_preact_case(block, x)] += 1
        else:
            assert isinstance(block, BasicBlock | Bottleneck)
            found[_block_case(block, x)] += 1

    _visit(NetworkCase(model), (BasicBlock, Bottleneck, PreActBlock, PreActBottleneck), record)
    return dict(found)


def _block_case(block: BasicBlock | Bottleneck, x: Tensor) -> BlockCase:
    _, channels, height, width = x.shape
    inner = cast(nn.Conv2d, block.conv2)
    planes = cast(nn.Conv2d, block.get_submodule(f"conv{block.depth}")).out_channels // block.expansion
    bottleneck = isinstance(block, Bottleneck)
    base_width = inner.out_channels // inner.groups * 64 // planes if bottleneck else 64
    shortcut = "projection"
    if block.downsample is None or isinstance(block.downsample, PaddedShortcut):
        shortcut = "identity" if block.downsample is None else "padded"
    kind = "bottleneck" if bottleneck else "basic"
    return BlockCase(kind, channels, planes, height, width, block.stride, inner.groups, base_width, shortcut)


def _preact_case(block: PreActBlock | PreActBottleneck, x: Tensor) -> PreActCase:
    _, channels, height, width = x.shape
    convs = [cast(nn.Conv2d, block.get_submodule(f"conv{i}")) for i in range(1, block.depth + 1)]
    kind = "preact_bottleneck" if isinstance(block, PreActBottleneck) else "preact_basic"
    return PreActCase(
        kind, channels, convs[-1].out_channels, height, width, math.prod(conv.stride[0] for conv in convs)
    )


def _visit(case: NetworkCase, kinds: tuple[type[nn.Module], ...], record: Callable[[nn.Module, Tensor], None]) -> None:
    """Call ``record`` with every module of ``kinds`` and its input, in the order in which ``case`` runs them."""
    with torch.device("meta"), resnet_fused.implementation("eager"), torch.no_grad():
        model = network(case.model).eval()
        for module in model.modules():
            if isinstance(module, kinds):
                module.register_forward_pre_hook(lambda module, args: record(module, args[0]))
        model(torch.empty(1, *case.image))


def distinct() -> list[LayerCase]:
    """The distinct layers of all :data:`NETWORKS`."""
    return list(dict.fromkeys(layer for model in NETWORKS for layer in layers(model)))


def distinct_blocks() -> list[BlockCase | PreActCase]:
    """The distinct residual blocks of all :data:`NETWORKS`."""
    return list(dict.fromkeys(block for model in NETWORKS for block in blocks(model)))
