"""Convolution, gradient of the input: an implicit matrix product over the taps that reach each pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import conv_box, conv_forward, dgrad_box
from .activation import IDENTITY, RELU, Activation
from .conv import (
    RUNTIME_SIZES,
    WALK,
    ConvProblem,
    Geometry,
    Size,
    blocks,
    check_geometry,
    group_sizes,
    load_width,
    parity_walk,
    precision,
    sizes,
)
from .epilogue import WHOLE, Added, Residual, added, fits, require_step, store_gradient
from .gpus import gpu_of
from .launch import INTERPRETER, KEPT_LAYOUTS, Cost, Recipe, TileConfig, Vector, target_arch
from .memory import (
    Layout,
    cdiv,
    empty_channels_last,
    layout,
    pixel_stride,
    require_channels_last_filter,
    require_pixel_linear,
    span,
    stride_of,
)
from .tile import PerTile, Pixels, Tile, all_finite, bound, dot, first_tap, load_channels, tap_mask


class Form(NamedTuple):
    """What the compiled code depends on: the filter's size, and which of the kernel's cases it is.

    ``ACT``: the activation that the input is the output of.
    ``VECTOR``: see :func:`resnet_fused.kernels.conv.load_width`.
    """

    R: int
    S: int
    MERGED: bool
    POINTWISE: bool
    EVEN_CI: bool
    EVEN_CO: bool
    ONE_CHUNK: bool
    STRIDED: bool
    CUT_SPARSE: bool
    ACT: Activation
    INT64: bool
    VECTOR: int
    PRECISION: str


class Widths(NamedTuple):
    """Channels of a program's group and of all, and elements from one pixel of each tensor to the next.

    Of the filter: from one output channel (``w``) and from one tap to the next.
    """

    ci: int
    co: int
    channels: int
    out_channels: int
    g: int
    w: int
    tap: int
    cut: int
    y_in: int


@triton.jit
def product_by_group(g, y_ptr, coefs_ptr, w, w_tap, place, mask_m, ci, size, geometry, group_ci, group_co, taps):
    """The product of a tile, each column ``ci`` from the output channels of its own group alone: slow, but apart.

    ``place``: image, row and column of each pixel.
    """
    R, S = taps
    n, h, column = place
    out_channels = group_co * geometry.groups
    acc = tl.zeros((h.shape[0], ci.shape[0]), tl.float32)
    for k in range(0, bound(R * S * group_co)):
        tap = k // group_co
        up = h + geometry.padding[0] - tap // S * geometry.dilation[0]
        left = column + geometry.padding[1] - tap % S * geometry.dilation[1]
        p = up // geometry.stride[0]
        q = left // geometry.stride[1]
        reached = (up >= 0) & (left >= 0) & (up % geometry.stride[0] == 0) & (left % geometry.stride[1] == 0)
        inside = (mask_m & reached & (p < size.P) & (q < size.Q))[:, None]
        co = ci // group_ci * group_co + k % group_co
        at = (((n * size.P + p) * size.Q + q) * g.stride)[:, None] + co[None, :]
        a = tl.load(g.ptr + at, mask=inside, other=0.0)
        b = tl.load(w.ptr + co * w.stride + tap * w_tap + ci % group_ci)
        if coefs_ptr is not None:
            v = a.to(tl.float32) * tl.load(coefs_ptr + co)[None, :]
            if y_ptr is not None:
                y = tl.load(y_ptr + at, mask=inside, other=0.0)
                scale, constant = tl.load(coefs_ptr + out_channels + co), tl.load(coefs_ptr + 2 * out_channels + co)
                v += tl.fma(y.to(tl.float32), scale[None, :], constant[None, :])
            a = tl.where(inside, v, 0.0).to(b.dtype)
        acc += a.to(tl.float32) * b.to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=[*RUNTIME_SIZES, *WALK])
def conv_dgrad_kernel(
    g_ptr,
    y_ptr,
    coefs_ptr,
    w_ptr,
    cut_ptr,
    y_in_ptr,
    stats_ptr,
    dx_ptr,
    sums_ptr,
    N,
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
    tap_h,
    tap_w,
    hop_h,
    hop_w,
    group_ci,
    group_co,
    crop,
    widths,
    form: tl.constexpr,
    blocks: tl.constexpr,
):
    """``dx[pixel, ci] = epilogue(sum over r, s, co of dy[p, q, co] * w[co, r, s, ci])``, dy = A*g + B*y + C.

    Pixel (h, w) hears tap (r, s) of output (p, q) where ``p*stride + r*dilation - padding = h``, so only pixels of one
    parity (h and w modulo the stride) hear the same taps, every ``tap``-th one: a parity is a convolution of stride 1
    over dy, whose position moves back by ``hop`` from tap to tap. One program computes BLOCK_M pixels of one parity x
    BLOCK_N input channels of one group (or of several merged ones). CI and CO are the channels of the group.

    ``cut``: the gradient of the shortcut. CUT_SPARSE: it belongs to every ``cut_step``-th pixel, or is wider.
    """
    R: tl.constexpr = form.R
    S: tl.constexpr = form.S
    MERGED: tl.constexpr = form.MERGED
    POINTWISE: tl.constexpr = form.POINTWISE
    EVEN_CI: tl.constexpr = form.EVEN_CI
    EVEN_CO: tl.constexpr = form.EVEN_CO
    ONE_CHUNK: tl.constexpr = form.ONE_CHUNK
    STRIDED: tl.constexpr = form.STRIDED
    CUT_SPARSE: tl.constexpr = form.CUT_SPARSE
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
    w_stride = widths.w
    w_tap = widths.tap
    if VECTOR > 1:
        CI = CI // VECTOR * VECTOR
        CO = CO // VECTOR * VECTOR
        g_stride = g_stride // VECTOR * VECTOR
        w_stride = w_stride // VECTOR * VECTOR
        w_tap = w_tap // VECTOR * VECTOR
    channels = widths.channels
    out_channels = widths.out_channels
    tiles_n = tl.cdiv(CI, BLOCK_N)
    pid = tl.program_id(0)
    group = tl.program_id(1)
    parity = tl.program_id(2)
    first_h = parity // stride_w
    first_w = parity % stride_w
    # An image smaller than the stride leaves parities without pixels.
    present = (first_h < H) & (first_w < W)
    rows = tl.maximum(tl.cdiv(H - first_h, stride_h), 1)
    columns = tl.maximum(tl.cdiv(W - first_w, stride_w), 1)
    N = tl.where(present, N, 0)
    offs_m = (pid // tiles_n).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < N * rows * columns
    row = tl.where(mask_m, offs_m, 0)
    mask_n = offs_n < CI
    col = offs_n
    if MERGED:
        col = tl.where(mask_n, offs_n, 0)
    n = row // (rows * columns)
    i = row // columns % rows
    j = row % columns

    r = first_tap(first_h + pad_h, stride_h, dil_h, R)
    s = first_tap(first_w + pad_w, stride_w, dil_w, S)
    taps_h = tl.cdiv(R - r, tap_h)
    taps_w = tl.cdiv(S - s, tap_w)
    p = i + (first_h + pad_h - r * dil_h) // stride_h
    q = j + (first_w + pad_w - s * dil_w) // stride_w
    if POINTWISE:
        source = (n * P + i) * Q + j
    else:
        source = (n * P + p) * Q + q
        taps = tap_mask(p, q, mask_m, P, Q, -hop_h, -hop_w, R, S)
        tap = tl.full((), 1, taps.dtype)

    g_offs = (source * g_stride)[:, None] + (group * CO + offs_k)[None, :]
    w_tile = w_ptr + group * CO * w_stride + (r * S + s) * w_tap
    w_offs = (offs_k * w_stride)[:, None] + col[None, :]
    if MERGED:
        w_offs -= (col // group_ci * group_ci)[None, :]
    pitch = tl.full((), 1, OFFSET) * g_stride
    if ONE_CHUNK:
        chunks = 1
    else:
        chunks = tl.cdiv(CO, BLOCK_K)
    # From the last chunk of a tap to the next tap, and from the last tap of a row to the next row.
    g_next_tap = -chunks * BLOCK_K - hop_w * pitch
    g_next_row = g_next_tap + (taps_w * hop_w - hop_h * Q) * pitch
    w_next_tap = tap_w * w_tap - chunks * BLOCK_K * w_stride
    w_next_row = w_next_tap + (tap_h * S - taps_w * tap_w) * w_tap
    g_step = tl.full((), 0, OFFSET)
    w_step = 0
    chunk = 0
    along = 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, bound(taps_h * taps_w * chunks)):
        channel = chunk * BLOCK_K + offs_k
        k_mask = channel < CO
        if POINTWISE:
            a_mask = tl.full((BLOCK_M, 1), True, tl.int1)
        else:
            a_mask = (taps & tap != 0)[:, None]
        if not EVEN_CO:
            a_mask = a_mask & k_mask[None, :]
        if POINTWISE and EVEN_CO:
            a = tl.load(g_ptr + g_step + g_offs)
        else:
            a = tl.load(g_ptr + g_step + g_offs, mask=a_mask, other=0.0)
        if MERGED:
            same_group = (col // group_ci)[None, :] == (channel // group_co)[:, None]
            b = tl.load(w_tile + w_step + w_offs, mask=same_group & k_mask[:, None], other=0.0)
        elif EVEN_CO and EVEN_CI:
            b = tl.load(w_tile + w_step + w_offs)
        else:
            b = tl.load(w_tile + w_step + w_offs, mask=k_mask[:, None] & mask_n[None, :], other=0.0)
        if coefs_ptr is not None:
            c = group * CO + channel
            v = a.to(tl.float32) * load_channels(coefs_ptr, c, k_mask)[None, :]
            if y_ptr is not None:
                if POINTWISE and EVEN_CO:
                    y = tl.load(y_ptr + g_step + g_offs)
                else:
                    y = tl.load(y_ptr + g_step + g_offs, mask=a_mask, other=0.0)
                scale = load_channels(coefs_ptr + out_channels, c, k_mask)
                constant = load_channels(coefs_ptr + 2 * out_channels, c, k_mask)
                v += tl.fma(y.to(tl.float32), scale[None, :], constant[None, :])
            # Outside the image there is no dy, whatever the formula makes of zeros.
            a = tl.where(a_mask, v, 0.0).to(b.dtype)
        acc = dot(a, b, acc, PRECISION)

        g_step += BLOCK_K
        w_step += BLOCK_K * w_stride
        chunk += 1
        if R * S > 1:
            # By selection: where a loop branches, the compiler has no load begin before its own step.
            next_tap = chunk == chunks
            chunk = tl.where(next_tap, 0, chunk)
            along += next_tap
            next_row = along == taps_w
            along = tl.where(next_row, 0, along)
            g_step += tl.where(next_tap, tl.where(next_row, g_next_row, g_next_tap), 0)
            w_step += tl.where(next_tap, tl.where(next_row, w_next_row, w_next_tap), 0)
            tap = tap << tl.where(next_row, S - taps_w + 1, tl.where(next_tap, 1, 0)).to(tap.dtype)
    if MERGED:
        # A zero of the filter times another group's infinity or NaN is NaN.
        if not all_finite(acc):
            geometry = Geometry((stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w), out_channels // group_co)
            g, w, size = Pixels(g_ptr, g_stride), Pixels(w_ptr, w_stride), Size(H, W, P, Q)
            place = n, first_h + i * stride_h, first_w + j * stride_w
            c = group * CI + col
            acc = product_by_group(
                g, y_ptr, coefs_ptr, w, w_tap, place, mask_m, c, size, geometry, group_ci, group_co, (R, S)
            )

    image = offs_m // (rows * columns)
    h = first_h + offs_m // columns % rows * stride_h
    w = first_w + offs_m % columns * stride_w
    if STRIDED:
        pixel = (image * H + h) * W + w
    else:
        pixel = offs_m
    tiles = tl.num_programs(0) // tiles_n
    number = parity * tiles + pid // tiles_n
    sums = PerTile(sums_ptr, tiles * tl.num_programs(2), channels, number)
    cut, y_in = Pixels(cut_ptr, widths.cut), Pixels(y_in_ptr, widths.y_in)
    # Half a wide tile at a time: one whole would not leave room in the registers for the other tensors.
    PARTS: tl.constexpr = 2 if BLOCK_N >= 128 else 1
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    if PARTS == 2:
        parts = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, WIDTH)), (0, 2, 1)))
    else:
        parts = (acc,)
    for part in tl.static_range(PARTS):
        c = pid % tiles_n * BLOCK_N + part * WIDTH + tl.arange(0, WIDTH)
        tile = Tile(pixel, group * CI + c, offs_m < N * rows * columns, c < CI)
        place = image, h, w
        store_gradient(parts[part], tile, place, cut, crop, y_in, stats_ptr, dx_ptr, sums, CUT_SPARSE, ACT)


def conv_dgrad(
    dy: Tensor,
    w: Tensor,
    size: tuple[int, int],
    *,
    geometry: Geometry = Geometry(),
    y: Tensor | None = None,
    coefs: Tensor | None = None,
    shortcut: Residual | None = None,
    mask: tuple[Tensor, Tensor] | None = None,
    activation: Activation = RELU,
    tf32: bool = False,
    out_dtype: torch.dtype | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the input, [N, CI, *size], of a convolution with filter ``w`` [CO, CI/groups, R, S].

    ``dy`` [N, CO, P, Q]: the gradient of its output, of the dtype of ``w``; or, with ``coefs`` fp32 [3, CO], the g of
    ``dy = coefs[0]*g + coefs[1]*y + coefs[2]`` (``y`` None: only the first term), which is rounded to that dtype.
    ``shortcut``: its channels from ``before`` on are added to every ``step``-th pixel. ``mask`` = (y_in [N, CI, *size],
    stats fp32 [5, CI]): the input was ``act(scale*y_in + shift)``, with ``activation``, and the gradient in front of
    that is wanted. Tensors are pixel-linear, ``w`` is channels_last.

    Returns it, channels_last, of ``out_dtype`` (that of ``w`` if not given); and with a mask fp32 [2, T, CI], tile by
    tile the sums of it and of its product with ``y_in - mean``, of the rounded values. Raises ValueError for tensors
    that do not fit, and for filters of more than 64 taps.
    """
    y_in, stats = mask or (None, None)
    act = IDENTITY if mask is None else activation
    inputs = _Inputs(layout(dy), layout(w), layout(y), added(shortcut), layout(y_in), act)
    dtype = w.dtype if out_dtype is None else out_dtype
    chosen = conv_box.loadable(config, dy, w)
    recipe = _recipe(inputs, coefs is not None, tuple(size), geometry, tf32, target_arch(), chosen)
    channels = w.shape[1] * geometry.groups
    shape = (dy.shape[0], channels, *size)
    dx = empty_channels_last(shape, dtype, dy.device)
    sums = None
    if mask is not None:
        sums = torch.empty(2, _tiles(recipe), channels, dtype=torch.float32, device=dy.device)
    own = {} if recipe.boxes else {"y_ptr": y, "coefs_ptr": coefs}
    recipe.run(
        g_ptr=dy,
        w_ptr=w,
        cut_ptr=None if shortcut is None else shortcut.tensor,
        y_in_ptr=y_in,
        stats_ptr=stats,
        dx_ptr=dx,
        sums_ptr=sums,
        **own,
    )
    return dx, sums


