"""The public door: arguments are checked, autocast is followed and memory layout is settled here, and nowhere below."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from resnet_fused import ops, plan, reference, tuned
from resnet_fused.autograd import ChainSpec, ResidualFunction, UnitSpec
from resnet_fused.chain import Convolution
from resnet_fused.kernels.conv_forward import Geometry
from resnet_fused.problem import Problem
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


Way = tuple[str, tuple[int, ...]]
"""Who computes a unit ("fused", "mixed" or "eager"), and the ``convolution`` argument of the operators."""
Shortcut = Tensor | PaddedIdentity | Projection


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

    Raises TypeError or ValueError for arguments that do not fit each other.
    """
    _check(x, conv, bn, residual)
    if (reason := why_eager(x, [Layer(conv, bn)])) is not None:
        plan.report_once(reason)
        return reference.conv_bn_act(x, conv, bn, residual, relu)
    return residual_block(x, [Layer(conv, bn, relu)], residual)


def residual_block(
    x: Tensor, layers: Sequence[Layer], shortcut: Shortcut | None = None, *, recompute: bool = False
) -> Tensor:
    """``relu(layers(x) + shortcut)``, for layers that :func:`why_eager` has cleared; returns channels_last.

    The last layer's ReLU stands behind the addition. Without gradients and with fixed statistics every layer is one
    launch. Otherwise layers are run as :class:`resnet_fused.autograd.ResidualFunction`. ``recompute``: its backward
    computes the last convolution again instead of keeping its output.

    Raises ValueError if batch norm would take statistics of one value per channel.
    """
    x = channels_last(x)
    if _is_inference(x, layers, shortcut):
        return _infer(x, layers, shortcut)
    _check_values_per_channel(x, layers, shortcut)
    parts = list(_parts(x, layers))
    for part in parts:
        last = shortcut if part is parts[-1] else None
        x = _run_eager(x, part[0].layer, last) if _is_eager(*part) else _train(x, part, last, recompute)
    return x


def _is_inference(x: Tensor, layers: Sequence[Layer], shortcut: Shortcut | None) -> bool:
    """Whether nothing needs a gradient and no statistics are taken."""
    units = [*layers, Layer(shortcut.conv, shortcut.bn)] if isinstance(shortcut, Projection) else layers
    if any(_uses_batch(unit.bn) for unit in units):
        return False
    if not torch.is_grad_enabled():
        return True
    inputs = [x]
    if shortcut is not None:
        inputs.append(shortcut if isinstance(shortcut, Tensor) else shortcut.x)
    for unit in units:
        inputs += [p for m in (unit.conv, unit.bn) for p in m._parameters.values() if p is not None]
    return not any(t.requires_grad for t in inputs)


def _infer(x: Tensor, layers: Sequence[Layer], shortcut: Shortcut | None) -> Tensor:
    if isinstance(shortcut, Projection):
        residual: Tensor | PaddedIdentity | None = _infer_unit(
            channels_last(shortcut.x), Layer(shortcut.conv, shortcut.bn, relu=False), None
        )
    else:
        residual = shortcut
    *inner, last = layers
    for layer in inner:
        x = _infer_unit(x, layer, None)
    return _infer_unit(x, last, residual)


class _Planned(NamedTuple):
    """A layer and how it runs in training; see :func:`choose`."""

    layer: Layer
    implementation: str
    code: tuple[int, ...]


def _parts(x: Tensor, layers: Sequence[Layer]) -> Iterator[list[_Planned]]:
    """Runs of layers. The chain is cut around a layer that runs eager, and where no ReLU stands between two."""
    part: list[_Planned] = []
    shape = tuple(x.shape)
    for i, layer in enumerate(layers):
        prologue = i > 0 and layers[i - 1].relu
        planned = _Planned(layer, *_plan(shape, x, layer.conv, "training", prologue=prologue))
        shape = _output_shape(shape, layer.conv)
        if part and (_is_eager(planned, *part[-1:]) or not part[-1].layer.relu):
            yield part
            part = []
        part.append(planned)
    yield part


