"""Under torch.compile: one graph for every size, the road of the caller, on each supported version."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters
from torchvision.models.resnet import BasicBlock, Bottleneck

from resnet_fused import BasicBlock as OwnBasicBlock
from resnet_fused import ResidualBlock, fuse, implementation
from resnet_fused.engine.trace import trace
from resnet_fused.kernels.launch import Call, observe
from resnet_fused.models import ResNet
from tests.training import randomise

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many were compiled since the test began."""
    return counters["stats"]["unique_graphs"]


def blocks() -> nn.Module:
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    model = nn.Sequential(Bottleneck(16, 8, 2, shortcut), BasicBlock(32, 32))
    randomise(model)
    return nn.Sequential(fuse(model), ResidualBlock(32, [(40, 3)], "pad", stride=2))


def one_by_one(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a compiler sees: called so, no block shares a launch with the next."""
    for block in (*model[0], *model[1:]):
        x = block(x)
    return x


@pytest.mark.parametrize("road", ["triton", "mixed"])
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_for_every_size(training, road):
    model = blocks().train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with implementation(road), torch.set_grad_enabled(training):
        for n, h, w in ((2, 6, 5), (5, 8, 7), (64, 6, 5) if road == "mixed" else (9, 6, 5)):
            x = torch.randn(n, 16, h, w)
            leaves = [x.clone().requires_grad_(training) for _ in range(2)]
            z, want = compiled(leaves[0]), one_by_one(twin, leaves[1])
            assert torch.equal(z, want)
            if training:
                z.square().sum().backward()
                want.square().sum().backward()
                assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert graphs() == 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is None if not training else torch.equal(p.grad, q.grad)
    assert all(map(torch.equal, model.buffers(), twin.buffers()))


def test_a_batch_size_that_is_marked_is_not_specialised():
    model = blocks().eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with implementation("triton"), torch.no_grad():
        for n in (2, 3, 7):
            x = torch.randn(n, 16, 4, 4)
            torch._dynamo.mark_dynamic(x, 0)
            compiled(x)
    assert graphs() == 1


def test_the_road_is_that_of_the_call_not_of_the_compilation():
    model, x = blocks().eval(), torch.randn(2, 16, 4, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = {}
    with torch.no_grad():
        for road in ("triton", "eager", "mixed", "triton"):
            with implementation(road):
                compiled(x)  # traced outside of what follows, whose mode a compiler does not see through
                seen[road] = compiled(x)
        for road, z in seen.items():
            with implementation(road):
                assert torch.equal(z, one_by_one(model, x)), road
        for road in ("eager", "triton"):
            with implementation(road), torch.autocast(x.device.type, torch.float16):
                assert compiled(x).dtype == model(x).dtype, road


def test_a_profiler_that_starts_later_does_not_recompile():
    model = blocks().eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(2, 16, 4, 4)
    with implementation("triton"), torch.no_grad():
        compiled(x)
        with torch.profiler.profile(acc_events=True):
            compiled(x)
    assert graphs() == 1


def test_a_filter_that_is_laid_out_does_not_recompile():
    model = blocks().eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with implementation("triton"), torch.no_grad():
        for _ in range(2):
            x = torch.randn(2, 16, 4, 4)
            compiled(x), model(x)
    assert graphs() == 1


def test_what_does_not_fit_runs_eager_under_a_compiler_too():
    model = blocks().eval()
    model[0][0].conv1.stride = 1
    model[0][0].bn1.eps = torch.tensor(1e-3)
    x = torch.randn(2, 16, 4, 4)
    with implementation("triton"), torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        with trace() as t:
            model(x)
    assert "conv_forward" in [launch.name for launch in t.launches]


def test_a_stem_with_its_pool_is_one_graph_for_every_size():
    torch.manual_seed(0)
    model = ResNet(OwnBasicBlock, [1, 1, 1, 1], num_classes=5).eval()
    randomise(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad(), implementation("triton"):
        for images, side in ((2, 40), (3, 48), (4, 36)):
            x = torch.randn(images, 3, side, side)
            calls: list[Call] = []
            with observe(calls.append):
                got = compiled(x)
            assert [call.kernel.__name__ for call in calls[:2]] == ["conv_pack_kernel", "conv_pool_kernel"]
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
    assert graphs() == 1
