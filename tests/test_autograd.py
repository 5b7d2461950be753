"""Training a block: outputs, gradients and running statistics against fp64, for every form of block and road."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet_fused import BasicBlock, Bottleneck, ResidualBlock, functional, fuse, implementation
from resnet_fused.engine import eligible, ops, reference
from resnet_fused.engine.forward import Convolution
from resnet_fused.engine.trace import trace
from resnet_fused.kernels.activation import IDENTITY
from resnet_fused.kernels.conv import Geometry
from resnet_fused.plan.problem import Tiles
from tests.training import DEVICE, Stem, WatchedReLU, check, draw, step

pytestmark = pytest.mark.usefixtures("on_device")

ROADS = ["triton", "mixed"]


def projection(inplanes: int, planes: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


class Pooled(nn.Module):
    """A block whose shortcut is that of ResNet-D: an average pool in front of the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(12, 20, 3, 2, 1, bias=False), nn.BatchNorm2d(20)
        self.conv2, self.bn2 = nn.Conv2d(20, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(12, 20, 1, bias=False), nn.BatchNorm2d(20))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.shortcut(x))


class Linear(nn.Module):
    """An inverted bottleneck: no ReLU behind the middle of the chain, nor behind the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        # Behind a 1x1 convolution the next batch norm would make the gradient of bn2.bias vanish, but for rounding.
        self.conv3, self.bn3 = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return x + self.bn3(self.conv3(out))


class LinearProjection(nn.Module):
    """Two units behind which no ReLU follows the addition of a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.downsample = projection(12, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + self.downsample(x)


def run_of_layers() -> nn.Module:
    """Two units in a row: nothing is added to them, and no ReLU follows."""
    conv = [nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.Conv2d(8, 16, 3, padding=1, bias=False)]
    return fuse(nn.Sequential(conv[0], nn.BatchNorm2d(8), nn.ReLU(), conv[1], nn.BatchNorm2d(16)), strict=True)


def padded_projection() -> nn.Module:
    """A projection that reads pixels beyond the image too."""
    block = ResidualBlock(12, [nn.Conv2d(12, 16, 3, 2, 2)], "projection")
    block.downsample[0] = nn.Conv2d(12, 16, 1, 2, 1, bias=False)
    return block


BLOCKS = {
    "basic": (lambda: BasicBlock(12, 12), (2, 12, 5, 3)),
    "basic, projection": (lambda: BasicBlock(12, 20, 2, projection(12, 20, 2)), (2, 12, 5, 7)),
    "bottleneck": (lambda: Bottleneck(16, 4), (2, 16, 3, 5)),
    "bottleneck, projection": (lambda: Bottleneck(12, 6, 2, projection(12, 24, 2)), (2, 12, 7, 5)),
    "bottleneck, projection with stride 1": (lambda: Bottleneck(12, 6, 1, projection(12, 24, 1)), (2, 12, 3, 4)),
    "bottleneck, groups": (lambda: Bottleneck(16, 4, groups=4, base_width=64), (2, 16, 3, 4)),
    "bottleneck, dilation": (lambda: Bottleneck(16, 4, dilation=2), (2, 16, 5, 4)),
    "one unit": (lambda: ResidualBlock(16, [(16, 3)]), (2, 16, 5, 3)),
    "four units": (lambda: ResidualBlock(12, [(8, 1), (8, 3), (8, 3), (12, 1)]), (2, 12, 3, 4)),
    "padded identity": (lambda: ResidualBlock(12, [(20, 3), (20, 3)], "pad", stride=2), (2, 12, 5, 7)),
    "pooled projection": (lambda: fuse(Pooled(), strict=True), (2, 12, 6, 4)),
    "projection of two strides": (
        lambda: ResidualBlock(12, [nn.Conv2d(12, 16, 3, (2, 1), 1)], "projection"),
        (2, 12, 5, 3),
    ),
    "padded projection": (padded_projection, (2, 12, 5, 3)),
    "run of layers": (run_of_layers, (2, 12, 3, 5)),
    "without the last ReLU": (lambda: fuse(Linear(), strict=True), (2, 12, 3, 5)),
    "without the last ReLU, projection": (lambda: fuse(LinearProjection(), strict=True), (2, 12, 3, 5)),
    "5x5 and bias": (
        lambda: ResidualBlock(12, [nn.Conv2d(12, 8, 5, padding=2), nn.Conv2d(8, 12, 1)]),
        (2, 12, 4, 3),
    ),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_training_step_in_fp32(name, road):
    build, shape = BLOCKS[name]
    check(*draw(build, shape, torch.float32), road)


def activated(build: Callable[[], nn.Module], activation: nn.Module) -> Callable[[], nn.Module]:
    """What makes a block with another activation."""

    def build_activated() -> nn.Module:
        block = build()
        block.relu = activation
        return block

    return build_activated


OTHERS = [
    *(("basic", act) for act in (nn.ReLU6(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Hardswish(), nn.Identity())),
    *(("bottleneck, projection", act) for act in (nn.SiLU(), nn.LeakyReLU(0.2))),
    *(("padded identity", act) for act in (nn.SiLU(inplace=True), nn.LeakyReLU(-0.3))),
    *(("one unit", nn.SiLU()), ("bottleneck, groups", nn.Hardswish()), ("four units", nn.SiLU())),
    ("projection of two strides", nn.SiLU()),
]


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(("name", "activation"), OTHERS, ids=str)
def test_a_training_step_with_another_activation(name, activation, road):
    build, shape = BLOCKS[name]
    block, x, dz = draw(activated(build, activation), shape, torch.float32)
    with implementation(road):
        assert block.why_eager(x) is None
    check(block, x, dz, road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("name", "activation"),
    [
        *((name, nn.SiLU()) for name in ("basic", "basic, projection", "padded identity")),
        *((name, nn.LeakyReLU(0.2)) for name in ("basic", "bottleneck, projection")),
    ],
    ids=str,
)
def test_a_training_step_with_another_activation_in_fp16_and_with_frozen_norms(name, activation, road):
    build, shape = BLOCKS[name]
    check(*draw(activated(build, activation), (3, *shape[1:]), torch.float16), road)
    frozen, x, dz = draw(activated(lambda: build().eval(), activation), shape, torch.float32)
    for parameter in (frozen.bn1.weight, frozen.bn2.weight):
        parameter.requires_grad_(False)
    check(frozen, x, dz, road)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU6(), nn.ReLU()], ids=str)
def test_the_output_of_a_block_may_change_in_place_where_it_may_in_eager(activation):
    block, x = activated(lambda: BasicBlock(12, 12), activation)(), torch.randn(2, 12, 4, 3)
    found = []
    for road in ("triton", "eager"):
        twin = copy.deepcopy(block)
        with implementation(road):
            z = twin(x).mul_(2).sum()
            try:
                z.backward()
                found.append(twin.conv1.weight.grad)
            except RuntimeError as error:
                found.append("modified by an inplace operation" in str(error))
    if isinstance(activation, nn.ReLU):
        assert found == [True, True]
    else:
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.LeakyReLU(0.2)], ids=str)
def test_no_more_is_kept_than_with_a_relu(activation):
    kept: list[Tensor | None] = []
    block = activated(lambda: BasicBlock(12, 12), activation)()
    x = torch.randn(2, 12, 4, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    with implementation("triton"), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        block(x)
    images = sum(t is not None and t.shape == x.shape for t in kept)
    assert images == (4 if isinstance(activation, nn.ReLU) else 3), "x, both raw outputs, and what a ReLU returned"


STEMS = {
    "7x7": lambda: Stem(filter_size=7),
    "bias": lambda: Stem(bias=True),
    "no gamma": lambda: Stem(affine=False),
    "no running statistics": lambda: Stem(track_running_stats=False),
    "average of all batches": lambda: Stem(momentum=None),
}


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", STEMS)
def test_a_training_step_of_a_stem(name, road, evaluation):
    block, x, dz = draw(STEMS[name], (2, 3, 14, 11), torch.float32)
    check(block.train(not evaluation), x, dz, road)


@pytest.mark.parametrize("road", ROADS)
def test_a_stem_launches_what_it_needs(road):
    """Of the convolution's size, the forward stores its output alone; and the image needs no gradient."""
    stem = Stem().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 14, 11).contiguous(memory_format=torch.channels_last)
    kept: list[Tensor] = []
    with implementation(road), trace() as t, torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        z = stem(x)
    names = [launch.name for launch in t.launches]
    first = ["conv_forward"] if road == "triton" else ["aten.convolution", "channel_moments"]
    assert names == [*first, "batch_norm_stats", "batch_norm_pool"]
    sizes = [t.numel() for t in kept if t is not None and t.dim() == 4]
    assert sorted(sizes)[-2:] == [x.numel(), 2 * 12 * 7 * 6]
    assert sizes.count(z.numel()) == 2, "the peaks, and not the output"
    with implementation(road):
        z = stem(x)
        with trace() as t:
            z.sum().backward()
    names = [launch.name for launch in t.launches if "ones" not in launch.name and "expand" not in launch.name]
    assert names[-4:-1] == ["batch_norm_reduce", "batch_norm_coefs", "batch_norm_pool_backward"]
    assert names[-1] == ("conv_wgrad" if road == "triton" else "aten.convolution_backward")


