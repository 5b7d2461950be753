"""Squeeze and excitation: the mean of each image from the epilogue, the gate in the pass that adds the shortcut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, EcaModule, SEModule, get_attn
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.senet import SEBottleneck
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet_fused import explain, fuse, implementation, trace, unfuse
from resnet_fused.convert import ConvertedUnits
from resnet_fused.engine import ops
from resnet_fused.engine.forward import Convolution
from resnet_fused.kernels.conv import Geometry
from resnet_fused.kernels.launch import dry_run
from resnet_fused.plan.problem import Tiles
from tests.rule import assert_within_rule
from tests.training import check, draw, randomise, step
from tests.zoo import Gated

pytestmark = pytest.mark.usefixtures("on_device")

ROADS = ["triton", "mixed"]


def projection(ci: int, co: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))


class WrittenOut(Gated):
    """Without a module of its own for the gate, and the product the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv3(self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))))
        gate = self.se.fc2(nn.functional.silu(self.se.fc1(nn.functional.adaptive_avg_pool2d(out, 1)))).sigmoid()
        return self.act(gate * out + x)


class Alone(Gated):
    """Nothing is added behind the gate."""

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.bn3(self.conv3(self.act(self.bn1(self.conv1(x))))))


SE = partial(SEModule, act_layer=nn.SiLU)
"""Not with a ReLU, whose input would lie within rounding of zero now and then."""


def smooth(block: Any) -> nn.Module:
    block.se_module.relu = nn.SiLU()
    return block


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "identity": lambda: Gated(16, 16),
    "projection": lambda: Gated(16, 32, 2),
    "silu": lambda: Gated(16, 16, act=nn.SiLU()),
    "written out": lambda: WrittenOut(16, 16),
    "alone": lambda: Alone(16, 32),
    "timm bottleneck": lambda: Bottleneck(16, 4, attn_layer=SE),
    "timm basic": lambda: BasicBlock(16, 32, 2, projection(16, 32, 2), attn_layer=SE),
    "timm eca": lambda: Bottleneck(16, 4, attn_layer=EcaModule),
    "timm ese": lambda: BasicBlock(16, 16, attn_layer=get_attn("ese")),
    "legacy bottleneck": lambda: smooth(SEBottleneck(16, 4, groups=2, reduction=4)),
}


def fused(build: Callable[[], nn.Module]) -> nn.Module:
    return fuse(build(), strict=True)


def gated_pieces(module: nn.Module) -> int:
    layout, _ = module.described()
    return sum(piece.gate is not None for piece in layout.pieces[:1])


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_training_step(name, road):
    block, x, dz = draw(lambda: fused(BLOCKS[name]), (3, 16, 5, 6), torch.float32)
    assert isinstance(block, ConvertedUnits)
    assert gated_pieces(block) == 1
    check(block, x, dz, road)
    with implementation(road), trace() as t:
        copy.deepcopy(block)(x.requires_grad_()).backward(dz)
    names = [launch.name for launch in t.launches]
    assert names.count("squeeze") == names.count("gate_gradient") == names.count("squeeze_gradient") == 1
    passes = [launch.name for launch in t.launches if launch.bytes_written >= dz.nbytes]
    assert not {"aten.mean", "aten.mul", "aten.sum"} & set(passes)
    assert type(unfuse(block)) is type(BLOCKS[name]())


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["identity", "projection", "silu"])
def test_gradients_with_fixed_statistics(name, road):
    block, x, dz = draw(lambda: fused(BLOCKS[name]).eval(), (2, 16, 5, 4), torch.float32)
    check(block, x, dz, road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["identity", "projection"])
