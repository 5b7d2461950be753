"""The blocks: shapes, keys, shortcuts, and the same function fused as eager."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

import resnet_fused
from resnet_fused.modules import BasicBlock, Bottleneck, PaddedShortcut, ResidualBlock
from tests.rule import assert_within_rule
from tests.zoo import randomise_norms

pytestmark = pytest.mark.usefixtures("on_device")


def projection(ci, co, stride=1):
    return nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))


BLOCKS = {
    "basic": lambda: BasicBlock(16, 16),
    "basic, projection": lambda: BasicBlock(16, 24, 2, projection(16, 24, 2)),
    "basic, option A": lambda: BasicBlock(16, 32, 2, PaddedShortcut(16, 32, 2)),
    "bottleneck": lambda: Bottleneck(32, 8),
    "bottleneck, projection": lambda: Bottleneck(16, 8, 2, projection(16, 32, 2)),
    "bottleneck, groups": lambda: Bottleneck(32, 8, groups=4, base_width=32),
    "bottleneck, dilation": lambda: Bottleneck(32, 8, dilation=2),
    "one unit": lambda: ResidualBlock(16, [(16, 3)]),
    "four units": lambda: ResidualBlock(16, [(16, 1), (24, 3), (8, 5), (16, 1)]),
    "units, projection": lambda: ResidualBlock(16, [(16, 3), (24, 3)], "projection", stride=2),
    "units, pad": lambda: ResidualBlock(16, [(20, 3), (21, 1)], "pad", stride=2),
    "own convolution": lambda: ResidualBlock(16, [nn.Conv2d(16, 16, (3, 1), padding=(1, 0), groups=2), (16, 1)]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_fused_equals_eager(name):
    block = BLOCKS[name]().eval()
    randomise_norms(block)
    x = torch.randn(2, block.conv1.in_channels, 7, 6)
    with torch.inference_mode(), resnet_fused.implementation("eager"):
        eager, exact = block(x), copy.deepcopy(block).double()(x.double())
    with torch.inference_mode(), resnet_fused.implementation("triton"), resnet_fused.trace() as trace:
        ours = block(x.contiguous(memory_format=torch.channels_last))
    assert_within_rule(ours, eager, exact)
    launches = [launch for launch in trace.launches if launch.name == "conv_forward"]
    assert len(launches) == sum(isinstance(m, nn.Conv2d) for m in block.modules())


@pytest.mark.parametrize("name", [n for n in BLOCKS if n.startswith("b")])
def test_eager_equals_torchvision(name):
    block = BLOCKS[name]()
    if isinstance(block.downsample, PaddedShortcut):
        pytest.skip("torchvision has no shortcut without parameters")
    theirs = {"BasicBlock": torchvision.models.resnet.BasicBlock, "Bottleneck": torchvision.models.resnet.Bottleneck}
    twin = copy.deepcopy(block)
    twin.__class__ = theirs[type(block).__name__]
    x = torch.randn(2, block.conv1.in_channels, 7, 6)
    with resnet_fused.implementation("eager"):
        for mode in (True, False):
            assert torch.equal(block.train(mode)(x), twin.train(mode)(x))
    assert all(torch.equal(a, b) for a, b in zip(block.state_dict().values(), twin.state_dict().values(), strict=True))


def test_training_runs_eager_and_has_gradients():
    block = BasicBlock(16, 16).train()
    with resnet_fused.implementation("triton"):
        block(torch.randn(2, 16, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_zero_init_makes_a_fresh_block_the_relu_of_its_shortcut():
    for shortcut, stride in (("identity", 1), ("projection", 2), ("pad", 2)):
        block = ResidualBlock(16, [(16, 3), (16, 3)], shortcut, stride=stride, zero_init=True).eval()
        x = torch.randn(2, 16, 6, 6)
        with torch.inference_mode(), resnet_fused.implementation("triton"):
            want = torch.relu(x if block.downsample is None else block.downsample(x))
            torch.testing.assert_close(block(x), want, rtol=1e-5, atol=1e-6)


def test_padded_shortcut_splits_the_zeros():
    x = torch.randn(1, 2, 5, 4)
    y = PaddedShortcut(2, 5, 2)(x)
    assert y.shape == (1, 5, 3, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3, 4]].any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResidualBlock(16, []), "layers must hold at least one layer"),
        (lambda: ResidualBlock(16, [(16, 3)], "concat"), "shortcut must be one of .* got 'concat'"),
        (lambda: ResidualBlock(16, [(24, 3)]), "needs a branch from 16 to 16 channels with stride 1; got 24"),
        (lambda: ResidualBlock(16, [(16, 3)], stride=2), "with stride 1; got 16 channels with stride"),
        (lambda: ResidualBlock(16, [(8, 3)], "pad"), "out_channels must be at least in_channels=16; got 8"),
        (lambda: ResidualBlock(16, [nn.Conv2d(8, 16, 1)]), r"layers\[0\] must take 16 channels; it takes 8"),
        (lambda: ResidualBlock(16, [nn.Conv2d(16, 16, 1)], stride=2), "stride=2 has no layer to go to"),
        (lambda: BasicBlock(16, 16, groups=2), "BasicBlock needs groups=1"),
        (lambda: BasicBlock(16, 16, dilation=2), "BasicBlock needs dilation=1; got 2"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
