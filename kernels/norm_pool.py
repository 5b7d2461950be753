"""Batch norm, ReLU and max pool in one pass, forward and backward: the normalised values are never stored.

The pool is 3x3/2 with padding 1, a ResNet's first.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import relu
from .batch_norm import FP32, VECTOR, default_config, pass_over, wide
from .conv_pool import pooled_size
from .epilogue import normalise
from .launch import KEPT_LAYOUTS, Recipe, TileConfig, Vector, target_arch
from .memory import Layout, cdiv, empty_channels_last, layout, require_pixel_linear, stride_of
from .tile import load_channels, load_pixels, store_pixels

RUNTIME_SIZES = ["M", "P", "Q", "pooled_h", "pooled_w"]
"""Sizes that the compiled code does not depend on."""


class Peaks(NamedTuple):
    """Where a window of the pool has its largest value: the ``y`` there, and its ``place``, 3*row + column, int8."""

    y: Tensor
    place: Tensor


class Window(NamedTuple):
    """A tile of windows on the device: the gradient of each one's output, and the place of its largest value."""

    g: Any
    place: Any


class Image(NamedTuple):
    """Rows and columns of an image on the device, and of what a pool makes of it."""

    rows: Any
    columns: Any
    pooled_rows: Any
    pooled_columns: Any


class Coefs(NamedTuple):
    """The vectors of ``dy = A*g + B*y + C`` on the device."""

    a: Any
    b: Any
    c: Any


