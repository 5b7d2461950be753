"""Whole networks through the kernels: the same output as eager, at most a launch per convolution, nothing beside it."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from transformers import RegNetConfig, RegNetModel

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


def _segmentation() -> nn.Module:
    return torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3)


def _detection() -> nn.Module:
    """That of fasterrcnn_resnet50_fpn and retinanet_resnet50_fpn, with shallower blocks: its norms are frozen."""
    return torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=3
    )


def _regnet() -> nn.Module:
    config = RegNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8, layer_type="y")
    return RegNetModel(config)


OTHERS = {"segmentation": _segmentation, "detection": _detection, "Hugging Face's RegNet": _regnet}


SMALL = [name for name in OTHERS if name != "segmentation"]
"""What trains in seconds."""


def _outputs(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = model(x)
    return {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize(
    ("name", "training"),
    [("segmentation", False), *((name, training) for name in SMALL for training in (False, True))],
    ids=str,
)
def test_backbones_of_other_tasks(name, training):
    """Their outputs, and in training the gradient of the first filter that has one."""
    torch.manual_seed(0)
    model = OTHERS[name]().to(DEVICE, memory_format=torch.channels_last)
    zoo.randomise_norms(model)
    model.train(training)
    x = torch.randn(2, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    found = []
    for road, dtype in (("eager", torch.float64), ("eager", torch.float32), ("triton", torch.float32)):
        torch.manual_seed(0)  # for dropout
        twin = copy.deepcopy(model).to(dtype)
        if road == "triton":
            resnet_fused.fuse(twin)
        with resnet_fused.implementation(road), torch.set_grad_enabled(training), resnet_fused.trace() as trace:
            results = _outputs(twin, x.to(dtype))
            if training:
                sum(t.sum() for t in results.values()).backward()
                gradients = ((n, p.grad) for n, p in twin.named_parameters() if p.grad is not None and p.dim() == 4)
                results |= dict([next(gradients)])
        found.append(results)
    exact, eager, ours = found
    assert "conv_forward" in [launch.name for launch in trace.launches]
    for key, value in exact.items():
        assert_within_rule(ours[key].detach(), eager[key].detach(), value.detach(), sums=64)
