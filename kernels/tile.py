"""What the kernels share: pieces of device code, and the memory layout that launchers ask for."""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FLOATS, interpreting

INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc`` in fp32. The interpreter cannot multiply bfloat16: there, both factors are widened first."""
    if INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def bound(n):
    """``n``, as the end of a ``range``.

    In the interpreter, numbers are arrays of one element. That of Triton 3.6 leaves it to NumPy to make an integer of
    one, which NumPy 2.4 refuses unless the array has no dimension.
    """
    if INTERPRETING:
        return (tl.zeros((1,), tl.int32) + n).handle.data.item()
    else:
        return n


@triton.jit
def relu(v):
    """max(v, 0) that keeps NaN, as PyTorch's does (``tl.maximum`` would drop it)."""
    return tl.where(v <= 0, 0.0, v)


@triton.jit
def rounded_product(a, b):
    """``a * b`` in fp32, for a sum over it.

    The compiler would contract a bare product with the first addition of the sum, in which two lanes exchange their
    terms: each would round the other's product and not its own, and both would store the result, which then differs.
    """
    return tl.fma(a, b, tl.zeros_like(a))


@triton.jit
def load_channels(ptr, offs, mask):
    """A vector of per-channel parameters in fp32."""
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def tap_mask(h0, w0, mask_m, H, W, dil_h, dil_w, R: tl.constexpr, S: tl.constexpr):
    """Per pixel, bit ``r*S + s`` tells whether tap (r, s) lies inside the image."""
    BITS: tl.constexpr = tl.int32 if R * S < 32 else tl.int64
    taps = tl.zeros(h0.shape, BITS)
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            h = h0 + r * dil_h
            w = w0 + s * dil_w
            inside = mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            taps |= inside.to(BITS) << (r * S + s)
    return taps


@triton.jit
def finite(v):
    """Whether a value is neither infinite nor NaN."""
    return tl.abs(v) < float("inf")


@triton.jit
def all_finite(tile):
    """Whether every value of a tile is."""
    return tl.min(tl.min(finite(tile).to(tl.int32), 0, keep_dims=True), 1, keep_dims=True).item() > 0


@triton.jit
def store_moments(v, count, mean_ptrs, m2_step, mask_n):
    """Per column, the mean of the first ``count`` rows; ``m2_step`` further, their squared deviations from it.

    Both count from the first row: 1/sqrt(eps) would amplify a rounding of the mean where all rows are the same. Unless
    that one is infinite, which would make the mean NaN.
    """
    row = tl.arange(0, v.shape[0])[:, None]
    mask = row < count
    v = v.to(tl.float32)
    origin = tl.sum(tl.where(row == 0, v, 0.0), 0)
    origin = tl.where(finite(origin), origin, 0.0)
    v = tl.where(mask, v - origin[None, :], 0.0)
    mean = tl.sum(v, 0) / count
    deviation = tl.where(mask, v - mean[None, :], 0.0)
    tl.store(mean_ptrs, origin + mean, mask=mask_n)
    tl.store(mean_ptrs + m2_step, tl.sum(rounded_product(deviation, deviation), 0), mask=mask_n)


