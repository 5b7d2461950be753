"""What all convolutions share: the problem, its geometry, and the arguments and checks that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple

import torch

from .launch import TileConfig
from .tile import Blocks

RUNTIME_SIZES = [
    *("M", "N", "H", "W", "P", "Q", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w"),
    *("group_ci", "group_co"),
]
"""Sizes that the compiled code does not depend on: each is an argument of its own, since ``do_not_specialize`` does not
reach into tuples. Channels and strides are not among them: their divisibility by 16 decides how wide a load may be."""


class Geometry(NamedTuple):
    """Of a convolution: the arguments that PyTorch's has. The kernels build the same of numbers on the device."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Size(NamedTuple):
    """Rows and columns of a convolution's input (H, W) and output (P, Q)."""

    H: Any
    W: Any
    P: Any
    Q: Any


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
    def geometry(self) -> Geometry:
        """The convolution's arguments."""
        return Geometry(self.stride, self.padding, self.dilation, self.groups)

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


def sizes(problem: ConvProblem) -> dict[str, int]:
    """The arguments of every convolution's kernel that RUNTIME_SIZES names, but for the first, and those of groups."""
    (stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w) = problem.stride, problem.padding, problem.dilation
    return {
        **{"H": problem.h, "W": problem.w, "P": problem.p, "Q": problem.q},
        **{"stride_h": stride_h, "stride_w": stride_w, "pad_h": pad_h, "pad_w": pad_w},
        **{"dil_h": dil_h, "dil_w": dil_w},
    }


def group_sizes(problem: ConvProblem) -> dict[str, int]:
    """The last of RUNTIME_SIZES: channels of a group."""
    return {"group_ci": problem.ci // problem.groups, "group_co": problem.co // problem.groups}


WALK = ["tap_h", "tap_w", "hop_h", "hop_w"]
"""The arguments that :func:`parity_walk` gives."""


def parity_walk(problem: ConvProblem) -> dict[str, int]:
    """How the gradient of an input walks through the taps that reach pixels of one parity: every ``tap``-th, and from
    one to the next the output's pixel moves back by ``hop``."""
    tap = [st // gcd(st, dil) for st, dil in zip(problem.stride, problem.dilation, strict=True)]
    hop = [t * dil // st for t, dil, st in zip(tap, problem.dilation, problem.stride, strict=True)]
    return dict(zip(WALK, (*tap, *hop), strict=True))


def load_width(problem: ConvProblem, *counts: int) -> int:
    """Elements of the widest load, of 16 bytes at most, that fits ``counts`` of channels and strides between pixels.

    1 where all are multiples of 16, which the compiler sees by itself.
    """
    return 1 if gcd(16, *counts) == 16 else gcd(16 // problem.dtype.itemsize, *counts)


def precision(problem: ConvProblem) -> str:
    """The name that Triton has for what becomes of fp32 factors."""
    return "tf32" if problem.tf32 else "ieee"


def blocks(tile: TileConfig) -> Blocks:
    """The tile as the compiler knows it."""
    return Blocks(tile.block_m, tile.block_n, tile.block_k)


def check_geometry(problem: ConvProblem) -> None:
    """Raise ValueError for arguments of a convolution that leave it without a meaning, or without an output."""
    named = {"stride": (problem.stride, 1), "padding": (problem.padding, 0), "dilation": (problem.dilation, 1)}
    for name, (pair, least) in named.items():
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
            raise ValueError(f"geometry.{name} must be two integers of at least {least}; got {pair}")
    if not isinstance(problem.groups, int) or problem.groups < 1:
        raise ValueError(f"geometry.groups must be an integer of at least 1; got {problem.groups}")
    if problem.r < 1 or problem.s < 1 or problem.p < 1 or problem.q < 1:
        raise ValueError(
            f"a filter of {problem.r}x{problem.s} with dilation {problem.dilation} does not fit into an image of "
            f"{problem.h}x{problem.w} with padding {problem.padding}"
        )
