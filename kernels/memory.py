"""How tensors lie in memory, and what launchers ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from .launch import FLOATS


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


def empty_channels_last(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new channels_last tensor [N, C, H, W], of any content."""
    # PyTorch takes half the time to read four numbers that it takes to read one shape.
    return torch.empty(*shape, dtype=dtype, device=device, memory_format=torch.channels_last)


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


def stride_of(x: Layout | None) -> int:
    """:func:`pixel_stride` of a tensor that is pixel-linear, and 0 for None."""
    return 0 if x is None else pixel_stride(x) or 0


def span(x: Layout | None) -> int:
    """Elements from the first to the last of a pixel-linear tensor."""
    return 0 if x is None else x.shape[0] * x.shape[2] * x.shape[3] * stride_of(x)


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
