"""What follows a product or stands beside it: bias, norm, residual, activation, moments. Values, and device code."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import IDENTITY, RELU, Activation, activate, in_front
from .memory import Layout, cdiv, layout
from .tile import finite, load_channels, load_pixels, rounded_product, rounded_to, store_pixels, tile_mask


class Norm(NamedTuple):
    """Batch norm in inference: four vectors with an element per channel, gamma and beta optional, and epsilon."""

    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float


class Prologue(NamedTuple):
    """What a convolution does to its input as it loads it: ``act(scale*x + shift)``, both fp32 vectors [CI]."""

    scale: Tensor
    shift: Tensor
    activation: Activation = RELU


class Moments(NamedTuple):
    """Statistics of a tensor with C channels, tile by tile.

    ``values``: fp32 [2, T, C], the mean of each of T tiles of pixels, then the sum of squared deviations from it.
    ``rows``: pixels per tile, ``pixels``: of all tiles. ``counts``: fp32 [T], the pixels of each tile where they differ
    otherwise (``rows`` does not count then). ``images``: into so many spans of as many pixels the tiles are cut, one
    span after the other, and the last tile of each may have fewer pixels.
    """

    values: Tensor
    rows: int
    pixels: int
    counts: Tensor | None = None
    images: int = 1

    @property
    def span(self) -> int:
        """Pixels that tiles do not cross."""
        return self.pixels // self.images


class Crop(NamedTuple):
    """Every ``step``-th pixel of an image of ``h`` x ``w`` with ``channels``, and the channel where they begin."""

    h: int
    w: int
    channels: int
    step: int
    before: int


WHOLE = Crop(0, 0, 0, 1, 0)
"""For kernels to which a residual is no crop, whatever its size."""


def fits(image: tuple[int, ...], step: int, before: int, shape: tuple[int, ...]) -> bool:
    """Whether every ``step``-th pixel of ``image`` [N, C, H, W] fits ``shape`` from channel ``before`` on."""
    n, channels, h, w = image
    strided = n, cdiv(h, step), cdiv(w, step)
    return strided == (shape[0], *shape[2:]) and before >= 0 and before + channels <= shape[1]


class Residual(NamedTuple):
    """A tensor of which every ``step``-th pixel is added to the channels from ``before`` on.

    Or, where gradients go the other way, whose channels from ``before`` on are added to every ``step``-th pixel.
    """

    tensor: Tensor
    step: int = 1
    before: int = 0


class Added(NamedTuple):
    """A residual as a launch sees it; without a layout there is none."""

    layout: Layout | None
    step: int
    before: int

    def require_fits(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError where it cannot be added to a tensor of ``shape``."""
        if self.layout is None:
            return
        require_step("residual", self)
        if not fits(self.layout.shape, self.step, self.before, shape):
            raise ValueError(
                f"residual must have shape {tuple(shape)}, or fit it with every {self.step}-th pixel from channel "
                f"{self.before} on; got {tuple(self.layout.shape)}"
            )

    def crop(self, shape: tuple[int, ...]) -> Crop:
        """What the kernels are told, where it is added to ``shape``."""
        if self.layout is None or self.layout.shape == shape:
            return WHOLE
        channels, h, w = self.layout.shape[1:]
        return Crop(h, w, min(channels, shape[1]), self.step, self.before)


NOTHING = Added(None, 1, 0)


class Epilogue(NamedTuple):
    """What follows a product, as far as the launch depends on it. ``out``: the output's layout, or its dtype."""

    residual: Added = NOTHING
    eps: float = 0.0
    activation: Activation = IDENTITY
    out: Layout | torch.dtype = torch.float32
    gated: bool = False


def require_step(argument: str, residual: Added) -> None:
    """Raise ValueError for numbers that place no residual anywhere."""
    for name, number, least in (("step", residual.step, 1), ("before", residual.before, 0)):
        if not isinstance(number, int) or number < least:
            raise ValueError(f"{argument}.{name} must be an integer of at least {least}; got {number!r}")


