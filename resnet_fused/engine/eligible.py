"""Whether a unit, as it stands, can run fused: all that it reads, looked up and checked once, or the reason why not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from resnet_fused.engine.replay import PLAIN
from resnet_fused.engine.request import requested
from resnet_fused.kernels.activation import IDENTITY, RELU, RELU6, Activation
from resnet_fused.kernels.conv import Geometry, output_size
from resnet_fused.kernels.conv_pool import POOL
from resnet_fused.kernels.launch import FLOATS, KEPT_LAYOUTS, dry_target
from resnet_fused.plan.decide import why_too_old
from resnet_fused.plan.problem import Request

logger = logging.getLogger("resnet_fused")


MAX_FILTER = 7


FORCED = "implementation('eager') is in force"


NO_GPU = "the input is not on a CUDA GPU"


TRACED = "torch.fx traces it"


EXPORTED = "what is exported or traced is to run without this package"


COMPILED = "a compiler sees its own forward"


PLANNED = "each of its units is planned to run eager"


_EXPECTED = (FORCED, NO_GPU, TRACED, EXPORTED, COMPILED, PLANNED)


def why_not_here(x: Tensor, request: Request | None = None) -> str | None:
    """Why a unit whose input is ``x`` cannot be fused where it stands, or None if it can.

    ``request``: see :func:`requested`, which is asked without it.
    """
    if not isinstance(x, Tensor):
        return TRACED if isinstance(x, fx.Proxy) else f"the input is {type(x).__qualname__}, not a tensor"
    request = requested() if request is None else request
    if request == "eager":
        return FORCED
    if torch.compiler.is_compiling():
        if torch.compiler._is_exporting_flag:  # on which, unlike the function, every compiler sets a guard
            return EXPORTED
    else:
        if torch._C._get_tracing_state() is not None:
            return EXPORTED
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "a transform of torch.func is active"
        if forward_ad._current_level >= 0:
            return "forward-mode differentiation is active"
    if request == "auto":
        if not torch.compiler.is_compiling() and dry_target() is not None:
            return None
        if not x.is_cuda:
            return NO_GPU
        return why_too_old(x.device)
    return None


_reported: set[str] = set()
_listening: list[list[str]] = []


@contextmanager
def reasons() -> Iterator[list[str]]:
    """Yields a list of why units run eager inside the ``with`` block, in order."""
    found: list[str] = []
    _listening.append(found)
    try:
        yield found
    finally:
        _listening.remove(found)


def report_once(reason: str) -> None:
    """Log why a unit is not fused, the first time that ``reason`` comes up, unless it was to be expected."""
    for found in _listening:
        found.append(reason)
    if reason not in _EXPECTED:
        warn_once(f"runs eager: {reason}")


def warn_once(message: str) -> None:
    """Log ``message`` the first time that it comes up."""
    if not torch.compiler.is_compiling() and message not in _reported:
        _reported.add(message)
        logger.warning(message)


class Layer(NamedTuple):
    """A convolution, the batch norm behind it, and the activation that follows; one in the batch norm is its own."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    activation: Activation = RELU


def _relu(v: Any, inplace: bool = False) -> Activation:
    return RELU


def _relu6(v: Any, inplace: bool = False) -> Activation:
    return RELU6


def _leaky_relu(v: Any, negative_slope: Any = 0.01, inplace: bool = False) -> Activation | None:
    # Of its own output, eager has no gradient for a slope below zero.
    return None if inplace and negative_slope < 0 else Activation("leaky_relu", (negative_slope,))


def _hardtanh(v: Any, min_val: Any = -1.0, max_val: Any = 1.0, inplace: bool = False) -> Activation:
    return Activation("hardtanh", (min_val, max_val))


def _hardswish(v: Any, inplace: bool = False) -> Activation:
    return Activation("hardswish")


def _silu(v: Any, inplace: bool = False) -> Activation:
    return Activation("silu")


def _gelu(v: Any, *, approximate: str = "none") -> Activation:
    return Activation({"none": "gelu", "tanh": "gelu_tanh"}[approximate])