def test_a_training_step_in_fp16(name, road):
    block, x, dz = draw(lambda: fused(BLOCKS[name]), (3, 16, 4, 5), torch.float16)
    check(block, x, dz, road, sums=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", BLOCKS)
def test_inference(name, road, dtype):
    torch.manual_seed(0)
    block = fused(BLOCKS[name]).eval()
    randomise(block)
    x = torch.randn(2, 16, 5, 4)
    with torch.no_grad():
        with implementation("eager"):
            exact, eager = (
                copy.deepcopy(block).double()(x.to(dtype).double()),
                copy.deepcopy(block).to(dtype)(x.to(dtype)),
            )
        with implementation(road), trace() as t:
            ours = block.to(dtype)(x.to(dtype))
    assert_within_rule(ours, eager, exact, sums=16)
    assert [launch.name for launch in t.launches].count("squeeze") == 1


def test_launches_and_bytes_of_an_inference():
    """No pass over pixels beside the convolutions': those without a gate, and two small launches for the squeeze."""
    with torch.device("meta"):
        block = fuse(Gated(256, 256)).eval().to(torch.bfloat16, memory_format=torch.channels_last)
        x = torch.empty(32, 256, 56, 56, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.no_grad(), implementation("triton"), dry_run(90), trace() as t:
        block(x)
    own = [launch for launch in t.launches if not launch.name.startswith("aten.")]
    assert [launch.name for launch in own] == ["conv_box", "conv_box", "squeeze", "conv_box", "conv_box"]
    # conv1 reads x, as conv3 does, which writes z; what is between them has a quarter, written and read twice.
    assert sum(launch.bytes_read + launch.bytes_written for launch in own) == pytest.approx(4 * x.nbytes, rel=0.02)


class Narrow(Gated):
    """Its last convolution, of 1x1, leaves pixels out."""

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__(inplanes, planes, 2)
        self.conv3.stride = (2, 2)
        self.conv2.stride = (1, 1)


class Front(Gated):
    """The convolution in front of a gate reads what no launch has made."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.se(self.bn3(self.conv3(nn.functional.avg_pool2d(x, 3, 1, 1)))))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kind", ["strided", "front"])
def test_means_of_what_a_last_convolution_reads(kind, road):
    torch.manual_seed(0)
    block = fuse(Narrow(16, 32) if kind == "strided" else Front(64, 16), strict=True).eval()
    randomise(block)
    twin, x = unfuse(copy.deepcopy(block)), torch.randn(2, 16 if kind == "strided" else 4, 5, 4)
    with torch.no_grad(), implementation(road), trace() as t:
        torch.testing.assert_close(block(x), twin(x), rtol=1e-4, atol=1e-4)
    assert [launch.name for launch in t.launches].count("squeeze") == (kind == "strided")


@pytest.mark.parametrize("road", ROADS)
def test_a_gate_alone_is_trained(road):
    """Of a block whose statistics and other parameters are fixed."""
    block, x, dz = draw(lambda: fused(BLOCKS["identity"]).eval(), (2, 16, 5, 4), torch.float32)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name.startswith("se."))
    found = []
    for way in ("eager", road):
        twin = copy.deepcopy(block)
        with implementation(way):
            twin(x.detach()).backward(dz)
        found.append([p.grad for p in twin.se.parameters()])
    for ours, eager in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)


def passes(block: nn.Module, x: Tensor) -> tuple[float, float]:
    """Bytes of a training step, forward and backward, in sizes of x."""
    block.to(torch.bfloat16, memory_format=torch.channels_last)
    with implementation("triton"), dry_run(90), trace() as t:
        z = block(x.detach().requires_grad_())
        seen = len(t.launches)
        z.backward(torch.empty_like(z))
    moved = [launch.bytes_read + launch.bytes_written for launch in t.launches]
    return sum(moved[:seen]) / x.nbytes, sum(moved[seen:]) / x.nbytes


def test_no_more_passes_than_one_backward():
    """Than the same block without the gate: forward none, backward one, which reads two tensors and writes one."""

    class Plain(Gated):
        def forward(self, x: Tensor) -> Tensor:
            out = self.bn3(self.conv3(self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))))
            return self.act(out + x)

    with torch.device("meta"):
        gated, plain = fuse(Gated(256, 256)), fuse(Plain(256, 256))
        x = torch.empty(256, 256, 56, 56, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    forward, backward = passes(gated, x)
    forward_plain, backward_plain = passes(plain, x)
    assert forward == pytest.approx(forward_plain, rel=0.02)
    # A pass of its own writes dy (3); both gradients of conv3 then read that alone, and not g and y (2 less).
    assert backward - backward_plain == pytest.approx(3 - 2, abs=0.1)


def test_saved_tensors_are_those_without_a_gate():
    """But for a number for each image and channel."""

    def saved(block: nn.Module) -> int:
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(4, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        with implementation("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block.to(memory_format=torch.channels_last)(x)
        return sum(found.values())

    class Plain(Gated):
        def forward(self, x: Tensor) -> Tensor:
            out = self.bn3(self.conv3(self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))))
            return self.act(out + x)

    one = 4 * 32 * 4
    assert saved(fuse(Gated(32, 32))) - saved(fuse(Plain(32, 32))) <= 12 * one + 4 * 600


@pytest.mark.parametrize("only", ["se.fc1.weight", "conv3.weight", "bn1.bias", "x", "downsample.0.weight"])
def test_what_alone_needs_a_gradient_gets_it(only):
    block, x, dz = draw(lambda: fused(BLOCKS["projection"]), (2, 16, 5, 4), torch.float32)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name == only)
    found = []
    for road in ("eager", "triton"):
        twin, leaf = copy.deepcopy(block), x.clone().requires_grad_(only == "x")
        with implementation(road):
            twin(leaf).backward(dz)
        found.append(leaf.grad if only == "x" else twin.get_parameter(only).grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_a_loss_of_what_a_hook_saw_of_the_gate():
    """The gate's own layers are called as they are, and what becomes of their outputs reaches the convolutions."""
    block, x, dz = draw(lambda: fused(BLOCKS["identity"]), (2, 16, 5, 4), torch.float32)
    found = []
    for road, both in (("eager", True), ("triton", True), ("eager", False), ("triton", False)):
        twin, seen = copy.deepcopy(block), []
        twin.se.fc2.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
        with implementation(road), trace() as t:
            z = twin(x)
            loss = seen[0].square().sum() + ((z * dz).sum() if both else 0)
            loss.backward()
        assert ("squeeze" in [launch.name for launch in t.launches]) == (road == "triton")
        found.append([p.grad for p in twin.parameters() if p.grad is not None])
    for ours, eager in ((found[1], found[0]), (found[3], found[2])):
        assert len(ours) >= len(eager)
        for a, b in zip(ours, eager, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def hook_on_the_gate(block: Any) -> None:
    block.se.register_forward_hook(lambda m, i, out: out * 2)


def hook_on_its_pool(block: Any) -> None:
    block.se.avgpool.register_forward_hook(lambda m, i, out: out + i[0].amax((2, 3), keepdim=True))


def hook_on_the_norm(block: Any) -> None:
    block.bn3.register_forward_hook(lambda m, i, out: out + 1)


def another_gate(block: Any) -> None:
    block.se.scale_activation = nn.Tanh()


def one_gate_for_all_channels(block: Any) -> None:
    block.se.fc2 = nn.Conv2d(block.se.fc2.in_channels, 1, 1)
    nn.init.constant_(block.se.fc2.weight, 0.5)
    nn.init.constant_(block.se.fc2.bias, 0.1)


class Wide(nn.Sigmoid):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


def a_gate_in_fp64(block: Any) -> None:
    block.se.scale_activation = Wide()


def no_gate(block: Any) -> None:
    block.se = nn.Identity()


def a_pool_of_more(block: Any) -> None:
    block.se.avgpool.output_size = (None, None)


def an_activation_in_the_norm(block: Any) -> None:
    block.bn3.act = nn.Hardswish()


CHANGES = [
    *(hook_on_the_gate, hook_on_its_pool, hook_on_the_norm, another_gate, one_gate_for_all_channels, a_gate_in_fp64),
    *(no_gate, a_pool_of_more, an_activation_in_the_norm),
]


class Quiet(Gated):
    """Without a shortcut, and with a norm that may have an activation."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.bn3 = BatchNormAct2d(16, apply_act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.bn3(self.conv3(self.act(self.bn1(self.conv1(x))))))


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_behind_fuse_counts(change):
    torch.manual_seed(0)
    block = fused(Quiet if change is an_activation_in_the_norm else BLOCKS["identity"]).eval()
    randomise(block)
    twin, x = unfuse(copy.deepcopy(block)), torch.randn(2, 16, 5, 4)
    change(block)
    change(twin)
    with torch.no_grad(), implementation("triton"):
        torch.testing.assert_close(block(x), twin(x), rtol=1e-4, atol=1e-4)


class OfEachPixel(Gated):
    """The gate depends on more than means."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv3(self.act(self.bn1(self.conv1(x)))))
        return self.act(out * torch.sigmoid(out.mean((2, 3), keepdim=True) + out[:, :, :1, :1]) + x)


class OfTheInput(Gated):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv3(self.act(self.bn1(self.conv1(x)))))
        return self.act(out * torch.sigmoid(out.mean((2, 3), keepdim=True) + x.mean((2, 3), keepdim=True)) + x)


class OfRows(Gated):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv3(self.act(self.bn1(self.conv1(x)))))
        return self.act(out * torch.sigmoid(out.mean((2,), keepdim=True)) + x)


class ReadTwice(Gated):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv3(self.act(self.bn1(self.conv1(x)))))
        gate = torch.sigmoid(out.mean((2, 3), keepdim=True))
        return self.act(out * gate + x) + gate


