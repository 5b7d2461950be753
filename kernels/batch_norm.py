"""Batch norm around the convolutions: statistics, normalisation with residual and ReLU, and the backward of both.

Every sum over pixels is taken tile by tile, and the tiles are merged in a fixed order: two runs agree to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETER, Cost, Recipe, TileConfig, Vector, target_arch
from .tile import (
    Layout,
    Moments,
    Norm,
    bound,
    cdiv,
    finite,
    layout,
    load_channels,
    pixel_stride,
    relu,
    require_fitting_residual,
    require_pixel_linear,
    rounded_product,
    span,
)

_RUNTIME_SIZES = [
    *("M", "P", "Q", "T", "steps", "rows", "pixels"),
    *("res_h", "res_w", "res_channels", "res_step", "res_before"),
]


@triton.jit
def load_pixels(ptr, offs_m, stride, c, mask):
    """A tile of pixels in fp32."""
    return tl.load(ptr + (offs_m * stride)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_pixels(ptr, offs_m, stride, c, v, mask):
    """Store a tile of pixels, rounded to the tensor's type."""
    tl.store(ptr + (offs_m * stride)[:, None] + c[None, :], v.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def normalise(v, stats_ptr, c, mask_c, C):
    """``scale*v + shift``, in the one fma with which every kernel computes it."""
    scale = load_channels(stats_ptr + 2 * C, c, mask_c)
    shift = load_channels(stats_ptr + 3 * C, c, mask_c)
    return tl.fma(v, scale[None, :], shift[None, :])


@triton.jit
def scale_shift(mean, var, gamma_ptr, beta_ptr, eps, c, mask_c):
    """1/sqrt(var + eps), and the ``scale`` and ``shift`` that batch norm comes to; gamma and beta are optional."""
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    scale = rstd
    if gamma_ptr is not None:
        scale = rstd * load_channels(gamma_ptr, c, mask_c)
    shift = -mean * scale
    if beta_ptr is not None:
        shift += load_channels(beta_ptr, c, mask_c)
    return rstd, scale, shift


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def channel_moments_kernel(
    y_ptr,
    values_ptr,
    M,
    C,
    T,
    steps,
    y_stride,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Mean and sum of squared deviations of steps*BLOCK_M pixels x BLOCK_N channels.

    Each row of the tile keeps a running mean (Welford), and the rows are merged at the end (Chan). All of them count
    from the tile's first pixel, so that a mean far from zero rounds nothing away. A mean that is infinite stays so.
    """
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    pid = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    mean = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    count = tl.zeros((BLOCK_M,), tl.float32)
    first = pid.to(OFFSET) * (steps * BLOCK_M)
    origin = load_channels(y_ptr + first * y_stride, c, mask_c)
    origin = tl.where(finite(origin), origin, 0.0)
    offs_m = first + tl.arange(0, BLOCK_M)
    for i in range(bound(steps)):
        mask_m = offs_m < M
        v = load_pixels(y_ptr, offs_m, y_stride, c, mask_m[:, None] & mask_c[None, :]) - origin[None, :]
        delta = tl.where(mask_m[:, None], v - mean, 0.0)
        count += mask_m.to(tl.float32)
        # Infinity less infinity would be NaN: what comes after it adds to it.
        mean += tl.where(finite(mean), delta * (1.0 / (i + 1)), v)
        m2 += delta * tl.where(mask_m[:, None], v - mean, 0.0)
        offs_m += BLOCK_M
    total = tl.sum(count, 0)
    weighted = rounded_product(mean, tl.broadcast_to(count[:, None], mean.shape))
    pivot = tl.sum(weighted, 0) / total
    spread = mean - pivot[None, :]
    merged = tl.sum(m2 + spread * spread * count[:, None], 0)
    tl.store(values_ptr + pid * C + c, origin + pivot, mask=mask_c)
    tl.store(values_ptr + (T + pid) * C + c, merged, mask=mask_c)


@triton.jit
def tile_counts(counts_ptr, t, T, rows, pixels):
    """Pixels of each tile ``t``, 0 past the last one."""
    if counts_ptr is not None:
        counts = tl.load(counts_ptr + t, mask=t < T, other=0.0)
    else:
        counts = tl.minimum(pixels - t * rows, rows).to(tl.float32)
    return tl.where(t < T, counts, 0.0)


@triton.jit
def merge_tiles(values_ptr, counts_ptr, T, C, rows, pixels, c, mask_c, BLOCK_T: tl.constexpr):
    """Pixels, mean and sum of squared deviations over all tiles, for the channels ``c`` (Chan et al. 1979).

    What a tile without pixels holds does not count. A mean that is infinite stays so.
    """
    pivot = load_channels(values_ptr, c, mask_c)
    pivot = tl.where(finite(pivot), pivot, 0.0)
    weighted = tl.zeros((BLOCK_T, c.shape[0]), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, bound(T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        counts = tile_counts(counts_ptr, t, T, rows, pixels)
        mask = (counts > 0)[:, None] & mask_c[None, :]
        mean = tl.load(values_ptr + t[:, None] * C + c[None, :], mask=mask, other=0.0)
        weighted += counts[:, None] * (mean - pivot[None, :])
        total += counts
    count = tl.sum(total, 0)
    mean_all = pivot + tl.sum(weighted, 0) / count
    spread = tl.zeros((BLOCK_T, c.shape[0]), tl.float32)
    for start in range(0, bound(T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        counts = tile_counts(counts_ptr, t, T, rows, pixels)
        mask = (counts > 0)[:, None] & mask_c[None, :]
        mean = tl.load(values_ptr + t[:, None] * C + c[None, :], mask=mask, other=0.0)
        m2 = tl.load(values_ptr + (T + t)[:, None] * C + c[None, :], mask=mask, other=0.0)
        d = mean - mean_all[None, :]
        spread += m2 + counts[:, None] * d * d
    return count, mean_all, tl.sum(spread, 0)


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def merge_moments_kernel(
    values_ptr, counts_ptr, merged_ptr, T, C, rows, pixels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Mean and sum of squared deviations of all tiles, for BLOCK_N channels."""
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    _, mean, m2 = merge_tiles(values_ptr, counts_ptr, T, C, rows, pixels, c, mask_c, BLOCK_M)
    tl.store(merged_ptr + c, mean, mask=mask_c)
    tl.store(merged_ptr + C + c, m2, mask=mask_c)


@triton.jit(do_not_specialize=[*_RUNTIME_SIZES, "momentum"])
def batch_norm_stats_kernel(
    values_ptr,
    counts_ptr,
    gamma_ptr,
    beta_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    stats_ptr,
    T,
    C,
    rows,
    pixels,
    eps,
    momentum,
    CUMULATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """stats [5, C] of BLOCK_N channels from the batch's moments, and the running statistics' update.

    Without moments, the running statistics are the ones that normalise. CUMULATIVE: they are the average over all
    batches, of which ``batches_ptr`` counts those before; else the first program counts this one.
    """
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    if values_ptr is not None:
        count, mean, m2 = merge_tiles(values_ptr, counts_ptr, T, C, rows, pixels, c, mask_c, BLOCK_M)
        var = m2 / count
        inv_count = tl.zeros_like(mean) + 1.0 / count
        if running_mean_ptr is not None:
            if CUMULATIVE:
                factor = 1.0 / (tl.load(batches_ptr) + 1).to(tl.float32)
            else:
                factor = momentum
            old_mean = load_channels(running_mean_ptr, c, mask_c)
            old_var = load_channels(running_var_ptr, c, mask_c)
            new_mean = factor * mean + (1.0 - factor) * old_mean
            new_var = factor * (m2 / (count - 1.0)) + (1.0 - factor) * old_var
        # Threads that share a value have all read it before one of them stores the new one.
        tl.debug_barrier()
        if running_mean_ptr is not None:
            tl.store(running_mean_ptr + c, new_mean.to(running_mean_ptr.dtype.element_ty), mask=mask_c)
            tl.store(running_var_ptr + c, new_var.to(running_var_ptr.dtype.element_ty), mask=mask_c)
        if batches_ptr is not None:
            if not CUMULATIVE:
                if tl.program_id(0) == 0:
                    batches = tl.load(batches_ptr)
                    tl.debug_barrier()
                    tl.store(batches_ptr, batches + 1)
    else:
        mean = load_channels(running_mean_ptr, c, mask_c)
        var = load_channels(running_var_ptr, c, mask_c)
        inv_count = tl.zeros_like(mean)
    rstd, scale, shift = scale_shift(mean, var, gamma_ptr, beta_ptr, eps, c, mask_c)
    tl.store(stats_ptr + c, mean, mask=mask_c)
    tl.store(stats_ptr + C + c, rstd, mask=mask_c)
    tl.store(stats_ptr + 2 * C + c, scale, mask=mask_c)
    tl.store(stats_ptr + 3 * C + c, shift, mask=mask_c)
    tl.store(stats_ptr + 4 * C + c, inv_count, mask=mask_c)


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def batch_norm_apply_kernel(
    y_ptr,
    stats_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    res_ptr,
    res_stats_ptr,
    z_ptr,
    M,
    C,
    P,
    Q,
    y_stride,
    res_stride,
    res_h,
    res_w,
    res_channels,
    res_step,
    res_before,
    eps,
    RES_PADDED: tl.constexpr,
    RELU: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``z = relu(scale*y + shift + residual)`` for BLOCK_M pixels x BLOCK_N channels; the residual may be raw too.

    Without stats, scale and shift come from fixed statistics: mean, var, gamma and beta.
    """
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    offs_m = tl.program_id(0).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    v = load_pixels(y_ptr, offs_m, y_stride, c, mask)
    if stats_ptr is not None:
        v = normalise(v, stats_ptr, c, mask_c, C)
    else:
        mean = load_channels(mean_ptr, c, mask_c)
        var = load_channels(var_ptr, c, mask_c)
        _, scale, shift = scale_shift(mean, var, gamma_ptr, beta_ptr, eps, c, mask_c)
        v = tl.fma(v, scale[None, :], shift[None, :])
    if res_ptr is not None:
        if RES_PADDED:
            pixel = (offs_m // (P * Q) * res_h + offs_m // Q % P * res_step) * res_w + offs_m % Q * res_step
            res_c = c - res_before
            res_mask = mask & ((res_c >= 0) & (res_c < res_channels))[None, :]
            res = load_pixels(res_ptr, pixel, res_stride, res_c, res_mask)
        else:
            res = load_pixels(res_ptr, offs_m, res_stride, c, mask)
        if res_stats_ptr is not None:
            res = normalise(res, res_stats_ptr, c, mask_c, C)
        v += res
    if RELU:
        v = relu(v)
    store_pixels(z_ptr, offs_m, C, c, v, mask)


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def batch_norm_reduce_kernel(
    dz_ptr,
    z_ptr,
    y_ptr,
    stats_ptr,
    y2_ptr,
    stats2_ptr,
    g_ptr,
    sums_ptr,
    M,
    C,
    T,
    steps,
    dz_stride,
    z_stride,
    y_stride,
    y2_stride,
    g_stride,
    MASK: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``g = dz`` where the ReLU let pass, and its sums over steps*BLOCK_M pixels x BLOCK_N channels.

    The sums: of g, of ``g*(y - mean)`` and of ``g*(y2 - mean2)``. MASK: the ReLU's input is ``scale*y + shift``.
    """
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    pid = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    sum_g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_gy = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_gy2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_m = pid.to(OFFSET) * (steps * BLOCK_M) + tl.arange(0, BLOCK_M)
    for _ in range(bound(steps)):
        mask = (offs_m < M)[:, None] & mask_c[None, :]
        g = load_pixels(dz_ptr, offs_m, dz_stride, c, mask)
        if z_ptr is not None:
            g = tl.where(load_pixels(z_ptr, offs_m, z_stride, c, mask) <= 0, 0.0, g)
        if y_ptr is not None:
            y = load_pixels(y_ptr, offs_m, y_stride, c, mask)
            if MASK:
                g = tl.where(normalise(y, stats_ptr, c, mask_c, C) <= 0, 0.0, g)
            sum_gy += g * (y - load_channels(stats_ptr, c, mask_c)[None, :])
        if y2_ptr is not None:
            y2 = load_pixels(y2_ptr, offs_m, y2_stride, c, mask)
            sum_gy2 += g * (y2 - load_channels(stats2_ptr, c, mask_c)[None, :])
        sum_g += g
        if g_ptr is not None:
            store_pixels(g_ptr, offs_m, g_stride, c, g, mask)
        offs_m += BLOCK_M
    tl.store(sums_ptr + pid * C + c, tl.sum(sum_g, 0), mask=mask_c)
    tl.store(sums_ptr + (T + pid) * C + c, tl.sum(sum_gy, 0), mask=mask_c)
    if y2_ptr is not None:
        tl.store(sums_ptr + (2 * T + pid) * C + c, tl.sum(sum_gy2, 0), mask=mask_c)


@triton.jit
def add_tiles(ptr, T, C, c, mask_c, BLOCK_T: tl.constexpr):
    """The sum over all T tiles, in a fixed order."""
    acc = tl.zeros((BLOCK_T, c.shape[0]), tl.float32)
    for start in range(0, bound(T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        acc += tl.load(ptr + t[:, None] * C + c[None, :], mask=(t < T)[:, None] & mask_c[None, :], other=0.0)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def merge_sums_kernel(sums_ptr, merged_ptr, T, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One row of sums over all tiles, for BLOCK_N channels."""
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1)
    mask_c = c < C
    tl.store(merged_ptr + row * C + c, add_tiles(sums_ptr + row * T * C, T, C, c, mask_c, BLOCK_M), mask=mask_c)


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def batch_norm_coefs_kernel(
    sum_g_ptr,
    sum_gy_ptr,
    stats_ptr,
    coefs_ptr,
    dgamma_ptr,
    dbeta_ptr,
    T,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dgamma, dbeta and the vectors of ``dy = A*g + B*y + C`` for BLOCK_N channels."""
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    dbeta = add_tiles(sum_g_ptr, T, C, c, mask_c, BLOCK_M)
    sum_gy = add_tiles(sum_gy_ptr, T, C, c, mask_c, BLOCK_M)
    mean = load_channels(stats_ptr, c, mask_c)
    rstd = load_channels(stats_ptr + C, c, mask_c)
    scale = load_channels(stats_ptr + 2 * C, c, mask_c)
    inv_count = load_channels(stats_ptr + 4 * C, c, mask_c)
    # Zero times infinity would spoil the constants of evaluation mode.
    used = inv_count > 0
    # In fp64, since the cube of rstd leaves the range of fp32 where the product does not.
    step = -scale.to(tl.float64) * inv_count.to(tl.float64)
    b = tl.where(used, step * rstd.to(tl.float64) * rstd.to(tl.float64) * sum_gy.to(tl.float64), 0.0)
    constant = tl.where(used, step * dbeta.to(tl.float64) - b * mean.to(tl.float64), 0.0)
    tl.store(coefs_ptr + c, scale, mask=mask_c)
    tl.store(coefs_ptr + C + c, b.to(tl.float32), mask=mask_c)
    tl.store(coefs_ptr + 2 * C + c, constant.to(tl.float32), mask=mask_c)
    tl.store(dgamma_ptr + c, (rstd * sum_gy).to(dgamma_ptr.dtype.element_ty), mask=mask_c)
    tl.store(dbeta_ptr + c, dbeta.to(dbeta_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def gradient(g, y_ptr, y_stride, coefs_ptr, offs_m, c, mask, mask_c, C):
    """``A*g + B*y + C`` for one tile."""
    dy = g * load_channels(coefs_ptr, c, mask_c)[None, :]
    if y_ptr is not None:
        b = load_channels(coefs_ptr + C, c, mask_c)
        constant = load_channels(coefs_ptr + 2 * C, c, mask_c)
        dy += tl.fma(load_pixels(y_ptr, offs_m, y_stride, c, mask), b[None, :], constant[None, :])
    return dy


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
def batch_norm_backward_kernel(
    g_ptr,
    y_ptr,
    coefs_ptr,
    y2_ptr,
    coefs2_ptr,
    dy_ptr,
    dy2_ptr,
    M,
    C,
    g_stride,
    y_stride,
    y2_stride,
    dy_stride,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dy = A*g + B*y + C`` for BLOCK_M pixels x BLOCK_N channels; twice from one g if there is a second norm."""
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    offs_m = tl.program_id(0).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    g = load_pixels(g_ptr, offs_m, g_stride, c, mask)
    dy = gradient(g, y_ptr, y_stride, coefs_ptr, offs_m, c, mask, mask_c, C)
    if dy2_ptr is not None:
        dy2 = gradient(g, y2_ptr, y2_stride, coefs2_ptr, offs_m, c, mask, mask_c, C)
        store_pixels(dy2_ptr, offs_m, C, c, dy2, mask)
    store_pixels(dy_ptr, offs_m, dy_stride, c, dy, mask)


@lru_cache(maxsize=4096)
def default_config(pixels: int, channels: int, arch: int) -> TileConfig:
    """The tile of the kernels that pass over pixels: block_m pixels x block_n channels, ``block_k`` such steps."""
    block_n = min(64, max(16, triton.next_power_of_2(channels)))
    if arch == INTERPRETER:
        return TileConfig(min(max(16, triton.next_power_of_2(pixels)), 512), block_n, 2)
    steps = 16
    while steps > 1 and cdiv(pixels, 16 * steps) * cdiv(channels, block_n) < 4 * 132:
        steps //= 2
    return TileConfig(1024 // block_n, block_n, steps, num_stages=1)


_FP32 = (torch.float32,)
_VECTOR = torch.float32.itemsize
"""Bytes that a channel takes in one row of stats or coefs."""
_MERGE = TileConfig(256, 8, 1, num_stages=1)
"""Tiles and channels that a program merges at a time."""


def channel_moments(y: Tensor, *, config: TileConfig | None = None) -> Moments:
    """Mean and sum of squared deviations of ``y`` [N, C, P, Q] (pixel-linear), tile by tile."""
    recipe = _moments_recipe(layout(y), target_arch(), config)
    tiles, channels = recipe.scalars["T"], recipe.scalars["C"]
    values = torch.empty(2, tiles, channels, dtype=torch.float32, device=y.device)
    recipe.run(y_ptr=y, values_ptr=values)
    return Moments(values, recipe.config.block_m * recipe.config.block_k, recipe.scalars["M"])


@lru_cache(maxsize=4096)
def _moments_recipe(y: Layout, arch: int, config: TileConfig | None) -> Recipe:
    require_pixel_linear(y=y)
    pixels, channels = _sizes(y)
    tile = config or default_config(pixels, channels, arch)
    tiles = cdiv(pixels, tile.block_m * tile.block_k)
    scalars = {
        "M": pixels,
        "C": channels,
        "T": tiles,
        "y_stride": pixel_stride(y),
        "INT64": _wide(tile, y),
        "steps": tile.block_k,
    }
    return _pass_over(channel_moments_kernel, tiles, scalars, tile, ["y_ptr"], ["values_ptr"], {})


def merge_moments(moments: Moments) -> Tensor:
    """Mean and sum of squared deviations of all tiles together, fp32 [2, C]."""
    _, tiles, channels = moments.values.shape
    merged = moments.values.new_empty(2, channels)
    recipe = _merge_moments_recipe(channels, tiles, moments.rows, moments.pixels)
    recipe.run(values_ptr=moments.values, counts_ptr=moments.counts, merged_ptr=merged)
    return merged


@lru_cache(maxsize=4096)
def _merge_moments_recipe(channels: int, tiles: int, rows: int, pixels: int) -> Recipe:
    scalars = {"T": tiles, "C": channels, "rows": rows, "pixels": pixels}
    vectors = _moments_vectors(channels, tiles)
    return _merge(merge_moments_kernel, scalars, ["values_ptr", "counts_ptr"], ["merged_ptr"], vectors)


def _moments_vectors(channels: int, tiles: int) -> dict[str, Vector]:
    return {
        "values_ptr": Vector("moments.values", (2, tiles, channels), _FP32),
        "counts_ptr": Vector("moments.counts", (tiles,), _FP32),
    }


def batch_norm_stats(
    moments: Moments | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    batches: Tensor | None = None,
    momentum: float | None = None,
) -> Tensor:
    """What batch norm does to each channel: stats, fp32 [5, C] (see the glossary).

    ``moments``: of the batch, whose biased variance normalises; the running statistics [C], if given, are updated in
    place with the unbiased one, by ``momentum`` or (None) to the average over all ``batches``, an int64 scalar that is
    incremented; without either they stay. Without ``moments`` the running statistics normalise, and nothing is updated.

    Raises ValueError, before anything is updated, for vectors that are not contiguous or not of C channels.
    """
    like = running_mean if moments is None else moments.values
    if like is None or (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or neither and moments; got one or nothing")
    channels = like.shape[-1]
    values, rows, pixels, counts = moments or (None, 0, 0, None)
    sizes = (channels, 0 if values is None else values.shape[1], rows, pixels)
    cumulative = moments is not None and momentum is None and batches is not None
    stats = torch.empty(5, channels, dtype=torch.float32, device=like.device)
    _stats_recipe(*sizes, eps, 0.0 if momentum is None else momentum, cumulative).run(
        values_ptr=values,
        counts_ptr=counts,
        gamma_ptr=gamma,
        beta_ptr=beta,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        batches_ptr=None if moments is None else batches,
        stats_ptr=stats,
    )
    if cumulative:
        batches += 1
    return stats


@lru_cache(maxsize=4096)
def _stats_recipe(
    channels: int, tiles: int, rows: int, pixels: int, eps: float, momentum: float, cumulative: bool
) -> Recipe:
    scalars = {
        "T": tiles,
        "C": channels,
        "rows": rows,
        "pixels": pixels,
        "eps": eps,
        "momentum": momentum,
        "CUMULATIVE": cumulative,
    }
    read = ["values_ptr", "counts_ptr", "gamma_ptr", "beta_ptr", "running_mean_ptr", "running_var_ptr", "batches_ptr"]
    written = ["stats_ptr"]
    if tiles:
        written += ["running_mean_ptr", "running_var_ptr"] + ([] if cumulative else ["batches_ptr"])
    names = ("gamma", "beta", "running_mean", "running_var")
    vectors = {f"{name}_ptr": Vector(name, (channels,)) for name in names}
    vectors["batches_ptr"] = Vector("batches", (), (torch.int64,))
    return _merge(batch_norm_stats_kernel, scalars, read, written, vectors | _moments_vectors(channels, tiles))


def batch_norm_apply(
    y: Tensor,
    stats: Tensor | Norm,
    *,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    residual_step: int = 1,
    residual_before: int = 0,
    relu: bool = True,
    out_dtype: torch.dtype | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """``relu(scale*y + shift + residual)`` for ``y`` [N, C, P, Q]; one read of each tensor and one write.

    ``stats``: as :func:`batch_norm_stats` returns them, or the fixed statistics that it would take them from.
    ``residual``: of the same shape, normalised by ``residual_stats`` if given; or, with a ``residual_step`` above 1 or
    fewer channels, every ``residual_step``-th pixel of it is added to the channels from ``residual_before`` on.

    Returns [N, C, P, Q], channels_last, of ``out_dtype`` (that of ``y`` if not given). Raises ValueError for tensors
    that are not pixel-linear or do not fit.
    """
    dtype = y.dtype if out_dtype is None else out_dtype
    if residual_stats is not None and (residual is None or residual.shape != y.shape):
        raise ValueError("residual_stats need a residual of the shape of y")
    fixed = stats if isinstance(stats, Norm) else None
    mean, var, gamma, beta, eps = fixed or (None, None, None, None, 0.0)
    rows = (0 if fixed else 2) + (0 if residual_stats is None else 2)
    added = layout(residual), residual_step, residual_before
    recipe = _apply_recipe(layout(y), *added, rows, eps, relu, target_arch(), config)
    z = torch.empty(y.shape, dtype=dtype, device=y.device, memory_format=torch.channels_last)
    recipe.run(
        y_ptr=y,
        stats_ptr=None if fixed else stats,
        mean_ptr=mean,
        var_ptr=var,
        gamma_ptr=gamma,
        beta_ptr=beta,
        res_ptr=residual,
        res_stats_ptr=residual_stats,
        z_ptr=z,
    )
    return z


@lru_cache(maxsize=4096)
def _apply_recipe(
    y: Layout,
    residual: Layout | None,
    step: int,
    before: int,
    rows: int,
    eps: float,
    relu: bool,
    arch: int,
    config: TileConfig | None,
) -> Recipe:
    """``rows``: how many of stats are read."""
    require_pixel_linear(y=y, residual=residual)
    pixels, channels = _sizes(y)
    _, _, p, q = y.shape
    if residual is not None:
        require_fitting_residual(residual, y.shape, step, before)
    tile = config or default_config(pixels, channels, arch)
    res_channels, res_h, res_w = (0, 0, 0) if residual is None else residual.shape[1:]
    scalars = {
        "M": pixels,
        "C": channels,
        "P": p,
        "Q": q,
        "y_stride": pixel_stride(y),
        "res_stride": 0 if residual is None else pixel_stride(residual),
        "res_h": res_h,
        "res_w": res_w,
        "res_channels": res_channels,
        "res_step": step,
        "res_before": before,
        "eps": eps,
        "RES_PADDED": residual is not None and residual.shape != y.shape,
        "RELU": relu,
        "INT64": _wide(tile, y, residual),
    }
    # Of a padded residual, the pixels that are added.
    more = 0 if residual is None else pixels * res_channels * residual.dtype.itemsize
    more += _VECTOR * channels * rows
    read = ["y_ptr", "mean_ptr", "var_ptr", "gamma_ptr", "beta_ptr"]
    vectors = {
        "stats_ptr": Vector("stats", (5, channels), _FP32),
        "res_stats_ptr": Vector("residual_stats", (5, channels), _FP32),
        **{f"{name}_ptr": Vector(f"stats.{name}", (channels,)) for name in ("mean", "var", "gamma", "beta")},
    }
    tiles = cdiv(pixels, tile.block_m)
    return _pass_over(batch_norm_apply_kernel, tiles, scalars, tile, read, ["z_ptr"], vectors, more)


def batch_norm_reduce(
    dz: Tensor,
    y: Tensor | None,
    stats: Tensor | None,
    *,
    z: Tensor | None = None,
    mask: bool = False,
    second: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient ``g`` in front of a ReLU from that behind it, ``dz`` [N, C, P, Q], and its sums.

    The ReLU's output is ``z``, or its input ``scale*y + shift`` if ``mask``; with neither there is no ReLU and g is
    ``dz`` itself. ``second``: y and stats of a second batch norm in front of the same ReLU. ``out``: a pixel-linear
    tensor that g goes to; ``dz`` itself will do.

    Returns g and fp32 [2 or 3, T, C]: tile by tile ``sum g``, ``sum g*(y - mean)`` (0 without ``y``), and the second's.
    """
    y2, stats2 = second or (None, None)
    if (y is None) != (stats is None) or (mask and (y is None or z is not None)):
        raise ValueError("y and stats must be given together, and with mask, without z")
    masked = z is not None or mask
    inputs = map(layout, (dz, y, z, y2, out if masked else None))
    recipe = _reduce_recipe(*inputs, mask, target_arch(), config)
    tiles, channels = recipe.scalars["T"], recipe.scalars["C"]
    if masked and out is None:
        out = torch.empty(dz.shape, dtype=dz.dtype, device=dz.device, memory_format=torch.channels_last)
    g = out if masked else None
    sums = torch.empty(2 if second is None else 3, tiles, channels, dtype=torch.float32, device=dz.device)
    recipe.run(dz_ptr=dz, z_ptr=z, y_ptr=y, stats_ptr=stats, y2_ptr=y2, stats2_ptr=stats2, g_ptr=g, sums_ptr=sums)
    return dz if g is None else g, sums


@lru_cache(maxsize=4096)
def _reduce_recipe(
    dz: Layout,
    y: Layout | None,
    z: Layout | None,
    y2: Layout | None,
    out: Layout | None,
    mask: bool,
    arch: int,
    config: TileConfig | None,
) -> Recipe:
    _require_alike(dz=dz, y=y, z=z, y2=y2, out=out)
    pixels, channels = _sizes(dz)
    # In 16 bits, with one batch norm, 64 registers are enough: the compiler would spill to do with fewer.
    registers = 64 if y2 is None and dz.dtype.itemsize == 2 else None
    tile = config or replace(default_config(pixels, channels, arch), max_registers=registers)
    tiles = cdiv(pixels, tile.block_m * tile.block_k)
    g_stride = 0
    if z is not None or mask:
        g_stride = channels if out is None else pixel_stride(out)
    scalars = {
        "M": pixels,
        "C": channels,
        "T": tiles,
        "dz_stride": pixel_stride(dz),
        "z_stride": 0 if z is None else pixel_stride(z),
        "y_stride": 0 if y is None else pixel_stride(y),
        "y2_stride": 0 if y2 is None else pixel_stride(y2),
        "g_stride": g_stride,
        "MASK": mask,
        "INT64": _wide(tile, dz, z, y, y2, out),
        "steps": tile.block_k,
    }
    more = _VECTOR * channels * ((y is not None) * (3 if mask else 1) + (y2 is not None))
    read, written = ["dz_ptr", "z_ptr", "y_ptr", "y2_ptr"], ["sums_ptr", "g_ptr"]
    vectors = {
        "stats_ptr": Vector("stats", (5, channels), _FP32),
        "stats2_ptr": Vector("second[1]", (5, channels), _FP32),
    }
    return _pass_over(batch_norm_reduce_kernel, tiles, scalars, tile, read, written, vectors, more)


def merge_sums(sums: Tensor) -> Tensor:
    """Sums [K, T, C] over all tiles: fp32 [K, C]."""
    rows, tiles, channels = sums.shape
    merged = sums.new_empty(rows, channels)
    _merge_sums_recipe(rows, tiles, channels).run(sums_ptr=sums, merged_ptr=merged)
    return merged


@lru_cache(maxsize=4096)
def _merge_sums_recipe(rows: int, tiles: int, channels: int) -> Recipe:
    vectors = {"sums_ptr": Vector("sums", (rows, tiles, channels), _FP32)}
    return _merge(merge_sums_kernel, {"T": tiles, "C": channels}, ["sums_ptr"], ["merged_ptr"], vectors, rows=rows)


def batch_norm_coefs(
    sum_g: Tensor, sum_gy: Tensor, stats: Tensor, *, gamma_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """coefs, fp32 [3, C], and the gradients of gamma and beta [C] in ``gamma_dtype``, from the sums [T, C] of a batch.

    Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.
    """
    tiles, channels = sum_g.shape
    coefs = torch.empty(3, channels, dtype=torch.float32, device=stats.device)
    dgamma, dbeta = (torch.empty(channels, dtype=gamma_dtype, device=stats.device) for _ in range(2))
    _coefs_recipe(tiles, channels).run(
        sum_g_ptr=sum_g, sum_gy_ptr=sum_gy, stats_ptr=stats, coefs_ptr=coefs, dgamma_ptr=dgamma, dbeta_ptr=dbeta
    )
    return coefs, dgamma, dbeta


@lru_cache(maxsize=4096)
def _coefs_recipe(tiles: int, channels: int) -> Recipe:
    more = _VECTOR * channels * 4  # The shift is the one row of stats that nothing depends on.
    read, written = ["sum_g_ptr", "sum_gy_ptr"], ["coefs_ptr", "dgamma_ptr", "dbeta_ptr"]
    sums = {f"{name}_ptr": Vector(name, (tiles, channels), _FP32) for name in ("sum_g", "sum_gy")}
    vectors = sums | {"stats_ptr": Vector("stats", (5, channels), _FP32)}
    return _merge(batch_norm_coefs_kernel, {"T": tiles, "C": channels}, read, written, vectors, more)


def batch_norm_backward(
    g: Tensor,
    y: Tensor | None,
    coefs: Tensor,
    *,
    out: Tensor | None = None,
    second: tuple[Tensor | None, Tensor] | None = None,
    config: TileConfig | None = None,
) -> Any:
    """``dy = A*g + B*y + C`` [N, C, P, Q]; ``y`` None where B and C are zero. ``out`` may be ``g`` itself.

    Without ``out``, dy has the dtype of ``y``, or of ``g`` if there is none. ``second``: y and coefs of another batch
    norm that the same g goes into; then the result is a pair, and the second is a new tensor of the same dtype.
    """
    y2, coefs2 = second or (None, None)
    recipe = _backward_recipe(*map(layout, (g, y, y2, out)), second is not None, target_arch(), config)
    dy = torch.empty_like(g if y is None else y, memory_format=torch.channels_last) if out is None else out
    dy2 = None if second is None else torch.empty_like(dy, memory_format=torch.channels_last)
    recipe.run(g_ptr=g, y_ptr=y, coefs_ptr=coefs, y2_ptr=y2, coefs2_ptr=coefs2, dy_ptr=dy, dy2_ptr=dy2)
    return dy if dy2 is None else (dy, dy2)


@lru_cache(maxsize=4096)
def _backward_recipe(
    g: Layout,
    y: Layout | None,
    y2: Layout | None,
    out: Layout | None,
    twice: bool,
    arch: int,
    config: TileConfig | None,
) -> Recipe:
    _require_alike(g=g, y=y, y2=y2, out=out)
    pixels, channels = _sizes(g)
    tile = config or default_config(pixels, channels, arch)
    scalars = {
        "M": pixels,
        "C": channels,
        "g_stride": pixel_stride(g),
        "y_stride": 0 if y is None else pixel_stride(y),
        "y2_stride": 0 if y2 is None else pixel_stride(y2),
        "dy_stride": channels if out is None else pixel_stride(out),
        "INT64": _wide(tile, g, y, y2, out),
    }
    more = (1 if y is None else 3) + (0 if not twice else 1 if y2 is None else 3)
    read, written = ["g_ptr", "y_ptr", "y2_ptr"], ["dy_ptr", "dy2_ptr"]
    tiles = cdiv(pixels, tile.block_m)
    vectors = {
        "coefs_ptr": Vector("coefs", (3, channels), _FP32),
        "coefs2_ptr": Vector("second[1]", (3, channels), _FP32),
    }
    more *= _VECTOR * channels
    return _pass_over(batch_norm_backward_kernel, tiles, scalars, tile, read, written, vectors, more)


def _require_alike(**layouts: Layout | None) -> None:
    """Raise ValueError for the first tensor that is not pixel-linear, or not of the shape of the first of them all."""
    require_pixel_linear(**layouts)
    (first, like), *others = layouts.items()
    assert like is not None
    for name, x in others:
        if x is not None and x.shape != like.shape:
            raise ValueError(f"{name} must have the shape of {first}, {tuple(like.shape)}; got {tuple(x.shape)}")


def _sizes(y: Layout) -> tuple[int, int]:
    n, c, p, q = y.shape
    return n * p * q, c


def _wide(tile: TileConfig, *tensors: Layout | None) -> bool:
    """Whether offsets may pass 2^31, those of pixels past the last one of a tile too."""
    past = tile.block_m * tile.block_k
    return max(span(t) + past * (pixel_stride(t) or 0) for t in tensors if t is not None) >= 2**31


def _pass_over(
    kernel: Any,
    tiles: int,
    scalars: dict[str, Any],
    tile: TileConfig,
    read: list[str],
    written: list[str],
    vectors: dict[str, Vector],
    more: int = 0,
) -> Recipe:
    """For a kernel over ``tiles`` of pixels and blocks of channels; read and written: see :func:`_cost`."""
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    grid = (tiles, cdiv(scalars["C"], tile.block_n))
    return Recipe(kernel, grid, scalars | blocks, tile, partial(_cost, read, written, more), vectors)


def _merge(
    kernel: Any,
    scalars: dict[str, Any],
    read: list[str],
    written: list[str],
    vectors: dict[str, Vector],
    more: int = 0,
    rows: int = 1,
) -> Recipe:
    """For a kernel that merges the tiles, by blocks of channels, of ``rows`` of sums."""
    blocks = {"BLOCK_M": _MERGE.block_m, "BLOCK_N": _MERGE.block_n}
    grid = (cdiv(scalars["C"], _MERGE.block_n), rows)
    return Recipe(kernel, grid, scalars | blocks, _MERGE, partial(_cost, read, written, more), vectors)


def _cost(read: list[str], written: list[str], more: int, tensors: Mapping[str, Tensor | None]) -> Cost:
    """Of tensors that are ``read`` and ``written`` whole, by name, and ``more`` bytes that are read."""
    read_bytes, written_bytes = (
        sum(t.nbytes for t in map(tensors.__getitem__, names) if t is not None) for names in (read, written)
    )
    return Cost(0, read_bytes + more, written_bytes)
