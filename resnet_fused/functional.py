"""The public door: arguments are checked, autocast is followed and memory layout is settled here, and nowhere below."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as nn_module

from resnet_fused import ops, plan, reference
from resnet_fused.autograd import ChainSpec, ResidualFunction, UnitSpec, laid_out
from resnet_fused.chain import Way, choose, undecided
from resnet_fused.kernels.conv_forward import Geometry
from resnet_fused.ops import channels_last
from resnet_fused.reference import PaddedIdentity

__all__ = ["Layer", "PaddedIdentity", "Projection", "conv_bn_act", "residual_block"]


class Layer(NamedTuple):
    """A convolution, the batch norm behind it, and whether a ReLU follows."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    relu: bool = True


class Projection(NamedTuple):
    """The shortcut ``bn(conv(x))``."""

    x: Tensor
    conv: nn.Conv2d
    bn: nn.BatchNorm2d


Shortcut = Tensor | PaddedIdentity | Projection
Out = tuple[int, int, int, int]
"""The shape [N, CO, P, Q] of an output."""


def conv_bn_act(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    residual: Tensor | PaddedIdentity | None = None,
    relu: bool = True,
) -> Tensor:
    """``relu(bn(conv(x)) + residual)``; the residual and the ReLU are optional.

    ``x``: [N, CI, H, W], fp32, fp16 or bf16, any memory format. ``residual``: a tensor of the output's shape
    [N, CO, P, Q], or a :class:`PaddedIdentity`. Returns [N, CO, P, Q] in channels_last, in the dtype that the same
    modules would return (autocast included). In evaluation mode without gradients it is one launch.

    Units that cannot be fused as they stand (unsupported arguments, hooks on the modules) run ``conv`` and ``bn``
    themselves, and the reason is logged once.

    Raises TypeError or ValueError for arguments that do not fit each other, and what ``conv`` and ``bn`` raise.
    """
    _check(x, conv, bn, residual)
    chain = chain_of(x, [Layer(conv, bn, relu)], residual)
    if isinstance(chain, Chain):
        return run(chain)
    plan.report_once(chain)
    return reference.conv_bn_act(x, conv, bn, residual, relu)


def residual_block(
    x: Tensor, layers: Sequence[Layer], shortcut: Shortcut | None = None, *, recompute: bool = False
) -> Tensor:
    """``relu(layers(x) + shortcut)``; returns channels_last.

    The last layer's ReLU stands behind the addition. Without gradients and with fixed statistics every layer is one
    launch. Otherwise layers are run as :class:`resnet_fused.autograd.ResidualFunction`. ``recompute``: its backward
    computes the last convolution again instead of keeping its output.

    Layers that cannot be fused as they stand run their own modules, and the reason is logged once; what those refuse is
    refused.
    """
    chain = chain_of(x, layers, shortcut)
    if isinstance(chain, Chain):
        return run(chain, recompute=recompute)
    plan.report_once(chain)
    *inner, last = layers
    for layer in inner:
        x = reference.conv_bn_act(x, *layer[:2], relu=layer.relu)
    return _run_eager(x, last, shortcut)


class Unit(NamedTuple):
    """A layer with all that it comes to on its input: the tensors that are used, and shapes that fit each other.

    ``batches``: what counts the batches, where they are counted. ``momentum`` None: the average over all batches.
    ``batch_stats``: batch norm takes the statistics of the batch, and updates ``mean`` and ``var`` if there are any.
    ``out``: the shape [N, CO, P, Q] of the result.
    """

    layer: Layer
    w: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None
    momentum: float | None
    eps: float
    batch_stats: bool
    geometry: Geometry
    out: Out


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
    request: str

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
    if torch._C._get_tracing_state() is not None and any(unit.batch_stats for unit in units):
        return "torch.jit traces it in training"
    return None


def chain_of(x: Tensor, layers: Sequence[Layer], shortcut: Shortcut | None = None) -> Chain | str:
    """Layers and shortcut as :func:`run` takes them, or why they run eager on ``x``, whatever that is."""
    units = [layer[:2] for layer in layers] + ([shortcut[1:]] if isinstance(shortcut, Projection) else [])
    request = plan.requested(layers[0].conv)
    return why_eager(x, units, request) or resolve(x, layers, shortcut, request=request)


