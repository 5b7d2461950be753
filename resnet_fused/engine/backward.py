"""The backward of a chain of units at once: which launches compute it, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.engine.forward import Before, Convolution, convolve, process_group
from resnet_fused.kernels.activation import IDENTITY, Activation
from resnet_fused.kernels.batch_norm import batch_norm_apply
from resnet_fused.kernels.conv_dgrad import conv_dgrad
from resnet_fused.kernels.conv_wgrad import conv_wgrad
from resnet_fused.kernels.epilogue import Residual
from resnet_fused.kernels.memory import Layout
from resnet_fused.kernels.norm_backward import (
    batch_norm_backward,
    batch_norm_coefs,
    batch_norm_reduce,
    batch_norm_sums,
    merge_sums,
)
from resnet_fused.kernels.norm_pool import Peaks, batch_norm_pool_backward
from resnet_fused.kernels.squeeze import squeeze_gradient
from resnet_fused.plan.decide import tf32


class Gated(NamedTuple):
    """What is known of a gate, a number for each image and channel that depends on the mean of what it multiplies.

    ``sums``: as :func:`gate_gradient` has them, of the gradient behind the gate; ``gate`` [N, C]; ``dsqueeze``, the
    gradient of the means [N, C]; ``means``, fp32 [N, C]: of the raw output.
    """

    sums: Tensor
    gate: Tensor
    dsqueeze: Tensor
    means: Tensor


class Join(NamedTuple):
    """How a chain ends. ``kind`` of the shortcut: none, identity, padded (PaddedIdentity) or projection.

    ``peaks``: those of a max pool behind it; then there is no shortcut. ``gated``: of the gate in front of the
    addition, if there is one; then the gradient that comes is the one in front of the activation.
    """

    kind: str
    step: int
    before: int
    peaks: Peaks | None = None
    gated: Gated | None = None


class Needs(NamedTuple):
    """Which gradients of a unit are wanted."""

    w: bool
    bias: bool
    gamma: bool
    beta: bool


@dataclass
class Gradients:
    """Of one unit's parameters; None where not wanted."""

    w: Tensor | None = None
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None


@dataclass
class UnitBackward:
    """A unit as the backward sees it, which fills in ``gradients``.

    ``w`` is channels_last; ``w_stride``: the strides that its gradient is to have. ``y`` is None if it was not kept.
    ``frozen``: its statistics are constants. ``group``: see :func:`unit_forward`. ``activation``: what stands behind
    it; of the last unit of a branch, behind the addition.

    In a pre-activation block batch norm and activation stand in front of the convolution, and ``y`` is what they read.
    """

    conv: Convolution
    w: Tensor
    w_stride: tuple[int, ...]
    bias: Tensor | None
    y: Tensor | None
    stats: Tensor
    frozen: bool
    group: str
    needs: Needs
    activation: Activation
    gradients: Gradients = field(default_factory=Gradients)

    @property
    def reads_y(self) -> bool:
        """Whether a gradient depends on y other than through a ReLU."""
        return not self.frozen or self.needs.gamma or not self.activation.light

    @property
    def y_of_dy(self) -> Tensor | None:
        """``y`` if the gradient of the convolution's output depends on it: not if the statistics are constants."""
        return None if self.frozen else self.y

    @property
    def pointwise(self) -> bool:
        return self.w.shape[2:] == (1, 1)

    @property
    def in_prologue(self) -> bool:
        """Whether the convolution's gradients compute dy themselves: in Triton, if the first has a use for it."""
        return self.conv.fused and (self.pointwise or self.needs.w)

    @property
    def subsamples(self) -> bool:
        """Whether the convolution reads every n-th pixel alone (n its stride): its gradient is a small tensor."""
        (step, other), padding = self.conv.geometry.stride, self.conv.geometry.padding
        return self.conv.fused and self.pointwise and step == other and padding == (0, 0)


