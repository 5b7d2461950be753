"""Pre-activation blocks: training, inference, recognition and costs; and the networks that are made of them."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnetv2 import DownsampleConv, PreActBasic
from timm.models.resnetv2 import PreActBottleneck as TheirBottleneck
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused
from resnet_fused import (
    BasicBlock,
    PreActBlock,
    PreActBottleneck,
    explain,
    fuse,
    implementation,
    models_v2,
    trace,
    unfuse,
)
from resnet_fused.convert import ConvertedBlock, ConvertedBlocks, ConvertedUnits
from resnet_fused.engine import ops
from resnet_fused.engine.forward import Convolution
from resnet_fused.kernels.conv import Geometry
from resnet_fused.kernels.launch import dry_run
from resnet_fused.models_v2 import ResNetV2
from resnet_fused.modules import BlockLayout, FusedBlock, runs_fused
from resnet_fused.plan.problem import Tiles
from resnet_fused.recognise import recognise
from tests.rule import assert_within_rule
from tests.training import DEVICE, check, draw, randomise, step

pytestmark = pytest.mark.usefixtures("on_device")

ROADS = ["triton", "mixed"]


def theirs(kind: type[nn.Module], *channels: int, **options) -> nn.Module:
    """A block of timm's, as its models with batch norm have it."""
    parts = {"conv_layer": create_conv2d, "norm_layer": BatchNormAct2d, "act_layer": nn.ReLU}
    ratio = 1.0 if kind is PreActBasic else 0.25
    return fuse(kind(*channels, bottle_ratio=ratio, **parts, **options), strict=True)


def with_activation(block: nn.Module, activation: nn.Module) -> nn.Module:
    block.act = activation
    return block


class OneUnit(nn.Module):
    """The shortest."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(12), nn.Conv2d(12, 12, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.silu(self.bn(x))) + x


BLOCKS = {
    "basic": (lambda: PreActBlock(12, 12), (2, 12, 5, 3)),
    "basic, projection": (lambda: PreActBlock(12, 20, 2), (2, 12, 5, 6)),
    "bottleneck": (lambda: PreActBottleneck(16, 16), (2, 16, 3, 5)),
    "bottleneck, projection": (lambda: PreActBottleneck(12, 24, 2), (2, 12, 6, 5)),
    "bottleneck, projection with stride 1": (lambda: PreActBottleneck(12, 24), (2, 12, 3, 4)),
    "one unit": (lambda: fuse(OneUnit(), strict=True), (2, 12, 5, 3)),
    "timm's basic": (lambda: theirs(PreActBasic, 12), (2, 12, 5, 3)),
    "timm's bottleneck": (
        lambda: theirs(TheirBottleneck, 12, 32, stride=2, proj_layer=DownsampleConv),
        (2, 12, 5, 4),
    ),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_training_step(name, road):
    build, shape = BLOCKS[name]
    check(*draw(build, shape, torch.float32), road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["basic, projection", "bottleneck"])
def test_a_training_step_in_fp16(name, road):
    build, shape = BLOCKS[name]
    check(*draw(build, shape, torch.float16), road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["basic", "bottleneck, projection"])
def test_gradients_with_fixed_statistics(name, road):
    build, shape = BLOCKS[name]
    block, x, dz = draw(lambda: build().eval(), shape, torch.float32)
    check(block, x, dz, road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.LeakyReLU(0.1)])
def test_other_activations(activation, road):
    block, x, dz = draw(lambda: with_activation(PreActBottleneck(12, 24, 2), activation), (2, 12, 4, 5), torch.float32)
    check(block, x, dz, road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", BLOCKS)
def test_inference(name, dtype, road):
    build, shape = BLOCKS[name]
    block = build().eval().to(dtype)
    randomise(block)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad(), implementation("eager"):
        eager, exact = block(x), copy.deepcopy(block).double()(x.double())
    with torch.no_grad(), implementation(road):
        ours = block(x)
    assert_within_rule(ours, eager, exact)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("road", ROADS)
def test_what_alone_needs_a_gradient_gets_it(road):
    block, x = PreActBottleneck(12, 24, 2).requires_grad_(False), torch.randn(2, 12, 5, 4)
    randomise(block)
    for leaf in (x, *block.parameters()):
        leaf.requires_grad_()
        found = []
        for each in (road, "eager"):
            with implementation(each):
                found.append(torch.autograd.grad(block(x).square().sum(), leaf))
        torch.testing.assert_close(*found, rtol=1e-3, atol=2e-3)
        leaf.requires_grad_(False)


@pytest.mark.parametrize("road", ROADS)
def test_two_blocks_in_a_row_leave_what_eager_leaves(road):
    """The first one's gradient of its input goes to the other as that of a raw sum."""
    build = lambda: nn.Sequential(PreActBottleneck(12, 16), PreActBottleneck(16, 16))  # noqa: E731
    check(*draw(build, (2, 12, 4, 5), torch.float32), road, sums=32)