def resolve(
    x: Tensor,
    layers: Sequence[Layer],
    shortcut: Shortcut | None = None,
    *,
    in_place: bool = False,
    request: str | None = None,
) -> Chain | str:
    """Layers and shortcut as :func:`run` takes them, or why they run eager. ``x`` is one that ``why_eager`` cleared.

    What PyTorch would refuse is no chain either: it is the modules' own to say so. ``in_place``: the addition writes
    to the branch, whose dtype it keeps. ``request``: see :func:`resnet_fused.plan.requested`.
    """
    dtype = x.dtype if (autocast := _autocast_dtype(x)) is None else autocast
    x = _plain(channels_last(x))
    units: list[Unit] = []
    shape = tuple(x.shape)
    for layer in layers:
        unit = _unit(x, shape, autocast, layer)
        if isinstance(unit, str):
            return unit
        shape = unit.out
        units.append(unit)
    projection: Unit | None = None
    source, step, before = shortcut if isinstance(shortcut, PaddedIdentity) else (shortcut, 1, 0)
    if isinstance(source, Projection):
        if (reason := _why_foreign(source.x, x)) is not None:
            return reason
        if source.x.dtype not in plan.DTYPES if autocast is not None else source.x.dtype != x.dtype:
            return f"the branch reads {x.dtype} and the shortcut {source.x.dtype}"
        found = _unit(source.x, tuple(source.x.shape), autocast, Layer(source.conv, source.bn, relu=False))
        if isinstance(found, str):
            return found
        projection, source = found, source.x
        if projection.out != shape:
            return f"the shortcut has shape {projection.out}, not the branch's {shape}"
    elif source is not None:
        padded = isinstance(shortcut, PaddedIdentity)
        if (reason := _why_foreign(source, x) or _why_unfit(shape, source, step, before, padded)) is not None:
            return reason
    if (reason := _why_unlike(units if projection is None else [*units, projection])) is not None:
        return reason
    out_dtype = dtype if in_place or source is None or projection else torch.promote_types(dtype, source.dtype)
    if source is not None:
        source = _plain(channels_last(source))
    request = plan.requested() if request is None else request
    return Chain(x, units, projection, source, step, before, dtype, out_dtype, request)


def run(chain: Chain, *, recompute: bool = False) -> Tensor:
    """What :func:`residual_block` returns."""
    if _is_inference(chain):
        return _infer(chain)
    x = chain.x
    parts = list(_parts(chain))
    for part in parts:
        last = part is parts[-1]
        if _is_eager(*part):
            shortcut = _shortcut(chain) if last else None
            x = _run_eager(x, part[0].unit.layer, shortcut)
            x = x.to(chain.out_dtype) if last else x
        else:
            x = _train(x, part, chain, last, recompute)
    return x


def _shortcut(chain: Chain) -> Shortcut | None:
    if chain.projection is not None and chain.source is not None:
        return Projection(chain.source, *chain.projection.layer[:2])
    if chain.source is None or chain.source.shape == chain.units[-1].out:
        return chain.source
    return PaddedIdentity(chain.source, chain.step, chain.before)


def _is_inference(chain: Chain) -> bool:
    """Whether nothing needs a gradient and no statistics are taken."""
    if any(unit.batch_stats for unit in chain.all_units):
        return False
    if not torch.is_grad_enabled():
        return True
    used = [chain.x, chain.source, *(t for unit in chain.all_units for t in (unit.w, unit.bias, unit.gamma, unit.beta))]
    return not any(t.requires_grad for t in used if t is not None)


def _infer(chain: Chain) -> Tensor:
    x, residual, dtype = chain.x, chain.source, chain.dtype
    if chain.projection is not None and residual is not None:
        residual = _infer_unit(residual, chain.projection, chain.request, dtype)
    *inner, last = chain.units
    for unit in inner:
        x = _infer_unit(x, unit, chain.request, dtype)
    return _infer_unit(x, last, chain.request, dtype, residual, chain.step, chain.before, chain.out_dtype)


