"""Frozen models whose convolutions run as chains: what becomes one, what must not, and that values stay eager's."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torchvision
import transformers
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from resnet_fused import implementation, inference, models, modules, optimize_for_inference, trace
from resnet_fused.inference import TritonChain, TritonConv
from resnet_fused.kernels.launch import dry_run
from tests.rule import assert_within_rule
from tests.test_inference import _logits, _randomised

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="launches on CPU tensors, which takes Triton's interpreter"
)

BOTTLENECK = torchvision.models.resnet.Bottleneck


def _hugging_face() -> nn.Module:
    config = transformers.ResNetConfig(
        depths=[2, 1], hidden_sizes=[32, 64], embedding_size=16, layer_type="bottleneck", num_labels=7
    )
    return transformers.ResNetForImageClassification(config)


def _torchvision(**arguments) -> nn.Module:
    return torchvision.models.ResNet(BOTTLENECK, [2, 1, 1, 1], num_classes=5, **arguments)


MODELS = {
    "torchvision": (_torchvision, ["chain_forward"] * 5),
    "groups": (lambda: _torchvision(groups=2, width_per_group=16), ["conv_forward", "chain_forward"] * 4),
    "timm, with stems and averages of variant d": (
        lambda: timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=5, avg_down=True),
        ["chain_forward"] * 5,
    ),
    "Hugging Face": (_hugging_face, ["chain_forward"] * 3),
    "ours": (
        lambda: models.ResNet(modules.Bottleneck, [2, 1, 1, 1], num_classes=5),
        ["chain_forward"] * 5,
    ),
}


def freeze(model: nn.Module) -> nn.Module:
    with implementation("triton"):
        return optimize_for_inference(model)


@torch.no_grad()
def check(frozen: nn.Module, model: nn.Module, x: Tensor) -> list[str]:
    """That it returns what ``model`` does; and which kernels it launched."""
    exact = _logits(copy.deepcopy(model).double()(x.double()))
    with implementation("triton"), trace() as log:
        got = _logits(frozen(x))
    assert_within_rule(got, _logits(model(x)), exact)
    return [launch.name for launch in log.launches if not launch.name.startswith("aten.")]


@pytest.mark.parametrize("name", MODELS)
def test_every_bottleneck_runs_in_a_chain(name):
    make, chains = MODELS[name]
    torch.manual_seed(0)
    model, x = _randomised(make()), torch.randn(2, 3, 35, 32)
    names = check(freeze(model), model, x)
    assert names.count("chain_forward") == chains.count("chain_forward")
    assert "batch_norm_apply" not in names


class Net(nn.Module):
    """Two bottlenecks, and ``between`` is told the first one's output."""

    def __init__(self, between=lambda z: z) -> None:
        super().__init__()
        self.first, self.second = BOTTLENECK(16, 4), BOTTLENECK(16, 4)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def make(**arguments) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return _randomised(Net(**arguments)), torch.randn(2, 16, 6, 5)


def test_a_chain_reaches_into_the_next_block():
    model, x = make()
    frozen = freeze(model)
    assert check(frozen, model, x) == ["conv_forward", "chain_forward", "chain_forward"]
    chains = [m for m in frozen.modules() if isinstance(m, TritonChain)]
    assert [chain.places for chain in chains] == [(0, 1, 2), (0, 1)]


@pytest.mark.parametrize("between", [lambda z: z * 2, lambda z: z.mul_(2), lambda z: F.max_pool2d(z, 2)])
def test_what_happens_between_two_blocks_parts_them(between):
    model, x = make(between=between)
    assert check(freeze(model), model, x) == ["conv_forward", "chain_forward", "conv_forward", "chain_forward"]


class Peeks(BOTTLENECK):
    """Returns what is between its convolutions, too, where ``where`` says."""

    where = 2

    def forward(self, x):
        a = F.relu(self.bn1(self.conv1(x)))
        b = F.relu(self.bn2(self.conv2(a)))
        z = F.relu(self.bn3(self.conv3(b)) + x)
        return torch.cat([z, (a, b)[self.where - 1]], 1)


