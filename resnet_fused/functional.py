"""The public door: arguments are checked, autocast is followed and memory layout is settled here, and nowhere below."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from resnet_fused.engine import chains, eligible, ops, reference
from resnet_fused.engine.autograd import (
    ChainSpec,
    GateFunction,
    PreActFunction,
    PreActSpec,
    ResidualFunction,
    SqueezeFunction,
    Step,
    UnitSpec,
    laid_out,
)
from resnet_fused.engine.eligible import Layer, Unit, plain, process_group_name, why_foreign, why_unfit
from resnet_fused.engine.forward import Choice, Taken, choose, choose_chain, settings, undecided
from resnet_fused.engine.ops import channels_last
from resnet_fused.engine.reference import PaddedIdentity
from resnet_fused.engine.replay import Repetition
from resnet_fused.engine.request import requested
from resnet_fused.kernels.activation import IDENTITY, RELU, Activation
from resnet_fused.kernels.chain import Link
from resnet_fused.kernels.conv import Geometry, output_size
from resnet_fused.kernels.conv_pool import POOL
from resnet_fused.kernels.launch import FLOATS, TileConfig
from resnet_fused.plan.problem import Parts, Request, Way

__all__ = ["Activation", "Layer", "PaddedIdentity", "Projection", "conv_bn_act", "conv_bn_act_pool", "residual_block"]


class Projection(NamedTuple):
    """The shortcut ``bn(conv(x))``."""

    x: Tensor
    conv: nn.Conv2d
    bn: nn.BatchNorm2d


Shortcut = Tensor | PaddedIdentity | Projection


def conv_bn_act(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    residual: Tensor | PaddedIdentity | None = None,
    relu: bool = True,
    *,
    activation: Activation | None = None,
) -> Tensor:
    """``act(bn(conv(x)) + residual)``; the residual is optional.

    The activation is a ReLU, nothing if not ``relu``, or ``activation`` if given: see :class:`Activation`.

    ``x``: [N, CI, H, W], fp32, fp16 or bf16, any memory format. ``residual``: a tensor of the output's shape
    [N, CO, P, Q], or a :class:`PaddedIdentity`. Returns [N, CO, P, Q] in channels_last, in the dtype that the same
    modules would return (autocast included). In evaluation mode without gradients it is one launch.

    Units that cannot be fused as they stand (unsupported arguments, hooks on the modules) run ``conv`` and ``bn``
    themselves, and the reason is logged once.

    Raises TypeError or ValueError for arguments that do not fit each other, and what ``conv`` and ``bn`` raise.
    """
    if not isinstance(activation, Activation | None):
        raise TypeError(f"activation must be an Activation or None; got {type(activation).__qualname__}")
    act = activation or (RELU if relu else IDENTITY)
    _check(x, conv, bn, residual)
    act.require()
    chain = chain_of(x, [Layer(conv, bn, act)], residual)
    if isinstance(chain, Chain):
        return run(chain)
    eligible.report_once(chain)
    return reference.conv_bn_act(x, conv, bn, residual, activation=act)


def conv_bn_act_pool(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, pool: nn.MaxPool2d) -> Tensor:
    """``pool(relu(bn(conv(x))))``: a ResNet's stem.

    ``x``: as for :func:`conv_bn_act`. With a ``pool`` of 3x3/2 with padding 1, in evaluation mode without gradients it
    is two launches, the first of which packs the image, if ``conv`` has stride 2 and at most 4 input channels;
    otherwise one pass behind the convolution takes batch norm, ReLU and the pool. With another pool it is
    :func:`conv_bn_act` with ``pool`` behind it. Raises what these raise.
    """
    _check(x, conv, bn, None)
    found = pooled_unit(x, conv, bn, pool)
    if isinstance(found, PooledUnit):
        return run_pooled(x, found)
    return pool(conv_bn_act(x, conv, bn))


class PooledUnit(NamedTuple):
    """A unit with the pool behind it. ``dtype``: in which is convolved. ``fixed``: see :func:`_is_fixed`."""

    unit: Unit
    dtype: torch.dtype
    request: Request
    fixed: bool


def pooled_unit(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, pool: nn.Module) -> PooledUnit | str:
    """The unit of ``conv`` and ``bn`` with ``pool`` behind it as :func:`run_pooled` takes it, or why it does not."""
    request = requested(conv)
    if (reason := eligible.why_eager(x, [(conv, bn)], request) or eligible.why_not_pooled(pool)) is not None:
        return reason
    autocast = _autocast_dtype(x)
    dtype = x.dtype if autocast is None else autocast
    unit = eligible.unit(x, tuple(x.shape), autocast, Layer(conv, bn))
    if isinstance(unit, str):
        return unit
    if (unlike := _why_unlike([unit])) is not None:
        return unlike
    if eligible.returned(bn, dtype) != dtype:
        return "a frozen batch norm in front of a pool returns another dtype"
    return PooledUnit(unit, dtype, request, _is_fixed([unit], x))


def run_pooled(x: Tensor, found: PooledUnit) -> Tensor:
    """What :func:`conv_bn_act_pool` returns."""
    unit, dtype, request, fixed = found
    direction = "inference" if fixed else "training"
    implementation, code = _plan(tuple(x.shape), unit, dtype, request, direction, pooled=True)
    if implementation == "eager":
        return channels_last(F.max_pool2d(reference.conv_bn_act(x, unit.layer.conv, unit.layer.bn), *POOL))
    if not fixed:
        return _train_pooled(x, _Planned(unit, implementation, code), dtype)
    w = laid_out(unit.w, dtype)
    return ops.conv_bn_act_pool(plain(x), w, unit.bias, unit.mean, unit.var, unit.gamma, unit.beta, unit.eps, code)


def residual_block(
    x: Tensor, layers: Sequence[Layer], shortcut: Shortcut | None = None, *, recompute: bool = False
) -> Tensor:
    """``act(layers(x) + shortcut)``; returns channels_last.

    The last layer's activation stands behind the addition. Without gradients and with fixed statistics every layer is
    one launch. Otherwise layers are run as :class:`resnet_fused.engine.autograd.ResidualFunction`. ``recompute``: its
    backward computes the last convolution again instead of keeping its output.

    Layers that cannot be fused as they stand run their own modules, and the reason is logged once; what those refuse is
    refused.
    """
    chain = chain_of(x, layers, shortcut)
    if isinstance(chain, Chain):
        return run(chain, recompute=recompute)
    eligible.report_once(chain)
    *inner, last = layers
    for layer in inner:
        x = reference.conv_bn_act(x, layer.conv, layer.bn, activation=layer.activation)
    return _run_eager(x, last, shortcut)


class Chain(NamedTuple):
    """Layers and a shortcut that fit the input ``x``, which is channels_last, and one another.

    ``source``: what the shortcut reads, or None. ``step``, ``before``: see PaddedIdentity. ``dtype``: in which is
    convolved; ``out_dtype``: of the result.
    """

    x: Tensor
    units: list[Unit]
    projection: Unit | None
    source: Tensor | None
    step: int
    before: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    request: Request

    @property
    def all_units(self) -> list[Unit]:
        """The units of the branch, and the projection if there is one."""
        return self.units if self.projection is None else [*self.units, self.projection]


def _why_unlike(units: Sequence[Unit]) -> str | None:
    """Why units cannot be one node of the autograd graph, or None."""
    kind, norm_kind = units[0].w.dtype, None
    for unit in units:
        v = unit.beta if unit.gamma is None else unit.gamma
        if norm_kind is None and v is not None:
            norm_kind = v.dtype
        if unit.w.dtype != kind or (v is not None and v.dtype != norm_kind):
            return "the units have parameters of several dtypes"
    return None


def chain_of(x: Tensor, layers: Sequence[Layer], shortcut: Shortcut | None = None) -> Chain | str:
    """Layers and shortcut as :func:`run` takes them, or why they run eager on ``x``, whatever that is."""
    units = [layer[:2] for layer in layers] + ([shortcut[1:]] if isinstance(shortcut, Projection) else [])
    request = requested(layers[0].conv)
    return eligible.why_eager(x, units, request) or resolve(x, layers, shortcut, request=request)


def resolve(
    x: Tensor,
    layers: Sequence[Layer],
    shortcut: Shortcut | None = None,
    *,
    in_place: bool = False,
    request: Request | None = None,
) -> Chain | str:
    """Layers and shortcut as :func:`run` takes them, or why they run eager. ``x`` is one that ``why_eager`` cleared.

    What PyTorch would refuse is no chain either: it is the modules' own to say so. ``in_place``: the addition writes
    to the branch, whose dtype it keeps. ``request``: see :func:`resnet_fused.requested`.
    """
    dtype = x.dtype if (autocast := _autocast_dtype(x)) is None else autocast
    x = plain(channels_last(x))
    units: list[Unit] = []
    shape = tuple(x.shape)
    for layer in layers:
        unit = eligible.unit(x, shape, autocast, layer)
        if isinstance(unit, str):
            return unit
        shape = unit.out
        units.append(unit)
    projection: Unit | None = None
    source, step, before = shortcut if isinstance(shortcut, PaddedIdentity) else (shortcut, 1, 0)
    if isinstance(source, Projection):
        if (reason := why_foreign(source.x, x)) is not None:
            return reason
        if source.x.dtype not in FLOATS if autocast is not None else source.x.dtype != x.dtype:
            return f"the branch reads {x.dtype} and the shortcut {source.x.dtype}"
        found = eligible.unit(source.x, tuple(source.x.shape), autocast, Layer(source.conv, source.bn, IDENTITY))
        if isinstance(found, str):
            return found
        projection, source = found, source.x
        if projection.out != shape:
            return f"the shortcut has shape {projection.out}, not the branch's {shape}"
    elif source is not None:
        padded = isinstance(shortcut, PaddedIdentity)
        if (reason := why_foreign(source, x) or why_unfit(shape, source, step, before, padded)) is not None:
            return reason
    if source is not None:
        added = units[-1:] if projection is None else [units[-1], projection]
        if any(eligible.activation_in(unit.layer.bn) != IDENTITY for unit in added):
            return "a batch norm has an activation of its own, in front of the addition"
    if (reason := _why_unlike(units if projection is None else [*units, projection])) is not None:
        return reason
    out_dtype = eligible.returned(layers[-1].bn, dtype)
    if source is not None and not in_place:
        other = source.dtype if projection is None else eligible.returned(projection.layer.bn, dtype)
        out_dtype = torch.promote_types(out_dtype, other)
    if source is not None:
        source = plain(channels_last(source))
    request = requested() if request is None else request
    return Chain(x, units, projection, source, step, before, dtype, out_dtype, request)


def run(chain: Chain, *, recompute: bool = False, repetition: Repetition | None = None) -> Tensor:
    """What :func:`residual_block` returns. ``repetition``: the call that it is, to be kept where it can be repeated."""
    z, step = _run(chain, recompute, () if repetition is None else repetition.inputs)
    if repetition is not None:
        repetition.keep(step)
    return z


def _run(chain: Chain, recompute: bool, inputs: Sequence[Tensor]) -> tuple[Tensor, Step | None]:
    """What :func:`run` returns, and what would do it again, if that is one node of the graph that reads ``inputs``."""
    if _is_fixed(chain.all_units, chain.x, chain.source):
        return _infer(chain, chain.x, chain.units), None
    *parts, last = _parts(chain)
    x = _run_inner(chain, parts)
    if _is_eager(*last):
        return _run_eager(x, last[0].unit.layer, _shortcut(chain)).to(chain.out_dtype), None
    spec, *arguments = _arguments(x, last, chain, True, recompute)
    z = ResidualFunction.apply(spec, None, *arguments)
    return z, Step.learned(spec, arguments, inputs) if inputs else None


def _run_inner(chain: Chain, parts: Sequence[Sequence[_Planned]]) -> Tensor:
    """What ``parts`` of the chain but the last return."""
    x = chain.x
    for part in parts:
        if _is_eager(*part):
            x = _run_eager(x, part[0].unit.layer, None)
        else:
            spec, *arguments = _arguments(x, part, chain, False, False)
            x = ResidualFunction.apply(spec, None, *arguments)
    return x


def run_gated(chain: Chain, excite: Callable[[Tensor], Tensor]) -> Tensor:
    """``act(units(x) * gate + shortcut)``, the gate what ``excite`` makes of the mean of ``units(x)``, image by image.

    ``excite``: from [N, CO, 1, 1] to a tensor that expands to that. Returns channels_last. Hu et al. 2017
    (arXiv:1709.01507).
    """
    *inner, unit = chain.units
    x = chain.x
    if unit.out[0] == 0:
        for before in inner:
            x = reference.conv_bn_act(x, *before.layer[:2], activation=before.activation)
        return _gate_eager(x, unit, chain, excite)
    if _is_fixed(chain.all_units, chain.x, chain.source):
        if takes_means(unit.w, unit.geometry) and not torch.is_grad_enabled():
            return _infer_gated(chain, excite)
        for before in inner:
            x = _infer_unit(x, before, chain.request, chain.dtype)
        last = [_Planned(unit, *_plan(tuple(x.shape), unit, chain.dtype, chain.request, "inference"))]
        chain = chain._replace(source=_infer_shortcut(chain), projection=None)
    else:
        *parts, last = _parts(chain)
        x = _run_inner(chain, parts)
    if _is_eager(*last):
        return _gate_eager(x, last[0].unit, chain, excite)
    spec, *arguments = _arguments(x, last, chain, True, False)
    spec = replace(spec, keep_projection_y=True)  # the gate's backward reads it anyway
    y, squeeze, *carriers, stats, y_p, stats_p = SqueezeFunction.apply(spec, *arguments)
    gate = excite(squeeze)
    times = _times(gate, squeeze)
    spec = replace(spec, dtype=torch.promote_types(spec.dtype, times.dtype))
    residual = None if chain.source is None or y_p is not None else chain.source.detach()
    z = GateFunction.apply(spec, y, times, *carriers, stats, y_p, stats_p, residual)
    return z.to(torch.promote_types(z.dtype, gate.dtype))


def takes_means(w: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution reads each pixel for itself: the mean of its output is what it makes of that of its input.

    So it is behind batch norm with fixed statistics, too.
    """
    return w.shape[2:] == (1, 1) and geometry.stride == (1, 1) and geometry.padding == (0, 0)


