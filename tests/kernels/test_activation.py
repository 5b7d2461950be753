"""Every activation in every kernel that takes one, forward and backward, against PyTorch's own in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.engine import reference
from resnet_fused.kernels.activation import COUNTS, IDENTITY, RELU, RELU6, Activation, decode
from resnet_fused.kernels.batch_norm import batch_norm_apply
from resnet_fused.kernels.conv_dgrad import conv_dgrad
from resnet_fused.kernels.conv_forward import conv_forward
from resnet_fused.kernels.conv_wgrad import conv_wgrad
from resnet_fused.kernels.epilogue import Prologue, Residual
from resnet_fused.kernels.launch import TileConfig
from resnet_fused.kernels.norm_backward import batch_norm_reduce, merge_sums
from tests.kernels.test_conv_dgrad import _poisoned, random_stats  # noqa: F401
from tests.kernels.test_conv_forward import DEVICE, DTYPES, SAME, check, random, random_norm
from tests.rule import assert_within_rule

ACTIVATIONS = [
    RELU6, Activation("leaky_relu", (0.1,)), Activation("leaky_relu", (-0.5,)), Activation("hardtanh", (-0.75, 1.5)),
    Activation("hardswish"), Activation("silu"), Activation("gelu"), Activation("gelu_tanh"),
]  # fmt: skip
"""All but ReLU and the identity, which the other tests are of."""

EVERY = pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda act: act.code)
LIMITS = (-3.0, -0.75, 0.0, 1.5, 3.0, 6.0)
"""Where the derivative of one of them jumps."""


def normalised(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """A raw output, its stats and, in fp64, what batch norm makes of it, which lies at no limit."""
    y, stats = spread * random(*shape, dtype=dtype), random_stats(shape[1])
    v = reference.batch_norm_apply(y.double(), stats.double(), activation=IDENTITY)
    away = min_distance(v) > 1e-2
    y = torch.where(away, y, 0.0).to(dtype).contiguous(memory_format=torch.channels_last)
    v = reference.batch_norm_apply(y.double(), stats.double(), activation=IDENTITY)
    assert (min_distance(v) > 1e-3).all()
    return y, stats, v


def min_distance(v: Tensor) -> Tensor:
    return torch.stack([(v - limit).abs() for limit in LIMITS]).amin(0)


def test_all_are_tested():
    assert {act.name for act in ACTIVATIONS} | {"relu", "identity"} == set(COUNTS)


@EVERY
def test_code_and_decode(act):
    act.require()
    assert decode(act.code) == act


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY
def test_conv_forward(act, dtype):
    x, w = random(2, 16, 4, 3, dtype=dtype), random(20, 16, 3, 3, dtype=dtype)
    residual = Residual(random(2, 20, 4, 3, dtype=dtype))
    check(x, w, geometry=SAME, norm=random_norm(20), residual=residual, activation=act)


@EVERY
def test_of_a_split_sum_and_of_boxes(act):
    x, w = random(2, 16, 4, 4), random(16, 16, 1, 1)
    for config in (TileConfig(32, 16, 16), TileConfig(32, 16, 16, box=(2, 4, 4))):
        check(x, w, norm=random_norm(16), activation=act, config=config)
    check(random(2, 32, 4, 4), random(16, 32, 1, 1), activation=act, config=TileConfig(32, 16, 16, splits=2))


@pytest.mark.parametrize("name", ["3x3", "groups that share a tile", "few channels"])
@EVERY
def test_prologue(act, name):
    ci, groups, taps = {"3x3": (16, 1, 3), "groups that share a tile": (16, 4, 3), "few channels": (3, 1, 3)}[name]
    x, stats, v = normalised(2, ci, 4, 3)
    w, geometry = random(16, ci // groups, taps, taps), SAME._replace(groups=groups)
    ours = conv_forward(x, w, geometry=geometry, prologue=Prologue(stats[2], stats[3], act))
    eager, exact = (
        F.conv2d(reference.activate(v.to(t), act), w.to(t), None, *geometry) for t in (torch.float32, torch.float64)
    )
    assert_within_rule(ours, eager, exact)
    if groups > 1:  # by the other way, for what is not finite
        x[0, 0, 0, 0], v[0, 0, 0, 0] = float("inf"), (stats[2, 0] * float("inf")).item()
        again = conv_forward(x, w, geometry=geometry, prologue=Prologue(stats[2], stats[3], act))
        assert_within_rule(again[1:], eager[1:], exact[1:])
        assert_within_rule(again[:, 4:], eager[:, 4:], exact[:, 4:])


@EVERY
def test_conv_wgrad(act):
    for ci in (16, 3):
        x, stats, v = normalised(2, ci, 4, 3)
        dy = random(2, 20, 4, 3)
        dw = conv_wgrad(dy, x, (3, 3), geometry=SAME, x_stats=stats, activation=act)
        eager, exact = (
            reference.conv_wgrad(dy.to(t), reference.activate(v.to(t), act), (20, ci, 3, 3), SAME)
            for t in (torch.float32, torch.float64)
        )
        assert_within_rule(dw, eager, exact, sums=16)


@pytest.mark.parametrize("box", [None, (2, 4, 4)])
@EVERY
def test_conv_dgrad(act, box):
    dtype = torch.float32 if box is None else torch.float16
    y_in, stats, v = normalised(2, 16, 4, 4, dtype=dtype)
    dy, w, cut = random(2, 16, 4, 4, dtype=dtype), random(16, 16, 3, 3, dtype=dtype), random(2, 16, 2, 2, dtype=dtype)
    config = None if box is None else TileConfig(32, 16, 16, box=box)
    shortcut, mask = Residual(cut, 2), (y_in, stats)
    g, sums = conv_dgrad(dy, w, (4, 4), geometry=SAME, shortcut=shortcut, mask=mask, activation=act, config=config)
    eager, exact = (
        reference.in_front(reference.conv_dgrad(dy.to(t), w.to(t), (4, 4), SAME, Residual(cut.to(t), 2)), v.to(t), act)
        for t in (dtype, torch.float64)
    )
    assert_within_rule(g, eager, exact)
    want = reference.batch_norm_sums(g.double(), y_in.double(), stats.double())
    torch.testing.assert_close(merge_sums(sums).double(), want, rtol=1e-4, atol=1e-3)


RESIDUALS = ("none", "same shape", "padded", "normalised")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", RESIDUALS)
@EVERY
def test_join(act, kind, dtype):
    """Forward, and the gradient in front of it, which takes what was added to it."""
    y, stats, v = normalised(2, 20, 5, 3, dtype=dtype)
    residual, second = None, None
    if kind == "normalised":
        y2, stats2, v2 = normalised(2, 20, 5, 3, dtype=dtype)
        residual, second, v = Residual(y2), (y2, stats2), v + v2
    elif kind != "none":
        shape, step, before = ((2, 20, 5, 3), 1, 0) if kind == "same shape" else ((2, 10, 9, 6), 2, 5)
        residual = Residual(random(*shape, dtype=dtype), step, before)
        v = v + reference.PaddedIdentity(residual.tensor.double(), step, before).materialize(20)
    z = batch_norm_apply(
        y, stats, residual=residual, residual_stats=None if second is None else second[1], activation=act
    )
    assert_within_rule(z, reference.activate(v.float(), act).to(dtype), reference.activate(v, act))

    # Nothing comes to where a rounding decides.
    dz = torch.where(min_distance(v) < 1e-2, 0.0, random(2, 20, 5, 3)).to(dtype)
    dz = dz.contiguous(memory_format=torch.channels_last)
    added = None if second else residual
    g, sums = batch_norm_reduce(dz, y, stats, activation=act, second=second, residual=added)
    exact = reference.in_front(dz.double(), v, act)
    assert_within_rule(g, reference.in_front(dz.float(), v.float(), act).to(dtype), exact)
    want = [*reference.batch_norm_sums(g.double(), y.double(), stats.double())]
    if second is not None:
        want.append(reference.batch_norm_sums(g.double(), y2.double(), stats2.double())[1])
    torch.testing.assert_close(merge_sums(sums).double(), torch.stack(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", [RELU, IDENTITY, *ACTIVATIONS], ids=lambda act: act.code)
def test_what_is_not_finite_and_what_overflows(act):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 100.0, -100.0, 0.0, -0.0, 6.0])
    y = values.repeat(16, 1).T.reshape(1, 1, 10, 16).permute(0, 3, 1, 2).to(DEVICE)
    y = y.contiguous(memory_format=torch.channels_last)
    zero, one = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)
    stats = torch.stack([zero, one, one, zero, zero])
    want = reference.activate(y, act)
    torch.testing.assert_close(batch_norm_apply(y, stats, activation=act), want, equal_nan=True)
    if act == IDENTITY:
        return
    dz = torch.ones_like(y)
    g, _ = batch_norm_reduce(dz, y, stats, activation=act)
    gradient = reference.in_front(dz, y, act)
    if act.name in ("hardswish", "hardtanh"):  # of NaN, PyTorch's kernels for CPUs and for GPUs differ
        gradient[y.isnan()], g[y.isnan()] = 0.0, 0.0
    torch.testing.assert_close(g, gradient, equal_nan=True)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (Activation("mish"), r"activation.name must be one of 'identity', .*; got 'mish'"),
        (Activation("silu", (1.0,)), r"activation.numbers of silu must be 0 floats of fp32; got \(1.0,\)"),
        (Activation("leaky_relu", (1e-40,)), "must be 1 floats of fp32"),
        (Activation("leaky_relu", (float("nan"),)), "must be 1 floats of fp32"),
        (Activation("hardtanh", (2.0, 1.0)), r"activation.numbers of hardtanh must be in order; got \(2.0, 1.0\)"),
    ],
)
def test_what_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act.require()


@EVERY
def test_the_reference_is_its_own_gradient(act):
    v = torch.linspace(-4, 7, 24, dtype=torch.float64, requires_grad=True)
    assert min_distance(v.detach()).min() > 1e-3, "no value lies at a limit"
    assert torch.autograd.gradcheck(lambda v: reference.activate(v, act), v)
    g = torch.randn(24, dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        slope = (reference.activate(v + step, act) - reference.activate(v - step, act)) / (2 * step)
    torch.testing.assert_close(reference.in_front(g, v, act), g * slope, rtol=1e-6, atol=1e-8)