def test_under_autocast():
    block, x = PreActBottleneck(12, 24, 2), torch.randn(2, 12, 6, 5)
    found = []
    for road in ("triton", "eager"):
        twin = copy.deepcopy(block)
        with implementation(road), torch.autocast(DEVICE, torch.float16):
            z = twin(x.half())
        z.float().square().sum().backward()
        found.append([z.float(), *(p.grad for p in twin.parameters()), twin.norm1.running_var])
        assert z.dtype == torch.float16
    for ours, eager in zip(*found, strict=True):
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=3e-2, atol=3e-2 * eager.abs().max().item())


def test_what_is_not_supported_runs_eager_and_says_why():
    block, x = PreActBottleneck(12, 24, 2), torch.randn(2, 12, 6, 5)

    def reason(change) -> str:
        twin = copy.deepcopy(block)
        change(twin)
        with implementation("triton"), trace() as t:
            z = twin(x)
            found = twin.why_eager(x)
        assert z.shape == (2, 24, 3, 3) and all(launch.name.startswith("aten.") for launch in t.launches)
        return found

    assert reason(lambda b: setattr(b, "conv2", nn.Conv2d(6, 6, 3, 2, 1))) == (
        "a convolution behind its batch norm has a bias"
    )
    assert "PReLU" in reason(lambda b: setattr(b, "act", nn.PReLU()))
    assert "GroupNorm" in reason(lambda b: setattr(b, "norm2", nn.GroupNorm(2, 6)))
    assert "the shortcut is Sequential, not" in reason(lambda b: b.downsample.append(nn.Dropout()))
    assert "hooks" in reason(lambda b: b.norm1.register_forward_hook(lambda *_: None))
    with torch.autocast(DEVICE, torch.float16):
        assert reason(lambda b: None) == "the input is torch.float32 where autocast convolves in torch.float16"


def test_second_derivatives_are_refused():
    block, x = PreActBlock(12, 12), torch.randn(2, 12, 4, 4, requires_grad=True)
    with implementation("triton"), pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(block(x).square().sum(), x, create_graph=True)


def test_several_gradients_at_once():
    block, x = PreActBottleneck(12, 24), torch.randn(2, 12, 4, 4, requires_grad=True)
    with implementation("triton"):
        z = block(x)
        dz = torch.randn(2, *z.shape)
        alone = [torch.autograd.grad(z, x, g, retain_graph=True)[0] for g in dz]
        (batched,) = torch.autograd.grad(z, x, dz, is_grads_batched=True, retain_graph=True)
    assert torch.equal(batched, torch.stack(alone))


def test_under_checkpointing():
    block, x, dz = draw(lambda: PreActBottleneck(12, 24), (2, 12, 4, 4), torch.float32)
    ours = step(block, x, dz, "triton")
    again = step(block, x, dz, "triton", lambda b: lambda x: checkpoint(b, x, use_reentrant=False))
    for name, value in ours.items():
        if name.endswith("grad") or name == "z":
            assert torch.equal(value, again[name]), name


