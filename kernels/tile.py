"""Device code that the kernels share: a tile of pixels and channels, its loads and its arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import interpreting

INTERPRETING = tl.constexpr(interpreting())


class Blocks(NamedTuple):
    """The tile of one program as the compiler knows it: rows, columns, and how much of the sum a step takes."""

    m: Any
    n: Any
    k: Any


class Pixels(NamedTuple):
    """A tensor on the device: its address or None, and elements from one pixel (of a filter: output channel) on."""

    ptr: Any
    stride: Any


class Tile(NamedTuple):
    """Pixels ``m`` x channels ``c`` of an image, and which of them there are."""

    m: Any
    c: Any
    mask_m: Any
    mask_c: Any


class PerTile(NamedTuple):
    """Rows [K, T, C] of a number per tile and channel: their address or None, T, C, and which tile this is."""

    ptr: Any
    tiles: Any
    channels: Any
    number: Any


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc`` in fp32. The interpreter cannot multiply bfloat16: there, both factors are widened first."""
    if INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def settled(acc):
    """``acc``, which products of the next step may not overtake; costs no instruction.

    A product that is under way while another's accumulator is set to zero makes the assembler of sm_90 have every
    product of the kernel wait for the one before. What is read in between is waited for once.
    """
    if INTERPRETING:
        return acc
    else:
        return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def rounded_to(v, dtype: tl.constexpr):
    """``v``, a tile in fp32, rounded to a type that it is widened from again.

    To fp16 in pairs: where values are rounded one by one and widened again, the assembler of sm_90 reads accumulators
    while products are under way, and has every product of the kernel wait for the one before.
    """
    if INTERPRETING or dtype != tl.float16:
        return v.to(dtype)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [v], dtype=tl.float16, is_pure=True, pack=2
        )


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
def load_pixels(ptr, offs_m, stride, c, mask):
    """A tile of pixels in fp32."""
    return tl.load(ptr + (offs_m * stride)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_pixels(ptr, offs_m, stride, c, v, mask):
    """Store a tile of pixels, rounded to the tensor's type."""
    tl.store(ptr + (offs_m * stride)[:, None] + c[None, :], v.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def first_and_end(tile, span, rows, OFFSET: tl.constexpr):
    """The first pixel of a tile of ``rows``, and where the span of pixels ends that it does not cross."""
    tiles = tl.cdiv(span, rows)
    begin = (tile // tiles).to(OFFSET) * span
    return begin + tile % tiles * rows, begin + span


@triton.jit
def tile_mask(tile):
    """Which elements of a tile there are."""
    return tile.mask_m[:, None] & tile.mask_c[None, :]


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
def first_tap(parity, stride, dil, TAPS: tl.constexpr):
    """The first tap that reaches a pixel of this parity (position plus padding, modulo the stride), or TAPS."""
    first = TAPS
    for i in tl.static_range(TAPS):
        first = tl.where((parity - (TAPS - 1 - i) * dil) % stride == 0, TAPS - 1 - i, first)
    return first


@triton.jit
def finite(v):
    """Whether a value is neither infinite nor NaN."""
    return tl.abs(v) < float("inf")


@triton.jit
def all_finite(tile):
    """Whether every value of a tile is."""
    return tl.min(tl.min(finite(tile).to(tl.int32), 0, keep_dims=True), 1, keep_dims=True).item() > 0