def _is_eager(*units: _Planned) -> bool:
    return any(unit.implementation == "eager" for unit in units)


def _plan(shape: tuple[int, ...], x: Tensor, conv: nn.Conv2d, direction: str, **options: bool) -> Way:
    """For ``conv`` on an input of ``shape`` that lies where ``x`` does; ``options``: see :func:`choose`."""
    if torch.compiler.is_compiling():
        shape = tuple(map(operator.index, shape))  # from symbols: a plan is for given sizes
    device, dtype = x.device, _compute_dtype(x)
    return choose(shape, conv.weight.shape, geometry(conv), dtype, direction, device, plan.requested(), **options)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(
    shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
    request: str,
    prologue: bool = False,
    residual: bool = False,
) -> Way:
    """Who convolves an input of ``shape`` [N, CI, H, W] with a filter of ``w_shape`` on ``device``, and how.

    ``direction``, ``prologue`` and ``residual``: see :class:`Problem`. Measurements count where the GPU was tuned.
    """
    arch, gpu = plan.target(device)
    options = dtype, plan.tf32(dtype), direction, prologue, residual, arch, gpu
    problem, way = _decided(shape, w_shape, geometry, options, request, tuned.load(gpu))
    plan.note(problem)
    return way


@lru_cache(maxsize=4096)
def _decided(
    shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    geometry: Geometry,
    options: tuple[Any, ...],
    request: str,
    table: plan.Table | None,
) -> tuple[Problem, Way]:
    (n, ci, h, w), (co, _, r, s), (stride, padding, dilation, groups) = shape, w_shape, geometry
    problem = Problem(n, h, w, ci, co, r, s, stride, padding, dilation, groups, *options)
    chosen = plan.decide(problem, request, table)
    conv = Convolution(stride, padding, dilation, groups, chosen.implementation == "fused", chosen.tiles)
    return problem, (chosen.implementation, tuple(conv.encode()))


def _run_eager(x: Tensor, layer: Layer, shortcut: Shortcut | None) -> Tensor:
    residual = shortcut.bn(shortcut.conv(shortcut.x)) if isinstance(shortcut, Projection) else shortcut
    return channels_last(reference.conv_bn_act(x, layer.conv, layer.bn, residual, layer.relu))


def _train(x: Tensor, part: Sequence[_Planned], shortcut: Shortcut | None, recompute: bool) -> Tensor:
    dtype = out_dtype = _compute_dtype(x)
    units, layers = list(part), [unit.layer for unit in part]
    kind, source, step, before = "none", None, 1, 0
    if isinstance(shortcut, Projection):
        kind, source = "projection", shortcut.x if shortcut.x is x else shortcut.x.to(dtype)
        projection = _plan(tuple(shortcut.x.shape), shortcut.x, shortcut.conv, "training")
        units.append(_Planned(Layer(shortcut.conv, shortcut.bn), *projection))
    elif shortcut is not None:
        if isinstance(shortcut, PaddedIdentity):
            kind, (source, step, before) = "padded", shortcut
        else:
            kind, source = "identity", shortcut
        out_dtype = torch.promote_types(dtype, source.dtype)
    shared = source is x and (kind == "projection" or x.dtype == dtype)
    spec = ChainSpec(
        tuple(_spec(unit) for unit in units),
        *(kind, step, before, layers[-1].relu, out_dtype),
        keep_last_y=not recompute,
        keep_projection_y=not recompute and not _is_cheap(shortcut, x, layers),
    )
    tensors = [tensor for unit in units for tensor in _tensors(unit.layer)]
    source = None if shared or source is None else channels_last(source)
    return ResidualFunction.apply(spec, x.to(dtype), source, *tensors)


