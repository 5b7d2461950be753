"""The networks: torchvision's keys and outputs, the CIFAR networks' sizes, initialisation."""

from __future__ import annotations

import inspect

import pytest
import torch
import torchvision
from torch import nn

import resnet_fused
from resnet_fused import models
from resnet_fused.models import MODELS, CifarResNet

NAMES = [name for name, side in MODELS.items() if side == 224]


def test_every_model_is_listed():
    made = [name for name, value in vars(models).items() if inspect.isfunction(value) and not name.startswith("_")]
    assert list(MODELS) == made
    assert set(made) <= set(resnet_fused.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = getattr(resnet_fused, name)(), getattr(torchvision.models, name)()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert list(shapes[0]) == list(shapes[1])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_loads_torchvisions_weights_and_computes_the_same(name):
    ours, theirs = getattr(resnet_fused, name)().eval(), getattr(torchvision.models, name)().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_same_seed_gives_torchvisions_initialisation():
    torch.manual_seed(0)
    ours = resnet_fused.resnet18(num_classes=10, zero_init_residual=True)
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10, zero_init_residual=True)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_options_of_torchvision():
    common = set(inspect.signature(torchvision.models.ResNet).parameters)
    assert common == set(inspect.signature(resnet_fused.models.ResNet).parameters)
    with torch.device("meta"):
        model = resnet_fused.resnet50(replace_stride_with_dilation=[False, True, True])
        assert model.layer4(model.layer3(torch.empty(1, 512, 8, 8))).shape == (1, 2048, 8, 8)
    with pytest.raises(ValueError, match="replace_stride_with_dilation must have 3 elements"):
        resnet_fused.resnet18(replace_stride_with_dilation=[True])


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_cifar_networks_have_the_papers_size(depth):
    with torch.device("meta"):
        model = getattr(resnet_fused, f"resnet{depth}")()
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    assert layers == depth, "option A has no projection"
    papers = {20: 0.27e6, 32: 0.46e6, 44: 0.66e6, 56: 0.85e6, 110: 1.7e6}
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(papers[depth], rel=0.03)


def test_cifar_depth_is_checked():
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2"):
        CifarResNet(21)


def test_zero_init_residual():
    model = resnet_fused.resnet20(zero_init_residual=True)
    assert not model.layer1[0].bn2.weight.any()
    x = torch.randn(1, 16, 8, 8)
    assert torch.equal(model.eval().layer1[0](x), torch.relu(x))