def _infer_gated(chain: Chain, excite: Callable[[Tensor], Tensor]) -> Tensor:
    """What :func:`run_gated` returns, of a chain whose last unit :func:`takes_means`.

    The means come along with what that unit reads, so that the gate is there when it runs, in whose one launch it is.
    """
    *inner, last = chain.units
    x, request, dtype = chain.x.to(chain.dtype), chain.request, chain.dtype
    for unit in inner[:-1]:
        x = _infer_unit(x, unit, request, dtype)
    x, means = _infer_means(x, inner[-1], request, dtype) if inner else (x, x.mean((2, 3), keepdim=True))
    residual = _infer_shortcut(chain)
    way, code = _plan(tuple(x.shape), last, dtype, request, "inference", residual=residual is not None)
    if way == "eager":
        return _gate_eager(x, last, chain._replace(source=residual, projection=None), excite)
    alone = last._replace(layer=last.layer._replace(activation=IDENTITY), activation=IDENTITY)
    squeeze = _infer_unit(means, alone, request, dtype)
    gate = excite(squeeze)
    times = _times(gate, squeeze)
    added = times, residual, chain.step, chain.before
    out_dtype = torch.promote_types(chain.out_dtype, times.dtype)
    z = ops.conv_bn_act(x, *_constants(last, dtype), *added, code, last.activation.code, out_dtype)
    return z.to(torch.promote_types(z.dtype, gate.dtype))


