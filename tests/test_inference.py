"""optimize_for_inference on a CPU: right in every dtype and model family, and safe to copy, save and share."""

import copy
import inspect
import io
import os
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused
from resnet_fused import BasicBlock, functional, implementation, inference, optimize_for_inference, trace
from resnet_fused.engine import eligible, forward
from resnet_fused.inference import FoldedConv, TritonConv
from resnet_fused.kernels.activation import IDENTITY, RELU
from resnet_fused.models import ResNet
from tests import zoo
from tests.rule import assert_within_rule
from tests.test_tune import conv_relu


def _randomised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -0.3, 1)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def _hugging_face(layer_type: str) -> nn.Module:
    config = transformers.ResNetConfig(
        depths=[1, 2], hidden_sizes=[32, 64], embedding_size=16, layer_type=layer_type, num_labels=7
    )
    return transformers.ResNetForImageClassification(config)


MODELS = {
    "torchvision resnet18": lambda: torchvision.models.resnet18(),
    "torchvision resnet50": lambda: torchvision.models.resnet50(),
    "torchvision resnext50": lambda: torchvision.models.resnext50_32x4d(),
    "timm resnet18": lambda: timm.create_model("resnet18"),
    "timm resnet26d": lambda: timm.create_model("resnet26d"),
    "timm seresnet18": lambda: timm.create_model("legacy_seresnet18"),
    "Hugging Face basic": lambda: _hugging_face("basic"),
    "Hugging Face bottleneck": lambda: _hugging_face("bottleneck"),
    "our resnet18": resnet_fused.resnet18,
    "our resnet20": resnet_fused.resnet20,
    "fused torchvision resnet18": lambda: resnet_fused.fuse(torchvision.models.resnet18().eval()),
}


def _logits(output) -> Tensor:
    return getattr(output, "logits", output)