def test_what_is_written_to_before_the_backward_is_refused():
    block, x = PreActBlock(12, 12), torch.randn(2, 12, 4, 4)
    for t in (block.conv1.weight, block.norm1.weight):
        with implementation("triton"):
            z = block(x)
            with torch.no_grad():
                t.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                z.sum().backward()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [lambda: PreActBlock(12, 16, 2), lambda: PreActBottleneck(12, 16, 2)])
def test_under_torch_compile(build, training):
    torch._dynamo.reset()
    block = build().train(training)
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    with implementation("triton"), torch.set_grad_enabled(training):
        for n, h, w in ((2, 6, 5), (3, 7, 4)):
            leaves = [torch.randn(n, 12, h, w).requires_grad_(training)]
            leaves.append(leaves[0].detach().clone().requires_grad_(training))
            z, want = compiled(leaves[0]), twin(leaves[1])
            assert torch.equal(z, want)
            if training:
                z.square().sum().backward()
                want.square().sum().backward()
                assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert all(map(torch.equal, block.buffers(), twin.buffers()))


def test_operators_keep_their_promises():
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    operators = torch.ops.resnet_fused
    channels_last = {"memory_format": torch.channels_last}
    x, p = (torch.randn(2, c, 5, 4).contiguous(**channels_last) for c in (16, 12))
    w = torch.randn(12, 16, 1, 1).contiguous(**channels_last)
    mean, var, gamma, beta = torch.randn(16), torch.rand(16), torch.rand(16), torch.rand(16)
    batches = torch.zeros((), dtype=torch.int64)
    others = (gamma, beta, mean, var, batches, 0.1, 1e-5, True, "")
    taken = torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0) * 40])[:, None]
    for moments in ([], [taken], [taken, torch.tensor([40.0])]):
        torch.library.opcheck(operators.norm_forward.default, (x, moments, 40, *others), test_utils=tests)
    stats = ops.norm_forward(x, [], 0, *others)
    convolution = Convolution(Geometry(), True, Tiles()).encode()
    none = (None, None, None, None, 0.0, "identity")
    norm = (torch.randn(12), torch.rand(12), None, None, 1e-5, "relu")
    torch.library.opcheck(operators.preact_conv.default, (x, stats, w, "relu", *none, p, convolution), test_utils=tests)
    torch.library.opcheck(
        operators.preact_conv.default, (x, None, w, "relu", *norm, None, convolution), test_utils=tests
    )
    mixed = Convolution(Geometry(), False, Tiles()).encode()  # which takes no moments, as the fake does not
    torch.library.opcheck(operators.raw_sum.default, (x, stats, w, "relu", p, mixed), test_utils=tests)
    for needs in ([True] * 5, [False, True, False, True, False], [True, False, True, False, False]):
        arguments = (
            *(torch.randn_like(p), [w, w], [x], [stats], [*convolution, *convolution], [*w.stride()] * 2, [False]),
            *([""], ["relu"], needs, torch.float32, torch.float16),
        )
        torch.library.opcheck(operators.preact_backward.default, arguments, test_utils=tests)


def test_launches_of_inference():
    """Of a bottleneck one for each convolution, and a small one for the vectors of the first prologue."""
    channels_last = {"memory_format": torch.channels_last}
    x = torch.randn(2, 16, 4, 5).contiguous(**channels_last)
    for block, names in (
        (PreActBottleneck(16, 16), ["batch_norm_stats", *["conv_forward"] * 3]),
        (PreActBottleneck(16, 32, 2), ["batch_norm_stats", *["conv_forward"] * 4]),
        (PreActBlock(16, 16), ["batch_norm_stats", "batch_norm_apply", *["conv_forward"] * 2]),
    ):
        block.eval().to(**channels_last)
        with torch.no_grad(), implementation("triton"), trace() as t:
            block(x)
        assert [launch.name for launch in t.launches] == names


