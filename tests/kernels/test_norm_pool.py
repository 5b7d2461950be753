"""Batch norm, ReLU and max pool in one pass against the fp64 reference: places, ties, what is not finite, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.engine import reference
from resnet_fused.kernels.activation import IDENTITY, RELU
from resnet_fused.kernels.conv_pool import POOL
from resnet_fused.kernels.launch import TileConfig, dry_run, interpreting, observe
from resnet_fused.kernels.norm_backward import batch_norm_reduce, batch_norm_sums
from resnet_fused.kernels.norm_pool import batch_norm_pool, batch_norm_pool_backward
from tests.interpreter import reads_only
from tests.kernels.test_conv_dgrad import _poisoned, random_coefs, random_stats  # noqa: F401
from tests.kernels.test_conv_forward import DEVICE, DTYPES, channels_last, random
from tests.rule import assert_within_rule

TILES = [None, TileConfig(16, 16, 1), TileConfig(32, 64, 1)]
SIZES = [(2, 20, 9, 7), (1, 3, 8, 6), (3, 136, 5, 4), (2, 16, 1, 1), (1, 16, 2, 11), (1, 5, 1, 3)]


def by_the_mask(z: Tensor, place: Tensor) -> Tensor:
    """Places, as far as they count: where the largest value is zero, no gradient passes."""
    return torch.where(z == 0, -1, place)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_pool(shape, dtype):
    y, stats = random(*shape, dtype=dtype), random_stats(shape[1])
    exact, _, _ = reference.batch_norm_pool(y.double(), stats.double())
    eager, peak, place = reference.batch_norm_pool(y.float(), stats)
    for config in TILES:
        z, peaks = batch_norm_pool(y, stats, config=config)
        assert_within_rule(z, eager.to(dtype), exact)
        counts = eager > 0
        assert torch.equal(peaks.y[counts], peak.to(dtype)[counts])
        assert torch.equal(by_the_mask(eager, peaks.place), by_the_mask(eager, place))
        assert z.dtype == peaks.y.dtype == dtype and peaks.place.dtype == torch.int8
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (z, *peaks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1, 0])
def test_the_first_of_equal_values_counts(sign, dtype):
    """As in PyTorch's pool, in evaluation order of the window; and whatever gamma is."""
    torch.manual_seed(0)
    y = channels_last(torch.randint(1, 4, (2, 20, 11, 9), device=DEVICE).to(dtype))
    stats = random_stats(20)
    stats[2:4] = torch.tensor([[sign * 0.5], [9.0]], device=DEVICE)
    z, peaks = batch_norm_pool(y, stats)
    want, index = F.max_pool2d(sign * 0.5 * y.float() + 9, *POOL, return_indices=True)
    assert torch.equal(z.float(), want)
    assert torch.equal(peaks.place, reference.batch_norm_pool(y.float(), stats)[2])
    g = F.max_pool2d(torch.zeros_like(y, dtype=torch.float32), *POOL)
    found = reference.max_pool_gradient(torch.ones_like(g), peaks.place, (11, 9))
    expected = torch.zeros(2, 20, 99, device=DEVICE).scatter_add(2, index.flatten(2), torch.ones_like(g).flatten(2))
    assert torch.equal(found.flatten(2), expected)


@pytest.mark.parametrize("values", [["nan"], ["inf"], ["-inf"], ["nan", "inf"], ["nan", "nan"], ["inf", "-inf"]])
def test_what_is_not_finite_comes_out_as_pytorch_has_it(values):
    y, stats = random(1, 16, 9, 9), random_stats(16)
    stats[2, :8] = -stats[2, :8].abs()
    for i, value in enumerate(values):
        y[0, :, 4 + i, 4 - i] = float(value)
    z, peaks = batch_norm_pool(y, stats)
    want, peak, place = reference.batch_norm_pool(y, stats)
    torch.testing.assert_close(z, want, equal_nan=True)
    assert torch.equal(by_the_mask(want, peaks.place), by_the_mask(want, place))
    counts = ~(want <= 0)
    torch.testing.assert_close(peaks.y[counts], peak[counts], equal_nan=True, rtol=0, atol=0)
    dz, coefs = random(*z.shape), random_coefs(16)
    for frozen in (False, True):
        dy = batch_norm_pool_backward(dz, peaks.place, y, stats, coefs, frozen=frozen)
        torch.testing.assert_close(dy, gradient(dz, place, y, stats, coefs, frozen), equal_nan=True)