@torch.no_grad()
def _check(frozen: nn.Module, model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> None:
    exact = _logits(copy.deepcopy(model).double()(x.double()))
    eager = _logits(copy.deepcopy(model).to(dtype)(x.to(dtype)))
    assert_within_rule(_logits(frozen(x)), eager, exact)


def _units(model: nn.Module) -> list[FoldedConv]:
    return [m for m in model.modules() if isinstance(m, FoldedConv)]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return _randomised(resnet_fused.resnet20())


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_right_and_fully_fused(name, dtype):
    torch.manual_seed(0)
    model = _randomised(MODELS[name]())
    frozen = optimize_for_inference(model, dtype=dtype)
    _check(frozen, model, torch.randn(2, 3, 64, 64), dtype)
    assert not [m for m in frozen.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert len(_units(frozen)) == sum(isinstance(m, nn.Conv2d) for m in model.modules())


def test_hugging_face_keeps_its_output_type_keywords_and_hidden_states():
    model = _randomised(_hugging_face("bottleneck"))
    x = torch.randn(2, 3, 32, 32)
    got = optimize_for_inference(model)(pixel_values=x, output_hidden_states=True)
    want = model(pixel_values=x, output_hidden_states=True)
    assert type(got) is type(want)
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_original_is_untouched(model, x):
    model.train()
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    optimize_for_inference(model, x, dtype=torch.bfloat16)
    assert model.training
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_input_is_untouched_and_the_output_stays(model, x):
    frozen = optimize_for_inference(nn.Sequential(*model.layer1)).eval()
    x = torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    first = frozen(x)
    value = first.clone()
    frozen(torch.randn_like(x))
    assert torch.equal(x, kept)
    assert torch.equal(first, value)


def test_batch_and_image_sizes_may_change(model, x):
    frozen = optimize_for_inference(model, x)
    for shape in [(5, 3, 32, 32), (1, 3, 24, 40), (0, 3, 32, 32), (2, 3, 32, 32), (3, 3, 17, 19), (4, 3, 32, 32)]:
        if shape[0]:
            _check(frozen, model, torch.randn(shape))
        else:
            assert frozen(torch.randn(shape)).shape == (0, 10)
    assert all(len(unit._packed) <= inference.PACKED_SHAPES for unit in _units(frozen))


def test_copies_and_files_give_the_same_result(model, x):
    frozen = optimize_for_inference(model, x)
    want = frozen(x)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    others = [copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), torch.load(file, weights_only=False)]
    for other in others:
        assert torch.equal(other(x), want)


def test_loading_a_state_dict_replaces_the_packed_weights(model, x):
    frozen = optimize_for_inference(model, x)
    other = _randomised(resnet_fused.resnet20())
    frozen.load_state_dict(optimize_for_inference(other).state_dict())
    _check(frozen, other, x)


def test_it_cannot_be_trained(model, x):
    frozen = optimize_for_inference(model)
    with pytest.raises(RuntimeError, match="frozen for inference cannot be trained"):
        frozen.train()
    assert frozen.eval() is frozen and not any(module.training for module in frozen.modules())
    assert not frozen(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_onednn_it_runs_on_aten(model, x, dtype, monkeypatch):
    monkeypatch.setattr(inference, "_onednn_takes", lambda dtype: False)
    _check(optimize_for_inference(model, dtype=dtype), model, x, dtype)


def test_float64_models_run_on_aten(model, x):
    model.double()
    torch.testing.assert_close(optimize_for_inference(model)(x), model(x.double()))


class _Unusual(nn.Module):
    """Convolutions whose surroundings forbid one fusion or another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.batch_statistics = nn.BatchNorm2d(8, track_running_stats=False)
        self.same = nn.Conv2d(8, 8, 2, padding="same")
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = self.bn1(y) + y
        x = x + self.b(x)
        shared = self.bn2(self.a(x))
        x = self.relu(shared) + shared
        x = self.batch_statistics(self.c(x))
        x = self.relu(self.same(x)) + x.mean((2, 3), keepdim=True)
        x = self.circular(x) + x[:1, :, :1, :1]
        y = self.b(x)
        x.mul_(2)
        y = y + x
        y = self.c(y) + torch.ones(1, 8, 1, 1)
        z = self.c(y)
        return torch.relu(z + y), y


def test_what_cannot_be_fused_stays_right():
    torch.manual_seed(0)
    model = _randomised(_Unusual())
    x = torch.randn(2, 8, 9, 9)
    for ours, theirs in zip(optimize_for_inference(model)(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class _Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = resnet_fused.ResidualBlock(8, [(8, 3)])
        self.rest = nn.Sequential(resnet_fused.ResidualBlock(8, [(16, 3), (8, 1)]), nn.ReLU())

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.stem(x) if scale is None else self.stem(x) * scale
        return self.rest[0](x)


def test_optional_arguments_keep_their_meaning():
    model = _randomised(_Optional())
    frozen = optimize_for_inference(model)
    x = torch.randn(1, 8, 6, 6)
    assert len(_units(frozen)) == 3
    torch.testing.assert_close(frozen(x), model(x))
    torch.testing.assert_close(frozen(x, scale=torch.tensor(3.0)), model(x, torch.tensor(3.0)))


def test_hooks_and_parametrizations_go_on_working(model, x):
    seen = []
    model.layer2[0].conv1.register_forward_hook(lambda module, args, out: seen.append(1))
    model.layer3.register_forward_hook(lambda module, args, out: out * 2)
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    frozen = optimize_for_inference(model)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x))
    assert len(seen) == 2


def test_folding_survives_extreme_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=True), nn.BatchNorm2d(8, eps=1e-2), nn.ReLU()).eval()
    model[1].running_mean.fill_(30.0)
    model[1].running_var.copy_(torch.logspace(-8, 4, 8))
    nn.init.constant_(model[1].weight, -1.0)
    nn.init.zeros_(model[1].weight[:2])
    _check(optimize_for_inference(model), model, torch.randn(2, 4, 8, 8))


def test_nothing_to_fuse_is_said(caplog):
    caplog.set_level("WARNING", logger="resnet_fused")
    optimize_for_inference(nn.Linear(2, 2))
    assert "no convolution that it can fuse" in caplog.text


def test_the_triton_plan_is_the_same_plan():
    torch.manual_seed(0)
    model = _randomised(nn.Sequential(resnet_fused.ResidualBlock(8, [(8, 1), (8, 3)]), nn.AdaptiveAvgPool2d(1)))
    x = torch.randn(1, 8, 5, 5)
    with resnet_fused.implementation("triton"):
        frozen = optimize_for_inference(model)
    assert sum(isinstance(m, TritonConv) for m in frozen.modules()) == 2
    _check(frozen, model, x)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_stem_takes_its_pool_along(dtype):
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    model, x = _randomised(model), torch.randn(2, 3, 40, 32)
    with resnet_fused.implementation("triton"):
        frozen = optimize_for_inference(model, dtype=dtype)
        with resnet_fused.trace() as trace:
            frozen(x)
    assert [launch.name for launch in trace.launches][:2] == ["conv_pack", "conv_pool"], "and no cast before them"
    assert not any(isinstance(m, nn.MaxPool2d) for m in frozen.modules())
    if dtype is None:
        _check(frozen, model, x)
        torch.testing.assert_close(frozen(x.double()), frozen(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("resnet18",), TypeError, "model must be a torch.nn.Module; got str"),
        ((nn.Identity(), (1, 3, 8, 8)), TypeError, "example must be a Tensor; got tuple"),
        ((nn.Identity(), None, torch.int8), ValueError, "dtype must be one of .*; got torch.int8"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    model, example, dtype = (*arguments, None, None)[:3]
    with pytest.raises(error, match=message):
        optimize_for_inference(model, example, dtype=dtype)


@pytest.mark.parametrize("residual", [False, True])
def test_a_unit_that_was_measured_faster_by_cudnn(residual, monkeypatch):
    """With the filter folded once, anew after new weights; where there is no ReLU, whoever chooses is told."""
    calls = []

    def cudnn(x, w, *rest):
        calls.append(w)
        return conv_relu(x, w, *rest)

    def choose(*arguments, **options):
        directions.append(arguments[4])
        return "cudnn" if arguments[4] == "frozen" and options["relu"] else "eager", ()

    directions: list[str] = []
    monkeypatch.setattr(forward, "cudnn_conv_relu", cudnn)
    monkeypatch.setattr(functional, "choose", choose)
    torch.manual_seed(0)
    layer = _randomised(nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1, groups=2), nn.BatchNorm2d(16)))
    x, other = torch.randn(2, 12, 7, 6), torch.randn(2, 16, 4, 3) if residual else None
    unit = TritonConv(layer[0], layer[1], eligible.geometry(layer[0]))
    unit.activation = RELU

    def expected(dtype):
        y = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        y = y if other is None else y + other.to(dtype)
        return torch.relu(y) if unit.activation == RELU else y

    with torch.inference_mode(), implementation("triton"):
        for _ in range(2):
            assert_within_rule(unit(x, other), expected(torch.float32), expected(torch.float64), sums=2)
        assert calls[0] is calls[1]
        assert pickle.loads(pickle.dumps(unit))._folded is None
    nn.init.normal_(layer[0].weight)
    unit.load_state_dict(TritonConv(layer[0], layer[1], eligible.geometry(layer[0])).state_dict())
    with torch.inference_mode(), implementation("triton"):
        assert_within_rule(unit(x, other), expected(torch.float32), expected(torch.float64), sums=2)
        unit.activation = IDENTITY
        assert_within_rule(unit(x, other), expected(torch.float32), expected(torch.float64), sums=2)
    assert len(calls) == 3
    assert directions == ["frozen"] * 4
    addresses = [t.data_ptr() for t in unit._folded]
    unit.load_state_dict(unit.state_dict())
    assert [t.data_ptr() for t in unit._folded] == addresses
    unit._folded = tuple(t.to("meta") for t in unit._folded)  # as in a replica on another device
    unit.activation = RELU
    with torch.inference_mode(), implementation("triton"):
        assert_within_rule(unit(x, other), expected(torch.float32), expected(torch.float64), sums=2)


# What a frozen model shares with eager PyTorch: values, dtypes and refusals.


def _outcome(call) -> Tensor | Exception:
    try:
        with torch.no_grad():
            return call()
    except Exception as error:  # whatever eager PyTorch refuses, in whatever way
        return error


def _assert_same_outcome(frozen: nn.Module, model: nn.Module, *inputs) -> None:
    """``frozen`` gives what ``model`` gives, several times, or raises an error of the same type."""
    want = _outcome(lambda: model(*inputs))
    for _ in range(2):
        got = _outcome(lambda: frozen(*inputs))
        if isinstance(want, Exception) or isinstance(got, Exception):
            assert type(got) is type(want), (got, want)
            continue
        assert (got.layout, got.device) == (want.layout, want.device)
        dense = [t if t.layout == torch.strided else t.to_dense() for t in (got, want)]
        tolerance = 1e-4 if want.dtype.itemsize > 2 else 5e-2
        torch.testing.assert_close(*dense, rtol=tolerance, atol=tolerance)


def _two_blocks(kind: str) -> nn.Module:
    block = torchvision.models.resnet.BasicBlock if kind == "fused" else resnet_fused.BasicBlock
    shortcut = nn.Sequential(nn.Conv2d(8, 8, 1, 2), nn.BatchNorm2d(8))
    model = _randomised(nn.Sequential(block(8, 8), block(8, 8, 2, shortcut)))
    model = model.to(memory_format=torch.channels_last)
    return resnet_fused.fuse(model) if kind == "fused" else model


class _Adapter(nn.Module):
    """A convolution with a low-rank one beside it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base = conv
        self.down = nn.Conv2d(conv.in_channels, 2, 1, conv.stride, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def _set(**attributes):
    """Surgery that sets attributes of the first block (``__name``) and of its submodules (``submodule__name``)."""

    def operate(model: nn.Module) -> None:
        for name, value in attributes.items():
            module, _, attribute = name.partition("__")
            setattr(model[0].get_submodule(module), attribute, value)

    return operate


def _plain_filter(make):
    """Surgery after which a filter or a gamma is no parameter."""

    def operate(model: nn.Module) -> None:
        for module in (model[0].conv1, model[0].bn1):
            weight = module.weight
            del module.weight
            make(module, weight)

    return operate


def _grey(model: nn.Module) -> Tensor:
    model[0].conv1.weight = nn.Parameter(torch.randn(8, 1, 3, 3))
    model[0].downsample = nn.Sequential(nn.Conv2d(1, 8, 1))
    return torch.randn(2, 1, 9, 9)


def _renamed_shortcut(model: nn.Module) -> None:
    conv, norm = model[1].downsample
    model[1].downsample = nn.Sequential()
    model[1].downsample.add_module("project", conv)
    model[1].downsample.add_module("normalise", norm)


SURGERY = {
    "nothing": lambda m: None,
    "adapter": lambda m: setattr(m[0], "conv1", _Adapter(m[0].conv1)),
    "no batch norm": lambda m: setattr(m[0], "bn1", nn.Identity()),
    "no convolution": lambda m: setattr(m[0], "conv2", nn.Identity()),
    "group norm": lambda m: setattr(m[0], "bn1", nn.GroupNorm(2, 8)),
    "SyncBatchNorm": lambda m: setattr(m[0], "bn1", nn.SyncBatchNorm.convert_sync_batchnorm(m[0].bn1)),
    "another activation": lambda m: setattr(m[0], "relu", nn.ReLU6()),
    "dropout": lambda m: setattr(m[0], "relu", nn.Sequential(nn.ReLU(), nn.Dropout(0.5))),
    "shortcut[0]": lambda m: m[1].downsample.__setitem__(0, nn.Conv2d(8, 8, 3, 2, 1)),
    "inserted": lambda m: m[1].downsample.insert(0, nn.ReLU()) and None,
    "no shortcut": lambda m: setattr(m[1], "downsample", None),
    "shortcut renamed": _renamed_shortcut,
    "grey": _grey,
    "integers": _set(conv1__stride=1, conv1__padding=1, conv2__dilation=1, conv1__kernel_size=3),
    "one element": _set(conv1__stride=(1,), conv1__padding=[1], conv2__dilation=(1,)),
    "three elements": _set(conv1__stride=(1, 1, 1)),
    "float stride": _set(conv1__stride=1.0),
    "stride 0": _set(conv1__stride=0),
    "stride 2": _set(conv1__stride=2),
    "negative padding": _set(conv1__padding=-1),
    "same": _set(conv1__padding="same"),
    "valid": _set(conv1__padding="valid"),
    "bogus padding": _set(conv1__padding="bogus"),
    "too dilated": _set(conv1__dilation=5),
    "output of one pixel, added in place": _set(conv2__dilation=5),
    "circular": _set(conv1__padding_mode="circular"),
    "filter 5x5": _set(conv1__weight=nn.Parameter(torch.ones(8, 8, 5, 5)), conv1__padding="same"),
    "filter 2x2": _set(conv1__weight=nn.Parameter(torch.ones(8, 8, 2, 2)), conv1__padding="same"),
    "filter of 16": _set(conv1__weight=nn.Parameter(torch.ones(16, 8, 3, 3))),
    "filter of 4 channels": _set(conv1__weight=nn.Parameter(torch.ones(8, 4, 3, 3))),
    "groups": _set(conv1__weight=nn.Parameter(torch.ones(8, 4, 3, 3)), conv1__groups=2),
    "groups of others": _set(conv1__groups=3),
    "no filter": _set(conv1__weight=None),
    "filter computed": _plain_filter(lambda module, weight: setattr(module, "weight", weight + weight.detach())),
    "filter a tensor": _plain_filter(lambda module, weight: setattr(module, "weight", weight.detach() / 2)),
    "filter a buffer": _plain_filter(lambda module, weight: module.register_buffer("weight", weight.detach() / 2)),
    "filter deleted": _plain_filter(lambda module, weight: None),
    "statistics deleted": lambda m: delattr(m[0].bn1, "running_var"),
    "bias of 1": _set(conv1__bias=nn.Parameter(torch.ones(1))),
    "bias of 5": _set(conv1__bias=nn.Parameter(torch.ones(5))),
    "bias of 8": _set(conv1__bias=nn.Parameter(torch.ones(8))),
    "bias in fp64": _set(conv1__bias=nn.Parameter(torch.ones(8).double())),
    "bias expanded": _set(conv1__bias=nn.Parameter(torch.ones(1).expand(8))),
    "norm of 16": _set(__bn1=nn.BatchNorm2d(16)),
    "norm of 4": _set(__bn1=nn.BatchNorm2d(4)),
    "norm that names 3": _set(bn1__num_features=3),
    "mean cut": _set(bn1__running_mean=torch.zeros(5)),
    "variance cut": _set(bn1__running_var=torch.ones(1)),
    "gamma a column": _set(bn1__weight=nn.Parameter(torch.ones(8, 1))),
    "views": _set(
        bn1__weight=nn.Parameter(torch.tensor([0.7]).expand(8)),
        bn1__bias=nn.Parameter(torch.arange(16.0)[::2]),
        bn1__running_mean=torch.arange(24.0).view(8, 3)[:, 1],
        bn1__running_var=torch.tensor([2.0]).expand(8),
    ),
    "negative bits": _set(
        conv1__weight=nn.Parameter(torch._neg_view(torch.ones(8, 8, 3, 3))),
        conv1__bias=nn.Parameter(torch._neg_view(torch.ones(8))),
        bn1__weight=nn.Parameter(torch._neg_view(torch.ones(8))),
        bn1__running_mean=torch._neg_view(torch.arange(8.0)),
    ),
    "negative bits alone": _set(
        __bn1=nn.Identity(),
        conv1__weight=nn.Parameter(torch._neg_view(torch.ones(8, 8, 3, 3))),
        conv1__bias=nn.Parameter(torch._neg_view(torch.ones(8))),
    ),
    "mean in fp64": _set(bn1__running_mean=torch.zeros(8).double()),
    "mean of integers": _set(bn1__running_mean=torch.zeros(8, dtype=torch.int64)),
    "norm in fp64": lambda m: m[0].bn1.double() and None,
    "norm in fp16": lambda m: m[0].bn1.half() and None,
    "gamma in fp16": _set(bn1__weight=nn.Parameter(torch.ones(8).half())),
    "no mean": _set(bn1__running_mean=None),
    "no variance": _set(bn1__running_var=None),
    "no statistics": _set(bn1__running_mean=None, bn1__running_var=None),
    "statistics no longer tracked": _set(bn1__track_running_stats=False),
    "no beta": _set(bn1__bias=None),
    "no gamma": _set(bn1__weight=None),
    "eps a tensor": _set(bn1__eps=torch.tensor(0.5)),
    "eps below 0": _set(bn1__eps=-1.0),
    "no eps": _set(bn1__eps=None),
    "norm that stays in training": lambda m: setattr(m[0], "bn1", _AlwaysTraining(m[0].bn1)),
    "dropout that stays in training": lambda m: setattr(m[0], "relu", _AlwaysTraining(nn.Dropout(1.0))),
    "pruned": lambda m: prune.l1_unstructured(_contiguous(m[0].conv1), "weight", 0.5) and None,
    "weight norm": lambda m: nn.utils.weight_norm(m[0].conv1) and None,
    "parametrised": lambda m: nn.utils.parametrizations.spectral_norm(m[0].conv1) and None,
    "hook of a block": lambda m: m[0].register_forward_hook(lambda module, args, out: out * 2) and None,
    "hook of a convolution": lambda m: m[0].conv2.register_forward_pre_hook(lambda module, args: args[0] * 2) and None,
    "backward hook": lambda m: m[0].conv2.register_full_backward_hook(lambda module, *grads: None) and None,
    "forward of an instance": _set(conv1__forward=lambda x: x * 2),
    "method of an instance": _set(conv1___conv_forward=lambda x, weight, bias: x * 2),
    "forward of a block": _set(__forward=lambda x: x * 2),
    "all in bf16": lambda m: m.bfloat16() and torch.randn(2, 8, 9, 9).bfloat16(),
    "convolutions in bf16": lambda m: [_in_bf16(c) for c in m.modules()] and torch.randn(2, 8, 9, 9).bfloat16(),
    "last convolution in bf16": lambda m: m[0].conv2.bfloat16() and None,
}


def _in_bf16(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        module.bfloat16()


class _AlwaysTraining(nn.Sequential):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


def _contiguous(conv: nn.Conv2d) -> nn.Conv2d:
    conv.weight.data = conv.weight.data.contiguous()
    return conv


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["fused", "ours"])
@pytest.mark.parametrize("surgery", SURGERY)
def test_after_surgery_it_does_what_the_model_does(surgery, kind):
    model = _two_blocks(kind)
    x = SURGERY[surgery](model)
    x = torch.randn(2, 8, 9, 9) if x is None else x
    model.eval()
    with implementation("eager"):
        frozen = optimize_for_inference(model)
        _assert_same_outcome(frozen, model, x)


INPUTS = {
    "one image": lambda x: x[0],
    "one channel": lambda x: x[0, 0],
    "five dimensions": lambda x: x[None],
    "no batch": lambda x: x[:0],
    "no rows": lambda x: x[:, :, :0],
    "too small": lambda x: x[:, :, :1, :1],
    "too small by one": lambda x: x[:, :, :2, :2],
    "other channels": lambda x: x[:, :5],
    "oneDNN": lambda x: x.to_mkldnn(),
    "sparse": lambda x: x.to_sparse(),
    "integers": lambda x: x.to(torch.uint8),
    "complex": lambda x: x.to(torch.complex64),
    "negative bit": lambda x: torch._neg_view(x),
    "zeros of no storage": lambda x: torch._efficientzerotensor(x.shape),
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "strided": lambda x: x.repeat(1, 1, 2, 2)[..., ::2, 1::2],
    "NHWC": lambda x: x.contiguous(memory_format=torch.channels_last),
    "meta": lambda x: x.to("meta"),
    "no tensor": lambda x: "x",
    "nothing": lambda x: None,
}


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("name", INPUTS)
def test_what_eager_refuses_is_refused(name, norm):
    model = _randomised(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8) if norm else nn.ReLU(), nn.ReLU()))
    x = INPUTS[name](torch.randn(2, 8, 9, 9))
    _assert_same_outcome(optimize_for_inference(model), model, x)


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="launches on CPU tensors, which takes Triton's interpreter"
)
ROADS = [pytest.param("triton", marks=interpreted), "eager"]
ON_TRITON = [
    "integers",
    "one element",
    "same",
    "too dilated",
    "output of one pixel, added in place",
    "filter 5x5",
    "filter of 4 channels",
    "filter a buffer",
    "norm of 16",
    "mean cut",
    "views",
    "negative bits",
    "bias in fp64",
    "SyncBatchNorm",
]