def test_a_stem_under_autocast_is_as_in_16_bits():
    stem, x = Stem(), torch.randn(2, 3, 14, 11)
    found = []
    for road in ("triton", "eager"):
        twin = copy.deepcopy(stem)
        with implementation(road), torch.autocast(DEVICE, torch.float16):
            z = twin(x)
        z.float().square().sum().backward()
        found.append([z.float(), twin.conv.weight.grad, twin.bn.weight.grad, twin.bn.bias.grad, twin.bn.running_var])
        assert z.dtype == torch.float16
    for ours, eager in zip(*found, strict=True):
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2 * eager.abs().max().item())


@pytest.mark.parametrize("road", ROADS)
def test_what_is_infinite_in_a_frozen_stem_stays_out_of_the_gradient(road):
    stem, x = Stem().eval(), torch.randn(2, 3, 14, 11)
    x[0, 0, 4, 4] = float("inf")
    found = []
    for each in (road, "eager"):
        leaf = x.clone().requires_grad_()
        with implementation(each):
            found.append(torch.autograd.grad(stem(leaf).clamp(max=9).sum(), leaf)[0])
    assert found[1].isfinite().all()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("road", ROADS)
def test_what_alone_of_a_stem_needs_a_gradient_gets_it(road, training):
    stem, x = Stem(bias=True).train(training).requires_grad_(False), torch.randn(2, 3, 14, 11)
    for leaf in (x, *stem.parameters()):
        leaf.requires_grad_()
        found = []
        for each in (road, "eager"):
            with implementation(each):
                found.append(torch.autograd.grad(stem(x).square().sum(), leaf))
        torch.testing.assert_close(*found, rtol=1e-3, atol=2e-3)
        leaf.requires_grad_(False)


