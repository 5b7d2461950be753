"""Batch norm around the convolutions: moments, statistics, and normalisation with residual and ReLU.

Every sum over pixels is taken tile by tile, and the tiles are merged in a fixed order: two runs agree to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import RELU, Activation, activate
from .epilogue import WHOLE, Added, Moments, Norm, Residual, added, load_residual, normalise, scale_shift
from .gpus import gpu_of
from .launch import INTERPRETER, KEPT_LAYOUTS, Cost, Recipe, TileConfig, Vector, target_arch
from .memory import Layout, cdiv, empty_channels_last, layout, require_pixel_linear, span, stride_of
from .tile import (
    Pixels,
    Tile,
    bound,
    finite,
    first_and_end,
    load_channels,
    load_pixels,
    rounded_product,
    store_pixels,
)

RUNTIME_SIZES = ["M", "P", "Q", "T", "steps", "rows", "span"]
"""Sizes that the compiled code does not depend on. ``span``: pixels that no tile crosses, of an image or of all."""


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def channel_moments_kernel(
    y_ptr,
    values_ptr,
    C,
    T,
    span,
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
    first, end = first_and_end(pid, span, steps * BLOCK_M, OFFSET)
    origin = load_channels(y_ptr + first * y_stride, c, mask_c)
    origin = tl.where(finite(origin), origin, 0.0)
    offs_m = first + tl.arange(0, BLOCK_M)
    for i in range(bound(steps)):
        mask_m = offs_m < end
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
def tile_counts(counts_ptr, t, T, rows, span):
    """Pixels of each tile ``t``, 0 past the last one."""
    if counts_ptr is not None:
        counts = tl.load(counts_ptr + t, mask=t < T, other=0.0)
    else:
        counts = tl.minimum(span - t % tl.cdiv(span, rows) * rows, rows).to(tl.float32)
    return tl.where(t < T, counts, 0.0)


@triton.jit
def merge_tiles(values_ptr, counts_ptr, T, C, rows, span, c, mask_c, BLOCK_T: tl.constexpr):
    """Pixels, mean and sum of squared deviations over all tiles, for the channels ``c`` (Chan et al. 1979).

    Each of BLOCK_T rows merges every BLOCK_T-th tile into what it has, and the rows are merged at the end. What a tile
    without pixels holds does not count. A mean that is infinite stays so.
    """
    pivot = load_channels(values_ptr, c, mask_c)
    pivot = tl.where(finite(pivot), pivot, 0.0)
    mean = tl.zeros((BLOCK_T, c.shape[0]), tl.float32)
    m2 = tl.zeros((BLOCK_T, c.shape[0]), tl.float32)
    count = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, bound(T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        counts = tile_counts(counts_ptr, t, T, rows, span)
        mask = (counts > 0)[:, None] & mask_c[None, :]
        v = tl.load(values_ptr + t[:, None] * C + c[None, :], mask=mask, other=0.0) - pivot[None, :]
        within = tl.load(values_ptr + (T + t)[:, None] * C + c[None, :], mask=mask, other=0.0)
        count += counts
        delta = tl.where(mask, v - mean, 0.0)
        # Infinity less infinity would be NaN: what comes after it adds to it.
        mean += tl.where(finite(mean), delta * (counts / tl.maximum(count, 1.0))[:, None], v)
        m2 += within + delta * tl.where(mask, v - mean, 0.0) * counts[:, None]
    total = tl.sum(count, 0)
    weights = tl.broadcast_to(count[:, None], mean.shape)
    center = tl.sum(rounded_product(mean, weights), 0) / total
    spread = mean - center[None, :]
    return total, pivot + center, tl.sum(m2 + rounded_product(spread * spread, weights), 0)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def merge_moments_kernel(
    values_ptr, counts_ptr, merged_ptr, T, C, rows, span, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Mean and sum of squared deviations of all tiles, for BLOCK_N channels."""
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    _, mean, m2 = merge_tiles(values_ptr, counts_ptr, T, C, rows, span, c, mask_c, BLOCK_M)
    tl.store(merged_ptr + c, mean, mask=mask_c)
    tl.store(merged_ptr + C + c, m2, mask=mask_c)