class Excited(Gated):
    """Another gate, of the means."""

    def gate(self, means: Tensor) -> Tensor:
        return self.se.scale_activation(means)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv3(self.act(self.bn1(self.conv1(x)))))
        return self.act(out * self.gate(out.mean((2, 3), keepdim=True)) + x)


class InFp64(Excited):
    def gate(self, means: Tensor) -> Tensor:
        return means.double().sigmoid()


class OfBools(Excited):
    def gate(self, means: Tensor) -> Tensor:
        return means > 0


class OfEveryPlace(Excited):
    def gate(self, means: Tensor) -> Tensor:
        return means.sigmoid().expand(-1, -1, 5, 4)


class OfARow(Excited):
    def gate(self, means: Tensor) -> Tensor:
        return means.flatten(1)[:1, :4].sigmoid()


class OfTwoMeans(Gated):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv3(self.act(self.bn1(self.conv1(x)))))
        one, other = out.mean((2, 3), keepdim=True), out.mean((2, 3), keepdim=True)
        return self.act(out * (one.mul_(2) + other).sigmoid() + x)


@pytest.mark.parametrize(
    "kind", [OfTwoMeans, OfEachPixel, OfTheInput, OfRows, ReadTwice, InFp64, OfBools, OfEveryPlace, OfARow]
)
def test_what_is_no_gate_is_computed_as_it_is(kind):
    torch.manual_seed(0)
    block = fuse(kind(16, 16), strict=True).eval()
    randomise(block)
    twin, x = unfuse(copy.deepcopy(block)), torch.randn(2, 16, 5, 4)
    with torch.no_grad(), implementation("triton"), trace() as t:
        torch.testing.assert_close(block(x), twin(x), rtol=1e-4, atol=1e-4)
    names = [launch.name for launch in t.launches]
    assert "squeeze" not in names
    assert "conv_forward" in names