@interpreted
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("surgery", ON_TRITON)
def test_after_surgery_the_kernels_do_what_the_model_does(surgery):
    model = _two_blocks("fused")
    SURGERY[surgery](model)
    model.eval()
    x = torch.randn(1, 8, 5, 5)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
    with implementation("eager"):
        want = _outcome(lambda: model(x))
    with implementation("triton"):
        got = _outcome(lambda: frozen(x))
    assert any(isinstance(m, TritonConv) for m in frozen.modules())
    if isinstance(want, Exception):
        assert type(got) is type(want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("name", INPUTS)
def test_the_kernels_refuse_what_eager_refuses(name):
    model = _randomised(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        _assert_same_outcome(frozen, model, INPUTS[name](torch.randn(1, 8, 4, 4)))


class _Sum(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.in_place = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), in_place

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.in_place:
            y += residual
            return y
        return y + residual


RESIDUALS = {
    "fp64": torch.ones(1, 8, 4, 4).double(),
    "fp16": torch.ones(1, 8, 4, 4).half(),
    "integers": torch.ones(1, 8, 4, 4, dtype=torch.int64),
    "broadcast": torch.ones(8, 1, 1),
    "wider": torch.ones(2, 8, 4, 4),
    "negative bit": torch._neg_view(torch.ones(1, 8, 4, 4)),
    "number": 3,
    "meta": torch.ones(1, 8, 4, 4, device="meta"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("in_place", [False, True], ids=["+", "+="])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_residual_of_another_kind_is_added_as_eager_does(residual, in_place, road, dtype):
    model = _randomised(_Sum(in_place)).to(dtype)
    with implementation(road):
        frozen = optimize_for_inference(model)
        assert len([m for m in frozen.modules() if isinstance(m, FoldedConv | TritonConv)]) == 1
        x = torch.randn(1, 8, 4, 4, dtype=dtype)
        want, got = (_outcome(lambda m=m: m(x, RESIDUALS[residual])) for m in (model, frozen))
    if isinstance(want, Exception):
        assert type(got) is type(want)
    else:
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("attributes", [{"groups": 3}, {"padding": "same", "stride": 2}], ids=str)
def test_numbers_that_do_not_fit_are_refused(attributes, road):
    model = _randomised(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    vars(model[0]).update(attributes)
    with implementation(road):
        frozen = optimize_for_inference(model)
        assert not any(isinstance(m, FoldedConv | TritonConv) for m in frozen.modules())
        _assert_same_outcome(frozen, model, torch.randn(1, 24 if "groups" in attributes else 8, 9, 9))


def test_no_launch_gets_a_negative_bit(monkeypatch):
    """Which the interpreter resolves, but no GPU does."""
    seen: list[Tensor] = []

    def launch(*arguments):
        seen.extend(t for t in arguments if isinstance(t, Tensor))
        return torch.zeros(1, 8, 4, 4)

    monkeypatch.setattr(inference.ops, "conv_bn_act", launch)
    model = _randomised(_Sum(in_place=False))
    for name in ("running_mean", "running_var"):
        setattr(model.bn, name, torch._neg_view(-getattr(model.bn, name)))
    x = torch._neg_view(torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last))
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        frozen(x, x)
        state = {name: torch._neg_view(-value) for name, value in frozen.state_dict().items()}
        frozen.load_state_dict(state, assign=True)
        frozen(x, x)
    assert len(seen) == 16 and not any(t.is_neg() for t in seen)


class _Mixed(nn.Module):
    """A scale in fp64, convolutions in bf16, a mask in whatever it comes, a head in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5).double())
        self.conv = nn.Conv2d(3, 8, 3, padding=1).bfloat16()
        self.last = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular").bfloat16()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.last(torch.relu(self.conv(x)))
        return self.head((y * mask).mean((2, 3)).float()) * self.scale


def test_the_dtype_is_that_of_the_convolutions_and_only_they_cast():
    model = _Mixed().eval()
    frozen = optimize_for_inference(model)
    assert frozen.dtype == torch.bfloat16
    x, mask = torch.randn(2, 3, 9, 9), 1 + torch.rand(2, 1, 9, 9).double() / 1000
    _assert_same_outcome(frozen, model, x.bfloat16(), mask)
    assert torch.equal(frozen(x, mask), frozen(x.bfloat16(), mask))
    assert frozen.half().dtype == torch.float16
    assert optimize_for_inference(nn.Linear(2, 2).double()).dtype == torch.float64
    assert optimize_for_inference(nn.Identity()).dtype == torch.get_default_dtype()


class _Drawing(nn.Module):
    def __init__(self, draw) -> None:
        super().__init__()
        self.conv, self.draw = nn.Conv2d(3, 3, 1), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.draw()


@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.rand(()))])
def test_what_is_drawn_at_random_is_drawn_anew(draw):
    states = random.getstate(), torch.get_rng_state()
    model = _Drawing(draw)
    after = random.getstate(), torch.get_rng_state()
    frozen, x = optimize_for_inference(model), torch.ones(1, 3, 2, 2)
    assert random.getstate() == states[0] == after[0]
    assert torch.equal(torch.get_rng_state(), after[1])
    assert not torch.equal(frozen(x), frozen(x))


class _Around(nn.Module):
    """The input reaches convolutions of both kinds, batch norm, a linear layer and the output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.linear = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(9, 9)
        self.filter = nn.Parameter(torch.randn(2, 3, 3, 3))
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(x) * mask
        return y, F.conv2d(x, self.filter), self.norm(x), self.linear(x), self.last(y), x


def test_a_dtype_is_that_of_the_weights_and_of_what_they_read():
    model = _randomised(_Around())
    x, mask = torch.full((1, 3, 9, 9), 1 + 2.0**-10), torch.full((1, 1, 9, 9), 1 + 2.0**-12)
    frozen = optimize_for_inference(model, dtype=torch.bfloat16)
    convolved, *layers, same = frozen(x, mask)
    assert [out.dtype for out in layers] == [torch.bfloat16] * 4
    assert torch.equal(same, x)
    assert convolved.dtype == torch.float32 and not torch.equal(convolved, convolved.bfloat16().float())


def test_inputs_that_no_convolution_reads_come_as_they_are():
    model = optimize_for_inference(_Around().half())
    with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
        model.network.norm(torch.randn(1, 3, 9, 9))
    assert model.network.conv_unit(torch.randn(1, 3, 9, 9)).dtype == torch.float16


class _Padded(nn.Module):
    """As in ports from TensorFlow; a convolution that is not fused follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.filter = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(4, 3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1))) + F.conv2d(x, self.filter).relu()


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_padded_inputs_are_cast_where_a_convolution_reads_them(padding_mode):
    model = _Padded().half().eval()
    model.conv.padding_mode = padding_mode
    model.conv._reversed_padding_repeated_twice = [0, 0, 0, 0]
    frozen = optimize_for_inference(model)
    x = torch.randn(1, 3, 7, 7)
    _assert_same_outcome(frozen, model, x.half())
    assert torch.equal(frozen(x), frozen(x.half()))


def test_autocast_leaves_the_convolutions_their_dtype(model, x):
    frozen = optimize_for_inference(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert frozen.network(x).dtype == frozen(x).dtype == model(x).dtype == torch.bfloat16
    assert frozen(x).dtype == torch.float32


class _Effects(nn.Module):
    """Forwards that a graph of pure functions would not repeat."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.add = _Twice()
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.kind)(self.a(x), x)

    def alias(self, y: Tensor, x: Tensor) -> Tensor:
        other = y
        y += self.b(x)
        return y * other

    def alias_of_the_branch(self, y: Tensor, x: Tensor) -> Tensor:
        z = other = self.b(y)
        z += y
        z *= 2
        z -= x
        z /= 3
        return z * other

    def names_of_sizes(self, y: Tensor, x: Tensor) -> Tensor:
        half = whole = y.shape[2]
        half //= 2
        return y[:, :, :half] * whole

    def input_in_place(self, y: Tensor, x: Tensor) -> Tensor:
        x += y
        return x

    def method_in_place(self, y: Tensor, x: Tensor) -> Tensor:
        z = self.b(x)
        y.add_(z)
        return y + z

    def keeps_its_dtype(self, y: Tensor, x: Tensor) -> Tensor:
        z = self.b(x)
        z += y.double()
        return z

    def promotes(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.relu(self.b(x).add(y.double()))

    def number(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.relu(y + x.shape[2])

    def broadcasts(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.relu(y + x[0, 0]) + torch.relu(self.b(x) + x[None])

    def module_of_that_name(self, y: Tensor, x: Tensor) -> Tensor:
        return self.add(y, x)

    def view(self, y: Tensor, x: Tensor) -> Tensor:
        return y.view(y.shape[0], -1)

    def counts(self, y: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return y * self.calls

    def counts_in_a_buffer(self, y: Tensor, x: Tensor) -> Tensor:
        self.seen += 1
        return y * self.seen

    def keeps(self, y: Tensor, x: Tensor) -> Tensor:
        self.last = y
        return y

    def noise(self, y: Tensor, x: Tensor) -> Tensor:
        return y + torch.rand(8, 1, 1)

    def constant(self, y: Tensor, x: Tensor) -> Tensor:
        return y + torch.ones(8, 1, 1)

    def mode(self, y: Tensor, x: Tensor) -> Tensor:
        return y * 0 if self.training else y


class _Twice(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + 2 * b


KINDS = [name for name, value in vars(_Effects).items() if callable(value) and name not in ("__init__", "forward")]


@pytest.mark.parametrize("kind", KINDS)
def test_effects_of_a_forward_are_those_of_the_model(kind):
    model = _Effects(kind)
    torch.manual_seed(1)
    frozen = optimize_for_inference(model)
    assert (model.calls, model.seen) == (0, 0)
    assert bool(_units(frozen)) == (kind not in ("counts", "counts_in_a_buffer", "keeps", "noise"))
    model.eval()
    for i in range(3):
        x = torch.randn(2, 8, 9, 9)
        mine, theirs = x.clone(), x.clone()
        torch.manual_seed(i)
        got = frozen(mine)
        torch.manual_seed(i)
        want = model(theirs).detach() if kind != "input_in_place" else model.requires_grad_(False)(theirs)
        torch.testing.assert_close(got, want)
        assert torch.equal(mine, theirs) or kind == "input_in_place"
        torch.testing.assert_close(mine, theirs)
    pickle.loads(pickle.dumps(frozen))


def test_freezing_draws_no_random_numbers():
    model = _Effects("noise")
    state = torch.get_rng_state()
    optimize_for_inference(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_global_hooks_are_run(x):
    seen: list[nn.Module] = []
    model = _randomised(resnet_fused.resnet20())
    frozen = optimize_for_inference(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        frozen(x)
        assert frozen.network in seen and _units(frozen)[0] in seen
        watched = optimize_for_inference(model)
        del seen[:]
        with torch.no_grad():
            torch.testing.assert_close(watched(x), model(x))
        assert sum(isinstance(module, nn.Conv2d) for module in seen) >= 19
    finally:
        handle.remove()
    backward = nn.modules.module.register_module_full_backward_hook(lambda module, *grads: None)
    try:
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), model(x))
            torch.testing.assert_close(optimize_for_inference(model)(x), model(x))
    finally:
        backward.remove()


def test_a_model_made_in_inference_mode_can_be_frozen_and_loaded_into():
    with torch.inference_mode():
        model = _randomised(resnet_fused.resnet20())
        frozen = optimize_for_inference(model)
    x = torch.randn(2, 3, 32, 32)
    frozen.load_state_dict(optimize_for_inference(model).state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(frozen(x), model(x))


def test_a_frozen_model_inside_another_is_called_as_often_as_it_is():
    inner = optimize_for_inference(_randomised(nn.Sequential(resnet_fused.ResidualBlock(8, [(8, 3), (8, 3)]))))
    outer = nn.Sequential(nn.Conv2d(8, 8, 1), inner, inner, nn.Conv2d(8, 8, 1)).eval()
    frozen = optimize_for_inference(outer)
    x = torch.randn(1, 8, 6, 6)
    _assert_same_outcome(frozen, outer, x)
    assert len(_units(frozen)) == 4


FAMILIES = ["torchvision resnet18", "timm resnet18", "Hugging Face basic", "our resnet18", "fused torchvision resnet18"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_copied_and_saved(name):
    model = _randomised(MODELS[name]())
    frozen = optimize_for_inference(model)
    x = torch.randn(1, 3, 32, 32)
    want = _logits(frozen(x))
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    others = [copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), torch.load(file, weights_only=False)]
    for other in others:
        assert torch.equal(_logits(other(x)), want)
        assert len(_units(other)) == len(_units(frozen))


TRACERS = {
    "compile": lambda m, x: torch.compile(m, backend="aot_eager", fullgraph=True),
    "compile dynamic": lambda m, x: torch.compile(m, backend="aot_eager", fullgraph=True, dynamic=True),
    "inductor": lambda m, x: torch.compile(m, fullgraph=True),
    "export": lambda m, x: torch.export.export(m, (x,)).module(),
    "export strict": lambda m, x: torch.export.export(m, (x,), strict=True).module(),
    "jit.trace": lambda m, x: torch.jit.trace(m, x),
    "make_fx": lambda m, x: make_fx(m)(x),
    "fx of the network": lambda m, x: torch.fx.symbolic_trace(m.network),
    "fx of a parent": lambda m, x: torch.fx.symbolic_trace(nn.Sequential(m)),
    "vmap": lambda m, x: lambda x: torch.func.vmap(m)(x[None])[0],
}


@pytest.mark.parametrize("prepared", [False, True], ids=["fresh", "prepared"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_tracers_see_pytorchs_operators(tracer, prepared, x):
    torch._dynamo.reset()
    block = resnet_fused.ResidualBlock(8, [(8, 3), (8, 3)], "projection", stride=2)
    model = _randomised(nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.Flatten(), nn.LazyLinear(4)))
    model(x)
    frozen = optimize_for_inference(model, x if prepared else None)
    with torch.no_grad():
        traced = TRACERS[tracer](frozen, x)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("road", ROADS)
def test_all_floating_point_operations_are_counted(road):
    model, x = _randomised(ResNet(BasicBlock, [1, 1, 1, 1])), torch.randn(1, 3, 16, 16)
    with implementation(road):
        frozen = optimize_for_inference(model)
        counts = []
        for network in (model, frozen):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                network(x)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


class _Optioned(nn.Module):
    """A part with attributes, and a forward with options."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.config, self.width = config, 8
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, pixels: Tensor, scale: float = 1.0, *, bias: Tensor | None = None) -> Tensor:
        x = F.relu(self.bn(self.conv(pixels))) * scale
        return x if bias is None else x + bias


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"])
def test_signature_and_attributes_are_those_of_the_model(copied):
    model, x = _randomised(_Optioned({"classes": 8})), torch.randn(1, 3, 8, 8)
    frozen = copied(optimize_for_inference(model, dtype=torch.bfloat16))
    shown = [(p.name, p.kind, p.default) for p in inspect.signature(frozen.forward).parameters.values()]
    assert shown == [(p.name, p.kind, p.default) for p in inspect.signature(model.forward).parameters.values()]
    assert isinstance(frozen, inference.FrozenModel)
    assert (frozen.config, frozen.width) == (model.config, 8)
    assert (frozen.dtype, frozen.device) == (torch.bfloat16, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(frozen(pixels=x, scale=2.0), model(x, 2.0), rtol=5e-2, atol=5e-2, check_dtype=False)
        with pytest.raises(TypeError, match="scale"):
            frozen(x, 2.0, scale=2.0)
    with pytest.raises(AttributeError, match="nothing"):
        frozen.nothing  # noqa: B018


def test_a_graph_of_a_network_lends_no_attributes_of_its_own(model):
    frozen = optimize_for_inference(model)
    assert isinstance(frozen.network, torch.fx.GraphModule)
    assert frozen.fc is frozen.network.fc
    assert not hasattr(frozen, "graph"), "what looks for graphs would take it for one"


def test_hugging_faces_pipeline_takes_a_frozen_model():
    model = _hugging_face("basic").eval()
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    image = Image.effect_noise((40, 32), 64).convert("RGB")
    answers = [
        transformers.pipeline("image-classification", model=m, image_processor=processor)(image)
        for m in (model, optimize_for_inference(model))
    ]
    for expected, found in zip(*answers, strict=True):
        assert expected["label"] == found["label"]
        assert found["score"] == pytest.approx(expected["score"], rel=1e-4)


NEEDED = "must be [N, 8, H, W], in floating point, on cpu; got "
MISFITS = {
    "channels": (lambda x: x[:, :4], RuntimeError, NEEDED + "(2, 4, 9, 9), torch.float32, on cpu"),
    "one image": (lambda x: x[0], ValueError, NEEDED + "(8, 9, 9)"),
    "a plane": (lambda x: x[0, 0], RuntimeError, NEEDED + "(9, 9)"),
    "bytes": (lambda x: x.to(torch.uint8), RuntimeError, NEEDED + "(2, 8, 9, 9), torch.uint8"),
    "complex": (lambda x: x.to(torch.complex64), RuntimeError, NEEDED + "(2, 8, 9, 9), torch.complex64"),
    "elsewhere": (lambda x: x.to("meta"), RuntimeError, NEEDED + "(2, 8, 9, 9), torch.float32, on meta"),
    "no tensor": (lambda x: x.numpy(), TypeError, "the input must be a torch.Tensor; got ndarray"),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", MISFITS)
def test_an_input_that_does_not_fit_is_told_what_is_needed(name, road):
    change, error, message = MISFITS[name]
    with implementation(road):
        frozen = optimize_for_inference(_randomised(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))))
        with pytest.raises(error, match=re.escape(message)):
            frozen(change(torch.randn(2, 8, 9, 9)))


def test_what_cannot_be_traced_is_said(model):
    frozen = optimize_for_inference(model)
    with pytest.raises(TypeError, match=r"cannot be traced symbolically: trace its network"):
        torch.fx.symbolic_trace(frozen)
    with pytest.raises(TypeError, match=r"cannot be scripted: use torch\.jit\.trace"):
        torch.jit.script(frozen)
    with pytest.raises(TypeError, match="got TorchScript: freeze it before it is traced"):
        optimize_for_inference(torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8)))


def test_a_traced_part_is_left_as_it_is():
    part = torch.jit.trace(_Adapter(nn.Conv2d(8, 8, 1)).requires_grad_(False), torch.randn(1, 8, 7, 7))
    model = nn.Sequential(nn.Conv2d(8, 8, 3), part).eval()
    frozen = optimize_for_inference(model)
    _assert_same_outcome(frozen, model, torch.randn(1, 8, 9, 9))
    assert len(_units(frozen)) == 1


GROWTH = """
import sys, torch
from torch import nn
from resnet_fused import optimize_for_inference
torch.set_num_threads(1)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

model = optimize_for_inference(nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3)))
for i in range(900):
    if i == 300:
        before = resident()
    model(torch.randn(1, 3, 8 + i % 30, 8 + i // 30))
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_input_shapes_leave_nothing_behind():
    """With oneDNN's own cache bounded, 600 more shapes, whose weights would be 90 MB if they were kept."""
    environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}
    run = subprocess.run(
        [sys.executable, "-c", GROWTH], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 20e6


class _FakeCuda:
    """What a CUDA graph asks of ``torch.cuda``, on a CPU: a replay runs again what was captured."""

    def __init__(self, monkeypatch, error: Exception | None = None) -> None:
        self.error, self.options, self.capturing = error, [], False
        monkeypatch.setattr(Tensor, "is_cuda", property(lambda t: t.device.type == "cpu"), raising=False)
        self.stream = "the caller's"
        monkeypatch.setattr(torch.cuda, "device", lambda *_: nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        for name in ("Event", "Stream", "current_stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda: MagicMock())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "graph", self._capture)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))  # no Triton

    @contextmanager
    def _on(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def _capture(self, graph, **options):
        """As PyTorch's, it stays on its stream where the capture fails."""
        self.options.append(options)
        before, self.stream = self.stream, options["stream"]
        yield
        if self.error is not None:
            raise self.error
        self.stream = before


@pytest.fixture
def captured(monkeypatch, model, x):
    """A frozen model with a graph whose replays can be counted, and the fake."""
    cuda = _FakeCuda(monkeypatch)
    frozen = optimize_for_inference(model, x)
    graph = frozen._graph
    graph.graph.replay.side_effect = lambda: graph.out.copy_(frozen.network(graph.x))
    return frozen, graph.graph.replay, cuda


def test_a_graph_is_replayed_for_inputs_like_the_example_alone(captured, model, x):
    frozen, replay, cuda = captured
    assert [options["capture_error_mode"] for options in cuda.options] == ["thread_local"]
    first = frozen(x)
    other = torch.randn_like(x).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(frozen(other), model(other))
        torch.testing.assert_close(first, model(x))
        assert replay.call_count == 2
        for unlike in (x[:1], x.double().float().to(torch.float16), x[0], x.to_sparse(), _Subclass(x)):
            _outcome(lambda unlike=unlike: frozen(unlike))
        _outcome(lambda: frozen(input_1=x))
        _outcome(lambda: frozen(x, x))
        _outcome(lambda: frozen(x, x=x))
        cuda.capturing = True
        frozen(x)
        cuda.capturing = False
        torch.jit.trace(frozen, x, check_trace=False)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        frozen(x)
        handle.remove()
    assert replay.call_count == 2
    frozen(x), frozen(x=x)
    assert replay.call_count == 4


class _Subclass(Tensor):
    pass


def test_a_graph_reads_new_weights_or_is_dropped(captured, x):
    frozen, replay, _ = captured
    other = _randomised(resnet_fused.resnet20())
    state = optimize_for_inference(other).state_dict()
    kept = {id(weight) for weight in frozen._graph.weights}
    frozen.load_state_dict(state)
    assert frozen._graph is not None and {id(t) for t in frozen.buffers()} <= kept
    torch.testing.assert_close(frozen(x), other(x).detach())
    assert replay.call_count == 1
    nn.Sequential(frozen).load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=True)
    assert frozen._graph is None
    torch.testing.assert_close(frozen(x), other(x).detach())
    frozen.prepare(x)
    assert frozen._graph is not None and copy.deepcopy(frozen)._graph is None
    frozen.network.fc.register_forward_hook(lambda *_: None)
    frozen.prepare(x)
    assert frozen._graph is None
    frozen.network.fc._forward_hooks.clear()
    frozen.prepare(x)
    assert frozen._graph is not None
    frozen.to(torch.float64)
    assert frozen._graph is None


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing"), ValueError("x")])
def test_a_capture_that_fails_is_said_and_leaves_a_model_without_a_graph(error, monkeypatch, model, x, caplog):
    cuda = _FakeCuda(monkeypatch, error)
    frozen = optimize_for_inference(model, x)
    assert frozen._graph is None
    assert cuda.stream == "the caller's"
    assert f"no CUDA graph: the capture failed: {error}" in caplog.text
    torch.testing.assert_close(frozen(x), model(x).detach())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_hooks_forbid_a_graph(dtype, monkeypatch, model, x, caplog):
    _FakeCuda(monkeypatch)
    model.fc.register_forward_pre_hook(lambda module, args: None)
    assert optimize_for_inference(model, x, dtype=dtype)._graph is None
    assert "no CUDA graph: it would run no hooks" in caplog.text
    model.fc._forward_pre_hooks.clear()
    assert optimize_for_inference(model, x, dtype=dtype)._graph is not None


def test_outputs_that_are_no_tensors_forbid_a_graph(monkeypatch, caplog):
    _FakeCuda(monkeypatch)
    frozen = optimize_for_inference(_Named(), torch.randn(1, 3, 8, 8))
    assert frozen._graph is None
    assert "the model returns more than tensors" in caplog.text


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor | int]:
        return {"y": self.conv(x), "channels": 4}


class Awkward(nn.Module):
    """With attributes of the names that a frozen model has, and a default that no pickle takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.network, self.prepare, self.first_input, self.title = "resnet", True, 3, "mine"

    def forward(self, x, key=lambda v: v):
        return key(self.bn(self.conv(x)))


def test_a_models_attributes_do_not_stand_in_for_those_of_a_frozen_one():
    model, x = _randomised(Awkward()), torch.randn(2, 3, 4, 4)
    frozen = optimize_for_inference(model, x)
    with torch.no_grad():
        want = model.eval()(x)
    for copied in (frozen, pickle.loads(pickle.dumps(frozen))):
        torch.testing.assert_close(copied(x), want)
        assert copied.title == "mine"


class Scaled(nn.Module):
    """Not traced as a whole, and so asked for its scale at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.scale = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), 1.0

    def forward(self, x, twice=False):
        return self.bn(self.conv(x)) * self.scale


def test_an_attribute_that_is_set_is_that_of_the_network():
    model, x = _randomised(Scaled()).eval(), torch.randn(2, 3, 4, 4)
    frozen = optimize_for_inference(model)
    before = frozen(x)
    frozen.scale = 3.0
    assert frozen.scale == frozen.network.scale == 3.0
    torch.testing.assert_close(frozen(x), 3 * before)
    assert frozen.device == torch.device("cpu")
    frozen.device = "mine"
    assert frozen.device == "mine" and not frozen.training


# Activations and norms: all that the kernels have is folded, however it is written.


ACTIVATIONS = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "relu6 in place": nn.ReLU6(inplace=True),
    "leaky relu": nn.LeakyReLU(0.2),
    "leaky relu of another sign": nn.LeakyReLU(-0.5),
    "silu in place": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU("tanh"),
    "timm's gelu": timm.layers.GELU(),
    "timm's gelu by tanh": timm.layers.GELUTanh(),
    "hardswish": nn.Hardswish(),
    "hardtanh": nn.Hardtanh(-0.4, 0.7, inplace=True),
    "torch.relu_": torch.relu_,
    "method": lambda v: v.relu(),
    "F.relu6": F.relu6,
    "F.leaky_relu_": lambda v: F.leaky_relu_(v, 0.3),
    "F.hardtanh": lambda v: F.hardtanh(v, -0.3, max_val=0.5),
    "F.hardswish": lambda v: F.hardswish(v, inplace=True),
    "F.silu": F.silu,
    "F.gelu": lambda v: F.gelu(v, approximate="tanh"),
}


class _Activated(nn.Module):
    """An activation behind batch norm, and behind the addition."""

    def __init__(self, act, channels: int = 8, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + x)


def _left(frozen: nn.Module) -> list[str]:
    """What the graph of a frozen model calls but for units."""
    graph = frozen.network.graph
    inside = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    return [str(node.target) for node in inside if not str(node.target).endswith("_unit")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_folded_on_the_cpu(name, dtype):
    torch.manual_seed(0)
    model, x = _randomised(_Activated(ACTIVATIONS[name])), torch.randn(2, 8, 7, 6).to(dtype)
    frozen = optimize_for_inference(model, dtype=dtype)
    assert _left(frozen) == [] and len(_units(frozen)) == 2
    kept = x.clone()
    _check(frozen, model, x, dtype)
    assert torch.equal(x, kept)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x[:0]), model(x[:0].float()), check_dtype=False)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_folded_by_the_kernels(name, dtype):
    torch.manual_seed(0)
    model, x = _randomised(_Activated(ACTIVATIONS[name])), torch.randn(1, 8, 4, 3).to(dtype)
    with implementation("triton"):
        frozen = optimize_for_inference(model, dtype=dtype)
        with resnet_fused.trace() as trace:
            frozen(x)
        assert [launch.name for launch in trace.launches if launch.name.startswith("conv")] == ["conv_forward"] * 2
        _check(frozen, model, x, dtype)


@pytest.mark.parametrize("name", ["relu", "silu in place", "gelu", "leaky relu", "hardtanh", "identity"])
def test_what_onednn_is_called_for(name):
    """Once for a unit; behind an addition it has a ReLU alone, and others run in place."""
    model, x = _randomised(_Activated(ACTIVATIONS[name])), torch.randn(2, 8, 7, 6)
    frozen = optimize_for_inference(model, x)
    with resnet_fused.trace() as trace:
        frozen(x)
    first, second, *rest = [launch.name for launch in trace.launches]
    assert (first, second) == ("mkldnn._convolution_pointwise", "mkldnn._convolution_pointwise")
    assert len(rest) == (name not in ("relu", "identity")), rest


@pytest.mark.parametrize("name", ["silu in place", "hardtanh", "gelu"])
@pytest.mark.parametrize("tracer", ["compile", "export", "jit.trace", "fx of the network", "make_fx"])
def test_tracers_see_pytorchs_activations(tracer, name):
    torch._dynamo.reset()
    model, x = _randomised(_Activated(ACTIVATIONS[name])), torch.randn(2, 8, 7, 6)
    frozen = optimize_for_inference(model)
    with torch.no_grad():
        torch.testing.assert_close(TRACERS[tracer](frozen, x)(x), model(x))


@pytest.mark.parametrize("road", ROADS)
def test_infinities_and_nan_pass_activations_as_eager(road):
    """But for oneDNN's ReLU and Hardtanh."""
    x = torch.randn(1, 8, 4, 4)
    x[0, :, 1, 1], x[0, :, 2, 2] = float("nan"), float("inf")
    for name in ("leaky relu", "silu in place", "gelu", "hardswish"):
        model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), ACTIVATIONS[name]).eval()
        with implementation(road), torch.no_grad():
            got, want = optimize_for_inference(model)(x), model(x)
        torch.testing.assert_close(got[..., 1, 1], want[..., 1, 1], equal_nan=True)
        assert got[..., 2, 2].isfinite().logical_not().equal(want[..., 2, 2].isfinite().logical_not())


def test_a_unit_with_another_activation_is_never_cudnns(monkeypatch):
    told = []

    def choose(*arguments, **options):
        told.append(options["relu"])
        return "cudnn" if options["relu"] else "eager", ()

    monkeypatch.setattr(forward, "cudnn_conv_relu", conv_relu)
    monkeypatch.setattr(functional, "choose", choose)
    for name in ("silu in place", "relu6", "relu"):
        model, x = _randomised(_Activated(ACTIVATIONS[name])), torch.randn(1, 8, 4, 3)
        with implementation("triton"):
            _check(optimize_for_inference(model), model, x)
    assert told == [False] * 4 + [True] * 2


def test_a_pool_and_a_chain_stand_behind_relus_alone():
    torch.manual_seed(0)
    bottleneck = torchvision.models.resnet.Bottleneck
    for act, chained in ((nn.ReLU(), True), (nn.SiLU(), False)):
        stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), act, nn.MaxPool2d(3, 2, 1))
        model = nn.Sequential(stem, bottleneck(16, 4), bottleneck(16, 4))
        for block in model[1:]:
            block.relu = act
        x = torch.randn(1, 3, 12, 10)
        with implementation("triton"):
            frozen = optimize_for_inference(_randomised(model))
            _check(frozen, model, x)
        assert any(isinstance(m, inference.TritonChain) for m in frozen.modules()) == chained
        assert any(isinstance(m, nn.MaxPool2d) for m in frozen.modules()) == (not chained)


class _Ends(nn.Module):
    """A 3x3 and a 1x1 convolution, with an activation of its own behind each."""

    def __init__(self, *acts: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.act1, self.act2 = acts

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))) + x)


@pytest.mark.parametrize("acts", [(nn.ReLU(), nn.SiLU()), (nn.SiLU(), nn.ReLU()), (nn.ReLU(), nn.ReLU())], ids=str)
def test_each_link_of_a_chain_has_a_relu(acts):
    model, x = _randomised(_Ends(*acts)), torch.randn(1, 8, 4, 3)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        _check(frozen, model, x)
    chained = any(isinstance(m, inference.TritonChain) for m in frozen.modules())
    assert chained == all(type(act) is nn.ReLU for act in acts)


def _timm(name: str, **options) -> nn.Module:
    return timm.create_model(name, num_classes=5, **options)


def _frozen_norm(channels: int) -> nn.Module:
    return torchvision.ops.FrozenBatchNorm2d(channels, eps=1e-3)


def _frozen_in(model: nn.Module) -> nn.Module:
    return timm.layers.freeze_batch_norm_2d(model)


@torch.no_grad()
def _drawn(model: nn.Module) -> nn.Module:
    """As :func:`_randomised`, for the norms of other libraries too."""
    for module in model.modules():
        if eligible.is_norm(module):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(-0.3, 1)
            module.bias.normal_(0, 0.1)
    return model.eval()


OTHERS = {
    "SiLU": lambda: _timm("resnet18", act_layer="silu"),
    "GELU by tanh": lambda: _timm("resnet18", act_layer="gelu_tanh"),
    "LeakyReLU": lambda: _timm("resnet26d", act_layer="leaky_relu"),
    "ReLU6": lambda: torchvision.models.resnet18(num_classes=5),
    "Hardswish": lambda: _timm("resnet18", act_layer="hard_swish"),
    "Hardswish of PyTorch": lambda: resnet_fused.resnet20(),
    "torchvision's FrozenBatchNorm2d": lambda: torchvision.models.resnet50(norm_layer=_frozen_norm, num_classes=5),
    "timm's FrozenBatchNorm2d": lambda: _frozen_in(_timm("resnet18")),
}
SWAPPED = {"ReLU6": nn.ReLU6, "Hardswish of PyTorch": nn.Hardswish}


def _swapped(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, kind())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_activations_and_norms_are_fully_fused(name, dtype):
    torch.manual_seed(0)
    model = OTHERS[name]()
    model = _drawn(_swapped(model, SWAPPED[name]) if name in SWAPPED else model)
    frozen = optimize_for_inference(model, dtype=dtype)
    _check(frozen, model, torch.randn(2, 3, 64, 64), dtype)
    assert len(_units(frozen)) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert not [m for m in frozen.modules() if isinstance(m, nn.Conv2d) or eligible.is_norm(m)]
    assert not [m for m in frozen.modules() if eligible.activation_of(m) is not None]


NORMS = {
    "BatchNormAct2d": lambda c: timm.layers.BatchNormAct2d(c, act_layer=nn.SiLU),
    "BatchNormAct2d without": lambda c: timm.layers.BatchNormAct2d(c, apply_act=False),
    "SyncBatchNormAct": lambda c: timm.layers.convert_sync_batchnorm(timm.layers.BatchNormAct2d(c)),
    "FrozenBatchNorm2d": _frozen_norm,
    "FrozenBatchNormAct2d": lambda c: _frozen_in(timm.layers.BatchNormAct2d(c, act_layer=nn.GELU, eps=1e-3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_other_libraries_fold_with_what_is_in_them(name, road, dtype):
    torch.manual_seed(0)
    model, x = _drawn(_Activated(nn.ReLU(), norm=NORMS[name])), torch.randn(1, 8, 5, 4).to(dtype)
    with implementation(road):
        frozen = optimize_for_inference(model, dtype=dtype)
        _check(frozen, model, x, dtype)
        units = [m for m in frozen.modules() if isinstance(m, FoldedConv | TritonConv)]
        copied = pickle.loads(pickle.dumps(frozen))
        assert torch.equal(copied(x), frozen(x))
    assert len(units) == 2 and not any(eligible.is_norm(m) for m in frozen.modules())
    inside = name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
    assert bool(_left(frozen)) == inside, "what follows an activation of the norm's stays"


class _Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


def _with(norm: nn.Module, **attributes) -> nn.Module:
    for name, value in attributes.items():
        setattr(norm, name, value)
    return norm


def _act(**options) -> nn.Module:
    return timm.layers.BatchNormAct2d(8, **options)


def _hooked_act() -> nn.Module:
    norm = _act()
    norm.act.register_forward_hook(lambda module, args, out: out * 2)
    return norm


UNFOLDED = {
    "drop": lambda: _with(_act(), drop=_Dropping()),
    "another activation": lambda: _act(act_layer=nn.Tanh),
    "hook in it": _hooked_act,
    "statistics of the batch": lambda: _act(track_running_stats=False),
    "without gamma": lambda: _with(_frozen_norm(8), weight=None),
    "without a mean": lambda: _with(_frozen_norm(8), running_mean=None),
    "eps of 0": lambda: _with(_frozen_norm(8), eps=0.0),
    "of another length": lambda: _frozen_norm(4),
    "in fp64": lambda: _frozen_norm(8).double(),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", UNFOLDED)
def test_a_norm_with_more_in_it_is_left_as_it_is(name, road):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), UNFOLDED[name](), nn.ReLU()).eval()
    with implementation(road):
        frozen = optimize_for_inference(model)
        assert any(eligible.is_norm(m) for m in frozen.modules())
        _assert_same_outcome(frozen, model, torch.randn(2, 8, 5, 5))


def test_a_frozen_norm_in_fp32_makes_fp32_of_16_bits():
    model = nn.Sequential(nn.Conv2d(8, 8, 3).bfloat16(), _frozen_norm(8), nn.ReLU()).eval()
    frozen, x = optimize_for_inference(model), torch.randn(2, 8, 5, 5).bfloat16()
    _assert_same_outcome(frozen, model, x)
    assert frozen(x).dtype == torch.float32


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("norm", ["BatchNormAct2d", "FrozenBatchNorm2d", "FrozenBatchNormAct2d"])
@pytest.mark.parametrize("name", ["one image", "no batch", "too small", "meta", "integers", "other channels"])
def test_norms_of_other_libraries_take_and_refuse_what_eager_does(name, norm, road):
    model = _drawn(nn.Sequential(nn.Conv2d(8, 8, 3), NORMS[norm](8), nn.ReLU()))
    with implementation(road):
        frozen = optimize_for_inference(model)
        assert any(isinstance(m, FoldedConv | TritonConv) for m in frozen.modules())
        _assert_same_outcome(frozen, model, INPUTS[name](torch.randn(1, 8, 4, 4)))


def test_a_norm_that_stays_reads_its_dtype():
    """In front of the first convolution, where the input comes as it likes."""
    model = _drawn(nn.Sequential(timm.layers.BatchNormAct2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    x = torch.randn(1, 3, 5, 5)
    frozen = optimize_for_inference(model, dtype=torch.bfloat16)
    assert frozen(x).dtype == torch.bfloat16
    _check(frozen, model, x, torch.bfloat16)


class _Written(nn.Module):
    """An activation that writes to what others read, or whose number is computed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.bn, self.kind = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.kind == "in place, read before":
            return y * F.silu(y, inplace=True)
        if self.kind == "of an alias":
            return F.hardtanh(y[:, :4], inplace=True) + y[:, 4:]
        if self.kind == "of a slope that is computed":
            return F.leaky_relu(y, float(self.conv.out_channels) / x.shape[1])
        return F.silu(y, inplace=self.kind == "once") * 2


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kind", ["in place, read before", "of an alias", "of a slope that is computed", "once"])
def test_what_an_activation_writes_to_stays_what_it_is(kind, road):
    model, x = _randomised(_Written(kind)), torch.randn(1, 8, 4, 4)
    with implementation(road):
        _assert_same_outcome(optimize_for_inference(model), model, x)


# Pre-activation: batch norm and activation in front of a convolution.


class _PreActivated(nn.Module):
    """A bottleneck without a projection and one with it; timm's norms, whose activation is in them, or PyTorch's."""

    def __init__(self, act=nn.ReLU, norm=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 1)
        kinds = {
            "act_layer": act,
            "norm_layer": norm or timm.layers.BatchNormAct2d,
            "conv_layer": timm.layers.create_conv2d,
        }
        block, projection = timm.models.resnetv2.PreActBottleneck, timm.models.resnetv2.DownsampleConv
        self.blocks = nn.Sequential(
            block(16, 16, **kinds),
            block(16, 16, stride=2, proj_layer=projection, **kinds),
        )
        self.norm = timm.layers.BatchNormAct2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.conv(x)))


def _own_v2() -> nn.Module:
    blocks = resnet_fused.PreActBottleneck(16, 16), resnet_fused.PreActBottleneck(16, 16, 2)
    return nn.Sequential(nn.Conv2d(8, 16, 1), *blocks, nn.BatchNorm2d(16), nn.ReLU())


PREACT = {
    "timm's": _PreActivated,
    "timm's with SiLU": lambda: _PreActivated(nn.SiLU),
    "timm's, synchronised": lambda: timm.layers.convert_sync_batchnorm(_PreActivated()),
    "ours": _own_v2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PREACT)
def test_pre_activation_on_the_cpu(name, dtype):
    """Norms behind a convolution fold; those behind an addition are PyTorch's."""
    torch.manual_seed(0)
    model, x = _drawn(PREACT[name]()), torch.randn(1, 8, 6, 5).to(dtype)
    frozen = optimize_for_inference(model, dtype=dtype)
    assert len(_units(frozen)) == 8 and sum(eligible.is_norm(m) for m in frozen.modules()) == 3
    with resnet_fused.trace() as trace:
        frozen(x)
    names = [launch.name for launch in trace.launches]
    assert names.count("mkldnn._convolution_pointwise") + names.count("mkldnn._convolution_pointwise_") == 8
    _check(frozen, model, x, dtype)


@pytest.mark.parametrize("name", ["resnetv2_18", "ours"])
def test_a_whole_pre_activation_network_on_the_cpu(name):
    """Nine norms stand behind a pool or an addition."""
    torch.manual_seed(0)
    model = _drawn(_timm("resnetv2_18") if name == "resnetv2_18" else resnet_fused.resnet18_v2(num_classes=5))
    frozen = optimize_for_inference(model)
    assert len(_units(frozen)) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 21
    assert sum(eligible.is_norm(m) for m in frozen.modules()) == 9
    _check(frozen, model, torch.randn(1, 3, 32, 32))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PREACT)
def test_norms_in_front_go_into_the_convolutions_that_read_them(name, dtype):
    torch.manual_seed(0)
    model, x = _drawn(PREACT[name]()), torch.randn(2, 8, 5, 4).to(dtype)
    with implementation("triton"):
        frozen = optimize_for_inference(model, dtype=dtype)
        with resnet_fused.trace() as trace:
            frozen(x)
        names = [launch.name for launch in trace.launches]
        block, projected = (["batch_norm_stats", *["conv_forward"] * convolutions] for convolutions in (3, 4))
        assert [n for n in names if not n.startswith("aten")] == [*block, *projected]
        assert names.count("aten.convolution") == 1 and not any("add" in n for n in names)
        with resnet_fused.trace() as trace:
            frozen(x[:0])
        assert all(launch.name.startswith("aten") for launch in trace.launches)
        _check(frozen, model, x, dtype)
        assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), frozen(x))
        assert torch.equal(copy.deepcopy(frozen)(x), frozen(x))
        counts = []
        for network in (copy.deepcopy(model).to(dtype), frozen):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                network(x)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0
    _check(frozen, model, x, dtype)


REPLICATED = {
    "oneDNN": (lambda: nn.Sequential(zoo.Gated(8, 16, 2), nn.Conv2d(16, 8, 1)), (8, 4, 3), "auto"),
    "stem and chains": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            *(torchvision.models.resnet.Bottleneck(16, 4) for _ in range(2)),
        ),
        (3, 12, 10),
        "triton",
    ),
    "norms in front": (_own_v2, (8, 4, 3), "triton"),
    "norms in front, with an activation": (_PreActivated, (8, 4, 3), "triton"),
    "gates": (lambda: nn.Sequential(zoo.Gated(8, 16, 2), zoo.Gated(16, 16)), (8, 4, 3), "triton"),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", REPLICATED)
def test_replicas_of_data_parallel_read_nothing_of_the_original(name, monkeypatch):
    """As :func:`torch.nn.parallel.replicate` makes them, but for the broadcast, which is of CUDA's tensors alone."""
    torch.manual_seed(0)
    make, shape, road = REPLICATED[name]
    model, x = _drawn(make()), torch.randn(1, *shape)

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", copies)
    with implementation(road):
        frozen = optimize_for_inference(model)
        want = frozen(x)
        for replica in nn.parallel.replicate(frozen, [0, 1]):
            with torch.inference_mode():
                held = [t for t in (*frozen.parameters(), *frozen.buffers()) if t.is_floating_point()]
                kept = [t.clone() for t in held]
                for t in held:
                    t.fill_(float("nan"))
                assert torch.equal(replica(x), want)
                for t, value in zip(held, kept, strict=True):
                    t.copy_(value)
        assert torch.equal(frozen(x), want)


@interpreted
def test_a_norm_in_front_keeps_its_keys_and_takes_new_weights():
    models = [_drawn(_own_v2()) for _ in range(2)]
    x = torch.randn(1, 8, 4, 3)
    with implementation("triton"):
        frozen, other = (optimize_for_inference(model) for model in models)
        assert {"1.norm1.weight", "1.norm1.running_var", "2.norm1.num_batches_tracked"} <= {
            name.removeprefix("network.") for name in frozen.state_dict()
        }
        wide = {name: torch.stack([-value, value], -1) for name, value in other.state_dict().items()}
        frozen.load_state_dict({name: torch._neg_view(value[..., 0]) for name, value in wide.items()}, assign=True)
        _check(frozen, models[1], x)


@interpreted
def test_hooks_of_a_norm_in_front_are_run():
    model, x, seen = _drawn(_own_v2()), torch.randn(1, 8, 4, 3), []
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        norm = frozen.network.get_submodule("1.norm1")
        norm.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        _check(frozen, model, x)
    assert seen == [(1, 16, 4, 3)]


@interpreted
def test_hooks_in_a_norm_in_front_are_run():
    norm = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)
    model, x = _drawn(nn.Sequential(norm, nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))), torch.randn(1, 8, 4, 3)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        assert any(isinstance(part, inference.TritonFront) for part in frozen.modules())
        for part in (frozen.network.get_submodule("0.act"), model[0].act):
            part.register_forward_hook(lambda module, args, out: out * 2)
        _check(frozen, model, x)


