"""batch_norm against the fp64 reference: statistics, normalisation, backward; hostile numbers, memory it may touch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import reference
from resnet_fused.kernels import batch_norm as module
from resnet_fused.kernels.batch_norm import (
    batch_norm_apply,
    batch_norm_backward,
    batch_norm_coefs,
    batch_norm_reduce,
    batch_norm_stats,
    channel_moments,
    default_config,
    merge_moments,
    merge_sums,
)
from resnet_fused.kernels.conv_forward import conv_forward
from resnet_fused.kernels.launch import INTERPRETER, TileConfig, dry_run, observe
from resnet_fused.kernels.tile import Moments
from tests.kernels.test_conv_forward import DEVICE, DTYPES, channels_last, embed, random
from tests.rule import assert_within_rule

TILES = [None, TileConfig(32, 32, 2), TileConfig(16, 128, 3)]
CHANNELS = [3, 20, 64, 136]
SIZE = (5, 13)
PIXELS = 2 * SIZE[0] * SIZE[1]
EPS = 1e-5


def rows(t: Tensor) -> Tensor:
    """One row per pixel."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def tiles(t: Tensor, size: int) -> list[Tensor]:
    return list(rows(t).split(size))


def moments_of(values: list[Tensor]) -> Tensor:
    """Per tile, the mean and the sum of squared deviations from it."""
    means = torch.stack([v.mean(0) for v in values])
    return torch.stack(
        [means, torch.stack([(v - mean).square().sum(0) for v, mean in zip(values, means, strict=True)])]
    )


def merged_moments(moments: Tensor, counts: Tensor) -> Tensor:
    """Of all tiles together (Chan), in the dtype of ``moments``."""
    (means, m2), counts = moments, counts.to(moments.dtype)[:, None]
    mean = (counts * means).sum(0) / counts.sum()
    return torch.stack([mean, (m2 + counts * (means - mean).square()).sum(0)])