def _infer_unit(
    x: Tensor,
    unit: Unit,
    request: str,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    step: int = 1,
    before: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    conv, bn, relu = unit.layer
    implementation, code = _plan(tuple(x.shape), unit, dtype, request, "inference", residual=residual is not None)
    if implementation == "eager":
        added: Tensor | PaddedIdentity | None = residual
        if residual is not None and residual.shape != unit.out:
            added = PaddedIdentity(residual, step, before)
        return channels_last(reference.conv_bn_act(x, conv, bn, added, relu)).to(out_dtype or dtype)
    return ops.conv_bn_act(
        x.to(dtype),
        laid_out(unit.w, dtype),
        unit.bias,
        unit.mean,
        unit.var,
        unit.gamma,
        unit.beta,
        unit.eps,
        residual,
        step,
        before,
        code,
        relu,
        out_dtype or dtype,
    )


class _Planned(NamedTuple):
    """A unit and how it runs in training; see :func:`resnet_fused.chain.choose`."""

    unit: Unit
    implementation: str
    code: tuple[int, ...]


def _parts(chain: Chain) -> Iterator[list[_Planned]]:
    """Runs of units. The chain is cut around a unit that runs eager, and where no ReLU stands between two."""
    part: list[_Planned] = []
    shape = tuple(chain.x.shape)
    for i, unit in enumerate(chain.units):
        prologue = i > 0 and chain.units[i - 1].layer.relu
        planned = _Planned(unit, *_plan(shape, unit, chain.dtype, chain.request, "training", prologue=prologue))
        shape = unit.out
        if part and (_is_eager(planned, *part[-1:]) or not part[-1].unit.layer.relu):
            yield part
            part = []
        part.append(planned)
    yield part


def _is_eager(*units: _Planned) -> bool:
    return any(unit.implementation == "eager" for unit in units)


def _plan(shape: tuple[int, ...], unit: Unit, dtype: torch.dtype, request: str, direction: str, **options: bool) -> Way:
    """For ``unit`` on an input of ``shape``; ``options``: see :func:`resnet_fused.chain.choose`."""
    if torch.compiler.is_compiling():
        return "undecided", undecided(unit.geometry, request)
    return choose(shape, unit.w.shape, unit.geometry, dtype, direction, unit.w.device, request, **options)


def _run_eager(x: Tensor, layer: Layer, shortcut: Shortcut | None) -> Tensor:
    residual = shortcut.bn(shortcut.conv(shortcut.x)) if isinstance(shortcut, Projection) else shortcut
    return channels_last(reference.conv_bn_act(x, layer.conv, layer.bn, residual, layer.relu))


def _train(x: Tensor, part: Sequence[_Planned], chain: Chain, last: bool, recompute: bool) -> Tensor:
    """``part`` of the chain on ``x``, with the shortcut if it is the last."""
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
        *(kind, chain.step, chain.before, part[-1].unit.layer.relu),
        chain.out_dtype if last else chain.dtype,
        keep_last_y=not recompute,
        keep_projection_y=not recompute and not _is_cheap(chain.projection, part),
    )
    tensors = [t for unit, *_ in units for t in unit[1:8]]
    return ResidualFunction.apply(spec, x.to(chain.dtype), None if shared else source, *tensors)


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
    return UnitSpec(planned.code, unit.eps, unit.momentum, unit.batch_stats, _group(unit.layer.bn))