class _Inputs(NamedTuple):
    dy: Layout
    w: Layout
    y: Layout | None
    shortcut: Added
    y_in: Layout | None
    activation: Activation


@lru_cache(maxsize=KEPT_LAYOUTS)
def _recipe(
    inputs: _Inputs,
    prologue: bool,
    size: tuple[int, int],
    geometry: Geometry,
    tf32: bool,
    arch: int,
    config: TileConfig | None,
) -> Recipe:
    dy, w, _, shortcut, y_in, activation = inputs
    require_pixel_linear(dy=dy)
    require_channels_last_filter(w)
    n, co, _, _ = dy.shape
    h, width = size
    ci, r, s = w.shape[1] * geometry.groups, *w.shape[2:]
    problem = ConvProblem(n, h, width, ci, co, r, s, *geometry, w.dtype, tf32, prologue, arch)
    check_geometry(problem)
    _check(problem, inputs)
    _check_shortcut(problem, shortcut)
    vectors = {"stats_ptr": Vector("mask[1]", (5, ci), (torch.float32,))}
    if config is not None and config.box is not None:
        boxed = dgrad_box.recipe(problem, dy, y_in, shortcut, activation, config, partial(_cost, problem), vectors)
        if boxed is not None:
            return boxed
        config = None
    vectors["coefs_ptr"] = Vector("coefs", (3, co), (torch.float32,))
    epilogue = y_in is not None or shortcut.layout is not None
    return _gathered(problem, inputs, config or _default(problem, epilogue, activation), vectors)