def test_second_derivatives_of_a_stem_are_refused():
    stem, x = Stem(), torch.randn(2, 3, 14, 11)
    with implementation("triton"), pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(stem(x).sum(), stem.conv.weight, create_graph=True)


def test_several_gradients_of_a_stem_at_once():
    stem, x = Stem(), torch.randn(2, 3, 14, 11)
    with implementation("triton"):
        z = stem(x)
    dz = torch.randn(2, *z.shape)
    (batched,) = torch.autograd.grad(z, stem.conv.weight, dz, retain_graph=True, is_grads_batched=True)
    for each, given in zip(batched, dz, strict=True):
        torch.testing.assert_close(each, torch.autograd.grad(z, stem.conv.weight, given, retain_graph=True)[0])


def test_the_output_of_a_stem_may_change_in_place():
    """The gradient reads what the pool took its values from, and not those."""
    stem, x = Stem(), torch.randn(2, 3, 14, 11)
    found = []
    for road in ("triton", "eager"):
        with implementation(road):
            found.append(torch.autograd.grad(stem(x).mul_(2).sum(), stem.conv.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["basic, projection", "bottleneck", "bottleneck, projection", "padded identity"])
def test_a_training_step_in_fp16(name, road):
    build, shape = BLOCKS[name]
    check(*draw(build, (3, *shape[1:]), torch.float16), road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["basic", "run of layers", "without the last ReLU, projection"])
def test_the_gradient_that_comes_in_is_left_as_it_was(name, road):
    """In a layout that needs no copy; :func:`step` compares. Without a ReLU it is the very tensor that is worked on."""
    block, x, dz = draw(*BLOCKS[name], torch.float32)
    step(block, x, dz.contiguous(memory_format=torch.channels_last), road)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter cannot do arithmetic in bfloat16")
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_training_step_in_bf16(name, road):
    build, shape = BLOCKS[name]
    check(*draw(build, shape, torch.bfloat16), road)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_samples_are_drawn_whose_gradients_pass_the_same_relus_in_eager_pytorch_as_in_fp64(name, dtype):
    block, x, _ = draw(*BLOCKS[name], dtype)
    assert torch.equal(passed(block, x), passed(copy.deepcopy(block).double(), x.double()))


def passed(block: nn.Module, x: Tensor) -> Tensor:
    """Which elements pass the ReLUs, in a row."""
    with torch.no_grad(), implementation("eager"), WatchedReLU() as watch:
        copy.deepcopy(block)(x)
    return torch.cat([v.flatten() > 0 for v in watch.inputs])


@pytest.mark.parametrize("road", ROADS)
def test_statistics_far_from_zero(road):
    """Mean over standard deviation of 100: raw sums of squares would leave a thousandth of the variance in doubt.

    One rounding of the convolution's output, of the mean, of the scaled output or of the shift is one of a number that
    is 100 times as large as what it leaves, by whatever method, and which way it goes is chance.
    """

    def build() -> nn.Module:
        block = Bottleneck(16, 4)
        block.conv1 = nn.Conv2d(16, 4, 1)
        nn.init.constant_(block.conv1.bias, 60.0)
        return block

    check(*draw(build, (2, 16, 3, 5), torch.float32), road, sums=16 + 4 * 100)


@pytest.mark.parametrize("road", ROADS)
def test_zero_init_starts_as_the_identity(road):
    block = ResidualBlock(12, [(8, 3), (12, 3)], zero_init=True)
    x = torch.randn(2, 12, 4, 3)
    left = step(block, x, torch.randn(2, 12, 4, 3), road)
    assert torch.equal(left["z"], torch.relu(x))
    assert left["conv1.weight.grad"].abs().max() == 0
    assert left["bn2.weight.grad"].abs().max() > 0


FROZEN = {
    "bottleneck, projection": ["bn1", "bn3", "downsample.1", "all"],
    "without the last ReLU, projection": ["bn2", "downsample.1", "all"],
    "5x5 and bias": ["bn1", "bn2", "all"],
}


@pytest.mark.parametrize(("name", "frozen"), [(name, norm) for name, norms in FROZEN.items() for norm in norms])
@pytest.mark.parametrize("road", ROADS)
def test_frozen_batch_norm(name, frozen, road):
    build, shape = BLOCKS[name]

    def build_frozen() -> nn.Module:
        block = build().train()
        norms = [m for at, m in block.named_modules() if isinstance(m, nn.BatchNorm2d) and frozen in (at, "all")]
        assert norms
        for norm in norms:
            norm.eval()
        return block

    check(*draw(build_frozen, shape, torch.float32), road)


@pytest.mark.parametrize("road", ROADS)
def test_what_is_infinite_in_front_of_a_frozen_norm_stays_out_of_the_gradient(road):
    conv, bn = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12).eval()
    x, dz, found = torch.randn(2, 8, 4, 3), torch.randn(2, 12, 4, 3), []
    x[0, 0, 1, 1] = float("inf")
    for each in (road, "eager"):
        leaf = x.clone().requires_grad_()
        with implementation(each):
            functional.conv_bn_act(leaf, conv, bn).backward(dz)
        found.append(leaf.grad)
    assert torch.isfinite(found[1]).all()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("road", ROADS)