_FUNCTIONS: dict[Any, Callable[..., Activation | None]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _relu),
    **{F.leaky_relu: _leaky_relu, F.leaky_relu_: partial(_leaky_relu, inplace=True)},
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    **{F.relu6: _relu6, F.hardswish: _hardswish, F.silu: _silu, F.gelu: _gelu},
}
"""What takes the arguments of a function (of a method: its name) that is an activation, in place or not."""

_MODULES: dict[str, Callable[[Any], Activation | None]] = {
    "torch.nn.modules.linear.Identity": lambda m: IDENTITY,
    "torch.nn.modules.activation.ReLU": lambda m: RELU,
    "torch.nn.modules.activation.ReLU6": lambda m: _hardtanh(None, m.min_val, m.max_val),
    "torch.nn.modules.activation.LeakyReLU": lambda m: _leaky_relu(None, m.negative_slope, m.inplace),
    "torch.nn.modules.activation.Hardtanh": lambda m: _hardtanh(None, m.min_val, m.max_val),
    "torch.nn.modules.activation.Hardswish": lambda m: _hardswish(None),
    "torch.nn.modules.activation.SiLU": lambda m: _silu(None),
    "torch.nn.modules.activation.GELU": lambda m: _gelu(None, approximate=m.approximate),
    "timm.layers.activations.GELU": lambda m: _gelu(None),
    "timm.layers.activations.GELUTanh": lambda m: _gelu(None, approximate="tanh"),
}
"""By the names of their classes, which need not be installed."""


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that ``module`` is, of exactly that type; None if it is none that the kernels have."""
    if type(module) is nn.ReLU:  # at once, since every call of a block asks
        return RELU
    made = _MODULES.get(_named(module))
    return None if made is None else _activation(made, module)


def activation_of_call(function: Any, arguments: Sequence[Any], kwargs: Mapping[str, Any]) -> Activation | None:
    """The activation that ``function(*arguments, **kwargs)`` is; None if it is none that the kernels have.

    The first argument, whatever it is, stands for the tensor. ``function``: of a method, its name.
    """
    made = _FUNCTIONS.get(function)
    return None if made is None else _activation(made, *arguments, **kwargs)


def _activation(made: Callable[..., Activation | None], *arguments: Any, **kwargs: Any) -> Activation | None:
    """What it ``made`` of the arguments, with plain numbers; None if the kernels do not take them."""
    try:
        found = made(*arguments, **kwargs)
        if found is None:
            return None
        found = Activation(found.name, tuple([float(number) for number in found.numbers]))
        found.require()
    except (KeyError, TypeError, ValueError):
        return None
    return found


Out = tuple[int, int, int, int]
"""The shape [N, CO, P, Q] of an output."""


class Unit(NamedTuple):
    """A layer with all that it comes to on its input: the tensors that are used, and shapes that fit each other.

    ``batches``: what counts the batches, where they are counted. ``momentum`` None: the average over all batches.
    ``batch_stats``: batch norm takes the statistics of the batch, and updates ``mean`` and ``var`` if there are any.
    ``activation``: behind the normalisation; of the last unit of a branch, behind the addition.
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
    activation: Activation
    geometry: Geometry
    out: Out


