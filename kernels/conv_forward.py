"""Convolution forward: an implicit matrix product in NHWC, with batch norm, residual and activation in its epilogue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import conv_box
from .activation import IDENTITY, Activation, activate
from .conv import RUNTIME_SIZES, ConvProblem, Geometry, Size, blocks, check_geometry, load_width, precision, sizes
from .epilogue import WHOLE, Added, Crop, Epilogue, Moments, Norm, Prologue, Residual, added, store_output
from .gpus import gpu_of
from .launch import INTERPRETER, KEPT_LAYOUTS, Cost, Recipe, TileConfig, Vector, target_arch
from .memory import (
    Layout,
    cdiv,
    channels_last,
    empty_channels_last,
    layout,
    require_channels_last_filter,
    require_pixel_linear,
    span,
    stride_of,
)
from .tile import (
    PerTile,
    Pixels,
    Tile,
    all_finite,
    bound,
    dot,
    first_and_end,
    load_channels,
    load_pixels,
    tap_mask,
    tile_mask,
)


class Form(NamedTuple):
    """What the compiled code depends on: the filter's size, and which of the kernel's cases it is.

    ``MERGED``: how many groups share a tile. ``PRE``, ``ACT``: the activation of the prologue, of the epilogue.
    ``VECTOR``: see :func:`resnet_fused.kernels.conv.load_width`.
    """

    R: int
    S: int
    MERGED: int
    POINTWISE: bool
    PADDED: bool
    FLAT: bool
    EVEN_CI: bool
    ONE_CHUNK: bool
    RES_PADDED: bool
    PRE: Activation
    ACT: Activation
    SPLIT: bool
    BY_IMAGE: bool
    INT64: bool
    VECTOR: int
    PRECISION: str


class Widths(NamedTuple):
    """Channels of a program's group and of all, and elements from one pixel (of ``w``: one filter) to the next."""

    ci: int
    co: int
    channels: int
    x: int
    w: int
    y: int
    res: int