def test_passes_of_training():
    """Over the output of an inner convolution two forward and at most eight backward, where every unit is fused."""
    width, batch = 64, 256
    with torch.device("meta"):
        block = PreActBottleneck(4 * width, 4 * width).to(torch.bfloat16, memory_format=torch.channels_last)
        x = torch.empty(batch, 4 * width, 56, 56, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with implementation("triton"), dry_run(90), trace() as t:
        z = block(x.requires_grad_())
        seen = len(t.launches)
        z.backward(torch.empty_like(z))
    size, outer = batch * 56 * 56 * width * 2, 4  # x, z and their gradients have four times the channels

    def passes(launches) -> float:
        return sum(launch.bytes_read + launch.bytes_written for launch in launches) / size

    forward, backward = t.launches[:seen], t.launches[seen:]
    # Moments, conv1 and the residual read x, conv3 writes z: 4 outer passes, and 2 for each inner unit.
    assert passes(forward) == pytest.approx(4 * outer + 2 * 2, rel=0.06)
    # Both gradients of conv3 read dz (2), those of conv1 read x and write its gradient (3), to which the last pass adds
    # dz (4): 9 outer passes, and at most 8 for each inner unit.
    assert 9 * outer + 2 * 6 <= passes(backward) <= 1.06 * (9 * outer + 2 * 8)
    assert Counter(launch.name for launch in forward) == {
        "channel_moments": 1, "batch_norm_stats": 3, "conv_forward": 3,
    }  # fmt: skip
    own = Counter(launch.name for launch in backward if not launch.name.startswith(("aten.", "sum_splits")))
    assert own["conv_dgrad"] + own["dgrad_box"] == own["conv_wgrad"] == own["batch_norm_coefs"] == 3
    assert own["batch_norm_backward"] == 1


@pytest.mark.parametrize(("training", "batch", "limit", "launches"), [(False, 32, 52.2, 68), (True, 256, 211, 315)])
def test_bytes_and_launches_of_resnet50(training, batch, limit, launches):
    with torch.device("meta"):
        model = fuse(resnet_fused.resnet50_v2())
        model.to(torch.bfloat16, memory_format=torch.channels_last).train(training)
        x = torch.empty(batch, 64, 56, 56, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    found = {}
    for road in ("eager", "triton"):
        model.zero_grad()
        with implementation(road), dry_run(90), trace() as t, torch.set_grad_enabled(training):
            z = model.stages(x.requires_grad_(training))
            if training:
                z.backward(torch.empty_like(z))
        x = x.detach()
        found[road] = len(t.launches), sum(x.bytes_read + x.bytes_written for x in t.launches) / batch / 1e6
    assert found["triton"][0] == launches < found["eager"][0]
    assert limit - 1 < found["triton"][1] <= limit < found["eager"][1] / 1.5


NAMES = ["18", "34", "50", "101", "152"]


@pytest.mark.parametrize("depth", NAMES)
def test_keys_and_shapes_are_timms(depth):
    with torch.device("meta"):
        ours, other = getattr(resnet_fused, f"resnet{depth}_v2")(), timm.create_model(f"resnetv2_{depth}")
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, other)]
    assert list(shapes[0].items()) == list(shapes[1].items())


def small(module, **options):
    """Of ours or of timm's: blocks of two stages, with 32 and 64 channels."""
    if module is ResNetV2:
        return ResNetV2(PreActBottleneck, [2, 1], [32, 64], num_classes=5, **options)
    parts = {"conv_layer": create_conv2d, "norm_layer": BatchNormAct2d}
    return timm.models.resnetv2.ResNetV2([2, 1], (32, 64), num_classes=5, **parts, **options)