def test_what_needs_no_gradient_gets_none(road):
    block, x, dz = draw(lambda: Bottleneck(16, 4), (2, 16, 3, 5), torch.float32)
    everything = step(block, x, dz, road)
    for name in ("conv1.weight", "conv2.weight", "bn3.bias"):
        block.get_parameter(name).requires_grad_(False)
    some = step(block, x, dz, road)
    assert everything.keys() - some.keys() == {"conv1.weight.grad", "conv2.weight.grad", "bn3.bias.grad"}
    assert all(torch.equal(value, everything[name]) for name, value in some.items())


@pytest.mark.parametrize("road", ROADS)
def test_what_alone_needs_a_gradient_gets_it(road):
    """Of all that a block in evaluation reads."""
    layer = eligible.Layer(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8).eval())
    shortcut = functional.Projection(torch.randn(2, 8, 4, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8).eval())
    x = torch.randn(2, 8, 4, 3)
    leaves = [x, shortcut.x, *(p for module in (*layer[:2], *shortcut[1:]) for p in module.parameters())]
    for leaf in leaves:
        leaf.requires_grad_(False)
    for leaf in leaves:
        leaf.requires_grad_()
        found = []
        for each in (road, "eager"):
            with implementation(each):
                found.append(torch.autograd.grad(functional.residual_block(x, [layer], shortcut).square().sum(), leaf))
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
        leaf.requires_grad_(False)