def added(residual: Residual | None) -> Added:
    """``residual`` as a launch sees it."""
    if residual is None:
        return NOTHING
    if not isinstance(residual, Residual):
        raise TypeError(f"a residual or shortcut must be a Residual(tensor, step, before); got a {type(residual)}")
    return Added(layout(residual.tensor), residual.step, residual.before)


@triton.jit
def store_moments(v, mask_m, mean_ptrs, m2_step, mask_n):
    """Per column, the mean of the rows of ``mask_m``; ``m2_step`` further, their squared deviations from it.

    Both count from the first row, which is one of them if any is: 1/sqrt(eps) would amplify a rounding of the mean
    where all rows are the same. Unless that one is infinite, which would make the mean NaN.
    """
    row = tl.arange(0, v.shape[0])[:, None]
    mask = mask_m[:, None]
    count = tl.sum(mask_m.to(tl.float32), 0)
    v = v.to(tl.float32)
    origin = tl.sum(tl.where(row == 0, v, 0.0), 0)
    origin = tl.where(finite(origin), origin, 0.0)
    v = tl.where(mask, v - origin[None, :], 0.0)
    mean = tl.sum(v, 0) / count
    deviation = tl.where(mask, v - mean[None, :], 0.0)
    tl.store(mean_ptrs, origin + mean, mask=mask_n)
    tl.store(mean_ptrs + m2_step, tl.sum(rounded_product(deviation, deviation), 0), mask=mask_n)