def test_same_seed_gives_timms_initialisation_and_outputs():
    found = []
    for module in (ResNetV2, timm.models.resnetv2.ResNetV2):
        torch.manual_seed(0)
        found.append(small(module, zero_init_last=True))
    ours, other = found
    for (name, a), b in zip(ours.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    randomise(ours)
    nn.init.normal_(ours.stages[0].blocks[0].conv3.weight)
    other.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 24, 20)
    for training in (True, False):
        with implementation("eager"):
            torch.testing.assert_close(ours.train(training)(x), other.train(training)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("road", ROADS)
def test_a_small_network(road):
    """Of timm, converted: inference, and one training step."""
    model, x = small(None), torch.randn(2, 3, 24, 20)
    randomise(model)
    with torch.no_grad(), implementation("eager"):
        eager, exact = model.eval()(x), copy.deepcopy(model).double()(x.double())
    fuse(model)
    with torch.no_grad(), implementation(road):
        assert_within_rule(model(x), eager, exact)
    losses = []
    for each in ("eager", road):
        twin = copy.deepcopy(model).train()
        with implementation(each):
            loss = twin(x).square().sum()
            loss.backward()
        losses.append([loss.detach(), twin.norm.running_mean, *(p.grad for p in twin.parameters())])
    for eager, ours in zip(*losses, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3 * eager.abs().max().item())


def row(*blocks: nn.Module) -> nn.Sequential:
    """Of pre-activation blocks, with 16 channels between them."""
    model = fuse(nn.Sequential(*(blocks or [PreActBottleneck(16, 16) for _ in range(3)])), strict=True)
    assert isinstance(model, ConvertedBlocks)
    return model


def passes_for_moments(model: Callable[[Tensor], Tensor], x: Tensor, road: str = "triton") -> int:
    """In a step, over inputs of blocks: all other moments are taken by the convolutions that write."""
    with implementation(road), trace() as t:
        z = model(x)
        if z.requires_grad:
            z.sum().backward()
    return sum(launch.name == "channel_moments" for launch in t.launches)


ROWS = {
    "identities": lambda: row(),
    "a projection": lambda: row(PreActBottleneck(16, 16), PreActBottleneck(16, 24, 2), PreActBlock(24, 24)),
    "timm's": lambda: row(theirs(PreActBasic, 16), theirs(TheirBottleneck, 16, 32, proj_layer=DownsampleConv)),
    "other activations": lambda: row(with_activation(PreActBlock(16, 16), nn.SiLU()), PreActBlock(16, 16)),
    "momentum": lambda: row(PreActBlock(16, 16), cumulative(PreActBlock(16, 16))),
}


def cumulative(block: nn.Module) -> nn.Module:
    block.norm1.momentum = None
    return block


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ROWS)
def test_blocks_in_a_row_leave_what_eager_leaves(name, road):
    check(*draw(ROWS[name], (2, 16, 4, 5), torch.float32), road, sums=32)


def test_blocks_in_a_row_in_fp16():
    build = lambda: row(PreActBottleneck(16, 16), PreActBlock(16, 16))  # noqa: E731
    check(*draw(build, (2, 16, 4, 5), torch.float16), "triton", sums=32)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_a_block_hands_the_moments_of_its_output_to_the_next(name, grad):
    model, x = ROWS[name](), torch.randn(2, 16, 4, 5)
    with torch.set_grad_enabled(grad):
        assert passes_for_moments(model, x) == 1
        assert passes_for_moments(nn.Sequential(*model), x) == len(model)
        assert passes_for_moments(model, x) == 1, "again"