def _gathered(problem: ConvProblem, inputs: _Inputs, tile: TileConfig, vectors: Mapping[str, Vector]) -> Recipe:
    dy, _, _, shortcut, y_in, activation = inputs
    image = problem.n, problem.ci, problem.h, problem.w
    transposed, crop, stride = _transposed(problem), shortcut.crop(image), problem.stride
    tiles = cdiv(problem.n * cdiv(problem.h, stride[0]) * cdiv(problem.w, stride[1]), tile.block_m)
    reach = max(_reach(problem, dy), prod(image), *map(span, (shortcut.layout, y_in)))
    far = reach + tile.block_m >= 2**31
    widths = _widths(problem, transposed, inputs)
    scalars = {
        "N": problem.n,
        **sizes(problem),
        **group_sizes(problem),
        **parity_walk(problem),
        "crop": crop,
        "widths": widths,
        "form": _form(problem, transposed, tile, widths, activation, sparse=crop is not WHOLE, far=far),
        "blocks": blocks(tile),
    }
    columns, parts = transposed.tile_channels[1], problem.groups // transposed.merged
    grid = (tiles * cdiv(columns, tile.block_n), parts, prod(stride))
    return Recipe(conv_dgrad_kernel, grid, scalars, tile, partial(_cost, problem), vectors)