@triton.jit
def product_by_group(
    x, w, scale_ptr, shift_ptr, row, mask_m, co, size, geometry, group_ci, group_co, taps, PRE: tl.constexpr
):
    """The product of a tile, each column ``co`` from the input channels of its own group alone: slow, but apart.

    ``taps``: the filter's columns, the first of its taps, and the one behind the last.
    """
    h0 = row // size.Q % size.P * geometry.stride[0] - geometry.padding[0]
    w0 = row % size.Q * geometry.stride[1] - geometry.padding[1]
    image = row // (size.P * size.Q) * size.H
    acc = tl.zeros((row.shape[0], co.shape[0]), tl.float32)
    for k in range(bound(taps[1] * group_ci), bound(taps[2] * group_ci)):
        tap = k // group_ci
        h = h0 + tap // taps[0] * geometry.dilation[0]
        column = w0 + tap % taps[0] * geometry.dilation[1]
        inside = (mask_m & (h >= 0) & (h < size.H) & (column >= 0) & (column < size.W))[:, None]
        ci = co // group_co * group_ci + k % group_ci
        at = (((image + h) * size.W + column) * x.stride)[:, None] + ci[None, :]
        a = tl.load(x.ptr + at, mask=inside, other=0.0)
        b = tl.load(w.ptr + co * w.stride + k)
        if scale_ptr is not None:
            scale, shift = tl.load(scale_ptr + ci), tl.load(shift_ptr + ci)
            v = activate(tl.fma(a.to(tl.float32), scale[None, :], shift[None, :]), PRE)
            a = tl.where(inside, v, 0.0).to(a.dtype)
        acc += a.to(tl.float32) * b.to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def conv_forward_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    gate_ptr,
    res_ptr,
    y_ptr,
    moments_ptr,
    M,
    H,
    W,
    P,
    Q,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    eps,
    crop,
    widths,
    form: tl.constexpr,
    blocks: tl.constexpr,
):
    """``y[m, co] = epilogue(sum over r, s, ci of prologue(x[pixel(m, r, s), ci]) * w[co, r, s, ci])``.

    One program computes BLOCK_M pixels x BLOCK_N output channels of one group (or of several merged ones). It walks K
    tap by tap, each tap in chunks of BLOCK_K channels; which taps of a pixel lie inside the image is decoded once,
    before the loop. CI and CO are the channels of the group.

    FLAT: so few input channels that a chunk runs across taps: K = (r, s, ci) is cut every BLOCK_K wherever that falls.
    Where several groups are MERGED, CI and CO are those of all of them, and the filter is block-diagonal.
    SPLIT: the programs of the grid's third axis share a tile's steps through K; each stores its part of the sum, in y
    [splits, M, channels], for conv_forward_sum_kernel.
    BY_IMAGE: no tile crosses images, as where the epilogue multiplies with a gate for each image and channel.
    """
    R: tl.constexpr = form.R
    S: tl.constexpr = form.S
    MERGED: tl.constexpr = form.MERGED > 1
    POINTWISE: tl.constexpr = form.POINTWISE
    PADDED: tl.constexpr = form.PADDED
    FLAT: tl.constexpr = form.FLAT
    EVEN_CI: tl.constexpr = form.EVEN_CI
    ONE_CHUNK: tl.constexpr = form.ONE_CHUNK
    RES_PADDED: tl.constexpr = form.RES_PADDED
    PRE: tl.constexpr = form.PRE
    ACT: tl.constexpr = form.ACT
    SPLIT: tl.constexpr = form.SPLIT
    VECTOR: tl.constexpr = form.VECTOR
    PRECISION: tl.constexpr = form.PRECISION
    BLOCK_M: tl.constexpr = blocks.m
    BLOCK_N: tl.constexpr = blocks.n
    BLOCK_K: tl.constexpr = blocks.k
    OFFSET: tl.constexpr = tl.int64 if form.INT64 else tl.int32
    CI = widths.ci
    CO = widths.co
    group_ci = CI // form.MERGED
    group_co = CO // form.MERGED
    x_stride = widths.x
    w_stride = widths.w
    if VECTOR > 1:
        CI = CI // VECTOR * VECTOR
        CO = CO // VECTOR * VECTOR
        x_stride = x_stride // VECTOR * VECTOR
        w_stride = w_stride // VECTOR * VECTOR
    tiles_n = tl.cdiv(CO, BLOCK_N)
    pid = tl.program_id(0)
    group = tl.program_id(1)
    number = (pid // tiles_n).to(OFFSET)
    if form.BY_IMAGE:
        first_m, end_m = first_and_end(number, P * Q, BLOCK_M, OFFSET)
        offs_m = first_m + tl.arange(0, BLOCK_M)
        tiles_m = tl.num_programs(0) // tiles_n
    else:
        end_m = M
        offs_m = number * BLOCK_M + tl.arange(0, BLOCK_M)
        tiles_m = tl.cdiv(M, BLOCK_M)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read the first one instead: no mask in the loop, and the store drops them.
    mask_m = offs_m < end_m
    row = tl.where(mask_m, offs_m, 0)
    col = tl.where(offs_n < CO, offs_n, 0)

    if POINTWISE:
        pixel = row
    else:
        h0 = row // Q % P * stride_h - pad_h
        w0 = row % Q * stride_w - pad_w
        pixel = (row // (P * Q) * H + h0) * W + w0
    if PADDED:
        taps = tap_mask(h0, w0, mask_m, H, W, dil_h, dil_w, R, S)
        tap = tl.full((), 1, taps.dtype)

    x_tile = x_ptr + group * CI
    x_offs = (pixel * x_stride)[:, None]
    w_tile = w_ptr + group * CO * w_stride
    w_offs = (col * w_stride)[None, :] + offs_k[:, None]
    pitch = tl.full((), 1, OFFSET) * x_stride
    tap_step = dil_w * pitch
    row_step = (W * dil_h - (S - 1) * dil_w) * pitch
    if MERGED:
        same_group = (col // group_co)[None, :] == (offs_k // group_ci)[:, None]
        w_offs -= (col // group_co * group_ci)[None, :]
    if FLAT:
        c = offs_k % CI
        s = offs_k // CI % S
        r = offs_k // CI // S
        k_end = R * S * CI
        trips = tl.cdiv(k_end, BLOCK_K)
    else:
        x_offs += offs_k[None, :]
        if ONE_CHUNK:
            chunks = 1
        else:
            chunks = tl.cdiv(CI, BLOCK_K)
        trips = R * S * chunks
        chunk = 0
        s = 0
    x_at = x_tile + x_offs
    w_at = w_tile + w_offs
    x_step = tl.full((), 0, OFFSET)
    w_step = 0
    first = 0
    if SPLIT:
        # The steps follow each other through all taps: a share may begin and end within one.
        split = tl.program_id(2)
        first = trips * split // tl.num_programs(2)
        trips = trips * (split + 1) // tl.num_programs(2) - first
        if FLAT:
            w_step = first * BLOCK_K
            c = (w_step + offs_k) % CI
            s = (w_step + offs_k) // CI % S
            r = (w_step + offs_k) // CI // S
        else:
            chunk = first % chunks
            s = first // chunks % S
            x_step = first // chunks // S * dil_h * W * pitch + s * tap_step + chunk * BLOCK_K
            w_step = first // chunks * (group_ci if MERGED else CI) + chunk * BLOCK_K
            if PADDED:
                tap = tap << (first // chunks)
        y_ptr += split.to(tl.int64) * M * widths.y
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, bound(trips)):
        if FLAT:
            k_mask = offs_k < k_end - w_step
            a_at = x_at + (r * dil_h * W * pitch + s * tap_step + c)[None, :]
            if PADDED:
                a_mask = ((taps[:, None] >> (r * S + s)[None, :]) & 1 != 0) & k_mask[None, :]
            else:
                a_mask = k_mask[None, :]
            channel = c
        else:
            k_mask = offs_k < CI - chunk * BLOCK_K
            a_at = x_at + x_step
            if PADDED:
                a_mask = (taps & tap != 0)[:, None]
            else:
                a_mask = tl.full((BLOCK_M, 1), True, tl.int1)
            if not EVEN_CI:
                a_mask = a_mask & k_mask[None, :]
            channel = chunk * BLOCK_K + offs_k
        if PADDED or FLAT or not EVEN_CI:
            a = tl.load(a_at, mask=a_mask, other=0.0)
        else:
            a = tl.load(a_at)
        if MERGED:
            b = tl.load(w_at + w_step, mask=same_group & k_mask[:, None], other=0.0)
        elif FLAT or not EVEN_CI:
            b = tl.load(w_at + w_step, mask=k_mask[:, None], other=0.0)
        else:
            b = tl.load(w_at + w_step)
        if scale_ptr is not None:
            scale = load_channels(scale_ptr, group * CI + channel, k_mask)
            shift = load_channels(shift_ptr, group * CI + channel, k_mask)
            # Padding is zero after the transform, which would turn it into act(shift).
            v = activate(tl.fma(a.to(tl.float32), scale[None, :], shift[None, :]), PRE)
            a = tl.where(a_mask, v, 0.0).to(a.dtype)
        acc = dot(a, b, acc, PRECISION)

        w_step += BLOCK_K
        if FLAT:
            c += BLOCK_K % CI
            s += BLOCK_K // CI % S + (c >= CI)
            r += BLOCK_K // CI // S + (s >= S)
            c = tl.where(c >= CI, c - CI, c)
            s = tl.where(s >= S, s - S, s)
        else:
            x_step += BLOCK_K
            chunk += 1
            if R * S > 1:
                # By selection: where a loop branches, the compiler has no load begin before its own step.
                next_tap = chunk == chunks
                chunk = tl.where(next_tap, 0, chunk)
                s += next_tap
                next_row = s == S
                s = tl.where(next_row, 0, s)
                x_step += tl.where(next_tap, tl.where(next_row, row_step, tap_step) - chunks * BLOCK_K, 0)
                if MERGED or not EVEN_CI:
                    w_step += tl.where(next_tap, (group_ci if MERGED else CI) - chunks * BLOCK_K, 0)
                if PADDED:
                    tap = tap << tl.where(next_tap, 1, 0).to(tap.dtype)
    size = Size(H, W, P, Q)
    if MERGED:
        # A zero of the filter times another group's infinity or NaN is NaN.
        if not all_finite(acc):
            geometry = Geometry((stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w), 1)
            x, w = Pixels(x_ptr, x_stride), Pixels(w_ptr, w_stride)
            channel = group * CO + col
            walked = (S, first, first + trips)
            acc = product_by_group(
                x, w, scale_ptr, shift_ptr, row, mask_m, channel, size, geometry, group_ci, group_co, walked, PRE
            )

    norm = Norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps)
    if gate_ptr is not None:
        gate_ptr += first_m // (P * Q) * widths.channels
    res, y = Pixels(res_ptr, widths.res), Pixels(y_ptr, widths.y)
    moments = PerTile(moments_ptr, tiles_m, widths.channels, number)
    # Half a wide tile at a time: one whole would not leave room in the registers for the residual.
    PARTS: tl.constexpr = 2 if BLOCK_N >= 128 else 1
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    if PARTS == 2:
        parts = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, WIDTH)), (0, 2, 1)))
    else:
        parts = (acc,)
    for i in tl.static_range(PARTS):
        n = pid % tiles_n * BLOCK_N + i * WIDTH + tl.arange(0, WIDTH)
        tile = Tile(offs_m, group * CO + n, offs_m < end_m, n < CO)
        store_output(parts[i], tile, bias_ptr, norm, gate_ptr, res, crop, y, moments, size, RES_PADDED, ACT)


