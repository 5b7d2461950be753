"""A ResNet's stem: convolution of few channels, batch norm, ReLU and max pool, without the convolution's output.

The image is packed first: to four channels a pixel, with its border of zeros, so that what a row of the filter meets
is one run of memory, which loads 16 bytes at a time. The filter is packed alike, by the same launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import relu
from .conv import ConvProblem, Geometry, blocks, check_geometry, precision
from .epilogue import Norm, load_affine
from .launch import FLOATS, INTERPRETER, KEPT_LAYOUTS, Cost, Recipe, TileConfig, Vector, target_arch
from .memory import Layout, cdiv, channels_last, layout, require_channels_last_filter, span
from .tile import bound, dot

PIXEL = 4
"""Channels of a packed pixel."""
RUN = 8
"""Packed pixels that a row of the filter is taken for; those beyond it have zeros in the filter."""
SIDE = 8
"""Rows and columns of pooled pixels in a tile. Its first row and column are those of the tiles before, and are not
stored: pooling asks for pixels of theirs."""
POOL = 3, 2, 1
"""Kernel size, stride and padding of the max pool."""
PACKED_AT_ONCE = 1024


class Steps(NamedTuple):
    """Elements from one image (or filter), channel, row and column to the next."""

    n: Any
    c: Any
    h: Any
    w: Any


@triton.jit
def pack(source_ptr, steps, packed_ptr, i, size, rows, columns, n_end, h_end, w_end, channels, pad_h, pad_w):
    """Packed pixels ``i`` of ``size``: those of ``source`` moved by the padding, and zeros around them."""
    n = i // columns // rows
    h = i // columns % rows - pad_h
    w = i % columns - pad_w
    inside = (i < size) & (n < n_end) & (h >= 0) & (h < h_end) & (w >= 0) & (w < w_end)
    one = tl.full((), 1, tl.int64)  # steps may be longer than 32 bits count
    at = source_ptr + (n * one * steps.n + h * one * steps.h + w * one * steps.w)
    dtype = packed_ptr.dtype.element_ty
    c0 = tl.load(at, mask=inside, other=0.0).to(dtype)
    c1 = tl.load(at + one * steps.c, mask=inside & (channels > 1), other=0.0).to(dtype)
    c2 = tl.load(at + 2 * one * steps.c, mask=inside & (channels > 2), other=0.0).to(dtype)
    c3 = tl.load(at + 3 * one * steps.c, mask=inside & (channels > 3), other=0.0).to(dtype)
    pixels = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (i.shape[0], 4))
    to = packed_ptr + (i.to(tl.int64) * 4)[:, None] + tl.arange(0, 4)[None, :]
    tl.store(to, pixels, mask=(i < size)[:, None])


@triton.jit(do_not_specialize=["N", "H", "W", "CO", "channels", "rows", "columns", "filters", "pad_h", "pad_w"])
def conv_pack_kernel(
    x_ptr,
    w_ptr,
    image_ptr,
    filter_ptr,
    N,
    H,
    W,
    CO,
    channels,
    rows,
    columns,
    filters,
    pad_h,
    pad_w,
    x_steps,
    w_steps,
    R: tl.constexpr,
    S: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``image[n, h, w, c] = x[n, c, h - pad_h, w - pad_w]``, and likewise the filter, with zeros where there is none.

    A program packs BLOCK pixels; the last programs pack those of the filters, of RUN columns a row.
    """
    size = N * rows * columns
    programs = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    if pid < programs:
        i = pid * BLOCK + tl.arange(0, BLOCK)
        pack(x_ptr, x_steps, image_ptr, i, size, rows, columns, N, H, W, channels, pad_h, pad_w)
    else:
        i = (pid - programs) * BLOCK + tl.arange(0, BLOCK)
        pack(w_ptr, w_steps, filter_ptr, i, filters * R * RUN, R, RUN, CO, R, S, channels, 0, 0)


