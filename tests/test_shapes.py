"""The table of layers: complete, and of the size that the papers give."""

from __future__ import annotations

import pytest

from benchmarks.shapes import MODELS, Layer, distinct, layers


@pytest.mark.parametrize(
    ("model", "convolutions", "gflop"),
    [("resnet18", 20, 3.63), ("resnet50", 53, 8.17), ("resnext50_32x4d", 53, 8.46), ("resnet20", 19, 0.081)],
)
def test_layers_of_a_model(model, convolutions, gflop):
    table = layers(model)
    assert sum(table.values()) == convolutions
    assert sum(layer.flops * count for layer, count in table.items()) / 1e9 == pytest.approx(gflop, rel=0.01)


def test_stem_comes_first_and_each_layer_once():
    assert next(iter(layers("resnet50"))) == Layer(3, 64, 224, 224, kernel=7, stride=2, padding=3, groups=1)
    everything = distinct()
    assert len(set(everything)) == len(everything)
    assert set(everything) == {layer for model in MODELS for layer in layers(model)}
