"""Every distinct layer and block of the ResNets for ImageNet and for 32x32 images: one table for every benchmark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused.models import MODELS
from resnet_fused.modules import BasicBlock, Bottleneck, PaddedShortcut


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
class NetworkCase:
    """A whole model, a key of :data:`MODELS`, on images of ``size`` x ``size`` pixels, or as it is made for."""

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
        side = self.size or MODELS[self.model]
        return 3, side, side

    def build(self) -> nn.Module:
        """torchvision's model where torchvision has one and is installed, else ours; with random weights."""
        try:
            import torchvision.models as library
        except ImportError:
            library = resnet_fused
        model: nn.Module = getattr(library, self.model, None) or getattr(resnet_fused, self.model)
        return model()


Case = LayerCase | BlockCase | NetworkCase
"""What is benchmarked: each has its ``level`` and ``name``, the shape of its input ``image`` and a ``build()``."""


@cache
def layers(model: str, size: int | None = None) -> dict[LayerCase, int]:
    """The distinct layers of ``NetworkCase(model, size)`` in order, with how often each occurs."""
    found: Counter[LayerCase] = Counter()

    def record(conv: nn.Module, x: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d) and isinstance(conv.padding, tuple)
        _, channels, height, width = x.shape
        geometry = conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.groups
        found[LayerCase(channels, conv.out_channels, height, width, *geometry)] += 1

    _visit(NetworkCase(model, size), (nn.Conv2d,), record)
    return dict(found)


@cache
def blocks(model: str) -> dict[BlockCase, int]:
    """The distinct residual blocks of ``model`` in order, with how often each occurs."""
    found: Counter[BlockCase] = Counter()

    def record(block: nn.Module, x: Tensor) -> None:
        assert isinstance(block, BasicBlock | Bottleneck)
        _, channels, height, width = x.shape
        inner = cast(nn.Conv2d, block.conv2)
        planes = cast(nn.Conv2d, block.get_submodule(f"conv{block.depth}")).out_channels // block.expansion
        bottleneck = isinstance(block, Bottleneck)
        base_width = inner.out_channels // inner.groups * 64 // planes if bottleneck else 64
        shortcut = "projection"
        if block.downsample is None or isinstance(block.downsample, PaddedShortcut):
            shortcut = "identity" if block.downsample is None else "padded"
        kind = "bottleneck" if bottleneck else "basic"
        found[BlockCase(kind, channels, planes, height, width, block.stride, inner.groups, base_width, shortcut)] += 1

    _visit(NetworkCase(model), (BasicBlock, Bottleneck), record)
    return dict(found)


def _visit(
    network: NetworkCase, kinds: tuple[type[nn.Module], ...], record: Callable[[nn.Module, Tensor], None]
) -> None:
    """Call ``record`` with every module of ``kinds`` and its input, in the order in which ``network`` runs them."""
    with torch.device("meta"), resnet_fused.implementation("eager"), torch.no_grad():
        model = getattr(resnet_fused, network.model)().eval()
        for module in model.modules():
            if isinstance(module, kinds):
                module.register_forward_pre_hook(lambda module, args: record(module, args[0]))
        model(torch.empty(1, *network.image))


def distinct() -> list[LayerCase]:
    """The distinct layers of all :data:`MODELS`."""
    return list(dict.fromkeys(layer for model in MODELS for layer in layers(model)))


def distinct_blocks() -> list[BlockCase]:
    """The distinct residual blocks of all :data:`MODELS`."""
    return list(dict.fromkeys(block for model in MODELS for block in blocks(model)))
