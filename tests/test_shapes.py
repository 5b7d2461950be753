"""The table of layers and blocks: complete, and of the size that the papers give."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import resnet_fused
from benchmarks.shapes import (
    NETWORKS,
    BlockCase,
    LayerCase,
    NetworkCase,
    PreActCase,
    blocks,
    distinct,
    distinct_blocks,
    layers,
)
from resnet_fused import models, models_v2


@pytest.mark.parametrize(
    ("model", "convolutions", "gflop"),
    [
        *(("resnet18", 20, 3.63), ("resnet50", 53, 8.17), ("resnext50_32x4d", 53, 8.46), ("resnet20", 19, 0.081)),
        *(("resnet18_v2", 20, 3.63), ("resnet50_v2", 53, 8.17)),
    ],
)
def test_layers_of_a_model(model, convolutions, gflop):
    table = layers(model)
    assert sum(table.values()) == convolutions
    assert sum(layer.flops * count for layer, count in table.items()) / 1e9 == pytest.approx(gflop, rel=0.01)


def test_stem_comes_first_and_each_layer_once():
    assert next(iter(layers("resnet50"))) == LayerCase(3, 64, 224, 224, kernel=7, stride=2, padding=3, groups=1)
    everything = distinct()
    assert len(set(everything)) == len(everything)
    assert set(everything) == {layer for model in NETWORKS for layer in layers(model)}


def test_pre_activation_blocks_have_the_layers_of_the_others():
    """None is timed anew; their last layer, a convolution too, is a classifier as any other."""
    for depth in (18, 34, 50, 101, 152):
        assert layers(f"resnet{depth}_v2") == layers(f"resnet{depth}")
    assert distinct() == list(dict.fromkeys(layer for model in models.MODELS for layer in layers(model)))


@pytest.mark.parametrize("model", NETWORKS)
def test_the_blocks_hold_all_parameters_but_the_ends(model):
    """Built anew from the table they have as many as the model's own blocks, and chain from size to size."""
    with torch.device("meta"):
        network = getattr(resnet_fused, model)()
        built = sum(count * parameters(block.build()) for block, count in blocks(model).items())
    v2 = model in models_v2.MODELS
    ends = [network.stem, network.norm, network.head] if v2 else [network.conv1, network.bn1, network.fc]
    assert built == parameters(network) - sum(map(parameters, ends))


@pytest.mark.parametrize("block", distinct_blocks(), ids=lambda block: block.name)
def test_a_block_takes_its_image(block):
    with torch.device("meta"), resnet_fused.implementation("eager"):
        z = block.build()(torch.empty(2, *block.image))
    assert z.shape[2:] == (block.height // block.stride, block.width // block.stride)


def test_a_block_by_its_constructor():
    first, second = list(blocks("resnext50_32x4d"))[:2]
    assert first == BlockCase("bottleneck", 64, 64, 56, 56, 1, 32, 4, "projection")
    assert second.shortcut == "identity"
    assert {block.shortcut for block in blocks("resnet20")} == {"identity", "padded"}


def test_a_pre_activation_block_by_its_constructor():
    first, second, third = list(blocks("resnet50_v2"))[:3]
    assert first == PreActCase("preact_bottleneck", 64, 256, 56, 56, 1)
    assert second == PreActCase("preact_bottleneck", 256, 256, 56, 56, 1)
    assert third == PreActCase("preact_bottleneck", 256, 512, 56, 56, 2)
    names = [case.name for case in (first, second, third)]
    assert names == [
        "preact_bottleneck 64-256, projection, at 56x56",
        "preact_bottleneck 256-256, identity, at 56x56",
        "preact_bottleneck/2 256-512, projection, at 56x56",
    ]
    assert {case.kind for case in blocks("resnet18_v2")} == {"preact_basic"}
    for case in (first, second, third):
        assert (case.build().downsample is not None) == ("projection" in case.name)


def test_names_tell_the_cases_apart():
    for cases in (distinct(), distinct_blocks()):
        assert len({case.name for case in cases}) == len(cases)


def test_a_layer_is_a_unit():
    layer = LayerCase(8, 16, 6, 5, kernel=3, stride=2, padding=1, groups=2)
    unit = layer.build()
    assert [type(part) for part in unit] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert unit(torch.randn(2, *layer.image)).shape == (2, 16, *layer.output)


def test_a_network_is_torchvisions_or_timms_where_there_is_one():
    with torch.device("meta"):
        made = {name: NetworkCase(name).build() for name in ("resnet18", "resnet20", "resnet50_v2")}
        ours = resnet_fused.resnet50_v2()
    assert type(made["resnet18"]).__module__.startswith("torchvision")
    assert isinstance(made["resnet20"], models.CifarResNet)
    assert type(made["resnet50_v2"]).__module__.startswith("timm")
    assert [*made["resnet50_v2"].state_dict()] == [*ours.state_dict()]


def test_a_network_is_ours_where_nobody_elses_is_installed(monkeypatch):
    for library in ("torchvision", "torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, library, None)
    with torch.device("meta"):
        assert isinstance(NetworkCase("resnet18").build(), models.ResNet)
        assert isinstance(NetworkCase("resnet18_v2").build(), models_v2.ResNetV2)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