@triton.jit(do_not_specialize=[*RUNTIME_SIZES, "momentum"])
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
    span,
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
        count, mean, m2 = merge_tiles(values_ptr, counts_ptr, T, C, rows, span, c, mask_c, BLOCK_M)
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


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def batch_norm_apply_kernel(
    y_ptr,
    stats_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    gate_ptr,
    res_ptr,
    res_stats_ptr,
    z_ptr,
    M,
    C,
    P,
    Q,
    y_stride,
    res_stride,
    crop,
    eps,
    RES_PADDED: tl.constexpr,
    ACT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``z = act((scale*y + shift)*gate + residual)`` for BLOCK_M pixels x BLOCK_N channels; gate and residual optional.

    The gate has a number for each image and channel; the residual may be raw too. Without stats, scale and shift come
    from fixed statistics: mean, var, gamma and beta.
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
    if gate_ptr is not None:
        v *= load_pixels(gate_ptr, offs_m // (P * Q), C, c, mask)
    if res_ptr is not None:
        tile = Tile(offs_m, c, offs_m < M, mask_c)
        res = load_residual(Pixels(res_ptr, res_stride), crop, tile, P, Q, RES_PADDED)
        if res_stats_ptr is not None:
            res = normalise(res, res_stats_ptr, c, mask_c, C)
        v += res
    store_pixels(z_ptr, offs_m, C, c, activate(v, ACT), mask)


PROGRAMS = 4
"""Of a pass over pixels, how many a multiprocessor is to have: their loads hide each other's latency."""


@lru_cache(maxsize=KEPT_LAYOUTS)
def default_config(pixels: int, channels: int, arch: int) -> TileConfig:
    """The tile of the kernels that pass over pixels: block_m pixels x block_n channels, ``block_k`` such steps."""
    block_n = min(64, max(16, triton.next_power_of_2(channels)))
    if arch == INTERPRETER:
        return TileConfig(min(max(16, triton.next_power_of_2(pixels)), 512), block_n, 2)
    steps = 16
    while steps > 1 and cdiv(pixels, 16 * steps) * cdiv(channels, block_n) < PROGRAMS * gpu_of(arch).multiprocessors:
        steps //= 2
    return TileConfig(1024 // block_n, block_n, steps, num_stages=1)


FP32 = (torch.float32,)


VECTOR = torch.float32.itemsize
"""Bytes that a channel takes in one row of stats or coefs."""


def merge_config(tiles: int) -> TileConfig:
    """How many tiles and channels a program merges at a time: the channels of one sector of memory, or of half of one.

    Programs are few, and each waits for memory as often as it passes through its loop: of many tiles it loads more, and
    of fewer channels, for more programs and registers.
    """
    if tiles <= 256:
        return TileConfig(256, 8, 1, num_stages=1)
    # As many registers as so many warps may have: else the compiler would spill for more programs at a time.
    return TileConfig(1024, 4, 1, num_warps=16, num_stages=1, max_registers=128)


def channel_moments(y: Tensor, *, by_image: bool = False, config: TileConfig | None = None) -> Moments:
    """Mean and sum of squared deviations of ``y`` [N, C, P, Q] (pixel-linear), tile by tile.

    ``by_image``: no tile crosses images.
    """
    recipe = _moments_recipe(layout(y), by_image, target_arch(), config)
    tiles, channels = recipe.scalars["T"], recipe.scalars["C"]
    values = torch.empty(2, tiles, channels, dtype=torch.float32, device=y.device)
    recipe.run(y_ptr=y, values_ptr=values)
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    return Moments(
        values, recipe.config.block_m * recipe.config.block_k, pixels, None, pixels // recipe.scalars["span"]
    )


@lru_cache(maxsize=KEPT_LAYOUTS)
def _moments_recipe(y: Layout, by_image: bool, arch: int, config: TileConfig | None) -> Recipe:
    require_pixel_linear(y=y)
    pixels, channels = sizes(y)
    tile = config or default_config(pixels, channels, arch)
    span, tiles = spans(y, by_image, tile)
    scalars = {
        "C": channels,
        "T": tiles,
        "span": span,
        "y_stride": stride_of(y),
        "INT64": wide(tile, y),
        "steps": tile.block_k,
    }
    return pass_over(channel_moments_kernel, tiles, scalars, tile, ["y_ptr"], ["values_ptr"], {})


def merge_moments(moments: Moments) -> Tensor:
    """Mean and sum of squared deviations of all tiles together, fp32 [2, C]."""
    _, tiles, channels = moments.values.shape
    merged = moments.values.new_empty(2, channels)
    recipe = _merge_moments_recipe(channels, tiles, moments.rows, moments.span)
    recipe.run(values_ptr=moments.values, counts_ptr=moments.counts, merged_ptr=merged)
    return merged


@lru_cache(maxsize=KEPT_LAYOUTS)
def _merge_moments_recipe(channels: int, tiles: int, rows: int, span: int) -> Recipe:
    scalars = {"T": tiles, "C": channels, "rows": rows, "span": span}
    vectors = moments_vectors(channels, tiles)
    return merge_recipe(merge_moments_kernel, scalars, ["values_ptr", "counts_ptr"], ["merged_ptr"], vectors)


def moments_vectors(channels: int, tiles: int) -> dict[str, Vector]:
    return {
        "values_ptr": Vector("moments.values", (2, tiles, channels), FP32),
        "counts_ptr": Vector("moments.counts", (tiles,), FP32),
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
    values, counts = (None, None) if moments is None else (moments.values, moments.counts)
    tiles, rows, span = (0, 0, 0) if moments is None else (moments.values.shape[1], moments.rows, moments.span)
    cumulative = moments is not None and momentum is None and batches is not None
    stats = torch.empty(5, channels, dtype=torch.float32, device=like.device)
    _stats_recipe(channels, tiles, rows, span, eps, 0.0 if momentum is None else momentum, cumulative).run(
        values_ptr=values,
        counts_ptr=counts,
        gamma_ptr=gamma,
        beta_ptr=beta,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        batches_ptr=None if moments is None else batches,
        stats_ptr=stats,
    )
    if cumulative and batches is not None:
        batches += 1
    return stats


@lru_cache(maxsize=KEPT_LAYOUTS)
def _stats_recipe(
    channels: int, tiles: int, rows: int, span: int, eps: float, momentum: float, cumulative: bool
) -> Recipe:
    scalars = {
        "T": tiles,
        "C": channels,
        "rows": rows,
        "span": span,
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
    return merge_recipe(batch_norm_stats_kernel, scalars, read, written, vectors | moments_vectors(channels, tiles))


def batch_norm_apply(
    y: Tensor,
    stats: Tensor | Norm,
    *,
    gate: Tensor | None = None,
    residual: Residual | None = None,
    residual_stats: Tensor | None = None,
    activation: Activation = RELU,
    out_dtype: torch.dtype | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """``act((scale*y + shift)*gate + residual)`` for ``y`` [N, C, P, Q]; one read of each tensor and one write.

    ``gate``: contiguous [N, C]. ``stats``: as :func:`batch_norm_stats` returns them, or the fixed statistics that it
    would take them from.
    ``residual_stats``: they normalise a residual of the same shape.

    Returns [N, C, P, Q], channels_last, of ``out_dtype`` (that of ``y`` if not given). Raises ValueError for tensors
    that are not pixel-linear or do not fit.
    """
    dtype = y.dtype if out_dtype is None else out_dtype
    if residual_stats is not None and (residual is None or residual.tensor.shape != y.shape):
        raise ValueError("residual_stats need a residual of the shape of y")
    fixed = stats if isinstance(stats, Norm) else None
    mean, var, gamma, beta, eps = fixed or (None, None, None, None, 0.0)
    rows = (0 if fixed else 2) + (0 if residual_stats is None else 2)
    recipe = _apply_recipe(layout(y), added(residual), rows, eps, activation, target_arch(), config)
    z = empty_channels_last(y.shape, dtype, y.device)
    recipe.run(
        y_ptr=y,
        stats_ptr=None if isinstance(stats, Norm) else stats,
        mean_ptr=mean,
        var_ptr=var,
        gamma_ptr=gamma,
        beta_ptr=beta,
        gate_ptr=gate,
        res_ptr=None if residual is None else residual.tensor,
        res_stats_ptr=residual_stats,
        z_ptr=z,
    )
    return z


@lru_cache(maxsize=KEPT_LAYOUTS)
def _apply_recipe(
    y: Layout,
    residual: Added,
    rows: int,
    eps: float,
    activation: Activation,
    arch: int,
    config: TileConfig | None,
) -> Recipe:
    """``rows``: how many of stats are read."""
    res = residual.layout
    require_pixel_linear(y=y, residual=res)
    pixels, channels = sizes(y)
    _, _, p, q = y.shape
    residual.require_fits(y.shape)
    tile = config or default_config(pixels, channels, arch)
    crop = residual.crop(y.shape)
    scalars = {
        "M": pixels,
        "C": channels,
        "P": p,
        "Q": q,
        "y_stride": stride_of(y),
        "res_stride": stride_of(res),
        "crop": crop,
        "eps": eps,
        "RES_PADDED": crop is not WHOLE,
        "ACT": activation,
        "INT64": wide(tile, y, res),
    }
    # Of a padded residual, the pixels that are added.
    more = 0 if res is None else pixels * res.shape[1] * res.dtype.itemsize
    more += VECTOR * channels * rows
    read = ["y_ptr", "mean_ptr", "var_ptr", "gamma_ptr", "beta_ptr", "gate_ptr"]
    vectors = {
        "gate_ptr": Vector("gate", (y.shape[0], channels)),
        "stats_ptr": Vector("stats", (5, channels), FP32),
        "res_stats_ptr": Vector("residual_stats", (5, channels), FP32),
        **{f"{name}_ptr": Vector(f"stats.{name}", (channels,)) for name in ("mean", "var", "gamma", "beta")},
    }
    tiles = cdiv(pixels, tile.block_m)
    return pass_over(batch_norm_apply_kernel, tiles, scalars, tile, read, ["z_ptr"], vectors, more)


def sizes(y: Layout) -> tuple[int, int]:
    n, c, p, q = y.shape
    return n * p * q, c


def spans(y: Layout, by_image: bool, tile: TileConfig) -> tuple[int, int]:
    """Pixels that a tile does not cross, of an image or of all, and how many tiles of ``block_k`` steps there are."""
    images = y.shape[0] if by_image else 1
    span = y.shape[0] // images * y.shape[2] * y.shape[3]
    return span, images * cdiv(span, tile.block_m * tile.block_k)


def wide(tile: TileConfig, *tensors: Layout | None) -> bool:
    """Whether offsets may pass 2^31, those of pixels past the last one of a tile too."""
    past = tile.block_m * tile.block_k
    return max(span(t) + past * stride_of(t) for t in tensors if t is not None) >= 2**31


def pass_over(
    kernel: Any,
    tiles: int,
    scalars: dict[str, Any],
    tile: TileConfig,
    read: list[str],
    written: list[str],
    vectors: dict[str, Vector],
    more: int = 0,
) -> Recipe:
    """For a kernel over ``tiles`` of pixels and blocks of channels; read and written: see :func:`streamed`."""
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    grid = (tiles, cdiv(scalars["C"], tile.block_n))
    return Recipe(kernel, grid, scalars | blocks, tile, partial(streamed, read, written, more), vectors)


def merge_recipe(
    kernel: Any,
    scalars: dict[str, Any],
    read: list[str],
    written: list[str],
    vectors: dict[str, Vector],
    more: int = 0,
    rows: int = 1,
) -> Recipe:
    """For a kernel that merges the tiles, by blocks of channels, of ``rows`` of sums."""
    tile = merge_config(scalars["T"])
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    grid = (cdiv(scalars["C"], tile.block_n), rows)
    return Recipe(kernel, grid, scalars | blocks, tile, partial(streamed, read, written, more), vectors)


def streamed(read: list[str], written: list[str], more: int, tensors: Mapping[str, Tensor | None]) -> Cost:
    """Of tensors that are ``read`` and ``written`` whole, by name, and ``more`` bytes that are read."""
    read_bytes, written_bytes = (
        sum(t.nbytes for t in map(tensors.__getitem__, names) if t is not None) for names in (read, written)
    )
    return Cost(0, read_bytes + more, written_bytes)