def test_moments_are_those_of_what_was_rounded():
    """Where the values are so large beside their deviations that fp16 keeps few of their digits."""
    model, x = row(PreActBlock(16, 16), PreActBlock(16, 16)).half(), 100 + torch.rand(2, 16, 5, 5).half()
    found = []
    for each in (model, nn.Sequential(*model)):
        for norm in (block.norm1 for block in model):
            norm.reset_running_stats()
        with implementation("triton"):
            each(x)
        found.append(model[1].norm1.running_var.clone())
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def hook(function: Callable[[Tensor], Tensor], returns: bool = False) -> Callable[[nn.Module], object]:
    """Behind the first block."""

    def called(module: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> Tensor | None:
        found = function(z)
        return found if returns else None

    return lambda model: model[0].register_forward_hook(called)


BETWEEN = {
    "a hook": hook(torch.sum),
    "a hook that returns something else": hook(lambda z: 2 * z, returns=True),
    "a hook that writes": hook(lambda z: z.mul_(2)),
    "a hook that writes behind autograd's back": hook(lambda z: z.data.mul_(2)),
    "a hook in front": lambda model: model[1].register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "a module": lambda model: model.insert(1, nn.ReLU(inplace=True)),
    "another block": lambda model: model.insert(1, BasicBlock(16, 16)),
    "a block that was compiled": lambda model: setattr(model[1], "_compiled_call_impl", model[1].forward),
    "a forward of its own": lambda model: setattr(model[0], "forward", lambda x, own=model[0].forward: 3 * own(x)),
}
"""What sees or changes the output of the first of two blocks."""


@pytest.mark.parametrize("name", BETWEEN)
def test_what_somebody_may_change_has_its_own_moments(name):
    model, x = row(PreActBlock(16, 16), PreActBlock(16, 16)), torch.randn(2, 16, 4, 5, requires_grad=True)
    BETWEEN[name](model)
    assert passes_for_moments(model, x) == 2
    found = []
    for road in ("triton", "eager"):
        model[-1].norm1.reset_running_stats()
        with implementation(road):
            z = model(x)
        found.append([z, *torch.autograd.grad(z.square().sum(), x), model[-1].norm1.running_mean.clone()])
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3 * eager.abs().max().item())


def test_no_moments_are_taken_that_nobody_reads():
    x = torch.randn(2, 16, 4, 5)
    channels_last = {"memory_format": torch.channels_last}

    def written(model: nn.Module, road: str = "triton") -> list[int]:
        """By the first block's last launch, and how many passes take moments."""
        with implementation(road), trace() as t:
            model(x.contiguous(**channels_last))
        convolutions = [launch for launch in t.launches if "conv" in launch.name]
        passes = sum(launch.name == "channel_moments" for launch in t.launches)
        return [convolutions[1].bytes_written - 4 * x.numel(), passes]

    model = row(PreActBlock(16, 16), PreActBlock(16, 16)).to(**channels_last)
    vectors = 4 * 2 * 16  # of one tile
    assert written(model) == [vectors, 1]
    assert written(model, "mixed") == [0, 4]
    model[1].norm1.eval()
    assert written(model) == [0, 1], "fixed statistics behind those of the batch"
    model[0].eval()
    model[1].train()
    assert written(model) == [vectors, 0], "and before them"
    assert written(model.eval()) == [0, 0]


def test_a_block_that_does_not_fit_drops_what_it_was_handed():
    model, x = row(PreActBlock(16, 16), PreActBlock(16, 16)), torch.randn(2, 16, 4, 5)
    model[1].norm2 = nn.GroupNorm(4, 16)
    assert passes_for_moments(model, x) == 1
    with implementation("triton"):
        assert "GroupNorm" in model[1].why_eager(x)
    assert model[1].norm1.num_batches_tracked == 1


@pytest.mark.parametrize("at", [0, 1])
def test_a_block_that_was_never_recognised_runs_eager_in_a_row(at):
    model, x = row(*(theirs(PreActBasic, 16) for _ in range(2))), torch.randn(2, 16, 4, 5)
    parts = {"conv_layer": create_conv2d, "norm_layer": BatchNormAct2d, "act_layer": nn.ReLU}
    model[at] = type(model[at])(16, bottle_ratio=1.0, **parts)
    assert passes_for_moments(model, x) == 1
    with torch.no_grad():
        assert passes_for_moments(model, x) == 1