@triton.jit(do_not_specialize=["M", "P", "Q", "splits"])
def conv_forward_sum_kernel(
    partial_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    gate_ptr,
    res_ptr,
    y_ptr,
    M,
    P,
    Q,
    splits,
    eps,
    crop,
    channels,
    y_stride,
    res_stride,
    RES_PADDED: tl.constexpr,
    ACT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``y[m, co] = epilogue(sum over splits of partial[split, m, co])``, added in order.

    One program computes BLOCK_M pixels x BLOCK_N output channels, with a gate those of one image.
    """
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    tiles_n = tl.cdiv(channels, BLOCK_N)
    pid = tl.program_id(0)
    number = (pid // tiles_n).to(OFFSET)
    if gate_ptr is not None:
        first_m, end_m = first_and_end(number, P * Q, BLOCK_M, OFFSET)
        gate_ptr += first_m // (P * Q) * channels
    else:
        first_m, end_m = number * BLOCK_M, M
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = Tile(offs_m, offs_n, offs_m < end_m, offs_n < channels)
    mask = tile_mask(tile)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Four loads at a time, since each would wait for memory.
    for split in tl.range(0, bound(splits), loop_unroll_factor=4):
        part = partial_ptr + tl.cast(split, tl.int64) * M * channels
        acc += load_pixels(part, offs_m, channels, offs_n, mask)
    norm = Norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps)
    res, y = Pixels(res_ptr, res_stride), Pixels(y_ptr, y_stride)
    no_moments = PerTile(None, 0, 0, 0)
    store_output(acc, tile, bias_ptr, norm, gate_ptr, res, crop, y, no_moments, Size(0, 0, P, Q), RES_PADDED, ACT)


@lru_cache(maxsize=KEPT_LAYOUTS)
def default_config(problem: ConvProblem) -> TileConfig:
    """The tile where nothing was measured: wide enough for the tensor cores, small enough to fill the GPU."""
    ci, co = problem.tile_channels
    block_n = max(16, triton.next_power_of_2(co))
    k = problem.r * problem.s * ci if problem.flat else ci
    block_k = max(16, triton.next_power_of_2(k))
    if problem.arch == INTERPRETER:
        block_m = min(max(16, triton.next_power_of_2(problem.m)), 1024)
        return TileConfig(block_m, min(block_n, 512), min(block_k, 512))

    fp32 = problem.dtype == torch.float32
    # Tensor cores outrun loads there: what a step takes beside its products counts, and shared memory has room.
    fast = problem.arch in (80, 90, 100)
    if fp32 and not problem.tf32:
        block_k = min(block_k, 32 if problem.prologue else 16)
        block_m, block_n, stages = 64, min(block_n, 64), 2 if problem.prologue else 3
    else:
        wide = 128 if not fp32 and not problem.prologue else 64
        # Merged groups may have to be told apart in the end, which takes registers too.
        block_m = 64 if problem.arch == 100 or problem.flat or problem.merged > 1 else 128
        block_n = min(block_n, wide)
        # On sm_80, all channels of a tap at once would leave too few registers for the masks of the taps.
        deep = fast and not (problem.arch == 80 and problem.r * problem.s > 1 and ci <= 64)
        block_k = min(block_k, 32 if fp32 or problem.flat or (block_n == 128 and not deep) else 64)
        stages = 3 if block_k == 64 else 4
    if problem.merged > 1:
        block_k = max(16, triton.next_power_of_2(ci))
    elif not problem.flat and block_k == 64 and ci % 64 and ci % 32 == 0:
        block_k = 32
    multiprocessors = gpu_of(problem.arch).multiprocessors
    # Tiles of half the size load twice as much: wide ones on half of the GPU will do.
    enough = cdiv(multiprocessors, 2) if fast and not (fp32 or problem.prologue) else multiprocessors
    while _programs(problem, block_m, block_n) < enough and block_m * block_n > 64 * 64:
        if block_m >= block_n:
            block_m //= 2
        else:
            block_n //= 2
    registers = _registers(problem, block_m, block_n, block_k)
    return TileConfig(block_m, block_n, block_k, num_stages=stages, max_registers=registers)


def _registers(problem: ConvProblem, block_m: int, block_n: int, block_k: int) -> int | None:
    """How many a thread may have where the compiler would spill for a program more at a time; else as it likes."""
    if block_k == 64 and problem.arch in (100, 120):
        # On sm_120 shared memory has no room for another program anyway.
        return 255
    tensor, small = problem.dtype != torch.float32 or problem.tf32, (block_m, block_n) == (64, 64) and not problem.flat
    if (block_m, block_n) == (128, 32) and problem.merged == 1 and problem.arch in (86, 89, 120):
        return 192 if problem.dtype == torch.float32 else 168
    if (block_m, block_n) == (128, 32) and not problem.flat and tensor and problem.arch == 80:
        return 168
    if (block_m, block_n, block_k) == (64, 32, 32) and problem.merged > 1 and problem.prologue and problem.arch == 80:
        return 168 if tensor else None
    if (block_m, block_n) == (128, 16) and problem.dtype == torch.float32 and problem.arch == 80:
        return 96
    if small and tensor and not problem.prologue and problem.arch in (86, 89, 120):
        return 128
    if small and block_k == 32 and problem.dtype != torch.float32 and problem.arch in (80, 86, 89):
        return 128
    if problem.arch in (86, 89) and (block_m, block_n, block_k) == (128, 64, 64):
        return 255  # as on sm_120
    if problem.prologue and problem.arch in (86, 89) and (block_m, block_n, block_k) == (128, 64, 32):
        return 192
    return None if tensor else _without_tensor_cores(problem, block_n)


def _without_tensor_cores(problem: ConvProblem, block_n: int) -> int | None:
    """:func:`_registers` of a tile whose products are multiply-adds."""
    if problem.arch == 89 and problem.merged > 1 and not triton.__version__.startswith("3.6."):
        return 255
    if problem.arch == 90 and problem.prologue and block_n == 64:
        return 168
    return 96 if problem.arch == 120 and problem.flat and block_n == 16 else None


def steps(problem: ConvProblem, tile: TileConfig) -> int:
    """Of a program of ``tile`` through K, tap by tap and chunk by chunk: what can be split."""
    taps, ci = problem.r * problem.s, problem.tile_channels[0]
    return cdiv(taps * ci, tile.block_k) if problem.flat else taps * cdiv(ci, tile.block_k)


def split_tiles(problem: ConvProblem) -> Iterator[TileConfig]:
    """The default tile with its sum split in 2, 4 ..., until programs fill the GPU or each has a single step."""
    tile = default_config(problem)
    alone, most, splits = _programs(problem, tile.block_m, tile.block_n), steps(problem, tile), 2
    while splits <= most and alone * splits < 2 * gpu_of(problem.arch).multiprocessors:
        yield replace(tile, splits=splits)
        splits *= 2


WIDE = (80, 86, 89)
"""Architectures without TMA, whose compiler does not spill for :func:`wide_tiles`."""


def wide_tiles(problem: ConvProblem) -> Iterator[TileConfig]:
    """The widest default tile with twice the pixels and warps, whose products read less of shared memory; or none."""
    tile = default_config(problem)
    if problem.arch in WIDE and (tile.block_m, tile.block_n) == (128, 128):
        yield replace(tile, block_m=256, num_warps=8)


def _programs(problem: ConvProblem, block_m: int, block_n: int) -> int:
    co = problem.tile_channels[1]
    return cdiv(problem.m, block_m) * cdiv(co, block_n) * (problem.groups // problem.merged)


def conv_forward(
    x: Tensor,
    w: Tensor,
    *,
    geometry: Geometry = Geometry(),
    prologue: Prologue | None = None,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    gate: Tensor | None = None,
    residual: Residual | None = None,
    activation: Activation = IDENTITY,
    tf32: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """``act(norm(conv(prologue(x)) + bias)*gate + residual)``; every step but the convolution is optional.

    In one launch; or in two, where ``config`` splits the sum over K: one for its parts, one for what follows them.

    ``x`` [N, CI, H, W] and the residual are pixel-linear (channels_last, or a slice of its channels or images), ``w``
    [CO, CI/groups, R, S] is channels_last and has the dtype of ``x``. With a ``prologue``, padding is zero after it.
    ``gate``: contiguous [N, CO]. ``out``: a pixel-linear tensor [N, CO, P, Q] to write to. ``config``: the tile;
    without it, or where it has a box and TMA can not take these tensors, ``default_config``; with a ``gate`` cut down
    to one that does not cross images.

    Returns [N, CO, P, Q], channels_last, of ``out_dtype`` (that of ``x`` if not given). Raises ValueError for tensors
    that are not laid out so, RuntimeError where nothing can execute the kernel.
    """
    dtype = x.dtype if out_dtype is None else out_dtype
    epilogue = Epilogue(added(residual), _eps(norm), activation, layout(out) or dtype, gate is not None)
    chosen = conv_box.loadable(config, x, w, *(() if out is None else (out,)))
    launches = _launches(layout(x), layout(w), geometry, _before(prologue), epilogue, tf32, target_arch(), chosen)
    if out is None:
        out = _output(launches.product, x, w, dtype)
    _run(launches, x, w, prologue, bias, norm, gate, residual, out, None)
    return out


def conv_forward_moments(
    x: Tensor,
    w: Tensor,
    *,
    geometry: Geometry = Geometry(),
    prologue: Prologue | None = None,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    residual: Residual | None = None,
    activation: Activation = IDENTITY,
    tf32: bool = False,
    by_image: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor, Moments]:
    """What :func:`conv_forward` returns, in the dtype of ``x``, and its channels' moments, in one launch.

    Arguments as there, but that ``config`` may not split the sum. The moments are those of the rounded values.
    ``by_image``: no tile of them crosses images, to which the ``config`` is cut down.
    """
    if config is not None and config.splits != 1:
        raise ValueError(f"config.splits must be 1 where moments are taken; got {config.splits}")
    epilogue = Epilogue(added(residual), _eps(norm), activation, out=x.dtype)
    chosen = conv_box.loadable(config, x, w)
    launches = _launches(
        layout(x), layout(w), geometry, _before(prologue), epilogue, tf32, target_arch(), chosen, by_image
    )
    y = _output(launches.product, x, w, x.dtype)
    moments = _moments(launches.product, y, by_image)
    _run(launches, x, w, prologue, bias, norm, None, residual, y, moments)
    return y, moments


def _eps(norm: Norm | None) -> float:
    return 0.0 if norm is None else norm.eps


def _before(prologue: Prologue | None) -> Activation | None:
    return None if prologue is None else prologue.activation


def _moments(recipe: Recipe, y: Tensor, by_image: bool) -> Moments:
    """Those of ``y``, for the launch to fill in."""
    n, channels, p, q = y.shape
    rows, images = recipe.config.block_m, n if by_image else 1
    tiles = conv_box.moment_tiles(recipe) if recipe.boxes else images * cdiv(n * p * q // images, rows)
    values = torch.empty(2, tiles, channels, dtype=torch.float32, device=y.device)
    return Moments(values, rows, n * p * q, values.new_empty(tiles) if recipe.boxes else None, images)


class _Launches(NamedTuple):
    """Of the product; and where it is split, of the sum of its parts, behind which the epilogue comes."""

    product: Recipe
    total: Recipe | None = None


def _run(
    launches: _Launches,
    x: Tensor,
    w: Tensor,
    prologue: Prologue | None,
    bias: Tensor | None,
    norm: Norm | None,
    gate: Tensor | None,
    residual: Residual | None,
    y: Tensor,
    moments: Moments | None,
) -> None:
    mean, var, gamma, beta, _ = norm or (None, None, None, None, 0.0)
    scale, shift, _ = prologue or (None, None, None)
    epilogue: dict[str, Tensor | None] = {
        **{"bias_ptr": bias, "mean_ptr": mean, "var_ptr": var, "gamma_ptr": gamma, "beta_ptr": beta},
        "gate_ptr": gate,
        "res_ptr": None if residual is None else residual.tensor,
    }
    product, total = launches
    counts = None if moments is None else moments.counts
    own = {"counts_ptr": counts} if product.boxes else {"scale_ptr": scale, "shift_ptr": shift}
    own |= {"x_ptr": x, "w_ptr": w, "moments_ptr": None if moments is None else moments.values}
    if total is None:
        product.run(**own, **epilogue, y_ptr=y)
        return
    total.check(epilogue)
    parts = torch.empty(product.grid[2], *y.shape, dtype=torch.float32, device=y.device)
    product.run(**own, **dict.fromkeys(epilogue), y_ptr=parts)
    total.run(**epilogue, partial_ptr=parts, y_ptr=y)


@lru_cache(maxsize=KEPT_LAYOUTS)
def _launches(
    x: Layout,
    w: Layout,
    geometry: Geometry,
    before: Activation | None,
    epilogue: Epilogue,
    tf32: bool,
    arch: int,
    config: TileConfig | None,
    by_image: bool = False,
) -> _Launches:
    """``before``: the activation of the prologue, or None without one."""
    require_pixel_linear(x=x)
    require_channels_last_filter(w)
    n, ci, h, width = x.shape
    co, _, r, s = w.shape
    problem = ConvProblem(n, h, width, ci, co, r, s, *geometry, x.dtype, tf32, before is not None, arch)
    check_geometry(problem)
    by_image = by_image or epilogue.gated
    out = epilogue.out
    if not isinstance(out, Layout):
        out = channels_last((n, co, problem.p, problem.q), out)
    require_pixel_linear(out=out, residual=epilogue.residual.layout)
    _check(problem, w, out, epilogue.residual)
    if by_image and config is not None and config.box is not None:
        config = conv_box.within_images(problem, config)
    if config is not None and config.box is not None:
        if config.splits != 1:
            raise ValueError(f"config.splits must be 1 for a tile of boxes; got {config.splits}")
        vectors = _vectors(problem, prologue=False)
        boxed = conv_box.recipe(problem, x, w, out, epilogue, config, partial(_cost, problem), vectors, by_image)
        if boxed is not None:
            return _Launches(boxed)
        config = None
    tile = config or default_config(problem)
    if by_image:
        tile = _within_images(problem, tile)
    if not 1 <= tile.splits <= max(steps(problem, tile), 1):
        most = f"the steps of its tile through K, which are {steps(problem, tile)}"
        raise ValueError(f"config.splits must be at least 1 and at most {most}; got {tile.splits}")
    if tile.splits == 1:
        return _Launches(_product(problem, x, out, before, epilogue, tile, by_image))
    parts = channels_last((n, co, problem.p, problem.q), torch.float32)
    return _Launches(_product(problem, x, parts, before, Epilogue(), tile), _total(problem, out, epilogue, tile.splits))


def _within_images(problem: ConvProblem, tile: TileConfig) -> TileConfig:
    """``tile`` with hardly more pixels than an image has, and with registers for where each begins."""
    block_m = min(tile.block_m, max(64, triton.next_power_of_2(problem.p * problem.q)))
    products = problem.dtype == torch.float32 and not problem.tf32
    registers = 168 if products and problem.prologue and problem.arch in (86, 89, 120) else tile.max_registers
    tight = problem.arch in (80, 86, 89) or (problem.arch == 90 and products)
    if tight and triton.__version__.startswith("3.6."):
        registers = registers or 255
    return replace(tile, block_m=block_m, max_registers=registers)


def _product(
    problem: ConvProblem,
    x: Layout,
    out: Layout,
    before: Activation | None,
    epilogue: Epilogue,
    tile: TileConfig,
    by_image: bool = False,
) -> Recipe:
    res, crop = epilogue.residual.layout, epilogue.residual.crop(out.shape)
    far = _far(tile, x, out, res)
    widths = _widths(problem, x, out, res)
    scalars = {
        "M": problem.m,
        **sizes(problem),
        "eps": epilogue.eps,
        "crop": crop,
        "widths": widths,
        "form": _form(problem, tile, widths, crop, (before or IDENTITY, epilogue.activation), by_image, far),
        "blocks": blocks(tile),
    }
    images = problem.n if by_image else 1
    tiles = images * cdiv(problem.m // images, tile.block_m) * cdiv(problem.tile_channels[1], tile.block_n)
    grid = (tiles, problem.groups // problem.merged, *([tile.splits] if tile.splits > 1 else []))
    vectors = _vectors(problem, problem.prologue)
    return Recipe(conv_forward_kernel, grid, scalars, tile, partial(_cost, problem), vectors)


def _total(problem: ConvProblem, out: Layout, epilogue: Epilogue, splits: int) -> Recipe:
    block_n = min(64, max(16, triton.next_power_of_2(problem.co)))
    tile = TileConfig(
        1024 // block_n, block_n, 1, max_registers=64
    )  # without it, the compiler would spill for more warps
    res, crop = epilogue.residual.layout, epilogue.residual.crop(out.shape)
    scalars = {
        **{"M": problem.m, "P": problem.p, "Q": problem.q, "splits": splits},
        **{"eps": epilogue.eps, "crop": crop, "channels": problem.co},
        **{"y_stride": stride_of(out), "res_stride": stride_of(res)},
        **{"RES_PADDED": crop is not WHOLE, "ACT": epilogue.activation},
        "INT64": _far(tile, out, res),
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
    }
    images = problem.n if epilogue.gated else 1
    grid = (images * cdiv(problem.m // images, tile.block_m) * cdiv(problem.co, tile.block_n),)
    vectors = _vectors(problem, prologue=False)
    return Recipe(conv_forward_sum_kernel, grid, scalars, tile, partial(_total_cost, problem), vectors)


def _far(tile: TileConfig, *tensors: Layout | None) -> bool:
    """Whether an offset into one of the ``tensors``, all pixels of the last tile counted, passes 32 bits."""
    return max(map(span, tensors)) + tile.block_m >= 2**31


def _widths(problem: ConvProblem, x: Layout, out: Layout, res: Layout | None) -> Widths:
    ci, co = problem.tile_channels
    w = problem.r * problem.s * (problem.ci // problem.groups)
    return Widths(ci, co, problem.co, stride_of(x), w, stride_of(out), stride_of(res))


def _form(
    problem: ConvProblem,
    tile: TileConfig,
    widths: Widths,
    crop: Crop,
    activations: tuple[Activation, Activation],
    by_image: bool,
    far: bool,
) -> Form:
    ci, co = problem.tile_channels
    taps, padded = problem.r * problem.s, problem.padding != (0, 0)
    if problem.merged > 1 and ci > tile.block_k:
        raise ValueError(f"config.block_k must hold the {ci} input channels of merged groups; got {tile.block_k}")
    return Form(
        *(problem.r, problem.s),
        MERGED=problem.merged,
        POINTWISE=taps == 1 and problem.stride == (1, 1) and not padded,
        PADDED=padded,
        FLAT=problem.flat,
        EVEN_CI=ci % tile.block_k == 0,
        ONE_CHUNK=not problem.flat and ci <= tile.block_k,
        RES_PADDED=crop is not WHOLE,
        PRE=activations[0],
        ACT=activations[1],
        SPLIT=tile.splits > 1,
        BY_IMAGE=by_image,
        INT64=far,
        VECTOR=load_width(problem, ci, co, widths.x, widths.w),
        PRECISION=precision(problem),
    )


def _vectors(problem: ConvProblem, prologue: bool) -> dict[str, Vector]:
    co = problem.co
    vectors = {"bias_ptr": Vector("bias", (co,)), "gate_ptr": Vector("gate", (problem.n, co))}
    if prologue:
        for i, name in enumerate(("scale_ptr", "shift_ptr")):
            vectors[name] = Vector(f"prologue[{i}]", (problem.ci,), (torch.float32,))
    return vectors | {f"{name}_ptr": Vector(f"norm.{name}", (co,)) for name in ("mean", "var", "gamma", "beta")}


def _output(recipe: Recipe, x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (x.shape[0], w.shape[0], recipe.scalars["P"], recipe.scalars["Q"])
    return empty_channels_last(shape, dtype, x.device)


def _check(problem: ConvProblem, w: Layout, out: Layout, residual: Added) -> None:
    if w.dtype != problem.dtype:
        raise ValueError(f"w must have the dtype of x, {problem.dtype}; got {w.dtype}")
    if w.shape[1] * problem.groups != problem.ci or problem.co % problem.groups:
        raise ValueError(f"w of shape {tuple(w.shape)} does not fit {problem.ci} channels in {problem.groups} groups")
    if problem.padding != (0, 0) and problem.r * problem.s > 64:
        raise ValueError(f"with padding, w may have at most 64 taps, one per bit of a mask; got shape {tuple(w.shape)}")
    shape = (problem.n, problem.co, problem.p, problem.q)
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}; got {tuple(out.shape)}")
    residual.require_fits(shape)


def _cost(problem: ConvProblem, tensors: Mapping[str, Any]) -> Cost:
    x, y = tensors["x_ptr"], tensors["y_ptr"]
    vectors = ("w_ptr", "scale_ptr", "shift_ptr")
    read = problem.pixels_read * problem.ci * x.element_size() + _epilogue_reads(problem, tensors)
    read += sum(tensors[name].nbytes for name in vectors if tensors.get(name) is not None)
    depth = problem.r * problem.s * problem.ci // problem.groups
    moments = (tensors["moments_ptr"], tensors.get("counts_ptr"))
    written = y.nbytes + sum(t.nbytes for t in moments if t is not None)
    return Cost(2 * problem.m * problem.co * depth, read, written)


def _total_cost(problem: ConvProblem, tensors: Mapping[str, Any]) -> Cost:
    return Cost(0, tensors["partial_ptr"].nbytes + _epilogue_reads(problem, tensors), tensors["y_ptr"].nbytes)


def _epilogue_reads(problem: ConvProblem, tensors: Mapping[str, Any]) -> int:
    vectors, res = ("bias_ptr", "mean_ptr", "var_ptr", "gamma_ptr", "beta_ptr", "gate_ptr"), tensors["res_ptr"]
    read = sum(tensors[name].nbytes for name in vectors if tensors[name] is not None)
    return read if res is None else read + problem.m * res.shape[1] * res.element_size()