def _times(gate: Tensor, squeeze: Tensor) -> Tensor:
    """The ``gate`` as launches read it, a number for each that was squeezed, contiguous [N, CO]."""
    times = gate if gate.dtype in FLOATS else gate.float()
    return times.expand(squeeze.shape).flatten(1).contiguous()


def _gate_eager(x: Tensor, unit: Unit, chain: Chain, excite: Callable[[Tensor], Tensor]) -> Tensor:
    """What :func:`run_gated` does behind ``x``, what the last ``unit`` of the chain reads."""
    v = reference.conv_bn_act(x, *unit.layer[:2], activation=IDENTITY)
    z = v * excite(v.mean((2, 3), keepdim=True))
    shortcut = _shortcut(chain)
    if isinstance(shortcut, PaddedIdentity):
        shortcut = shortcut.materialize(z.shape[1])
    elif isinstance(shortcut, Projection):
        shortcut = shortcut.bn(shortcut.conv(shortcut.x))
    return channels_last(reference.activate(z if shortcut is None else z + shortcut, unit.activation))


def _shortcut(chain: Chain) -> Shortcut | None:
    if chain.projection is not None and chain.source is not None:
        return Projection(chain.source, *chain.projection.layer[:2])
    if chain.source is None or chain.source.shape == chain.units[-1].out:
        return chain.source
    return PaddedIdentity(chain.source, chain.step, chain.before)


