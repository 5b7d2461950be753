"""Batch norm's backward: the gradient in front of an activation, its sums, what they come to, the gradient of y."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import IDENTITY, RELU, Activation, in_front
from .batch_norm import FP32, RUNTIME_SIZES, VECTOR, default_config, merge_recipe, pass_over, sizes, spans, wide
from .epilogue import NOTHING, WHOLE, Added, Residual, added, load_residual, normalise
from .launch import KEPT_LAYOUTS, Recipe, TileConfig, Vector, target_arch
from .memory import Layout, cdiv, empty_channels_last, layout, require_pixel_linear, stride_of
from .tile import Pixels, Tile, bound, first_and_end, load_channels, load_pixels, store_pixels


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def batch_norm_reduce_kernel(
    dz_ptr,
    z_ptr,
    y_ptr,
    stats_ptr,
    y2_ptr,
    stats2_ptr,
    gate_ptr,
    res_ptr,
    g_ptr,
    sums_ptr,
    C,
    P,
    Q,
    T,
    span,
    steps,
    dz_stride,
    z_stride,
    y_stride,
    y2_stride,
    res_stride,
    g_stride,
    crop,
    RES_PADDED: tl.constexpr,
    ACT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``g``, ``dz`` times the activation's derivative, and its sums over steps*BLOCK_M pixels x BLOCK_N channels.

    The sums: of g, of ``g*(y - mean)`` and of ``g*(y2 - mean2)``. The derivative is that at z, the output of a ReLU;
    without z, at the input ``scale*y + shift``, times ``gate`` if there is one, plus what ``res`` or y2 add.
    """
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    pid = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    sum_g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_gy = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_gy2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if gate_ptr is not None:
        first, end = first_and_end(pid, span, steps * BLOCK_M, OFFSET)
    else:
        first, end = pid.to(OFFSET) * (steps * BLOCK_M), span
    offs_m = first + tl.arange(0, BLOCK_M)
    for _ in range(bound(steps)):
        mask = (offs_m < end)[:, None] & mask_c[None, :]
        g = load_pixels(dz_ptr, offs_m, dz_stride, c, mask)
        if z_ptr is not None:
            g = in_front(g, load_pixels(z_ptr, offs_m, z_stride, c, mask), ACT)
        if y_ptr is not None:
            y = load_pixels(y_ptr, offs_m, y_stride, c, mask)
        if y2_ptr is not None:
            y2 = load_pixels(y2_ptr, offs_m, y2_stride, c, mask)
        if z_ptr is None:
            if ACT.name != "identity":
                v = normalise(y, stats_ptr, c, mask_c, C)
                if gate_ptr is not None:
                    v *= load_pixels(gate_ptr, offs_m // (P * Q), C, c, mask)
                if y2_ptr is not None:
                    v += normalise(y2, stats2_ptr, c, mask_c, C)
                if res_ptr is not None:
                    tile = Tile(offs_m, c, offs_m < end, mask_c)
                    v += load_residual(Pixels(res_ptr, res_stride), crop, tile, P, Q, RES_PADDED)
                g = in_front(g, v, ACT)
                if ACT.name != "relu":
                    g = g.to(g_ptr.dtype.element_ty).to(tl.float32)  # as it is stored: of that are the sums
        if y_ptr is not None:
            sum_gy += g * (y - load_channels(stats_ptr, c, mask_c)[None, :])
        if y2_ptr is not None:
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


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def merge_sums_kernel(sums_ptr, merged_ptr, T, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One row of sums over all tiles, for BLOCK_N channels."""
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1)
    mask_c = c < C
    tl.store(merged_ptr + row * C + c, add_tiles(sums_ptr + row * T * C, T, C, c, mask_c, BLOCK_M), mask=mask_c)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
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


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def batch_norm_backward_kernel(
    g_ptr,
    y_ptr,
    coefs_ptr,
    y2_ptr,
    coefs2_ptr,
    add_ptr,
    gate_ptr,
    offset_ptr,
    dy_ptr,
    dy2_ptr,
    M,
    C,
    span,
    g_stride,
    y_stride,
    y2_stride,
    add_stride,
    dy_stride,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dy = A*g + B*y + C + add`` for BLOCK_M pixels x BLOCK_N channels; twice from one g if there is a second norm.

    The addend is optional, and goes to the first. With a gate, ``g*gate + offset`` takes the place of g, both having a
    number for each image and channel.
    """
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    offs_m = tl.program_id(0).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    g = load_pixels(g_ptr, offs_m, g_stride, c, mask)
    if gate_ptr is not None:
        image = offs_m // span
        g = tl.fma(g, load_pixels(gate_ptr, image, C, c, mask), load_pixels(offset_ptr, image, C, c, mask))
    dy = gradient(g, y_ptr, y_stride, coefs_ptr, offs_m, c, mask, mask_c, C)
    if dy2_ptr is not None:
        dy2 = gradient(g, y2_ptr, y2_stride, coefs2_ptr, offs_m, c, mask, mask_c, C)
        store_pixels(dy2_ptr, offs_m, C, c, dy2, mask)
    if add_ptr is not None:
        dy += load_pixels(add_ptr, offs_m, add_stride, c, mask)
    store_pixels(dy_ptr, offs_m, dy_stride, c, dy, mask)


def batch_norm_reduce(
    dz: Tensor,
    y: Tensor | None,
    stats: Tensor | None,
    *,
    activation: Activation = IDENTITY,
    z: Tensor | None = None,
    second: tuple[Tensor, Tensor] | None = None,
    gate: Tensor | None = None,
    residual: Residual | None = None,
    out: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient ``g`` in front of an activation from that behind it, ``dz`` [N, C, P, Q], and its sums.

    The derivative is that at the activation's input, ``scale*y + shift`` plus ``residual`` or the ``second`` batch
    norm, which is given by its y and stats; or, of a ReLU, at its output ``z``. Other outputs may change in place, as
    PyTorch does not keep them either; and the input takes no more bytes: the residual is read in place of z, and beside
    a second batch norm nothing. Of the identity, g is ``dz`` itself. ``gate``: contiguous [N, C], times which the
    activation's input has ``scale*y + shift``; then no tile crosses images. ``out``: a pixel-linear tensor that g goes
    to; ``dz`` itself will do.

    Returns g and fp32 [2 or 3, T, C]: tile by tile ``sum g``, ``sum g*(y - mean)`` (0 without ``y``), and the second's,
    of g as it is rounded.
    """
    y2, stats2 = second or (None, None)
    masked = activation != IDENTITY
    if (y is None) != (stats is None) or (masked and z is None and y is None):
        raise ValueError("y and stats must be given together, and with an activation, they or z; got one or nothing")
    if z is not None and (activation != RELU or residual is not None):
        raise ValueError(f"z must come with a ReLU, and without residual; got {activation}")
    inputs = map(layout, (dz, y, z, y2, out if masked else None))
    recipe = _reduce_recipe(*inputs, added(residual), activation, gate is not None, target_arch(), config)
    tiles, channels = recipe.scalars["T"], recipe.scalars["C"]
    if masked and out is None:
        out = empty_channels_last(dz.shape, dz.dtype, dz.device)
    g = out if masked else None
    sums = torch.empty(2 if second is None else 3, tiles, channels, dtype=torch.float32, device=dz.device)
    recipe.run(
        dz_ptr=dz,
        z_ptr=z,
        y_ptr=y,
        stats_ptr=stats,
        y2_ptr=y2,
        stats2_ptr=stats2,
        gate_ptr=gate,
        res_ptr=None if residual is None else residual.tensor,
        g_ptr=g,
        sums_ptr=sums,
    )
    return dz if g is None else g, sums


def batch_norm_sums(dz: Tensor, y: Tensor, stats: Tensor, *, config: TileConfig | None = None) -> Tensor:
    """The sums of :func:`batch_norm_reduce` of a ReLU without ``z``, fp32 [2, T, C], where g itself is of no use."""
    recipe = _reduce_recipe(layout(dz), layout(y), None, None, None, NOTHING, RELU, False, target_arch(), config)
    sums = torch.empty(2, recipe.scalars["T"], recipe.scalars["C"], dtype=torch.float32, device=dz.device)
    nothing = dict.fromkeys(("z_ptr", "y2_ptr", "stats2_ptr", "gate_ptr", "res_ptr", "g_ptr"))
    recipe.run(dz_ptr=dz, y_ptr=y, stats_ptr=stats, sums_ptr=sums, **nothing)
    return sums


@lru_cache(maxsize=KEPT_LAYOUTS)
def _reduce_recipe(
    dz: Layout,
    y: Layout | None,
    z: Layout | None,
    y2: Layout | None,
    out: Layout | None,
    residual: Added,
    activation: Activation,
    gated: bool,
    arch: int,
    config: TileConfig | None,
) -> Recipe:
    _require_alike(dz=dz, y=y, z=z, y2=y2, out=out)
    res, crop = residual.layout, residual.crop(dz.shape)
    require_pixel_linear(residual=res)
    residual.require_fits(dz.shape)
    pixels, channels = sizes(dz)
    # In 16 bits, with one batch norm, 64 registers are enough: the compiler would spill to do with fewer. Not for
    # channels that it loads one by one, nor where a derivative is computed, which takes up to 128.
    small = y2 is None and dz.dtype.itemsize == 2 and channels % 16 == 0
    registers = (64 if small else None) if activation.light else 128
    tile = config or replace(default_config(pixels, channels, arch), max_registers=registers)
    span, tiles = spans(dz, gated, tile)
    g_stride = 0
    if activation != IDENTITY:
        g_stride = channels if out is None else stride_of(out)
    scalars = {
        "C": channels,
        "P": dz.shape[2],
        "Q": dz.shape[3],
        "T": tiles,
        "span": span,
        "dz_stride": stride_of(dz),
        "z_stride": stride_of(z),
        "y_stride": stride_of(y),
        "y2_stride": stride_of(y2),
        "res_stride": stride_of(res),
        "g_stride": g_stride,
        "crop": crop,
        "RES_PADDED": crop is not WHOLE,
        "ACT": activation,
        "INT64": wide(tile, dz, z, y, y2, res, out),
        "steps": tile.block_k,
    }
    rows = 1 if z is not None or activation == IDENTITY else 3
    more = VECTOR * channels * rows * ((y is not None) + (y2 is not None))
    more += 0 if res is None else pixels * res.shape[1] * res.dtype.itemsize
    read, written = ["dz_ptr", "z_ptr", "y_ptr", "y2_ptr"], ["sums_ptr", "g_ptr"]
    if rows == 3:
        read.append("gate_ptr")
    vectors = {
        "gate_ptr": Vector("gate", (dz.shape[0], channels)),
        "stats_ptr": Vector("stats", (5, channels), FP32),
        "stats2_ptr": Vector("second[1]", (5, channels), FP32),
    }
    return pass_over(batch_norm_reduce_kernel, tiles, scalars, tile, read, written, vectors, more)


def merge_sums(sums: Tensor) -> Tensor:
    """Sums [K, T, C] over all tiles: fp32 [K, C]."""
    rows, tiles, channels = sums.shape
    merged = sums.new_empty(rows, channels)
    _merge_sums_recipe(rows, tiles, channels).run(sums_ptr=sums, merged_ptr=merged)
    return merged


@lru_cache(maxsize=KEPT_LAYOUTS)
def _merge_sums_recipe(rows: int, tiles: int, channels: int) -> Recipe:
    vectors = {"sums_ptr": Vector("sums", (rows, tiles, channels), FP32)}
    return merge_recipe(
        merge_sums_kernel, {"T": tiles, "C": channels}, ["sums_ptr"], ["merged_ptr"], vectors, rows=rows
    )


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


@lru_cache(maxsize=KEPT_LAYOUTS)
def _coefs_recipe(tiles: int, channels: int) -> Recipe:
    more = VECTOR * channels * 4  # The shift is the one row of stats that nothing depends on.
    read, written = ["sum_g_ptr", "sum_gy_ptr"], ["coefs_ptr", "dgamma_ptr", "dbeta_ptr"]
    sums = {f"{name}_ptr": Vector(name, (tiles, channels), FP32) for name in ("sum_g", "sum_gy")}
    vectors = sums | {"stats_ptr": Vector("stats", (5, channels), FP32)}
    return merge_recipe(batch_norm_coefs_kernel, {"T": tiles, "C": channels}, read, written, vectors, more)


def batch_norm_backward(
    g: Tensor,
    y: Tensor | None,
    coefs: Tensor,
    *,
    out: Tensor | None = None,
    second: tuple[Tensor | None, Tensor] | None = None,
    addend: Tensor | None = None,
    gate: tuple[Tensor, Tensor] | None = None,
    config: TileConfig | None = None,
) -> Any:
    """``dy = A*g + B*y + C + addend`` [N, C, P, Q]; ``y`` None where B and C are zero. ``out`` may be ``g`` itself.

    Without ``out``, dy has the dtype of ``y``, or of ``g`` if there is none. ``second``: y and coefs of another batch
    norm that the same g goes into; then the result is a pair, and the second is a new tensor of the same dtype.
    ``addend``: the gradient that what batch norm read has from elsewhere. ``gate``: contiguous [N, C] twice, times and
    plus which g goes into the formula.
    """
    y2, coefs2 = second or (None, None)
    times, plus = gate or (None, None)
    recipe = _backward_recipe(*map(layout, (g, y, y2, addend, out)), second is not None, target_arch(), config)
    dy = torch.empty_like(g if y is None else y, memory_format=torch.channels_last) if out is None else out
    dy2 = None if second is None else torch.empty_like(dy, memory_format=torch.channels_last)
    own = {"g_ptr": g, "y_ptr": y, "coefs_ptr": coefs, "add_ptr": addend, "gate_ptr": times, "offset_ptr": plus}
    recipe.run(**own, y2_ptr=y2, coefs2_ptr=coefs2, dy_ptr=dy, dy2_ptr=dy2)
    return dy if dy2 is None else (dy, dy2)


@lru_cache(maxsize=KEPT_LAYOUTS)
def _backward_recipe(
    g: Layout,
    y: Layout | None,
    y2: Layout | None,
    addend: Layout | None,
    out: Layout | None,
    twice: bool,
    arch: int,
    config: TileConfig | None,
) -> Recipe:
    _require_alike(g=g, y=y, y2=y2, addend=addend, out=out)
    pixels, channels = sizes(g)
    tile = config or default_config(pixels, channels, arch)
    scalars = {
        "M": pixels,
        "C": channels,
        "span": g.shape[2] * g.shape[3],
        "g_stride": stride_of(g),
        "y_stride": stride_of(y),
        "y2_stride": stride_of(y2),
        "add_stride": stride_of(addend),
        "dy_stride": channels if out is None else stride_of(out),
        "INT64": wide(tile, g, y, y2, addend, out),
    }
    more = (1 if y is None else 3) + (0 if not twice else 1 if y2 is None else 3)
    read, written = ["g_ptr", "y_ptr", "y2_ptr", "add_ptr", "gate_ptr", "offset_ptr"], ["dy_ptr", "dy2_ptr"]
    tiles = cdiv(pixels, tile.block_m)
    vectors = {
        **{f"{name}_ptr": Vector(name, (g.shape[0], channels)) for name in ("gate", "offset")},
        "coefs_ptr": Vector("coefs", (3, channels), FP32),
        "coefs2_ptr": Vector("second[1]", (3, channels), FP32),
    }
    more *= VECTOR * channels
    return pass_over(batch_norm_backward_kernel, tiles, scalars, tile, read, written, vectors, more)


def _require_alike(**layouts: Layout | None) -> None:
    """Raise ValueError for the first tensor that is not pixel-linear, or not of the shape of the first of them all."""
    require_pixel_linear(**layouts)
    (first, like), *others = layouts.items()
    assert like is not None
    for name, x in others:
        if x is not None and x.shape != like.shape:
            raise ValueError(f"{name} must have the shape of {first}, {tuple(like.shape)}; got {tuple(x.shape)}")
