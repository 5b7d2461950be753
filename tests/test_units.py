"""Modules that are no plain residual blocks: their units run fused, and all between them as it is."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from timm.layers import BatchNormAct2d, BlurPool2d, ConvNormAct, DropPath, create_conv2d, get_attn
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.res2net import Bottle2neck
from timm.models.resnest import ResNestBottleneck
from timm.models.resnet import BasicBlock as TimmBasic
from timm.models.resnet import ResNet as TimmResNet
from timm.models.resnetv2 import PreActBottleneck
from timm.models.sknet import SelectiveKernelBasic
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models.resnet import BasicBlock

from resnet_fused import explain, functional, fuse, implementation, unfuse
from resnet_fused.convert import ConvertedBlock, ConvertedUnits
from resnet_fused.engine.trace import trace
from resnet_fused.kernels.activation import Activation
from tests.training import check, randomise

pytestmark = pytest.mark.usefixtures("on_device")

SE = get_attn("se")


def projection(ci: int, co: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(stride, stride), nn.Conv2d(ci, co, 1, bias=False), nn.BatchNorm2d(co))


class Unpacked(BasicBlock):
    """Looks at sizes without branching on them."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        out = self.relu(self.bn1(self.conv1(x))).reshape(b, 2, c // 2, h, w)
        out = (out * out.mean((3, 4), keepdim=True)).reshape(b, x.shape[1], out.size(3), w)
        return self.relu(self.bn2(self.conv2(out)) + x)


class Written(BasicBlock):
    """Writes to its input while the first unit might still be waiting for it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        x = x * 2
        z = self.conv2(x)
        x[:].mul_(3)
        return self.relu(y + self.bn2(z) + x)


class WrittenShortcut(BasicBlock):
    """Adds the branch to the shortcut, in place, in front of what reads both."""

    def forward(self, x: Tensor) -> Tensor:
        identity = x * 1
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(identity)))))
        identity += out
        return self.relu(identity) + out


class ReadTwice(BasicBlock):
    """A value within the branch is read beside it, after it was changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = y.relu_() + 0.5 * y
        return self.relu(x + self.bn2(self.conv2(y)))


class Asking(BasicBlock):
    """Asks for the type of its input, as DenseNet's layers do."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x], 1)[:, ::2] if isinstance(x, Tensor) else torch.cat(x, 1)
        return super().forward(x)


class Nested(nn.Module):
    """A unit behind a module of its own, and an addition."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.conv, self.bn = inner, nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.inner(x).sigmoid())) + x


class Flattened(BasicBlock):
    """A view that a result in channels_last does not have."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = out.view(out.size(0), -1)
        return self.bn2(self.conv2(out.view(out.size(0), *self.sizes))) + x

    sizes = 16, 6, 4


class Suspicious(BasicBlock):
    """Asks for an attribute that tensors do not have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.tensors if hasattr(x, "tensors") else x * 2)


class Choosy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if x.shape[0] < 100 else x


BN = nn.BatchNorm2d
LeakyReLU = partial(nn.LeakyReLU, 0.1)


def pre_activation(drop_path: nn.Module) -> nn.Module:
    block = PreActBottleneck(16, 16, norm_layer=BatchNormAct2d, act_layer=nn.ReLU, conv_layer=create_conv2d)
    block.drop_path = drop_path
    return block