@triton.jit
def pooled_pixels(offs_m, image):
    """Image, row and column of pooled pixels that are counted through."""
    line = offs_m // image.pooled_columns
    return line // image.pooled_rows, line % image.pooled_rows, offs_m % image.pooled_columns


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def batch_norm_pool_kernel(
    y_ptr,
    stats_ptr,
    z_ptr,
    peak_ptr,
    place_ptr,
    M,
    C,
    P,
    Q,
    pooled_h,
    pooled_w,
    y_stride,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``z = max_pool(relu(scale*y + shift))`` for BLOCK_M pooled pixels x BLOCK_N channels, and the peaks.

    As PyTorch's: the first of equal values counts, and the last NaN.
    """
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    offs_m = tl.program_id(0).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    n, row, column = pooled_pixels(offs_m, Image(P, Q, pooled_h, pooled_w))
    largest = tl.full((BLOCK_M, BLOCK_N), -float("inf"), tl.float32)
    peak = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    place = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for r in tl.static_range(3):
        for s in tl.static_range(3):
            h = 2 * row + (r - 1)
            w = 2 * column + (s - 1)
            mask = ((offs_m < M) & (h >= 0) & (h < P) & (w >= 0) & (w < Q))[:, None] & mask_c[None, :]
            y = load_pixels(y_ptr, (n * P + h) * Q + w, y_stride, c, mask)
            v = relu(normalise(y, stats_ptr, c, mask_c, C))
            larger = mask & ((v > largest) | (v != v))
            largest = tl.where(larger, v, largest)
            peak = tl.where(larger, y, peak)
            place = tl.where(larger, 3 * r + s, place)
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    store_pixels(z_ptr, offs_m, C, c, largest, mask)
    store_pixels(peak_ptr, offs_m, C, c, peak, mask)
    store_pixels(place_ptr, offs_m, C, c, place, mask)


@triton.jit
def load_window(dz_ptr, dz_stride, place_ptr, n, row, column, image, mask_m, c, mask_c, C):
    """The windows of these pooled pixels; those that there are not have no place."""
    inside = mask_m & (row < image.pooled_rows) & (column < image.pooled_columns)
    mask = inside[:, None] & mask_c[None, :]
    offs = (n * image.pooled_rows + row) * image.pooled_columns + column
    place = tl.load(place_ptr + (offs * C)[:, None] + c[None, :], mask=mask, other=-1)
    return Window(load_pixels(dz_ptr, offs, dz_stride, c, mask), place)


@triton.jit
def passed(window, PLACE: tl.constexpr):
    """What a window hands to the pixel at PLACE of it."""
    return tl.where(window.place == PLACE, window.g, 0.0)


@triton.jit
def gradient(y, g, scale, shift, coefs):
    """``A*g + B*y + C`` of a tile, ``g`` where the ReLU let pass; B and C are None where they are zero."""
    g = tl.where(tl.fma(y, scale[None, :], shift[None, :]) <= 0, 0.0, g)
    dy = g * coefs.a[None, :]
    if coefs.b is not None:
        dy += tl.fma(y, coefs.b[None, :], coefs.c[None, :])
    return dy


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def batch_norm_pool_backward_kernel(
    dz_ptr,
    place_ptr,
    y_ptr,
    stats_ptr,
    coefs_ptr,
    dy_ptr,
    M,
    C,
    P,
    Q,
    pooled_h,
    pooled_w,
    dz_stride,
    y_stride,
    FROZEN: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dy = A*g + B*y + C`` for BLOCK_M squares of 2x2 pixels x BLOCK_N channels; FROZEN: B and C are zero.

    A square is the centre of a window, of pixels at odd places too in the windows behind, below and diagonally behind:
    g is the sum of the gradients ``dz`` of those windows that have their peak there, where the ReLU let pass.
    """
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    offs_m = tl.program_id(0).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_c = offs_m < M, c < C
    image = Image(P, Q, pooled_h, pooled_w)
    n, p, q = pooled_pixels(offs_m, image)
    own = load_window(dz_ptr, dz_stride, place_ptr, n, p, q, image, mask_m, c, mask_c, C)
    behind = load_window(dz_ptr, dz_stride, place_ptr, n, p, q + 1, image, mask_m, c, mask_c, C)
    below = load_window(dz_ptr, dz_stride, place_ptr, n, p + 1, q, image, mask_m, c, mask_c, C)
    across = load_window(dz_ptr, dz_stride, place_ptr, n, p + 1, q + 1, image, mask_m, c, mask_c, C)
    # Once for all four pixels: behind a store, the compiler would load them again.
    scale, shift = load_channels(stats_ptr + 2 * C, c, mask_c), load_channels(stats_ptr + 3 * C, c, mask_c)
    if FROZEN:
        coefs = Coefs(load_channels(coefs_ptr, c, mask_c), None, None)
    else:
        b, constant = load_channels(coefs_ptr + C, c, mask_c), load_channels(coefs_ptr + 2 * C, c, mask_c)
        coefs = Coefs(load_channels(coefs_ptr, c, mask_c), b, constant)
    for r in tl.static_range(2):
        for s in tl.static_range(2):
            g = passed(own, 3 * (r + 1) + s + 1)
            if s == 1:
                g += passed(behind, 3 * (r + 1))
            if r == 1:
                g += passed(below, s + 1)
            if r + s == 2:
                g += passed(across, 0)
            h, w = 2 * p + r, 2 * q + s
            mask = (mask_m & (h < P) & (w < Q))[:, None] & mask_c[None, :]
            offs = (n * P + h) * Q + w
            y = load_pixels(y_ptr, offs, y_stride, c, mask)
            store_pixels(dy_ptr, offs, C, c, gradient(y, g, scale, shift, coefs), mask)


def batch_norm_pool(y: Tensor, stats: Tensor, *, config: TileConfig | None = None) -> tuple[Tensor, Peaks]:
    """``max_pool(relu(scale*y + shift))`` for ``y`` [N, C, P, Q], the pool 3x3/2 with padding 1, and its peaks.

    ``stats``: as :func:`batch_norm_stats` returns them. Returns [N, C, ceil(P/2), ceil(Q/2)] in the dtype of ``y``, and
    peaks of this shape; all are channels_last. Raises ValueError for a ``y`` that is not pixel-linear.
    """
    recipe = _pool_recipe(layout(y), target_arch(), config)
    shape = _pooled(layout(y))
    z, peak, place = (empty_channels_last(shape, dtype, y.device) for dtype in (y.dtype, y.dtype, torch.int8))
    recipe.run(y_ptr=y, stats_ptr=stats, z_ptr=z, peak_ptr=peak, place_ptr=place)
    return z, Peaks(peak, place)


@lru_cache(maxsize=KEPT_LAYOUTS)
def _pool_recipe(y: Layout, arch: int, config: TileConfig | None) -> Recipe:
    require_pixel_linear(y=y)
    scalars, tile = _common(y, arch, config)
    scalars |= {"INT64": wide(tile, y)}
    vectors = {"stats_ptr": Vector("stats", (5, scalars["C"]), FP32)}
    written = ["z_ptr", "peak_ptr", "place_ptr"]
    more = 2 * VECTOR * scalars["C"]
    tiles = cdiv(scalars["M"], tile.block_m)
    return pass_over(batch_norm_pool_kernel, tiles, scalars, tile, ["y_ptr"], written, vectors, more)


def batch_norm_pool_backward(
    dz: Tensor,
    place: Tensor,
    y: Tensor,
    stats: Tensor,
    coefs: Tensor,
    *,
    frozen: bool = False,
    config: TileConfig | None = None,
) -> Tensor:
    """``dy = A*g + B*y + C`` [N, C, P, Q], ``g`` being what pool and ReLU make of the pool's gradient ``dz``.

    ``place``, of the shape of ``dz``: that of :class:`Peaks`, channels_last. ``coefs``: those of the sums of
    :func:`batch_norm_sums`; ``frozen``: their B and C are zero. Returns the dtype of ``y``, channels_last. Raises
    ValueError for tensors that are not pixel-linear, or whose shapes do not fit.
    """
    recipe = _pool_backward_recipe(layout(dz), layout(place), layout(y), frozen, target_arch(), config)
    dy = empty_channels_last(y.shape, y.dtype, y.device)
    recipe.run(dz_ptr=dz, place_ptr=place, y_ptr=y, stats_ptr=stats, coefs_ptr=coefs, dy_ptr=dy)
    return dy


@lru_cache(maxsize=KEPT_LAYOUTS)
def _pool_backward_recipe(
    dz: Layout, place: Layout, y: Layout, frozen: bool, arch: int, config: TileConfig | None
) -> Recipe:
    require_pixel_linear(dz=dz, y=y)
    if dz.shape != _pooled(y):
        raise ValueError(f"dz must have the shape {_pooled(y)} of the pooled y; got {tuple(dz.shape)}")
    if place.shape != dz.shape or place.dtype != torch.int8 or not place.is_packed(0, 2, 3, 1):
        raise ValueError(
            f"place must be channels_last int8 of the shape of dz, {tuple(dz.shape)}; got {place.dtype} "
            f"{tuple(place.shape)} with strides {place.strides}"
        )
    scalars, tile = _common(y, arch, config)
    scalars |= {"dz_stride": stride_of(dz), "FROZEN": frozen, "INT64": wide(tile, dz, y)}
    vectors = {
        "stats_ptr": Vector("stats", (5, scalars["C"]), FP32),
        "coefs_ptr": Vector("coefs", (3, scalars["C"]), FP32),
    }
    read = ["dz_ptr", "place_ptr", "y_ptr"]
    more = (3 if frozen else 5) * VECTOR * scalars["C"]
    tiles = cdiv(scalars["M"], tile.block_m)
    return pass_over(batch_norm_pool_backward_kernel, tiles, scalars, tile, read, ["dy_ptr"], vectors, more)


def _pooled(y: Layout) -> tuple[int, int, int, int]:
    n, c, p, q = y.shape
    return n, c, pooled_size(p), pooled_size(q)


def _common(y: Layout, arch: int, config: TileConfig | None) -> tuple[dict[str, Any], TileConfig]:
    """What both kernels are told of the sizes, and their tile: of pooled pixels, each of which stands for four."""
    n, channels, h, w = _pooled(y)
    tile = config or replace(default_config(n * h * w, channels, arch), block_k=4)
    scalars = {
        "M": n * h * w,
        "C": channels,
        "P": y.shape[2],
        "Q": y.shape[3],
        "pooled_h": h,
        "pooled_w": w,
        "y_stride": stride_of(y),
    }
    return scalars, tile