@interpreted
@pytest.mark.parametrize("tracer", ["compile", "export", "jit.trace", "fx of the network", "make_fx"])
def test_tracers_see_norms_in_front(tracer):
    torch._dynamo.reset()
    model, x = _drawn(_own_v2()), torch.randn(1, 8, 4, 3)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        with torch.no_grad():
            traced = TRACERS[tracer](frozen, x)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x))


@interpreted
@pytest.mark.parametrize("name", INPUTS)
def test_what_eager_refuses_in_front_of_a_convolution_is_refused(name):
    model = _drawn(nn.Sequential(nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)))
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        assert any(isinstance(m, inference.TritonFront) for m in frozen.modules())
        _assert_same_outcome(frozen, model, INPUTS[name](torch.randn(1, 8, 4, 4)))


class _Fronts(nn.Module):
    """Batch norm and activation in front, and something in the way of computing them on the way in."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, nn.BatchNorm2d(8)
        options = {"wide": {"kernel_size": 3, "padding": 1}, "groups": {"groups": 2}, "bias": {"bias": True}}
        made = {"kernel_size": 1, "bias": False, **options.get(kind, {})}
        self.conv, self.bn = nn.Conv2d(8, 8, **made), nn.BatchNorm2d(8)
        if kind == "frozen":
            self.norm = _frozen_norm(8)
        if kind == "inside and behind":
            self.norm = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        y = self.norm(x)
        if self.kind == "written between":
            x.mul_(2)
        y = F.relu(y, inplace=True)
        if self.kind == "written behind":
            x.mul_(2)
        z = self.bn(self.conv(y))
        if self.kind == "residual":
            return z + x
        return z + y if self.kind == "read elsewhere" else z


@interpreted
@pytest.mark.parametrize(
    "kind", ["wide", "groups", "bias", "frozen", "residual", "read elsewhere", "written between", "written behind"]
)
def test_what_cannot_go_into_a_prologue_stays_in_front(kind):
    torch.manual_seed(0)
    model, x = _drawn(_Fronts(kind)), torch.randn(1, 8, 4, 3)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        assert not any(isinstance(m, inference.TritonFront) for m in frozen.modules())
        _assert_same_outcome(frozen, model, x)


@interpreted
@pytest.mark.parametrize("kind", ["", "inside and behind"])
def test_an_activation_that_is_read_as_it_comes_goes_along(kind):
    torch.manual_seed(0)
    model, x = _drawn(_Fronts(kind)), torch.randn(1, 8, 4, 3)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        assert any(isinstance(m, inference.TritonFront) for m in frozen.modules()) == (kind == "")
        _check(frozen, model, x)


class _Joined(nn.Module):
    """One convolution behind its norm, to which something is added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x))) + residual