def gradient(dz: Tensor, place: Tensor, y: Tensor, stats: Tensor, coefs: Tensor, frozen: bool) -> Tensor:
    g = reference.max_pool_gradient(dz, place, tuple(y.shape[2:]))
    g = torch.where(reference.batch_norm_apply(y, stats, activation=IDENTITY) <= 0, 0.0, g)
    return coefs[0, :, None, None] * g if frozen else reference.batch_norm_gradient(g, y, coefs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_backward(frozen, shape, dtype):
    y, stats, coefs = random(*shape, dtype=dtype), random_stats(shape[1]), random_coefs(shape[1])
    y = torch.where((y.double() * stats[2, :, None, None] + stats[3, :, None, None]).abs() < 1e-5, y + 0.5, y)
    exact, _, place = reference.batch_norm_pool(y.double(), stats.double())
    dz = random(*exact.shape, dtype=dtype)
    expected = gradient(dz.double(), place, y.double(), stats.double(), coefs.double(), frozen)
    eager = gradient(dz.float(), place, y.float(), stats, coefs, frozen).to(dtype)
    for config in TILES:
        place = batch_norm_pool(y, stats, config=config)[1].place
        dy = batch_norm_pool_backward(dz, place, y, stats, coefs, frozen=frozen, config=config)
        assert_within_rule(dy, eager, expected, sums=2)
        assert dy.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_the_peaks_are_those_of_all_pixels(dtype):
    y, stats = random(3, 20, 9, 6, dtype=dtype), random_stats(20)
    z, peaks = batch_norm_pool(y, stats)
    dz = random(*z.shape, dtype=dtype)
    sums = batch_norm_sums(dz, peaks.y, stats)
    _, same = batch_norm_reduce(dz, peaks.y, stats, activation=RELU)
    assert torch.equal(sums, same)
    g = reference.max_pool_gradient(dz.double(), peaks.place, (9, 6))
    g = torch.where(reference.batch_norm_apply(y.double(), stats.double()) > 0, g, 0.0)
    exact = reference.batch_norm_sums(g, y.double(), stats.double())
    torch.testing.assert_close(sums.sum(1).double(), exact, rtol=1e-4, atol=1e-4)


def test_the_reference_is_pytorchs_gradient():
    y = torch.randn(2, 5, 9, 6, dtype=torch.float64, requires_grad=True)
    stats = random_stats(5).double().cpu()
    z, _, place = reference.batch_norm_pool(y, stats)
    dz = torch.randn_like(z)
    (dy,) = torch.autograd.grad(z, y, dz)
    coefs = torch.stack([stats[2], torch.zeros(5), torch.zeros(5)]).double()
    torch.testing.assert_close(dy, gradient(dz, place, y.detach(), stats, coefs, True))


def test_slices_and_no_image():
    y, stats = random(2, 24, 9, 7), random_stats(16)
    cut = y[:, 4:20]
    z, peaks = batch_norm_pool(cut, stats)
    assert torch.equal(z, batch_norm_pool(channels_last(cut), stats)[0])
    dz = random(2, 20, 5, 4)[:, 2:18]
    dy = batch_norm_pool_backward(dz, peaks.place, cut, stats, random_coefs(16))
    assert dy.shape == cut.shape and dy.isfinite().all()
    empty = batch_norm_pool(random(0, 16, 9, 7), stats)[0]
    assert empty.shape == (0, 16, 5, 4)


@pytest.mark.skipif(not interpreting(), reason="a GPU runs the compiled kernels, the interpreter is off")
@pytest.mark.parametrize("shape", SIZES[:2], ids=str)
def test_nothing_beside_the_tensors_is_read(shape):
    y, stats, coefs = random(*shape), random_stats(shape[1]), random_coefs(shape[1])
    with reads_only(y, stats):
        z, peaks = batch_norm_pool(y, stats)
    with reads_only(z, peaks.place, y, stats, coefs):
        batch_norm_pool_backward(z, peaks.place, y, stats, coefs)


def test_errors_name_the_argument():
    y, stats, coefs = random(2, 16, 9, 7), random_stats(16), random_coefs(16)
    z, (_, place) = batch_norm_pool(y, stats)
    with pytest.raises(ValueError, match="y must be pixel-linear"):
        batch_norm_pool(y.contiguous(), stats)
    with pytest.raises(ValueError, match="stats must be contiguous float32"):
        batch_norm_pool(y, stats.double())
    with pytest.raises(ValueError, match=r"dz must have the shape \(2, 16, 5, 4\)"):
        batch_norm_pool_backward(y, place, y, stats, coefs)
    for other in (place.contiguous(), place.int(), place[:1]):
        with pytest.raises(ValueError, match=r"place must be channels_last int8 of the shape of dz"):
            batch_norm_pool_backward(z, other, y, stats, coefs)


def test_bytes_and_offsets():
    """Every tensor once; offsets of 64 bits only where a tensor is that large."""

    def launched(n: int) -> list:
        calls = []
        with dry_run(90), observe(calls.append), torch.device("meta"):
            y = torch.empty(n, 64, 112, 112, dtype=torch.bfloat16, memory_format=torch.channels_last)
            stats, coefs = torch.empty(5, 64), torch.empty(3, 64)
            z, peaks = batch_norm_pool(y, stats)
            sums = batch_norm_sums(z, peaks.y, stats)
            batch_norm_pool_backward(z, peaks.place, y, stats, coefs)
        pooled, full, row = n * 56 * 56 * 64, n * 112 * 112 * 64, 64 * 4
        forward, reduced, backward = (call.cost() for call in calls)
        assert (forward.bytes_read, forward.bytes_written) == (2 * full + 2 * row, 5 * pooled)
        assert (reduced.bytes_read, reduced.bytes_written) == (4 * pooled + 3 * row, sums.nbytes)
        assert (backward.bytes_read, backward.bytes_written) == (3 * pooled + 2 * full + 5 * row, 2 * full)
        return [calls[0].arguments["INT64"], calls[2].arguments["INT64"]]

    assert launched(256) == [False, False]
    assert launched(2700) == [True, True]
