"""The batch norm kernels against the fp64 reference: statistics, normalisation, both steps of the backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resnet_fused.engine import reference
from resnet_fused.kernels.activation import IDENTITY, RELU, Activation
from resnet_fused.kernels.batch_norm import batch_norm_apply, batch_norm_stats, channel_moments, merge_moments
from resnet_fused.kernels.conv import Geometry
from resnet_fused.kernels.conv_forward import conv_forward, conv_forward_moments
from resnet_fused.kernels.epilogue import Moments, Norm, Prologue, Residual
from resnet_fused.kernels.launch import TileConfig, dry_run, observe
from resnet_fused.kernels.norm_backward import batch_norm_backward, batch_norm_coefs, batch_norm_reduce, merge_sums
from tests.kernels.test_conv_dgrad import _poisoned, random_coefs, random_stats  # noqa: F401
from tests.kernels.test_conv_forward import DEVICE, DTYPES, channels_last, random
from tests.rule import assert_within_rule

TILES = [None, TileConfig(16, 16, 2), TileConfig(32, 64, 1)]
CHANNELS = [3, 20, 136]


def moments_of(y: Tensor) -> Tensor:
    """Mean and sum of squared deviations in fp64, [2, C]."""
    values = y.double().transpose(0, 1).flatten(1)
    mean = values.mean(1)
    return torch.stack([mean, (values - mean[:, None]).square().sum(1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("config", TILES)
def test_channel_moments(channels, config, dtype):
    y = random(3, channels, 7, 5, dtype=dtype)
    merged = merge_moments(channel_moments(y, config=config)).double()
    torch.testing.assert_close(merged, moments_of(y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ratio", [100, 1000])
def test_variance_far_from_zero(ratio):
    y = random(2, 20, 9, 7) + ratio
    mean, m2 = merge_moments(channel_moments(y, config=TILES[1])).double()
    exact = moments_of(y)
    torch.testing.assert_close(mean, exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(m2, exact[1], rtol=1e-7 * ratio, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [None, TileConfig(16, 16, 16), TileConfig(32, 128, 32)])
@pytest.mark.parametrize("prologue", [True, False])
def test_moments_of_a_convolution_are_those_of_its_rounded_output(prologue, config, dtype):
    x, w, bias = random(2, 16, 7, 5, dtype=dtype), random(136, 16, 3, 3, dtype=dtype), random(136, dtype=dtype)
    arguments = dict(geometry=Geometry((2, 1), (1, 1)), bias=bias, config=config)
    arguments["prologue"] = Prologue(torch.rand(16, device=DEVICE), random(16)) if prologue else None
    y, moments = conv_forward_moments(x, w, **arguments)
    assert torch.equal(y, conv_forward(x, w, **arguments))
    torch.testing.assert_close(merge_moments(moments).double(), moments_of(y), rtol=1e-5, atol=1e-5)


ROADS = ["convolution", "moments"]


def moments_by(road: str, y: Tensor, config: TileConfig) -> Moments:
    """The moments of ``y`` as the epilogue of a convolution leaves them, or as a pass of their own."""
    if road == "moments":
        return channel_moments(y, config=config)
    channels = y.shape[1]
    identity = torch.ones(channels, 1, 1, 1, dtype=y.dtype, device=DEVICE)
    out, moments = conv_forward_moments(y, identity, geometry=Geometry(groups=channels), config=config)
    assert torch.equal(out, y) or not y.isfinite().all()
    return moments


SMALL = TileConfig(16, 32, 32)


@pytest.mark.parametrize("config", [SMALL, TileConfig(128, 32, 32)], ids=["tiles", "one tile"])
@pytest.mark.parametrize(
    "values", [["inf"], ["-inf"], ["nan"], ["inf", "-inf"], ["inf", "inf"], ["inf", "nan"]], ids=str
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce")
@pytest.mark.parametrize("first", [0, 1, 20])
@pytest.mark.parametrize("road", ROADS)
def test_running_statistics_of_what_is_not_finite(road, first, values, config):
    """The mean is that of a sum, infinite or NaN, and the variance NaN; other channels do not hear of it."""
    y, bn = random(2, 3, 9, 7), nn.BatchNorm2d(3).to(DEVICE)
    for i, value in enumerate(values):
        image, pixel = divmod(first + 37 * i, 63)
        y[image, 1, pixel // 7, pixel % 7] = float(value)
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    stats = batch_norm_stats(
        moments_by(road, y, config), None, None, bn.eps, running_mean=mean, running_var=var, momentum=bn.momentum
    )
    z = bn(y)
    torch.testing.assert_close(mean, bn.running_mean, equal_nan=True)
    torch.testing.assert_close(var, bn.running_var, equal_nan=True)
    assert torch.equal(batch_norm_apply(y, stats, activation=IDENTITY).isnan(), z.isnan())
    assert not bn.running_mean[1].isfinite()
    assert bn.running_var[1].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [SMALL, TileConfig(128, 32, 32)], ids=["tiles", "one tile"])
@pytest.mark.parametrize("road", ROADS)
def test_constant_channels_have_their_value_for_mean_and_no_variance(road, config, dtype):
    """1/sqrt(eps) would amplify whatever the mean is rounded by."""
    values = random(24, dtype=dtype) * 100
    y = channels_last(values[:, None, None].expand(3, 24, 9, 7))
    moments = moments_by(road, y, config)
    assert (moments.values[0] == values.float()).all()
    assert (moments.values[1] == 0).all()
    mean, m2 = merge_moments(moments)
    assert torch.equal(mean, values.float())
    assert (m2 == 0).all()


@pytest.mark.parametrize("pixels", [1, 31, 32, 33, 64])
def test_a_tile_for_every_pixel_and_none_more(pixels):
    moments = channel_moments(random(1, 20, pixels, 1), config=TILES[1])
    assert moments.rows == 32
    assert moments.values.shape == (2, -(-pixels // 32), 20)
    assert moments.values.isfinite().all()


def test_tiles_without_pixels_do_not_count():
    """A process may have no images; what it sends for their mean is not a number."""
    y = random(3, 20, 3, 4)
    own = merge_moments(channel_moments(y))
    for at in (0, 1):
        values = own[:, None].repeat(1, 2, 1)
        values[:, at] = float("nan")
        counts = torch.full((2,), 36.0, device=DEVICE)
        counts[at] = 0
        merged = merge_moments(Moments(values, rows=0, pixels=0, counts=counts))
        assert torch.equal(merged, own)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("tiles", [255, 257, 1024, 2500])
def test_however_many_tiles_there_are(tiles, counted):
    """Passes over rows of them, the last not full. Means that are far apart show whether each tile has its weight."""
    rows, missing = 5, 3
    y = random(tiles, rows, 3, dtype=torch.float64) + 10 * random(tiles, 1, 3, dtype=torch.float64)
    present = torch.full((tiles,), rows, device=DEVICE)
    present[-1] -= missing
    if counted:
        present[0] = present[tiles // 2] = 0
    parts = [tile[:count] for tile, count in zip(y, present.tolist(), strict=True)]
    values = torch.stack([moments_of(part.T[None, :, :, None]) for part in parts], 1)
    counts = present.float() if counted else None
    merged = merge_moments(Moments(values.float(), rows, tiles * rows - missing, counts))
    exact = moments_of(torch.cat(parts).T[None, :, :, None])
    torch.testing.assert_close(merged.double(), exact, rtol=1e-6, atol=10e-6)


@pytest.mark.parametrize("infinite", [[7], [2400], [7, 1031], [7, 8]], ids=str)
def test_an_infinite_mean_among_many_stays_so(infinite):
    values = random(2, 2500, 3).abs()
    values[0, infinite, 1] = float("inf")
    values[1, infinite, 1] = float("nan")
    mean, m2 = merge_moments(Moments(values, 4, 10000))
    assert mean[1] == float("inf")
    assert m2[1].isnan()
    assert mean[[0, 2]].isfinite().all()
    assert m2[[0, 2]].isfinite().all()


def test_tiles_with_counts_of_their_own():
    y = random(5, 20, 3, 4)
    parts = [merge_moments(channel_moments(part)) for part in (y[:3], y[3:])]
    counts = torch.tensor([36.0, 24.0], device=DEVICE)
    shared = Moments(torch.stack(parts, 1), rows=0, pixels=0, counts=counts)
    whole = batch_norm_stats(channel_moments(y), None, None, 1e-5)
    torch.testing.assert_close(batch_norm_stats(shared, None, None, 1e-5), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("affine", [True, False])
def test_statistics_as_torch_updates_them(momentum, affine):
    bn = nn.BatchNorm2d(20, momentum=momentum, affine=affine, eps=1e-3).to(DEVICE)
    mean, var, batches = (b.clone() for b in (bn.running_mean, bn.running_var, bn.num_batches_tracked))
    if affine:
        nn.init.normal_(bn.weight)
        bn.weight.data[3] = 0
        nn.init.normal_(bn.bias)
    for _ in range(3):
        y = random(3, 20, 5, 4) * 2 + 1
        stats = batch_norm_stats(
            channel_moments(y, config=TILES[1]), bn.weight, bn.bias, bn.eps,
            running_mean=mean, running_var=var, batches=batches, momentum=momentum,
        )  # fmt: skip
        z = bn(y)
        torch.testing.assert_close(reference.batch_norm_apply(y, stats, activation=IDENTITY), z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mean, bn.running_mean)
        torch.testing.assert_close(var, bn.running_var)
        assert batches == bn.num_batches_tracked
        assert torch.equal(stats[4], torch.full_like(stats[4], 1 / 60))
    frozen = batch_norm_stats(None, bn.weight, bn.bias, bn.eps, running_mean=mean, running_var=var)
    torch.testing.assert_close(
        reference.batch_norm_apply(y, frozen, activation=IDENTITY), bn.eval()(y), rtol=1e-5, atol=1e-5
    )
    assert (frozen[4] == 0).all()


def residuals(dtype: torch.dtype, channels: int) -> dict[str, dict]:
    return {
        "none": {},
        "same shape": dict(residual=Residual(random(2, channels, 5, 3, dtype=dtype))),
        "wider": dict(residual=Residual(random(2, channels, 5, 3))),
        "normalised": dict(
            residual=Residual(random(2, channels, 5, 3, dtype=dtype)), residual_stats=random_stats(channels)
        ),
        "padded": dict(residual=Residual(random(2, channels // 2, 9, 6, dtype=dtype), 2, channels // 4)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [20, 136])
@pytest.mark.parametrize("kind", ["none", "same shape", "wider", "normalised", "padded"])
@pytest.mark.parametrize("act", [RELU, IDENTITY], ids=lambda act: act.name)
def test_apply(kind, act, channels, dtype):
    y, stats, more = random(2, channels, 5, 3, dtype=dtype), random_stats(channels), residuals(dtype, channels)[kind]

    def specification(t: torch.dtype) -> Tensor:
        residual = more.get("residual")
        if residual is not None:
            residual = reference.PaddedIdentity(residual.tensor.to(t), residual.step, residual.before)
        other = more.get("residual_stats")
        return reference.batch_norm_apply(y.to(t), stats.to(t), residual, None if other is None else other.to(t), act)

    for config in TILES:
        z = batch_norm_apply(y, stats, activation=act, config=config, **more)
        assert z.is_contiguous(memory_format=torch.channels_last)
        assert_within_rule(z, specification(torch.float32).to(dtype), specification(torch.float64))


def test_apply_agrees_to_the_bit_with_the_prologue():
    y, stats = random(2, 16, 5, 3, dtype=torch.float16), random_stats(16)
    identity = torch.eye(16, device=DEVICE, dtype=torch.float16)[:, :, None, None]
    identity = identity.contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch_norm_apply(y, stats), conv_forward(y, identity, prologue=Prologue(stats[2], stats[3])))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["none", "padded"])
def test_apply_with_fixed_statistics_agrees_to_the_bit_with_their_stats(kind, affine):
    y, more = random(2, 20, 5, 3, dtype=torch.float16), residuals(torch.float16, 20)[kind]
    mean, var = random(20), torch.rand(20, device=DEVICE) + 0.5
    gamma, beta = (random(20, dtype=torch.float16), random(20)) if affine else (None, None)
    stats = batch_norm_stats(None, gamma, beta, 1e-3, running_mean=mean, running_var=var)
    fixed = batch_norm_apply(y, Norm(mean, var, gamma, beta, 1e-3), config=TILES[1], **more)
    assert torch.equal(fixed, batch_norm_apply(y, stats, config=TILES[1], **more))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("mask", ["z", "y", "none"])
@pytest.mark.parametrize("second", [False, True])
def test_reduce(mask, second, channels, dtype):
    dz, y, y2 = (random(3, channels, 7, 5, dtype=dtype) for _ in range(3))
    stats, stats2 = random_stats(channels), random_stats(channels)
    z = torch.relu(random(3, channels, 7, 5, dtype=dtype))
    v = reference.batch_norm_apply(y.double(), stats.double(), activation=IDENTITY)
    if second:
        v = v + reference.batch_norm_apply(y2.double(), stats2.double(), activation=IDENTITY)
    passes = {"z": z > 0, "y": v > 0, "none": torch.ones_like(z, dtype=torch.bool)}[mask]
    activation = IDENTITY if mask == "none" else RELU
    arguments = dict(z=z if mask == "z" else None, activation=activation, second=(y2, stats2) if second else None)
    for config in TILES:
        g, sums = batch_norm_reduce(dz, y, stats, config=config, **arguments)
        decided = (v.abs() > 1e-5) | (mask != "y")
        assert torch.equal(g[decided], torch.where(passes, dz, 0.0)[decided])
        assert (g is dz) == (mask == "none")
        exact = list(reference.batch_norm_sums(g.double(), y.double(), stats.double()))
        if second:
            exact.append(reference.batch_norm_sums(g.double(), y2.double(), stats2.double())[1])
        torch.testing.assert_close(merge_sums(sums).double(), torch.stack(exact), rtol=1e-4, atol=1e-4)
        again = dz.clone(memory_format=torch.channels_last)
        in_place, same = batch_norm_reduce(again, y, stats, out=again, config=config, **arguments)
        assert in_place is again
        assert torch.equal(in_place, g)
        assert torch.equal(sums, same)


def test_reduce_without_y_only_masks():
    dz, z = random(2, 20, 5, 3), random(2, 20, 5, 3)
    z[0, 1, 2, 2] = float("nan")
    g, sums = batch_norm_reduce(dz, None, None, activation=RELU, z=z)
    assert torch.equal(g, torch.where(z <= 0, 0.0, dz)), "what is not a number lets the gradient pass"
    torch.testing.assert_close(sums.sum(1)[0], g.sum((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert (sums[1] == 0).all()


@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tiles", [1, 300])
def test_coefs(tiles, gamma_dtype):
    sum_g, sum_gy, stats = random(tiles, 20), random(tiles, 20), random_stats(20)
    for inv_count in (1 / 500, 0.0):
        stats[4] = inv_count
        coefs, dgamma, dbeta = batch_norm_coefs(sum_g, sum_gy, stats, gamma_dtype=gamma_dtype)
        sums = torch.stack([sum_g.double().sum(0), sum_gy.double().sum(0)])
        exact = reference.batch_norm_coefs(sums, stats.double())
        torch.testing.assert_close(coefs.double(), exact, rtol=1e-4, atol=1e-5)
        tolerance = dict(rtol=1e-3, atol=2e-2) if gamma_dtype == torch.float16 else dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dgamma.double(), stats[1].double() * sums[1], **tolerance)
        torch.testing.assert_close(dbeta.double(), sums[0], **tolerance)
        assert dgamma.dtype == dbeta.dtype == gamma_dtype
    assert (coefs[1:] == 0).all(), "constants do not depend on the batch"


@pytest.mark.parametrize(
    ("rstd", "gamma", "sum_g", "sum_gy", "inv_count"),
    [
        (1e-15, 1.0, 3.0, 1e16, 1e-3),  # the variance is 1e30: the cube of rstd is 0 in fp32
        (1e15, 1.0, 3.0, 1e-13, 1e-3),  # 1e-30
        (1e15, 1e-9, 1e20, 1e-13, 1e-6),
        (1e-15, 1e9, 1e-20, 1e30, 1e-6),
        (3e19, 1e-20, 1.0, 1e-19, 1.0),
        (1.0, 1e-30, 1e30, 1e35, 1e-8),
    ],
)
def test_coefs_that_fp32_can_hold_are_held(rstd, gamma, sum_g, sum_gy, inv_count):
    """No product on the way leaves the range of fp32."""
    stats = torch.tensor([0.5, rstd, gamma * rstd, 0.0, inv_count], device=DEVICE)[:, None].expand(5, 20).contiguous()
    sums = torch.tensor([sum_g, sum_gy], device=DEVICE)[:, None].expand(2, 20).contiguous()
    coefs, dgamma, _ = batch_norm_coefs(sums[:1], sums[1:], stats)
    exact = reference.batch_norm_coefs(sums.double(), stats.double())
    assert (exact[1].abs() > 1e-38).all()
    torch.testing.assert_close(coefs.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(dgamma.double(), stats[1].double() * sums[1].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_constants_of_fixed_statistics_hear_nothing_of_the_gradient(value):
    """Zero, the 1/count of theirs, times infinity would be NaN, and spoil the gradient of the whole channel."""
    stats, sums = random_stats(20), torch.full((1, 20), value, device=DEVICE)
    stats[4] = 0
    coefs, dgamma, dbeta = batch_norm_coefs(sums, sums, stats)
    assert torch.equal(coefs[0], stats[2])
    assert (coefs[1:] == 0).all()
    assert not dgamma.isfinite().any()
    assert not dbeta.isfinite().any()


def test_int64_is_chosen_by_extent():
    """By the largest tensor of each launch."""

    def chosen(n: int) -> set[bool]:
        calls = []
        with dry_run(90), observe(calls.append):
            large, small = (
                torch.empty(n, c, 64, 64, device="meta", memory_format=torch.channels_last) for c in (64, 16)
            )
            cut = large[:, :16]
            stats, coefs = torch.empty(5, 16, device="meta"), torch.empty(3, 16, device="meta")
            channel_moments(cut)
            batch_norm_apply(cut, stats)
            batch_norm_apply(small, stats, residual=Residual(cut))
            for tensors in (dict(dz=cut), dict(y=cut), dict(z=cut), dict(second=(cut, stats)), dict(out=cut)):
                batch_norm_reduce(**(dict(dz=small, y=small, stats=stats, activation=RELU, z=small) | tensors))
            batch_norm_backward(cut, small, coefs)
            batch_norm_backward(small, cut, coefs)
            batch_norm_backward(small, small, coefs, second=(cut, coefs))
            batch_norm_backward(small, small, coefs, out=cut)
        assert len(calls) == 12
        return {call.arguments["INT64"] for call in calls}

    assert chosen(2**31 // 64**3 - 1) == {False}
    assert chosen(2**31 // 64**3) == {True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("config", TILES)
def test_backward(channels, config, dtype):
    g, y, y2 = (random(3, channels, 7, 5, dtype=dtype) for _ in range(3))
    coefs, coefs2 = random_coefs(channels), random_coefs(channels)

    def rule(dy: Tensor, y: Tensor, coefs: Tensor) -> None:
        eager = reference.batch_norm_gradient(g.float(), y.float(), coefs).to(dtype)
        assert_within_rule(dy, eager, reference.batch_norm_gradient(g.double(), y.double(), coefs.double()))

    dy = batch_norm_backward(g, y, coefs, config=config)
    rule(dy, y, coefs)
    both = batch_norm_backward(g, y, coefs, second=(y2, coefs2), config=config)
    assert torch.equal(both[0], dy)
    rule(both[1], y2, coefs2)
    only_g = torch.stack([coefs[0], torch.zeros_like(coefs[0]), torch.zeros_like(coefs[0])])
    rule(batch_norm_backward(g, None, coefs, config=config), y, only_g)
    added = reference.batch_norm_gradient(g.float(), y.float(), coefs) + y2.float()
    exact = reference.batch_norm_gradient(g.double(), y.double(), coefs.double()) + y2.double()
    assert_within_rule(batch_norm_backward(g, y, coefs, addend=y2, config=config), added.to(dtype), exact)
    in_place = g.clone(memory_format=torch.channels_last)
    assert batch_norm_backward(in_place, y, coefs, out=in_place, config=config) is in_place
    assert torch.equal(in_place, dy)


def test_errors_name_the_argument():
    y, stats = random(2, 20, 5, 3), random_stats(20)
    with pytest.raises(ValueError, match="y must be pixel-linear"):
        channel_moments(y.contiguous())
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 20, 5, 3\), or fit it"):
        batch_norm_apply(y, stats, residual=Residual(random(2, 10, 9, 6), 2, 11))
    with pytest.raises(ValueError, match=r"residual\.step must be an integer of at least 1; got 0"):
        batch_norm_apply(y, stats, residual=Residual(y, step=0))
    with pytest.raises(ValueError, match=r"residual\.before must be an integer of at least 0; got 1\.0"):
        batch_norm_apply(y, stats, residual=Residual(y, before=1.0))
    with pytest.raises(TypeError, match=r"must be a Residual\(tensor, step, before\); got a <class 'torch\.Tensor'>"):
        batch_norm_apply(y, stats, residual=y)
    for residual in (None, Residual(random(2, 10, 5, 3))):
        with pytest.raises(ValueError, match="residual_stats need a residual of the shape of y"):
            batch_norm_apply(y, stats, residual=residual, residual_stats=stats)
    other = random(2, 20, 5, 4)
    for name in ("y", "z", "out"):
        arguments = dict(dz=y, y=y, stats=stats, activation=RELU, z=y) | {name: other}
        with pytest.raises(
            ValueError, match=rf"{name} must have the shape of dz, \(2, 20, 5, 3\); got \(2, 20, 5, 4\)"
        ):
            batch_norm_reduce(**arguments)
    nothing = dict(y=None, stats=None)
    for arguments in (dict(y=y, stats=None), dict(y=None, stats=stats), nothing | dict(activation=RELU)):
        with pytest.raises(ValueError, match="y and stats must be given together, and with an activation, they or z"):
            batch_norm_reduce(y, **arguments)
    for arguments in (dict(), dict(activation=Activation("silu")), dict(activation=RELU, residual=Residual(y))):
        with pytest.raises(ValueError, match="z must come with a ReLU, and without residual; got"):
            batch_norm_reduce(y, y, stats, z=y, **arguments)
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 20, 5, 3\)"):
        batch_norm_reduce(y, y, stats, activation=RELU, residual=Residual(other))
    for arguments in (
        dict(y=other),
        dict(y=y, out=other),
        dict(y=y, addend=other),
        dict(y=y, second=(other, random_coefs(20))),
    ):
        with pytest.raises(ValueError, match="must have the shape of g"):
            batch_norm_backward(y, coefs=random_coefs(20), **arguments)
    with pytest.raises(ValueError, match="out must be pixel-linear"):
        batch_norm_backward(y, y, random_coefs(20), out=torch.zeros(1, 20, 1, 1, device=DEVICE).expand(2, 20, 5, 3))
    with pytest.raises(ValueError, match=r"y must be .* got torch.float64"):
        channel_moments(y.double())
    for one in (dict(running_mean=stats[0]), dict(running_var=stats[0])):
        with pytest.raises(ValueError, match="running_mean and running_var must both be given"):
            batch_norm_stats(channel_moments(y), None, None, 1e-5, **one)
    with pytest.raises(ValueError, match="running_mean and running_var must both be given"):
        batch_norm_stats(None, None, None, 1e-5)
