"""A chain of convolutions in one launch: 3x3, the 1x1 that ends its block with the residual, the first 1x1 of the next.

A bottleneck's outputs between its convolutions are as large as memory is slow, and a 1x1 convolution needs nothing of
other pixels: so a program keeps its pixels' channels in registers from one convolution to the next. No pixel is
computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chain_box, conv_box
from .activation import relu
from .chain import WIDEST, Chain, Link, Widths, affine, block_of, block_output, even, far, held, shared, tail_stages
from .conv import ConvProblem, Geometry, Size, blocks, check_geometry, precision, sizes
from .epilogue import WHOLE, Added, Residual, added
from .gpus import ARCHITECTURES, gpu_of
from .launch import INTERPRETER, KEPT_LAYOUTS, Cost, Recipe, TileConfig, Vector, target_arch
from .memory import (
    Layout,
    cdiv,
    empty_channels_last,
    layout,
    require_channels_last_filter,
    require_pixel_linear,
    stride_of,
)
from .tile import Pixels, Tile, bound, dot, settled, tap_mask


class Form(NamedTuple):
    """What the compiled code depends on: the 3x3's size and chunks of channels, the widths between, and which case.

    ``EVEN``: all channels fill their blocks. ``MIDDLE``, ``NEXT``: blocks that hold all channels of the first and of
    the last convolution's output. ``TAIL_STAGES``: of the loop over the channels of z.
    """

    R: int
    S: int
    CHUNKS: int
    MIDDLE: int
    NEXT: int
    TAIL_STAGES: int
    EVEN: bool
    RES_PADDED: bool
    INT64: bool
    PRECISION: str


@triton.jit
def product_by_tap(x, w, row, mask_m, size, geometry, ci, offs_n, mask_n, form: tl.constexpr, BLOCK_K: tl.constexpr):
    """The product of a tile of pixels with the filter ``w`` [offs_n, R, S, ci], tap by tap, chunk by chunk."""
    R: tl.constexpr = form.R
    S: tl.constexpr = form.S
    CHUNKS: tl.constexpr = form.CHUNKS
    PRECISION: tl.constexpr = form.PRECISION
    stride, padding, dilation, _ = geometry
    h0 = row // size.Q % size.P * stride[0] - padding[0]
    w0 = row % size.Q * stride[1] - padding[1]
    pixel = (row // (size.P * size.Q) * size.H + h0) * size.W + w0
    taps = tap_mask(h0, w0, mask_m, size.H, size.W, dilation[0], dilation[1], R, S)
    offs_k = tl.arange(0, BLOCK_K)
    x_offs = (pixel * x.stride)[:, None] + offs_k[None, :]
    w_offs = (offs_n * w.stride)[None, :] + offs_k[:, None]
    acc = tl.zeros((row.shape[0], offs_n.shape[0]), tl.float32)
    pitch = tl.full((), 1, row.dtype) * x.stride
    tap_step = dilation[1] * pitch - (CHUNKS - 1) * BLOCK_K
    row_step = tap_step + (size.W * dilation[0] - S * dilation[1]) * pitch
    x_step = tl.full((), 0, row.dtype)
    tap = tl.full((), 1, taps.dtype)
    w_step = 0
    chunk = 0
    s = 0
    for _ in range(0, bound(R * S * CHUNKS)):
        inside = (taps & tap != 0)[:, None]
        if form.EVEN:
            a = tl.load(x.ptr + x_step + x_offs, mask=inside, other=0.0)
            b = tl.load(w.ptr + w_step + w_offs)
        else:
            mask_k = offs_k < ci - chunk * BLOCK_K
            a = tl.load(x.ptr + x_step + x_offs, mask=inside & mask_k[None, :], other=0.0)
            b = tl.load(w.ptr + w_step + w_offs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
        # By selection: where its loop branches, the assembler has each product wait for the one before.
        chunk += 1
        last = chunk == CHUNKS
        chunk = tl.where(last, 0, chunk)
        s += last.to(tl.int32)
        wrap = s == S
        s = tl.where(wrap, 0, s)
        tap = tl.where(last, tap << 1, tap)
        w_step += BLOCK_K if form.EVEN else tl.where(last, ci - (CHUNKS - 1) * BLOCK_K, BLOCK_K)
        x_step += tl.where(wrap, row_step, tl.where(last, tap_step, BLOCK_K))
    return acc


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w"])
def chain_forward_kernel(
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
    crop,
    widths,
    form: tl.constexpr,
    blocks: tl.constexpr,
):
    """``z = relu(norm(expand @ relu(norm(conv(x)))) + res)`` and ``y = relu(norm(reduce @ z))``.

    One program computes all channels of both for BLOCK_M pixels. The channels of ``z`` come BLOCK_N at a time: each
    chunk is stored, and multiplied into ``y`` at once. Without ``spatial`` the input takes the convolution's place,
    without ``reduce`` there is no ``y``.
    """
    MIDDLE: tl.constexpr = form.MIDDLE
    NEXT: tl.constexpr = form.NEXT
    EVEN: tl.constexpr = form.EVEN
    PRECISION: tl.constexpr = form.PRECISION
    BLOCK_M: tl.constexpr = blocks.m
    BLOCK_N: tl.constexpr = blocks.n
    OFFSET: tl.constexpr = tl.int64 if form.INT64 else tl.int32
    FACTOR: tl.constexpr = x_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    # Rows past the end read the first one instead, and the stores drop them.
    row = tl.where(mask_m, offs_m, 0)
    middle = tl.arange(0, MIDDLE)
    mask_middle = middle < widths.middle
    size = Size(H, W, P, Q)
    if spatial_w_ptr is not None:
        geometry = Geometry((stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w), 1)
        x, w = Pixels(x_ptr, widths.x), Pixels(spatial_w_ptr, form.R * form.S * widths.ci)
        acc = product_by_tap(x, w, row, mask_m, size, geometry, widths.ci, middle, mask_middle, form, blocks.k)
        inner = relu(affine(acc, spatial_affine_ptr, middle, mask_middle, widths.middle)).to(FACTOR)
        if not EVEN:
            inner = tl.where(mask_middle[None, :], inner, 0.0)
    elif EVEN:
        inner = tl.load(x_ptr + (row * widths.x)[:, None] + middle[None, :])
    else:
        inner = tl.load(x_ptr + (row * widths.x)[:, None] + middle[None, :], mask=mask_middle[None, :], other=0.0)

    res = Pixels(res_ptr, widths.res)
    following = tl.arange(0, NEXT)
    mask_next = following < widths.next
    acc = tl.zeros((BLOCK_M, NEXT), tl.float32)
    for chunk in tl.range(0, bound(tl.cdiv(widths.wide, BLOCK_N)), num_stages=form.TAIL_STAGES):
        c = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_c = c < widths.wide
        expand = expand_w_ptr + (c * widths.middle)[None, :] + middle[:, None]
        if EVEN:
            b = tl.load(expand)
        else:
            b = tl.load(expand, mask=mask_middle[:, None] & mask_c[None, :], other=0.0)
        v = dot(inner, b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        tile = Tile(row, c, mask_m, mask_c)
        z = block_output(v, expand_affine_ptr, widths.wide, tile, res, crop, P, Q, form).to(FACTOR)
        at = (row * widths.wide)[:, None] + c[None, :]
        if EVEN:
            tl.store(z_ptr + at, z, mask=mask_m[:, None])
        else:
            tl.store(z_ptr + at, z, mask=mask_m[:, None] & mask_c[None, :])
        if reduce_w_ptr is not None:
            reduce = reduce_w_ptr + (following * widths.wide)[None, :] + c[:, None]
            if EVEN:
                b = tl.load(reduce)
            else:
                z = tl.where(mask_c[None, :], z, 0.0)
                b = tl.load(reduce, mask=mask_c[:, None] & mask_next[None, :], other=0.0)
            acc = settled(dot(z, b, acc, PRECISION))
    if reduce_w_ptr is not None:
        y = relu(affine(acc, reduce_affine_ptr, following, mask_next, widths.next)).to(FACTOR)
        at = (row * widths.next)[:, None] + following[None, :]
        tl.store(y_ptr + at, y, mask=mask_m[:, None] & mask_next[None, :])


def why_not(chain: Chain) -> str | None:
    """Why the convolutions are not computed in one launch, whatever the tile; None if they may be."""
    first, expand = chain.first, chain.expand
    if any(link.groups > 1 for link in chain.links):
        return "a group's channels alone would not fill a program's tile"
    behind = [link for link in (expand, chain.reduce) if link is not None]
    if any(link.r * link.s > 1 or link.stride != (1, 1) or link.padding != (0, 0) for link in behind):
        return "behind the first convolution, only 1x1 ones need no pixels of other programs"
    if chain.spatial is None and chain.reduce is None:
        return "one convolution is no chain"
    if first.dtype.itemsize == 4 and not first.tf32:
        return "fp32 is not multiplied by tensor cores"
    if max(block_of(expand.ci), block_of(chain.reduce.co if chain.reduce else 0)) > WIDEST:
        return f"more than {WIDEST} channels do not stay in a program's registers"
    if expand.ci % 16 or expand.co % 16:
        return "it needs multiples of 16 channels between convolutions: loads of others are narrow, and some not fenced"
    return None


_SMALL = (128, 64, 64, 8, 3, 256), (64, 64, 64, 8, 3, 512), (64, 32, 64, 4, 3, 256)
TILES: dict[int, tuple[tuple[int, int, int, int, int, int], ...]] = {
    80: ((128, 64, 128, 8, 3, 272), (128, 64, 64, 8, 3, 272), (64, 64, 64, 8, 3, 512)),
    **{86: _SMALL, 89: _SMALL, 120: _SMALL},
    90: ((128, 64, 128, 8, 3, 384), (128, 64, 64, 8, 3, 288), (64, 64, 64, 8, 3, 512)),
    100: ((128, 64, 64, 8, 3, 256), (64, 64, 64, 8, 3, 512)),
}
"""Per architecture, pixels, channels of z and of the input at a time, warps and stages of the tiles, and the most
channels (:func:`held`) with which none spills; for factors of 16 bits."""
if triton.__version__.startswith("3.6."):
    TILES[90] = (128, 64, 128, 8, 3, 256), (128, 64, 64, 8, 3, 272), (64, 64, 64, 8, 3, 512)
LOW = dict.fromkeys(ARCHITECTURES, 64) | {90: 128, 100: 128}
"""Per architecture, the most pixels of a tile for channels that do not fill their blocks: higher ones would spill."""
TF32_TILES = (128, 32, 32, 8, 3, 128), (64, 32, 32, 8, 3, 384)
"""The same of every architecture, for factors in TF32."""


def tiles(chain: Chain) -> Iterator[TileConfig]:
    """Those to choose from; none where :func:`why_not` has a reason, or no tile fits shared memory and registers."""
    if why_not(chain) is not None:
        return
    first, gpu = chain.first, gpu_of(chain.first.arch)
    for block_m, block_n, block_k, warps, stages, most in TILES[gpu.arch] if first.dtype.itemsize == 2 else TF32_TILES:
        tile = TileConfig(block_m, block_n, min(block_k, block_of(first.ci)), warps, stages)
        masked = not even(chain, tile)
        if masked or (first.dtype.itemsize == 4 and block_m == 64):
            # The compiler would spill for one more program at a time.
            tile = replace(tile, max_registers=255)
        fits = held(chain) <= most and shared(chain, tile) <= gpu.shared and not (masked and block_m > LOW[gpu.arch])
        fits = fits and chain.expand.co % block_n == 0  # else some load the residual by the element, and spill
        if fits and block_k <= max(tile.block_k, 64) and (chain.spatial is not None or block_k <= 64):
            yield tile
    yield from chain_box.tiles(chain)


MOST_ELEMENTS = 2**20
"""Of a tensor in a kernel (``triton.language.core.TRITON_MAX_TENSOR_NUMEL``)."""


@lru_cache(maxsize=KEPT_LAYOUTS)
def default_config(chain: Chain) -> TileConfig:
    """The tile where none is given; of no boxes, since it serves those that TMA does not take."""
    first, wide = chain.first, block_of(chain.expand.co)
    block_k = block_of(first.ci)
    if first.arch == INTERPRETER:
        columns = max(block_of(chain.expand.ci), block_of(chain.reduce.co if chain.reduce else 0))
        block_n = min(wide, 512, MOST_ELEMENTS // columns)
        block_m = min(block_of(chain.expand.m), 1024, MOST_ELEMENTS // max(block_n, columns))
        return TileConfig(block_m, block_n, min(block_k, 512, MOST_ELEMENTS // columns))
    # What the plan never takes, fp32 without tensor cores above all, has room with few channels at a time.
    low = TileConfig(64, min(wide, 16), min(block_k, 16), num_warps=8, num_stages=2, max_registers=255)
    return next((tile for tile in tiles(chain) if tile.box is None), low)


def chain_forward(
    x: Tensor,
    spatial: Link | None,
    expand: Link,
    reduce: Link | None,
    *,
    geometry: Geometry = Geometry(),
    residual: Residual | None = None,
    tf32: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``z = relu(norm(expand(relu(norm(spatial(x))))) + residual)`` and ``y = relu(norm(reduce(z)))``, in one launch.

    ``x`` [N, CI, H, W] and the residual are pixel-linear, filters have the dtype of ``x``. ``spatial``: a filter
    [C, CI, R, S] of at most 64 taps, with ``geometry``; None: ``x`` is what ``expand`` reads. ``expand``: [K, C, 1, 1].
    ``reduce``: [D, K, 1, 1]; or None. What a convolution reads was rounded to the dtype of ``x``. ``config``: the tile,
    whose ``block_n`` are the channels of ``z`` at a time; without it, and for a box that TMA cannot load,
    ``default_config``.

    Returns z [N, K, P, Q] and y [N, D, P, Q] or None, channels_last, of the dtype of ``x``. Raises ValueError for
    tensors that do not fit or lie otherwise, RuntimeError where nothing can execute the kernel.
    """
    links = {"spatial": spatial, "expand": expand, "reduce": reduce}
    filters = tuple(None if link is None else layout(link.w) for link in links.values())
    chosen = conv_box.loadable(config, x, *(link.w for link in links.values() if link is not None))
    recipe = _recipe(layout(x), filters, geometry, added(residual), tf32, target_arch(), chosen)
    n, (p, q) = x.shape[0], (recipe.scalars["P"], recipe.scalars["Q"])
    z, y = (None if w is None else _output(x, (n, w.shape[0], p, q)) for w in filters[1:])
    tensors: dict[str, Tensor | None] = {}
    for name, link in links.items():
        tensors[f"{name}_w_ptr"], tensors[f"{name}_affine_ptr"] = link or (None, None)
    recipe.run(**tensors, x_ptr=x, res_ptr=None if residual is None else residual.tensor, z_ptr=z, y_ptr=y)
    assert z is not None
    return z, y


