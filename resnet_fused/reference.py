"""The specification: every fused operation in plain PyTorch, for any dtype and device.

Tests compare the kernels with these functions in fp64; the eager road runs them as they stand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PaddedIdentity(NamedTuple):
    """The parameter-free shortcut: every ``stride``-th pixel of ``x``, with zero channels around its own.

    Option A of He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385, section 3.3).

    ``x``: [N, C, H, W]. ``stride``: pixels of ``x`` per output pixel in both directions. ``channels_before``: zero
    channels in front of the first channel of ``x``; as many follow the last one as the output needs.
    """

    x: Tensor
    stride: int
    channels_before: int

    def materialize(self, channels: int) -> Tensor:
        """The shortcut as a tensor [N, channels, ceil(H/stride), ceil(W/stride)]."""
        kept = self.x[:, :, :: self.stride, :: self.stride]
        after = channels - self.channels_before - kept.shape[1]
        return F.pad(kept, (0, 0, 0, 0, self.channels_before, after))


def conv_bn_act(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    residual: Tensor | PaddedIdentity | None = None,
    relu: bool = True,
) -> Tensor:
    """``relu(bn(conv(x)) + residual)``; the residual and the ReLU are optional. Shapes as in ``nn.Conv2d``."""
    z = bn(conv(x))
    if isinstance(residual, PaddedIdentity):
        residual = residual.materialize(z.shape[1])
    if residual is not None:
        z = z + residual
    return F.relu(z) if relu else z


def scale_shift_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``relu(scale*x + shift)`` per channel of ``x`` [N, C, H, W]; ``scale`` and ``shift`` are [C]."""
    return torch.relu(x * scale[:, None, None] + shift[:, None, None])
