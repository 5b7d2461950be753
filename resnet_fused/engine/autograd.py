"""A residual block as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from resnet_fused.engine import eligible, ops, replay
from resnet_fused.engine.forward import Taken
from resnet_fused.kernels.activation import IDENTITY, RELU, Activation


class UnitSpec(NamedTuple):
    """What is constant about a unit. ``convolution``: see :meth:`resnet_fused.engine.forward.Convolution.encode`.

    ``activation``: what stands behind it, of the last unit of a branch behind the addition.

    ``batch_stats``: batch norm uses the batch's own statistics, shared by the process group ``group`` unless it is "".
    """

    convolution: tuple[int, ...]
    eps: float
    momentum: float | None
    batch_stats: bool
    group: str
    activation: Activation


@dataclass(frozen=True)
class ChainSpec:
    """What is constant about a chain; the projection's unit, if there is one, stands last in ``units``.

    ``kind`` of the shortcut: none, identity, padded (every ``step``-th pixel, ``before`` zero channels in front) or
    projection. ``pooled``: a max pool, 3x3/2 with padding 1, stands behind the last activation, a ReLU, and there is no
    shortcut.
    ``keep_last_y``, ``keep_projection_y``: save the raw output of the branch's last convolution, of the
    projection, for the backward, rather than compute it again there.
    """

    units: tuple[UnitSpec, ...]
    kind: str
    step: int
    before: int
    dtype: torch.dtype
    keep_last_y: bool
    keep_projection_y: bool
    pooled: bool = False

    @property
    def branch(self) -> int:
        """How many units the branch has."""
        return len(self.units) - (self.kind == "projection")


TENSORS_PER_UNIT = 7
"""w, bias, gamma, beta, running mean, running variance, number of batches."""


class ResidualFunction(torch.autograd.Function):
    """``act(units(x) + shortcut(x))``, each unit a convolution and batch norm, with activations between; or pooled.

    ``apply(spec, tape, x, shortcut, *tensors)``: ``tape``: what plays the forward on such tensors, or None if that is
    to be seen. ``x`` and the ``shortcut``'s input (None: x itself) are channels_last;
    ``tensors`` are TENSORS_PER_UNIT for each unit of ``spec``, None where there is none; filters may lie in memory as
    they like, and so do their gradients. Saved for the backward are the convolutions' raw outputs, vectors, and the
    block's output behind a ReLU (of a pool, its peaks). First derivatives only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: ChainSpec,
        tape: replay.Tape | None,
        x: Tensor,
        shortcut: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        if tape is None:
            found = _played(_residual, x, shortcut, spec, *tensors)
        else:
            found = tape.play([t for t in (x, shortcut, *tensors) if t is not None])
        convolved, z, *peaks = _by_kind(spec, found)
        last = spec.units[spec.branch - 1].activation
        mask = z if last == RELU and not spec.pooled else None
        _save(ctx, spec, x, shortcut, (mask, *peaks), tensors, convolved)
        return cast(Tensor, z)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        _require_first_derivative()
        x, shortcut, z, peak, place, *saved = ctx.saved_tensors
        needs, chain = _arguments(ctx, saved)
        return None, None, *_in_place(needs, ops.residual_backward(dz, z, x, shortcut, peak, place, *chain))


