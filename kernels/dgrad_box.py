"""Convolution, gradient of the input by boxes: the walk of conv_box over dy, for each parity of the input's pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import conv_box
from .activation import Activation
from .conv import WALK, ConvProblem, blocks, parity_walk, precision, sizes
from .conv_box import Chunk, in_parts, next_chunk, pixels_of, start_of
from .epilogue import WHOLE, Added, store_gradient
from .launch import Boxes, Cost, Recipe, TileConfig, Vector
from .memory import Layout, cdiv, span, stride_of
from .tile import PerTile, Pixels, Tile, bound, dot, first_tap


class Form(NamedTuple):
    """What the compiled code depends on: the filter's size, and which of the kernel's cases it is."""

    R: int
    S: int
    ONE_CHUNK: bool
    PARTS: int
    CUT_SPARSE: bool
    ACT: Activation
    INT64: bool
    PRECISION: str


class Widths(NamedTuple):
    """Channels of a program's group and of all, and elements from one pixel of each tensor to the next."""

    ci: int
    co: int
    channels: int
    cut: int
    y_in: int


SIZES = ["N", "H", "W", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w"]


@triton.jit(do_not_specialize=[*SIZES, *WALK])
def dgrad_box_kernel(
    g_ptr,
    w_ptr,
    cut_ptr,
    y_in_ptr,
    stats_ptr,
    dx_ptr,
    sums_ptr,
    N,
    H,
    W,
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
    crop,
    widths,
    form: tl.constexpr,
    blocks: tl.constexpr,
    box: tl.constexpr,
):
    """``dx[pixel, ci] = epilogue(sum over r, s, co of g[p, q, co] * w[co, r, s, ci])``.

    As conv_dgrad without a prologue (g is dy), parity by parity: one program computes a box of BLOCK_M pixels of one
    parity x BLOCK_N input channels of one group. From tap to tap the box of g moves back by ``hop``, and what of it
    lies outside of the image comes as zero. The filter lies in memory with its input channels side by side: its box
    has to be turned to be the left factor, which the tensor cores do as they read it.
    """
    R: tl.constexpr = form.R
    S: tl.constexpr = form.S
    PARTS: tl.constexpr = form.PARTS
    ACT: tl.constexpr = form.ACT
    PRECISION: tl.constexpr = form.PRECISION
    BLOCK_M: tl.constexpr = blocks.m
    BLOCK_N: tl.constexpr = blocks.n
    BLOCK_K: tl.constexpr = blocks.k
    OFFSET: tl.constexpr = tl.int64 if form.INT64 else tl.int32
    CI = widths.ci
    CO = widths.co
    tiles_n = tl.cdiv(CI, BLOCK_N)
    pid = tl.program_id(0)
    group = tl.program_id(1)
    parity = tl.program_id(2)
    first_h = parity // stride_w
    first_w = parity % stride_w
    start = start_of(pid // tiles_n, tl.cdiv(H, stride_h), tl.cdiv(W, stride_w), box)
    n0, i0, j0 = start
    ci = pid % tiles_n * BLOCK_N

    r = first_tap(first_h + pad_h, stride_h, dil_h, R)
    s = first_tap(first_w + pad_w, stride_w, dil_w, S)
    taps_h = tl.cdiv(R - r, tap_h)
    taps_w = tl.cdiv(S - s, tap_w)
    p = i0 + (first_h + pad_h - r * dil_h) // stride_h
    q = j0 + (first_w + pad_w - s * dil_w) // stride_w
    first = Chunk(group * CO, p, q)
    end = Chunk(first.channel + CO, None, q - taps_w * hop_w)
    at = first
    column = (r * S + s) * CI + ci
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # See conv_box_kernel: of a single step no pipeline would be left.
    chunks = 1 if form.ONE_CHUNK and R * S > 1 else CO // BLOCK_K
    for _ in range(0, bound(taps_h * taps_w * chunks)):
        a = g_ptr.load([n0, at.h, at.w, at.channel])
        b = w_ptr.load([at.channel, column])
        acc = dot(tl.trans(b), tl.trans(tl.reshape(a, (BLOCK_M, BLOCK_K))), acc, PRECISION)
        step = Chunk(0, -hop_h, -hop_w)
        at, next_tap, next_row = next_chunk(at, first, end, step, BLOCK_K, form.ONE_CHUNK, R * S == 1)
        column += tl.where(next_tap, tap_w * CI, 0) + tl.where(next_row, (tap_h * S - taps_w * tap_w) * CI, 0)

    channels = widths.channels
    cut, y_in = Pixels(cut_ptr, widths.cut), Pixels(y_in_ptr, widths.y_in)
    tiles = tl.num_programs(0) // tiles_n * PARTS
    number = parity * tiles + pid // tiles_n * PARTS
    HEIGHT: tl.constexpr = BLOCK_M // PARTS
    parts = in_parts(acc, PARTS)
    c = ci + tl.arange(0, BLOCK_N)
    for part in tl.static_range(PARTS):
        n, i, j = pixels_of(start, part * HEIGHT, HEIGHT, box)
        h = first_h + i * stride_h
        w = first_w + j * stride_w
        tile = Tile((n.to(OFFSET) * H + h) * W + w, group * CI + c, (n < N) & (h < H) & (w < W), c < CI)
        sums = PerTile(sums_ptr, tiles * tl.num_programs(2), channels, number + part)
        store_gradient(
            tl.trans(parts[part]), tile, (n, h, w), cut, crop, y_in, stats_ptr, dx_ptr, sums, form.CUT_SPARSE, ACT
        )


def why_not(problem: ConvProblem) -> str | None:
    """Why a gradient is not computed by boxes, whatever the tile; None if it may be."""
    ci, co = problem.tile_channels
    if problem.arch not in TILES:
        return "boxes are for " + ", ".join(f"sm_{arch}" for arch in TILES)
    if problem.prologue:
        return "dy is computed on the way into the product"
    if problem.dtype.itemsize == 4:
        return "tensor cores turn no factor of 32 bits"
    if problem.merged > 1 or co % conv_box.MIN_CHANNELS or ci < conv_box.MIN_OUT_CHANNELS:
        return (
            f"it needs a multiple of {conv_box.MIN_CHANNELS} output and at least {conv_box.MIN_OUT_CHANNELS} "
            "input channels a group"
        )
    return None


TILES: dict[int, tuple[conv_box.Sizes, ...]] = {
    **conv_box.TILES,
    90: ((256, 64, 4), (256, 128, 8), (128, 128, 4), (128, 64, 4), (64, 128, 4), (64, 64, 4)),
}
"""Per architecture with TMA, the tiles that no configuration makes spill. Of equally fast ones the first is taken.

On sm_90 the highest come first: they leave the fewest sums, and issuing bounds none of them.
"""


def tiles(problem: ConvProblem) -> Iterator[TileConfig]:
    """The tiles to choose from; none where :func:`why_not` has a reason."""
    if why_not(problem) is None:
        columns, depth = problem.tile_channels
        yield from conv_box.tiles_of(problem, TILES[problem.arch], depth, columns, partial(least_waste, problem))


def least_waste(problem: ConvProblem, pixels: int) -> conv_box.Box:
    """The box of so many pixels that covers those of a parity best."""
    taps = cdiv(problem.r, problem.stride[0]), cdiv(problem.s, problem.stride[1])
    return conv_box.covering(_extent(problem), taps, pixels)


def count(problem: ConvProblem, box: tuple[int, int, int]) -> int:
    """Boxes that cover the pixels of all parities."""
    return prod(problem.stride) * prod(map(cdiv, _extent(problem), box))


def _extent(problem: ConvProblem) -> tuple[int, int, int]:
    """Images, rows and columns of the first parity, which has the most."""
    return problem.n, cdiv(problem.h, problem.stride[0]), cdiv(problem.w, problem.stride[1])


def recipe(
    problem: ConvProblem,
    dy: Layout,
    y_in: Layout | None,
    shortcut: Added,
    activation: Activation,
    tile: TileConfig,
    cost: Callable[[Mapping[str, Any]], Cost],
    vectors: Mapping[str, Vector],
) -> Recipe | None:
    """The launch of a gradient by boxes of ``tile``, or None where TMA does not take its tensors so.

    Raises ValueError for a box that is not of ``block_m`` pixels.
    """
    box = conv_box.box_of(tile)
    ci, co = problem.tile_channels
    gradients, filters = conv_box.image_boxes(dy, box, tile), _filters(problem, tile)
    element = dy.dtype.itemsize
    fits = gradients.fits(element) and filters.fits(element) and ci * element % 16 == 0  # where a tap's box begins
    if problem.prologue or problem.merged > 1 or co % tile.block_k or not fits:
        return None
    if problem.arch == 100 and not activation.light:
        tile = replace(tile, max_registers=255)  # the compiler would spill for a second program beside a derivative
    image = problem.n, problem.ci, problem.h, problem.w
    cut, crop = shortcut.layout, shortcut.crop(image)
    form = Form(
        *(problem.r, problem.s),
        ONE_CHUNK=co == tile.block_k,
        PARTS=_parts(tile, both=cut is not None and y_in is not None, light=activation.light),
        CUT_SPARSE=crop is not WHOLE,
        ACT=activation,
        INT64=max(prod(image), span(cut), span(y_in)) + tile.block_m * prod(problem.stride) >= 2**31,
        PRECISION=precision(problem),
    )
    runtime = {"N": problem.n, **sizes(problem), **parity_walk(problem)}
    scalars = {
        **{name: runtime[name] for name in (*SIZES, *WALK)},
        "crop": crop,
        "widths": Widths(ci, co, problem.ci, stride_of(cut), stride_of(y_in)),
        "form": form,
        "blocks": blocks(tile),
        "box": box,
    }
    boxes = prod(map(cdiv, _extent(problem), box))
    grid = (boxes * cdiv(ci, tile.block_n), problem.groups, prod(problem.stride))
    return Recipe(dgrad_box_kernel, grid, scalars, tile, cost, vectors, {"g_ptr": gradients, "w_ptr": filters})


def _parts(tile: TileConfig, both: bool, light: bool) -> int:
    """In how many parts a tile is finished: ``both`` a shortcut and a mask take twice the registers, the derivative of
    an activation that is not ``light`` more."""
    return (2 if tile.block_m >= 128 else 1) * ((2 if both else 1) if light else 4)


def sum_tiles(recipe: Recipe) -> int:
    """Tiles of sums that the launch gives, over all parities: one for each part of a box."""
    programs, _, parities = recipe.grid
    widths, form = recipe.scalars["widths"], recipe.scalars["form"]
    return programs // cdiv(widths.ci, recipe.config.block_n) * parities * form.PARTS


def _filters(problem: ConvProblem, tile: TileConfig) -> Boxes:
    depth = problem.r * problem.s * (problem.ci // problem.groups)
    return Boxes((problem.co, depth), (depth, 1), (tile.block_k, tile.block_n))
