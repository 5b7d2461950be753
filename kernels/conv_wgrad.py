"""Convolution, gradient of the filter: a matrix product as deep as there are pixels, split and added in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import IDENTITY, RELU, Activation, activate
from .conv import (
    RUNTIME_SIZES,
    ConvProblem,
    Geometry,
    blocks,
    check_geometry,
    group_sizes,
    load_width,
    precision,
    sizes,
)
from .gpus import gpu_of
from .launch import INTERPRETER, KEPT_LAYOUTS, Cost, Recipe, TileConfig, Vector, target_arch
from .memory import Layout, cdiv, empty_channels_last, layout, pixel_stride, require_pixel_linear, span, stride_of
from .tile import bound, dot, load_channels


class Form(NamedTuple):
    """What the compiled code depends on: the filter's size, and which of the kernel's cases it is.

    ``ACT``: the activation behind ``x_stats``. ``VECTOR``: see :func:`resnet_fused.kernels.conv.load_width`.
    """

    R: int
    S: int
    MERGED: bool
    POINTWISE: bool
    PADDED: bool
    FLAT: bool
    ACT: Activation
    INT64: bool
    VECTOR: int
    PRECISION: str


class Widths(NamedTuple):
    """Channels of a program's group and of all, and elements from one pixel (of ``w``: one filter) to the next."""

    ci: int
    co: int
    channels: int
    out_channels: int
    g: int
    x: int
    w: int


