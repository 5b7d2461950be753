"""Between tiles of pixels and images: the mean of each, and the sums that a gate's gradient and batch norm's need.

Squeeze and excitation (Hu et al. 2017, arXiv:1709.01507): ``z = act(v * gate(mean of v) + shortcut)`` with
``v = scale*y + shift``, one gate for each image and channel.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import FP32, VECTOR, moments_vectors, streamed, tile_counts
from .epilogue import Moments
from .launch import KEPT_LAYOUTS, Recipe, TileConfig, Vector
from .memory import cdiv
from .norm_backward import add_tiles
from .tile import bound, load_channels

RUNTIME_SIZES = ["T", "rows", "span"]


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def squeeze_kernel(
    values_ptr,
    counts_ptr,
    stats_ptr,
    means_ptr,
    squeeze_ptr,
    T,
    C,
    rows,
    span,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The mean of one image's y, and of its ``scale*y + shift``, for BLOCK_N channels; T: tiles of an image.

    Without stats, ``squeeze`` is the mean of y too.
    """
    image = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    if counts_ptr is not None:
        counts_ptr += image * T
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, bound(T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        counts = tile_counts(counts_ptr, t, T, rows, span)
        at = (image.to(tl.int64) * T + t)[:, None] * C + c[None, :]
        mean = tl.load(values_ptr + at, mask=(counts > 0)[:, None] & mask_c[None, :], other=0.0)
        acc += mean * (counts / span)[:, None]
    mean = tl.sum(acc, 0)
    if means_ptr is not None:
        tl.store(means_ptr + image * C + c, mean, mask=mask_c)
    if stats_ptr is not None:
        scale = load_channels(stats_ptr + 2 * C, c, mask_c)
        shift = load_channels(stats_ptr + 3 * C, c, mask_c)
        mean = tl.fma(mean, scale, shift)
    tl.store(squeeze_ptr + image * C + c, mean.to(squeeze_ptr.dtype.element_ty), mask=mask_c)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def gate_gradient_kernel(
    sums_ptr, stats_ptr, merged_ptr, dgate_ptr, T, C, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Of one image, each of ROWS rows of sums over its T tiles, and ``sum g*v``, for BLOCK_N channels."""
    image, images = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    own = sums_ptr + image.to(tl.int64) * T * C
    step = images.to(tl.int64) * C
    at = merged_ptr + image * C + c
    sum_g = add_tiles(own, T, C, c, mask_c, BLOCK_T)
    sum_gy = add_tiles(own + step * T, T, C, c, mask_c, BLOCK_T)
    tl.store(at, sum_g, mask=mask_c)
    tl.store(at + step, sum_gy, mask=mask_c)
    if ROWS == 3:
        tl.store(at + 2 * step, add_tiles(own + 2 * step * T, T, C, c, mask_c, BLOCK_T), mask=mask_c)
    scale = load_channels(stats_ptr + 2 * C, c, mask_c)
    center = tl.fma(load_channels(stats_ptr, c, mask_c), scale, load_channels(stats_ptr + 3 * C, c, mask_c))
    dgate = tl.fma(sum_gy, scale, center * sum_g)
    tl.store(dgate_ptr + image * C + c, dgate.to(dgate_ptr.dtype.element_ty), mask=mask_c)


@triton.jit(do_not_specialize=["images", "span"])
def squeeze_gradient_kernel(
    merged_ptr,
    gate_ptr,
    dsqueeze_ptr,
    means_ptr,
    stats_ptr,
    sums_ptr,
    offset_ptr,
    images,
    C,
    span,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What goes back through ``v`` of BLOCK_T images and BLOCK_N channels, as ``g*gate + offset`` of each pixel.

    ``sums``: of that, and of its product with ``y - mean``.
    """
    n = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    mask = (n < images)[:, None] & mask_c[None, :]
    at = n[:, None] * C + c[None, :]
    step = images.to(tl.int64) * C
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sum_g = tl.load(merged_ptr + at, mask=mask, other=0.0)
    sum_gy = tl.load(merged_ptr + step + at, mask=mask, other=0.0)
    means = tl.load(means_ptr + at, mask=mask, other=0.0) - load_channels(stats_ptr, c, mask_c)[None, :]
    d = tl.load(dsqueeze_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr + at, tl.fma(gate, sum_g, d), mask=mask)
    tl.store(sums_ptr + step + at, tl.fma(gate, sum_gy, d * means), mask=mask)
    tl.store(offset_ptr + at, d / span, mask=mask)


def squeeze(moments: Moments, stats: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean of each image's ``scale*y + shift``, [N, C, 1, 1] in ``dtype``, and of its y, fp32 [N, C].

    ``moments``: of y, by image; ``stats`` [5, C]: scale and shift.
    """
    means = moments.values.new_empty(moments.images, moments.values.shape[2])
    return _squeezed(moments, stats, means, dtype), means


def image_means(moments: Moments, dtype: torch.dtype) -> Tensor:
    """The mean of each image's y, [N, C, 1, 1] in ``dtype``. ``moments``: of y, by image."""
    return _squeezed(moments, None, None, dtype)


def _squeezed(moments: Moments, stats: Tensor | None, means: Tensor | None, dtype: torch.dtype) -> Tensor:
    values, images, channels = moments.values, moments.images, moments.values.shape[2]
    squeezed = values.new_empty(images, channels, 1, 1, dtype=dtype)
    recipe = _squeeze_recipe(images, values.shape[1] // images, channels, moments.rows, moments.span, stats is None)
    recipe.run(values_ptr=values, counts_ptr=moments.counts, stats_ptr=stats, means_ptr=means, squeeze_ptr=squeezed)
    return squeezed


def gate_gradient(sums: Tensor, stats: Tensor, images: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradient of the gates, [N, C] in ``dtype``, and the sums [2 or 3, T, C] image by image, fp32 [2 or 3, N, C].

    ``sums``: of g, g*(y - mean) and any more, whose tiles do not cross images.
    """
    rows, tiles, channels = sums.shape
    merged, dgate = sums.new_empty(rows, images, channels), sums.new_empty(images, channels, dtype=dtype)
    _gate_recipe(rows, images, tiles // images, channels).run(
        sums_ptr=sums, stats_ptr=stats, merged_ptr=merged, dgate_ptr=dgate
    )
    return dgate, merged


def squeeze_gradient(
    merged: Tensor, gate: Tensor, dsqueeze: Tensor, means: Tensor, stats: Tensor, span: int
) -> tuple[Tensor, Tensor]:
    """The sums, fp32 [2, N, C], of what goes back through ``v``: ``g*gate + offset``; and the offset, fp32 [N, C].

    ``merged``: as :func:`gate_gradient` returns them; ``gate``, ``dsqueeze`` (the gradient of the squeeze) and
    ``means`` are [N, C]; ``span``: pixels of an image.
    """
    _, images, channels = merged.shape
    sums, offset = merged.new_empty(2, images, channels), merged.new_empty(images, channels)
    _squeeze_gradient_recipe(merged.shape[0], images, channels, span).run(
        **{"merged_ptr": merged, "gate_ptr": gate, "dsqueeze_ptr": dsqueeze, "means_ptr": means, "stats_ptr": stats},
        **{"sums_ptr": sums, "offset_ptr": offset},
    )
    return sums, offset


_TILE = TileConfig(16, 64, 1, num_stages=1)
"""Tiles or images at a time, and channels, of a program."""


@lru_cache(maxsize=KEPT_LAYOUTS)
def _squeeze_recipe(images: int, tiles: int, channels: int, rows: int, span: int, raw: bool) -> Recipe:
    scalars = {"T": tiles, "C": channels, "rows": rows, "span": span}
    vectors = moments_vectors(channels, images * tiles) | _vectors(channels)
    more = VECTOR * channels * (images * tiles + (0 if raw else 2))  # of moments the means, of stats scale and shift
    return _recipe(squeeze_kernel, images, scalars, ["counts_ptr"], ["means_ptr", "squeeze_ptr"], vectors, more)


@lru_cache(maxsize=KEPT_LAYOUTS)
def _gate_recipe(rows: int, images: int, tiles: int, channels: int) -> Recipe:
    scalars = {"T": tiles, "C": channels, "ROWS": rows}
    vectors = {"sums_ptr": Vector("sums", (rows, images * tiles, channels), FP32)} | _vectors(channels)
    more = VECTOR * channels * 3
    return _recipe(gate_gradient_kernel, images, scalars, ["sums_ptr"], ["merged_ptr", "dgate_ptr"], vectors, more)


@lru_cache(maxsize=KEPT_LAYOUTS)
def _squeeze_gradient_recipe(rows: int, images: int, channels: int, span: int) -> Recipe:
    scalars = {"images": images, "C": channels, "span": span}
    vectors = {"merged_ptr": Vector("merged", (rows, images, channels), FP32)} | _vectors(channels)
    vectors |= {f"{name}_ptr": Vector(name, (images, channels)) for name in ("gate", "dsqueeze")}
    vectors["means_ptr"] = Vector("means", (images, channels), FP32)
    more = VECTOR * channels * (2 * images + 1)
    read, written = ["gate_ptr", "dsqueeze_ptr", "means_ptr"], ["sums_ptr", "offset_ptr"]
    return _recipe(squeeze_gradient_kernel, cdiv(images, _TILE.block_m), scalars, read, written, vectors, more)


def _vectors(channels: int) -> dict[str, Vector]:
    return {"stats_ptr": Vector("stats", (5, channels), FP32)}


def _recipe(
    kernel: Any,
    rows: int,
    scalars: dict[str, Any],
    read: list[str],
    written: list[str],
    vectors: dict[str, Vector],
    more: int,
) -> Recipe:
    """For a kernel over blocks of channels and so many ``rows`` of programs."""
    blocks = {"BLOCK_T": _TILE.block_m, "BLOCK_N": _TILE.block_n}
    grid = (cdiv(scalars["C"], _TILE.block_n), rows)
    return Recipe(kernel, grid, scalars | blocks, _TILE, partial(streamed, read, written, more), vectors)
