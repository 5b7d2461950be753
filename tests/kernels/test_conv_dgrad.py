"""conv_dgrad against the fp64 reference: geometry, parities, prologue, epilogues, memory it may touch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import reference
from resnet_fused.kernels.conv_dgrad import conv_dgrad
from resnet_fused.kernels.launch import TileConfig
from tests.kernels.test_conv_forward import DTYPES, GEOMETRIES, channels_last, random
from tests.rule import assert_within_rule

MORE = {
    "stride 3, dilation 2": dict(ci=16, co=20, size=(10, 8), filter=(3, 3), stride=(3, 2), dilation=(2, 2)),
    "stride and dilation with a common factor": dict(
        ci=16, co=16, size=(11, 9), filter=(3, 3), stride=(2, 2), padding=(2, 2), dilation=(2, 2)
    ),
    "pixels past the last output": dict(ci=16, co=16, size=(8, 8), filter=(2, 2), stride=(3, 3)),
    "an image smaller than the stride": dict(ci=16, co=16, size=(1, 2), filter=(1, 1), stride=(3, 3)),
}
ALL = GEOMETRIES | MORE
TILES = [None, TileConfig(16, 16, 16), TileConfig(32, 128, 32)]


def drawn(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, int], dict]:
    """dy, w, the size of the input, and the convolution's arguments."""
    g = dict(ALL[name])
    ci, co, size, taps = (g.pop(key) for key in ("ci", "co", "size", "filter"))
    w = random(co, ci // g.get("groups", 1), *taps, dtype=dtype)
    shape = F.conv2d(torch.zeros(2, ci, *size, dtype=dtype, device=w.device), w, **g).shape
    return random(*shape, dtype=dtype), w, size, g


def random_coefs(channels: int) -> Tensor:
    return torch.randn(3, channels, device=random(1).device)


def random_stats(channels: int) -> Tensor:
    stats = torch.randn(5, channels, device=random(1).device)
    stats[2].clamp_(min=0.3)
    return stats


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Everything that a launcher allocates starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_geometry(name, dtype):
    dy, w, size, conv = drawn(name, dtype)
    exact = reference.conv_dgrad(dy.double(), w.double(), size, **conv)
    eager = reference.conv_dgrad(dy, w, size, **conv)
    for config in TILES:
        dx, sums = conv_dgrad(dy, w, size, config=config, **conv)
        assert sums is None
        assert dx.is_contiguous(memory_format=torch.channels_last)
        assert_within_rule(dx, eager, exact, sums=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["3x3", "every parameter differs by axis", "1x1", "1x1 stride 2", "narrow groups"])
@pytest.mark.parametrize("with_y", [True, False])
def test_prologue(name, dtype, with_y):
    g, w, size, conv = drawn(name, dtype)
    y, coefs = random(*g.shape, dtype=dtype), random_coefs(g.shape[1])
    coefs[2] += 50  # what a padded pixel must not see
    if not with_y:
        coefs[1:] = 0
    dy = reference.batch_norm_gradient(g.double(), y.double(), coefs.double())
    exact = reference.conv_dgrad(dy, w.double(), size, **conv)
    eager = reference.conv_dgrad(dy.to(dtype), w, size, **conv)
    for gradient in (g, g.float()):  # under autocast it may be wider than the filter
        dx, _ = conv_dgrad(gradient, w, size, y=y if with_y else None, coefs=coefs, **conv)
        assert_within_rule(dx, eager, exact, sums=4)


@pytest.mark.parametrize("config", TILES)
@pytest.mark.parametrize(
    ("shape", "step", "before"),
    [((2, 16, 9, 7), 1, 0), ((2, 16, 5, 4), 2, 0), ((2, 24, 5, 4), 2, 4), ((2, 24, 9, 7), 1, 8), ((2, 16, 3, 3), 3, 0)],
)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_shortcut(shape, step, before, stride, config):
    conv = dict(stride=stride, padding=(1, 1))
    w = random(20, 16, 3, 3)
    dy = random(*F.conv2d(random(2, 16, 9, 7), w, **conv).shape)
    shortcut = random(*shape)
    dx, _ = conv_dgrad(
        dy, w, (9, 7), shortcut=shortcut, shortcut_step=step, shortcut_before=before, config=config, **conv
    )
    eager, exact = (
        reference.conv_dgrad(dy.to(t), w.to(t), (9, 7), shortcut.to(t), step, before, **conv)
        for t in (torch.float32, torch.float64)
    )
    assert_within_rule(dx, eager, exact, sums=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", TILES)
@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2, odd size", "1x1", "depthwise", "pixels past the last output"])
def test_mask_and_sums(name, config, dtype):
    dy, w, size, conv = drawn(name, dtype)
    channels = w.shape[1] * conv.get("groups", 1)
    y, stats = random(2, channels, *size, dtype=dtype), random_stats(channels)
    v = y.double() * stats[2].double()[:, None, None] + stats[3].double()[:, None, None]
    g, sums = conv_dgrad(dy, w, size, mask=(y, stats), config=config, **conv)
    plain, _ = conv_dgrad(dy, w, size, config=config, **conv)
    decided = v.abs() > 1e-5
    assert torch.equal(g[decided], torch.where(v > 0, plain, 0.0)[decided])
    exact = reference.batch_norm_sums(g.double(), y.double(), stats.double())
    torch.testing.assert_close(sums.double().sum(1), exact, rtol=1e-5, atol=1e-4)


def test_nan_passes_the_mask_and_the_product():
    dy, w, size, conv = drawn("3x3", torch.float32)
    y, stats = random(2, 16, *size), random_stats(16)
    y[0, 3, 4, 4] = float("nan")
    g, _ = conv_dgrad(dy, w, size, mask=(y, stats), **conv)
    assert g[0, 3, 4, 4] != 0
    dy[1, 0, 2, 2] = float("inf")
    g, _ = conv_dgrad(dy, w, size, **conv)
    assert not torch.isfinite(g[1, :, 2, 2]).any()
    assert torch.isfinite(g[0]).all()


def test_two_runs_are_equal_to_the_bit():
    dy, w, size, conv = drawn("3x3 stride 2, odd size", torch.float32)
    y, stats = random(2, 20, *size), random_stats(20)
    first, second = (conv_dgrad(dy, w, size, mask=(y, stats), **conv) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_images():
    w = random(20, 16, 3, 3)
    assert conv_dgrad(channels_last(torch.zeros(0, 20, 3, 3)), w, (5, 5))[0].shape == (0, 16, 5, 5)


def test_errors_name_the_argument():
    w, dy = random(20, 16, 3, 3), random(2, 20, 3, 3)
    with pytest.raises(ValueError, match=r"dy must have shape \[N, CO, 4, 4\]; got"):
        conv_dgrad(dy, w, (6, 6))
    with pytest.raises(ValueError, match="w must be channels_last"):
        conv_dgrad(dy, w.contiguous(), (5, 5))
    with pytest.raises(ValueError, match="y must lie in memory as dy does"):
        conv_dgrad(dy, w, (5, 5), y=random(2, 24, 3, 3)[:, :20], coefs=random_coefs(20))
    with pytest.raises(ValueError, match=r"mask\[0\] must have the shape of the result"):
        conv_dgrad(dy, w, (5, 5), mask=(random(2, 16, 5, 6), random_stats(16)))