class Incoming(NamedTuple):
    """The gradient ``dy`` of a convolution's output: g itself, or ``A*g + B*y + C`` with the vectors ``coefs``."""

    g: Tensor
    y: Tensor | None = None
    coefs: Tensor | None = None


class Wanted(NamedTuple):
    """Which gradients of the chain's inputs are wanted, and the dtypes of the parameters' gradients."""

    x: bool
    shortcut: bool
    weight_dtype: torch.dtype
    norm_dtype: torch.dtype


def backward(
    dz: Tensor,
    z: Tensor | None,
    x: Tensor,
    shortcut: Tensor | None,
    units: Sequence[UnitBackward],
    projection: UnitBackward | None,
    join: Join,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the shortcut's own input; those of the parameters go to each unit.

    ``z``: the output, None if no ReLU stands in front of it, or a pool behind that. ``shortcut``: what the shortcut
    reads, None for x. Formulas: :func:`resnet_fused.engine.reference.batch_norm_coefs` and its neighbours.
    """
    if join.peaks is not None:
        return _branch_backward(_pool_backward(units[-1], dz, join.peaks, wanted), x, units, None, wanted), None
    source = x if shortcut is None else shortcut
    needs_source = wanted.x if shortcut is None else wanted.shortcut
    if join.gated is not None:
        g, dy, dy_p = dz, *_gate_backward(dz, units[-1], projection, join.gated, wanted)
    else:
        g, dy, dy_p = _join_backward(dz, z, x, source, units, projection, join, needs_source, wanted)
    addend: Residual | None = None
    if projection is not None and dy_p is not None:
        compact = shortcut is None and projection.subsamples
        d_source, _ = _conv_backward(projection, dy_p, source, None, needs_source, wanted, compact=compact)
        if d_source is not None:
            addend = Residual(d_source, projection.conv.geometry.stride[0] if compact else 1)
    elif join.kind != "none" and needs_source:
        addend = Residual(g, join.step, join.before)
    dx = _branch_backward(dy, x, units, addend if shortcut is None else None, wanted)
    return dx, None if shortcut is None or addend is None else _spread(addend, shortcut, dz)


def _join_backward(
    dz: Tensor,
    z: Tensor | None,
    x: Tensor,
    source: Tensor,
    units: Sequence[UnitBackward],
    projection: UnitBackward | None,
    join: Join,
    needs_source: bool,
    wanted: Wanted,
) -> tuple[Tensor, Incoming, Incoming | None]:
    """The gradient g behind the addition, and of the last convolution's output and of the projection's."""
    last, act = units[-1], units[-1].activation
    if last.reads_y or projection is not None:
        _recompute(last, *_input(units, len(units) - 1, x))
    if projection is None:
        y, stats = (last.y, last.stats) if last.reads_y else (None, None)
        recomputed = z is None and act != IDENTITY and join.kind != "none"
        residual = Residual(source, join.step, join.before) if recomputed else None
        g, sums = batch_norm_reduce(dz, y, stats, activation=act, z=z, residual=residual)
        coefs = _norm_backward(last, sums[0], sums[1], wanted)
        overwrite = g is not dz and not (join.kind != "none" and needs_source)
        return g, _incoming(last, g, coefs, overwrite=overwrite), None
    y_p = _recompute(projection, source, None)
    g, sums = batch_norm_reduce(dz, last.y, last.stats, activation=act, z=z, second=(y_p, projection.stats))
    coefs = _norm_backward(last, sums[0], sums[1], wanted)
    coefs_p = _norm_backward(projection, sums[0], sums[2], wanted)
    if last.in_prologue or projection.in_prologue:
        dy_p = _incoming(projection, g, coefs_p, overwrite=False)
        return g, _incoming(last, g, coefs, overwrite=False), dy_p
    out = g if g is not dz and g.dtype == last.w.dtype else torch.empty_like(g, dtype=last.w.dtype)
    dy, dy_p = batch_norm_backward(g, last.y_of_dy, coefs, out=out, second=(projection.y_of_dy, coefs_p))
    return g, Incoming(dy), Incoming(dy_p)


def _gate_backward(
    g: Tensor, last: UnitBackward, projection: UnitBackward | None, gated: Gated, wanted: Wanted
) -> tuple[Incoming, Incoming | None]:
    """The gradients of the last convolution's output and of the projection's from ``g``, that behind the gate."""
    sums, offset = squeeze_gradient(*gated, last.stats, g.shape[2] * g.shape[3])
    coefs = _norm_backward(last, sums[0], sums[1], wanted)
    out = torch.empty_like(g, dtype=last.w.dtype)
    dy = Incoming(batch_norm_backward(g, last.y_of_dy, coefs, out=out, gate=(gated.gate, offset)))
    if projection is None:
        return dy, None
    coefs = _norm_backward(projection, gated.sums[0], gated.sums[2], wanted)
    return dy, _incoming(projection, g, coefs, overwrite=False)


def _branch_backward(
    dy: Incoming, x: Tensor, units: Sequence[UnitBackward], addend: Residual | None, wanted: Wanted
) -> Tensor | None:
    """Down the branch, from the gradient of its last convolution's output to that of x, as far as any is wanted."""
    for i in reversed(range(len(units))):
        below = wanted.x or any(any(unit.needs) for unit in units[:i])
        source, before = _input(units, i, x)
        dx, sums = _conv_backward(units[i], dy, source, before, below, wanted, addend=addend if i == 0 else None)
        if dx is None or sums is None:
            return dx
        coefs = _norm_backward(units[i - 1], sums[0], sums[1], wanted)
        dy = _incoming(units[i - 1], dx, coefs, overwrite=True)
    raise AssertionError("the first unit has no sums")


def unit_backward(
    unit: UnitBackward, g: Tensor, sums: Tensor, source: Tensor, before: Before | None, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of one unit's input from ``g``, that of its batch norm's output, and ``sums`` as of its reduction.

    Returns what :func:`_conv_backward` does, and notes the parameters' gradients in the unit.
    """
    dy = _incoming(unit, g, _norm_backward(unit, sums[0], sums[1], wanted), overwrite=False)
    return _conv_backward(unit, dy, source, before, wanted.x, wanted)


def pooled_unit_backward(unit: UnitBackward, dz: Tensor, peaks: Peaks, source: Tensor, wanted: Wanted) -> None:
    """The gradients of the parameters of one unit, a ReLU and a max pool behind it, from that of the pool's output."""
    _conv_backward(unit, _pool_backward(unit, dz, peaks, wanted), source, None, False, wanted)


def _pool_backward(unit: UnitBackward, dz: Tensor, peaks: Peaks, wanted: Wanted) -> Incoming:
    """The gradient of the output of a unit's convolution from that of the pool behind the unit and its ReLU."""
    sums = batch_norm_sums(dz, peaks.y, unit.stats)
    coefs = _norm_backward(unit, sums[0], sums[1], wanted)
    assert unit.y is not None
    return Incoming(batch_norm_pool_backward(dz, peaks.place, unit.y, unit.stats, coefs, frozen=unit.frozen))


def preact_backward(
    dz: Tensor,
    units: Sequence[UnitBackward],
    projection: UnitBackward | None,
    wanted: Wanted,
) -> Tensor | None:
    """The gradient of the input of a pre-activation block, if it is wanted; those of the parameters go to each unit.

    The ``projection`` has batch norm and activation of the first unit, and notes the gradient of its filter alone.
    """
    first, addend = units[0], None
    if projection is not None:
        behind = wanted.x or first.needs.gamma or first.needs.beta
        compact = projection.subsamples
        before = Before(first.stats, first.activation)
        da, _ = _conv_backward(
            projection, Incoming(dz), _kept(first), before, behind, wanted, compact=compact, in_front=False
        )
        addend = None if da is None else Residual(da, projection.conv.geometry.stride[0] if compact else 1)
    dy = Incoming(dz)
    for i in reversed(range(len(units))):
        unit, y = units[i], _kept(units[i])
        below = wanted.x or any(any(below.needs) for below in units[:i]) or unit.needs.gamma or unit.needs.beta
        before = Before(unit.stats, unit.activation)
        g, sums = _conv_backward(unit, dy, y, before, below, wanted, addend=addend if i == 0 else None)
        if g is None or sums is None:
            return None
        coefs = _norm_backward(unit, sums[0], sums[1], wanted)
        if i == 0:
            shortcut = dz if projection is None else None
            return batch_norm_backward(g, unit.y_of_dy, coefs, out=g, addend=shortcut) if wanted.x else None
        if units[i - 1].in_prologue:
            dy = Incoming(g, unit.y_of_dy, coefs)
        else:
            dy = Incoming(batch_norm_backward(g, unit.y_of_dy, coefs, out=g))
    raise AssertionError("a block has units")


def _kept(unit: UnitBackward) -> Tensor:
    assert unit.y is not None
    return unit.y


def _input(units: Sequence[UnitBackward], i: int, x: Tensor) -> tuple[Tensor, Before | None]:
    """What unit ``i`` reads, and what stands in front of its convolution, if that is raw."""
    if i == 0:
        return x, None
    y = units[i - 1].y
    assert y is not None
    return y, Before(units[i - 1].stats, units[i - 1].activation)


def _recompute(unit: UnitBackward, source: Tensor, before: Before | None) -> Tensor:
    """The raw output of a unit, computed again if it was not kept."""
    if unit.y is None:
        unit.y = convolve(source, before, unit.w, unit.bias, unit.conv)
    return unit.y


def _norm_backward(unit: UnitBackward, sum_g: Tensor, sum_gy: Tensor, wanted: Wanted) -> Tensor:
    """The coefs of ``dy``; notes the gradients of gamma, beta and the convolution's bias."""
    if unit.group and not unit.frozen:
        own = merge_sums(torch.stack([sum_g, sum_gy]))
        total = own.clone()
        dist.all_reduce(total, group=process_group(unit.group))
        coefs, _, _ = batch_norm_coefs(total[:1], total[1:], unit.stats)
        dgamma, dbeta = (own[1] * unit.stats[1]).to(wanted.norm_dtype), own[0].to(wanted.norm_dtype)
    else:
        coefs, dgamma, dbeta = batch_norm_coefs(sum_g, sum_gy, unit.stats, gamma_dtype=wanted.norm_dtype)
    if unit.needs.gamma:
        unit.gradients.gamma = dgamma
    if unit.needs.beta:
        unit.gradients.beta = dbeta
    if unit.needs.bias:
        # Batch norm takes the mean away, and the bias with it, unless the mean is a constant or infinite.
        bias = unit.stats[2] * dbeta if unit.frozen else 0 * coefs[2]
        unit.gradients.bias = bias.to(wanted.weight_dtype)
    return coefs


def _incoming(unit: UnitBackward, g: Tensor, coefs: Tensor, *, overwrite: bool) -> Incoming:
    if unit.in_prologue:
        return Incoming(g, unit.y_of_dy, coefs)
    out = g if overwrite and g.dtype == unit.w.dtype else torch.empty_like(g, dtype=unit.w.dtype)
    return Incoming(batch_norm_backward(g, unit.y_of_dy, coefs, out=out))


def _conv_backward(
    unit: UnitBackward,
    dy: Incoming,
    source: Tensor,
    before: Before | None,
    needs_input: bool,
    wanted: Wanted,
    *,
    addend: Residual | None = None,
    compact: bool = False,
    in_front: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of a unit's input, and its sums for the batch norm of the unit before if ``source`` is raw.

    Notes the gradient of the filter. ``compact``: leave out the pixels of the input that the convolution never reads.
    ``in_front``: of ``before``; else the gradient is that behind it, without sums.
    """
    if not unit.conv.fused:
        return _library_backward(unit, dy.g, source, before, needs_input, wanted, addend, in_front)
    geometry, rounded = unit.conv.geometry, tf32(source.dtype)
    stats, act = before or (None, IDENTITY)
    if unit.needs.w:
        # A filter wider than a pixel would compute dy anew at every tap: its gradient keeps it for the input's.
        kept = None
        if needs_input and dy.coefs is not None and not unit.pointwise:
            kept = torch.empty_like(dy.g, dtype=unit.w.dtype)
        dw = conv_wgrad(
            dy.g,
            source,
            (unit.w.shape[2], unit.w.shape[3]),
            geometry=geometry,
            y=dy.y,
            coefs=dy.coefs,
            x_stats=stats,
            activation=act,
            dy_out=kept,
            tf32=rounded,
            out_dtype=wanted.weight_dtype,
            config=unit.conv.tiles.wgrad,
        )
        unit.gradients.w = _strided(dw, unit.w_stride)
        if kept is not None:
            dy = Incoming(kept)
    if not needs_input:
        return None, None
    h, w = dy.g.shape[2:] if compact else source.shape[2:]
    if compact:
        geometry = geometry._replace(stride=(1, 1))
    mask = (source, stats) if in_front and stats is not None else None
    return conv_dgrad(
        dy.g,
        unit.w,
        (h, w),
        geometry=geometry,
        y=dy.y,
        coefs=dy.coefs,
        shortcut=addend,
        mask=mask,
        activation=act,
        tf32=rounded,
        config=None if compact else unit.conv.tiles.dgrad,
    )


def _library_backward(
    unit: UnitBackward,
    dy: Tensor,
    source: Tensor,
    before: Before | None,
    needs_input: bool,
    wanted: Wanted,
    addend: Residual | None,
    in_front: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`_conv_backward` by PyTorch's convolution: it reads a materialised input and writes a plain gradient."""
    if not needs_input and not unit.needs.w:
        return None, None
    a = source
    if before is not None and unit.needs.w:
        a = batch_norm_apply(source, before.stats, activation=before.activation)
    c = unit.conv.geometry
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy,
        a,
        unit.w,
        None,
        c.stride,
        c.padding,
        c.dilation,
        False,
        (0, 0),
        c.groups,
        (needs_input, unit.needs.w, False),
    )
    if unit.needs.w:
        unit.gradients.w = _strided(dw.to(wanted.weight_dtype), unit.w_stride)
    if not needs_input:
        return None, None
    dx = dx.contiguous(memory_format=torch.channels_last)
    if addend is not None:
        _add(dx, addend)
    if before is not None and in_front:
        return batch_norm_reduce(dx, source, before.stats, activation=before.activation, out=dx)
    return dx, None


def _strided(dw: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``dw`` with the given strides: DistributedDataParallel compares those of dimensions of size one too."""
    dw = dw.contiguous(memory_format=torch.channels_last)
    if Layout(dw.shape, stride, dw.dtype).is_packed(0, 2, 3, 1):
        return dw.as_strided(dw.shape, stride)
    return torch.empty_strided(dw.shape, stride, dtype=dw.dtype, device=dw.device).copy_(dw)


def _add(dx: Tensor, addend: Residual) -> None:
    g, step, before = addend
    dx[:, :, ::step, ::step].add_(g[:, before : before + dx.shape[1]])


def _spread(addend: Residual, shortcut: Tensor, dz: Tensor) -> Tensor:
    """The gradient of the shortcut's own input."""
    g = addend.tensor
    if g.shape == shortcut.shape:
        return g.clone() if g is dz else g.to(shortcut.dtype)
    dx = torch.zeros_like(shortcut)
    _add(dx, addend)
    return dx
