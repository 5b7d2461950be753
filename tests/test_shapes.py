"""The table of layers and blocks: complete, and of the size that the papers give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet_fused
from benchmarks.shapes import MODELS, BlockCase, LayerCase, NetworkCase, blocks, distinct, distinct_blocks, layers


@pytest.mark.parametrize(
    ("model", "convolutions", "gflop"),
    [("resnet18", 20, 3.63), ("resnet50", 53, 8.17), ("resnext50_32x4d", 53, 8.46), ("resnet20", 19, 0.081)],
)
def test_layers_of_a_model(model, convolutions, gflop):
    table = layers(model)
    assert sum(table.values()) == convolutions
    assert sum(layer.flops * count for layer, count in table.items()) / 1e9 == pytest.approx(gflop, rel=0.01)


def test_stem_comes_first_and_each_layer_once():
    assert next(iter(layers("resnet50"))) == LayerCase(3, 64, 224, 224, kernel=7, stride=2, padding=3, groups=1)
    everything = distinct()
    assert len(set(everything)) == len(everything)
    assert set(everything) == {layer for model in MODELS for layer in layers(model)}


@pytest.mark.parametrize("model", MODELS)
def test_the_blocks_hold_all_parameters_but_the_ends(model):
    """Built anew from the table they have as many as the model's own blocks, and chain from size to size."""
    with torch.device("meta"):
        network = getattr(resnet_fused, model)()
        built = sum(count * parameters(block.build()) for block, count in blocks(model).items())
    ends = [network.conv1, network.bn1, network.fc]
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


def test_names_tell_the_cases_apart():
    for cases in (distinct(), distinct_blocks()):
        assert len({case.name for case in cases}) == len(cases)


def test_a_layer_is_a_unit():
    layer = LayerCase(8, 16, 6, 5, kernel=3, stride=2, padding=1, groups=2)
    unit = layer.build()
    assert [type(part) for part in unit] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert unit(torch.randn(2, *layer.image)).shape == (2, 16, *layer.output)


def test_a_network_is_torchvisions_where_there_is_one():
    assert type(NetworkCase("resnet18").build()).__module__.startswith("torchvision")
    assert isinstance(NetworkCase("resnet20").build(), type(resnet_fused.resnet20()))


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