def _is_fixed(units: Sequence[Unit], *inputs: Tensor | None) -> bool:
    """Whether nothing needs a gradient and no statistics are taken."""
    if any(unit.batch_stats for unit in units):
        return False
    if not torch.is_grad_enabled():
        return True
    used = [*inputs, *(t for unit in units for t in (unit.w, unit.bias, unit.gamma, unit.beta))]
    return not any(t.requires_grad for t in used if t is not None)


class Ran(NamedTuple):
    """The output ``z`` of a block, and what the next block's first unit makes of it, if that came ``ahead``.

    Or, for a pre-activation block in training, the moments of ``z``. ``apart``: nothing is shared by blocks whenever
    the :func:`situation` is the same.
    """

    z: Tensor
    ahead: Tensor | Taken | None = None
    apart: bool = False


def run_ahead(chain: Chain, ahead: Tensor | None, following: Layer | None) -> Ran:
    """What :func:`run` returns, and what ``following`` makes of it where the plan has that in the same launch.

    ``ahead``: what the first unit returns, where that came along before.
    """
    if not _is_fixed(chain.all_units, chain.x, chain.source):
        return Ran(run(chain))
    x, units, dtype = chain.x, chain.units, chain.dtype
    if ahead is not None:
        x, units = ahead, units[1:]
    members = _members(chain, units, following)
    parts = () if members is None else _chained(chain, members)
    if members is None or all(length == 1 for length, _ in parts):
        return Ran(_infer(chain, x, units), apart=ahead is None)
    for unit in units[: -1 if members[0] is None else -2]:
        x = _infer_unit(x, unit, chain.request, dtype)

    def alone(unit: Unit, x: Tensor, residual: Tensor | None) -> Tensor:
        return _infer_unit(x, unit, chain.request, dtype, residual)

    residual = _infer_shortcut(chain)
    assert residual is not None
    return Ran(*chains.run(members, parts, x.to(dtype), residual, alone, _together))


