"""Convolutions that follow each other in one launch: what both ways to compute them share."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activation import relu
from .conv import ConvProblem
from .epilogue import load_residual
from .gpus import gpu_of
from .launch import INTERPRETER, TileConfig
from .memory import Layout, cdiv, channels_last, span
from .tile import load_channels


class Link(NamedTuple):
    """A convolution of a chain, ``w`` [CO, CI, R, S], channels_last, and behind it ``affine[0]*y + affine[1]``.

    ``affine``: fp32 [2, CO], what batch norm with constants comes to, a bias of the convolution included.
    """

    w: Tensor
    affine: Tensor


class Chain(NamedTuple):
    """The convolutions of a chain: ``spatial`` of any filter, then two of 1x1. The first or the last may lack."""

    spatial: ConvProblem | None
    expand: ConvProblem
    reduce: ConvProblem | None

    @property
    def first(self) -> ConvProblem:
        """That which reads the input."""
        return self.spatial or self.expand

    @property
    def links(self) -> tuple[ConvProblem, ...]:
        """Those that there are, in order."""
        return tuple(link for link in self if link is not None)


class Widths(NamedTuple):
    """Channels of the input and of the three outputs, and elements from one pixel to the next."""

    ci: int
    middle: int
    wide: int
    next: int
    x: int
    res: int


@triton.jit
def affine(acc, ptr, c, mask_c, channels):
    """``scale*acc + shift`` for columns that are the channels ``c`` of [2, channels]."""
    return tl.fma(acc, load_channels(ptr, c, mask_c)[None, :], load_channels(ptr + channels, c, mask_c)[None, :])


@triton.jit
def block_output(v, affine_ptr, channels, tile, res, crop, P, Q, form: tl.constexpr):
    """``relu(norm(v) + residual)`` of a tile of z. ``form``: EVEN, all its channels are; RES_PADDED."""
    v = affine(v, affine_ptr, tile.c, tile.mask_c, channels)
    if res.ptr is not None:
        if form.EVEN and not form.RES_PADDED:
            v += tl.load(res.ptr + (tile.m * res.stride)[:, None] + tile.c[None, :]).to(tl.float32)
        else:
            v += load_residual(res, crop, tile, P, Q, form.RES_PADDED)
    return relu(v)


WIDEST = 256
"""Channels between two convolutions of a chain that a program's registers hold."""


def block_of(channels: int) -> int:
    """Channels that a program holds for so many: a power of two, at least what a product is deep."""
    return max(16, triton.next_power_of_2(channels))


def even(chain: Chain, tile: TileConfig) -> bool:
    """Whether all channels fill their blocks."""
    whole = [chain.expand.co % tile.block_n == 0]
    whole += [link.co == block_of(link.co) for link in chain.links if link is not chain.expand]
    whole.append(chain.first.ci % tile.block_k == 0 if chain.spatial else chain.expand.ci == block_of(chain.expand.ci))
    return all(whole)


def far(chain: Chain, x: Layout, res: Layout | None, tile: TileConfig) -> bool:
    """Whether offsets within a tensor, rows that there are not included, do not fit 32 bits."""
    expand = chain.expand
    outputs = [channels_last((expand.n, link.co, expand.p, expand.q), x.dtype) for link in chain.links]
    return max(map(span, (x, res, *outputs))) + tile.block_m * max(out.shape[1] for out in outputs) >= 2**31


def held(chain: Chain) -> int:
    """Channels of the accumulators that live at a time, and what the input of a chain without a 3x3 takes beside."""
    middle, following = block_of(chain.expand.ci), 64 if chain.reduce is None else block_of(chain.reduce.co)
    return following + (middle // 8 if chain.spatial is None else middle)


def accumulators(chain: Chain, tile: TileConfig) -> int:
    """Columns of fp32 that registers hold in the loop over z; of a gathered chain with the factor that stays there."""
    following = 0 if chain.reduce is None else block_of(chain.reduce.co)
    return tile.block_n + following + (block_of(chain.expand.ci) // 2 if tile.box is None else 0)


class Product(NamedTuple):
    """Columns and depth of one of a program's products, whose rows are its pixels; padding included."""

    columns: int
    depth: int


def products(chain: Chain, tile: TileConfig) -> list[Product]:
    """Of the links, in order."""
    expand, wide = chain.expand, cdiv(chain.expand.co, tile.block_n) * tile.block_n
    found = [Product(wide, block_of(expand.ci))]
    if (spatial := chain.spatial) is not None:
        taps = spatial.r * spatial.s * cdiv(spatial.ci, tile.block_k)
        found.insert(0, Product(block_of(spatial.co), taps * tile.block_k))
    if chain.reduce is not None:
        found.append(Product(block_of(chain.reduce.co), wide))
    return found


def shared(chain: Chain, tile: TileConfig) -> int:
    """Bytes of shared memory that a program takes at most: for the pipeline of either loop, or to turn a factor."""
    walk = 0
    if chain.spatial is not None:
        walk = tile.num_stages * (tile.block_m + block_of(chain.expand.ci)) * tile.block_k * chain.first.dtype.itemsize
    return max(walk, _tail(chain, tile, tail_stages(chain, tile))) + BARRIERS


def tail_stages(chain: Chain, tile: TileConfig) -> int:
    """Stages of the loop over the channels of z.

    With two, what a step reads begins to be loaded when the one before ends, and it waits for all of it: 0.7 us on an
    H100 (``CHAIN_PACE`` in ``plan/roofline.py``). With three, one step is loaded while another is computed.
    """
    room = gpu_of(chain.first.arch).shared - BARRIERS
    return 3 if chain.first.arch != INTERPRETER and _tail(chain, tile, 3) <= room else 2


def _tail(chain: Chain, tile: TileConfig, stages: int) -> int:
    """Bytes of shared memory for the loop over z, so many ``stages`` deep, and to turn a factor."""
    middle, following = block_of(chain.expand.ci), 0 if chain.reduce is None else block_of(chain.reduce.co)
    turned = tile.block_m * max(middle, tile.block_n)
    return chain.first.dtype.itemsize * (stages * (middle + following + tile.block_m) * tile.block_n + turned)


BARRIERS = 2048
"""Bytes of shared memory for what is no buffer of a pipeline."""