@pytest.mark.parametrize(("where", "launches"), [(1, ["conv_forward", "chain_forward"]), (2, ["conv_forward"] * 3)])
def test_what_somebody_reads_is_stored(where, launches):
    torch.manual_seed(0)
    model, x = _randomised(Peeks(16, 4)), torch.randn(2, 16, 6, 5)
    model.where = where
    assert check(freeze(model), model, x) == launches


class Linear(BOTTLENECK):
    """Without a ReLU behind the second convolution."""

    def forward(self, x):
        return F.relu(self.bn3(self.conv3(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))) + x)


def test_a_convolution_without_a_relu_is_in_no_chain():
    torch.manual_seed(0)
    model, x = _randomised(Linear(16, 4)), torch.randn(2, 16, 6, 5)
    assert check(freeze(model), model, x) == ["conv_forward"] * 3


class Reader(nn.Module):
    """Writes to the first block's output before the second one reads it: ``z`` of one is not ``z`` of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = BOTTLENECK(16, 4), BOTTLENECK(16, 4)

    def forward(self, x):
        z = self.first(x)
        z.mul_(0.5)
        return self.second(z)


def test_a_write_between_two_blocks_parts_them():
    torch.manual_seed(0)
    model, x = _randomised(Reader()), torch.randn(2, 16, 6, 5)
    assert check(freeze(model), model, x) == ["conv_forward", "chain_forward", "conv_forward", "chain_forward"]


def test_a_module_with_a_hook_is_in_no_chain():
    model, x = make()
    seen = []
    model.first.bn2.register_forward_hook(lambda module, args, y: seen.append(y))
    names = check(freeze(model), model, x)
    assert names == ["conv_forward", "chain_forward", "chain_forward"]
    assert len(seen) == 3  # by the model, its copy in fp64, and the frozen model


def test_new_weights_reach_a_chain():
    model, x = make()
    frozen = freeze(model)
    check(frozen, model, x)
    constants = [m.affine.data_ptr() for m in frozen.modules() if isinstance(m, TritonConv) and m.affine is not None]
    other = _randomised(Net())
    frozen.load_state_dict(freeze(other).state_dict())
    check(frozen, other, x)
    again = [m.affine.data_ptr() for m in frozen.modules() if isinstance(m, TritonConv) and m.affine is not None]
    assert constants == again, "where a CUDA graph reads them"


def test_a_chain_can_be_copied_pickled_and_cast():
    model, x = make()
    frozen = freeze(model)
    check(frozen, model, x)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert check(twin, model, x).count("chain_forward") == 2
    assert torch.equal(frozen.half()(x.half()), freeze(copy.deepcopy(model).half())(x.half()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_as_eager_has_it(value):
    model, x = make()
    x[1, 3, 2, 2] = value
    with implementation("triton"):
        got = freeze(model)(x)
    with torch.no_grad():
        torch.testing.assert_close(got, model(x), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_as_eager_does():
    model, x = make()
    frozen = freeze(model)
    for wrong in (x[:, :8], x[0, 0], x.to(torch.int32)):
        with pytest.raises((RuntimeError, ValueError)) as expected, torch.no_grad():
            model(wrong)
        with pytest.raises(type(expected.value)), implementation("triton"):
            frozen(wrong)


class ReadsTwice(nn.Module):
    """Adds what its last convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        m = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(m)) + m)


def test_a_residual_that_is_the_convolutions_input_too():
    torch.manual_seed(0)
    model, x = _randomised(ReadsTwice()), torch.randn(2, 8, 6, 5)
    assert check(freeze(model), model, x) == ["conv_forward", "conv_forward"]