CASES: dict[str, tuple[Any, int]] = {
    "squeeze and excitation": (lambda: TimmBasic(16, 16, attn_layer=SE), 2),
    "a projection behind it": (lambda: TimmBasic(16, 8, 2, projection(16, 8, 2), attn_layer=SE), 3),
    "efficient channel attention": (lambda: TimmBasic(16, 16, attn_layer=get_attn("eca")), 2),
    "anti-aliased": (lambda: TimmBasic(16, 8, 2, projection(16, 8, 2), aa_layer=BlurPool2d), 3),
    "a path that is dropped": (lambda: TimmBasic(16, 16, drop_path=DropPath(0.0)), 2),
    "Res2Net": (lambda: Bottle2neck(16, 4, scale=3, norm_layer=BN, downsample=projection(16, 16, 1)), 5),
    "ResNeSt": (lambda: ResNestBottleneck(16, 4, radix=2, base_width=64), 4),
    "selective kernels": (lambda: SelectiveKernelBasic(16, 16, sk_kwargs={"rd_ratio": 0.5}), 4),
    "pre-activation": (lambda: pre_activation(nn.Identity()), 3),
    "pre-activation with a path that is dropped": (lambda: pre_activation(DropPath(0.0)), 2),
    "SiLU": (lambda: TimmBasic(16, 8, 2, projection(16, 8, 2), act_layer=nn.SiLU), 3),
    "SiLU, squeeze and excitation": (lambda: TimmBasic(16, 16, act_layer=nn.SiLU, attn_layer=SE), 2),
    "leaky, anti-aliased": (
        lambda: TimmBasic(16, 8, 2, projection(16, 8, 2), act_layer=LeakyReLU, aa_layer=BlurPool2d),
        3,
    ),
    "norms with activations": (lambda: nn.Sequential(ConvNormAct(16, 8, 3), ConvNormAct(8, 8, apply_act=False)), 2),
    "norms with SiLU": (lambda: nn.Sequential(ConvNormAct(16, 8, 3, act_layer=nn.SiLU)), 1),
    "selective kernels with SiLU": (
        lambda: SelectiveKernelBasic(16, 16, sk_kwargs={"rd_ratio": 0.5}, act_layer=nn.SiLU),
        4,
    ),
    "a sequence with SiLU": (
        lambda: nn.Sequential(
            nn.Conv2d(16, 8, 1), BatchNormAct2d(8, act_layer=nn.SiLU), nn.Conv2d(8, 8, 3), BN(8), nn.SiLU()
        ),
        2,
    ),
    "sizes": (lambda: Unpacked(16, 16), 2),
    "read twice": (lambda: ReadTwice(16, 16), 2),
    "asking": (lambda: Asking(16, 16), 2),
    "suspicious": (lambda: Suspicious(16, 16), 2),
    "flattened": (lambda: Flattened(16, 16), 2),
    "nested": (lambda: Nested(TimmBasic(16, 16, attn_layer=SE)), 2),
    "nested without a name": (lambda: Nested(nn.Sequential(*projection(16, 16, 1), nn.Tanh())), 2),
    "frozen": (lambda: BasicBlock(16, 16, norm_layer=torchvision.ops.FrozenBatchNorm2d), 2),
}


