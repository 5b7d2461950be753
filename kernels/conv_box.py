"""Convolution by boxes: TMA brings the pixels of a tile, for one tap and chunk of channels at a time, and the filter.

No thread computes an address or a mask. The filter is the left factor of the product, so that the tensor cores read
both factors from shared memory, where TMA put them; the other way round, the pixels would pass through registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activation import Activation
from .conv import ConvProblem, Size, blocks, precision, sizes
from .epilogue import WHOLE, Affine, Epilogue, Norm, affine, load_scale, output, store_moments_of_tile
from .gpus import gpu_of
from .launch import Boxes, Cost, Recipe, TileConfig, Vector, dry_target
from .memory import Layout, cdiv, span, stride_of
from .tile import PerTile, Pixels, Tile, bound, dot, load_channels, rounded_to, tile_mask


class Form(NamedTuple):
    """What the compiled code depends on: the filter's size, and which of the kernel's cases it is."""

    R: int
    S: int
    ONE_CHUNK: bool
    STRIDED: bool
    PARTS: int
    BY_TMA: bool
    RES_PADDED: bool
    ACT: Activation
    INT64: bool
    PRECISION: str


class Widths(NamedTuple):
    """Channels of a program's group and of all, and elements from one pixel to the next."""

    ci: int
    co: int
    channels: int
    x: int
    y: int
    res: int


class Box(NamedTuple):
    """Images, rows and columns of a tile of pixels."""

    n: Any
    h: Any
    w: Any


class Chunk(NamedTuple):
    """Of the walk through K: the channel, row and column where the box of a tap and chunk of channels begins."""

    channel: Any
    h: Any
    w: Any


@triton.jit
def next_chunk(at, first, end, step, BLOCK_K: tl.constexpr, ONE_CHUNK: tl.constexpr, ONE_TAP: tl.constexpr):
    """The chunk behind ``at``; whether it is of the next tap, and whether that is of the next row of taps.

    ``first``: of all; ``end``: where a tap's channels and a row's taps end; ``step``: from one tap to the next.
    By selection: where its loop branches, the assembler has each product wait for the one before.
    """
    channel = at.channel + BLOCK_K
    next_tap = (not ONE_TAP) & (ONE_CHUNK | (channel == end.channel))
    channel = tl.where(next_tap, first.channel, channel)
    w = tl.where(next_tap, at.w + step.w, at.w)
    next_row = (not ONE_TAP) & (w == end.w)
    w = tl.where(next_row, first.w, w)
    h = tl.where(next_row, at.h + step.h, at.h)
    return Chunk(channel, h, w), next_tap, next_row


@triton.jit
def start_of(number, rows, columns, box: tl.constexpr):
    """Image, row and column where a box begins, one of those that cover images of ``rows`` x ``columns``."""
    across = tl.cdiv(columns, box.w)
    down = tl.cdiv(rows, box.h)
    return number // across // down * box.n, number // across % down * box.h, number % across * box.w


@triton.jit
def pixels_of(start, first, HEIGHT: tl.constexpr, box: tl.constexpr):
    """Image, row and column of HEIGHT pixels of the box at ``start``, from its ``first`` one on."""
    n, h, w = start
    place = first + tl.arange(0, HEIGHT)
    return n + place // (box.h * box.w), h + place // box.w % box.h, w + place % box.w