@triton.jit
def load_residual(res, crop, tile, P, Q, PADDED: tl.constexpr):
    """The residual's tile in fp32. PADDED: what is added is every ``step``-th pixel, to some of the channels."""
    mask = tile_mask(tile)
    if PADDED:
        pixel = (tile.m // (P * Q) * crop.h + tile.m // Q % P * crop.step) * crop.w + tile.m % Q * crop.step
        c = tile.c - crop.before
        found = load_pixels(res.ptr, pixel, res.stride, c, mask & ((c >= 0) & (c < crop.channels))[None, :])
    else:
        found = load_pixels(res.ptr, tile.m, res.stride, tile.c, mask)
    return found


class Affine(NamedTuple):
    """Of the channels of a tile, what :func:`affine` computes with, each None where there is none."""

    bias: Any
    mean: Any
    scale: Any
    beta: Any


@triton.jit
def load_scale(norm, c, mask_c):
    """``gamma/sqrt(var + eps)`` of the channels ``c``."""
    scale = 1.0 / tl.sqrt_rn(load_channels(norm.var, c, mask_c) + norm.eps)
    if norm.gamma is not None:
        scale *= load_channels(norm.gamma, c, mask_c)
    return scale


@triton.jit
def affine(acc, vectors):
    """``(acc + bias - mean) * scale + beta``; all optional."""
    v = acc
    if vectors.bias is not None:
        v += vectors.bias[None, :]
    if vectors.mean is not None:
        v = (v - vectors.mean[None, :]) * vectors.scale[None, :]
        if vectors.beta is not None:
            v += vectors.beta[None, :]
    return v


@triton.jit
def load_affine(acc, c, mask_c, bias_ptr, norm):
    """:func:`affine` of columns that are the channels ``c``."""
    # Functions of the compiler return no None: what has loaded them stands where they are used.
    bias, mean, scale, beta = bias_ptr, norm.mean, norm.var, norm.beta
    if bias_ptr is not None:
        bias = load_channels(bias_ptr, c, mask_c)
    if norm.mean is not None:
        mean = load_channels(norm.mean, c, mask_c)
        scale = load_scale(norm, c, mask_c)
        if norm.beta is not None:
            beta = load_channels(norm.beta, c, mask_c)
    return affine(acc, Affine(bias, mean, scale, beta))


@triton.jit
def output(v, tile, res, crop, size, RES_PADDED: tl.constexpr, ACT: tl.constexpr):
    """``act(v + res)`` for one tile; the residual is optional."""
    if res.ptr is not None:
        v += load_residual(res, crop, tile, size.P, size.Q, RES_PADDED)
    return activate(v, ACT)


@triton.jit
def store_output(
    acc, tile, bias_ptr, norm, gate_ptr, res, crop, y, moments, size, RES_PADDED: tl.constexpr, ACT: tl.constexpr
):
    """``y = act(affine(acc)*gate + res)`` for one tile, rounded; ``gate_ptr``: of its image, or None.

    With ``moments``, also the mean of the tile's rounded values, as far as its rows exist, and the sum of squared
    deviations from it.
    """
    v = load_affine(acc, tile.c, tile.mask_c, bias_ptr, norm)
    if gate_ptr is not None:
        v *= load_channels(gate_ptr, tile.c, tile.mask_c)[None, :]
    v = output(v, tile, res, crop, size, RES_PADDED, ACT)
    rounded = rounded_to(v, y.ptr.dtype.element_ty)
    tl.store(y.ptr + (tile.m * y.stride)[:, None] + tile.c[None, :], rounded, mask=tile_mask(tile))
    if moments.ptr is not None:
        store_moments_of_tile(rounded, tile, moments)


@triton.jit
def store_moments_of_tile(rounded, tile, moments):
    """:func:`store_moments` of what a tile's output was rounded to, where those of the tile belong."""
    means = moments.ptr + moments.number * moments.channels + tile.c
    store_moments(rounded, tile.mask_m, means, moments.tiles * moments.channels, tile.mask_c)


@triton.jit
def store_gradient(
    acc, tile, place, cut, crop, y_in, stats_ptr, dx_ptr, sums, CUT_SPARSE: tl.constexpr, ACT: tl.constexpr
):
    """``dx = acc + shortcut``, then the activation's derivative and the sums for the batch norm in front of it.

    Of one tile. ``place``: image, row and column of each pixel, whose number is the tile's ``m``.
    """
    mask = tile_mask(tile)
    channels = sums.channels
    v = acc
    if cut.ptr is not None:
        if CUT_SPARSE:
            n, h, w = place
            at = (n * crop.h + h // crop.step) * crop.w + w // crop.step
            hit = (h % crop.step == 0) & (w % crop.step == 0)
            v += load_pixels(cut.ptr, at, cut.stride, tile.c + crop.before, mask & hit[:, None])
        else:
            v += load_pixels(cut.ptr, tile.m, cut.stride, tile.c, mask)
    if y_in.ptr is not None:
        y = load_pixels(y_in.ptr, tile.m, y_in.stride, tile.c, mask)
        v = in_front(v, normalise(y, stats_ptr, tile.c, tile.mask_c, channels), ACT)
        rounded = rounded_to(v, dx_ptr.dtype.element_ty)
        store_pixels(dx_ptr, tile.m, channels, tile.c, rounded, mask)
        g = tl.where(mask, rounded.to(tl.float32), 0.0)
        deviation = y - load_channels(stats_ptr, tile.c, tile.mask_c)[None, :]
        at = sums.ptr + sums.number.to(tl.int64) * channels + tile.c
        tl.store(at, tl.sum(g, 0), mask=tile.mask_c)
        step = sums.tiles.to(tl.int64) * channels
        tl.store(at + step, tl.sum(rounded_product(g, deviation), 0), mask=tile.mask_c)
    else:
        store_pixels(dx_ptr, tile.m, channels, tile.c, v, mask)


@triton.jit
def normalise(v, stats_ptr, c, mask_c, C):
    """``scale*v + shift``, in the one fma with which every kernel computes it."""
    scale = load_channels(stats_ptr + 2 * C, c, mask_c)
    shift = load_channels(stats_ptr + 3 * C, c, mask_c)
    return tl.fma(v, scale[None, :], shift[None, :])


@triton.jit
def scale_shift(mean, var, gamma_ptr, beta_ptr, eps, c, mask_c):
    """1/sqrt(var + eps), and the ``scale`` and ``shift`` that batch norm comes to; gamma and beta are optional."""
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    scale = rstd
    if gamma_ptr is not None:
        scale = rstd * load_channels(gamma_ptr, c, mask_c)
    shift = -mean * scale
    if beta_ptr is not None:
        shift += load_channels(beta_ptr, c, mask_c)
    return rstd, scale, shift