def _chained(chain: Chain, members: Members) -> Parts:
    """How many of the ``members`` each launch computes."""
    before = chain.units[: -1 if members[0] is None else -2]
    shape = before[-1].out if before else tuple(chain.x.shape)
    filters = tuple(None if unit is None else (tuple(unit.w.shape), unit.geometry) for unit in members)
    return choose_chain(shape, filters, chain.dtype, "inference", chain.x.device, chain.request).parts


def situation(x: Tensor) -> tuple[Any, ...]:
    """All that plans for ``x`` depend on, beside the modules."""
    return tuple(x.shape), x.dtype, x.device, _autocast_dtype(x), requested(), settings(x.device)


Members = tuple[Unit | None, Unit, Unit | None]


def _members(chain: Chain, units: Sequence[Unit], following: Layer | None) -> Members | None:
    """What may be computed together, of the last of the ``units`` and of what is ``following``; None if nothing may."""
    *inner, expand = units
    source = chain.source
    if source is None or not _is_pointwise(expand) or expand.out[0] == 0:
        return None
    if chain.projection is None and not (source.dtype == chain.dtype and source.shape == expand.out):
        return None
    spatial = inner[-1] if inner and inner[-1].activation == RELU and inner[-1].geometry.groups == 1 else None
    reduce = None if following is None else eligible.unit(chain.x, expand.out, _autocast_dtype(chain.x), following)
    if not isinstance(reduce, Unit) or reduce.batch_stats or not _is_pointwise(reduce):
        reduce = None
    return None if spatial is None and reduce is None else (spatial, expand, reduce)


def _is_pointwise(unit: Unit) -> bool:
    """Whether it is a 1x1 convolution that a chain may end with, which has a ReLU behind it."""
    return unit.activation == RELU and unit.w.shape[2:] == (1, 1) and unit.geometry == Geometry()


def _together(units: Sequence[Unit | None], x: Tensor, residual: Tensor, tile: TileConfig | None) -> list[Tensor]:
    first = next(unit for unit in units if unit is not None)
    return chains.launch([_link(unit, x.dtype) for unit in units], first.geometry, x, residual, tile)


def _link(unit: Unit | None, dtype: torch.dtype) -> Link | None:
    """As a chain reads it, its batch norm's constants as they are now."""
    if unit is None:
        return None
    return Link(laid_out(unit.w, dtype), ops.affine(unit.mean, unit.var, unit.gamma, unit.beta, unit.bias, unit.eps))