def cdiv(size: int, block: int) -> int:
    """Blocks that cover ``size``. (``triton.cdiv`` is for device code too, and takes microseconds on the host.)"""
    return -(-size // block)


class Layout(NamedTuple):
    """How a tensor lies in memory: all that a launch depends on but its address."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def is_packed(self, *order: int) -> bool:
        """Whether the elements follow each other without a gap, with the dimensions in ``order``, the outermost first.

        (0, 2, 3, 1) stands for channels_last.
        """
        step = 1
        for i in reversed(order):
            if self.shape[i] > 1 and self.strides[i] != step:
                return 0 in self.shape
            step *= self.shape[i]
        return True


@overload
def layout(tensor: Tensor) -> Layout: ...
@overload
def layout(tensor: Tensor | None) -> Layout | None: ...
def layout(tensor: Tensor | None) -> Layout | None:
    """That of ``tensor``; None for None."""
    if tensor is None:
        return None
    # As Layout(...) does, less a Python function: launchers ask for several layouts in every launch.
    return tuple.__new__(Layout, (tensor.shape, tensor.stride(), tensor.dtype))


def channels_last(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Layout:
    """The layout of a new channels_last tensor."""
    _, c, h, w = shape
    return Layout(shape, (h * w * c, 1, w * c, c), dtype)


def pixel_stride(x: Layout) -> int | None:
    """Elements from one pixel of ``x`` [N, C, H, W] to the next, or None if ``x`` is not pixel-linear."""
    n, c, h, w = x.shape
    if 0 in x.shape:
        return c
    if c > 1 and x.strides[1] != 1:
        return None
    step, pixels = None, 1
    for size, stride in ((w, x.strides[3]), (h, x.strides[2]), (n, x.strides[0])):
        if size > 1:
            if step is None:
                step = stride
            if stride != step * pixels:
                return None
        pixels *= size
    if step is None:
        return c
    return step if step >= c else None  # closer pixels would overlap


def span(x: Layout | None) -> int:
    """Elements from the first to the last of a pixel-linear tensor."""
    return 0 if x is None else x.shape[0] * x.shape[2] * x.shape[3] * (pixel_stride(x) or 0)


def require_pixel_linear(**layouts: Layout | None) -> None:
    """Raise ValueError, by its name, for the first tensor that is not pixel-linear; None passes."""
    for name, x in layouts.items():
        if x is None:
            continue
        if len(x.shape) != 4 or x.dtype not in FLOATS:
            raise ValueError(
                f"{name} must be [N, C, H, W], in float32, float16 or bfloat16; got {x.dtype} {tuple(x.shape)}"
            )
        if pixel_stride(x) is None:
            raise ValueError(
                f"{name} must be pixel-linear (channels_last, or a slice of its channels or images); "
                f"got shape {tuple(x.shape)} with strides {x.strides}"
            )


def require_channels_last_filter(w: Layout) -> None:
    """Raise ValueError for a filter [CO, CI/groups, R, S] that is not channels_last, or empty."""
    if len(w.shape) != 4 or 0 in w.shape or w.dtype not in FLOATS:
        raise ValueError(
            f"w must be [CO, CI/groups, R, S], none of them 0, in float32, float16 or bfloat16; got {w.dtype} "
            f"{tuple(w.shape)}"
        )
    if not w.is_packed(0, 2, 3, 1):
        raise ValueError(f"w must be channels_last; got shape {tuple(w.shape)} with strides {w.strides}")


def require_fitting_residual(residual: Layout, shape: tuple[int, ...], step: int, before: int) -> None:
    """Raise ValueError for one whose every ``step``-th pixel does not fit ``shape`` from channel ``before`` on."""
    if step < 1:
        raise ValueError(f"residual_step must be at least 1; got {step}")
    n, channels, h, w = residual.shape
    if (n, cdiv(h, step), cdiv(w, step)) != (shape[0], *shape[2:]) or before < 0 or before + channels > shape[1]:
        raise ValueError(
            f"residual must have shape {tuple(shape)}, or fit it with every {step}-th pixel from channel {before} on; "
            f"got {tuple(residual.shape)}"
        )


class Norm(NamedTuple):
    """Batch norm in inference: four vectors with an element per channel, gamma and beta optional, and epsilon."""

    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float


class Moments(NamedTuple):
    """Statistics of a tensor with C channels, tile by tile.

    ``values``: fp32 [2, T, C], the mean of each of T tiles of pixels, then the sum of squared deviations from it.
    ``rows``: pixels per tile, ``pixels``: of all tiles, so that the last may have fewer. ``counts``: fp32 [T], the
    pixels of each tile where they differ otherwise (``rows`` and ``pixels`` do not count then).
    """

    values: Tensor
    rows: int
    pixels: int
    counts: Tensor | None = None