def _transposed(problem: ConvProblem) -> ConvProblem:
    """The product as the choice of a tile sees it: rows are input pixels, columns input channels."""
    # Without tensor cores, this prologue fits the tile of a product without one.
    prologue = problem.prologue and (problem.tf32 or problem.dtype != torch.float32)
    return ConvProblem(
        *(problem.n, problem.h, problem.w, problem.co, problem.ci, 1, 1, (1, 1), (0, 0), (1, 1)),
        *(problem.groups, problem.dtype, problem.tf32, prologue, problem.arch),
    )


def _default(problem: ConvProblem, epilogue: bool, activation: Activation) -> TileConfig:
    """The default tile; the compiler would spill for a second program of eight warps beside a derivative."""
    tile = default_config(problem, epilogue)
    tight = problem.arch == 100 and tile.num_warps == 8 and not activation.light
    return replace(tile, max_registers=255) if tight else tile


@lru_cache(maxsize=KEPT_LAYOUTS)
def default_config(problem: ConvProblem, epilogue: bool) -> TileConfig:
    """The tile where nothing was measured: that of the transposed product, lower where more is read."""
    transposed = _transposed(problem)
    tile = conv_forward.default_config(transposed)
    if not (epilogue or problem.prologue) or transposed.arch == INTERPRETER:
        # Two strides, of the filter's taps and of its channels, take registers that chunks of 64 would leave none for.
        spills = transposed.arch == 80 and (tile.block_m, tile.block_n, tile.block_k) == (128, 128, 64)
        if transposed.arch == 80 and (tile.block_m, tile.block_n, tile.block_k) == (128, 64, 64):
            return replace(tile, max_registers=255)  # the compiler would spill for a third program
        return replace(tile, block_k=32, num_stages=4) if spills else tile
    if _fills_wide_tiles(transposed):
        return TileConfig(128, 128, 32 if transposed.tile_channels[0] % 64 else 64, num_warps=8)
    tile = replace(tile, block_m=min(tile.block_m, 64))  # its tensors need registers too
    if problem.dtype == torch.float32 and not problem.tf32 and tile.block_n >= 32:
        # By itself the compiler spills. Of 32 columns it makes do with 128, told so; else it takes up to 156.
        return replace(tile, max_registers=144 if tile.block_n == 32 else 255)
    if transposed.prologue and problem.arch in (86, 89) and tile.block_k == 64:
        # Shared memory has no room for another program: to spill for one is in vain.
        return replace(tile, max_registers=tile.max_registers or 160)
    wide = transposed.prologue and tile.block_m * tile.block_n == 64 * 64 and transposed.tile_channels[1] >= 128
    if wide and problem.dtype != torch.float32 and problem.arch in (80, 90, 100):
        return replace(tile, block_n=128, block_k=32, num_stages=4, max_registers=None)
    return tile