def _unit(x: Tensor, shape: tuple[int, ...], autocast: torch.dtype | None, layer: Layer) -> Unit | str:
    """``layer`` on an input of ``shape`` [N, CI, H, W] that lies where ``x`` does, or why it runs eager."""
    conv, bn, _ = layer
    w, bias = _held(conv, conv._parameters, "weight", "bias")
    if not isinstance(w, Tensor):
        return "the convolution has no filter"
    gamma, beta = _held(bn, bn._parameters, "weight", "bias")
    mean, var, batches = _held(bn, bn._buffers, "running_mean", "running_var", "num_batches_tracked")
    if (reason := _why_foreign(w, x)) is not None:
        return reason
    if w.dtype not in plan.DTYPES if autocast is not None else w.dtype != x.dtype:
        return f"the input is {x.dtype} and the filter {w.dtype}"
    place = _placed(conv, shape, w.shape)
    if isinstance(place, str):
        return place
    numbers, out = place
    dtype = x.dtype if autocast is None else autocast
    vectors = _vectors(x.device, out[1], w.dtype, dtype, bias, gamma, beta, mean, var)
    if isinstance(vectors, str):
        return vectors
    if (mean is None) != (var is None):
        return "one of the running statistics is missing"
    batch_stats = bn.training or mean is None
    if not (bn.training and bn.track_running_stats):
        batches = None
        if bn.training:
            vectors[3:] = mean, var = None, None
    if batch_stats:
        if mean is not vectors[3] or var is not vectors[4]:
            return "the running statistics are views with gaps"
        if (reason := _why_statistics(out, bn, batches, x.device)) is not None:
            return reason
    if mean is not None and var is not None and (mean.requires_grad or var.requires_grad):
        return "the running statistics require a gradient"
    eps, momentum = _number(bn.eps), _number(bn.momentum)
    if eps is None or not eps > 0 or (momentum is None and bn.momentum is not None):
        return f"batch norm has eps={bn.eps} and momentum={bn.momentum}"
    if momentum is None and batches is None:
        momentum = 0.0
    bias, gamma, beta, mean, var = vectors
    return Unit(layer, _plain(w), bias, gamma, beta, mean, var, batches, momentum, eps, batch_stats, numbers, out)


def _held(module: nn.Module, among: dict[str, Any], *names: str) -> list[Any]:
    """The attributes of these names, in a fraction of the time where they are ``among`` parameters or buffers."""
    return [among[name] if name in among else getattr(module, name) for name in names]


def _placed(conv: nn.Conv2d, shape: tuple[int, ...], w_shape: torch.Size) -> tuple[Geometry, Out] | str:
    """The numbers of ``conv`` on an input of ``shape``, and the output's shape; or why they are not the kernels'."""
    stride, padding, dilation = conv.stride, conv.padding, conv.dilation
    try:
        if not (len(stride) == len(padding) == len(dilation) == 2):
            raise TypeError
    except TypeError:
        try:
            stride, padding, dilation, _ = geometry(conv)
        except (TypeError, ValueError) as error:
            return str(error)
    place: Any = _place.__wrapped__ if torch.compiler.is_compiling() else _place
    found: tuple[Geometry, Out] | str = place(shape, w_shape, conv.groups, *stride, *padding, *dilation)
    return found


@lru_cache(maxsize=4096, typed=True)
def _place(shape: tuple[int, ...], w_shape: torch.Size, groups: int, *numbers: int) -> tuple[Geometry, Out] | str:
    n, ci, h, w = shape
    co, width, r, s = w_shape
    if any(type(number) is not int for number in (groups, *numbers)):
        return f"the convolution's numbers should be integers: {groups, *numbers}"
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w = numbers
    if min(stride_h, stride_w, dil_h, dil_w, groups, co) < 1 or min(pad_h, pad_w) < 0:
        return f"the convolution's numbers are unusual: {groups, *numbers}"
    if (reason := _why_large(r, s)) is not None:
        return reason
    if width * groups != ci or co % groups:
        return f"the filter {tuple(w_shape)} in {groups} groups does not fit an input of {ci} channels"
    p = ops.output_size(h, r, stride_h, pad_h, dil_h)
    q = ops.output_size(w, s, stride_w, pad_w, dil_w)
    if p < 1 or q < 1:
        return "the filter is larger than the padded image"
    return ((stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w), groups), (n, co, p, q)


def _why_foreign(t: Tensor, x: Tensor) -> str | None:
    """Why a tensor of four dimensions cannot go into one launch with ``x``, or None."""
    if t.dim() != 4 or t.layout != torch.strided or t.device != x.device:
        return f"a tensor is {t.dim()}-dimensional, {t.layout} on {t.device}: it must be 4-dimensional on {x.device}"
    return None if type(t) in ops.PLAIN else _why_subclass(t)


def _why_subclass(t: Any) -> str | None:
    if isinstance(t, FakeTensor) or torch.compiler.is_compiling():
        return None
    return f"a tensor is {type(t).__qualname__}, which may have operators of its own"