@interpreted
@pytest.mark.parametrize("name", RESIDUALS)
def test_what_is_added_behind_a_norm_in_front_is_added_as_eager_does(name):
    model, x = _drawn(_Joined()), torch.randn(1, 8, 4, 4)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        assert any(isinstance(m, inference.TritonFront) for m in frozen.modules())
        want, got = (_outcome(lambda m=m: m(x, RESIDUALS[name])) for m in (model, frozen))
        torch.testing.assert_close(frozen(x, x), model(x, x).detach())
    if isinstance(want, Exception):
        assert type(got) is type(want)
    else:
        torch.testing.assert_close(got, want)


@interpreted
def test_a_wider_residual_behind_a_norm_in_front_promotes():
    model, x = _drawn(_Joined()).half(), torch.randn(1, 8, 4, 4)
    with implementation("triton"):
        got = optimize_for_inference(model)(x.half(), x)
    torch.testing.assert_close(got, model(x.half(), x).detach(), rtol=1e-2, atol=1e-2)


@interpreted
def test_a_plan_that_leaves_a_unit_to_pytorch_is_mixed_behind_a_front(monkeypatch):
    told, choose = [], functional.choose

    def eager(*arguments, **options):
        told.extend([options["relu"]] if arguments[4] == "frozen" else [])
        return "eager", choose(*arguments[:-1], "eager")[1]

    monkeypatch.setattr(functional, "choose", eager)
    model, x = _drawn(_own_v2()), torch.randn(1, 8, 4, 3)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        with resnet_fused.trace() as trace:
            frozen(x)
        _check(frozen, model, x)
    names = [launch.name for launch in trace.launches]
    assert "conv_forward" not in names and names.count("batch_norm_apply") == 5
    block, projected = [False, True, False], [False, False, True, False]
    assert told[: len(told) // 2] == [*block, *projected], "cuDNN's one call is offered where no norm stands in front"


class _Gates(nn.Sequential):
    """Two blocks with squeeze and excitation, one with a projection."""

    def __init__(self, kind: str) -> None:
        kinds: dict[str, Callable[..., nn.Module]] = {
            "own": lambda: (zoo.Gated(8, 16, 2), zoo.Gated(16, 16)),
            "silu": lambda: (zoo.Gated(8, 16, 2, nn.SiLU()), zoo.Gated(16, 16, act=nn.SiLU())),
            "timm": lambda: [timm.models.resnet.Bottleneck(16, 4, attn_layer=timm.layers.SEModule) for _ in range(2)],
            "eca": lambda: [timm.models.resnet.Bottleneck(16, 4, attn_layer=timm.layers.EcaModule) for _ in range(2)],
            "basic": lambda: [timm.models.resnet.BasicBlock(16, 16, attn_layer=timm.layers.SEModule) for _ in range(2)],
        }
        super().__init__(*kinds[kind]())


GATES = {"own": 8, "silu": 8, "timm": 16, "eca": 16, "basic": 16}


def _gates(frozen: nn.Module) -> int:
    """How many gates launches apply: those of convolutions, or passes behind them."""
    graphs = [m.graph for m in frozen.modules() if isinstance(m, torch.fx.GraphModule)]
    late = sum(node.kwargs.get("alone", False) for graph in graphs for node in graph.nodes)
    return late + sum(isinstance(m, inference.TritonGate) for m in frozen.modules())


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", GATES)
def test_gates_go_into_the_launch_that_adds(kind, dtype):
    """Of a 1x1 convolution into its own, for which another is made of means; of one of 3x3 into a pass behind it."""
    torch.manual_seed(0)
    model, x = _drawn(_Gates(kind)).to(dtype), torch.randn(2, GATES[kind], 4, 6, dtype=dtype)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        assert _gates(frozen) == 2
        with trace() as t:
            got = frozen(x)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert_within_rule(got, model(x), exact, sums=16)
    names = [launch.name for launch in t.launches]
    assert names.count("squeeze") == 2
    passes = 2 if kind == "basic" else 0
    assert names.count("batch_norm_apply") == passes
    assert names.count("conv_forward") == {"own": 9, "silu": 9, "basic": 4}.get(kind, 8)
    large = [launch.name for launch in t.launches if launch.bytes_written >= got.nbytes]
    assert not {"aten.mean", "aten.mul", "aten.add", "aten.add_"} & set(large)


@interpreted
def test_a_front_before_a_gate_runs_by_itself():
    """The convolution that reads the norm is squeezed, and does not compute that norm."""

    class Block(nn.Module):
        def __init__(self, stride: int) -> None:
            super().__init__()
            self.bn, self.conv, self.bn2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, stride, bias=False), nn.BatchNorm2d(8)
            self.se = timm.layers.SEModule(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.se(self.bn2(self.conv(torch.relu(self.bn(x)))))

    for stride in (1, 2):
        model, x = _drawn(Block(stride)), torch.randn(2, 8, 4, 6)
        with implementation("triton"):
            frozen = optimize_for_inference(model)
            assert _gates(frozen) == 1
            _check(frozen, model, x)


@interpreted
def test_a_front_before_a_pool_runs_by_itself():
    """What convolves and pools in one does not compute the norm that it reads."""
    stem = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    model, x = _drawn(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), *stem)), torch.randn(2, 8, 6, 6)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        assert [unit.pooled for unit in frozen.modules() if isinstance(unit, TritonConv)] == [True]
        _check(frozen, model, x)