def test_new_constants_are_read_as_they_are():
    """However they come, and whoever looked on first."""
    model, x = make()
    frozen = freeze(model)
    with FakeTensorMode(allow_non_fake_inputs=True), implementation("triton"):
        frozen(x)
    check(frozen, model, x)
    other = freeze(_randomised(Net()))
    state = {f"network.{name}": t for name, t in other.network.state_dict().items()}
    with implementation("triton"):
        assert torch.equal(torch.func.functional_call(frozen, state, x), other(x))
    check(frozen, model, x)
    for unit, source in (
        (frozen.network.first_conv3_unit, model.first.bn3),
        (frozen.network.second_conv1_unit, model.second.bn1),
    ):
        unit.gamma.mul_(2)
        unit.beta = unit.beta + 1
        unit.eps = source.eps = 1e-2
        with torch.no_grad():
            source.weight.mul_(2)
            source.bias.add_(1)
    check(frozen, model, x)
    frozen.load_state_dict({name: t.to("meta") for name, t in frozen.state_dict().items()}, assign=True)


def test_a_traced_frozen_model_runs_each_by_itself():
    model, x = make()
    frozen = freeze(model)
    with implementation("triton"), torch.no_grad():
        traced = torch.jit.trace(frozen, x)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)


class Half(BOTTLENECK):
    def forward(self, x):
        a = F.relu(self.bn1(self.conv1(x)))
        b = F.relu(self.bn2(self.conv2(a.half())))
        return F.relu(self.bn3(self.conv3(b)) + x)


def test_a_wrong_dtype_inside_the_model_is_refused():
    model = _randomised(Half(16, 4))
    with implementation("triton"), pytest.raises(RuntimeError):
        freeze(model)(torch.randn(2, 16, 6, 5))


def test_a_wrong_number_of_channels_inside_is_refused():
    model = _randomised(BOTTLENECK(16, 4))
    model.conv3 = nn.Conv2d(6, 16, 1)
    with implementation("triton"), pytest.raises(RuntimeError, match=r"must be \[N, 6, H, W\].* got \(2, 4, 6, 5\)"):
        freeze(model)(torch.randn(2, 16, 6, 5))


def test_hooks_on_a_frozen_unit_take_its_chain_apart():
    model, x = make()
    frozen = freeze(model)
    for part in frozen.modules():
        if isinstance(part, TritonConv):
            part.register_forward_hook(lambda module, args, y: y * 0)
    with implementation("triton"):
        assert not frozen(x).any()
    assert not any(part.training for part in frozen.modules())


def test_keys_are_those_of_a_model_without_chains(monkeypatch):
    model, _ = make()
    names = list(freeze(model).state_dict())
    monkeypatch.setattr(inference, "_fuse_chain", lambda *arguments: None)
    assert sorted(names) == sorted(freeze(model).state_dict())


def test_no_image():
    model, x = make()
    with implementation("triton"):
        assert freeze(model)(x[:0]).shape == (0, 16, 6, 5)


@pytest.mark.parametrize("road", ["eager", "mixed"])
def test_other_roads_run_each_by_itself(road):
    model, x = make()
    frozen = freeze(model)
    with implementation(road), trace() as log:
        got = frozen(x)
    assert not any(launch.name in ("chain_forward", "conv_forward") for launch in log.launches)
    with torch.no_grad():
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="its compiler spills in one of these chains")
@pytest.mark.parametrize(
    ("batch", "road", "launches", "megabytes"),
    [(32, "triton", 43, 42.7), (32, "auto", 43, 42.7), (256, "triton", 37, 40.1), (256, "auto", 44, 41.7)],
)
def test_launches_and_bytes_are_those_of_the_results(batch, road, launches, megabytes):
    """Of torchvision's ResNet-50 in bf16 as planned for an H100, from its second forward on."""
    with torch.device("meta"), dry_run(90), implementation(road):
        model = torchvision.models.resnet50().bfloat16().eval()
        x = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        frozen = optimize_for_inference(model)
        frozen(x)
        with trace() as log:
            frozen(x)
    moved = sum(launch.bytes_read + launch.bytes_written for launch in log.launches)
    assert (len(log.launches), round(moved / batch / 1e6, 1)) == (launches, megabytes)