def _output(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return empty_channels_last(shape, x.dtype, x.device)


@lru_cache(maxsize=KEPT_LAYOUTS)
def _recipe(
    x: Layout,
    filters: tuple[Layout | None, ...],
    geometry: Geometry,
    residual: Added,
    tf32: bool,
    arch: int,
    config: TileConfig | None,
) -> Recipe:
    require_pixel_linear(x=x, residual=residual.layout)
    chain = _chain(x, filters, geometry, tf32, arch)
    expand, first, reduce = chain.expand, chain.first, chain.reduce
    shape = (expand.n, expand.co, expand.p, expand.q)
    residual.require_fits(shape)
    vectors = {
        f"{name}_affine_ptr": Vector(f"{name}.affine", (2, link.co), (torch.float32,))
        for name, link in chain._asdict().items()
        if link is not None
    }
    cost = partial(_cost, chain)
    if config is not None and config.box is not None:
        boxed = chain_box.recipe(chain, x, residual, config, cost, vectors)
        if boxed is not None:
            return boxed
        config = None
    tile = config or default_config(chain)
    crop, res = residual.crop(shape), residual.layout
    form = Form(
        *((first.r, first.s) if chain.spatial else (1, 1)),
        CHUNKS=cdiv(first.ci, tile.block_k),
        MIDDLE=block_of(expand.ci),
        NEXT=block_of(reduce.co if reduce else 0),
        TAIL_STAGES=tail_stages(chain, tile),
        EVEN=even(chain, tile),
        RES_PADDED=crop is not WHOLE,
        INT64=far(chain, x, res, tile),
        PRECISION=precision(first),
    )
    scalars = {
        "M": expand.m,
        **sizes(first),
        "crop": crop,
        "widths": Widths(first.ci, expand.ci, expand.co, reduce.co if reduce else 0, stride_of(x), stride_of(res)),
        "form": form,
        "blocks": blocks(tile),
    }
    grid = (cdiv(expand.m, tile.block_m),)
    return Recipe(chain_forward_kernel, grid, scalars, tile, cost, vectors)


def _chain(x: Layout, filters: tuple[Layout | None, ...], geometry: Geometry, tf32: bool, arch: int) -> Chain:
    """The convolutions; raises ValueError where a filter does not fit what it is to read."""
    if geometry.groups != 1:
        raise ValueError(f"geometry.groups must be 1 in a chain; got {geometry.groups}")
    links: list[ConvProblem | None] = []
    n, ci, h, w = x.shape
    for name, filter, of in zip(Chain._fields, filters, (geometry, Geometry(), Geometry()), strict=True):
        if filter is None:
            links.append(None)
            continue
        require_channels_last_filter(filter)
        co, _, r, s = filter.shape
        problem = ConvProblem(n, h, w, ci, co, r, s, *of, x.dtype, tf32, False, arch)
        if filter.dtype != x.dtype or filter.shape[1] != ci or (name != "spatial" and (r, s) != (1, 1)) or r * s > 64:
            size = "R, S" if name == "spatial" else "1, 1"
            raise ValueError(
                f"{name}.w must be {x.dtype} [CO, {ci}, {size}], of at most 64 taps; got {filter.dtype} "
                f"{tuple(filter.shape)}"
            )
        check_geometry(problem)
        links.append(problem)
        ci, h, w = co, problem.p, problem.q
    spatial, expand, reduce = links
    if expand is None or (spatial is None and reduce is None):
        raise ValueError("a chain has expand, and spatial or reduce")
    return Chain(spatial, expand, reduce)


def _cost(chain: Chain, tensors: Mapping[str, Any]) -> Cost:
    first, expand = chain.first, chain.expand
    x, res = tensors["x_ptr"], tensors["res_ptr"]
    read = first.pixels_read * first.ci * x.element_size()
    weights = (tensors[f"{name}_{part}_ptr"] for name in Chain._fields for part in ("w", "affine"))
    read += sum(t.nbytes for t in weights if t is not None)
    if res is not None:
        read += expand.m * res.shape[1] * res.element_size()
    written = sum(t.nbytes for name in ("z_ptr", "y_ptr") if (t := tensors[name]) is not None)
    return Cost(sum(2 * link.m * link.co * link.r * link.s * link.ci for link in chain.links), read, written)
