"""Chains by boxes: TMA brings the pixels of the first convolution, and the filters of all.

The walk over the taps is that of :mod:`conv_box`, with the filter as the left factor. What it comes to is turned once,
so that the convolutions behind it have the pixels on the left, as in :mod:`chain_forward`: with the filters right of
them, both factors are multiplied from where they were put, and what a step adds to ``z`` is read by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import conv_box
from .activation import relu
from .chain import WIDEST, Chain, Widths, affine, block_of, block_output, even, far, held, shared, tail_stages
from .conv import ConvProblem, blocks, precision, sizes
from .conv_box import Box, Chunk, next_chunk, pixels_of, start_of
from .epilogue import WHOLE, Added
from .gpus import gpu_of
from .launch import Boxes, Cost, Recipe, TileConfig, Vector
from .memory import Layout, cdiv, stride_of
from .tile import Pixels, Tile, bound, dot, load_channels, rounded_to, settled


class Form(NamedTuple):
    """What the compiled code depends on; as of :class:`chain_forward.Form` and :class:`conv_box.Form`.

    ``EVEN``: all channels fill their blocks. (Of others TMA loads zeros, but a zero times what is not finite is none.)
    """

    R: int
    S: int
    ONE_CHUNK: bool
    STRIDED: bool
    MIDDLE: int
    NEXT: int
    TAIL_STAGES: int
    EVEN: bool
    RES_PADDED: bool
    INT64: bool
    PRECISION: str


@triton.jit
def product_by_box(x, w, start, pad, dilation, widths, form: tl.constexpr, blocks: tl.constexpr):
    """The product of the filter ``w``, all of its rows, with the box of pixels at ``start``: channels x pixels."""
    BLOCK_M: tl.constexpr = blocks.m
    BLOCK_K: tl.constexpr = blocks.k
    R: tl.constexpr = form.R
    S: tl.constexpr = form.S
    MIDDLE: tl.constexpr = form.MIDDLE
    PRECISION: tl.constexpr = form.PRECISION
    STRIDE: tl.constexpr = 2 if form.STRIDED else 1
    n, h, w_start = start
    first = Chunk(0, h * STRIDE - pad[0], w_start * STRIDE - pad[1])
    end = Chunk(widths.ci, None, first.w + S * dilation[1])
    at = first
    k = 0
    acc = tl.zeros((MIDDLE, BLOCK_M), tl.float32)
    # As in conv_box_kernel: a loop that is known to be a single step would have no pipeline.
    chunks = 1 if form.ONE_CHUNK and R * S > 1 else widths.ci // BLOCK_K
    for _ in range(0, bound(R * S * chunks)):
        if form.STRIDED:
            a = x.load([n, at.h >> 1, at.h & 1, at.w >> 1, (at.w & 1) * widths.x + at.channel])
        else:
            a = x.load([n, at.h, at.w, at.channel])
        b = w.load([0, k])
        acc = dot(b, tl.trans(tl.reshape(a, (BLOCK_M, BLOCK_K))), acc, PRECISION)
        k += BLOCK_K
        step = Chunk(0, dilation[0], dilation[1])
        at, _, _ = next_chunk(at, first, end, step, BLOCK_K, form.ONE_CHUNK, R * S == 1)
    return acc


@triton.jit(do_not_specialize=["P", "Q", "images", "rows", "columns", "pad_h", "pad_w", "dil_h", "dil_w"])
def chain_box_kernel(
    x_ptr,
    spatial_w_ptr,
    spatial_affine_ptr,
    expand_w_ptr,
    expand_affine_ptr,
    reduce_w_ptr,
    reduce_affine_ptr,
    res_ptr,
    z_ptr,
    y_ptr,
    P,
    Q,
    images,
    rows,
    columns,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    crop,
    widths,
    form: tl.constexpr,
    blocks: tl.constexpr,
    box: tl.constexpr,
):
    """``z = relu(norm(expand @ relu(norm(conv(x)))) + res)`` and ``y = relu(norm(reduce @ z))``.

    One program computes all channels of both for a box of BLOCK_M pixels, out of images, rows and columns of output.
    The channels of ``z`` come BLOCK_N at a time: each chunk is stored, and multiplied into ``y`` at once. Without
    ``spatial`` the input takes the convolution's place, without ``reduce`` there is no ``y``.
    """
    MIDDLE: tl.constexpr = form.MIDDLE
    NEXT: tl.constexpr = form.NEXT
    PRECISION: tl.constexpr = form.PRECISION
    BLOCK_M: tl.constexpr = blocks.m
    BLOCK_N: tl.constexpr = blocks.n
    OFFSET: tl.constexpr = tl.int64 if form.INT64 else tl.int32
    FACTOR: tl.constexpr = z_ptr.dtype.element_ty
    start = start_of(tl.program_id(0), rows, columns, box)
    if spatial_w_ptr is not None:
        middle = tl.arange(0, MIDDLE)
        # Here, so that the program waits for them while it waits for its boxes.
        scale = load_channels(spatial_affine_ptr, middle, middle < widths.middle)
        shift = load_channels(spatial_affine_ptr + widths.middle, middle, middle < widths.middle)
        dilation = (dil_h, dil_w)
        acc = product_by_box(x_ptr, spatial_w_ptr, start, (pad_h, pad_w), dilation, widths, form, blocks)
        inner = rounded_to(relu(tl.fma(acc, scale[:, None], shift[:, None])), FACTOR)
        if not form.EVEN:
            inner = tl.where((middle < widths.middle)[:, None], inner, 0.0)
        inner = tl.trans(inner)
    else:
        n0, h0, w0 = start
        inner = tl.reshape(x_ptr.load([n0, h0, w0, 0]), (BLOCK_M, MIDDLE))

    n, p, q = pixels_of(start, 0, BLOCK_M, box)
    present = (n < images) & (p < rows) & (q < columns)
    # Pixels that lie outside read the first one's residual, and the stores drop them.
    row = tl.where(present, (n.to(OFFSET) * rows + p) * columns + q, 0)
    res = Pixels(res_ptr, widths.res)
    following = tl.arange(0, NEXT)
    mask_next = following < widths.next
    acc = tl.zeros((BLOCK_M, NEXT), tl.float32)
    for chunk in tl.range(0, bound(tl.cdiv(widths.wide, BLOCK_N)), num_stages=form.TAIL_STAGES):
        c = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_c = c < widths.wide
        b = expand_w_ptr.load([chunk * BLOCK_N, 0])
        v = dot(inner, tl.trans(b), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        tile = Tile(row, c, present, mask_c)
        z = rounded_to(block_output(v, expand_affine_ptr, widths.wide, tile, res, crop, P, Q, form), FACTOR)
        # Not by TMA: before it stores, it would wait for what is being loaded for the next steps.
        at = (row * widths.wide)[:, None] + c[None, :]
        if form.EVEN:
            tl.store(z_ptr + at, z, mask=present[:, None])
        else:
            tl.store(z_ptr + at, z, mask=present[:, None] & mask_c[None, :])
        if reduce_w_ptr is not None:
            if not form.EVEN:
                z = tl.where(mask_c[None, :], z, 0.0)
            b = reduce_w_ptr.load([0, chunk * BLOCK_N])
            acc = settled(dot(z, tl.trans(b), acc, PRECISION))
    if reduce_w_ptr is not None:
        y = relu(affine(acc, reduce_affine_ptr, following, mask_next, widths.next)).to(FACTOR)
        at = (row * widths.next)[:, None] + following[None, :]
        tl.store(y_ptr + at, y, mask=present[:, None] & mask_next[None, :])


def why_not(chain: Chain) -> str | None:
    """Why a chain is not computed by boxes, whatever the tile, though it may be in one launch; None if it may be."""
    if chain.first.arch not in TILES:
        return "boxes of chains are for " + ", ".join(f"sm_{arch}" for arch in TILES)
    if chain.first.dtype.itemsize != 2:
        return "its factors do not have 16 bits"
    return None if chain.spatial is None else conv_box.why_not(chain.spatial)


TILES: dict[int, tuple[tuple[int, int, int, int, int], ...]] = {
    90: (
        *((128, 64, 4, 128, 0), (128, 32, 4, 192, 0), (128, 64, 8, 320, 320), (128, 32, 8, 512, 512)),
        *((64, 64, 4, 320, 320), (64, 32, 4, 512, 512)),
    ),
    100: ((128, 64, 8, 256, 256), (64, 64, 4, 256, 256)),
}
"""Per architecture, pixels, channels of z at a time and warps of the tiles, and the most channels (:func:`held`) with
which none spills: of channels that fill their blocks, and of others."""
MOST_OF_EIGHT_WARPS = 128 if triton.__version__.startswith("3.6.") else WIDEST
"""Channels of the 3x3's output: Triton 3.6 writes accumulators of more while products run, which then wait each for the
one before."""


def tiles(chain: Chain) -> Iterator[TileConfig]:
    """Those to choose from, of so many pixels and warps the widest; none where :func:`why_not` has a reason."""
    if why_not(chain) is not None:
        return
    first, found = chain.first, set()
    for block_m, block_n, warps, most, most_masked in TILES[first.arch]:
        if chain.spatial is not None and warps == 8 and block_of(chain.expand.ci) > MOST_OF_EIGHT_WARPS:
            continue
        for block_k in (128, 64, 32) if chain.spatial else (block_of(first.ci),):
            tile = TileConfig(block_m, block_n, block_k, warps, box=conv_box.least_waste(first, block_m))
            fits = held(chain) <= (most if even(chain, tile) else most_masked)
            fits = fits and tail_stages(chain, tile) == 3 and shared(chain, tile) <= gpu_of(first.arch).shared
            whole = first.ci % block_k == 0 or chain.spatial is None
            if fits and whole and (block_m, warps) not in found:
                found.add((block_m, warps))
                yield tile


def recipe(
    chain: Chain,
    x: Layout,
    residual: Added,
    tile: TileConfig,
    cost: Callable[[Mapping[str, Any]], Cost],
    vectors: Mapping[str, Vector],
) -> Recipe | None:
    """The launch by boxes of ``tile``, or None where TMA does not take the tensors so.

    Raises ValueError for a box of a wider first filter that is not of ``block_m`` pixels.
    """
    first, expand, reduce = chain.first, chain.expand, chain.reduce
    box = Box(1, 1, tile.block_m) if conv_box.pointwise(first) else conv_box.box_of(tile)
    extent = conv_box.extent_of(first)
    middle, following = block_of(expand.ci), block_of(reduce.co if reduce else 0)
    depth = tile if chain.spatial else replace(tile, block_k=middle)
    boxes = {"x_ptr": conv_box.input_boxes(first, x, extent, box, depth)}
    if chain.spatial is not None:
        boxes["spatial_w_ptr"] = _filter(chain.spatial, (middle, tile.block_k))
    boxes["expand_w_ptr"] = _filter(expand, (tile.block_n, middle))
    if reduce is not None:
        boxes["reduce_w_ptr"] = _filter(reduce, (following, tile.block_n))
    whole = chain.spatial is None or first.ci % tile.block_k == 0
    if not whole or not conv_box.steps(first) or not all(of.fits(x.dtype.itemsize) for of in boxes.values()):
        return None
    shape = (expand.n, expand.co, expand.p, expand.q)
    crop, res = residual.crop(shape), residual.layout
    runtime = sizes(first)
    images, rows, columns = extent
    scalars = {
        **{name: runtime[name] for name in ("P", "Q", "pad_h", "pad_w", "dil_h", "dil_w")},
        **{"images": images, "rows": rows, "columns": columns},
        "crop": crop,
        "widths": Widths(first.ci, expand.ci, expand.co, reduce.co if reduce else 0, stride_of(x), stride_of(res)),
        "form": Form(
            *((first.r, first.s) if chain.spatial else (1, 1)),
            ONE_CHUNK=first.ci == tile.block_k,
            STRIDED=first.stride != (1, 1),
            MIDDLE=middle,
            NEXT=following,
            TAIL_STAGES=tail_stages(chain, tile),
            EVEN=even(chain, tile),
            RES_PADDED=crop is not WHOLE,
            INT64=far(chain, x, res, tile),
            PRECISION=precision(first),
        ),
        "blocks": blocks(tile),
        "box": box,
    }
    return Recipe(chain_box_kernel, (prod(map(cdiv, extent, box)),), scalars, tile, cost, vectors, boxes)


def _filter(link: ConvProblem, box: tuple[int, int]) -> Boxes:
    """Of a filter [CO, R, S, CI] as it lies."""
    depth = link.r * link.s * link.ci
    return Boxes((link.co, depth), (depth, 1), box)