class Overwritten(Excited):
    """Writes to the means."""

    def gate(self, means: Tensor) -> Tensor:
        return means.mul_(2).sigmoid_()


class Dropped(Excited):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.drop = nn.Dropout(0.5, inplace=True)

    def gate(self, means: Tensor) -> Tensor:
        return self.se.scale_activation(self.drop(means))


@pytest.mark.parametrize("kind", [Overwritten, Dropped])
def test_a_gate_that_writes_in_place(kind):
    block, x, dz = draw(lambda: fused(lambda: kind(16, 16)), (2, 16, 5, 4), torch.float32)
    assert gated_pieces(block) == 1
    found = []
    for road in ("eager", "triton"):
        torch.manual_seed(0)
        found.append(step(block, x, dz, road))
    for name, eager in found[0].items():
        torch.testing.assert_close(found[1][name], eager, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gradients", [True, False])
def test_no_image(gradients):
    block = fused(BLOCKS["projection"]).eval()
    with torch.set_grad_enabled(gradients), implementation("triton"):
        assert block(torch.randn(0, 16, 6, 4)).shape == (0, 32, 3, 2)


def test_under_autocast():
    block, x, dz = draw(lambda: fused(BLOCKS["projection"]), (2, 16, 6, 4), torch.float32)
    found = []
    for road in ("eager", "triton"):
        twin, leaf = copy.deepcopy(block), x.clone().requires_grad_()
        with implementation(road), torch.autocast("cpu", torch.bfloat16):
            z = twin(leaf)
        z.backward(dz.to(z.dtype))
        found.append((z, leaf.grad, twin.se.fc1.weight.grad))
    for ours, eager in zip(found[1], found[0], strict=True):
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("training", [True, False])
def test_under_torch_compile(training):
    torch._dynamo.reset()
    block, x, dz = draw(lambda: fused(BLOCKS["projection"]).train(training), (2, 16, 5, 4), torch.float32)
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with implementation("triton"), torch.set_grad_enabled(training):
        leaves = [x.clone().requires_grad_(training) for _ in range(2)]
        z, want = compiled(leaves[0]), twin(leaves[1])
        torch.testing.assert_close(z, want, rtol=1e-5, atol=1e-5)
        if training:
            z.backward(dz)
            want.backward(dz)
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(block.se.fc1.weight.grad, twin.se.fc1.weight.grad, rtol=1e-4, atol=1e-4)


def test_under_checkpointing():
    block, x, dz = draw(lambda: fused(BLOCKS["identity"]), (2, 16, 5, 4), torch.float32)
    plain = step(block, x, dz, "triton")
    again = step(block, x, dz, "triton", lambda b: lambda t: checkpoint(b, t, use_reentrant=False))
    for name in plain:
        if name.endswith("grad") or name == "z":
            assert torch.equal(plain[name], again[name]), name


@pytest.mark.parametrize("name", ["identity", "projection", "silu"])
def test_what_is_saved_may_come_back_in_another_layout(name):
    block, x, dz = draw(lambda: fused(BLOCKS[name]), (2, 16, 5, 4), torch.float32)
    found = []
    for unpack in (lambda t: t, lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1)):
        twin = copy.deepcopy(block)
        with implementation("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            found.append(torch.autograd.grad(twin(x), [*twin.parameters()], dz))
    assert all(map(torch.equal, *found))


def test_a_graph_that_is_retained_gives_the_same_again():
    block, x, dz = draw(lambda: fused(BLOCKS["projection"]), (2, 16, 5, 4), torch.float32)
    with implementation("triton"):
        z = block(leaf := x.requires_grad_())
        first = torch.autograd.grad(z, leaf, dz, retain_graph=True)
        assert torch.equal(*first, *torch.autograd.grad(z, leaf, dz))


def test_second_derivatives_are_refused():
    block, x, dz = draw(lambda: fused(BLOCKS["identity"]), (2, 16, 5, 4), torch.float32)
    with implementation("triton"):
        z = block(x.requires_grad_())
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(z, x, dz, create_graph=True)


def test_several_gradients_at_once():
    block, x, dz = draw(lambda: fused(BLOCKS["projection"]), (2, 16, 5, 4), torch.float32)
    both = torch.stack([dz, 2 * dz])
    with implementation("triton"):
        z = block(x.requires_grad_())
        (found,) = torch.autograd.grad(z, x, both, is_grads_batched=True, retain_graph=True)
        (one,) = torch.autograd.grad(z, x, dz)
    torch.testing.assert_close(found, torch.stack([one, 2 * one]), rtol=1e-4, atol=1e-4)


def test_operators_keep_their_promises():
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    operators = torch.ops.resnet_fused
    cl = {"memory_format": torch.channels_last}
    x, y, z = (torch.randn(2, c, 5, 4).contiguous(**cl) for c in (16, 12, 12))
    w = torch.randn(12, 16, 1, 1).contiguous(**cl)
    mean, var, gamma, beta = torch.randn(12), torch.rand(12), torch.rand(12), torch.rand(12)
    convolution = Convolution(Geometry(), True, Tiles()).encode()
    unit = (x, None, w, "identity", None, gamma, beta, mean, var, torch.zeros((), dtype=torch.int64), 0.1, 1e-5, True)
    torch.library.opcheck(operators.squeezed_forward.default, (*unit, convolution, ""), test_utils=tests)
    y, stats, _, means = ops.squeezed_forward(*unit, convolution, "")
    gate = torch.rand(2, 12)
    for residual, residual_stats in ((None, None), (z, None), (z, stats)):
        joined = (y, stats, gate, residual, residual_stats, 1, 0, "relu", torch.float32)
        torch.library.opcheck(operators.join_forward.default, joined, test_utils=tests)
        second = (None, None) if residual_stats is None else (residual, residual_stats)
        arguments = (torch.randn_like(y), z.relu(), y, stats, gate, *second, 1, 0, "relu")
        torch.library.opcheck(operators.gate_backward.default, arguments, test_utils=tests)
    sums = torch.randn(2, 2, 12)
    chain = ([w], [None], [y], [stats], [*convolution], [*w.stride()], [False], [""], ["relu"], "none", 1, 0)
    for needs in ([True, False, True, False, True, True], [True, False, True, False, False, False]):
        arguments = (torch.randn_like(y), sums, gate, torch.randn(2, 12), means, x, None, *chain)
        arguments = (*arguments, needs, torch.float32, torch.float32)
        torch.library.opcheck(operators.squeezed_backward.default, arguments, test_utils=tests)


def test_explain_says_how_much_of_it_is_fused():
    block = fused(BLOCKS["identity"]).eval()
    with torch.no_grad(), implementation("triton"):
        (row,) = explain(block, torch.randn(2, 16, 5, 4)).to_dict()
    assert row["implementation"] == "fused"
    assert 0.95 < row["share"] < 1, "all but what makes the gate"