@interpreted
def test_means_that_two_gates_read_and_a_unit_that_something_else_reads_too():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(3):
                self.add_module(f"conv{i}", nn.Conv2d(8, 8, 1, bias=False))
                self.add_module(f"bn{i}", nn.BatchNorm2d(8))
                self.add_module(f"se{i}", timm.layers.SEModule(8))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.bn0(self.conv0(x)))
            return self.se1(self.bn1(self.conv1(x))) * self.se2(self.bn2(self.conv2(x))) - x

    model, x = _drawn(Block()), torch.randn(2, 8, 4, 6)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        assert _gates(frozen) == 2
        _check(frozen, model, x)


@interpreted
def test_a_model_with_gates_keeps_its_keys_and_takes_new_weights():
    models, x = [_drawn(_Gates("own")) for _ in range(2)], torch.randn(1, 8, 4, 4)
    with implementation("triton"):
        frozen, other = (optimize_for_inference(model) for model in models)
        names = set(frozen.state_dict())
        assert {"network.0.se.fc1.weight", "network.1.se.fc2.bias"} <= names
        _check(pickle.loads(pickle.dumps(frozen)), models[0], x)
        frozen.load_state_dict(other.state_dict())
        _check(frozen, models[1], x)
        _check(copy.deepcopy(frozen), models[1], x)
        assert set(frozen.state_dict()) == names