def convolutions(model: nn.Module, x: Tensor) -> int:
    """How many are launched in inference."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad(), implementation("triton"), trace() as seen:
        twin(x)
    return [launch.name for launch in seen.launches].count("conv_forward")


def drawn(build: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    module = build()
    randomise(module)
    return module, torch.randn(4, 16, 6, 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_units_are_fused_and_nothing_else_changes(name, training):
    build, units = CASES[name]
    module, x = drawn(build)
    before, keys = [type(m) for m in module.modules()], list(module.state_dict())
    with torch.no_grad():
        dz = torch.randn_like(copy.deepcopy(module)(x))
    fuse(module.train(training), strict=True)
    check(module, x, dz, "triton")
    assert convolutions(module, x) == units
    assert list(module.state_dict()) == keys
    assert [type(m) for m in unfuse(module).modules()] == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("attention", "kind"), [(None, ConvertedBlock), ("se", ConvertedUnits)])
def test_a_network_with_silu_in_a_tiered_stem_and_in_its_norms(attention, kind, training):
    blocks = tuple(ByoBlockCfg(type="bottle", d=1, c=16, s=stride, gs=0, br=0.5) for stride in (1, 2))
    shape = {"stem_chs": 8, "stem_type": "tiered", "stem_pool": "", "act_layer": "silu", "attn_layer": attention}
    torch.manual_seed(2)
    model = ByobNet(ByoModelCfg(blocks=blocks, **shape), num_classes=0, global_pool="")
    randomise(model)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        dz = torch.randn_like(copy.deepcopy(model)(x))
    fuse(model.train(training), strict=True)
    assert [type(block).__mro__[1] for stage in model.stages for block in stage] == [kind, kind]
    check(model, x, dz, "triton")
    assert convolutions(model, x) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) - (4 if attention else 0)


@pytest.mark.parametrize(("kind", "units"), [(Written, 1), (WrittenShortcut, 2)])
def test_what_writes_in_place_writes_when_it_did(kind, units):
    module, x = drawn(lambda: kind(16, 16))
    with torch.no_grad():
        want = module.eval()(x)
        fuse(module)
        with implementation("triton"):
            torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
    assert convolutions(module, x) == units


def test_a_module_that_cannot_be_traced_is_called_as_it_is():
    module, x = drawn(lambda: Nested(Choosy()))
    with torch.no_grad():
        want = module.eval()(x)
        fuse(module)
        with implementation("triton"):
            torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
    assert isinstance(module, ConvertedUnits)
    assert type(module.inner) is Choosy
    assert convolutions(module, x) == 1


def excited() -> tuple[nn.Module, Tensor]:
    """A fused block of two units with squeeze and excitation, and its input."""
    module, x = drawn(lambda: TimmBasic(16, 16, 2, projection(16, 16, 2), attn_layer=SE))
    return fuse(module.eval(), strict=True), x


def hooked(module: nn.Module) -> None:
    module.conv2.register_forward_hook(lambda m, args, y: 2 * y)


def own_forward(module: nn.Module) -> None:
    module.bn2.forward = lambda x: x + 1


def parametrised(module: nn.Module) -> None:
    parametrizations.weight_norm(module.conv2)


def replaced(module: nn.Module) -> None:
    module.conv2 = nn.Sequential(module.conv2, nn.Tanh())


def replaced_activation(module: nn.Module) -> None:
    module.act1 = nn.SiLU()


def replaced_identity(module: nn.Module) -> None:
    module.drop_block = nn.Hardtanh()


def without_a_norm(module: nn.Module) -> None:
    module.bn2 = nn.Identity()


@pytest.mark.parametrize(
    "change",
    [hooked, own_forward, parametrised, replaced, replaced_activation, replaced_identity, without_a_norm],
    ids=lambda f: f.__name__,
)
def test_a_change_inside_takes_one_unit_out(change):
    module, x = excited()
    twin = unfuse(copy.deepcopy(module))
    change(module)
    change(twin)
    with torch.no_grad(), implementation("triton"), trace() as seen:
        torch.testing.assert_close(module(x), twin(x), rtol=1e-4, atol=1e-4)
    assert [launch.name for launch in seen.launches].count("conv_forward") == 2


@pytest.mark.parametrize(("act", "units"), [(nn.Identity(), 2), (nn.SiLU(), 2), (nn.Tanh(), 1)])
def test_another_activation_inside_of_a_norm_is_fused_where_the_kernels_have_it(act, units):
    module, x = drawn(lambda: pre_activation(DropPath(0.0)))
    fuse(module.eval(), strict=True)
    twin = unfuse(copy.deepcopy(module))
    module.norm2.act = twin.norm2.act = act
    with torch.no_grad(), implementation("triton"):
        torch.testing.assert_close(module(x), twin(x), rtol=1e-4, atol=1e-4)
    assert convolutions(module, x) == units


@pytest.mark.parametrize("attn_layer", [None, SE])
def test_an_activation_whose_numbers_changed_is_as_it_is_now(attn_layer):
    module, x = drawn(lambda: TimmBasic(16, 16, act_layer=LeakyReLU, attn_layer=attn_layer))
    fuse(module.eval(), strict=True)
    twin = unfuse(copy.deepcopy(module))
    module.act1.negative_slope = twin.act1.negative_slope = 0.5
    with torch.no_grad(), implementation("triton"):
        torch.testing.assert_close(module(x), twin(x), rtol=1e-4, atol=1e-4)


def test_a_stem_with_silu_is_a_unit_in_front_of_its_pool():
    torch.manual_seed(0)
    model = TimmResNet(TimmBasic, (1, 1, 1, 1), channels=(8, 8, 8, 8), act_layer=nn.SiLU, num_classes=3).eval()
    randomise(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
        with implementation("triton"):
            torch.testing.assert_close(fuse(model)(x), want, rtol=1e-4, atol=1e-4)
            assert explain(model, x).rows[0].block == "ResNet, up to its activation"
    assert convolutions(model, x) == sum(isinstance(m, nn.Conv2d) for m in model.modules())


def test_an_activation_behind_that_in_a_norm_is_no_part_of_the_unit():
    module, x = drawn(lambda: nn.Sequential(nn.Conv2d(16, 16, 1), BatchNormAct2d(16, act_layer=nn.SiLU), nn.SiLU()))
    with torch.no_grad():
        want = module.eval()(x)
        with implementation("triton"):
            torch.testing.assert_close(fuse(module)(x), want, rtol=1e-4, atol=1e-4)
    assert convolutions(module, x) == 1
    conv, norm, _ = module
    with torch.no_grad(), implementation("triton"):
        got = functional.conv_bn_act(x, conv, norm, activation=Activation("silu"))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        got = functional.conv_bn_act(x, conv, norm, residual=x, relu=False)
        torch.testing.assert_close(got, norm(conv(x)) + x, rtol=1e-4, atol=1e-4)


def test_a_new_module_of_a_converted_class_is_an_ordinary_one():
    module, x = excited()
    new = type(module)(16, 16).eval()
    with torch.no_grad(), implementation("triton"):
        assert torch.equal(new(x), TimmBasic.forward(new, x))
    assert convolutions(new, x) == 0
    assert convolutions(fuse(new), x) == 2


class Scaled(TimmBasic):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scale, self.kinds = 1.0, {"shift": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self._scale + self.kinds["shift"]


def scale(module: nn.Module) -> None:
    module._scale = 2.0


def shift(module: nn.Module) -> None:
    module.kinds["shift"] = 1.0


def hook_on_a_sequence(module: nn.Module) -> None:
    module.downsample.register_forward_hook(lambda m, args, y: 2 * y)


def longer_sequence(module: nn.Module) -> None:
    module.downsample.append(nn.Tanh())


def no_attention(module: nn.Module) -> None:
    module.se = None


@pytest.mark.parametrize(
    "change", [scale, shift, hook_on_a_sequence, longer_sequence, no_attention], ids=lambda f: f.__name__
)
def test_what_the_forward_depends_on_brings_it_back_as_a_whole(change):
    module, x = drawn(lambda: Scaled(16, 16, 2, projection(16, 16, 2), attn_layer=SE))
    fuse(module.eval(), strict=True)
    assert convolutions(module, x) == 3
    twin = unfuse(copy.deepcopy(module))
    change(module)
    change(twin)
    with torch.no_grad(), implementation("triton"):
        assert torch.equal(module(x), twin(x))
    assert convolutions(module, x) == 0
    fuse(module)
    with torch.no_grad(), implementation("triton"):
        torch.testing.assert_close(module(x), twin(x), rtol=1e-4, atol=1e-4)
    assert convolutions(module, x) == 3


class Configuration:
    scale = 1.0


class Configured(BasicBlock):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.configuration = Configuration()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.configuration.scale


class Learned(BasicBlock):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Valued(Learned):
    def forward(self, x: Tensor) -> Tensor:
        return BasicBlock.forward(self, x) * self.scale.mean().item()


class Buffered(BasicBlock):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale.item()


class AskingForAutocast(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_autocast_enabled("cpu") else x


class TypeOfAValue(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out * 2 if isinstance(out, Tensor) else out


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Configured, "reads an attribute that is Configuration"),
        (Buffered, "computes with tensors of its own"),
        (TypeOfAValue, "looks at the type of a value"),
        (AskingForAutocast, "its forward under autocast is not that in evaluation"),
    ],
)
def test_what_cannot_be_known_is_refused(kind, reason):
    module = kind(16, 16)
    with pytest.warns(UserWarning, match=reason):
        fuse(module)
    assert type(module) is kind
    with pytest.raises(ValueError, match=reason):
        fuse(module, strict=True)


@pytest.mark.parametrize("kind", [Learned, Valued])
def test_a_parameter_is_read_at_every_call(kind):
    module, x = drawn(lambda: kind(16, 16))
    fuse(module.eval(), strict=True)
    with torch.no_grad(), implementation("triton"):
        before = module(x)
        module.scale.data = 3 * module.scale
        torch.testing.assert_close(module(x), 3 * before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_run_the_same_units(copied):
    module, x = excited()
    twin = copied(module)
    assert type(twin) is type(module)
    with torch.no_grad(), implementation("triton"):
        assert torch.equal(twin(x), module(x))
    assert convolutions(twin, x) == 3
    assert type(unfuse(twin)) is TimmBasic


def test_fused_again_it_is_the_same():
    module, _ = excited()
    kinds, layout = [type(m) for m in module.modules()], module.described()[0]
    fuse(module, memory="recompute")
    assert [type(m) for m in module.modules()] == kinds
    assert module.described() == (layout, "recompute")


def test_recomputed_in_the_backward_it_is_the_same():
    module, x = drawn(lambda: TimmBasic(16, 16, attn_layer=SE))
    dz = torch.randn_like(x)
    check(fuse(module, memory="recompute"), x, dz, "triton")


def test_it_compiles_in_one_graph():
    module, x = excited()
    with torch.no_grad(), implementation("triton"):
        want = module(x)
        torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), want)


def test_a_tracer_sees_its_own_modules():
    module, x = excited()
    model = nn.Sequential(module)
    with torch.no_grad(), implementation("triton"):
        seen = torch.fx.symbolic_trace(model)
        assert "resnet_fused" not in str(seen.graph)
        torch.testing.assert_close(seen(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_profiler_shows_it_by_its_name():
    module, x = excited()
    model = nn.Sequential(OrderedDict(block=unfuse(module)))
    fuse(model)
    with torch.no_grad(), implementation("triton"), torch.profiler.profile() as profile:
        model(x)
    assert "block (BasicBlock)" in [event.name for event in profile.events()]


def test_explain_says_what_is_fused_and_why_the_rest_is_not():
    model = nn.Sequential(TimmBasic(16, 16, attn_layer=SE), Nested(nn.Sequential(nn.Conv2d(16, 16, 1), nn.GELU())))
    model[1].gate = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
    fuse(model.eval())
    with implementation("triton"):
        first, second = explain(model, torch.randn(2, 16, 4, 4)).to_dict()
    assert 0.9 < first["share"] < 1
    assert len(first["units"]) == 2
    assert second["share"] == pytest.approx(0.5)
    assert second["reason"] == "inner.0: what follows is GELU, not a batch norm"
    model[1].bn.register_forward_hook(lambda m, args, y: None)
    with implementation("triton"):
        _, second = explain(model, torch.randn(2, 16, 4, 4)).to_dict()
    assert "hooks are registered on a submodule" in second["reason"]
    assert second["share"] == 0


FAMILIES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnext50_32x4d", "shufflenet_v2_x0_5"),
    *("squeezenet1_1", "vgg11_bn"),
)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:nothing was fused")
def test_torchvisions_models_stay_what_they_are(name):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if "regnet" in name else "meta"):  # whose widths are computed with tensors
        model = torchvision.models.get_model(name, **options)
    before, keys = [type(m) for m in model.modules()], list(model.state_dict())
    fuse(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in unfuse(model).modules()] == before


SMALL = {
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5),
    "regnet": lambda: torchvision.models.RegNet(
        torchvision.models.regnet.BlockParams([1, 1], [16, 32], [8, 8], [1.0, 1.0], [2, 2], 0.25), 5, stem_width=8
    ),
    "mobilenet v2": lambda: torchvision.models.MobileNetV2(5, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2]]),
    "vgg": lambda: torchvision.models.VGG(torchvision.models.vgg.make_layers([8, "M", 16, "M"], True), 5, False),
    "shufflenet": lambda: torchvision.models.ShuffleNetV2([1, 1, 1], [8, 16, 16, 16, 16], 5),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore:nothing was fused")
def test_other_networks_are_fused_where_they_can_be(name):
    torch.manual_seed(0)
    model, x = SMALL[name]().eval(), torch.randn(2, 3, 32, 32)
    if name == "vgg":
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)
    randomise(model)
    with torch.no_grad():
        want = model(x)
        fuse(model)
        with implementation("triton"), trace() as seen:
            torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    assert "conv_forward" in [launch.name for launch in seen.launches]


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_norm_under_autocast_returns_what_it_does_alone(training):
    """In the dtype of its vectors, which autocast does not know of."""
    module, x = drawn(lambda: BasicBlock(16, 16, norm_layer=torchvision.ops.FrozenBatchNorm2d))
    twin = fuse(copy.deepcopy(module.train(training)), strict=True)
    for start in (x, x.half()):
        with torch.autocast(x.device.type, torch.float16):
            want = module(start)
            with implementation("triton"), trace() as seen:
                got = twin(start)
        assert got.dtype == want.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
        assert [launch.name for launch in seen.launches].count("conv_forward") == 2
        got.sum().backward()
        assert twin.conv1.weight.grad.dtype == torch.float32
    assert twin.bn1.weight.grad is None


def test_what_was_changed_and_fused_again_is_of_the_kind_that_it_is_now():
    module, x = drawn(lambda: BasicBlock(16, 16))
    fuse(module.eval())
    assert isinstance(module, ConvertedBlock)
    module.relu = nn.Tanh()
    fuse(module)
    assert isinstance(module, ConvertedUnits)
    want = BasicBlock.forward(module, x)
    with implementation("triton"):
        torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
    assert type(unfuse(module)) is BasicBlock


def test_an_identity_behind_the_last_relu_is_no_second_block():
    """As in torchvision's networks that can be quantised."""
    model = torchvision.models.quantization.resnet18(quantize=False)
    fuse(model)
    assert sum(isinstance(m, ConvertedBlock) for m in model.modules()) == 8