def _vectors(
    device: torch.device, co: int, w_dtype: torch.dtype, dtype: torch.dtype, bias: Tensor | None, *norm: Tensor | None
) -> list[Tensor | None] | str:
    """The convolution's bias and batch norm's vectors as kernels read them, or why they do not fit ``co`` channels."""
    kind, found, compiling, size = None, [], torch.compiler.is_dynamo_compiling(), (co,)
    for v in (bias, *norm):
        if v is not None:
            if type(v) not in ops.PLAIN and (reason := _why_subclass(v)) is not None:
                return reason
            if v.shape != size or v.device != device:
                return f"a vector of shape {tuple(v.shape)} on {v.device} does not fit {co} channels on {device}"
            if v is bias:
                if v.dtype != w_dtype:
                    return f"the filter is {w_dtype} and the bias {v.dtype}"
            elif kind is None:
                kind = v.dtype
                if kind != dtype and kind != torch.float32:
                    return f"batch norm has {kind} for an input of {dtype}"
            elif v.dtype != kind:
                return f"batch norm has {kind} and {v.dtype}"
            if not v.is_contiguous() or (not compiling and v.is_neg()):
                v = _plain(v).contiguous()
        found.append(v)
    return found


def _number(value: Any) -> float | None:
    """``value`` as PyTorch's operators take it for a number, or None."""
    if type(value) is float:
        return value
    return float(value) if isinstance(value, (int, float, Tensor)) else None


def _why_statistics(out: Out, bn: nn.Module, batches: Tensor | None, device: torch.device) -> str | None:
    """Why batch norm cannot take its statistics from a batch of shape ``out``, or None."""
    n, _, p, q = out
    if n == 0:
        return "the batch is empty"
    if n * p * q == 1 and not _group(bn):
        return "there is one value per channel to normalise"
    if batches is None:
        return None
    if not isinstance(batches, Tensor) or batches.dtype != torch.int64 or batches.dim() or batches.device != device:
        return f"num_batches_tracked is no int64 scalar on {device}"
    return None