def _fills_wide_tiles(transposed: ConvProblem) -> bool:
    """Whether tiles that take eight warps for their registers, and ask for a third less of L2, leave no GPU idle whose
    tensor cores outrun its loads."""
    depth, columns = transposed.tile_channels
    tiles = cdiv(transposed.m, 128) * (columns // 128) * transposed.groups
    whole = columns % 128 == depth % 32 == 0 and transposed.dtype.itemsize == 2
    return whole and transposed.arch in (80, 90, 100) and tiles >= gpu_of(transposed.arch).multiprocessors


def _reach(problem: ConvProblem, dy: Layout) -> int:
    """Elements of ``dy`` that the walk over the taps spans; it starts past the image where the padding is met first."""
    row = (problem.n - 1) * problem.p + (problem.h - 1 + 2 * problem.padding[0]) // problem.stride[0]
    column = (problem.w - 1 + 2 * problem.padding[1]) // problem.stride[1]
    return max(span(dy), (row * problem.q + column + 1) * stride_of(dy))


def _tiles(recipe: Recipe) -> int:
    """Tiles of sums, over all parities."""
    if recipe.boxes:
        return dgrad_box.sum_tiles(recipe)
    programs, _, parities = recipe.grid
    return parities * programs // cdiv(recipe.scalars["widths"].ci, recipe.config.block_n)


def _widths(problem: ConvProblem, transposed: ConvProblem, inputs: _Inputs) -> Widths:
    co, ci = transposed.tile_channels
    tap = problem.ci // problem.groups
    filters = problem.r * problem.s * tap
    strides = stride_of(inputs.dy), filters, tap, stride_of(inputs.shortcut.layout), stride_of(inputs.y_in)
    return Widths(ci, co, problem.ci, problem.co, *strides)


def _form(
    problem: ConvProblem,
    transposed: ConvProblem,
    tile: TileConfig,
    widths: Widths,
    activation: Activation,
    *,
    sparse: bool,
    far: bool,
) -> Form:
    co, ci = transposed.tile_channels
    return Form(
        *(problem.r, problem.s),
        MERGED=transposed.merged > 1,
        POINTWISE=problem.r * problem.s == 1 and problem.padding == (0, 0),
        EVEN_CI=ci % tile.block_n == 0,
        EVEN_CO=co % tile.block_k == 0,
        ONE_CHUNK=co <= tile.block_k,
        STRIDED=problem.stride != (1, 1),
        CUT_SPARSE=sparse,
        ACT=activation,
        INT64=far,
        VECTOR=load_width(problem, ci, co, widths.g, widths.w, widths.tap),
        PRECISION=precision(problem),
    )


def _check(problem: ConvProblem, inputs: _Inputs) -> None:
    dy, w, y, _, y_in, _ = inputs
    require_pixel_linear(y=y, y_in=y_in)
    if w.shape[0] != problem.co or problem.co % problem.groups:
        raise ValueError(f"w of shape {tuple(w.shape)} does not fit {problem.co} channels in {problem.groups} groups")
    if problem.r * problem.s > 64:
        raise ValueError(f"w may have at most 64 taps, one per bit of a mask; got shape {tuple(w.shape)}")
    if tuple(dy.shape[2:]) != (problem.p, problem.q):
        raise ValueError(f"dy must have shape [N, CO, {problem.p}, {problem.q}]; got {tuple(dy.shape)}")
    if not problem.prologue and (y is not None or dy.dtype != w.dtype):
        raise ValueError(f"without coefs, dy must have the dtype of w, {w.dtype}, and y be None; got {dy.dtype}")
    if y is not None and (y.shape != dy.shape or pixel_stride(y) != pixel_stride(dy)):
        raise ValueError(f"y must lie in memory as dy does, {tuple(dy.shape)}; got {tuple(y.shape)}, {y.strides}")
    if y_in is not None and tuple(y_in.shape) != (problem.n, problem.ci, problem.h, problem.w):
        raise ValueError(f"mask[0] must have the shape of the result; got {tuple(y_in.shape)}")


def _check_shortcut(problem: ConvProblem, shortcut: Added) -> None:
    cut, step, before = shortcut
    require_pixel_linear(shortcut=cut)
    if cut is None:
        return
    require_step("shortcut", shortcut)
    if not fits((problem.n, problem.ci, problem.h, problem.w), step, before, cut.shape):
        h, w = cdiv(problem.h, step), cdiv(problem.w, step)
        raise ValueError(
            f"shortcut must have shape [{problem.n}, C, {h}, {w}] and {problem.ci} channels from channel {before} on; "
            f"got {tuple(cut.shape)}"
        )


def _pixels_heard(problem: ConvProblem) -> int:
    """Pixels of ``dy``, of all images, that some tap carries to a pixel of the result, not to the padding."""
    rows, columns = (
        sum(any(0 <= o * st - pad + t * dil < size for t in range(taps)) for o in range(outs))
        for size, outs, taps, st, pad, dil in (
            (problem.h, problem.p, problem.r, problem.stride[0], problem.padding[0], problem.dilation[0]),
            (problem.w, problem.q, problem.s, problem.stride[1], problem.padding[1], problem.dilation[1]),
        )
    )
    return problem.n * rows * columns


def _cost(problem: ConvProblem, tensors: Mapping[str, Any]) -> Cost:
    dy, w, cut, y_in = (tensors[name] for name in ("g_ptr", "w_ptr", "cut_ptr", "y_in_ptr"))
    y, coefs, dx, sums = tensors.get("y_ptr"), tensors.get("coefs_ptr"), tensors["dx_ptr"], tensors["sums_ptr"]
    read = w.nbytes + sum(_pixels_heard(problem) * problem.co * t.element_size() for t in (dy, y) if t is not None)
    if coefs is not None:
        read += (1 if y is None else 3) * problem.co * 4
    if cut is not None:
        read += cut.shape[0] * problem.ci * cut.shape[2] * cut.shape[3] * cut.element_size()
    if y_in is not None:
        read += y_in.nbytes + 3 * problem.ci * 4  # mean, scale and shift
    written = dx.nbytes + (0 if sums is None else sums.nbytes)
    return Cost(2 * problem.m * problem.co * problem.r * problem.s * (problem.ci // problem.groups), read, written)
