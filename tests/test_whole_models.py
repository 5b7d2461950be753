"""Whole networks through the kernels: the same output as eager, at most a launch per convolution, nothing beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resnet_fused
from tests import zoo
from tests.rule import assert_within_rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_both(name: str):
    model = zoo.build(name).to(DEVICE)
    size = 32 if name.endswith("resnet20") else 64
    x = torch.randn(1, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), resnet_fused.implementation("eager"):
        eager = zoo.logits(model, x)
        exact = zoo.logits(copy.deepcopy(model).double(), x.double())
    resnet_fused.fuse(model)
    with torch.inference_mode(), resnet_fused.implementation("triton"), resnet_fused.trace() as trace:
        ours = zoo.logits(model, x)
    assert_within_rule(ours, eager, exact)
    return trace


@pytest.mark.parametrize("name", [name for name in zoo.MODELS if name != "ours resnet50"])
def test_same_output_as_eager(name):
    run_both(name)


def test_resnet50_takes_at_most_one_launch_per_convolution_and_no_other_pass():
    model = resnet_fused.fuse(zoo.build("torchvision resnet50").to(DEVICE, memory_format=torch.channels_last))
    x = torch.randn(1, 3, 64, 64, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with resnet_fused.implementation("triton"):
        rows = resnet_fused.explain(model, x)
    blocks = {row.name: model.get_submodule(row.name) for row in rows.rows}
    assert len(rows.rows) == 17
    stem, *residual = rows.rows
    assert stem.name == "conv1"
    assert [launch.name for launch in stem.launches] == ["conv_pack", "conv_pool"]
    names = [launch.name for row in residual for launch in row.launches]
    assert set(names) == {"conv_forward", "batch_norm_stats", "chain_forward"}
    convolutions = sum(isinstance(m, nn.Conv2d) for row in residual for m in blocks[row.name].modules())
    assert names.count("conv_forward") + names.count("batch_norm_stats") == convolutions, "one for a chain's link"
    for row in residual:
        assert [launch.name for launch in row.launches].count("chain_forward") == 1


def test_our_resnet50_has_the_same_output_and_launches_the_stem_too():
    trace = run_both("ours resnet50")
    names = [launch.name for launch in trace.launches]
    assert names[:2] == ["conv_pack", "conv_pool"]
    assert names.count("chain_forward") == 16
    assert names.count("conv_forward") + names.count("batch_norm_stats") == 52, "the latter once a link of a chain"
    assert not {"aten.convolution", "aten.relu", "aten.add"} & set(names)