@triton.jit
def largest(a, b):
    """The larger one, and NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["P", "Q", "rows", "columns", "pooled_h", "pooled_w", "tiles_h", "tiles_w"])
def conv_pool_kernel(
    image_ptr,
    filter_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    y_ptr,
    P,
    Q,
    rows,
    columns,
    pooled_h,
    pooled_w,
    tiles_h,
    tiles_w,
    eps,
    CO,
    R: tl.constexpr,
    S: tl.constexpr,
    SIDE: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    blocks: tl.constexpr,
):
    """``y = max_pool(relu(norm(conv(image) + bias)))``, the convolution of stride 2, the pool 3x3/2 with padding 1.

    A program computes SIDE x SIDE pooled pixels, and for each the convolution where its row and column are even and
    odd: four times as many rows of the product, parity by parity. A pooled pixel is the largest of an even row, the odd
    one behind it and the odd one before it, which is its upper neighbour's; then the same of columns. K is walked row
    by row of the filter, BLOCK_K = 8 pixels of 4 channels each.
    """
    BLOCK_M: tl.constexpr = blocks.m
    BLOCK_N: tl.constexpr = blocks.n
    BLOCK_K: tl.constexpr = blocks.k
    PIXELS: tl.constexpr = SIDE * SIDE
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    tiles_n = tl.cdiv(CO, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid // tiles_n
    n = (tile // tiles_w // tiles_h).to(OFFSET)
    h0 = tile // tiles_w % tiles_h * (SIDE - 1) - 1
    w0 = tile % tiles_w * (SIDE - 1) - 1
    c = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)

    i = tl.arange(0, BLOCK_M)
    p = 2 * (h0 + i // SIDE % SIDE) + i // (2 * PIXELS)
    q = 2 * (w0 + i % SIDE) + i // PIXELS % 2
    present = (p >= 0) & (p < P) & (q >= 0) & (q < Q)
    # What is absent reads the first pixel instead: no mask in the loop.
    pixel = tl.where(present, (n * rows + 2 * p) * columns + 2 * q, 0)
    k = tl.arange(0, BLOCK_K)
    # A column is even, and so 16 bytes divide the address of a run.
    x_at = image_ptr + (pixel // 2 * 8)[:, None] + k[None, :]
    w_at = filter_ptr + (c * (R * BLOCK_K))[None, :] + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Zeros of the filter do not hide what is not finite in the pixels beyond it.
    met = (k < S * 4)[None, :]
    for _ in range(0, bound(R)):
        if S * 4 < BLOCK_K:
            a = tl.load(x_at, mask=met, other=0.0)
        else:
            a = tl.load(x_at)
        acc = dot(a, tl.load(w_at), acc, PRECISION)
        x_at += columns // 2 * 8
        w_at += BLOCK_K

    mask_c = c < CO
    v = load_affine(acc, c, mask_c, bias_ptr, Norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps))
    v = tl.where(present[:, None], v, float("-inf"))
    by_row = tl.permute(tl.reshape(v, (2, 2 * PIXELS, BLOCK_N)), (1, 2, 0))
    even, odd = tl.split(by_row)
    own = largest(even, odd)
    even_own, odd_own = tl.split(tl.permute(tl.reshape(own, (2, PIXELS, BLOCK_N)), (1, 2, 0)))
    even_odd, odd_odd = tl.split(tl.permute(tl.reshape(odd, (2, PIXELS, BLOCK_N)), (1, 2, 0)))
    j = tl.arange(0, PIXELS)
    above = tl.broadcast_to(tl.maximum(j - SIDE, 0)[:, None], (PIXELS, BLOCK_N))
    before = tl.broadcast_to(tl.maximum(j - 1, 0)[:, None], (PIXELS, BLOCK_N))
    even_column = largest(even_own, tl.gather(even_odd, above, 0))
    odd_column = largest(odd_own, tl.gather(odd_odd, above, 0))
    pooled = largest(largest(even_column, odd_column), tl.gather(odd_column, before, 0))

    h = h0 + j // SIDE
    w = w0 + j % SIDE
    mask = (j >= SIDE) & (j % SIDE > 0) & (h < pooled_h) & (w < pooled_w)
    to = y_ptr + (((n * pooled_h + h) * pooled_w + w) * CO)[:, None] + c[None, :]
    tl.store(to, relu(pooled).to(y_ptr.dtype.element_ty), mask=mask[:, None] & mask_c[None, :])


def why_not(problem: ConvProblem) -> str | None:
    """Why a convolution is not computed together with the pool behind it; None if it may be."""
    if problem.ci > PIXEL or problem.groups != 1:
        return f"it needs at most {PIXEL} input channels in one group"
    if problem.stride != (2, 2) or problem.dilation != (1, 1):
        return "it needs stride 2 and no dilation"
    if problem.s > RUN or problem.r > RUN:
        return f"it needs a filter of at most {RUN}x{RUN}"
    if problem.prologue:
        return "its input is normalised on the way into the product"
    if problem.dtype == torch.float32 and not problem.tf32 and problem.arch != INTERPRETER:
        return "fp32 is not multiplied by tensor cores"
    return None


def pooled_size(size: int) -> int:
    """Rows (or columns) behind the pool."""
    kernel, stride, padding = POOL
    return (size + 2 * padding - kernel) // stride + 1


def default_config(problem: ConvProblem) -> TileConfig:
    """The tile of the product: four parities of SIDE x SIDE pooled pixels."""
    widest, warps = (32, 4) if problem.arch == 100 and problem.dtype == torch.float32 else (64, 8)
    if problem.arch == 90:
        warps = 4  # all four parities of a pixel in one thread, which need not exchange them; two programs at a time
    block_n = min(widest, max(16, triton.next_power_of_2(problem.co)))
    return TileConfig(4 * SIDE * SIDE, block_n, PIXEL * RUN, num_warps=warps)


class Work(NamedTuple):
    """What the launches of a problem come to: elements that are packed, programs that convolve, and the
    multiply-accumulates of each, those of its halo and of zeros included."""

    packed: int
    programs: int
    macs: int


def work(problem: ConvProblem) -> Work:
    """That of ``problem``."""
    tile, (rows, columns) = default_config(problem), _packed_size(problem)
    sides = (cdiv(pooled_size(size), SIDE - 1) for size in (problem.p, problem.q))
    channel_tiles = cdiv(problem.co, tile.block_n)
    filters = channel_tiles * tile.block_n * problem.r * RUN
    packed = (problem.n * rows * columns + filters) * PIXEL
    programs = problem.n * prod(sides) * channel_tiles
    return Work(packed, programs, tile.block_m * tile.block_n * problem.r * tile.block_k)


def _packed_size(problem: ConvProblem) -> tuple[int, int]:
    """Rows and columns of a packed image: those that the filter meets, of which each run has RUN columns."""
    return 2 * (problem.p - 1) + problem.r, 2 * (problem.q - 1) + RUN


def conv_pool(
    x: Tensor,
    w: Tensor,
    *,
    geometry: Geometry,
    bias: Tensor | None = None,
    norm: Norm,
    tf32: bool = False,
) -> Tensor:
    """``max_pool(relu(norm(conv(x) + bias)), 3, stride=2, padding=1)`` in two launches, of which the first packs.

    ``x`` [N, CI <= 4, H, W]: in any layout, fp32, fp16 or bf16; it is rounded to the dtype of ``w`` [CO, CI, R, S],
    which is channels_last. Stride 2, R and S at most 8. NaN wins, as in PyTorch's pool.

    Returns [N, CO, P', Q'], channels_last, in the dtype of ``w``. Raises ValueError for anything else, RuntimeError
    where nothing can execute the kernels.
    """
    launches = _launches(layout(x), layout(w), geometry, norm.eps, tf32, target_arch())
    image, filters, y = (
        torch.empty_strided(like.shape, like.strides, dtype=like.dtype, device=x.device)
        for like in (launches.image, launches.filters, launches.y)
    )
    vectors = {
        "bias_ptr": bias,
        "mean_ptr": norm.mean,
        "var_ptr": norm.var,
        "gamma_ptr": norm.gamma,
        "beta_ptr": norm.beta,
    }
    launches.pool.check(vectors)  # before anything is launched
    launches.pack.run(x_ptr=x, w_ptr=w, image_ptr=image, filter_ptr=filters)
    launches.pool.run(image_ptr=image, filter_ptr=filters, y_ptr=y, **vectors)
    return y


class _Launches(NamedTuple):
    """Of one stem: what packs, what convolves and pools; the layouts of the packed image and filter, and of ``y``."""

    pack: Recipe
    pool: Recipe
    image: Layout
    filters: Layout
    y: Layout


@lru_cache(maxsize=KEPT_LAYOUTS)
def _launches(x: Layout, w: Layout, geometry: Geometry, eps: float, tf32: bool, arch: int) -> _Launches:
    problem = _problem(x, w, geometry, tf32, arch)
    tile = default_config(problem)
    rows, columns = _packed_size(problem)
    filters = cdiv(problem.co, tile.block_n) * tile.block_n
    pooled_h, pooled_w = pooled_size(problem.p), pooled_size(problem.q)
    image = Layout((problem.n, rows, columns, PIXEL), (rows * columns * PIXEL, columns * PIXEL, PIXEL, 1), w.dtype)
    taps = Layout((filters, problem.r, RUN, PIXEL), (problem.r * RUN * PIXEL, RUN * PIXEL, PIXEL, 1), w.dtype)
    y = channels_last((problem.n, problem.co, pooled_h, pooled_w), w.dtype)
    packed = problem.n * rows * columns
    packs = {
        **{"N": problem.n, "H": problem.h, "W": problem.w, "CO": problem.co, "channels": problem.ci},
        **{"rows": rows, "columns": columns, "filters": filters},
        **{"pad_h": problem.padding[0], "pad_w": problem.padding[1]},
        **{"x_steps": Steps(*x.strides), "w_steps": Steps(*w.strides)},
        **{"R": problem.r, "S": problem.s, "RUN": RUN, "BLOCK": PACKED_AT_ONCE},
    }
    programs = cdiv(packed, PACKED_AT_ONCE) + cdiv(filters * problem.r * RUN, PACKED_AT_ONCE)
    config = TileConfig(PACKED_AT_ONCE, PIXEL, 1)
    tiles_h, tiles_w = cdiv(pooled_h, SIDE - 1), cdiv(pooled_w, SIDE - 1)
    pools = {
        **{"P": problem.p, "Q": problem.q, "rows": rows, "columns": columns},
        **{"pooled_h": pooled_h, "pooled_w": pooled_w, "tiles_h": tiles_h, "tiles_w": tiles_w},
        **{"eps": eps, "CO": problem.co, "R": problem.r, "S": problem.s, "SIDE": SIDE},
        **{
            "INT64": packed * PIXEL >= 2**31 or span(y) >= 2**31,
            "PRECISION": precision(problem),
            "blocks": blocks(tile),
        },
    }
    grid = (problem.n * tiles_h * tiles_w * (filters // tile.block_n),)
    vectors = {f"{name}_ptr": Vector(f"norm.{name}", (problem.co,)) for name in ("mean", "var", "gamma", "beta")}
    vectors["bias_ptr"] = Vector("bias", (problem.co,))
    return _Launches(
        Recipe(conv_pack_kernel, (programs,), packs, config, _pack_cost),
        Recipe(conv_pool_kernel, grid, pools, tile, partial(_cost, problem), vectors),
        *(image, taps, y),
    )


def _problem(x: Layout, w: Layout, geometry: Geometry, tf32: bool, arch: int) -> ConvProblem:
    """The convolution. Raises ValueError for one that :func:`conv_pool` does not compute."""
    require_channels_last_filter(w)
    if len(x.shape) != 4 or x.dtype not in FLOATS:
        raise ValueError(f"x must be [N, CI, H, W], in float32, float16 or bfloat16; got {x.dtype} {tuple(x.shape)}")
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"w of shape {tuple(w.shape)} does not fit {x.shape[1]} channels")
    (n, ci, h, width), (co, _, r, s) = x.shape, w.shape
    problem = ConvProblem(n, h, width, ci, co, r, s, *geometry, w.dtype, tf32, False, arch)
    check_geometry(problem)
    if (reason := why_not(problem)) is not None:
        raise ValueError(f"the convolution of {tuple(x.shape)} with {tuple(w.shape)}, {geometry}: {reason}")
    return problem


def _pack_cost(tensors: Mapping[str, Any]) -> Cost:
    image, filters = tensors["image_ptr"], tensors["filter_ptr"]
    return Cost(0, tensors["x_ptr"].nbytes + tensors["w_ptr"].nbytes, image.nbytes + filters.nbytes)


def _cost(problem: ConvProblem, tensors: Mapping[str, Any]) -> Cost:
    # Behind a filter of fewer than RUN columns, the last ones of a packed row are met by none.
    _, packed = _packed_size(problem)
    image = tensors["image_ptr"].nbytes * (packed - RUN + problem.s) // packed
    read = image + sum(t.nbytes for name, t in tensors.items() if t is not None and name not in ("image_ptr", "y_ptr"))
    depth = problem.r * problem.s * problem.ci
    return Cost(2 * problem.m * problem.co * depth, read, tensors["y_ptr"].nbytes)