def _is_cheap(shortcut: Shortcut | None, x: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether a projection does so little arithmetic, next to the branch, that its output is not worth its memory."""
    if not isinstance(shortcut, Projection):
        return False
    branch, shape = 0, tuple(x.shape)
    for layer in layers:
        shape = _output_shape(shape, layer.conv)
        branch += shape[2] * shape[3] * layer.conv.weight.numel()
    _, _, p, q = _output_shape(tuple(shortcut.x.shape), shortcut.conv)
    return 8 * p * q * shortcut.conv.weight.numel() <= branch


def _spec(unit: _Planned) -> UnitSpec:
    bn = unit.layer.bn
    momentum = 0.0 if bn.momentum is None and bn.num_batches_tracked is None else bn.momentum
    return UnitSpec(unit.code, bn.eps, momentum, _uses_batch(bn), _group(bn))


def geometry(conv: nn.Conv2d) -> Geometry:
    """Stride, padding, dilation and groups, as numbers."""
    return _pair(conv.stride), _padding(conv), _pair(conv.dilation), conv.groups


def _tensors(unit: Layer) -> list[Tensor | None]:
    """The tensors of a unit in the order of :class:`resnet_fused.autograd.ResidualFunction`."""
    conv, bn = unit.conv, unit.bn
    tensors = [_tensor(conv, "weight"), _tensor(conv, "bias"), _tensor(bn, "weight"), _tensor(bn, "bias")]
    if bn.training and not bn.track_running_stats:
        return [*tensors, None, None, None]
    return [*tensors, *[_tensor(bn, name) for name in ("running_mean", "running_var", "num_batches_tracked")]]


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """``getattr(module, name)``, in a fraction of the time where it is a parameter or a buffer."""
    for found in (module._parameters, module._buffers):
        if name in found:
            return found[name]
    return cast(Tensor | None, getattr(module, name))


def _uses_batch(bn: nn.BatchNorm2d) -> bool:
    """Whether batch norm normalises with the statistics of the batch."""
    return bn.training or bn.running_mean is None


def _group(bn: nn.Module) -> str:
    """The name of the process group that shares the statistics of a batch, or "" if they are this process's own."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training or not dist.is_available() or not dist.is_initialized():
        return ""
    group = cast(dist.ProcessGroup, bn.process_group or dist.group.WORLD)
    return group.group_name if dist.get_world_size(group) > 1 else ""


def _check_values_per_channel(x: Tensor, layers: Sequence[Layer], shortcut: Shortcut | None) -> None:
    shape = tuple(x.shape)
    shapes = []
    for layer in layers:
        shape = _output_shape(shape, layer.conv)
        shapes.append((layer.bn, shape))
    if isinstance(shortcut, Projection):
        shapes.append((shortcut.bn, _output_shape(tuple(shortcut.x.shape), shortcut.conv)))
    for bn, (n, channels, p, q) in shapes:
        if n * p * q == 1 and _uses_batch(bn) and not _group(bn):
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {(n, channels, p, q)}"
            )


def why_eager(x: Tensor, units: Iterable[Sequence[Any]]) -> str | None:
    """Why a chain of ``units`` (convolution, batch norm, ...) on input ``x`` runs eager as things stand, or None."""
    if (reason := plan.why_eager(x)) is not None:
        return reason
    if x.dtype not in plan.DTYPES:
        return f"the input is {x.dtype}: the kernels take float32, float16 and bfloat16"
    for conv, bn, *_ in units:
        if (reason := why_unfusable(conv, bn)) is not None:
            return reason
        if x.numel() == 0 and _uses_batch(cast(nn.BatchNorm2d, bn)):
            return "the batch is empty"
    return None


def why_unfusable(conv: nn.Module, bn: nn.Module) -> str | None:
    """Why the modules of a unit rule the kernels out whatever their input (types, hooks, padding ...), or None."""
    if type(conv) is not nn.Conv2d:
        return f"the convolution is {_named(conv)}, not torch.nn.Conv2d itself"
    if type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return f"the normalisation is {_named(bn)}, not torch.nn.BatchNorm2d or SyncBatchNorm itself"
    if hooked(conv, bn):
        return "hooks, or a forward of its own, are set on the convolution or the batch norm"
    if conv.padding_mode != "zeros":
        return f"the convolution has padding_mode={conv.padding_mode!r}"
    if max(conv.kernel_size) > plan.MAX_FILTER:
        return f"the filter is {conv.kernel_size[0]}x{conv.kernel_size[1]}: the kernels go up to 7x7"
    if conv.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        return "padding='same' pads one side more than the other"
    return None


