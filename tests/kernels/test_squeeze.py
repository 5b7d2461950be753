"""The means of images and the gates that are made of them, against the fp64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from resnet_fused.engine import reference
from resnet_fused.kernels import conv_box
from resnet_fused.kernels.activation import IDENTITY, RELU
from resnet_fused.kernels.batch_norm import batch_norm_apply, channel_moments, merge_moments
from resnet_fused.kernels.conv import ConvProblem, Geometry
from resnet_fused.kernels.conv_forward import conv_forward, conv_forward_moments
from resnet_fused.kernels.epilogue import Moments, Norm, Residual
from resnet_fused.kernels.launch import TileConfig, dry_run, observe
from resnet_fused.kernels.norm_backward import batch_norm_backward, batch_norm_reduce
from resnet_fused.kernels.squeeze import gate_gradient, image_means, squeeze, squeeze_gradient
from tests.kernels.test_batch_norm import moments_of
from tests.kernels.test_conv_dgrad import _poisoned, random_coefs, random_stats  # noqa: F401
from tests.kernels.test_conv_forward import DEVICE, DTYPES, random
from tests.rule import assert_within_rule

TILES = [None, TileConfig(16, 16, 16), TileConfig(32, 128, 32)]
BOXED = TileConfig(32, 16, 16, box=(1, 4, 8))


def assert_means_of(y: Tensor, moments: Moments) -> None:
    """Of ``y``: those of each image, and behind batch norm, and all moments together."""
    stats = random_stats(y.shape[1])
    squeezed, means = squeeze(moments, stats, y.dtype)
    torch.testing.assert_close(means.double(), y.double().mean((2, 3)), rtol=1e-5, atol=1e-5)
    normal = reference.batch_norm_apply(y.double(), stats.double(), activation=IDENTITY).mean((2, 3), keepdim=True)
    eager = reference.batch_norm_apply(y.float(), stats, activation=IDENTITY).mean((2, 3), keepdim=True).to(y.dtype)
    assert_within_rule(squeezed, eager, normal, sums=16)
    torch.testing.assert_close(merge_moments(moments).double(), moments_of(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 20, 136])
@pytest.mark.parametrize("config", [None, TileConfig(16, 16, 2), TileConfig(16, 64, 1)])
def test_by_a_pass(config, channels, dtype):
    y = random(3, channels, 7, 6, dtype=dtype) + torch.arange(3, device=DEVICE).view(3, 1, 1, 1).to(dtype)
    assert_means_of(y, channel_moments(y, by_image=True, config=config))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "config"), [*((1, tile) for tile in (*TILES, BOXED)), (2, None)], ids=str)
@pytest.mark.parametrize("taps", [1, 3])
def test_by_the_epilogue_of_a_convolution(groups, taps, config, dtype):
    x, w = random(3, 32, 7, 6, dtype=dtype), random(40, 32 // groups, taps, taps, dtype=dtype)
    arguments = dict(geometry=Geometry((1, 1), (taps // 2, taps // 2), groups=groups), config=config)
    y, moments = conv_forward_moments(x, w, by_image=True, **arguments)
    torch.testing.assert_close(y, conv_forward(x, w, **arguments), rtol=2e-3, atol=2e-3)
    assert moments.images == 3
    assert_means_of(y, moments)


def test_a_box_of_several_images_is_left():
    x, w = random(3, 32, 4, 4), random(16, 32, 3, 3)
    arguments = dict(geometry=Geometry((1, 1), (1, 1)), config=TileConfig(32, 16, 16, box=(2, 4, 4)))
    calls = []
    with observe(calls.append):
        y, moments = conv_forward_moments(x, w, by_image=True, **arguments)
        conv_forward_moments(x, w, **arguments)
    assert [call.kernel.__name__ for call in calls] == ["conv_forward_kernel", "conv_box_kernel"]
    assert_means_of(y, moments)


@pytest.mark.parametrize("arch", [80, 90])
def test_tiles_of_images_of_every_size(arch):
    """Of 7x7 pixels one of 64, of 56x56 as many as it takes of 128."""
    w = torch.empty(256, 64, 1, 1, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    with dry_run(arch):
        for side in (7, 56):
            x = torch.empty(2, 64, side, side, dtype=torch.bfloat16, device="meta")
            _, moments = conv_forward_moments(x.to(memory_format=torch.channels_last), w, by_image=True)
            assert moments.values.shape[1] == 2 * (1 if side == 7 else 25)


@pytest.mark.parametrize("first", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_image(first):
    y = random(2, 20, 5, 3)
    y[0, 4, 0, 0] = first
    _, means = squeeze(channel_moments(y, by_image=True), random_stats(20), y.dtype)
    exact = y.double().mean((2, 3)).float()
    torch.testing.assert_close(means, exact, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 136])
def test_apply(channels, dtype):
    y, stats = random(3, channels, 5, 3, dtype=dtype), random_stats(channels)
    gate = torch.rand(3, channels, device=DEVICE).to(dtype)
    for config in (None, TileConfig(16, 16, 1)):
        z = batch_norm_apply(y, stats, gate=gate, activation=RELU, config=config)
        eager = reference.batch_norm_apply(y.float(), stats, gate=gate.float()).to(dtype)
        assert_within_rule(z, eager, reference.batch_norm_apply(y.double(), stats.double(), gate=gate.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("config", [None, TileConfig(16, 16, 2)])
def test_gradients_of_gate_and_squeeze(config, second, dtype):
    """What autograd finds for ``relu(v*gate + other) * dz`` and ``mean(v) * dsqueeze``, v batch norm of y."""
    n, channels = 3, 20
    y, y2, dz = (random(n, channels, 5, 7, dtype=dtype) for _ in range(3))
    stats, stats2, gate = random_stats(channels), random_stats(channels), torch.rand(n, channels, device=DEVICE)
    dsqueeze, gate = random(n, channels), gate.to(dtype)

    def graph(t: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        v = reference.batch_norm_apply(y.to(t), stats.to(t), activation=IDENTITY).requires_grad_()
        times = gate.to(t).requires_grad_()
        total = v * times[:, :, None, None]
        if second:
            total = total + reference.batch_norm_apply(y2.to(t), stats2.to(t), activation=IDENTITY)
        loss = (total.relu() * dz.to(t)).sum() + (v.mean((2, 3)) * dsqueeze.to(t)).sum()
        return total.relu(), *torch.autograd.grad(loss, [v, times])

    z, dv, dgate = graph(torch.float64)
    other = (y2, stats2) if second else None
    g, sums = batch_norm_reduce(dz, y, stats, activation=RELU, z=z.to(dtype), second=other, gate=gate, config=config)
    ours, by_image = gate_gradient(sums, stats, n, torch.float32)
    torch.testing.assert_close(ours.double(), dgate, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-3)
    means = y.double().mean((2, 3)).float()
    through, offset = squeeze_gradient(by_image, gate, dsqueeze, means, stats, 35)
    masked = g.double() * gate.double()[:, :, None, None] + dsqueeze.double()[:, :, None, None] / 35
    torch.testing.assert_close(masked, dv, rtol=1e-9, atol=1e-6)
    exact = [masked.sum((2, 3)), (masked * (y.double() - stats.double()[0, :, None, None])).sum((2, 3))]
    torch.testing.assert_close(through.double(), torch.stack(exact), rtol=1e-4, atol=1e-4)
    if second:
        deviation = y2.double() - stats2.double()[0, :, None, None]
        torch.testing.assert_close(by_image[2].double(), (g.double() * deviation).sum((2, 3)), rtol=1e-4, atol=1e-4)
    coefs = random_coefs(channels)
    dy = batch_norm_backward(g, y, coefs, gate=(gate, offset))
    eager = reference.batch_norm_gradient(masked.float(), y.float(), coefs).to(dtype)
    assert_within_rule(dy, eager, reference.batch_norm_gradient(masked, y.double(), coefs.double()))


def test_errors_name_the_argument():
    y, stats = random(2, 20, 5, 3), random_stats(20)
    with pytest.raises(ValueError, match="stats must"):
        squeeze(channel_moments(y, by_image=True), stats[:, :4].contiguous(), y.dtype)
    with pytest.raises(ValueError, match="gate must"):
        batch_norm_apply(y, stats, gate=torch.rand(2, 4, device=DEVICE))
    with pytest.raises(ValueError, match="gate must"):
        batch_norm_reduce(y, y, stats, activation=RELU, z=y, gate=torch.rand(20, 2, device=DEVICE).T)
    with pytest.raises(ValueError, match="dsqueeze must"):
        squeeze_gradient(random(2, 2, 20), random(2, 20), random(2, 4), random(2, 20), stats, 15)


def norm_of(channels: int) -> Norm:
    mean, var, gamma, beta = random_stats(channels)[:4]
    return Norm(mean, var.abs() + 0.5, gamma, beta, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("groups", "config"),
    [*((1, tile) for tile in (*TILES, BOXED, TileConfig(16, 16, 16, splits=2))), (2, None)],
    ids=str,
)
def test_a_gate_in_the_epilogue_of_a_convolution(groups, config, dtype):
    """Its tile of pixels is cut where an image ends, each of which has a gate of its own."""
    n, ci, co = 3, 32, 40
    x, w = random(n, ci, 7, 6, dtype=dtype), random(co, ci // groups, 1, 1, dtype=dtype)
    norm, gate = norm_of(co), torch.rand(n, co, device=DEVICE).to(dtype)
    for residual in (None, random(n, co, 7, 6, dtype=dtype)):
        added = None if residual is None else Residual(residual)
        options = dict(geometry=Geometry(groups=groups), norm=norm, residual=added, activation=RELU, config=config)
        ours = conv_forward(x, w, gate=gate, **options)

        def exact(t: torch.dtype, residual: Tensor | None = residual) -> Tensor:
            y = torch.nn.functional.conv2d(x.to(t), w.to(t), groups=groups)
            v = torch.nn.functional.batch_norm(y, *(v.to(t) for v in norm[:4]), eps=norm.eps)
            v = v * gate.to(t)[:, :, None, None]
            return (v if residual is None else v + residual.to(t)).relu()

        assert_within_rule(ours, exact(torch.float32).to(dtype), exact(torch.float64), sums=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [*TILES, BOXED], ids=str)
def test_means_of_what_stands_behind_a_norm(config, dtype):
    x, w, norm = random(3, 32, 7, 6, dtype=dtype), random(40, 32, 3, 3, dtype=dtype), norm_of(40)
    options = dict(geometry=Geometry((1, 1), (1, 1)), norm=norm, activation=RELU, config=config)
    z, moments = conv_forward_moments(x, w, by_image=True, **options)
    torch.testing.assert_close(z, conv_forward(x, w, **options), rtol=2e-3, atol=2e-3)
    means = image_means(moments, torch.float32)
    assert means.shape == (3, 40, 1, 1)
    torch.testing.assert_close(means.double(), z.double().mean((2, 3), keepdim=True), rtol=1e-5, atol=1e-5)
    assert image_means(moments, dtype).dtype == dtype


@pytest.mark.parametrize(("side", "taps", "pixels"), [(7, 1, 64), (7, 3, 64), (14, 3, 128), (56, 1, 128), (56, 3, 128)])
def test_a_box_of_a_gate_is_of_one_image_and_hardly_larger(side, taps, pixels):
    sizes = 32, side, side, 64, 256, taps, taps, (1, 1), (taps // 2,) * 2, (1, 1), 1
    problem = ConvProblem(*sizes, torch.bfloat16, tf32=False, prologue=False, arch=90)
    tile = next(t for t in conv_box.tiles(problem) if (t.block_m, t.block_n) == (128, 128))
    found = conv_box.within_images(problem, tile)
    assert replace(found, box=None) in [replace(t, box=None) for t in conv_box.tiles(problem)]
    assert (found.block_m, found.block_n, found.box[0]) == (pixels, 128, 1)