@triton.jit
def start_of_part(start, i, PARTS: tl.constexpr, box: tl.constexpr):
    """Image, row and column where the ``i``-th of so many PARTS of the box at ``start`` begins (:func:`part_of`)."""
    n, h, w = start
    if box.n > 1:
        n += i * (box.n // PARTS)
    elif box.h > 1:
        h += i * (box.h // PARTS)
    else:
        w += i * (box.w // PARTS)
    return n, h, w


def part_of(box: Box, parts: int) -> Box | None:
    """The box that each of so many ``parts`` of the pixels of ``box`` is, None if it is none."""
    n, h, w = box
    if n > 1:
        return Box(n // parts, h, w) if n % parts == 0 else None
    if h > 1:
        return Box(1, h // parts, w) if h % parts == 0 else None
    return Box(1, 1, w // parts)


@triton.jit
def in_parts(acc, PARTS: tl.constexpr):
    """``acc``, channels x pixels, in so many PARTS of the pixels, a power of two.

    A high tile as a whole would not leave room in the registers for what its epilogue loads.
    """
    if PARTS == 1:
        return (acc,)
    else:
        halves = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))
        if PARTS == 2:
            return halves
        else:
            return in_parts(halves[0], PARTS // 2) + in_parts(halves[1], PARTS // 2)


@triton.jit(do_not_specialize=["P", "Q", "images", "rows", "columns", "pad_h", "pad_w", "dil_h", "dil_w"])
def conv_box_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    gate_ptr,
    res_ptr,
    y_ptr,
    moments_ptr,
    counts_ptr,
    P,
    Q,
    images,
    rows,
    columns,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    eps,
    crop,
    widths,
    form: tl.constexpr,
    blocks: tl.constexpr,
    box: tl.constexpr,
):
    """``y[m, co] = epilogue(sum over r, s, ci of w[co, r, s, ci] * x[pixel(m, r, s), ci])``.

    One program computes a box of BLOCK_M pixels x BLOCK_N output channels of one group, out of images, rows and columns
    of output. It walks K tap by tap, each tap in chunks of BLOCK_K channels, which divide the group's: a tap moves the
    box of x, and what of it lies outside of the image comes as zero. ``counts``: of each tile of moments, its pixels.

    STRIDED: by 2 along both axes. Then x comes as [N, H/2, 2, W/2, 2 pixels], and a tap's parity says which of two.
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
    tiles_n = tl.cdiv(CO, BLOCK_N)
    pid = tl.program_id(0)
    group = tl.program_id(1)
    number = pid // tiles_n
    start = start_of(number, rows, columns, box)
    n0, h0, w0 = start
    co = pid % tiles_n * BLOCK_N

    STRIDE: tl.constexpr = 2 if form.STRIDED else 1
    first = Chunk(group * CI, h0 * STRIDE - pad_h, w0 * STRIDE - pad_w)
    end = Chunk(first.channel + CI, None, first.w + S * dil_w)
    at = first
    k = 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    c = co + tl.arange(0, BLOCK_N)
    # Here, so that the program waits for them while it waits for its boxes.
    bias, mean, scale, beta, gate = bias_ptr, mean_ptr, var_ptr, beta_ptr, gate_ptr
    if bias_ptr is not None:
        bias = load_channels(bias_ptr, group * CO + c, c < CO)
    if mean_ptr is not None:
        mean = load_channels(mean_ptr, group * CO + c, c < CO)
        scale = load_scale(Norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps), group * CO + c, c < CO)
        if beta_ptr is not None:
            beta = load_channels(beta_ptr, group * CO + c, c < CO)
    if gate_ptr is not None:
        gate = load_channels(gate_ptr + n0 * widths.channels, group * CO + c, c < CO)
    # Of a loop that is known to end after one step nothing would be left, and so no pipeline in which both boxes come
    # at the same time.
    chunks = 1 if form.ONE_CHUNK and R * S > 1 else CI // BLOCK_K
    for _ in range(0, bound(R * S * chunks)):
        if form.STRIDED:
            a = x_ptr.load([n0, at.h >> 1, at.h & 1, at.w >> 1, (at.w & 1) * widths.x + at.channel])
        else:
            a = x_ptr.load([n0, at.h, at.w, at.channel])
        b = w_ptr.load([group * CO + co, k])
        acc = dot(b, tl.trans(tl.reshape(a, (BLOCK_M, BLOCK_K))), acc, PRECISION)
        k += BLOCK_K
        at, _, _ = next_chunk(at, first, end, Chunk(0, dil_h, dil_w), BLOCK_K, form.ONE_CHUNK, R * S == 1)

    res = Pixels(res_ptr, widths.res)
    HEIGHT: tl.constexpr = BLOCK_M // PARTS
    parts = in_parts(acc, PARTS)
    tiles = tl.num_programs(0) // tiles_n * PARTS
    for i in tl.static_range(PARTS):
        n, p, q = pixels_of(start, i * HEIGHT, HEIGHT, box)
        present = (n < images) & (p < rows) & (q < columns)
        tile = Tile((n.to(OFFSET) * rows + p) * columns + q, group * CO + c, present, c < CO)
        v = affine(tl.trans(parts[i]), Affine(bias, mean, scale, beta))
        if gate_ptr is not None:
            v *= gate[None, :]
        v = output(v, tile, res, crop, Size(0, 0, P, Q), form.RES_PADDED, ACT)
        if form.BY_TMA:
            rounded = rounded_to(v, y_ptr.dtype)
            at_n, at_h, at_w = start_of_part(start, i, PARTS, box)
            y_ptr.store([at_n, at_h, at_w, group * CO + co], tl.reshape(rounded, y_ptr.block_shape))
        else:
            rounded = rounded_to(v, y_ptr.dtype.element_ty)
            tl.store(y_ptr + (tile.m * widths.y)[:, None] + tile.c[None, :], rounded, mask=tile_mask(tile))
        if moments_ptr is not None:
            moments = PerTile(moments_ptr, tiles, widths.channels, number * PARTS + i)
            store_moments_of_tile(rounded, tile, moments)
        if counts_ptr is not None:
            first_program = (pid % tiles_n == 0) & (group == 0)
            tl.store(counts_ptr + number * PARTS + i, tl.sum(present.to(tl.float32), 0), mask=first_program)


def why_not(problem: ConvProblem) -> str | None:
    """Why a convolution is not computed by boxes, whatever the tile; None if it may be."""
    ci, co = problem.tile_channels
    if problem.arch not in TILES:
        return "boxes are for " + ", ".join(f"sm_{arch}" for arch in TILES)
    if problem.prologue:
        return "its input is normalised on the way into the product"
    if problem.dtype.itemsize == 4 and not problem.tf32:
        return "fp32 is not multiplied by tensor cores"
    if problem.merged > 1 or ci % MIN_CHANNELS or co < MIN_OUT_CHANNELS:
        return f"it needs a multiple of {MIN_CHANNELS} input and at least {MIN_OUT_CHANNELS} output channels a group"
    if not steps(problem):
        return f"TMA does not step by {problem.stride} over {problem.h}x{problem.w} pixels"
    return None


MIN_CHANNELS = 32
"""In a group: with fewer, a box would be narrower than two sectors of memory."""
MIN_OUT_CHANNELS = 64
"""Rows of the shortest product of sm_90's and sm_100's wide instructions."""


def steps(problem: ConvProblem) -> bool:
    """Whether TMA moves its boxes by its stride."""
    even = problem.h % 2 == 0 and problem.w % 2 == 0
    return problem.stride == (1, 1) or (problem.stride == (2, 2) and even)


Sizes = tuple[int, int, int]
"""Of a tile: pixels, channels of its result, warps."""

TILES: dict[int, tuple[Sizes, ...]] = {
    90: ((256, 64, 4), (128, 128, 4), (256, 128, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4)),
    100: ((128, 128, 4), (256, 128, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4)),
    120: ((128, 128, 4), (128, 64, 4), (64, 128, 4), (64, 64, 4)),
}
"""Per architecture with TMA, the tiles that no configuration makes spill."""
if triton.__version__.startswith("3.6."):
    del TILES[120]  # its assembler stores to the stack around every load of a box


BARRIERS = 2048
"""Bytes of shared memory for what is no buffer of the pipeline."""


def tiles(problem: ConvProblem) -> Iterator[TileConfig]:
    """The tiles to choose from; none where :func:`why_not` has a reason."""
    if why_not(problem) is None:
        depth, columns = problem.tile_channels
        yield from tiles_of(problem, TILES[problem.arch], depth, columns, partial(least_waste, problem))


def tiles_of(
    problem: ConvProblem, of: Sequence[Sizes], depth: int, columns: int, cover: Callable[[int], Box]
) -> Iterator[TileConfig]:
    """Tiles of these pixels, channels and warps for a product with so many ``columns`` of channels.

    ``depth``: channels of a tap, which chunks divide; ``cover``: the box of so many pixels.
    """
    element, pointwise = problem.dtype.itemsize, problem.r * problem.s == 1
    room = gpu_of(problem.arch).shared - BARRIERS
    # A few steps end before a deep pipeline pays: the shared memory is left to other programs of the multiprocessor.
    few = pointwise and depth * element <= FEW_BYTES and problem.arch != 120
    widest = CHUNK_BYTES // element if few else 128
    for block_m, block_n, warps in of:
        if block_n > triton.next_power_of_2(columns) or (element == 4 and (problem.arch, block_n) == (120, 128)):
            continue
        for block_k in (128, 64, 32) if element == 2 else (32,):
            alone = pointwise and depth == block_k  # a single step, whose two boxes come at once
            stages = min(2 if alone or few else 4, room // ((block_m + block_n) * block_k * element))
            if depth % block_k == 0 and block_k <= widest and stages >= (2 if alone or few else 3):
                # Of a low tile, or on sm_120 of one step, the compiler would spill for one more program at a time.
                registers = 255 if block_m == 64 or (alone and problem.arch == 120) else None
                yield TileConfig(block_m, block_n, block_k, warps, stages, registers, cover(block_m))
                break


FEW_BYTES = 512
"""Of a pixel's channels that are a few steps for a 1x1 filter, each of CHUNK_BYTES. Measured on an H100 (torch 2.11.0,
Triton 3.6.0), 1x1 of 64, 128 and 256 channels in bf16: two stages took less than three or four, and than wider steps,
in nearly every tile, up to a third. Of sm_100, which has as much shared memory, it is assumed."""
CHUNK_BYTES = 128


def least_waste(problem: ConvProblem, pixels: int) -> Box:
    """The box of so many pixels that covers the output best."""
    if pointwise(problem):
        return Box(1, 1, pixels)
    return covering(extent_of(problem), (problem.r, problem.s), pixels)


def within_images(problem: ConvProblem, tile: TileConfig) -> TileConfig | None:
    """``tile`` if its box is of one image, and of hardly more pixels than that has; else the next lower one that is.

    None where there is none of as many channels.
    """
    assert tile.box is not None
    pixels = min(tile.block_m, max(64, triton.next_power_of_2(problem.p * problem.q)))
    if pixels == tile.block_m and (pointwise(problem) or tile.box[0] == 1):
        return tile
    box = covering((1, problem.p, problem.q), (problem.r, problem.s), pixels)
    lower = (t for t in tiles(problem) if (t.block_m, t.block_n) == (pixels, tile.block_n))
    return next((replace(t, box=box) for t in lower if box.n == 1), None)


def covering(extent: tuple[int, int, int], taps: tuple[int, int], pixels: int) -> Box:
    """The box of so many pixels, a power of two, that covers ``extent`` with the fewest of them outside.

    Of several, that whose ``taps``, rows and columns of a filter, meet the fewest pixels.
    """
    powers = [2**i for i in range(pixels.bit_length())]
    boxes = (Box(pixels // (h * w), h, w) for h in powers for w in powers if h * w <= pixels)

    def waste(box: Box) -> tuple[int, int, int]:
        met = box.n * (box.h + taps[0] - 1) * (box.w + taps[1] - 1)
        return prod(map(cdiv, extent, box)), met, box.n

    return min(boxes, key=waste)


def count(problem: ConvProblem, box: tuple[int, int, int]) -> int:
    """Boxes that cover the output."""
    return prod(map(cdiv, extent_of(problem), box))


def extent_of(problem: ConvProblem, by_image: bool = False) -> tuple[int, int, int]:
    """Images, rows and columns that boxes cover: of a 1x1 convolution a single row of all pixels, or one an image."""
    if not pointwise(problem):
        return problem.n, problem.p, problem.q
    return (problem.n, 1, problem.p * problem.q) if by_image else (1, 1, problem.m)


def pointwise(problem: ConvProblem) -> bool:
    """Whether its output is its input's pixels, one by one."""
    return problem.r * problem.s == 1 and problem.stride == (1, 1) and problem.padding == (0, 0)


def loadable(config: TileConfig | None, *tensors: Tensor) -> TileConfig | None:
    """``config``, or None where it has a box and TMA does not take the address of one of the ``tensors``."""
    boxed = config is not None and config.box is not None
    return None if boxed and any(_address(tensor) % 16 for tensor in tensors) else config


def _address(tensor: Tensor) -> int:
    """In a dry run, whose tensors may have no memory, from the start of their storage."""
    return tensor.data_ptr() if dry_target() is None else int(tensor.storage_offset()) * tensor.itemsize


def recipe(
    problem: ConvProblem,
    x: Layout,
    w: Layout,
    out: Layout,
    epilogue: Epilogue,
    tile: TileConfig,
    cost: Callable[[Mapping[str, Any]], Cost],
    vectors: Mapping[str, Vector],
    by_image: bool = False,
) -> Recipe | None:
    """The launch of a convolution by boxes of ``tile``, or None where TMA does not take its tensors so.

    ``by_image``: of a 1x1 convolution, no box crosses images. Raises ValueError for a box that is not of ``block_m``
    pixels.
    """
    box = Box(1, 1, tile.block_m) if pointwise(problem) else box_of(tile)
    extent = extent_of(problem, by_image)
    pixels, filters = input_boxes(problem, x, extent, box, tile), _filters(problem, w, tile)
    ci, co = problem.tile_channels
    fits = pixels.fits(x.dtype.itemsize) and filters.fits(x.dtype.itemsize)
    if problem.prologue or problem.merged > 1 or ci % tile.block_k or not steps(problem) or not fits:
        return None
    res = epilogue.residual.layout
    crop = epilogue.residual.crop(out.shape)
    images, rows, columns = extent
    parts = parts_of(tile, bare=epilogue == Epilogue(out=epilogue.out))
    stored = _stored(problem, out, extent, box, parts, tile)
    form = Form(
        *(problem.r, problem.s),
        ONE_CHUNK=ci == tile.block_k,
        STRIDED=problem.stride != (1, 1),
        PARTS=parts,
        BY_TMA=stored is not None,
        RES_PADDED=crop is not WHOLE,
        ACT=epilogue.activation,
        INT64=max(map(span, (x, out, res))) + tile.block_m >= 2**31,
        PRECISION=precision(problem),
    )
    runtime = sizes(problem)
    scalars = {
        **{name: runtime[name] for name in ("P", "Q", "pad_h", "pad_w", "dil_h", "dil_w")},
        **{"images": images, "rows": rows, "columns": columns},
        "eps": epilogue.eps,
        "crop": crop,
        "widths": Widths(ci, co, problem.co, stride_of(x), stride_of(out), stride_of(res)),
        "form": form,
        "blocks": blocks(tile),
        "box": box,
    }
    grid = (prod(map(cdiv, extent, box)) * cdiv(co, tile.block_n), problem.groups)
    by_tma = {"x_ptr": pixels, "w_ptr": filters} | ({} if stored is None else {"y_ptr": stored})
    return Recipe(conv_box_kernel, grid, scalars, tile, cost, vectors, by_tma)


def parts_of(tile: TileConfig, *, bare: bool) -> int:
    """How many an epilogue takes the pixels of a tile in; each has moments of its own.

    ``bare``: it is but a bias, as where moments are taken; for what others load, a high tile has to leave registers.
    """
    return 1 if tile.block_m < 128 or (bare and tile.block_m * tile.block_n <= 128 * 128) else 2


def box_of(tile: TileConfig) -> Box:
    """The box of a tile that has one. Raises ValueError where it is not of ``block_m`` pixels."""
    assert tile.box is not None
    if prod(tile.box) != tile.block_m:
        raise ValueError(f"config.box must have block_m={tile.block_m} pixels; got {tile.box}")
    return Box(*tile.box)


def moment_tiles(recipe: Recipe) -> int:
    """Tiles of moments that the launch gives: a high box gives two."""
    widths, form = recipe.scalars["widths"], recipe.scalars["form"]
    return recipe.grid[0] // cdiv(widths.co, recipe.config.block_n) * form.PARTS


def input_boxes(problem: ConvProblem, x: Layout, extent: tuple[int, int, int], box: Box, tile: TileConfig) -> Boxes:
    """Of the pixels of ``x`` that a tap of a box of the output meets, ``block_k`` channels at a time."""
    n, channels, h, w = x.shape
    step = stride_of(x)
    if pointwise(problem):
        return _rows(extent, channels, step, (*box, tile.block_k))
    if problem.stride == (1, 1):
        return image_boxes(x, box, tile)
    pairs = (n, h // 2, 2, w // 2, step + channels)
    steps = (h * w * step, 2 * w * step, w * step, 2 * step, 1)
    return Boxes(pairs, steps, (box.n, box.h, 1, box.w, tile.block_k))


def _rows(extent: tuple[int, int, int], channels: int, step: int, box: tuple[int, ...]) -> Boxes:
    """Of pixels that are ``step`` elements apart, as many images of a single row as ``extent`` says."""
    images, _, columns = extent
    return Boxes((images, 1, columns, channels), (columns * step, columns * step, step, 1), box)


def _stored(
    problem: ConvProblem, out: Layout, extent: tuple[int, int, int], box: Box, parts: int, tile: TileConfig
) -> Boxes | None:
    """How TMA stores the output, or None where it does not: what lies outside of the tensor it leaves out."""
    part = part_of(box, parts)
    within = problem.groups == 1 or problem.tile_channels[1] % tile.block_n == 0  # else into the next group
    if part is None or not within:
        return None
    n, channels, p, q = out.shape
    step = stride_of(out)
    if pointwise(problem):
        boxes = _rows(extent, channels, step, (*part, tile.block_n))
    else:
        boxes = Boxes((n, p, q, channels), (p * q * step, q * step, step, 1), (*part, tile.block_n))
    return boxes if boxes.fits(out.dtype.itemsize) else None


def image_boxes(x: Layout, box: Box, tile: TileConfig) -> Boxes:
    """Of the pixels of ``x``, one beside the other."""
    n, channels, h, w = x.shape
    step = stride_of(x)
    return Boxes((n, h, w, channels), (h * w * step, w * step, step, 1), (*box, tile.block_k))


def _filters(problem: ConvProblem, w: Layout, tile: TileConfig) -> Boxes:
    depth = prod(w.shape[1:])
    return Boxes((problem.co, depth), (depth, 1), (tile.block_n, tile.block_k))
