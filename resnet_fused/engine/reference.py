"""The specification: every fused operation in plain PyTorch, for any dtype and device.

Tests compare the kernels with these functions in fp64; the eager road runs them as they stand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad as conv_grad

from resnet_fused.kernels.activation import IDENTITY, RELU, Activation
from resnet_fused.kernels.conv import Geometry
from resnet_fused.kernels.conv_pool import POOL
from resnet_fused.kernels.epilogue import Residual


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


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda v, inplace: v,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": lambda v, inplace: F.gelu(v),
    "gelu_tanh": lambda v, inplace: F.gelu(v, approximate="tanh"),
}


def activate(v: Tensor, activation: Activation, inplace: bool = False) -> Tensor:
    """The activation of ``v``, of any shape, in its dtype; ``inplace``: ``v`` may be overwritten."""
    return _ACTIVATIONS[activation.name](v, *activation.numbers, inplace=inplace)


def in_front(g: Tensor, v: Tensor, activation: Activation) -> Tensor:
    """The gradient in front of the activation of ``v`` from ``g``, the one behind it, in the dtype of ``v``."""
    with torch.enable_grad():
        v = v.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(activate(v, activation), v, g.to(v.dtype))
    return gradient


def affine(
    bias: Tensor | None, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Vectors [CO] in fp64, ``scale`` and ``shift``, for which ``scale*y + shift`` is batch norm behind ``y + bias``.

    ``mean``, ``var``, ``gamma``, ``beta``: batch norm in evaluation mode, vectors [CO].
    """
    scale = (var.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    shift = (-mean.double() if bias is None else bias.double() - mean.double()) * scale
    if beta is not None:
        shift = shift + beta.double()
    return scale, shift


def fold(
    w: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Filter [CO, CI/groups, R, S] and bias [CO], in fp64, of the convolution that equals batch norm behind ``w``.

    The other arguments: see :func:`affine`.
    """
    scale, shift = affine(bias, mean, var, gamma, beta, eps)
    return w.double() * scale[:, None, None, None], shift


def conv_affine_act(x: Tensor, w: Tensor, affine: Tensor, geometry: Geometry, residual: Tensor | None = None) -> Tensor:
    """``relu(affine[0]*conv(x) + affine[1] + residual)``, one link of a chain; ``affine`` is [2, CO].

    In the dtype of ``x``, but that batch norm's share is computed in fp32 at the least. ``residual``: of the output's
    shape, or None.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, shift = (vector.to(wide)[:, None, None] for vector in affine)
    z = (F.conv2d(x, w.to(x.dtype), None, *geometry).to(wide) * scale + shift).to(x.dtype)
    return F.relu(z if residual is None else z + residual)


def conv_bn_act(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    residual: Tensor | PaddedIdentity | None = None,
    relu: bool = True,
    *,
    activation: Activation | None = None,
) -> Tensor:
    """``act(bn(conv(x)) + residual)``; the residual is optional. Shapes as in ``nn.Conv2d``.

    The activation is ``activation``; without it a ReLU, or nothing if not ``relu``.
    """
    z = bn(conv(x))
    if isinstance(residual, PaddedIdentity):
        residual = residual.materialize(z.shape[1])
    if residual is not None:
        z = z + residual
    return activate(z, activation or (RELU if relu else IDENTITY))


def scale_shift_act(x: Tensor, scale: Tensor, shift: Tensor, activation: Activation = RELU) -> Tensor:
    """``act(scale*x + shift)`` per channel of ``x`` [N, C, H, W]; ``scale`` and ``shift`` are [C]."""
    return activate(x * scale[:, None, None] + shift[:, None, None], activation)


def batch_norm_stats(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, inv_count: float
) -> Tensor:
    """What batch norm does to each channel, [5, C]: mean, rstd, scale, shift, 1/count. All arguments are [C].

    ``inv_count``: 1/(N*P*Q) if mean and var are the batch's own, 0 if they are constants (evaluation mode).
    """
    rstd = (var + eps).rsqrt()
    scale = rstd if gamma is None else gamma * rstd
    shift = -mean * scale if beta is None else beta - mean * scale
    return torch.stack([mean, rstd, scale, shift, torch.full_like(mean, inv_count)])


def batch_norm_apply(
    y: Tensor,
    stats: Tensor,
    residual: Tensor | PaddedIdentity | None = None,
    residual_stats: Tensor | None = None,
    activation: Activation = RELU,
    gate: Tensor | None = None,
) -> Tensor:
    """``act((scale*y + shift)*gate + residual)`` for ``y`` [N, C, P, Q] and a ``gate`` [N, C], if there is one.

    ``residual_stats`` normalise the residual too.
    """
    z = y * stats[2, :, None, None] + stats[3, :, None, None]
    if gate is not None:
        z = z * gate[:, :, None, None]
    if isinstance(residual, PaddedIdentity):
        residual = residual.materialize(z.shape[1])
    if residual is not None and residual_stats is not None:
        residual = residual * residual_stats[2, :, None, None] + residual_stats[3, :, None, None]
    if residual is not None:
        z = z + residual
    return activate(z, activation)


def batch_norm_pool(y: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``max_pool(relu(scale*y + shift))`` of ``y`` [N, C, P, Q], the pool 3x3/2 with padding 1, and its peaks.

    These are, of each window, the ``y`` where it has its largest value, and the place of that: 3*row + column, int8.
    """
    z, index = F.max_pool2d(batch_norm_apply(y, stats), *POOL, return_indices=True)
    row, column = (torch.arange(size, device=y.device) for size in z.shape[2:])
    place = 3 * (index // y.shape[3] - 2 * row[:, None] + 1) + index % y.shape[3] - 2 * column + 1
    return z, y.flatten(2).gather(2, index.flatten(2)).view_as(z), place.to(torch.int8)


def max_pool_gradient(dz: Tensor, place: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient of what a pool 3x3/2 with padding 1 read, [N, C, *size]; ``place``: see :func:`batch_norm_pool`."""
    row, column = (torch.arange(size, device=dz.device) for size in dz.shape[2:])
    index = (2 * row[:, None] - 1 + place.long() // 3) * size[1] + 2 * column - 1 + place % 3
    g = dz.new_zeros(*dz.shape[:2], size[0] * size[1])
    return g.scatter_add(2, index.flatten(2), dz.flatten(2)).unflatten(2, size)


def batch_norm_sums(g: Tensor, y: Tensor, stats: Tensor) -> Tensor:
    """What the backward of batch norm needs of its batch, [2, C]: ``sum g`` and ``sum g*(y - mean)`` per channel."""
    deviation = y - stats[0, :, None, None]
    return torch.stack([g.sum((0, 2, 3)), (g * deviation).sum((0, 2, 3))])


def batch_norm_coefs(sums: Tensor, stats: Tensor) -> Tensor:
    """The vectors A, B, C [3, C] of ``dy = A*g + B*y + C`` (Ioffe & Szegedy 2015, arXiv:1502.03167, section 3).

    With ``sums`` of :func:`batch_norm_sums`: ``dbeta = sums[0]`` and ``dgamma = rstd*sums[1]``.
    """
    mean, rstd, scale, _, inv_count = stats
    b = -scale * rstd * rstd * sums[1] * inv_count
    return torch.stack([scale, b, -scale * sums[0] * inv_count - b * mean])


def batch_norm_gradient(g: Tensor, y: Tensor, coefs: Tensor) -> Tensor:
    """``dy = A*g + B*y + C``: the gradient of the convolution's output [N, C, P, Q]."""
    a, b, c = coefs[:, :, None, None]
    return a * g + b * y + c


def conv_dgrad(
    dy: Tensor,
    w: Tensor,
    size: tuple[int, int],
    geometry: Geometry = Geometry(),
    shortcut: Residual | None = None,
) -> Tensor:
    """Gradient of a convolution's input [N, CI, *size] from that of its output; plus the gradient of a shortcut.

    ``shortcut``: its channels from ``before`` on belong to every ``step``-th pixel: the adjoint of PaddedIdentity.
    """
    dx = conv_grad.conv2d_input((dy.shape[0], w.shape[1] * geometry.groups, *size), w, dy, *geometry)
    if shortcut is not None:
        g, step, before = shortcut
        dx[:, :, ::step, ::step] += g[:, before : before + dx.shape[1]]
    return dx


def conv_wgrad(dy: Tensor, x: Tensor, shape: tuple[int, int, int, int], geometry: Geometry = Geometry()) -> Tensor:
    """Gradient of a convolution's filter, of ``shape`` [CO, CI/groups, R, S]."""
    return conv_grad.conv2d_weight(x, shape, dy, *geometry)