@interpreted
def test_a_gate_under_another_dtype_and_on_inputs_that_no_launch_takes():
    model = _drawn(_Gates("own"))
    with implementation("triton"):
        frozen = optimize_for_inference(model, dtype=torch.bfloat16)
        assert _gates(frozen) == 2
        x = torch.randn(2, 8, 4, 4)
        with torch.no_grad():
            torch.testing.assert_close(frozen(x).float(), model(x), rtol=0.1, atol=0.1)
        plain = optimize_for_inference(model)
        for name in INPUTS:
            _assert_same_outcome(plain, model, INPUTS[name](torch.randn(2, 8, 4, 4)))
    with implementation("eager"):
        _check(plain, model, x)


class _Overwritten(zoo.Gated):
    """What the last convolution reads is written to in between, itself or a part of it."""

    def __init__(self, part: bool) -> None:
        super().__init__(16, 16)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        (out[:, :2] if self.part else out).mul_(20)
        return self.act(self.se(self.bn3(self.conv3(out))) + x)


@interpreted
@pytest.mark.parametrize("part", [False, True])
def test_means_are_of_what_a_convolution_reads_in_the_end(part):
    model, x = _drawn(_Overwritten(part)), torch.randn(2, 16, 5, 4)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        assert _gates(frozen) == 1
        _check(frozen, model, x)