def unit(
    x: Tensor, shape: tuple[int, ...], autocast: torch.dtype | None, layer: Layer, *, norm_first: bool = False
) -> Unit | str:
    """``layer`` on an input of ``shape`` [N, CI, H, W] that lies where ``x`` does, or why it runs eager.

    ``norm_first``: batch norm and activation stand in front of the convolution, which has no bias then.
    """
    conv, bn, _ = layer
    activation = _behind(layer)
    if activation is None:
        return "the batch norm has an activation of its own, and another one follows"
    w, bias = _held(conv, conv._parameters, "weight", "bias")
    if not isinstance(w, Tensor):
        return "the convolution has no filter"
    if norm_first and bias is not None:
        return "a convolution behind its batch norm has a bias"
    gamma, beta = _held(bn, bn._parameters, "weight", "bias")
    mean, var = _held(bn, bn._buffers, "running_mean", "running_var")
    frozen = is_frozen(bn)
    training = not frozen and bn.training
    tracked, given = (False, None) if frozen else (bn.track_running_stats, bn.momentum)
    batches = _held(bn, bn._buffers, "num_batches_tracked")[0] if training and tracked else None
    if (reason := why_foreign(w, x)) is not None:
        return reason
    if w.dtype not in FLOATS if autocast is not None else w.dtype != x.dtype:
        return f"the input is {x.dtype} and the filter {w.dtype}"
    place = _placed(conv, shape, w.shape)
    if isinstance(place, str):
        return place
    numbers, out = place
    normalised = shape if norm_first else out
    dtype = x.dtype if autocast is None else autocast
    vectors = _vectors(x.device, normalised[1], w.dtype, dtype, bias, gamma, beta, mean, var)
    if isinstance(vectors, str):
        return vectors
    if (mean is None) != (var is None):
        return "one of the running statistics is missing"
    if frozen and (mean is None or (mean.dtype != dtype and autocast is None)):
        return f"a frozen batch norm reads {dtype}, and its own vectors are of another dtype"
    batch_stats = training or mean is None
    if training and not tracked:
        vectors[3:] = mean, var = None, None
    if batch_stats:
        if mean is not vectors[3] or var is not vectors[4]:
            return "the running statistics are views with gaps"
        if (reason := _why_statistics(normalised, bn, batches, x.device)) is not None:
            return reason
    if mean is not None and var is not None and (mean.requires_grad or var.requires_grad):
        return "the running statistics require a gradient"
    eps, momentum = _number(bn.eps), _number(given)
    if eps is None or not eps > 0 or (momentum is None and given is not None):
        return f"batch norm has eps={bn.eps} and momentum={given}"
    if momentum is None and batches is None:
        momentum = 0.0
    bias, gamma, beta, mean, var = vectors
    used = plain(w), bias, gamma, beta, mean, var, batches
    return Unit(layer, *used, momentum, eps, batch_stats, activation, numbers, out)


def constants(layer: Layer, tensors: list[Tensor | None], training: bool) -> tuple[Any, ...] | None:
    """All that :func:`unit` reads of a ``layer`` but its tensors, which are added to ``tensors``.

    None where these are not simply parameters and buffers, strided and without operators of their own, where numbers
    are of other types than usual, where the norm has more in it than an activation, and, if not ``training``, where it
    takes the statistics of the batch, or if it shares them. Raises TypeError for sizes that are no pairs.
    """
    conv, norm, frozen = layer.conv.__dict__, layer.bn.__dict__, is_frozen(layer.bn)
    weights, running = conv["_parameters"], norm["_buffers"]
    affine = running if frozen else norm["_parameters"]
    try:
        read: tuple[Any, ...] = (
            *(weights["weight"], weights["bias"], affine["weight"], affine["bias"]),
            *(running["running_mean"], running["running_var"]),
        )
    except KeyError:
        return None
    if read[0] is None or read[4] is None or not is_norm(layer.bn):
        return None
    statistics: tuple[Any, ...] = ()
    if norm["training"] and not frozen:
        statistics = norm["track_running_stats"], norm["momentum"]
        if not training or isinstance(layer.bn, nn.SyncBatchNorm) or type(norm["momentum"]) not in (float, type(None)):
            return None
        if type(norm["track_running_stats"]) is not bool:
            return None
        read = *read, running["num_batches_tracked"]
    if norm["_modules"] and why_inside(layer.bn) is not None:
        return None
    sizes = *conv["stride"], *conv["padding"], *conv["dilation"], conv["groups"]
    for size in sizes:
        if type(size) is not int:
            return None
    if type(norm["eps"]) is not float or type(conv["padding_mode"]) is not str:
        return None
    for t in read:
        if t is not None and (type(t) not in PLAIN or t.layout is not torch.strided):
            return None
    tensors += read
    kinds = type(layer.conv), type(layer.bn), activation_in(layer.bn), layer.activation
    return *kinds, *sizes, conv["padding_mode"], norm["eps"], statistics


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


@lru_cache(maxsize=KEPT_LAYOUTS, typed=True)
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
    p = output_size(h, r, stride_h, pad_h, dil_h)
    q = output_size(w, s, stride_w, pad_w, dil_w)
    if p < 1 or q < 1:
        return "the filter is larger than the padded image"
    return Geometry((stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w), groups), (n, co, p, q)


