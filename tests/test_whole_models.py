"""Whole networks through the kernels: the same output as eager, at most a launch per convolution, nothing beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused.modules import FusedBlock
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


def test_resnet50_takes_one_launch_per_convolution_and_no_other_pass():
    model = resnet_fused.fuse(zoo.build("torchvision resnet50").to(DEVICE, memory_format=torch.channels_last))
    x = torch.randn(1, 3, 64, 64, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with resnet_fused.implementation("triton"):
        rows = resnet_fused.explain(model, x)
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, FusedBlock)}
    assert len(rows.rows) == len(blocks) == 17
    stem, *residual = rows.rows
    assert stem.name == "conv1"
    assert [launch.name for launch in stem.launches] == ["conv_pack", "conv_pool"]
    for row in residual:
        convolutions = sum(isinstance(m, nn.Conv2d) for m in blocks[row.name].modules())
        assert [launch.name for launch in row.launches] == ["conv_forward"] * convolutions


def test_our_resnet50_has_the_same_output_and_launches_the_stem_too():
    trace = run_both("ours resnet50")
    names = [launch.name for launch in trace.launches]
    assert names[:2] == ["conv_pack", "conv_pool"]
    assert names.count("chain_forward") == 16
    assert names.count("conv_forward") + 2 * 16 + (16 - 4) == 52, "each of a chain's two or three is in no other launch"
    assert not {"aten.convolution", "aten.relu", "aten.add"} & set(names)