def test_rows_under_checkpointing_and_copied():
    model, x, dz = draw(row, (2, 16, 4, 4), torch.float32)
    ours = step(model, x, dz, "triton")
    for reentrant in (False, True):
        again = step(model, x, dz, "triton", lambda b, r=reentrant: lambda x: checkpoint(b, x, use_reentrant=r))
        for name, value in ours.items():
            if name.endswith("grad") or name == "z":
                assert torch.equal(value, again[name]), name
    assert passes_for_moments(pickle.loads(pickle.dumps(model)), x) == 1


def test_rows_under_autocast_and_in_inference_mode():
    model, x = row(), torch.randn(2, 16, 4, 5)
    with torch.autocast(DEVICE, torch.float16):
        assert passes_for_moments(model, x.half()) == 1
        assert passes_for_moments(model, x) == 0, "eager, which returns what autocast makes of the sum"
    with torch.inference_mode():
        assert passes_for_moments(model, x) == 1


def test_compilers_and_tracers_see_the_blocks_of_a_row():
    torch._dynamo.reset()
    model, called = row(PreActBlock(16, 16), PreActBlock(16, 16)), []
    apart = nn.Sequential(*copy.deepcopy(model))

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
        called.extend(node.target for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=make_boxed_compiler(backend)))
    leaves = [torch.randn(2, 16, 4, 5, requires_grad=True)]
    leaves.append(leaves[0].detach().clone().requires_grad_())
    with implementation("triton"):
        for function, x in zip((compiled, apart), leaves, strict=True):
            function(x).square().sum().backward()
        assert torch.equal(*(x.grad for x in leaves))
        operators = torch.ops.resnet_fused
        assert called.count(operators.preact_conv.default) == 2 and operators.raw_sum.default not in called
        with torch.no_grad():
            torch.testing.assert_close(fx.symbolic_trace(model)(x), apart(x), rtol=1e-4, atol=1e-4)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert model(x).shape == x.shape


def test_in_evaluation_the_blocks_of_a_row_are_called_as_they_are(monkeypatch):
    """So that each repeats its launches."""
    model, x, asked = row().eval(), torch.randn(2, 16, 4, 5), []
    ahead = FusedBlock.forward_ahead
    monkeypatch.setattr(FusedBlock, "forward_ahead", lambda *arguments: asked.append(1) or ahead(*arguments))
    with implementation("triton"), torch.no_grad():
        want = model(x)
        assert len(asked) == 3
        assert torch.equal(model(x), want) and len(asked) == 3
    assert passes_for_moments(model.train(), x) == 1 and len(asked) == 6


def test_layers_and_channels_are_checked():
    with pytest.raises(ValueError, match=r"layers and channels must have as many elements; got \[1\] and \[8, 16\]"):
        ResNetV2(PreActBlock, [1], [8, 16])


@pytest.mark.parametrize(("name", "blocks"), [("resnetv2_18", 8), ("resnetv2_50", 16)])
def test_timms_models_are_recognised(name, blocks):
    with torch.device("meta"):
        model = timm.create_model(name)
    before = [(n, type(m)) for n, m in model.named_modules()]
    fuse(model)
    found = [m for m in model.modules() if runs_fused(m)]
    assert len(found) == blocks
    assert [row.implementation for row in explain(model).rows] == ["fused"] * blocks
    assert [(n, type(m)) for n, m in unfuse(model).named_modules()] == before