def random_stats(channels: int, inv_count: float = 1 / PIXELS) -> Tensor:
    """Negative and zero scales among them."""
    gamma = torch.linspace(-1.5, 1.5, channels, device=DEVICE)
    gamma[channels // 2] = 0
    variance = torch.rand(channels, device=DEVICE) + 0.5
    return reference.batch_norm_stats(random(channels), variance, gamma, random(channels), EPS, inv_count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("config", TILES)
def test_moments_of_each_tile(channels, config, dtype):
    y = random(2, channels, *SIZE, dtype=dtype) + 1
    values, size, pixels, counts = channel_moments(y, config=config)
    assert (pixels, counts) == (PIXELS, None)
    assert config is None or values.shape[1] == -(-PIXELS // size) > 1
    eager, exact = (moments_of(tiles(y.to(t), size)) for t in (torch.float32, torch.float64))
    for ours_row, eager_row, exact_row in zip(values, eager, exact, strict=True):
        assert_within_rule(ours_row, eager_row, exact_row, sums=2)


@pytest.mark.parametrize("mean", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize("config", TILES)
def test_variance_survives_a_large_mean(mean, config):
    y = random(2, 20, *SIZE) + mean
    moments = channel_moments(y, config=config)
    merged, parts = merge_moments(moments), tiles(y, moments.rows)
    counts = torch.tensor([len(part) for part in parts], device=DEVICE)
    eager, exact = merged_moments(moments_of(parts), counts), moments_of([rows(y.double())])[:, 0]
    for row in range(2):
        assert_within_rule(merged[row], eager[row], exact[row], sums=2)
    in_fp64 = merged_moments(moments.values.double(), counts)
    assert ((merged - in_fp64).abs() <= 8 * torch.finfo(torch.float32).eps * in_fp64).all()


def test_thousands_of_tiles():
    """More than one step of the merge, and not a multiple of it."""
    y = random(1, 10, 57, 41) * torch.arange(1, 11, device=DEVICE)[:, None, None] + 50
    merged = merge_moments(channel_moments(y, config=TileConfig(4, 16, 1)))
    for ours, eager, exact in zip(
        merged, moments_of([rows(y)])[:, 0], moments_of([rows(y.double())])[:, 0], strict=True
    ):
        assert_within_rule(ours, eager, exact, sums=1)
    sums = random(2, 700, 10)
    assert_within_rule(merge_sums(sums), sums.sum(1), sums.double().sum(1), sums=1)


def test_merge_of_parts_of_different_size():
    """Statistics that several processes share: each merges its own tiles, then the counts weigh them."""
    y = random(1, 20, 40, 7) + torch.linspace(0, 3, 40, device=DEVICE)[:, None]
    parts = [channels_last(part) for part in y.split((1, 22, 17), dim=2)]
    merged = [merge_moments(channel_moments(part, config=TILES[1])) for part in parts]
    counts = torch.tensor([part.shape[2] * 7.0 for part in parts], device=DEVICE)
    together = Moments(torch.stack(merged, 1), rows=0, pixels=0, counts=counts)
    running = [torch.zeros(20, device=DEVICE), torch.ones(20, device=DEVICE)]
    alone = [t.clone() for t in running]
    stats = batch_norm_stats(together, None, None, EPS, running_mean=running[0], running_var=running[1], momentum=0.1)
    bn = nn.BatchNorm2d(20, affine=False, device=DEVICE).double()
    bn(y.double())
    expected = batch_norm_stats(
        channel_moments(y), None, None, EPS, running_mean=alone[0], running_var=alone[1], momentum=0.1
    )
    for ours, eager, exact in (
        (stats, expected, exact_stats(y, None, None)),
        (running[0], alone[0], bn.running_mean),
        (running[1], alone[1], bn.running_var),
    ):
        assert_within_rule(ours, eager, exact, sums=2)


def exact_stats(y: Tensor, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor:
    y = y.to(dtype)
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
    cast = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    return reference.batch_norm_stats(mean, var, cast(gamma), cast(beta), EPS, y.shape[1] / y.numel())


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1, None])
@pytest.mark.parametrize("channels", [3, 20])
def test_statistics_and_running_statistics_over_several_steps(channels, momentum):
    ours, eager = (nn.BatchNorm2d(channels, EPS, momentum, device=DEVICE) for _ in range(2))
    exact = nn.BatchNorm2d(channels, EPS, momentum, device=DEVICE).double()
    gamma, beta = torch.linspace(-1, 1, channels, device=DEVICE), random(channels)
    for step in range(4):
        y = random(2, channels, *SIZE) * (step + 1) + step
        eager(y)
        exact(y.double())
        stats = batch_norm_stats(
            channel_moments(y, config=TILES[1]),
            gamma,
            beta,
            EPS,
            running_mean=ours.running_mean,
            running_var=ours.running_var,
            batches=ours.num_batches_tracked,
            momentum=momentum,
        )
        want, plain = exact_stats(y, gamma, beta), exact_stats(y, gamma, beta, torch.float32)
        for row in range(5):
            assert_within_rule(stats[row], plain[row], want[row], sums=1)
        assert_within_rule(ours.running_mean, eager.running_mean, exact.running_mean, sums=1)
        assert_within_rule(ours.running_var, eager.running_var, exact.running_var, sums=1)
        assert ours.num_batches_tracked == eager.num_batches_tracked == step + 1


@pytest.mark.parametrize("channels", [8, 40])
def test_a_batch_is_counted_once(channels):
    """However many programs there are, and without running statistics."""
    moments, batches = channel_moments(random(1, channels, 3, 3)), torch.tensor(7, device=DEVICE)
    batch_norm_stats(moments, None, None, EPS, batches=batches, momentum=0.1)
    assert batches == 8
    batch_norm_stats(moments, None, None, EPS, batches=batches)
    assert batches == 9


@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_without_gamma_or_beta_and_in_16_bits(affine, dtype):
    gamma, beta = (random(20, dtype=dtype) if given else None for given in affine)
    y = random(2, 20, *SIZE)
    running = [torch.zeros(20, dtype=dtype, device=DEVICE), torch.ones(20, dtype=dtype, device=DEVICE)]
    ours = batch_norm_stats(
        channel_moments(y), gamma, beta, EPS, running_mean=running[0], running_var=running[1], momentum=0.25
    )
    want = exact_stats(y, gamma, beta)
    assert_within_rule(ours, exact_stats(y, gamma, beta, torch.float32), want, sums=1)
    for got, start, value in zip(running, (0, 1), (want[0], y.double().var((0, 2, 3))), strict=True):
        new = 0.75 * start + 0.25 * value
        assert_within_rule(got, new.to(dtype), new, sums=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluation_mode_updates_nothing(dtype):
    mean, var = random(20, dtype=dtype), torch.rand(20, device=DEVICE).to(dtype)
    var[3] = 0
    gamma, beta, batches = random(20), random(20), torch.tensor(3, device=DEVICE)
    before = [mean.clone(), var.clone()]
    arguments = dict(running_mean=mean, running_var=var, batches=batches)
    ours = batch_norm_stats(None, gamma, beta, EPS, **arguments, momentum=0.1)
    assert torch.equal(ours, batch_norm_stats(None, gamma, beta, EPS, **arguments))
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert batches == 3
    eager = reference.batch_norm_stats(mean.float(), var.float(), gamma, beta, EPS, 0)
    exact = reference.batch_norm_stats(*(t.double() for t in (mean, var, gamma, beta)), EPS, 0)
    for row in range(4):
        assert_within_rule(ours[row], eager[row], exact[row])
    assert torch.equal(ours[4], torch.zeros(20, device=DEVICE))


def test_constant_channels_leave_eps():
    y = torch.full((2, 16, *SIZE), 3.0, device=DEVICE).contiguous(memory_format=torch.channels_last)
    mean, rstd = batch_norm_stats(channel_moments(y, config=TILES[1]), None, None, 1e-3)[:2]
    assert torch.equal(mean, torch.full_like(mean, 3.0))
    assert_within_rule(rstd, torch.full_like(rstd, 1e-3).rsqrt(), torch.full_like(rstd, 1e-3).double().rsqrt())


RESIDUALS = ["none", "identity", "fp32", "normalised", "padded", "padded, every third", "fewer channels"]


def residual_arguments(kind: str, channels: int, dtype: torch.dtype) -> dict:
    n, (p, q) = 2, SIZE
    if kind == "none":
        return {}
    if kind == "normalised":
        return dict(residual=random(n, channels, p, q, dtype=dtype), residual_stats=random_stats(channels))
    if kind in ("identity", "fp32"):
        return dict(residual=random(n, channels, p, q, dtype=torch.float32 if kind == "fp32" else dtype))
    step = {"padded": 2, "padded, every third": 3, "fewer channels": 1}[kind]
    before = channels // 3
    narrow = channels - 2 * before
    residual = random(n, narrow, step * (p - 1) + 1, step * q, dtype=dtype)
    return dict(residual=residual, residual_step=step, residual_before=before)


def apply_reference(
    y: Tensor, stats: Tensor, dtype: torch.dtype, *, residual=None, residual_stats=None, residual_step=1,
    residual_before=0, relu=True,
) -> Tensor:  # fmt: skip
    """The specification in ``dtype`` throughout."""
    cast = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    shortcut = cast(residual)
    if residual is not None and residual.shape != y.shape:
        shortcut = reference.PaddedIdentity(shortcut, residual_step, residual_before)
    return reference.batch_norm_apply(cast(y), cast(stats), shortcut, cast(residual_stats), relu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_apply(channels, kind, dtype):
    y, stats = random(2, channels, *SIZE, dtype=dtype), random_stats(channels)
    arguments = residual_arguments(kind, channels, dtype)
    for config in TILES:
        for relu in (True, False):
            ours = batch_norm_apply(y, stats, **arguments, relu=relu, config=config)
            eager, exact = (
                apply_reference(y, stats, t, **arguments, relu=relu) for t in (torch.float32, torch.float64)
            )
            assert_within_rule(ours, eager.to(dtype), exact)
            assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_agrees_with_the_prologue_of_the_convolution_to_the_bit(dtype):
    """A 1x1 filter that is the identity shows what the prologue computes."""
    y, stats = random(2, 16, *SIZE, dtype=dtype), random_stats(16)
    w = channels_last(torch.eye(16, device=DEVICE, dtype=dtype)[:, :, None, None])
    assert torch.equal(batch_norm_apply(y, stats), conv_forward(y, w, prologue=(stats[2], stats[3])))


def test_apply_to_another_dtype():
    y, stats = random(2, 20, *SIZE, dtype=torch.float16), random_stats(20)
    wide = batch_norm_apply(y, stats, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.half(), batch_norm_apply(y, stats))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_go_through_as_in_eager(value):
    y, stats, residual = random(2, 20, *SIZE), random_stats(20), random(2, 20, *SIZE)
    y[0, 3, 2, 2] = value
    residual[1, 4, 1, 5] = value
    ours = batch_norm_apply(y, stats, residual=residual)
    eager = reference.batch_norm_apply(y, stats, residual)
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours.isinf(), eager.isinf())
    spoiled = batch_norm_stats(channel_moments(y, config=TILES[1]), None, None, EPS)
    assert spoiled[:4].isfinite().all(0).logical_not().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", ["z", "mask", "none"])
@pytest.mark.parametrize("channels", CHANNELS)
def test_reduce(channels, cut, dtype):
    dz, y, y2 = (random(2, channels, *SIZE, dtype=dtype) for _ in range(3))
    stats, stats2 = random_stats(channels), random_stats(channels)
    z = batch_norm_apply(y, stats, residual=y2, residual_stats=stats2) if cut == "z" else None
    open_ = torch.ones_like(dz, dtype=torch.bool)
    if cut == "mask":
        # To the bit: the forward rounds nothing but the sum inside its fma before it compares.
        open_ = batch_norm_apply(y, stats, out_dtype=torch.float32) > 0
    if cut == "z":
        open_ = z > 0
    g = torch.where(open_, dz, 0.0)
    for config in TILES:
        for second in (None, (y2, stats2)):
            got, sums = batch_norm_reduce(dz, y, stats, z=z, mask=cut == "mask", second=second, config=config)
            assert torch.equal(got, g)
            assert (got is dz) == (cut == "none")
            size = PIXELS if config is None else config.block_m * config.block_k
            pairs = [(y, stats)] + ([second] if second else [])
            eager, exact = (sums_of(g, pairs, size, t) for t in (torch.float32, torch.float64))
            assert sums.shape == exact.shape
            for row in range(len(sums)):
                assert_within_rule(sums[row], eager[row], exact[row], sums=1)
            assert_within_rule(merge_sums(sums), eager.sum(1), exact.sum(1), sums=2)


def sums_of(g: Tensor, pairs: list[tuple[Tensor, Tensor]], size: int, dtype: torch.dtype) -> Tensor:
    """Per tile: sum g, then sum g*(y - mean) of each pair."""
    factors = [torch.ones_like(g, dtype=dtype)]
    factors += [y.to(dtype) - stats[0, :, None, None].to(dtype) for y, stats in pairs]
    return torch.stack([torch.stack([t.sum(0) for t in tiles(g.to(dtype) * f, size)]) for f in factors])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_without_y(dtype):
    dz, z = random(2, 20, *SIZE, dtype=dtype), random(2, 20, *SIZE, dtype=dtype)
    want, sums = batch_norm_reduce(dz, z, random_stats(20), z=z, config=TILES[1])
    g, alone = batch_norm_reduce(dz, None, None, z=z, config=TILES[1])
    assert torch.equal(g, want)
    assert torch.equal(alone[0], sums[0])
    assert not alone[1].any()


@pytest.mark.parametrize("config", TILES)
def test_reduce_in_place(config):
    dz, y, stats = random(2, 20, *SIZE), random(2, 20, *SIZE), random_stats(20)
    want, sums = batch_norm_reduce(dz, y, stats, mask=True, config=config)
    got, again = batch_norm_reduce(dz, y, stats, mask=True, out=dz, config=config)
    assert got is dz
    assert torch.equal(got, want)
    assert torch.equal(again, sums)


def test_nan_of_the_output_lets_the_gradient_pass():
    dz, z = random(1, 16, 3, 3), random(1, 16, 3, 3)
    z[0, 1, 1, 1] = float("nan")
    g, _ = batch_norm_reduce(dz, None, None, z=z)
    assert torch.equal(g, torch.where(z <= 0, 0.0, dz))
    assert g[0, 1, 1, 1] == dz[0, 1, 1, 1] != 0
    stats = random_stats(16)
    g, _ = batch_norm_reduce(dz, z, stats, mask=True)
    assert g[0, 1, 1, 1] == dz[0, 1, 1, 1]


@pytest.mark.parametrize("gamma_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "count"), [(3, 700), (20, 1), (136, 5)])
def test_coefs(channels, count, gamma_dtype):
    sums, stats = random(2, count, channels), random_stats(channels, 1 / (count * 64))
    coefs, dgamma, dbeta = batch_norm_coefs(sums[0], sums[1], stats, gamma_dtype=gamma_dtype)
    eager, exact = (reference.batch_norm_coefs(sums.to(t).sum(1), stats.to(t)) for t in (torch.float32, torch.float64))
    for row in range(3):
        assert_within_rule(coefs[row], eager[row], exact[row], sums=2)
    for got, value in ((dbeta, sums[0].double().sum(0)), (dgamma, sums[1].double().sum(0) * stats[1].double())):
        assert_within_rule(got, value.to(gamma_dtype), value, sums=4)


@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
def test_coefs_of_constant_statistics(value):
    """They scale the gradient and nothing else, whatever the sums, which overflow where the loss does."""
    stats = random_stats(20, 0)
    coefs, _, _ = batch_norm_coefs(*torch.full((2, 3, 20), value, device=DEVICE), stats)
    assert torch.equal(coefs[0], stats[2])
    assert not coefs[1:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("config", TILES)
def test_backward(channels, config, dtype):
    g, y, y2 = (random(2, channels, *SIZE, dtype=dtype) for _ in range(3))
    coefs, coefs2 = random(3, channels), random(3, channels)
    (want, want2), (exact, exact2) = (
        [reference.batch_norm_gradient(g.to(t), v.to(t), c.to(t)) for v, c in ((y, coefs), (y2, coefs2))]
        for t in (torch.float32, torch.float64)
    )
    dy = batch_norm_backward(g, y, coefs, config=config)
    assert_within_rule(dy, want.to(dtype), exact)
    first, second = batch_norm_backward(g, y, coefs, second=(y2, coefs2), config=config)
    assert torch.equal(first, dy)
    assert_within_rule(second, want2.to(dtype), exact2)
    scaled = batch_norm_backward(g, None, coefs, config=config)
    assert torch.equal(scaled, (g.float() * coefs[0, :, None, None]).to(dtype))
    first, second = batch_norm_backward(g, y, coefs, second=(None, coefs2), config=config)
    assert torch.equal(first, dy)
    assert torch.equal(second, (g.float() * coefs2[0, :, None, None]).to(dtype))
    assert batch_norm_backward(g, y, coefs, out=g, config=config) is g
    assert torch.equal(g, dy)


def test_dtype_of_the_gradient():
    g, y, coefs = random(1, 20, 3, 4), random(1, 20, 3, 4, dtype=torch.float16), random(3, 20)
    dy, dy2 = batch_norm_backward(g, y, coefs, second=(y, coefs))
    assert dy.dtype == dy2.dtype == torch.float16
    assert torch.equal(dy, dy2)
    assert batch_norm_backward(g, None, coefs).dtype == torch.float32
    out = torch.empty_like(g)
    assert torch.equal(batch_norm_backward(g, y, coefs, out=out).half(), dy)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_the_whole_backward_of_batch_norm(mean):
    """Against autograd, gamma negative and zero among them, and the gradient of a ReLU behind it."""
    y, dz = random(2, 20, *SIZE) + mean, random(2, 20, *SIZE)
    gamma, beta = torch.linspace(-1, 1, 20, device=DEVICE), random(20)
    gamma[7] = 0
    stats = batch_norm_stats(channel_moments(y, config=TILES[1]), gamma, beta, EPS)
    z = batch_norm_apply(y, stats)
    g, sums = batch_norm_reduce(dz, y, stats, z=z, config=TILES[1])
    coefs, dgamma, dbeta = batch_norm_coefs(sums[0], sums[1], stats)
    ours = (batch_norm_backward(g, y, coefs), dgamma, dbeta)
    eager, exact = (autograd(y.to(t), gamma.to(t), beta.to(t), g.to(t)) for t in (torch.float32, torch.float64))
    for got, want, value in zip(ours, eager, exact, strict=True):
        assert_within_rule(got, want, value, sums=4)


def autograd(y: Tensor, gamma: Tensor, beta: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in (y, gamma, beta)]
    z = nn.functional.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.0, EPS)
    return torch.autograd.grad(z, leaves, g)


@pytest.mark.parametrize("config", TILES)
def test_reads_only_its_operands_and_writes_only_its_results(config):
    """Channel slices of tensors that are NaN elsewhere give the same bits; nothing around the results changes."""
    dense = [random(2, 20, *SIZE) for _ in range(4)]
    dz, z, y, y2 = (embed(t, float("nan")) for t in dense)
    stats, stats2, coefs = random_stats(20), random_stats(20), random(3, 20)
    for ours, want in zip(channel_moments(y, config=config), channel_moments(dense[2], config=config), strict=True):
        assert torch.equal(ours, want) if isinstance(ours, Tensor) else ours == want

    def apply(y, y2, **residual):
        return batch_norm_apply(y, stats, residual=y2, config=config, **residual)

    assert torch.equal(apply(y, y2, residual_stats=stats2), apply(dense[2], dense[3], residual_stats=stats2))
    narrow = random(2, 10, 2 * SIZE[0], 2 * SIZE[1])
    padded = dict(residual_step=2, residual_before=4)
    assert torch.equal(apply(y, embed(narrow, float("nan")), **padded), apply(dense[2], narrow, **padded))

    want, sums = batch_norm_reduce(dense[0], dense[2], stats, z=dense[1], second=(dense[3], stats2), config=config)
    out = embed(torch.full_like(want, float("nan")), 7.0)
    got, again = batch_norm_reduce(dz, y, stats, z=z, second=(y2, stats2), out=out, config=config)
    assert torch.equal(got, want)
    assert torch.equal(again, sums)
    assert_guard_is_whole(out)

    out = embed(torch.full_like(want, float("nan")), 7.0)
    pair = batch_norm_backward(dz, y, coefs, out=out, second=(y2, coefs), config=config)
    expected = batch_norm_backward(dense[0], dense[2], coefs, second=(dense[3], coefs), config=config)
    assert all(map(torch.equal, pair, expected))
    assert_guard_is_whole(out)


def assert_guard_is_whole(out: Tensor) -> None:
    storage = torch.as_strided(out, (out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
    assert (storage == 7.0).sum() == storage.numel() - out.numel()


@pytest.fixture
def guarded(monkeypatch):
    """Every tensor that the launchers allocate starts as NaN, in the middle of a buffer of sevens."""
    buffers: list[tuple[Tensor, Tensor]] = []

    def allocate(like: Tensor) -> Tensor:
        buffer = torch.full((like.numel() + 128,), 7.0, dtype=like.dtype, device=DEVICE)
        inside = torch.as_strided(buffer, like.shape, like.stride(), 64).fill_(float("nan"))
        buffers.append((buffer, inside))
        return inside

    class Guarded:
        float32 = torch.float32
        channels_last = torch.channels_last

        @staticmethod
        def empty(*size, **options):
            return allocate(torch.empty(*size, **options | {"device": "meta"}))

        @staticmethod
        def empty_like(t, **options):
            return allocate(torch.empty_like(t, **options, device="meta"))

    monkeypatch.setattr(module, "torch", Guarded)
    return buffers


@pytest.mark.parametrize("config", TILES)
@pytest.mark.parametrize("channels", [3, 20, 136])
def test_every_element_is_written_and_none_beside_it(guarded, channels, config):
    dz, y, y2 = (random(2, channels, *SIZE) for _ in range(3))
    moments = channel_moments(y, config=config)
    merge_moments(moments)
    stats = batch_norm_stats(moments, None, None, EPS)
    z = batch_norm_apply(y, stats, residual=y2, config=config)
    g, sums = batch_norm_reduce(dz, y, stats, z=z, second=(y2, stats), config=config)
    coefs, _, _ = batch_norm_coefs(sums[0], sums[1], stats)
    batch_norm_backward(g, y, coefs, second=(y2, coefs), config=config)
    assert len(guarded) == 10
    for buffer, inside in guarded:
        assert not inside.isnan().any()
        assert (buffer[:64] == 7.0).all()
        assert (buffer[-64:] == 7.0).all()


def test_results_repeat_to_the_bit():
    def step() -> list[Tensor]:
        torch.manual_seed(3)
        dz, y = random(2, 136, *SIZE, dtype=torch.float16), random(2, 136, *SIZE, dtype=torch.float16)
        moments = channel_moments(y, config=TILES[1])
        stats = batch_norm_stats(moments, None, None, EPS)
        z = batch_norm_apply(y, stats, residual=dz)
        g, sums = batch_norm_reduce(dz, y, stats, z=z, config=TILES[1])
        coefs = batch_norm_coefs(sums[0], sums[1], stats)
        return [moments.values, merge_moments(moments), stats, z, sums, *coefs, batch_norm_backward(g, y, coefs[0])]

    assert all(map(torch.equal, step(), step()))


def test_offsets_beyond_32_bits():
    """Pixels a gigabyte apart: only the pages that hold them exist."""
    step = 2**30 + 16
    buffer = torch.empty(2 * step + 96, dtype=torch.float16, device=DEVICE)
    far = [torch.as_strided(buffer, (1, 16, 1, 3), (3 * step, 1, 3 * step, step), 16 * i) for i in range(4)]
    near = [random(1, 16, 1, 3, dtype=torch.float16) for _ in far]
    stats, coefs = random_stats(16), random(3, 16)
    tile = TileConfig(16, 16, 1)
    seen = []

    def everything(dz: Tensor, z: Tensor, y: Tensor, out: Tensor) -> list[Tensor]:
        g, sums = batch_norm_reduce(dz, y, stats, z=z, out=out, config=tile)
        g = g.clone()
        batch_norm_backward(dz, y, coefs, out=out, config=tile)
        z = batch_norm_apply(y, stats, residual=dz, config=tile)
        return [g, sums, out.clone(), z, channel_moments(y, config=tile).values]

    for view, dense in zip(far, near, strict=True):
        view.copy_(dense)
    want = everything(*near)
    with observe(seen.append):
        got = everything(*far)
    assert all(call.arguments["INT64"] for call in seen)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("wide", range(4))
def test_the_widest_tensor_decides_on_64_bits(wide):
    def chosen(stride: int) -> list[bool]:
        shape, pixels = (1, 64, 128, 128), 128 * 128
        t = [torch.empty(pixels * (stride if i == wide else 64), dtype=torch.float16, device="meta") for i in range(4)]
        views = [v.as_strided(shape, (v.numel(), 1, v.numel() // 128, v.numel() // pixels)) for v in t]
        stats, seen = torch.empty(5, 64, device="meta"), []
        with dry_run(90), observe(seen.append):
            batch_norm_reduce(views[0], views[1], stats, z=views[2], out=views[3])
            batch_norm_reduce(views[0], views[1], stats, mask=True, second=(views[2], stats), out=views[3])
            batch_norm_backward(views[0], views[1], stats[:3], second=(views[2], stats[:3]), out=views[3])
        return [call.arguments["INT64"] for call in seen]

    assert chosen(64) == [False] * 3
    assert chosen(2**17) == [True] * 3


def test_cost_counts_each_byte_once():
    n, c, hw = 2, 24, 9 * 9
    size = n * c * hw * 2
    seen = []

    def cost() -> tuple[int, int]:
        found = seen.pop().cost()
        assert found.flops == 0
        return found.bytes_read, found.bytes_written

    with dry_run(90), observe(seen.append):
        y, y2, dz = (
            torch.empty(n, c, 9, 9, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
            for _ in range(3)
        )
        moments = channel_moments(y)
        partial = moments.values.nbytes
        assert cost() == (size, partial)
        merge_moments(moments)
        assert cost() == (partial, 8 * c)
        vector, batches = torch.empty(c, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
        running = dict(running_mean=vector, running_var=vector)
        stats = batch_norm_stats(moments, vector, vector, EPS, batches=batches, momentum=0.1, **running)
        assert cost() == (partial + 16 * c + 8, 28 * c + 8)
        batch_norm_stats(None, vector, None, EPS, batches=batches, **running)
        assert cost() == (12 * c, 20 * c)
        batch_norm_apply(y, stats, residual=y2, residual_stats=stats)
        assert cost() == (2 * size + 16 * c, size)
        residual = torch.empty(n, 8, 17, 18, device="meta", memory_format=torch.channels_last)
        batch_norm_apply(y, stats, residual=residual, residual_step=2, residual_before=4)
        assert cost() == (size + 8 * c + n * 8 * hw * 4, size)
        _, sums = batch_norm_reduce(dz, y, stats, z=y2)
        assert cost() == (3 * size + 4 * c, size + sums.nbytes)
        batch_norm_reduce(dz, y, stats, mask=True)
        assert cost() == (2 * size + 12 * c, size + sums.nbytes)
        batch_norm_reduce(dz, y, stats, second=(y2, stats))
        assert cost() == (3 * size + 8 * c, sums.nbytes // 2 * 3)
        coefs, _, _ = batch_norm_coefs(sums[0], sums[1], stats, gamma_dtype=torch.float16)
        assert cost() == (sums.nbytes + 16 * c, 12 * c + 4 * c)
        batch_norm_backward(dz, y, coefs, second=(None, coefs))
        assert cost() == (2 * size + 16 * c, 2 * size)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (lambda t, stats: channel_moments(t.contiguous()), "y must be pixel-linear"),
        (lambda t, stats: batch_norm_apply(t, stats, residual=t.contiguous()), "residual must be pixel-linear"),
        (lambda t, stats: batch_norm_reduce(t, t, stats, z=t.contiguous()), "z must be pixel-linear"),
        (lambda t, stats: batch_norm_reduce(t, t, stats, z=t, out=t.contiguous()), "out must be pixel-linear"),
        (lambda t, stats: batch_norm_backward(t, t, stats[:3], out=t.contiguous()), "out must be pixel-linear"),
        (
            lambda t, stats: batch_norm_apply(t, stats, residual=t[:, :, :4]),
            r"residual must have shape \(1, 16, 5, 4\).* got \(1, 16, 4, 4\)",
        ),
        (
            lambda t, stats: batch_norm_apply(t, stats, residual=t[:, :8], residual_before=9),
            r"with every 1-th pixel from channel 9 on",
        ),
    ],
)
def test_bad_arguments_are_named(launch, message):
    with pytest.raises(ValueError, match=message):
        launch(channels_last(torch.zeros(1, 16, 5, 4)), torch.zeros(5, 16))


def test_no_images():
    y, stats = random(0, 20, 5, 5), random_stats(20)
    assert batch_norm_apply(y, stats).shape == y.shape
    assert batch_norm_backward(y, y, stats[:3]).shape == y.shape


def test_default_config_fills_the_gpu_before_it_widens_the_tiles():
    assert default_config(64 * 56 * 56, 64, 90) == TileConfig(32, 64, 8, num_stages=1)
    assert default_config(7 * 7, 2048, 90).block_k == 1
    assert default_config(1000, 3, 90).block_n == 16
    assert default_config(10, 64, INTERPRETER).block_m == 16