class Step(NamedTuple):
    """A forward of :class:`ResidualFunction` that is known: its ``tape``, and which inputs are its arguments."""

    spec: ChainSpec
    tape: replay.Tape
    places: tuple[int | None, ...]

    @classmethod
    def learned(cls, spec: ChainSpec, arguments: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Step | None:
        """From a call with the ``arguments``; None if some are not among the ``inputs``, or if it has no tape."""
        places = {id(t): i for i, t in enumerate(inputs)}
        tape = replay.tape_of(_residual, (*arguments[:2], spec, *arguments[2:]))
        if tape is None or len(places) < len(inputs) or any(id(t) not in places for t in arguments if t is not None):
            return None
        return cls(spec, tape, tuple([None if t is None else places[id(t)] for t in arguments]))

    def play(self, inputs: Sequence[Tensor]) -> Tensor:
        """What the call returns for ``inputs``, laid out as those that it was learned from."""
        arguments = [None if i is None else inputs[i] for i in self.places]
        return cast(Tensor, ResidualFunction.apply(self.spec, self.tape, *arguments))


class SqueezeFunction(torch.autograd.Function):
    """What :class:`GateFunction` reads, and what a gate is made of: the units of a branch up to its last batch norm.

    ``apply(spec, x, shortcut, *tensors)``: see :class:`ResidualFunction`. Returns the raw output ``y`` of the last unit
    of the branch; the mean of each image behind batch norm, [N, CO, 1, 1]; two tensors that only bring back, in place
    of gradients, the sums and the gate of :class:`resnet_fused.engine.backward.Gated`; the stats; and, of a projection,
    raw output and stats, or None. The gradient of ``y`` is the one in front of the activation behind the addition.
    """

    @staticmethod
    def forward(ctx: Any, spec: ChainSpec, x: Tensor, shortcut: Tensor | None, *tensors: Tensor | None) -> Any:
        convolved, squeeze, means = _by_kind(spec, _played(_squeezed, x, shortcut, spec, *tensors))
        _, ys, stats = convolved
        n, last = spec.branch, spec.branch - 1
        _save(ctx, spec, x, shortcut, (means, None, None), tensors, convolved)
        ctx.set_materialize_grads(False)
        y_p, stats_p = (ys[n], stats[n]) if spec.kind == "projection" else (None, None)
        fixed = [t for t in (stats[last], y_p, stats_p) if t is not None]
        ctx.mark_non_differentiable(*fixed)
        sums = means.new_empty(2 if y_p is None else 3, *means.shape)
        return ys[last], squeeze, sums, squeeze.new_empty(means.shape), stats[last], y_p, stats_p

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, dsqueeze: Tensor | None, sums: Tensor | None, gate: Tensor | None, *_: None
    ) -> Any:
        _require_first_derivative()
        x, shortcut, means, _, _, *saved = ctx.saved_tensors
        needs, chain = _arguments(ctx, saved)
        y = chain[2][ctx.spec.branch - 1]
        if g is None or sums is None or gate is None:  # nothing but the squeeze was used
            g, gate = torch.zeros_like(y), means.new_zeros(means.shape)
            sums = means.new_zeros(3 if ctx.spec.kind == "projection" else 2, *means.shape)
        dsqueeze = torch.zeros_like(means) if dsqueeze is None else dsqueeze.reshape(means.shape)
        return None, *_in_place(needs, ops.squeezed_backward(g, sums, gate, dsqueeze, means, x, shortcut, *chain))


class GateFunction(torch.autograd.Function):
    """``act(bn(y) * gate + shortcut)``, all but ``gate`` as :class:`SqueezeFunction` returned it.

    ``apply(spec, y, gate, sums, carrier, stats, y_p, stats_p, source)``: ``gate`` [N, C]; ``source``: what the shortcut
    is, if that is not the projection with ``y_p`` and ``stats_p``; its gradient is SqueezeFunction's to return.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: ChainSpec,
        y: Tensor,
        gate: Tensor,
        sums: Tensor,
        carrier: Tensor,
        stats: Tensor,
        y_p: Tensor | None,
        stats_p: Tensor | None,
        source: Tensor | None,
    ) -> Tensor:
        act = spec.units[spec.branch - 1].activation
        residual = source if y_p is None else y_p
        z = ops.join_forward(y, stats, gate, residual, stats_p, spec.step, spec.before, act.code, spec.dtype)
        recomputed = act not in (RELU, IDENTITY)
        ctx.save_for_backward(y, gate, stats, z if act == RELU else None, y_p, stats_p, source if recomputed else None)
        ctx.spec = spec
        return cast(Tensor, z)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        _require_first_derivative()
        y, gate, stats, z, y_p, stats_p, source = ctx.saved_tensors
        spec = ctx.spec
        act = spec.units[spec.branch - 1].activation
        residual = source if y_p is None else y_p
        dgate, sums, *g = ops.gate_backward(dz, z, y, stats, gate, residual, stats_p, spec.step, spec.before, act.code)
        return None, g[0] if g else dz, dgate, sums, gate.detach(), None, None, None, None


class _Convolved(NamedTuple):
    """What came of the units of a chain: their filters as they were read, their raw outputs, and stats."""

    weights: list[Tensor]
    ys: list[Tensor]
    stats: list[Tensor]


def _by_kind(spec: ChainSpec, found: list[Any]) -> list[Any]:
    """``found``, but what it has of each unit of the chain, which comes first, as one value."""
    n = len(spec.units)
    return [_Convolved(found[:n], found[n : 2 * n], found[2 * n : 3 * n]), *found[3 * n :]]


def _played(forward: Callable[..., list[Any]], *arguments: Any) -> list[Any]:
    """What ``forward`` returns of the ``arguments``, from a tape where no one watches."""
    return forward(*arguments) if replay.is_watched(arguments) else replay.run(forward, arguments)


def _by_unit(tensors: tuple[Tensor | None, ...]) -> list[tuple[Tensor | None, ...]]:
    return [tensors[i : i + TENSORS_PER_UNIT] for i in range(0, len(tensors), TENSORS_PER_UNIT)]


def _residual(x: Tensor, shortcut: Tensor | None, spec: ChainSpec, *tensors: Tensor | None) -> list[Tensor | None]:
    """Filters, raw outputs and stats; the block's output, and the peaks of its pool."""
    weights, ys, stats, _ = _convolved(spec, x, shortcut, tensors, squeezes=False)
    joined = _joined(spec, ys, stats, x if shortcut is None else shortcut)
    return [*weights, *ys, *stats, *joined]