def test_nothing_is_computed_for_what_needs_no_gradient():
    block = Bottleneck(16, 4)
    for module in (block.conv1, block.bn1, block.conv2, block.bn2):
        module.requires_grad_(False)
    with implementation("triton"), trace() as t:
        block(torch.randn(2, 16, 3, 5)).sum().backward()
    names = [launch.name for launch in t.launches]
    assert names.count("conv_dgrad") == 0
    assert names.count("conv_wgrad") == 1


@pytest.mark.parametrize(
    "norm",
    [
        dict(affine=False),
        dict(track_running_stats=False),
        dict(momentum=None),
        dict(eps=1e-2, momentum=0.3),
    ],
    ids=str,
)
def test_arguments_of_batch_norm(norm):
    block, x, dz = draw(
        lambda: BasicBlock(12, 12, norm_layer=lambda c: nn.BatchNorm2d(c, **norm)), (2, 12, 4, 3), torch.float32
    )
    check(block, x, dz, "triton")
    twin = copy.deepcopy(block)
    for _ in range(3):
        with implementation("triton"), torch.no_grad():
            block(x)
        with implementation("eager"), torch.no_grad():
            twin(x)
    for (name, ours), eager in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, eager, msg=name)
    if norm.get("track_running_stats", True):
        assert block.bn1.num_batches_tracked == 3