def why_foreign(t: Tensor, x: Tensor) -> str | None:
    """Why a tensor of four dimensions cannot go into one launch with ``x``, or None."""
    if t.dim() != 4 or t.layout != torch.strided or t.device != x.device:
        return f"a tensor is {t.dim()}-dimensional, {t.layout} on {t.device}: it must be 4-dimensional on {x.device}"
    return None if type(t) in PLAIN else _why_subclass(t)


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
            if type(v) not in PLAIN and (reason := _why_subclass(v)) is not None:
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
                v = plain(v).contiguous()
        found.append(v)
    return found


def _number(value: Any) -> float | None:
    """``value`` as PyTorch's operators take it for a number, or None."""
    if type(value) is float:
        return value
    return float(value) if isinstance(value, (int, float, Tensor)) else None


def _why_statistics(out: tuple[int, ...], bn: nn.Module, batches: Tensor | None, device: torch.device) -> str | None:
    """Why batch norm cannot take its statistics from a batch of shape ``out``, or None."""
    n, _, p, q = out
    if n == 0:
        return "the batch is empty"
    if n * p * q == 1 and not process_group_name(bn):
        return "there is one value per channel to normalise"
    if batches is None:
        return None
    if not isinstance(batches, Tensor) or batches.dtype != torch.int64 or batches.dim() or batches.device != device:
        return f"num_batches_tracked is no int64 scalar on {device}"
    return None


def why_unfit(shape: tuple[int, ...], residual: Tensor, step: int, before: int, padded: bool) -> str | None:
    """Why ``residual`` cannot be added to an output of ``shape``, as it is or as a PaddedIdentity, or None."""
    got = tuple(residual.shape)
    if residual.dtype not in FLOATS:
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
    return Geometry(stride, padding, dilation, conv.groups)


def _pair(sizes: Any) -> tuple[int, int]:
    """One number, alone or in a tuple, stands for both directions."""
    if isinstance(sizes, int):
        return sizes, sizes
    first, second = sizes if len(sizes) == 2 else (*sizes, *sizes)
    if not isinstance(first, int) or not isinstance(second, int):
        raise TypeError(f"{sizes} should be integers")
    return first, second


def plain(t: Tensor) -> Tensor:
    """``t`` without a pending negation, which a kernel that reads its memory would not see.

    What a compiler calls is called by way of PyTorch's dispatcher, which resolves it.
    """
    return t if torch.compiler.is_dynamo_compiling() or not t.is_neg() else t.resolve_neg()


def process_group_name(bn: nn.Module) -> str:
    """The name of the process group that shares the statistics of a batch, or "" if they are this process's own."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training or not dist.is_available() or not dist.is_initialized():
        return ""
    group = cast(dist.ProcessGroup, bn.process_group or dist.group.WORLD)
    return group.group_name if dist.get_world_size(group) > 1 else ""


def why_eager(x: Tensor, units: Iterable[Sequence[Any]], request: Request | None = None) -> str | None:
    """Why a chain of ``units`` (convolution, batch norm, ...) on input ``x`` runs eager as things stand, or None.

    Whether their tensors fit one another is for :func:`resolve` to say. ``request``: see there.
    """
    if (reason := why_not_here(x, request)) is not None:
        return reason
    units = list(units)
    if hooked(*(module for conv, bn, *_ in units for module in (conv, bn))):
        return "hooks, or a forward of its own, are set on the convolution or the batch norm"
    return why_unsupported(x, units)


def why_unsupported(x: Tensor, units: Iterable[Sequence[Any]]) -> str | None:
    """:func:`why_eager`, apart from what is asked for, where the tensor ``x`` lies, and hooks."""
    if x.dtype not in FLOATS:
        return f"the input is {x.dtype}: the kernels take float32, float16 and bfloat16"
    if x.dim() != 4 or x.layout != torch.strided:
        return f"the input is {x.dim()}-dimensional, {x.layout}: the kernels take 4-dimensional, strided tensors"
    if type(x) not in PLAIN and (reason := _why_subclass(x)) is not None:
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
        if _name(type(bn)) not in NORMS:
            return f"the normalisation is {_named(bn)}, not torch.nn.BatchNorm2d or SyncBatchNorm itself"
        if (reason := why_inside(bn)) is not None:
            return reason
    if conv.padding_mode != "zeros":
        return f"the convolution has padding_mode={conv.padding_mode!r}"
    return None


NORMS = {
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): True,
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"): True,
    ("timm.layers.norm_act", "BatchNormAct2d"): False,
    ("timm.layers.norm_act", "SyncBatchNormAct"): False,
}
"""Batch norms of other libraries, by module and name, and whether they are in evaluation always.