@triton.jit(do_not_specialize=[*RUNTIME_SIZES, "steps"])
def conv_wgrad_kernel(
    g_ptr,
    y_ptr,
    coefs_ptr,
    x_ptr,
    stats_ptr,
    dy_ptr,
    dw_ptr,
    M,
    H,
    W,
    P,
    Q,
    steps,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    group_ci,
    group_co,
    widths,
    form: tl.constexpr,
    blocks: tl.constexpr,
):
    """``dw[co, r, s, ci] = sum over pixels of dy[pixel, co] * a[pixel(r, s), ci]`` over one split's share of pixels.

    dy = A*g + B*y + C, stored at ``dy_ptr`` if given, and a = act(scale*x + shift), where there are vectors. One
    program computes BLOCK_M output channels x BLOCK_N input channels of one tap, of one group (or of several merged
    ones), from ``steps`` times BLOCK_K pixels, whose coordinates it carries along. CI and CO are the group's channels.

    FLAT: so few input channels that the columns run across taps.
    """
    R: tl.constexpr = form.R
    S: tl.constexpr = form.S
    MERGED: tl.constexpr = form.MERGED
    POINTWISE: tl.constexpr = form.POINTWISE
    PADDED: tl.constexpr = form.PADDED
    FLAT: tl.constexpr = form.FLAT
    ACT: tl.constexpr = form.ACT
    VECTOR: tl.constexpr = form.VECTOR
    PRECISION: tl.constexpr = form.PRECISION
    BLOCK_M: tl.constexpr = blocks.m
    BLOCK_N: tl.constexpr = blocks.n
    BLOCK_K: tl.constexpr = blocks.k
    OFFSET: tl.constexpr = tl.int64 if form.INT64 else tl.int32
    CI = widths.ci
    CO = widths.co
    g_stride = widths.g
    x_stride = widths.x
    w_stride = widths.w
    if VECTOR > 1:
        CI = CI // VECTOR * VECTOR
        CO = CO // VECTOR * VECTOR
        g_stride = g_stride // VECTOR * VECTOR
        x_stride = x_stride // VECTOR * VECTOR
    channels = widths.channels
    out_channels = widths.out_channels
    pid = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    tiles_m = tl.cdiv(CO, BLOCK_M)
    offs_co = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = pid // tiles_m
    if FLAT:
        offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < R * S * CI
        ci = offs_n % CI
        r = offs_n // CI // S
        s = offs_n // CI % S
    else:
        tiles_n = tl.cdiv(CI, BLOCK_N)
        ci = column % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = ci < CI
        r = column // tiles_n // S
        s = column // tiles_n % S
    mask_co = offs_co < CO
    co = group * CO + offs_co
    c = group * CI + ci
    if coefs_ptr is not None:
        dy_scale = load_channels(coefs_ptr, co, mask_co)
        if y_ptr is not None:
            dy_slope = load_channels(coefs_ptr + out_channels, co, mask_co)
            dy_constant = load_channels(coefs_ptr + 2 * out_channels, co, mask_co)
    if stats_ptr is not None:
        scale = load_channels(stats_ptr + 2 * channels, c, mask_n)
        shift = load_channels(stats_ptr + 3 * channels, c, mask_n)

    offs_k = tl.arange(0, BLOCK_K).to(OFFSET)
    first = split.to(OFFSET) * (steps * BLOCK_K)
    left = M - first
    g_pitch = tl.full((), 1, OFFSET) * g_stride
    g_tile = g_ptr + first * g_pitch
    g_offs = (offs_k * g_pitch)[:, None] + co[None, :]
    if y_ptr is not None:
        y_tile = y_ptr + first * g_pitch
    if dy_ptr is not None:
        dy_tile = dy_ptr + first * g_pitch
    x_pitch = tl.full((), 1, OFFSET) * x_stride
    if POINTWISE:
        x_tile = x_ptr + first * x_pitch
        x_offs = (offs_k * x_pitch)[:, None] + c[None, :]
    else:
        m = first + offs_k
        q = m % Q
        p = m // Q % P
        image = m // (P * Q)
        # The loop carries these along: there is no division in it.
        step_q = BLOCK_K % Q
        step_p = BLOCK_K // Q % P
        step_n = BLOCK_K // Q // P
        if FLAT:
            tap = (r * dil_h * W + s * dil_w) * x_pitch + c
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, bound(steps)):
        mask_m = offs_k < left
        inside = mask_m
        dy_mask = mask_m[:, None] & mask_co[None, :]
        dy = tl.load(g_tile + g_offs, mask=dy_mask, other=0.0)
        if POINTWISE:
            a_mask = mask_m[:, None] & mask_n[None, :]
            a = tl.load(x_tile + x_offs, mask=a_mask, other=0.0)
        else:
            h = p * stride_h - pad_h
            w = q * stride_w - pad_w
            if FLAT:
                a_mask = mask_m[:, None] & mask_n[None, :]
                if PADDED:
                    tap_h = h[:, None] + (r * dil_h)[None, :]
                    tap_w = w[:, None] + (s * dil_w)[None, :]
                    a_mask = a_mask & (tap_h >= 0) & (tap_h < H) & (tap_w >= 0) & (tap_w < W)
                column_offs = tap
            else:
                h += r * dil_h
                w += s * dil_w
                if PADDED:
                    inside = mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                a_mask = inside[:, None] & mask_n[None, :]
                column_offs = c
            row_offs = ((image * H + h) * W + w) * x_pitch
            a = tl.load(x_ptr + row_offs[:, None] + column_offs[None, :], mask=a_mask, other=0.0)
        if coefs_ptr is not None:
            v = dy.to(tl.float32) * dy_scale[None, :]
            if y_ptr is not None:
                y = tl.load(y_tile + g_offs, mask=dy_mask, other=0.0)
                v += tl.fma(y.to(tl.float32), dy_slope[None, :], dy_constant[None, :])
            dy = v.to(a.dtype)
            if dy_ptr is not None:
                if column == 0:
                    tl.store(dy_tile + g_offs, dy, mask=dy_mask)
        # Where there is no pixel, what the formulas make of zeros does not count: it is enough that one factor is zero.
        if coefs_ptr is not None or stats_ptr is not None:
            dy = tl.where(inside[:, None], dy, 0.0)
        if stats_ptr is not None:
            v = activate(tl.fma(a.to(tl.float32), scale[None, :], shift[None, :]), ACT)
            if FLAT:
                # Columns of one step lie inside and outside of the image, where the transform makes zero act(shift).
                v = tl.where(a_mask, v, 0.0)
            a = v.to(a.dtype)
        acc = dot(tl.trans(dy), a, acc, PRECISION)

        left -= BLOCK_K
        g_tile += BLOCK_K * g_pitch
        if y_ptr is not None:
            y_tile += BLOCK_K * g_pitch
        if dy_ptr is not None:
            dy_tile += BLOCK_K * g_pitch
        if POINTWISE:
            x_tile += BLOCK_K * x_pitch
        else:
            q += step_q
            p += step_p + (q >= Q).to(q.dtype)
            q = tl.where(q >= Q, q - Q, q)
            image += step_n + (p >= P).to(p.dtype)
            p = tl.where(p >= P, p - P, p)

    mask = mask_co[:, None] & mask_n[None, :]
    if MERGED:
        mask = mask & ((offs_co // group_co)[:, None] == (ci // group_ci)[None, :])
        ci -= ci // group_ci * group_ci
    if FLAT:
        within = offs_n
    else:
        within = (r * S + s) * (group_ci if MERGED else CI) + ci
    dw_at = split.to(tl.int64) * out_channels * w_stride + (co * w_stride)[:, None] + within[None, :]
    tl.store(dw_ptr + dw_at, acc.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["SIZE", "splits"])
def sum_splits_kernel(partial_ptr, dw_ptr, SIZE, splits, BLOCK_M: tl.constexpr):
    """``dw[i] = sum over splits of partial[split, i]``, in order, for BLOCK_M elements."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = i < SIZE
    acc = tl.zeros((BLOCK_M,), tl.float32)
    for split in range(0, bound(splits)):
        acc += tl.load(partial_ptr + split * SIZE.to(tl.int64) + i, mask=mask, other=0.0)
    tl.store(dw_ptr + i, acc.to(dw_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=KEPT_LAYOUTS)
def default_config(problem: ConvProblem) -> TileConfig:
    """Wide tiles, and splits for a wave of programs; for half of one where partial filters outweigh the pixels."""
    ci, co = problem.tile_channels
    columns = problem.r * problem.s * ci if problem.flat else ci
    block_m, block_n = (max(16, triton.next_power_of_2(size)) for size in (co, columns))
    if problem.arch == INTERPRETER:
        block_k = min(max(16, triton.next_power_of_2(problem.m)), 256)
        return TileConfig(min(block_m, 256), min(block_n, 256), block_k, splits=1 if problem.m <= 256 else 2)
    tile = _tile(problem, block_m, block_n)
    steps = cdiv(problem.m, tile.block_k)
    programs = filter_tiles(problem, tile)
    multiprocessors = gpu_of(problem.arch).multiprocessors
    wanted, least = multiprocessors // programs, cdiv(multiprocessors, 2 * programs)
    filter_bytes = 8 * problem.co * problem.r * problem.s * problem.ci // problem.groups
    pixel_bytes = (problem.m * problem.co + problem.n * problem.h * problem.w * problem.ci) * problem.dtype.itemsize
    affordable = pixel_bytes // (10 * filter_bytes)
    return replace(tile, splits=max(1, min(max(wanted, least), steps // 8, max(affordable, least))))


def _default(problem: ConvProblem, activation: Activation) -> TileConfig:
    """The default tile, of half the pixels where what ``activation`` takes would leave no registers for 64."""
    tile = default_config(problem)
    return tile if activation.light or problem.arch == INTERPRETER else replace(tile, block_k=min(tile.block_k, 32))


def _tile(problem: ConvProblem, block_m: int, block_n: int) -> TileConfig:
    """For a GPU; of the filter's rows and columns, as powers of two."""
    fp32, (ci, co) = problem.dtype == torch.float32, problem.tile_channels
    if fp32 and not problem.tf32:
        # With three stages of a 1x1 filter's pixels, these two would spill.
        pointwise = problem.prologue and problem.r * problem.s == 1 and min(block_m, block_n) >= 64
        four = pointwise and problem.arch in (86, 89)
        registers = 168 if problem.flat and problem.arch == 80 else None
        return TileConfig(min(block_m, 64), min(block_n, 64), 16, num_stages=4 if four else 3, max_registers=registers)
    slow = problem.arch in (86, 89, 120)
    weights = ci * co
    middle = problem.r * problem.s > 1 and min(ci, co) >= 128 and weights < 2**18 and ci % 8 == co % 8 == 0
    if problem.prologue and middle and not fp32 and not slow:
        # A prologue transforms a pixel anew in every tile: in a wide one, the tensor cores wait less for that. Of fewer
        # tiles, a filter of one tap or of many channels would be split into partial ones that move more bytes than a
        # wide tile saves; and loads of less than 16 bytes would make it spill.
        return TileConfig(128, 128, 32, num_warps=8)
    # Wide tiles ask less of L2. A small filter has few of them, and would be split into more partial ones.
    narrow = fp32 or problem.flat or slow or (problem.prologue and weights < 2**15)
    block_m, block_n = min(block_m, 64), min(block_n, 64 if narrow else 128)
    # 32 pixels a step would spill in a narrow tile of 16 bits, and so would masks that wait in a third stage for a
    # small one: the compiler gives registers to occupancy there. 64 would where each column has masks of its own.
    deep = 32 if fp32 or problem.flat or (problem.prologue and block_n == 128) else 64
    stages = 3 if block_m * block_n > 32 * 32 else 2
    return TileConfig(block_m, block_n, deep, num_stages=stages, max_registers=_registers(problem, block_m, block_n))


def _registers(problem: ConvProblem, block_m: int, block_n: int) -> int | None:
    """How many a thread may have where the compiler would spill for a program more at a time; else as it likes."""
    if problem.arch in (86, 89) and block_m * block_n == 16 * 16:
        return 96
    if problem.dtype == torch.float32:
        return None
    if problem.arch == 80 and block_m * block_n == 32 * 32:
        return 168
    return 255 if problem.arch == 100 and block_m == 64 and block_n <= 64 else None


def filter_tiles(problem: ConvProblem, tile: TileConfig) -> int:
    """How many tiles make up the whole filter."""
    ci, co = problem.tile_channels
    taps = problem.r * problem.s
    columns = cdiv(taps * ci, tile.block_n) if problem.flat else taps * cdiv(ci, tile.block_n)
    return cdiv(co, tile.block_m) * columns * (problem.groups // problem.merged)


def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    filter_size: tuple[int, int],
    *,
    geometry: Geometry = Geometry(),
    y: Tensor | None = None,
    coefs: Tensor | None = None,
    x_stats: Tensor | None = None,
    activation: Activation = RELU,
    dy_out: Tensor | None = None,
    tf32: bool = False,
    out_dtype: torch.dtype | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Gradient [CO, CI/groups, R, S] of the filter of a convolution of ``x`` [N, CI, H, W].

    ``dy`` [N, CO, P, Q]: the gradient of its output; or, with ``coefs`` fp32 [3, CO], the g of
    ``dy = coefs[0]*g + coefs[1]*y + coefs[2]`` (``y`` None: only the first term). ``x_stats`` fp32 [5, CI]: the
    convolution's input was ``act(scale*x + shift)``, with ``activation``. ``dy_out``: where to keep dy, laid out in
    memory as ``dy`` is.

    Returns it channels_last, of ``out_dtype`` (that of ``x`` if not given). Raises ValueError for tensors that are not
    laid out so.
    """
    before = None if x_stats is None else activation
    inputs = _Inputs(layout(dy), layout(x), layout(y), layout(dy_out), coefs is not None, before)
    recipe = _recipe(inputs, tuple(filter_size), geometry, tf32, target_arch(), config)
    shape = (dy.shape[1], x.shape[1] // geometry.groups, *filter_size)
    dw = empty_channels_last(shape, out_dtype or x.dtype, x.device)
    splits = recipe.grid[2]
    if splits == 0:
        return dw.zero_()
    partials = dw if splits == 1 else torch.empty(splits, dw.numel(), dtype=torch.float32, device=x.device)
    recipe.run(g_ptr=dy, y_ptr=y, coefs_ptr=coefs, x_ptr=x, stats_ptr=x_stats, dy_ptr=dy_out, dw_ptr=partials)
    if splits > 1:
        _sum_recipe(dw.numel(), splits).run(partial_ptr=partials, dw_ptr=dw)
    return dw


class _Inputs(NamedTuple):
    dy: Layout
    x: Layout
    y: Layout | None
    dy_out: Layout | None
    coefs: bool
    before: Activation | None


@lru_cache(maxsize=KEPT_LAYOUTS)
def _recipe(
    inputs: _Inputs,
    filter_size: tuple[int, int],
    geometry: Geometry,
    tf32: bool,
    arch: int,
    config: TileConfig | None,
) -> Recipe:
    """For the sum over all pixels, or for ``grid[2]`` partial ones (0 where there are no pixels)."""
    dy, x, *_ = inputs
    require_pixel_linear(dy=dy, x=x)
    n, ci, h, w = x.shape
    r, s = filter_size
    co, groups = dy.shape[1], geometry.groups
    prologue = inputs.coefs or inputs.before is not None
    problem = ConvProblem(n, h, w, ci, co, r, s, *geometry, x.dtype, tf32, prologue, arch)
    check_geometry(problem)
    _check(problem, inputs)
    tile = config or _default(problem, inputs.before or IDENTITY)
    steps = cdiv(cdiv(problem.m, tile.block_k), tile.splits)
    far = max(map(span, (dy, x))) + steps * tile.block_k * max(ci, co) >= 2**31
    widths = _widths(problem, dy, x)
    scalars = {
        "M": problem.m,
        **sizes(problem),
        **group_sizes(problem),
        "steps": steps,
        "widths": widths,
        "form": _form(problem, widths, inputs.before or IDENTITY, far),
        "blocks": blocks(tile),
    }
    parts = groups // problem.merged
    splits = cdiv(problem.m, steps * tile.block_k) if problem.m else 0
    grid = (filter_tiles(problem, tile) // parts, parts, splits)
    vectors = {
        "coefs_ptr": Vector("coefs", (3, co), (torch.float32,)),
        "stats_ptr": Vector("x_stats", (5, ci), (torch.float32,)),
    }
    return Recipe(conv_wgrad_kernel, grid, scalars, tile, partial(_cost, problem), vectors)


def _widths(problem: ConvProblem, dy: Layout, x: Layout) -> Widths:
    ci, co = problem.tile_channels
    w = problem.r * problem.s * (problem.ci // problem.groups)
    return Widths(ci, co, problem.ci, problem.co, stride_of(dy), stride_of(x), w)


def _form(problem: ConvProblem, widths: Widths, activation: Activation, far: bool) -> Form:
    padded = problem.padding != (0, 0)
    return Form(
        *(problem.r, problem.s),
        MERGED=problem.merged > 1,
        POINTWISE=problem.r * problem.s == 1 and problem.stride == (1, 1) and not padded,
        PADDED=padded,
        FLAT=problem.flat,
        ACT=activation,
        INT64=far,
        VECTOR=load_width(problem, widths.ci, widths.co, widths.g, widths.x),
        PRECISION=precision(problem),
    )


@lru_cache(maxsize=KEPT_LAYOUTS)
def _sum_recipe(size: int, splits: int) -> Recipe:
    tile = TileConfig(1024, 1, 1)
    scalars = {"SIZE": size, "splits": splits, "BLOCK_M": tile.block_m}
    return Recipe(sum_splits_kernel, (cdiv(size, tile.block_m),), scalars, tile, _sum_cost)


def _sum_cost(tensors: Mapping[str, Any]) -> Cost:
    return Cost(0, tensors["partial_ptr"].nbytes, tensors["dw_ptr"].nbytes)


def _check(problem: ConvProblem, inputs: _Inputs) -> None:
    dy, x, y, dy_out, coefs, _ = inputs
    require_pixel_linear(y=y, dy_out=dy_out)
    if tuple(dy.shape) != (problem.n, problem.co, problem.p, problem.q):
        raise ValueError(f"dy must have shape [{problem.n}, CO, {problem.p}, {problem.q}]; got {tuple(dy.shape)}")
    if not problem.ci or not problem.co or problem.ci % problem.groups or problem.co % problem.groups:
        raise ValueError(f"geometry.groups must divide {problem.ci} and {problem.co} channels; got {problem.groups}")
    for name, t in (("y", y), ("dy_out", dy_out)):
        if t is not None and (t.shape != dy.shape or pixel_stride(t) != pixel_stride(dy)):
            raise ValueError(f"{name} must lie in memory as dy, {tuple(dy.shape)}; got {tuple(t.shape)}, {t.strides}")
        if t is not None and not coefs:
            raise ValueError(f"{name} needs coefs: without them dy is given as it is")
    if not coefs and dy.dtype != x.dtype:
        raise ValueError(f"dy must have the dtype of x, {x.dtype}, unless coefs are given; got {dy.dtype}")


def _cost(problem: ConvProblem, tensors: Mapping[str, Any]) -> Cost:
    g, y, x, dy_out = (tensors[name] for name in ("g_ptr", "y_ptr", "x_ptr", "dy_ptr"))
    read = g.nbytes + problem.pixels_read * problem.ci * x.element_size()
    if y is not None:
        read += y.nbytes
    if tensors["coefs_ptr"] is not None:
        read += 4 * problem.co * (1 if y is None else 3)
    if tensors["stats_ptr"] is not None:
        read += 4 * problem.ci * 2
    written = tensors["dw_ptr"].nbytes + (0 if dy_out is None else dy_out.nbytes)
    depth = problem.r * problem.s * problem.ci // problem.groups
    return Cost(2 * problem.m * problem.co * depth, read, written)