@pytest.mark.parametrize("memory", ["default", "recompute"])
@pytest.mark.parametrize("road", ROADS)
def test_two_runs_are_equal_to_the_bit(road, memory):
    block, x, dz = draw(lambda: Bottleneck(12, 6, 2, projection(12, 24, 2)), (2, 12, 7, 5), torch.float32)
    block.memory = memory
    first, second = (step(block, x, dz, road) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("name", ["basic", "bottleneck, projection", "one unit", "padded identity"])
@pytest.mark.parametrize("road", ROADS)
def test_recomputing_changes_nothing(name, road):
    block, x, dz = draw(*BLOCKS[name], torch.float32)
    kept = step(block, x, dz, road)
    block.memory = "recompute"
    again = step(block, x, dz, road)
    assert all(torch.equal(value, again[key]) for key, value in kept.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_updates_the_statistics_as_in_eager(reentrant):
    block, x, dz = draw(*BLOCKS["bottleneck"], torch.float32)
    left = []
    for road in ("eager", "triton"):
        twin, leaf = copy.deepcopy(block), x.clone().requires_grad_()
        with implementation(road):
            checkpoint(twin, leaf, use_reentrant=reentrant).backward(dz)
        left.append((leaf.grad, *(p.grad for p in twin.parameters()), *twin.buffers()))
    for ours, eager in zip(*left, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused():
    block, x = Bottleneck(16, 4), torch.randn(2, 16, 3, 5, requires_grad=True)
    with implementation("triton"), pytest.raises(RuntimeError, match=r"first derivatives only.*implementation"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)


def test_transforms_of_functions_run_eager():
    block, x = Bottleneck(16, 4).eval(), torch.randn(2, 16, 3, 5)
    parameters = dict(block.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(block, parameters, (x,)).sum()

    with implementation("triton"):
        gradients = torch.func.grad(loss)(parameters)
    with implementation("eager"):
        loss(parameters).backward()
    assert all(torch.equal(gradients[name], p.grad) for name, p in parameters.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", ["float32 input", "16-bit input"])
def test_autocast(dtype, first):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cannot do arithmetic in bfloat16")
    block, x, dz = draw(*BLOCKS["bottleneck"], torch.float16)
    block, x = block.float(), x.float() if first == "float32 input" else x.to(dtype)
    left = []
    for road in ("eager", "triton", "mixed"):
        with torch.autocast(DEVICE, dtype):
            left.append(step(block, x, dz.float(), road))
    exact = step(copy.deepcopy(block).double(), x.double(), dz.double(), "eager")
    for name, value in exact.items():
        if value.is_floating_point():
            allowed = 3 * (left[0][name].double() - value).abs().max() + 2e-2 * value.abs().max()
            for ours in left[1:]:
                assert ours[name].dtype == left[0][name].dtype, name
                assert (ours[name].double() - value).abs().max() <= allowed, name
    assert left[1]["conv1.weight.grad"].dtype == torch.float32


@pytest.mark.parametrize("road", ROADS)
def test_under_autocast_what_eager_leaves_in_fp32_is_not_rounded(road):
    x = torch.randn(2, 12, 4, 3)
    block = ResidualBlock(12, [(12, 3)], zero_init=True)
    with implementation(road), torch.autocast(DEVICE, torch.float16):
        assert torch.equal(block(x), torch.relu(x)), "the shortcut"
        z = functional.conv_bn_act(x.half(), block.conv1, block.bn1, relu=False)
    z.backward(torch.full_like(z, 3e4))
    assert torch.equal(block.bn1.bias.grad, torch.full((12,), 3e4 * 2 * 4 * 3)), "a sum beyond the range of fp16"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_reaches_every_gradient_scaler(value):
    block, x, dz = draw(*BLOCKS["basic"], torch.float32)
    dz[0, 0, 0, 0] = value
    eager, ours = (step(block, x, dz, road) for road in ("eager", "triton"))
    for name, gradient in eager.items():
        assert torch.isfinite(ours[name]).all() == torch.isfinite(gradient).all(), name


def test_a_block_mixes_implementations_by_the_plan(monkeypatch):
    requests, choose = {1: "triton", 3: "mixed"}, functional.choose

    def by_filter(shape, w_shape, geometry, dtype, direction, device, request, **options):
        return choose(shape, w_shape, geometry, dtype, direction, device, requests[w_shape[2]], **options)

    monkeypatch.setattr(functional, "choose", by_filter)
    check(*draw(*BLOCKS["bottleneck, projection"], torch.float32), "triton")
    requests[3] = "eager"
    check(*draw(*BLOCKS["bottleneck, projection"], torch.float32), "triton")


def test_training_without_gradients_updates_the_statistics():
    block = BasicBlock(12, 12)
    twin, x = copy.deepcopy(block), torch.randn(2, 12, 4, 3)
    with torch.no_grad():
        with implementation("triton"):
            ours = block(x)
        with implementation("eager"):
            eager = twin(x)
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(block.bn2.running_var, twin.bn2.running_var)


def test_operators_pass_opcheck():
    x, w = torch.randn(2, 12, 5, 4), torch.randn(16, 12, 3, 3)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    gamma, beta, mean, var = torch.rand(4, 16)
    batches = torch.zeros((), dtype=torch.int64)
    convolution = Convolution(Geometry((2, 1), (1, 1), (1, 1), 1), True, Tiles()).encode()
    arguments = (x, None, w, "identity", None, gamma, beta, mean, var, batches, 0.1, 1e-5, True, convolution, "")
    operators, tests = torch.ops.resnet_fused, ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operators.unit_forward.default, arguments, test_utils=tests)
    y, stats = ops.unit_forward(*arguments)
    residual = torch.randn_like(y)
    arguments = (y, stats, None, residual, None, 1, 0, "relu", torch.float32)
    torch.library.opcheck(operators.join_forward.default, arguments, test_utils=tests)
    z = ops.join_forward(*arguments)
    needs = [True, True, True, False, True, True]
    rest = (
        [w],
        [None],
        [y],
        [stats],
        convolution,
        w.contiguous().stride(),  # the filter was laid out on the way
        [False],
        [""],
        ["relu"],
        "identity",
        1,
        0,
        needs,
        torch.float32,
        torch.float16,
    )
    arguments = (torch.randn_like(z), z, x, residual, None, None, *rest)
    torch.library.opcheck(operators.residual_backward.default, arguments, test_utils=tests)
    for other in ("identity", "silu"):  # the gradients are those of the output, but not its tensor
        without_z = (arguments[0], None, *arguments[2:14], [other], *arguments[15:])
        torch.library.opcheck(operators.residual_backward.default, without_z, test_utils=tests)
    torch.library.opcheck(operators.pool_forward.default, (y, stats), test_utils=tests)
    pooled, peak, place = ops.pool_forward(y, stats)
    arguments = (torch.randn_like(pooled), None, x, None, peak, place, *rest[:9], "none", 1, 0)
    arguments = (*arguments, [True, False, *needs[2:]], *rest[-2:])
    torch.library.opcheck(operators.residual_backward.default, arguments, test_utils=tests)
    norm = (mean, var, gamma, beta, 1e-5)
    for gate in (None, torch.rand(2, 16)):
        arguments = (x, w, None, *norm, gate, residual, 1, 0, convolution, "silu", torch.float32)
        torch.library.opcheck(operators.conv_bn_act.default, arguments, test_utils=tests)
    arguments = (x, w, None, *norm, convolution, "relu")
    torch.library.opcheck(operators.conv_bn_act_means.default, arguments, test_utils=tests)
    for channels in (3, 12):  # packed, and too many for that
        arguments = (x[:, :channels], w[:, :channels].contiguous(memory_format=torch.channels_last), None, *norm)
        stem = Convolution(Geometry((2, 2), (1, 1), (1, 1), 1), True, Tiles()).encode()
        torch.library.opcheck(operators.conv_bn_act_pool.default, (*arguments, stem), test_utils=tests)
    pointwise, affine = torch.randn(16, 16, 1, 1), torch.rand(2, 16)
    for weights in ([w, pointwise, pointwise], [w, pointwise, None]):
        affines = [None if weight is None else affine for weight in weights]
        arguments = (x, weights, affines, residual, convolution)
        torch.library.opcheck(operators.chain.default, arguments, test_utils=tests)


@pytest.mark.parametrize("name", ["bottleneck, projection", "padded identity", "stem", "LeakyReLU"])
def test_a_compiled_step_is_the_same_step(name):
    leaky = activated(BLOCKS["basic"][0], nn.LeakyReLU(0.2))
    more = {"stem": (Stem, (2, 3, 14, 11)), "LeakyReLU": (leaky, (2, 12, 5, 3))}
    block, x, dz = draw(*(BLOCKS | more)[name], torch.float32)
    plain = step(block, x, dz, "triton")
    twin, leaf = copy.deepcopy(block), x.clone().requires_grad_()
    with implementation("triton"):
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        compiled(leaf).backward(dz)
    left = (
        {"x.grad": leaf.grad} | {f"{n}.grad": p.grad for n, p in twin.named_parameters()} | dict(twin.named_buffers())
    )
    assert all(torch.equal(value, plain[key]) for key, value in left.items())


def test_the_reference_is_its_own_gradient():
    """The formulas of the backward against numerical derivatives of the forward, in fp64."""
    torch.manual_seed(0)
    y, residual = torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2).double()
    gamma, beta = torch.randn(3).double(), torch.randn(3).double()

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, gamma, beta):
            mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
            stats = reference.batch_norm_stats(mean, var, gamma, beta, 1e-5, 1 / 8)
            ctx.save_for_backward(y, stats)
            return reference.batch_norm_apply(y, stats, activation=IDENTITY)

        @staticmethod
        def backward(ctx, g):
            y, stats = ctx.saved_tensors
            sums = reference.batch_norm_sums(g, y, stats)
            dy = reference.batch_norm_gradient(g, y, reference.batch_norm_coefs(sums, stats))
            return dy, stats[1] * sums[1], sums[0]

    inputs = [t.requires_grad_() for t in (y, gamma, beta)]
    assert torch.autograd.gradcheck(Norm.apply, inputs)
    geometry = Geometry((2, 1), (1, 0), (1, 2), 2)

    class Convolution(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return nn.functional.conv2d(x, w, None, *geometry)

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            dx = reference.conv_dgrad(dy, w, x.shape[2:], geometry)
            return dx, reference.conv_wgrad(dy, x, w.shape, geometry)

    x, w = torch.randn(1, 4, 4, 5).double(), torch.randn(4, 2, 2, 3).double()
    assert torch.autograd.gradcheck(Convolution.apply, [x.requires_grad_(), w.requires_grad_()])
    block = BasicBlock(3, 3).double()
    with implementation("eager"):
        assert torch.autograd.gradcheck(block, residual.requires_grad_())