class Written(nn.Module):
    """A block as people write it, with functions."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_a, self.bn_b = nn.BatchNorm2d(12), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(12, 8, 3, 2, 1, bias=False), nn.Conv2d(8, 24, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(12, 24, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn_a(x))
        short = self.short(out)
        out = self.b(nn.functional.relu(self.bn_b(self.a(out)), inplace=True))
        out += short
        return out


class Twice(Written):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn_a(x))
        hidden = self.a(out)
        return self.b(torch.relu(self.bn_b(hidden))) + self.short(out) + hidden.sum()


class Aside(Written):
    """Which writes to what it computes, and does not look at it."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn_a(x))
        hidden = self.a(out)
        hidden.relu_()
        return self.b(torch.relu(self.bn_b(hidden))) + self.short(out)


class NormTwice(Written):
    """Which takes the running statistics twice."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.bn_b(self.a(torch.relu(self.bn_a(x)))))
        return self.b(hidden) + self.short(torch.relu(self.bn_a(x)))


class OfItself(nn.Module):
    """Which writes the sum to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(12), nn.Conv2d(12, 12, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x += self.conv(torch.relu(self.bn(x)))
        return x


class OfTheInput(Written):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.bn_b(self.a(torch.relu(self.bn_a(x)))))) + self.short(x)


def test_a_block_that_is_written_out_is_recognised():
    block = fuse(Written(), strict=True)
    check(*draw(lambda: fuse(Written(), strict=True), (2, 12, 5, 4), torch.float32), "triton")
    assert block.described()[0].norm_first


class Frozen(Written):
    """Of norms whose vectors may have a dtype that the shortcut has not."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_a, self.bn_b = FrozenBatchNorm2d(12), FrozenBatchNorm2d(8)


class OtherNorm(Written):
    """Whose shortcut reads what another norm makes of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_c = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(torch.relu(self.bn_b(self.a(torch.relu(self.bn_a(x))))))
        return out + self.short(torch.relu(self.bn_c(x)))


class OneChannel(nn.Module):
    """Which is added to all channels of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(12), nn.Conv2d(12, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.bn(x))) + x


class Reflecting(Written):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(8, 24, 3, 1, 1, bias=False, padding_mode="reflect")


class ActivatedTwice(Written):
    def __init__(self) -> None:
        super().__init__()
        self.bn_a = BatchNormAct2d(12, act_layer=nn.SiLU)


OTHER_UNITS = [NormTwice, OfTheInput, Frozen, OtherNorm, Reflecting, ActivatedTwice]


@pytest.mark.parametrize("kind", [Twice, Aside, OfItself, OneChannel, *OTHER_UNITS])
def test_what_computes_something_else_is_not_recognised(kind):
    assert not isinstance(recognise(kind()), BlockLayout)


@pytest.mark.parametrize("kind", OTHER_UNITS)
def test_the_units_of_what_computes_something_else_are_fused(kind):
    block, x, dz = draw(lambda: fuse(kind(), strict=True), (2, 12, 5, 4), torch.float32)
    assert isinstance(block, ConvertedUnits)
    check(block, x, dz, "triton")


def test_a_block_with_an_average_pool_in_front_of_the_projection_is_units():
    with torch.device("meta"):
        blocks = fuse(timm.create_model("resnetv2_50d")).stages[1].blocks
    assert isinstance(blocks[0], ConvertedUnits)
    assert isinstance(blocks[1], ConvertedBlock)


def test_a_norm_of_timms_with_another_activation_or_a_drop_layer():
    block = theirs(TheirBottleneck, 16)
    for change in (lambda b: setattr(b.norm2, "act", nn.PReLU()), lambda b: setattr(b.norm2, "drop", nn.Dropout())):
        twin = copy.deepcopy(block)
        change(twin)
        with implementation("triton"):
            assert twin.why_eager(torch.randn(2, 16, 4, 4)) is not None
        assert isinstance(fuse(unfuse(twin), strict=True), ConvertedUnits)


def test_every_model_is_public():
    made = [name for name in vars(models_v2) if name.startswith("resnet")]
    assert made == list(models_v2.MODELS) == [f"resnet{depth}_v2" for depth in NAMES]
    assert set(made) <= set(resnet_fused.__all__)