def _squeezed(x: Tensor, shortcut: Tensor | None, spec: ChainSpec, *tensors: Tensor | None) -> list[Tensor | None]:
    """Filters, raw outputs and stats; of the last unit of the branch, the means of :func:`forward.unit_forward`."""
    weights, ys, stats, squeezed = _convolved(spec, x, shortcut, tensors, squeezes=True)
    return [*weights, *ys, *stats, *squeezed]


def _convolved(
    spec: ChainSpec, x: Tensor, shortcut: Tensor | None, tensors: tuple[Tensor | None, ...], squeezes: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Filters as they are read, raw outputs, stats, and of the branch's last unit what it ``squeezes``."""
    units = _by_unit(tensors)
    weights = [laid_out(cast(Tensor, unit[0]), x.dtype) for unit in units]
    ys: list[Tensor] = []
    stats: list[Tensor] = []
    squeezed: list[Tensor] = []
    for i, unit in enumerate(spec.units):
        chained = 0 < i < spec.branch
        operator = ops.squeezed_forward if squeezes and i == spec.branch - 1 else ops.unit_forward
        y, s, *means = operator(
            ys[-1] if chained else x if i == 0 or shortcut is None else shortcut,
            stats[-1] if chained else None,
            weights[i],
            spec.units[i - 1].activation.code if chained else IDENTITY.code,
            *units[i][1:],
            unit.momentum,
            unit.eps,
            unit.batch_stats,
            unit.convolution,
            unit.group,
        )
        ys.append(y)
        stats.append(s)
        squeezed += means
    return weights, ys, stats, squeezed


def _save(
    ctx: Any,
    spec: ChainSpec,
    x: Tensor,
    shortcut: Tensor | None,
    others: tuple[Tensor | None, ...],
    tensors: tuple[Tensor | None, ...],
    convolved: _Convolved,
) -> None:
    """For the backward of a chain, which also reads three ``others``."""
    weights, ys, stats = convolved
    units = _by_unit(tensors)
    filters = [cast(Tensor, unit[0]) for unit in units]
    keep = [True] * (spec.branch - 1) + [spec.keep_last_y, spec.keep_projection_y]
    kept = [y if k else None for y, k in zip(ys, keep, strict=False)]
    biases = [unit[1] for unit in units]
    watched = _watched(filters, weights, units, spec.units)
    ctx.save_for_backward(x, shortcut, *others, *weights, *biases, *kept, *stats, *watched)
    ctx.spec, ctx.dtypes = spec, _dtypes(x, units)
    ctx.weight_strides = [step for w in filters for step in _gradient_stride(w)]


def _arguments(ctx: Any, saved: list[Tensor | None]) -> tuple[list[bool], tuple[Any, ...]]:
    """Which gradients are needed, and all that the backward of a chain takes behind what joins it.

    ``saved``: what :func:`_save` did, behind the three others.
    """
    units, n = ctx.spec.units, len(ctx.spec.units)
    weights, biases, ys, stats = (saved[i * n : i * n + n] for i in range(4))  # the rest is watched alone
    needed = ctx.needs_input_grad[-2 - n * TENSORS_PER_UNIT :]
    needs = [*needed[:2]]
    for i in range(n):
        needs += needed[2 + i * TENSORS_PER_UNIT : 6 + i * TENSORS_PER_UNIT]
    return needs, (
        weights,
        biases,
        ys,
        stats,
        [number for unit in units for number in unit.convolution],
        ctx.weight_strides,
        [not unit.batch_stats for unit in units],
        [unit.group for unit in units],
        [unit.activation.code for unit in units],
        ctx.spec.kind,
        ctx.spec.step,
        ctx.spec.before,
        needs,
        *ctx.dtypes,
    )


def _in_place(needs: list[bool], found: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Of those gradients that are needed, for each tensor that a chain's ``apply`` takes its own."""
    each = iter(found)
    gradients = [next(each) if need else None for need in needs]
    per_unit = [[*gradients[i : i + 4], None, None, None] for i in range(2, len(gradients), 4)]
    return *gradients[:2], *(gradient for unit in per_unit for gradient in unit)


class PreActSpec(NamedTuple):
    """What is constant about a pre-activation block.

    ``units``: of each, batch norm and activation stand in front of its convolution. ``projection``: its convolution
    (see :class:`UnitSpec`), or None for the identity. ``hands_on``: whoever reads the result wants its moments.
    """

    units: tuple[UnitSpec, ...]
    projection: tuple[int, ...] | None
    hands_on: bool


class PreActFunction(torch.autograd.Function):
    """``units(x) + shortcut``, each unit batch norm, activation and convolution; the raw sum is the result.

    ``apply(spec, x, projection, taken, *tensors)``: ``x`` is channels_last; ``projection``: the filter through which
    the first unit's activations are the shortcut, or None where that is x; ``taken``: the moments of x, or None;
    ``tensors`` are TENSORS_PER_UNIT for each unit of ``spec``, without biases. Returns the sum, and behind it, if
    ``spec`` hands them on, its moments. Saved for the backward are x, the raw outputs of all convolutions but the last,
    and vectors: nothing that is to be recomputed for less memory. First derivatives only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: PreActSpec,
        x: Tensor,
        projection: Tensor | None,
        taken: Taken | None,
        *tensors: Tensor | None,
    ) -> Tensor | tuple[Tensor, Taken]:
        units = _by_unit(tensors)
        filters = [cast(Tensor, unit[0]) for unit in units] + ([] if projection is None else [projection])
        *found, residual = _played(_preact, x, projection, taken, spec, *tensors)
        n, m = len(filters), len(units)
        weights, ys, stats = found[:n], [x, *found[n:-m]], found[-m:]
        ctx.save_for_backward(*weights, *ys, *stats, *_watched(filters, weights, units, spec.units))
        ctx.spec, ctx.dtypes = spec, _dtypes(x, units)
        ctx.weight_strides = [step for w in filters for step in _gradient_stride(w)]
        last, w = spec.units[-1], weights[m - 1]
        if not spec.hands_on:
            return _summand(ys[-1], stats[-1], w, last, residual, last.convolution)
        z, *moments = ops.raw_sum(ys[-1], stats[-1], w, last.activation.code, residual, last.convolution)
        return z, Taken(*moments)

    @staticmethod
    def backward(ctx: Any, dz: Tensor, *_: None) -> Any:
        _require_first_derivative()
        units, projection, _ = ctx.spec
        n, saved = len(units), ctx.saved_tensors
        filters = n if projection is None else n + 1
        each = [4 + i * TENSORS_PER_UNIT for i in range(n)]  # where the tensors of the units begin
        wanted = [1, *(i + j for i in each for j in (0, 2, 3)), *([] if projection is None else [2])]
        found = iter(
            ops.preact_backward(
                dz,
                list(saved[:filters]),
                list(saved[filters : filters + n]),
                list(saved[filters + n : filters + 2 * n]),
                [number for unit in units for number in unit.convolution] + [*(projection or ())],
                ctx.weight_strides,
                [not unit.batch_stats for unit in units],
                [unit.group for unit in units],
                [unit.activation.code for unit in units],
                [ctx.needs_input_grad[i] for i in wanted],
                *ctx.dtypes,
            )
        )
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i in wanted:
            if ctx.needs_input_grad[i]:
                gradients[i] = next(found)
        return tuple(gradients)


def _preact(
    x: Tensor, projection: Tensor | None, taken: Taken | None, spec: PreActSpec, *tensors: Tensor | None
) -> list[Tensor]:
    """All that is in front of the last convolution: filters, raw outputs, stats, and what the shortcut adds."""
    units = _by_unit(tensors)
    weights = [laid_out(cast(Tensor, w), x.dtype) for w in (*tensors[::TENSORS_PER_UNIT], projection) if w is not None]
    (first, *others), ys = zip(spec.units, units, strict=True), [x]
    moments = ([], 0) if taken is None else taken
    stats = [ops.norm_forward(x, *moments, *first[1][2:], *_numbers(first[0]), first[0].group)]
    for i, (unit, held) in enumerate(others):
        y, s = ops.unit_forward(
            *(ys[i], stats[i], weights[i], spec.units[i].activation.code, None, *held[2:], *_numbers(unit)),
            *(spec.units[i].convolution, unit.group),
        )
        ys.append(y)
        stats.append(s)
    residual = x
    if spec.projection is not None:
        residual = _summand(x, stats[0], weights[-1], spec.units[0], None, spec.projection)
    return [*weights, *ys[1:], *stats, residual]


def _numbers(unit: UnitSpec) -> tuple[float | None, float, bool]:
    return unit.momentum, unit.eps, unit.batch_stats


def _summand(
    x: Tensor,
    stats: Tensor,
    w: Tensor,
    front: UnitSpec,
    residual: Tensor | None,
    convolution: tuple[int, ...],
) -> Tensor:
    """The convolution of what ``stats`` and the activation of ``front`` make of ``x``, plus the ``residual``."""
    nothing = None, None, None, None, 0.0, IDENTITY.code
    return cast(Tensor, ops.preact_conv(x, stats, w, front.activation.code, *nothing, residual, convolution))


def _watched(
    filters: list[Tensor],
    weights: list[Tensor],
    units: list[tuple[Tensor | None, ...]],
    specs: tuple[UnitSpec, ...],
) -> list[Tensor | None]:
    """What eager PyTorch would read again in its backward may not change in place until then, read or not."""
    watched: list[Tensor | None] = [
        w for w, a in zip(filters, weights, strict=True) if w is not a and w.dtype == a.dtype
    ]
    watched += [unit[2] for unit in units]
    return watched + [t for unit, norm in zip(units, specs, strict=True) if not norm.batch_stats for t in unit[4:6]]


def _dtypes(x: Tensor, units: list[tuple[Tensor | None, ...]]) -> tuple[torch.dtype, torch.dtype]:
    """Of the gradients of filters, and of gamma and beta: all units' are the same."""
    norms = [t.dtype for unit in units for t in unit[2:4] if t is not None]
    return cast(Tensor, units[0][0]).dtype, norms[0] if norms else x.dtype


def _require_first_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused residual blocks have first derivatives only, and create_graph=True asks for second ones: "
            "run the forward under resnet_fused.implementation('eager')"
        )


def _joined(
    spec: ChainSpec, ys: list[Tensor], stats: list[Tensor], source: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The chain's output, and the peaks of its pool; ``source``: what the shortcut reads."""
    if spec.pooled:
        return cast(tuple[Tensor, Tensor, Tensor], ops.pool_forward(ys[-1], stats[-1]))
    last, residual, residual_stats = -1, None if spec.kind == "none" else source, None
    if spec.kind == "projection":
        last, residual, residual_stats = -2, ys[-1], stats[-1]
    act = spec.units[last].activation.code
    z = ops.join_forward(ys[last], stats[last], None, residual, residual_stats, spec.step, spec.before, act, spec.dtype)
    return z, None, None


def laid_out(w: Tensor, dtype: torch.dtype) -> Tensor:
    """The filter ``w`` in ``dtype`` and channels_last: itself, or a copy of one launch."""
    if w.dtype != dtype:
        return w.to(dtype, memory_format=torch.channels_last)
    if not w.is_contiguous(memory_format=torch.channels_last):
        eligible.warn_once(
            "filters are laid out anew in every forward: model.to(memory_format=torch.channels_last) saves the launches"
        )
    return w.contiguous(memory_format=torch.channels_last)


def _gradient_stride(w: Tensor) -> tuple[int, ...]:
    """The strides that autograd gives the gradient of a leaf like ``w``: its own, unless it has gaps or overlaps."""
    if w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last):
        return w.stride()
    return torch.empty_like(w, device="meta").stride()
