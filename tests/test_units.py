"""Modules that are no plain residual blocks: their units run fused, and all between them as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from timm.layers import BatchNormAct2d, BlurPool2d, ConvNormAct, DropPath, create_conv2d, get_attn
from timm.models.res2net import Bottle2neck
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import BasicBlock as TimmBasic
from timm.models.resnetv2 import PreActBottleneck
from timm.models.sknet import SelectiveKernelBasic
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from resnet_fused import fuse, implementation, unfuse
from resnet_fused.convert import ConvertedUnits
from resnet_fused.engine.trace import trace
from tests.training import check, randomise

pytestmark = pytest.mark.usefixtures("on_device")

SE = get_attn("se")


def projection(ci: int, co: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(stride, stride), nn.Conv2d(ci, co, 1, bias=False), nn.BatchNorm2d(co))


class Unpacked(BasicBlock):
    """Looks at sizes without branching on them."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        out = self.relu(self.bn1(self.conv1(x))).reshape(b, 2, c // 2, h, w)
        out = (out * out.mean((3, 4), keepdim=True)).reshape(b, x.shape[1], out.size(3), w)
        return self.relu(self.bn2(self.conv2(out)) + x)


class Written(BasicBlock):
    """Writes to its input while the first unit might still be waiting for it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        x = x * 2
        z = self.conv2(x)
        x.mul_(3)
        return self.relu(y + self.bn2(z) + x)


class WrittenShortcut(BasicBlock):
    """Adds the branch to the shortcut, in place, in front of what reads both."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x * 1
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(identity)))))
        identity += out
        return self.relu(identity) + out


class ReadTwice(BasicBlock):
    """A value within the branch is read beside it, after it was changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = y.relu_() + 0.5 * y
        return self.relu(x + self.bn2(self.conv2(y)))


class Asking(BasicBlock):
    """Asks for the type of its input, as DenseNet's layers do."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x], 1)[:, ::2] if isinstance(x, Tensor) else torch.cat(x, 1)
        return super().forward(x)


class Nested(nn.Module):
    """A unit behind a module of its own, and an addition."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.conv, self.bn = inner, nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.inner(x).sigmoid())) + x


class Choosy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if x.shape[0] < 100 else x


BN = nn.BatchNorm2d

CASES: dict[str, tuple[Any, int]] = {
    "squeeze and excitation": (lambda: TimmBasic(16, 16, attn_layer=SE), 2),
    "a projection behind it": (lambda: TimmBasic(16, 8, 2, projection(16, 8, 2), attn_layer=SE), 3),
    "efficient channel attention": (lambda: TimmBasic(16, 16, attn_layer=get_attn("eca")), 2),
    "anti-aliased": (lambda: TimmBasic(16, 8, 2, projection(16, 8, 2), aa_layer=BlurPool2d), 3),
    "a path that is dropped": (lambda: TimmBasic(16, 16, drop_path=DropPath(0.0)), 2),
    "Res2Net": (lambda: Bottle2neck(16, 4, scale=3, norm_layer=BN, downsample=projection(16, 16, 1)), 5),
    "ResNeSt": (lambda: ResNestBottleneck(16, 4, radix=2, base_width=64), 4),
    "selective kernels": (lambda: SelectiveKernelBasic(16, 16, sk_kwargs={"rd_ratio": 0.5}), 4),
    "pre-activation": (
        lambda: PreActBottleneck(16, 16, norm_layer=BatchNormAct2d, act_layer=nn.ReLU, conv_layer=create_conv2d),
        2,
    ),
    "norms with activations": (lambda: nn.Sequential(ConvNormAct(16, 8, 3), ConvNormAct(8, 8, apply_act=False)), 2),
    "sizes": (lambda: Unpacked(16, 16), 2),
    "read twice": (lambda: ReadTwice(16, 16), 2),
    "asking": (lambda: Asking(16, 16), 2),
    "nested": (lambda: Nested(TimmBasic(16, 16, attn_layer=SE)), 2),
    "nested without a name": (lambda: Nested(nn.Sequential(*projection(16, 16, 1), nn.Tanh())), 2),
    "frozen": (lambda: BasicBlock(16, 16, norm_layer=torchvision.ops.FrozenBatchNorm2d), 2),
}


def convolutions(model: nn.Module, x: Tensor) -> int:
    """How many are launched in inference."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad(), implementation("triton"), trace() as seen:
        twin(x)
    return [launch.name for launch in seen.launches].count("conv_forward")


def drawn(build: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    module = build()
    randomise(module)
    return module, torch.randn(4, 16, 6, 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_units_are_fused_and_nothing_else_changes(name, training):
    build, units = CASES[name]
    module, x = drawn(build)
    before, keys = [type(m) for m in module.modules()], list(module.state_dict())
    with torch.no_grad():
        dz = torch.randn_like(copy.deepcopy(module)(x))
    fuse(module.train(training), strict=True)
    check(module, x, dz, "triton")
    assert convolutions(module, x) == units
    assert list(module.state_dict()) == keys
    assert [type(m) for m in unfuse(module).modules()] == before


@pytest.mark.parametrize(("kind", "units"), [(Written, 1), (WrittenShortcut, 2)])
def test_what_writes_in_place_writes_when_it_did(kind, units):
    module, x = drawn(lambda: kind(16, 16))
    with torch.no_grad():
        want = module.eval()(x)
        fuse(module)
        with implementation("triton"):
            torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
    assert convolutions(module, x) == units


def test_a_module_that_cannot_be_traced_is_called_as_it_is():
    module, x = drawn(lambda: Nested(Choosy()))
    with torch.no_grad():
        want = module.eval()(x)
        fuse(module)
        with implementation("triton"):
            torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
    assert isinstance(module, ConvertedUnits)
    assert type(module.inner) is Choosy
    assert convolutions(module, x) == 1
