"""Convolution forward: an implicit matrix product in NHWC, with batch norm, residual and ReLU in its epilogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpus import gpu_of
from .launch import INTERPRETER, Cost, Recipe, TileConfig, Vector, target_arch
from .tile import (
    Layout,
    Moments,
    Norm,
    all_finite,
    bound,
    cdiv,
    channels_last,
    dot,
    layout,
    load_channels,
    pixel_stride,
    relu,
    require_channels_last_filter,
    require_fitting_residual,
    require_pixel_linear,
    span,
    store_moments,
    tap_mask,
)

# Sizes that the compiled code does not depend on. CI, CO and the strides are not among them: their divisibility by 16
# decides how wide a load or store may be.
_RUNTIME_SIZES = [
    *("M", "H", "W", "P", "Q", "tiles", "chunks", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w"),
    *("group_ci", "group_co", "res_h", "res_w", "res_channels", "res_step", "res_before"),
]


@triton.jit
def store_output(
    acc,
    offs_m,
    offs_n,
    channel,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    res_ptr,
    y_ptr,
    moments_ptr,
    M,
    P,
    Q,
    CO,
    channels,
    tiles,
    tile,
    y_stride,
    res_stride,
    res_h,
    res_w,
    res_channels,
    res_step,
    res_before,
    eps,
    RES_PADDED: tl.constexpr,
    RELU: tl.constexpr,
):
    """``y = relu((acc + bias - mean) * gamma/sqrt(var + eps) + beta + res)`` for one tile; each step is optional.

    With ``moments_ptr``, also the mean of the tile's rounded values and the sum of squared deviations from it.
    ``channel`` is the number of the first output channel of the group; ``offs_n`` counts from there.
    """
    mask_n = offs_n < CO
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    c = channel + offs_n
    v = acc
    if bias_ptr is not None:
        v += load_channels(bias_ptr, c, mask_n)[None, :]
    if mean_ptr is not None:
        scale = 1.0 / tl.sqrt_rn(load_channels(var_ptr, c, mask_n) + eps)
        if gamma_ptr is not None:
            scale *= load_channels(gamma_ptr, c, mask_n)
        v = (v - load_channels(mean_ptr, c, mask_n)[None, :]) * scale[None, :]
        if beta_ptr is not None:
            v += load_channels(beta_ptr, c, mask_n)[None, :]
    if res_ptr is not None:
        if RES_PADDED:
            pixel = (offs_m // (P * Q) * res_h + offs_m // Q % P * res_step) * res_w + offs_m % Q * res_step
            res_c = c - res_before
            res_mask = mask & ((res_c >= 0) & (res_c < res_channels))[None, :]
            res = tl.load(res_ptr + (pixel * res_stride)[:, None] + res_c[None, :], mask=res_mask, other=0.0)
        else:
            res = tl.load(res_ptr + (offs_m * res_stride)[:, None] + c[None, :], mask=mask, other=0.0)
        v += res.to(tl.float32)
    if RELU:
        v = relu(v)
    rounded = v.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (offs_m * y_stride)[:, None] + c[None, :], rounded, mask=mask)
    if moments_ptr is not None:
        count = tl.minimum(M - tile * offs_m.shape[0], offs_m.shape[0]).to(tl.float32)
        store_moments(rounded, count, moments_ptr + tile * channels + c, tiles * channels, mask_n)


@triton.jit
def product_by_group(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    row,
    mask_m,
    co,
    x_stride,
    w_stride,
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
    group_ci,
    group_co,
    R: tl.constexpr,
    S: tl.constexpr,
):
    """The product of a tile, each column ``co`` from the input channels of its own group alone: slow, but apart."""
    h0 = row // Q % P * stride_h - pad_h
    w0 = row % Q * stride_w - pad_w
    image = row // (P * Q) * H
    acc = tl.zeros((row.shape[0], co.shape[0]), tl.float32)
    for k in range(0, bound(R * S * group_ci)):
        tap = k // group_ci
        h = h0 + tap // S * dil_h
        w = w0 + tap % S * dil_w
        inside = (mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
        ci = co // group_co * group_ci + k % group_ci
        a = tl.load(x_ptr + (((image + h) * W + w) * x_stride)[:, None] + ci[None, :], mask=inside, other=0.0)
        b = tl.load(w_ptr + co * w_stride + k)
        if scale_ptr is not None:
            scale, shift = tl.load(scale_ptr + ci), tl.load(shift_ptr + ci)
            v = relu(tl.fma(a.to(tl.float32), scale[None, :], shift[None, :]))
            a = tl.where(inside, v, 0.0).to(a.dtype)
        acc += a.to(tl.float32) * b.to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=_RUNTIME_SIZES)
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
    res_ptr,
    y_ptr,
    moments_ptr,
    M,
    H,
    W,
    P,
    Q,
    CI,
    CO,
    channels,
    tiles,
    chunks,
    x_stride,
    w_stride,
    y_stride,
    res_stride,
    res_h,
    res_w,
    res_channels,
    res_step,
    res_before,
    eps,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    group_ci,
    group_co,
    R: tl.constexpr,
    S: tl.constexpr,
    MERGED: tl.constexpr,
    POINTWISE: tl.constexpr,
    PADDED: tl.constexpr,
    FLAT: tl.constexpr,
    EVEN_CI: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    RES_PADDED: tl.constexpr,
    RELU: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y[m, co] = epilogue(sum over r, s, ci of prologue(x[pixel(m, r, s), ci]) * w[co, r, s, ci])``.

    One program computes BLOCK_M pixels x BLOCK_N output channels of one group (or of several merged ones). It walks K
    tap by tap, each tap in ``chunks`` of BLOCK_K channels; which taps of a pixel lie inside the image is decoded once,
    before the loop. CI and CO are the channels of the group.

    FLAT: so few input channels that a chunk runs across taps: K = (r, s, ci) is cut every BLOCK_K wherever that falls.
    MERGED: CI and CO hold several groups of group_ci and group_co channels each, and the filter is block-diagonal.
    """
    OFFSET: tl.constexpr = tl.int64 if INT64 else tl.int32
    tiles_n = tl.cdiv(CO, BLOCK_N)
    pid = tl.program_id(0)
    group = tl.program_id(1)
    offs_m = (pid // tiles_n).to(OFFSET) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read the first one instead: no mask in the loop, and the store drops them.
    mask_m = offs_m < M
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
        trips = chunks
    else:
        x_offs += offs_k[None, :]
        if ONE_CHUNK:
            chunks = 1
        trips = R * S * chunks
        chunk = 0
        s = 0
    x_step = tl.full((), 0, OFFSET)
    w_step = 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, bound(trips)):
        if FLAT:
            k_mask = offs_k < k_end - w_step
            x_at = x_offs + (r * dil_h * W * pitch + s * tap_step + c)[None, :]
            if PADDED:
                a_mask = ((taps[:, None] >> (r * S + s)[None, :]) & 1 != 0) & k_mask[None, :]
            else:
                a_mask = k_mask[None, :]
            channel = c
        else:
            k_mask = offs_k < CI - chunk * BLOCK_K
            x_at = x_offs
            if PADDED:
                a_mask = (taps & tap != 0)[:, None]
            else:
                a_mask = tl.full((BLOCK_M, 1), True, tl.int1)
            if not EVEN_CI:
                a_mask = a_mask & k_mask[None, :]
            channel = chunk * BLOCK_K + offs_k
        if PADDED or FLAT or not EVEN_CI:
            a = tl.load(x_tile + x_step + x_at, mask=a_mask, other=0.0)
        else:
            a = tl.load(x_tile + x_step + x_at)
        if MERGED:
            b = tl.load(w_tile + w_step + w_offs, mask=same_group & k_mask[:, None], other=0.0)
        elif FLAT or not EVEN_CI:
            b = tl.load(w_tile + w_step + w_offs, mask=k_mask[:, None], other=0.0)
        else:
            b = tl.load(w_tile + w_step + w_offs)
        if scale_ptr is not None:
            scale = load_channels(scale_ptr, group * CI + channel, k_mask)
            shift = load_channels(shift_ptr, group * CI + channel, k_mask)
            # Padding is zero after the transform, which would turn it into relu(shift).
            v = relu(tl.fma(a.to(tl.float32), scale[None, :], shift[None, :]))
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
                if chunk == chunks:
                    chunk = 0
                    s += 1
                    x_step += tap_step - chunks * BLOCK_K
                    w_step += (group_ci if MERGED else CI) - chunks * BLOCK_K
                    if PADDED:
                        tap = tap << 1
                    if s == S:
                        s = 0
                        x_step += row_step - tap_step
    if MERGED:
        # A zero of the filter times another group's infinity or NaN is NaN.
        if not all_finite(acc):
            acc = product_by_group(
                x_ptr, w_ptr, scale_ptr, shift_ptr, row, mask_m, group * CO + col, x_stride, w_stride, H, W, P, Q,
                stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, group_ci, group_co, R=R, S=S,
            )  # fmt: skip

    # Half a wide tile at a time: one whole would not leave room in the registers for the residual.
    HALF: tl.constexpr = BLOCK_N // 2 if BLOCK_N >= 128 else BLOCK_N
    if HALF < BLOCK_N:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    else:
        left = acc
    half_n = pid % tiles_n * BLOCK_N + tl.arange(0, HALF)
    tile = (pid // tiles_n).to(OFFSET)
    store_output(
        left, offs_m, half_n, group * CO, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, res_ptr, y_ptr, moments_ptr,
        M, P, Q, CO, channels, tiles, tile, y_stride, res_stride, res_h, res_w, res_channels, res_step, res_before, eps,
        RES_PADDED=RES_PADDED, RELU=RELU,
    )  # fmt: skip
    if HALF < BLOCK_N:
        store_output(
            right, offs_m, half_n + HALF, group * CO, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, res_ptr, y_ptr,
            moments_ptr, M, P, Q, CO, channels, tiles, tile, y_stride, res_stride, res_h, res_w, res_channels, res_step,
            res_before, eps, RES_PADDED=RES_PADDED, RELU=RELU,
        )  # fmt: skip


Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
"""Stride, padding, dilation and groups of a convolution."""


@dataclass(frozen=True)
class ConvProblem:
    """Everything about a convolution that the choice of its tile may depend on.

    ``ci`` and ``co`` count all channels, over all ``groups``. ``tf32``: fp32 factors may be rounded to TF32. ``arch``:
    80 for sm_80 ..., or INTERPRETER.
    """

    n: int
    h: int
    w: int
    ci: int
    co: int
    r: int
    s: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    dtype: torch.dtype
    tf32: bool
    prologue: bool
    arch: int

    @property
    def p(self) -> int:
        """Rows of the output."""
        return output_size(self.h, self.r, self.stride[0], self.padding[0], self.dilation[0])

    @property
    def q(self) -> int:
        """Columns of the output."""
        return output_size(self.w, self.s, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def m(self) -> int:
        """Rows of the matrix product: output pixels of all images."""
        return self.n * self.p * self.q

    @property
    def pixels_read(self) -> int:
        """Input pixels, of all images, that some tap of the filter meets."""
        rows, columns = (
            len({o * st - pad + t * dil for o in range(outs) for t in range(taps)} & set(range(size)))
            for size, outs, taps, st, pad, dil in (
                (self.h, self.p, self.r, self.stride[0], self.padding[0], self.dilation[0]),
                (self.w, self.q, self.s, self.stride[1], self.padding[1], self.dilation[1]),
            )
        )
        return self.n * rows * columns

    @property
    def merged(self) -> int:
        """Groups that share a tile, so that narrow ones fill a tensor-core instruction: at most 32 input channels."""
        if self.groups == 1:
            return 1
        width = self.ci // self.groups
        return max(g for g in range(1, max(32 // width, 1) + 1) if self.groups % g == 0)

    @property
    def tile_channels(self) -> tuple[int, int]:
        """Input and output channels that a program's K loop and tile columns range over."""
        parts = self.groups // self.merged
        return self.ci // parts, self.co // parts

    @property
    def flat(self) -> bool:
        """Whether a chunk of K runs across taps: fewer input channels than the shortest product of a tensor core."""
        return self.groups == 1 and self.ci < 16 and self.r * self.s > 1


def output_size(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    """Rows (or columns) of a convolution's output."""
    return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


@lru_cache(maxsize=4096)
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
    hopper = problem.arch in (90, 100)
    if fp32 and not problem.tf32:
        deep = 32 if problem.prologue else 16
        block_m, block_n, block_k, stages = 64, min(block_n, 64), min(block_k, deep), 2 if problem.prologue else 3
    else:
        wide = 128 if not fp32 and not problem.prologue else 64
        # Merged groups may have to be told apart in the end, which takes registers too.
        block_m = 64 if problem.arch == 100 or problem.flat or problem.merged > 1 else 128
        block_n = min(block_n, wide)
        block_k = min(block_k, 32 if fp32 or problem.flat or (block_n == 128 and not hopper) else 64)
        stages = 3 if block_k == 64 else 4
    if problem.merged > 1:
        block_k = max(16, triton.next_power_of_2(ci))
    elif not problem.flat and block_k == 64 and ci % 64 and ci % 32 == 0:
        block_k = 32
    multiprocessors = gpu_of(problem.arch).multiprocessors
    while _programs(problem, block_m, block_n) < multiprocessors and block_m * block_n > 64 * 64:
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
    if (block_m, block_n) == (128, 32) and problem.merged == 1 and problem.arch in (86, 89, 120):
        return 192 if problem.dtype == torch.float32 else 168
    return None


def _programs(problem: ConvProblem, block_m: int, block_n: int) -> int:
    co = problem.tile_channels[1]
    return cdiv(problem.m, block_m) * cdiv(co, block_n) * (problem.groups // problem.merged)


def conv_forward(
    x: Tensor,
    w: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    prologue: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    residual_step: int = 1,
    residual_before: int = 0,
    relu: bool = False,
    tf32: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """``relu(norm(conv(prologue(x)) + bias) + residual)`` in one launch; every step but the convolution is optional.

    ``x`` [N, CI, H, W] and ``residual`` are pixel-linear (channels_last, or a slice of its channels or images), ``w``
    [CO, CI/groups, R, S] is channels_last and has the dtype of ``x``. ``prologue`` = (scale, shift), fp32 vectors [CI]:
    the input becomes ``relu(scale*x + shift)``, and padding zero after it. ``residual``: [N, CO, P, Q]; or, with a
    ``residual_step`` above 1 or fewer channels, every ``residual_step``-th pixel of it is added to the output channels
    from ``residual_before`` on. ``out``: a pixel-linear tensor [N, CO, P, Q] to write to. ``config``: the tile; without
    it, ``default_config``.

    Returns [N, CO, P, Q], channels_last, of ``out_dtype`` (that of ``x`` if not given). Raises ValueError for tensors
    that are not laid out so, RuntimeError where nothing can execute the kernel.
    """
    dtype = x.dtype if out_dtype is None else out_dtype
    mean, var, gamma, beta, eps = norm or (None, None, None, None, 0.0)
    epilogue = _Epilogue(layout(residual), residual_step, residual_before, eps, relu, layout(out) or dtype)
    geometry = (stride, padding, dilation, groups)
    recipe = _recipe(layout(x), layout(w), geometry, prologue is not None, epilogue, tf32, target_arch(), config)
    if out is None:
        out = _output(recipe, x, dtype)
    scale, shift = prologue or (None, None)
    recipe.run(
        x_ptr=x,
        w_ptr=w,
        scale_ptr=scale,
        shift_ptr=shift,
        bias_ptr=bias,
        mean_ptr=mean,
        var_ptr=var,
        gamma_ptr=gamma,
        beta_ptr=beta,
        res_ptr=residual,
        y_ptr=out,
        moments_ptr=None,
    )
    return out


def conv_forward_moments(
    x: Tensor,
    w: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    prologue: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    tf32: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor, Moments]:
    """``y = conv(prologue(x)) + bias`` [N, CO, P, Q] as it is, and the moments of its channels, in one launch.

    Arguments as for :func:`conv_forward`. The moments are those of the rounded values.
    """
    epilogue = _Epilogue(out=x.dtype)
    geometry = (stride, padding, dilation, groups)
    recipe = _recipe(layout(x), layout(w), geometry, prologue is not None, epilogue, tf32, target_arch(), config)
    y = _output(recipe, x, x.dtype)
    tiles, channels = recipe.scalars["tiles"], recipe.scalars["channels"]
    values = torch.empty(2, tiles, channels, dtype=torch.float32, device=x.device)
    scale, shift = prologue or (None, None)
    recipe.run(
        x_ptr=x,
        w_ptr=w,
        scale_ptr=scale,
        shift_ptr=shift,
        bias_ptr=bias,
        mean_ptr=None,
        var_ptr=None,
        gamma_ptr=None,
        beta_ptr=None,
        res_ptr=None,
        y_ptr=y,
        moments_ptr=values,
    )
    return y, Moments(values, recipe.config.block_m, recipe.scalars["M"])


class _Epilogue(NamedTuple):
    """What follows the product, as far as the launch depends on it. ``out``: the output's layout, or its dtype."""

    residual: Layout | None = None
    step: int = 1
    before: int = 0
    eps: float = 0.0
    relu: bool = False
    out: Layout | torch.dtype = torch.float32


@lru_cache(maxsize=4096)
def _recipe(
    x: Layout,
    w: Layout,
    geometry: Geometry,
    prologue: bool,
    epilogue: _Epilogue,
    tf32: bool,
    arch: int,
    config: TileConfig | None,
) -> Recipe:
    require_pixel_linear(x=x)
    require_channels_last_filter(w)
    n, ci, h, width = x.shape
    co, _, r, s = w.shape
    problem = ConvProblem(n, h, width, ci, co, r, s, *geometry, x.dtype, tf32, prologue, arch)
    check_geometry(problem)
    out = epilogue.out
    if not isinstance(out, Layout):
        out = channels_last((n, co, problem.p, problem.q), out)
    _check(problem, w, out, epilogue)
    tile = config or default_config(problem)
    tiles = cdiv(problem.m, tile.block_m)
    scalars = {
        **_geometry(problem, tile),
        **_epilogue(epilogue, out),
        "channels": co,
        "tiles": tiles,
        "x_stride": pixel_stride(x),
        "INT64": max(map(span, (x, out, epilogue.residual))) + tile.block_m >= 2**31,
    }
    grid = (tiles * cdiv(problem.tile_channels[1], tile.block_n), problem.groups // problem.merged)
    return Recipe(conv_forward_kernel, grid, scalars, tile, partial(_cost, problem), _vectors(ci, co))


def _vectors(ci: int, co: int) -> dict[str, Vector]:
    vectors = {
        f"{name}_ptr": Vector(f"prologue[{i}]", (ci,), (torch.float32,)) for i, name in enumerate(("scale", "shift"))
    }
    vectors["bias_ptr"] = Vector("bias", (co,))
    return vectors | {f"{name}_ptr": Vector(f"norm.{name}", (co,)) for name in ("mean", "var", "gamma", "beta")}


def _output(recipe: Recipe, x: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (x.shape[0], *(recipe.scalars[name] for name in ("channels", "P", "Q")))
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _geometry(problem: ConvProblem, tile: TileConfig) -> dict[str, Any]:
    """The kernel's arguments that follow from the problem and its tile alone."""
    ci, co = problem.tile_channels
    taps = problem.r * problem.s
    chunks = cdiv(taps * ci if problem.flat else ci, tile.block_k)
    if problem.merged > 1 and chunks > 1:
        raise ValueError(f"config.block_k must hold the {ci} input channels of merged groups; got {tile.block_k}")
    padded = problem.padding != (0, 0)
    return {
        "M": problem.m,
        "H": problem.h,
        "W": problem.w,
        "P": problem.p,
        "Q": problem.q,
        "CI": ci,
        "CO": co,
        "chunks": chunks,
        "w_stride": taps * (problem.ci // problem.groups),
        "stride_h": problem.stride[0],
        "stride_w": problem.stride[1],
        "pad_h": problem.padding[0],
        "pad_w": problem.padding[1],
        "dil_h": problem.dilation[0],
        "dil_w": problem.dilation[1],
        "R": problem.r,
        "S": problem.s,
        "group_ci": problem.ci // problem.groups,
        "group_co": problem.co // problem.groups,
        "MERGED": problem.merged > 1,
        "POINTWISE": taps == 1 and problem.stride == (1, 1) and not padded,
        "PADDED": padded,
        "FLAT": problem.flat,
        "EVEN_CI": ci % tile.block_k == 0,
        "ONE_CHUNK": chunks == 1,
        "PRECISION": "tf32" if problem.tf32 else "ieee",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }


def _epilogue(epilogue: _Epilogue, out: Layout) -> dict[str, Any]:
    """The kernel's arguments for what follows the product."""
    residual, step, before, eps, relu, _ = epilogue
    res_channels, res_h, res_w = (0, 0, 0) if residual is None else residual.shape[1:]
    return {
        "eps": eps,
        "res_stride": 0 if residual is None else pixel_stride(residual),
        "res_channels": res_channels,
        "res_h": res_h,
        "res_w": res_w,
        "res_step": step,
        "res_before": before,
        "RES_PADDED": residual is not None and residual.shape != out.shape,
        "RELU": relu,
        "y_stride": pixel_stride(out),
    }


def check_geometry(problem: ConvProblem) -> None:
    """Raise ValueError for arguments of a convolution that leave it without a meaning, or without an output."""
    named = {"stride": (problem.stride, 1), "padding": (problem.padding, 0), "dilation": (problem.dilation, 1)}
    for name, (pair, least) in named.items():
        if not isinstance(pair, tuple) or len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} must be two integers of at least {least}; got {pair}")
    if problem.groups < 1:
        raise ValueError(f"groups must be at least 1; got {problem.groups}")
    if problem.r < 1 or problem.s < 1 or problem.p < 1 or problem.q < 1:
        raise ValueError(
            f"a filter of {problem.r}x{problem.s} with dilation {problem.dilation} does not fit into an image of "
            f"{problem.h}x{problem.w} with padding {problem.padding}"
        )


def _check(problem: ConvProblem, w: Layout, out: Layout, epilogue: _Epilogue) -> None:
    residual, step, before, *_ = epilogue
    require_pixel_linear(out=out, residual=residual)
    if w.dtype != problem.dtype:
        raise ValueError(f"w must have the dtype of x, {problem.dtype}; got {w.dtype}")
    if w.shape[1] * problem.groups != problem.ci or problem.co % problem.groups:
        raise ValueError(f"w of shape {tuple(w.shape)} does not fit {problem.ci} channels in {problem.groups} groups")
    if problem.padding != (0, 0) and problem.r * problem.s > 64:
        raise ValueError(f"with padding, w may have at most 64 taps, one per bit of a mask; got shape {tuple(w.shape)}")
    shape = (problem.n, problem.co, problem.p, problem.q)
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}; got {tuple(out.shape)}")
    if residual is not None:
        require_fitting_residual(residual, shape, step, before)


def _cost(problem: ConvProblem, tensors: Mapping[str, Any]) -> Cost:
    x, y, res = tensors["x_ptr"], tensors["y_ptr"], tensors["res_ptr"]
    vectors = ("w_ptr", "scale_ptr", "shift_ptr", "bias_ptr", "mean_ptr", "var_ptr", "gamma_ptr", "beta_ptr")
    read = problem.pixels_read * problem.ci * x.element_size()
    read += sum(tensors[name].nbytes for name in vectors if tensors[name] is not None)
    if res is not None:
        read += problem.m * res.shape[1] * res.element_size()
    depth = problem.r * problem.s * problem.ci // problem.groups
    moments = tensors["moments_ptr"]
    written = y.nbytes + (0 if moments is None else moments.nbytes)
    return Cost(2 * problem.m * problem.co * depth, read, written)
