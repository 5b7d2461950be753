"""The public door: dtypes, layouts, autocast, the reasons for running eager, and its error messages."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from resnet_fused import functional
from resnet_fused.engine import eligible, reference
from resnet_fused.engine.reference import PaddedIdentity
from resnet_fused.engine.request import implementation, requested
from resnet_fused.engine.trace import trace
from resnet_fused.functional import conv_bn_act
from tests.rule import assert_within_rule
from tests.training import DEVICE

pytestmark = pytest.mark.usefixtures("on_device")


def unit(ci=16, co=24, size=3, **conv) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv.setdefault("padding", size // 2)
    modules = nn.Conv2d(ci, co, size, **conv), nn.BatchNorm2d(co)
    with torch.no_grad():
        for v in (modules[1].running_mean, modules[1].weight, modules[1].bias):
            v.normal_()
        modules[1].running_var.uniform_(0.5, 2)
    return modules[0].eval(), modules[1].eval()


def check(x, conv, bn, residual=None, relu=True):
    with torch.inference_mode():
        with implementation("triton"), trace() as t:
            ours = conv_bn_act(x, conv, bn, residual, relu)
        eager = reference.conv_bn_act(x, conv, bn, residual, relu)
        exact = reference.conv_bn_act(*in_double(x, conv, bn, residual), relu)
    assert_within_rule(ours, eager, exact)
    assert [launch.name for launch in t.launches].count("conv_forward") == 1
    return t


def in_double(x, conv, bn, residual):
    if isinstance(residual, PaddedIdentity):
        residual = residual._replace(x=residual.x.double())
    elif residual is not None:
        residual = residual.double()
    return x.double(), copy.deepcopy(conv).double(), copy.deepcopy(bn).double(), residual


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("kind", ["none", "same", "padded"])
def test_matches_eager(kind, relu, dtype):
    conv, bn = (m.to(dtype) for m in unit(stride=2 if kind == "padded" else 1))
    x = torch.randn(2, 16, 7, 6, dtype=dtype)
    residual = {"none": None, "same": torch.randn(2, 24, 7, 6, dtype=dtype), "padded": PaddedIdentity(x, 2, 4)}[kind]
    check(x, conv, bn, residual, relu)


@pytest.mark.parametrize(
    "conv",
    [
        dict(bias=True),
        dict(bias=False, padding="same"),
        dict(bias=False, padding="valid"),
        dict(groups=4),
        dict(dilation=2, padding=2),
        dict(stride=(2, 1), padding=(0, 1)),
    ],
)
def test_convolution_arguments(conv):
    check(torch.randn(1, 16, 8, 9), *unit(**conv))


def test_batch_norm_without_affine():
    conv, _ = unit()
    check(torch.randn(1, 16, 5, 5), conv, nn.BatchNorm2d(24, affine=False, eps=1e-3).eval())


def test_channels_last_input_takes_one_launch_and_nothing_else():
    conv, bn = unit()
    conv = conv.to(memory_format=torch.channels_last)
    t = check(torch.randn(2, 16, 5, 5).contiguous(memory_format=torch.channels_last), conv, bn)
    assert [launch.name for launch in t.launches] == ["conv_forward"]


def test_autocast_gives_the_dtype_that_eager_gives():
    conv, bn = unit()
    x, residual = torch.randn(1, 16, 5, 5), torch.randn(1, 24, 5, 5)
    with torch.inference_mode(), torch.autocast(DEVICE, torch.float16):
        for res in (None, residual, residual.half()):
            eager = reference.conv_bn_act(x, conv, bn, res)
            with implementation("triton"):
                ours = conv_bn_act(x, conv, bn, res)
            assert ours.dtype == eager.dtype
            torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_fuses_every_unit_whatever_dtype_its_input_has(training):
    units = [eligible.Layer(*unit(16, 16)), eligible.Layer(*unit(16, 16))]
    for layer in units:
        layer.bn.train(training)
    for x in (torch.randn(2, 16, 4, 3), torch.randn(2, 16, 4, 3).half()):
        with implementation("triton"), torch.autocast(DEVICE, torch.float16), trace() as t:
            functional.residual_block(x, units, functional.Projection(x, *unit(16, 16, 1)))
        assert [launch.name for launch in t.launches].count("conv_forward") == 3


@pytest.mark.parametrize("source", [torch.float16, torch.float32])
@pytest.mark.parametrize("filter_", [torch.float16, torch.float32])
def test_a_shortcut_of_another_dtype_is_what_it_is_in_eager(filter_, source):
    layer = eligible.Layer(*(m.half() for m in unit(8, 12)))
    conv, bn = unit(8, 12, 1)
    shortcut = functional.Projection(torch.randn(2, 8, 4, 3, dtype=source), conv.to(filter_), bn)
    found = []
    for road in ("triton", "mixed", "eager"):
        with implementation(road), torch.no_grad():
            try:
                found.append(functional.residual_block(torch.randn(2, 8, 4, 3).half(), [layer], shortcut).dtype)
            except RuntimeError:
                found.append("refused")
    assert found[0] == found[1] == found[2]


def test_autocast_leaves_a_shortcut_in_fp64_to_its_modules():
    layer, shortcut = (
        eligible.Layer(*unit(8, 12)),
        functional.Projection(torch.randn(2, 8, 4, 3).double(), *unit(8, 12, 1)),
    )
    for road in ("triton", "mixed", "eager"):
        autocast = torch.autocast(DEVICE, torch.bfloat16)
        with implementation(road), torch.no_grad(), autocast, pytest.raises(RuntimeError, match="type"):
            functional.residual_block(torch.randn(2, 8, 4, 3), [layer], shortcut)


def test_empty_batch():
    with torch.inference_mode(), implementation("triton"):
        assert conv_bn_act(torch.randn(0, 16, 5, 5), *unit()).shape == (0, 24, 5, 5)


def test_auto_is_eager_on_the_cpu_and_says_nothing(caplog):
    with torch.device("cpu"):
        conv, bn = unit()
        x = torch.randn(1, 16, 5, 5)
    with torch.inference_mode(), implementation("auto"), trace() as t:
        conv_bn_act(x, conv, bn)
    assert "aten.convolution" in [launch.name for launch in t.launches]
    assert not caplog.records


def hooked(conv, bn):
    conv.register_forward_hook(lambda *a: None)


def replaced(conv, bn):
    conv.forward = lambda x: x.new_zeros(2, 24, 5, 5)


def parametrised(conv, bn):
    parametrize.register_parametrization(conv, "weight", nn.Identity())


def circular(conv, bn):
    conv.padding_mode = "circular"


REASONS = {
    "hook": (hooked, "hooks, or a forward of its own"),
    "own forward": (replaced, "hooks, or a forward of its own"),
    "parametrization": (parametrised, "ParametrizedConv2d"),
    "padding mode": (circular, "padding_mode='circular'"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_fused_runs_eager_and_says_why(name, caplog):
    change, message = REASONS[name]
    conv, bn = unit()
    change(conv, bn)
    eligible._reported.clear()
    with torch.no_grad(), implementation("triton"), caplog.at_level(logging.WARNING, "resnet_fused"):
        for _ in range(2):
            conv_bn_act(torch.randn(2, 16, 5, 5), conv, bn)
    assert [message in record.getMessage() for record in caplog.records] == [True], "one warning, with the reason"


def test_reasons_by_type_and_size():
    conv, bn = unit()
    assert eligible.why_unfusable(conv, bn) is None
    assert eligible.why_unfusable(conv, nn.SyncBatchNorm(24)) is None
    assert "InstanceNorm2d" in eligible.why_unfusable(conv, nn.InstanceNorm2d(24))
    assert "ConvTranspose2d" in eligible.why_unfusable(nn.ConvTranspose2d(16, 24, 3), bn)
    assert "9x9" in eligible.why_unfusable(nn.Conv2d(16, 24, 9), bn)
    assert "padding='same'" in eligible.why_unfusable(nn.Conv2d(16, 24, 2, padding="same"), bn)


def test_a_unit_in_training_leaves_what_eager_leaves():
    x, residual = torch.randn(2, 16, 5, 3), torch.randn(2, 24, 5, 3)
    for relu, shortcut in ((True, residual), (False, None), (True, PaddedIdentity(torch.randn(2, 8, 9, 6), 2, 4))):
        conv, bn = unit()
        bn.train()
        twins = copy.deepcopy((conv, bn))
        with implementation("triton"):
            ours = conv_bn_act(x, conv, bn, shortcut, relu)
        eager = reference.conv_bn_act(x, *twins, shortcut, relu)
        torch.testing.assert_close(ours, eager)
        for z in (ours, eager):
            (z * torch.arange(z.numel()).view_as(z).cos()).sum().backward()
        for mine, its in zip((conv, bn), twins, strict=True):
            for p, q in zip(mine.parameters(), its.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
            assert all(torch.allclose(p, q) for p, q in zip(mine.buffers(), its.buffers(), strict=True))


def test_an_empty_batch_in_training_runs_eager():
    layer, x = eligible.Layer(*unit()), torch.empty(0, 16, 5, 5)
    with implementation("triton"):
        assert isinstance(functional.resolve(x, [layer]), functional.Chain)
        layer.bn.train()
        assert functional.resolve(x, [layer]) == "the batch is empty"


def test_two_values_per_channel_are_enough():
    layer = eligible.Layer(*unit())
    layer.bn.train()
    for shape in ((1, 16, 1, 2), (2, 16, 1, 1)):
        assert isinstance(functional.resolve(torch.randn(shape), [layer]), functional.Chain)


def test_one_value_per_channel_is_refused_as_in_eager():
    conv, bn = unit()
    bn.train()
    for road in ("triton", "eager"):
        with implementation(road), pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            conv_bn_act(torch.randn(1, 16, 1, 1), conv, bn)


def test_unsupported_dtype_runs_eager():
    conv, bn = (m.double() for m in unit())
    with implementation("triton"), torch.no_grad():
        assert "float64" in eligible.why_eager(torch.randn(1, 16, 5, 5).double(), [(conv, bn)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x="image"), TypeError, r"x must be a torch.*Tensor; got str"),
        (dict(conv=nn.Linear(2, 2)), TypeError, r"conv must be a .*Conv2d; got Linear"),
        (dict(x=torch.zeros(16, 5, 5)), ValueError, r"x must have 4 dimensions .*got shape \(16, 5, 5\)"),
        (dict(x=torch.zeros(1, 3, 5, 5)), ValueError, r"x must have the 16 channels .*got shape \(1, 3, 5, 5\)"),
        (dict(bn=nn.BatchNorm2d(7)), ValueError, r"bn must normalise the 24 channels .*it has 7"),
        (dict(residual=1.0), TypeError, r"residual must be a Tensor, a PaddedIdentity or None; got float"),
        (dict(residual=torch.zeros(1, 24, 4, 5)), ValueError, r"residual must have the output's shape \(1, 24, 5, 5\)"),
        (dict(residual=PaddedIdentity(torch.zeros(1, 16, 5, 5), 2, 4)), ValueError, r"residual must give 5x5 pixels"),
        (dict(residual=PaddedIdentity(torch.zeros(1, 16, 5, 5), 1, 9)), ValueError, r"residual must fit 24 channels"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    conv, bn = unit()
    arguments = {"x": torch.zeros(1, 16, 5, 5), "conv": conv, "bn": bn, "residual": None, **change}
    with pytest.raises(error, match=message):
        conv_bn_act(**arguments)


def test_implementation_is_checked_and_restored():
    before = requested()
    with (
        pytest.raises(ValueError, match="implementation must be one of 'auto', 'triton', 'mixed', 'eager'; got 'cuda'"),
        implementation("cuda"),
    ):
        pass
    with implementation("eager"):
        assert requested() == "eager"
    assert requested() == before


@pytest.mark.parametrize("activation", [functional.Activation("silu"), functional.Activation("hardtanh", (-1.0, 2.0))])
def test_another_activation_is_one_launch(activation):
    (conv, bn), x = unit(), torch.randn(2, 16, 5, 5)
    bn.eval()
    with torch.no_grad(), implementation("triton"), trace() as t:
        ours = conv_bn_act(x, conv, bn, activation=activation)
    names = [launch.name for launch in t.launches]
    assert [name for name in names if name != "aten.clone"] == ["conv_forward"], "but for what is laid out anew"
    with torch.no_grad():
        eager = reference.conv_bn_act(x, conv, bn, activation=activation)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_an_activation_that_there_is_not_is_refused():
    (conv, bn), x = unit(), torch.randn(2, 16, 5, 5)
    with pytest.raises(ValueError, match=r"activation.name must be one of .*; got 'mish'"):
        conv_bn_act(x, conv, bn, activation=functional.Activation("mish"))
    with pytest.raises(ValueError, match=r"activation.numbers of leaky_relu must be 1 floats"):
        conv_bn_act(x, conv, bn, activation=functional.Activation("leaky_relu"))


def test_an_activation_that_is_none_is_refused():
    conv, bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    with pytest.raises(TypeError, match="activation must be an Activation or None; got str"):
        conv_bn_act(torch.randn(1, 4, 3, 3), conv, bn, activation="relu")