timm's have an activation of their own, behind a ``drop``.
"""


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm that units may have."""
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or _name(type(module)) in NORMS


def is_frozen(bn: nn.Module) -> bool:
    """Whether ``bn``, a norm of a unit, is in evaluation always: its vectors are buffers."""
    return type(bn) is not nn.BatchNorm2d and NORMS.get(_name(type(bn)), False)


def returned(bn: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype that ``bn``, a norm of a unit, makes of ``dtype``: a frozen one is no operator that autocast knows."""
    return torch.promote_types(dtype, cast(Any, bn).running_mean.dtype) if is_frozen(bn) else dtype


def activation_in(bn: nn.Module) -> Activation | None:
    """The activation that is part of the norm ``bn``; None if it is none that the kernels have."""
    act = None if type(bn) is nn.BatchNorm2d else bn._modules.get("act")
    return IDENTITY if act is None else activation_of(act)


def _behind(layer: Layer) -> Activation | None:
    """What the activation in the norm of ``layer`` and the one that follows come to; None if that is no activation."""
    inside, following = activation_in(layer.bn), layer.activation
    if following == IDENTITY or inside == following == RELU:
        return inside
    return following if inside == IDENTITY else None


def why_inside(bn: nn.Module) -> str | None:
    """Why a norm of :data:`NORMS` does not do what is known of it, and an activation at the most, or None."""
    parts = [part for part in bn._modules.values() if part is not None]
    if hooked(*parts):
        return "hooks, or a forward of its own, are set inside of the batch norm"
    for name, part in bn._modules.items():
        if part is not None and type(part) is not nn.Identity and (name != "act" or activation_of(part) is None):
            return f"the {name} of the batch norm is {type(part).__qualname__}"
    return None


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def takes_means(module: nn.Module) -> bool:
    """Whether ``module`` returns the mean of each image, [N, C, 1, 1]."""
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))


def why_not_pooled(pool: nn.Module) -> str | None:
    """Why ``pool`` is not the one that kernels do behind a unit, or None."""
    if type(pool) is not nn.MaxPool2d:
        return f"the pool is {_named(pool)}, not torch.nn.MaxPool2d itself"
    numbers = [
        value if isinstance(value, tuple) else (value, value) for value in (pool.kernel_size, pool.stride, pool.padding)
    ]
    if numbers != [(size, size) for size in POOL] or pool.dilation not in (1, (1, 1)):
        return f"the pool is {pool}"
    if pool.ceil_mode or pool.return_indices:
        return f"the pool has ceil_mode={pool.ceil_mode} and return_indices={pool.return_indices}"
    return "hooks are registered on the pool" if hooked(pool) else None


def _why_large(r: int, s: int) -> str | None:
    return f"the filter is {r}x{s}: the kernels go up to 7x7" if max(r, s) > MAX_FILTER else None


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


class Onlooker:
    """A hook that only looks: what it is told of may be computed along with what comes before and behind."""

    def __init__(self, look: Callable[..., None]) -> None:
        self.look = look

    def __call__(self, *arguments: Any) -> None:
        self.look(*arguments)


def answered(module: nn.Module) -> bool:
    """Whether calling ``module`` is more than its forward, onlookers apart: hooks, what was compiled, its own call."""
    if module._compiled_call_impl is not None or type(module).__call__ is not nn.Module.__call__:
        return True
    if not hooked(module):
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    others = module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__
    return bool(hooked() or others) or not all(isinstance(hook, Onlooker) for hook in hooks)


def _named(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