def _why_unfit(shape: tuple[int, ...], residual: Tensor, step: int, before: int, padded: bool) -> str | None:
    """Why ``residual`` cannot be added to an output of ``shape``, as it is or as a PaddedIdentity, or None."""
    got = tuple(residual.shape)
    if residual.dtype not in plan.DTYPES:
        return f"residual must be float32, float16 or bfloat16; got {residual.dtype}"
    if not padded:
        return None if got == shape else f"residual must have the output's shape {shape}; got {got}"
    n, channels, h, w = got
    if step < 1 or (n, -(-h // step), -(-w // step)) != (shape[0], *shape[2:]):
        return (
            f"residual must give {shape[2]}x{shape[3]} pixels of {shape[0]} images with stride {step}; "
            f"its x has shape {got}"
        )
    if before < 0 or before + channels > shape[1]:
        return f"residual must fit {shape[1]} channels; it has {before} zero channels before {channels}"
    return None


def geometry(conv: nn.Conv2d) -> Geometry:
    """Stride, padding, dilation and groups, as numbers. Raises TypeError or ValueError for what the kernels lack."""
    stride, dilation = _pair(conv.stride), _pair(conv.dilation)
    if conv.padding == "valid":
        padding = 0, 0
    elif conv.padding == "same":
        both = [d * (k - 1) for d, k in zip(dilation, conv.weight.shape[2:], strict=True)]
        if stride != (1, 1):
            raise ValueError("padding='same' goes with no stride")
        if both[0] % 2 or both[1] % 2:
            raise ValueError("padding='same' pads one side more than the other")
        padding = both[0] // 2, both[1] // 2
    else:
        padding = _pair(cast(Any, conv.padding))
    return stride, padding, dilation, conv.groups


def _pair(sizes: Any) -> tuple[int, int]:
    """One number, alone or in a tuple, stands for both directions."""
    if isinstance(sizes, int):
        return sizes, sizes
    first, second = sizes if len(sizes) == 2 else (*sizes, *sizes)
    if not isinstance(first, int) or not isinstance(second, int):
        raise TypeError(f"{sizes} should be integers")
    return first, second


def _plain(t: Tensor) -> Tensor:
    """``t`` without a pending negation, which a kernel that reads its memory would not see.

    What a compiler calls is called by way of PyTorch's dispatcher, which resolves it.
    """
    return t if torch.compiler.is_dynamo_compiling() or not t.is_neg() else t.resolve_neg()


def _group(bn: nn.Module) -> str:
    """The name of the process group that shares the statistics of a batch, or "" if they are this process's own."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training or not dist.is_available() or not dist.is_initialized():
        return ""
    group = cast(dist.ProcessGroup, bn.process_group or dist.group.WORLD)
    return group.group_name if dist.get_world_size(group) > 1 else ""


def why_eager(x: Tensor, units: Iterable[Sequence[Any]], request: str | None = None) -> str | None:
    """Why a chain of ``units`` (convolution, batch norm, ...) on input ``x`` runs eager as things stand, or None.

    Whether their tensors fit one another is for :func:`resolve` to say. ``request``: see there.
    """
    if (reason := plan.why_eager(x, request)) is not None:
        return reason
    units = list(units)
    if hooked(*(module for conv, bn, *_ in units for module in (conv, bn))):
        return "hooks, or a forward of its own, are set on the convolution or the batch norm"
    return why_unsupported(x, units)


def why_unsupported(x: Tensor, units: Iterable[Sequence[Any]]) -> str | None:
    """:func:`why_eager`, apart from what is asked for, where the tensor ``x`` lies, and hooks."""
    if x.dtype not in plan.DTYPES:
        return f"the input is {x.dtype}: the kernels take float32, float16 and bfloat16"
    if x.dim() != 4 or x.layout != torch.strided:
        return f"the input is {x.dim()}-dimensional, {x.layout}: the kernels take 4-dimensional, strided tensors"
    if type(x) not in ops.PLAIN and (reason := _why_subclass(x)) is not None:
        return reason
    for conv, bn, *_ in units:
        if (reason := _why_kind(conv, bn)) is not None:
            return reason
    return None


def why_unfusable(conv: nn.Module, bn: nn.Module) -> str | None:
    """Why the modules of a unit rule the kernels out whatever their input (types, padding ...), or None."""
    if (reason := _why_kind(conv, bn)) is not None:
        return reason
    weight = getattr(conv, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        return "the convolution has no filter of four dimensions"
    try:
        geometry(cast(nn.Conv2d, conv))
    except (TypeError, ValueError) as error:
        return str(error)
    return _why_large(*weight.shape[2:])


def _why_kind(conv: nn.Module, bn: nn.Module) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"the convolution is {_named(conv)}, not torch.nn.Conv2d itself"
    if type(bn) is not nn.BatchNorm2d and type(bn) is not nn.SyncBatchNorm:
        return f"the normalisation is {_named(bn)}, not torch.nn.BatchNorm2d or SyncBatchNorm itself"
    if conv.padding_mode != "zeros":
        return f"the convolution has padding_mode={conv.padding_mode!r}"
    return None


def _why_large(r: int, s: int) -> str | None:
    return f"the filter is {r}x{s}: the kernels go up to 7x7" if max(r, s) > plan.MAX_FILTER else None


def hooked(*modules: nn.Module) -> bool:
    """Whether calling ``modules`` would run hooks or a forward set on an instance, which fusing would bypass."""
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return True
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
            or "_conv_forward" in module.__dict__
        ):
            return True
    return False


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast has an ``x`` convolved; None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device in _AUTOCAST and torch.is_autocast_enabled(device) else None


_AUTOCAST = ("cuda", "cpu")


def _named(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _check(x: Tensor, conv: nn.Conv2d, bn: nn.Module, residual: Tensor | PaddedIdentity | None) -> None:
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
        p, q = (ops.output_size(*size) for size in zip((p, q), w.shape[2:], *geometry(conv)[:3], strict=True))
    padded = isinstance(residual, PaddedIdentity)
    source, step, before = residual if isinstance(residual, PaddedIdentity) else (residual, 1, 0)
    if source.dim() != 4 or source.dtype not in plan.DTYPES:
        return  # for PyTorch to broadcast, promote or refuse
    if (reason := _why_unfit((x.shape[0], w.shape[0], p, q), source, step, before, padded)) is not None:
        raise ValueError(reason)
