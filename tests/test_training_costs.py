"""What a training step launches, moves and keeps: exact counts, planned on tensors without data for a real GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import Bottleneck, fuse, implementation
from resnet_fused.engine.trace import Launch, trace
from resnet_fused.kernels.launch import dry_run
from resnet_fused.plan import tuned
from resnet_fused.plan.decide import Plan, decide
from resnet_fused.plan.problem import Problem

BATCH = 256
H100 = 90


def blocks(name: str, memory: str = "default", batch: int = BATCH) -> tuple[nn.Sequential, Tensor]:
    """The residual blocks of a model in bf16 and their input at 224x224, without data."""
    with torch.device("meta"):
        model = fuse(getattr(resnet_fused, name)().train(), memory=memory)
        model.to(torch.bfloat16, memory_format=torch.channels_last)
        x = torch.empty(batch, 64, 56, 56, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return nn.Sequential(model.layer1, model.layer2, model.layer3, model.layer4), x.requires_grad_()


def training_step(model: nn.Module, x: Tensor, road: str) -> list[Launch]:
    with implementation(road), dry_run(H100), trace() as t:
        z = model(x)
        z.backward(torch.empty_like(z))
    return t.launches


def megabytes(launches: list[Launch]) -> float:
    """Per image."""
    return sum(launch.bytes_read + launch.bytes_written for launch in launches) / BATCH / 1e6


class WideFiltersMixed:
    """A table by which PyTorch convolves with wide filters of stride 1 and over 66 channels, Triton everything else."""

    constants = None

    def lookup(self, problem: Problem) -> Plan:
        mixed = problem.r > 1 and problem.stride == (1, 1) and problem.ci > 66
        return replace(decide(problem), implementation="mixed" if mixed else "fused")


@pytest.mark.parametrize(("tuned_so", "limit"), [(False, 260), (True, 275)])
def test_bytes_of_resnet50(tuned_so, limit, monkeypatch):
    if tuned_so:
        monkeypatch.setattr(tuned, "load", lambda gpu: WideFiltersMixed())
    launches = training_step(*blocks("resnet50"), "auto" if tuned_so else "triton")
    assert limit - 10 < megabytes(launches) <= limit
    own = Counter(launch.name for launch in launches)
    library = {name for name in own if name.startswith("aten.")}
    assert library == ({"aten.convolution", "aten.convolution_backward"} if tuned_so else set())
    if tuned_so:
        assert own["aten.convolution"] == own["aten.convolution_backward"] == 10
    assert own["batch_norm_stats"] == own["batch_norm_coefs"] == 52, "one each per convolution"
    assert (
        own["batch_norm_apply"] - own["channel_moments"] * 2 == own["batch_norm_reduce"] - own["channel_moments"] == 16
    )


def test_eager_moves_more():
    assert megabytes(training_step(*blocks("resnet50"), "eager")) > 1.35 * 260


def test_passes_over_an_inner_unit():
    """Two forward and at most eight backward over the output of an inner convolution, where every unit is fused."""
    width = 64
    with torch.device("meta"):
        block = Bottleneck(4 * width, width).to(torch.bfloat16, memory_format=torch.channels_last)
        x = torch.empty(BATCH, 4 * width, 56, 56, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    size = BATCH * 56 * 56 * width * 2
    with implementation("triton"), dry_run(H100), trace() as t:
        z = block(x.requires_grad_())
        forward = passes(t.launches, size)
        z.backward(torch.empty_like(z))
    backward = passes(t.launches, size) - forward
    outer = 4  # x, y3, z and their gradients have four times the channels
    # conv1 reads x, conv3 writes y3, the join reads y3 and x and writes z: 5 outer passes, and 2 for each inner unit.
    assert forward == pytest.approx(5 * outer + 2 * 2, rel=0.06)
    # reduce (4), both gradients of conv3 (4), of conv1 (3): 11 outer passes, and at most 8 for each inner unit.
    assert 11 * outer + 2 * 7 <= backward <= 1.06 * (11 * outer + 2 * 8)


def passes(launches: list[Launch], size: int) -> float:
    """All that is moved, in tensors of ``size`` bytes."""
    return sum(launch.bytes_read + launch.bytes_written for launch in launches) / size


def kept(name: str, road: str, memory: str = "default") -> int:
    """Bytes that the blocks save for the backward; without parameters and the blocks' input, which others hold."""
    model, x = blocks(name, memory)
    held = {t.untyped_storage()._cdata for t in (x, *model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved.setdefault(t.untyped_storage()._cdata, t)
        return t

    with implementation(road), dry_run(H100), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(t.untyped_storage().nbytes() for storage, t in saved.items() if storage not in held)


@pytest.mark.parametrize("road", ["triton", "auto", "mixed"])
@pytest.mark.parametrize(("name", "limit"), [("resnet50", 0.83), ("resnet18", 0.76)])
def test_saved_bytes(name, limit, road):
    eager = kept(name, "eager")
    assert 0.6 < kept(name, road) / eager <= limit
    assert 0.4 < kept(name, road, "recompute") / eager <= 0.50