def _infer(chain: Chain, x: Tensor, units: Sequence[Unit]) -> Tensor:
    """The ``units``, the last ones of the chain, on ``x``, each by itself."""
    residual, dtype = _infer_shortcut(chain), chain.dtype
    *inner, last = units
    for unit in inner:
        x = _infer_unit(x, unit, chain.request, dtype)
    return _infer_unit(x, last, chain.request, dtype, residual, chain.step, chain.before, chain.out_dtype)


def _infer_shortcut(chain: Chain) -> Tensor | None:
    """What is added, as the last unit reads it."""
    if chain.projection is None or chain.source is None:
        return chain.source
    return _infer_unit(chain.source, chain.projection, chain.request, chain.dtype)


def _infer_unit(
    x: Tensor,
    unit: Unit,
    request: Request,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    step: int = 1,
    before: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    conv, bn, activation = unit.layer
    implementation, code = _plan(tuple(x.shape), unit, dtype, request, "inference", residual=residual is not None)
    if implementation == "eager":
        added: Tensor | PaddedIdentity | None = residual
        if residual is not None and residual.shape != unit.out:
            added = PaddedIdentity(residual, step, before)
        return channels_last(reference.conv_bn_act(x, conv, bn, added, activation=activation)).to(out_dtype or dtype)
    after = None, residual, step, before, code, unit.activation.code, out_dtype or dtype
    return ops.conv_bn_act(x.to(dtype), *_constants(unit, dtype), *after)


def _infer_means(x: Tensor, unit: Unit, request: Request, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What :func:`_infer_unit` returns, and the mean of each image of it, [N, CO, 1, 1]."""
    implementation, code = _plan(tuple(x.shape), unit, dtype, request, "inference")
    if implementation == "eager":
        z = _infer_unit(x, unit, request, dtype)
        return z, z.mean((2, 3), keepdim=True)
    return ops.conv_bn_act_means(x.to(dtype), *_constants(unit, dtype), code, unit.activation.code)


def _constants(unit: Unit, dtype: torch.dtype) -> tuple[Any, ...]:
    """What the operators of inference read of a unit."""
    return laid_out(unit.w, dtype), unit.bias, unit.mean, unit.var, unit.gamma, unit.beta, unit.eps


class _Planned(NamedTuple):
    """A unit and how it runs in training; see :func:`resnet_fused.engine.forward.choose`."""

    unit: Unit
    implementation: Way | Literal["undecided"]
    code: tuple[int, ...]


def _parts(chain: Chain) -> Iterator[list[_Planned]]:
    """Runs of units. The chain is cut around a unit that runs eager, and where no activation stands between two."""
    part: list[_Planned] = []
    shape = tuple(chain.x.shape)
    for i, unit in enumerate(chain.units):
        prologue = i > 0 and chain.units[i - 1].activation != IDENTITY
        planned = _Planned(unit, *_plan(shape, unit, chain.dtype, chain.request, "training", prologue=prologue))
        shape = unit.out
        if part and (_is_eager(planned, *part[-1:]) or part[-1].unit.activation == IDENTITY):
            yield part
            part = []
        part.append(planned)
    yield part


def _is_eager(*units: _Planned) -> bool:
    return any(unit.implementation == "eager" for unit in units)


def _plan(
    shape: tuple[int, ...], unit: Unit, dtype: torch.dtype, request: Request, direction: str, **options: bool
) -> Choice:
    """For ``unit`` on an input of ``shape``; ``options``: see :func:`resnet_fused.engine.forward.choose`."""
    if torch.compiler.is_compiling():
        return "undecided", undecided(unit.geometry, request, options.get("pooled", False))
    return choose(shape, unit.w.shape, unit.geometry, dtype, direction, unit.w.device, request, **options)


def _run_eager(x: Tensor, layer: Layer, shortcut: Shortcut | None) -> Tensor:
    residual = shortcut.bn(shortcut.conv(shortcut.x)) if isinstance(shortcut, Projection) else shortcut
    return channels_last(reference.conv_bn_act(x, layer.conv, layer.bn, residual, activation=layer.activation))


def _arguments(x: Tensor, part: Sequence[_Planned], chain: Chain, last: bool, recompute: bool) -> tuple[Any, ...]:
    """What :class:`ResidualFunction` takes for a ``part`` of the chain on ``x``; of the last with the shortcut."""
    units, kind, source = list(part), "none", None
    if last and chain.source is not None:
        kind, source = ("identity" if chain.source.shape == chain.units[-1].out else "padded"), chain.source
        if chain.projection is not None:
            kind, shape = "projection", tuple(source.shape)
            way = _plan(shape, chain.projection, chain.dtype, chain.request, "training")
            units.append(_Planned(chain.projection, *way))
            source = source if source is x else source.to(chain.dtype)
    shared = source is x and (kind == "projection" or x.dtype == chain.dtype)
    spec = ChainSpec(
        tuple(_spec(unit) for unit in units),
        *(kind, chain.step, chain.before),
        chain.out_dtype if last else chain.dtype,
        keep_last_y=not recompute,
        keep_projection_y=not recompute and not _is_cheap(chain.projection, part),
    )
    tensors = [t for unit, *_ in units for t in unit[1:8]]
    return spec, x.to(chain.dtype), None if shared else source, *tensors


def _train_pooled(x: Tensor, planned: _Planned, dtype: torch.dtype) -> Tensor:
    spec = ChainSpec((_spec(planned),), "none", 1, 0, dtype, True, True, pooled=True)
    return ResidualFunction.apply(spec, None, channels_last(plain(x).to(dtype)), None, *planned.unit[1:8])


def _is_cheap(projection: Unit | None, branch: Sequence[_Planned]) -> bool:
    """Whether a projection does so little arithmetic, next to the branch, that its output is not worth its memory."""
    if projection is None:
        return False
    pixels, arithmetic = 1.0, 0.0  # relative to the branch's input: sizes may be symbols of a compiler
    for unit, *_ in branch:
        stride = unit.geometry[0]
        pixels /= stride[0] * stride[1]
        arithmetic += pixels * unit.w.numel()
    return 8 * pixels * projection.w.numel() <= arithmetic


def _spec(planned: _Planned) -> UnitSpec:
    unit = planned.unit
    group = process_group_name(unit.layer.bn)
    return UnitSpec(planned.code, unit.eps, unit.momentum, unit.batch_stats, group, unit.activation)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast has an ``x`` convolved; None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device in _AUTOCAST and torch.is_autocast_enabled(device) else None


_AUTOCAST = ("cuda", "cpu")


class PreAct(NamedTuple):
    """A pre-activation block that fits its input ``x``, which is channels_last.

    Of each of ``units``, batch norm and activation stand in front of the convolution. ``projection``: behind those of
    the first, the convolution that is the shortcut; None where that is ``x``. ``fixed``: see :func:`_is_fixed`.
    """

    x: Tensor
    units: list[_Planned]
    projection: _Planned | None
    fixed: bool

    def run(self) -> Tensor:
        """``units(x) + shortcut``, raw, channels_last."""
        return _infer_preact(self) if self.fixed else cast(Tensor, _train_preact(self, None, False))

    def run_ahead(self, taken: Taken | None, hands_on: bool) -> Ran:
        """What :meth:`run` returns, and its moments, if it ``hands_on`` those. ``taken``: the moments of ``x``."""
        if self.fixed:
            return Ran(_infer_preact(self), apart=True)
        found = _train_preact(self, taken, hands_on)
        return Ran(*found) if isinstance(found, tuple) else Ran(found)


def resolve_preact(x: Tensor, layers: Sequence[Layer], projection: Layer | None, *, request: Request) -> PreAct | str:
    """A pre-activation block on ``x``, which ``why_eager`` cleared, or why it runs eager.

    Of ``layers``, each batch norm and activation stands in front of its convolution; those of the ``projection`` are
    the first ones.
    """
    autocast = _autocast_dtype(x)
    if autocast is not None and autocast != x.dtype:
        return f"the input is {x.dtype} where autocast convolves in {autocast}"
    x = plain(channels_last(x))
    units: list[Unit] = []
    for layer in [*layers] if projection is None else [*layers, projection]:
        shape = tuple(x.shape) if not units or layer is projection else units[-1].out
        unit = eligible.unit(x, shape, autocast, layer, norm_first=True)
        if isinstance(unit, str):
            return unit
        units.append(unit)
    branch = units[: len(layers)]
    shortcut = tuple(x.shape) if projection is None else units[-1].out
    if branch[-1].out != shortcut:
        return f"the shortcut has shape {shortcut}, not the branch's {branch[-1].out}"
    if (reason := _why_unlike(units)) is not None:
        return reason
    fixed = _is_fixed(units, x)
    direction = "inference" if fixed else "training"
    shapes = [tuple(x.shape), *(unit.out for unit in branch[:-1]), tuple(x.shape)]
    planned = []
    for shape, unit in zip(shapes, units, strict=False):
        options = {"residual": unit is branch[-1]} if fixed else {"prologue": True}
        planned.append(_Planned(unit, *_plan(shape, unit, x.dtype, request, direction, **options)))
    if all(map(_is_eager, planned)):
        return eligible.PLANNED
    return PreAct(x, planned[: len(layers)], None if projection is None else planned[-1], fixed)


def _train_preact(block: PreAct, taken: Taken | None, hands_on: bool) -> Tensor | tuple[Tensor, Taken]:
    projection = block.projection
    spec = PreActSpec(tuple(map(_spec, block.units)), None if projection is None else projection.code, hands_on)
    tensors = [t for unit, *_ in block.units for t in unit[1:8]]
    return PreActFunction.apply(spec, block.x, None if projection is None else projection.unit.w, taken, *tensors)


def _infer_preact(block: PreAct) -> Tensor:
    """Batch norm and activation of x go into the convolutions that read it where these are 1x1, else in front of them.

    (A filter wider than a pixel would compute them at each tap.) Those of all other units follow a convolution.
    """
    a, dtype = block.x, block.x.dtype
    first = block.units[0].unit
    act, none = first.activation.code, (None, None, None, None, 0.0, IDENTITY.code)
    vectors = first.gamma, first.beta, first.mean, first.var, None, None
    stats: Tensor | None = ops.norm_forward(a, [], 0, *vectors, first.eps, False, "")
    if first.w.shape[2:] != (1, 1):
        a, stats = ops.join_forward(a, stats, None, None, None, 1, 0, act, dtype), None
    shortcut = block.x
    if block.projection is not None:
        w = laid_out(block.projection.unit.w, dtype)
        shortcut = ops.preact_conv(a, stats, w, act, *none, None, block.projection.code)
    for planned, (norm, *_) in zip(block.units, block.units[1:], strict=False):
        own = norm.mean, norm.var, norm.gamma, norm.beta, norm.eps, norm.activation.code
        a, stats = ops.preact_conv(a, stats, laid_out(planned.unit.w, dtype), act, *own, None, planned.code), None
    last = block.units[-1]
    return ops.preact_conv(a, stats, laid_out(last.unit.w, dtype), act, *none, shortcut, last.code)


def _check(x: Tensor, conv: nn.Conv2d, bn: nn.Module, residual: Tensor | PaddedIdentity | None) -> None:
    if isinstance(x, fx.Proxy):
        return
    for name, value, kind in (("x", x, Tensor), ("conv", conv, nn.Conv2d), ("bn", bn, nn.Module)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__module__}.{kind.__qualname__}; got {type(value).__qualname__}")
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions [N, CI, H, W]; got shape {tuple(x.shape)}")
    w = conv.weight
    if x.shape[1] != w.shape[1] * conv.groups:
        raise ValueError(
            f"x must have the {w.shape[1] * conv.groups} channels that conv takes; got shape {tuple(x.shape)}"
        )
    features = getattr(bn, "num_features", w.shape[0])
    if features != w.shape[0]:
        raise ValueError(f"bn must normalise the {w.shape[0]} channels that conv returns; it has {features}")
    if residual is None:
        return
    if not isinstance(residual, Tensor | PaddedIdentity):
        raise TypeError(f"residual must be a Tensor, a PaddedIdentity or None; got {type(residual).__qualname__}")
    p, q = x.shape[2:]
    if conv.padding != "same":
        p, q = (output_size(*size) for size in zip((p, q), w.shape[2:], *eligible.geometry(conv)[:3], strict=True))
    padded = isinstance(residual, PaddedIdentity)
    source, step, before = residual if isinstance(residual, PaddedIdentity) else (residual, 1, 0)
    if source.dim() != 4 or source.dtype not in FLOATS:
        return  # for PyTorch to broadcast, promote or refuse
    if (reason := why_unfit((x.shape[0], w.shape[0], p, q), source, step, before, padded)) is not None:
        raise ValueError(reason)