@interpreted
def test_a_gate_behind_a_convolution_of_the_input_itself():
    """Which is cast to the model's dtype first, or refused as ever."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.se = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), timm.layers.SEModule(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.se(self.bn(self.conv(x)))

    model, x = _drawn(Block()), torch.randn(2, 8, 4, 4)
    with implementation("triton"), torch.no_grad():
        frozen = optimize_for_inference(model)
        assert _gates(frozen) == 1
        for dtype in (torch.float32, torch.float16, torch.float64):
            got, want = frozen(x.to(dtype)), model(x.to(dtype).float())
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        for name in INPUTS:
            _assert_same_outcome(frozen, model, INPUTS[name](x))
        for wrong in ("x", None, x.to_sparse(), x[:, :5]):
            with pytest.raises((TypeError, RuntimeError)) as ours:
                frozen(wrong)
            with pytest.raises(ours.type):
                model(wrong)
        with pytest.raises(RuntimeError, match="2, 5, 4, 4"):
            frozen(x[:, :5])


@interpreted
@pytest.mark.parametrize("tracer", ["compile", "export", "jit.trace", "fx of the network", "make_fx"])
def test_tracers_see_gates(tracer):
    torch._dynamo.reset()
    model, x = _drawn(_Gates("own")), torch.randn(2, 8, 4, 4)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        with torch.no_grad():
            traced = TRACERS[tracer](frozen, x)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x))


@interpreted
def test_hooks_of_the_layers_of_a_gate_and_of_its_unit_are_run():
    model, x, seen = _drawn(_Gates("own")), torch.randn(1, 8, 4, 4), []
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        units = [m for m in frozen.modules() if isinstance(m, TritonConv) and m.averages]
        for part in (frozen.network.get_submodule("0.se.fc2"), units[1]):
            part.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
        _check(frozen, model, x)
    assert len(seen) == 2


@interpreted
def test_what_is_added_and_what_is_no_gate_stays():
    torch.manual_seed(0)

    class Added(zoo.Gated):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.se(self.bn1(self.conv1(x))) + other

    class Peaks(zoo.Gated):
        def forward(self, x: Tensor) -> Tensor:
            out = self.bn1(self.conv1(x))
            return out * (out.mean((2, 3), keepdim=True) + out.amax((2, 3), keepdim=True)).sigmoid()

    model, x = _drawn(Peaks(8, 32)), torch.randn(2, 8, 4, 4)
    with implementation("triton"):
        frozen = optimize_for_inference(model)
        assert _gates(frozen) == 0
        _check(frozen, model, x)
        model = _drawn(Added(8, 32))
        model.se = torchvision.ops.SqueezeExcitation(8, 4)
        frozen = optimize_for_inference(model.eval())
        assert _gates(frozen) == 1
        for name in RESIDUALS:
            want, got = (_outcome(lambda m=m, r=RESIDUALS[name]: m(x, r)) for m in (model, frozen))
            if isinstance(want, Exception):
                assert type(got) is type(want), name
            else:
                torch.testing.assert_close(got, want)