def hooked(*modules: nn.Module) -> bool:
    """Whether calling ``modules`` would run hooks or a forward set on an instance, which fusing would bypass."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return True
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return False


def _infer_unit(x: Tensor, layer: Layer, residual: Tensor | PaddedIdentity | None) -> Tensor:
    conv, bn, relu = layer
    dtype = _compute_dtype(x)
    implementation, code = _plan(tuple(x.shape), x, conv, "inference", residual=residual is not None)
    if implementation == "eager":
        return channels_last(reference.conv_bn_act(x, conv, bn, residual, relu))
    res, step, before = residual if isinstance(residual, PaddedIdentity) else (residual, 1, 0)
    w, bias, gamma, beta, mean, var, _ = _tensors(layer)
    assert w is not None
    return ops.conv_bn_act(
        x.to(dtype),
        channels_last(w.to(dtype)),
        bias,
        mean,
        var,
        gamma,
        beta,
        bn.eps,
        None if res is None else channels_last(res),
        step,
        before,
        code,
        relu,
        dtype if res is None else torch.promote_types(dtype, res.dtype),
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _pair(sizes: Sequence[Any]) -> tuple[int, int]:
    return int(sizes[0]), int(sizes[1])


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        return _pair([d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)])
    return _pair(cast(tuple[int, ...], conv.padding))


def channels_last(x: Tensor) -> Tensor:
    """``x`` itself if it is channels_last, else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last)


def _named(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _check(x: Tensor, conv: nn.Conv2d, bn: nn.Module, residual: Tensor | PaddedIdentity | None) -> None:
    for name, value, kind in (("x", x, Tensor), ("conv", conv, nn.Conv2d), ("bn", bn, nn.Module)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__module__}.{kind.__qualname__}; got {type(value).__qualname__}")
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions [N, CI, H, W]; got shape {tuple(x.shape)}")
    if x.shape[1] != conv.in_channels:
        raise ValueError(f"x must have the {conv.in_channels} channels that conv takes; got shape {tuple(x.shape)}")
    features = getattr(bn, "num_features", conv.out_channels)
    if features != conv.out_channels:
        raise ValueError(f"bn must normalise the {conv.out_channels} channels that conv returns; it has {features}")
    if residual is None:
        return
    if not isinstance(residual, Tensor | PaddedIdentity):
        raise TypeError(f"residual must be a Tensor, a PaddedIdentity or None; got {type(residual).__qualname__}")
    _check_residual(_output_shape(tuple(x.shape), conv), residual)


def _output_shape(shape: tuple[int, ...], conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Shape [N, CO, P, Q] of ``conv(x)`` for an x of ``shape``."""
    padding = _padding(conv)
    p, q = (
        ops.output_size(shape[2 + i], conv.kernel_size[i], conv.stride[i], padding[i], conv.dilation[i]) for i in (0, 1)
    )
    return shape[0], conv.out_channels, p, q


def _check_residual(shape: tuple[int, int, int, int], residual: Tensor | PaddedIdentity) -> None:
    if isinstance(residual, Tensor):
        if tuple(residual.shape) != shape:
            raise ValueError(f"residual must have the output's shape {shape}; got {tuple(residual.shape)}")
        return
    n, channels, h, w = residual.x.shape
    if residual.stride < 1 or (n, -(-h // residual.stride), -(-w // residual.stride)) != (shape[0], *shape[2:]):
        raise ValueError(
            f"residual must give {shape[2]}x{shape[3]} pixels of {shape[0]} images with stride {residual.stride}; "
            f"its x has shape {tuple(residual.x.shape)}"
        )
    if residual.channels_before < 0 or residual.channels_before + channels > shape[1]:
        raise ValueError(
            f"residual must fit {shape[1]} channels; it has {residual.channels_before} zero channels before {channels}"
        )
