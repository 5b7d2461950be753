"""Which activation a module is, or a call, and none where the kernels have it not."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused.engine import eligible, reference
from resnet_fused.engine.eligible import Layer, activation_of, activation_of_call
from resnet_fused.kernels.activation import IDENTITY, RELU, RELU6, Activation

MODULES = [
    (nn.ReLU(), RELU), (nn.ReLU(inplace=True), RELU), (nn.Identity(), IDENTITY), (nn.ReLU6(), RELU6),
    (nn.LeakyReLU(), Activation("leaky_relu", (0.01,))), (nn.LeakyReLU(1), Activation("leaky_relu", (1.0,))),
    (nn.LeakyReLU(0.2, inplace=True), Activation("leaky_relu", (0.2,))),
    (nn.LeakyReLU(-0.2), Activation("leaky_relu", (-0.2,))),
    (nn.Hardtanh(-2, 3), Activation("hardtanh", (-2.0, 3.0))), (nn.Hardswish(), Activation("hardswish")),
    (nn.SiLU(inplace=True), Activation("silu")), (nn.GELU(), Activation("gelu")),
    (nn.GELU(approximate="tanh"), Activation("gelu_tanh")),
]  # fmt: skip


@pytest.mark.parametrize(("module", "activation"), MODULES, ids=str)
def test_a_module_is_the_activation_that_it_computes(module, activation):
    assert activation_of(module) == activation
    v = torch.linspace(-8, 8, 33)
    assert torch.equal(reference.activate(v, activation), module(v.clone()))


class Other(nn.SiLU):
    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize(
    "module",
    [
        *(nn.ELU(), nn.Mish(), nn.PReLU(), nn.RReLU(), nn.Softplus(), nn.Conv2d(1, 1, 1), Other(), nn.Sequential()),
        *(nn.LeakyReLU(-0.2, inplace=True), nn.LeakyReLU(float("nan")), nn.LeakyReLU(1e-40), nn.LeakyReLU("one")),
    ],
    ids=str,
)
def test_other_modules_are_none(module):
    assert activation_of(module) is None


def test_a_module_whose_numbers_were_changed_is_another_activation():
    module = nn.ReLU6()
    module.max_val = 4.0
    assert activation_of(module) == Activation("hardtanh", (0.0, 4.0))
    assert module(torch.tensor(5.0)) == 4


def _named(value):
    return getattr(value, "__name__", str(value))


CALLS = [
    (F.relu, (), {}, RELU), (F.relu, (True,), {}, RELU), (F.relu_, (), {}, RELU), (torch.relu, (), {}, RELU),
    (torch.relu_, (), {}, RELU), ("relu", (), {}, RELU), ("relu_", (), {}, RELU),
    (F.relu6, (), {"inplace": True}, RELU6),
    (F.leaky_relu, (), {}, Activation("leaky_relu", (0.01,))),
    (F.leaky_relu, (0.3,), {}, Activation("leaky_relu", (0.3,))),
    (F.leaky_relu, (), {"negative_slope": 0.3, "inplace": True}, Activation("leaky_relu", (0.3,))),
    (F.leaky_relu_, (0.3,), {}, Activation("leaky_relu", (0.3,))),
    (F.hardtanh, (), {}, Activation("hardtanh", (-1.0, 1.0))),
    (F.hardtanh, (0,), {"max_val": 2}, Activation("hardtanh", (0.0, 2.0))),
    (F.hardtanh_, (0.0, 2.0), {}, Activation("hardtanh", (0.0, 2.0))),
    (F.hardswish, (), {}, Activation("hardswish")), (F.silu, (), {"inplace": True}, Activation("silu")),
    (F.gelu, (), {}, Activation("gelu")), (F.gelu, (), {"approximate": "tanh"}, Activation("gelu_tanh")),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "kwargs", "activation"), CALLS, ids=_named)
def test_a_call_is_the_activation_that_it_computes(function, arguments, kwargs, activation):
    v = torch.linspace(-8, 8, 33)
    assert activation_of_call(function, (v, *arguments), kwargs) == activation
    called = getattr(torch.Tensor, function) if isinstance(function, str) else function
    assert torch.equal(reference.activate(v, activation), called(v.clone(), *arguments, **kwargs))


@pytest.mark.parametrize(
    ("function", "arguments", "kwargs"),
    [
        *((F.elu, (), {}), (torch.add, (1,), {}), ("sigmoid", (), {}), (F.gelu, (), {"approximate": "erf"})),
        *((F.relu, (), {"slope": 1}), (F.hardtanh, (2.0, 1.0), {}), (F.leaky_relu, (torch.ones(2),), {})),
        *((F.leaky_relu, (-1.0, True), {}), (F.leaky_relu_, (-1.0,), {})),
    ],
    ids=_named,
)
def test_other_calls_are_none(function, arguments, kwargs):
    assert activation_of_call(function, (torch.zeros(2), *arguments), kwargs) is None


def test_activations_of_timm():
    layers = pytest.importorskip("timm.layers")
    v = torch.linspace(-8, 8, 33)
    for name in ("gelu", "gelu_tanh", "silu", "hard_swish", "relu6", "leaky_relu"):
        module = layers.create_act_layer(name)
        activation = activation_of(module)
        assert activation is not None, name
        assert torch.equal(reference.activate(v, activation), module(v.clone())), name


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, timm.layers.SyncBatchNormAct])
def test_a_norm_that_may_share_its_statistics_is_asked_for_its_group_at_every_step(kind):
    """Which may come, go, or be another: nothing of such a unit is repeated."""
    layer, tensors = Layer(nn.Conv2d(8, 8, 1), kind(8)), []
    assert eligible.constants(layer, tensors, True) is None
    layer.bn.eval()
    assert eligible.constants(layer, tensors, True) is not None
