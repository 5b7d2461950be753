"""The operators are there for whoever looks, and out of the way for who does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import BasicBlock, implementation
from resnet_fused.engine import ops
from resnet_fused.engine.forward import Convolution
from resnet_fused.kernels.conv import Geometry
from resnet_fused.plan.problem import Tiles

pytestmark = pytest.mark.usefixtures("on_device")


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def block() -> nn.Module:
    return BasicBlock(16, 16).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)


def test_without_momentum_and_counter_the_running_statistics_stay(x):
    w = torch.randn(12, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    mean, var = torch.randn(12), torch.rand(12)
    before = mean.clone(), var.clone()
    convolution = Convolution(Geometry((1, 1), (0, 0), (1, 1), 1), True, Tiles()).encode()
    ops.unit_forward(x, None, w, "identity", None, None, None, mean, var, None, None, 1e-5, True, convolution, "")
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_a_dispatch_mode_sees_the_operators(block, x):
    with implementation("triton"), torch.no_grad():
        alone = block(x)
        with Names() as names:
            watched = block(x)
    assert [name for name in names.seen if "resnet_fused" in name] == ["resnet_fused::conv_bn_act"] * 2
    assert torch.equal(alone, watched)


def test_fake_tensors_stay_fake(block, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
    with implementation("triton"), torch.no_grad(), mode:
        assert block(fake).shape == x.shape


def test_meta_tensors_are_not_launched_on(block, x):
    with implementation("triton"), torch.no_grad():
        z = block.to("meta")(x.to("meta"))
    assert z.is_meta and z.is_contiguous(memory_format=torch.channels_last)


def test_without_anyone_watching_the_dispatcher_is_left_out(block, x):
    with implementation("triton"), torch.no_grad(), torch.profiler.profile() as profile:
        block(x)
    assert not [event.key for event in profile.key_averages() if "resnet_fused::" in event.key]
