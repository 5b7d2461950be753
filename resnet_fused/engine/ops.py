"""The operator boundary: kernels as ``torch.library`` operators with fakes of exact strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_fused.engine import backward, forward, replay
from resnet_fused.engine.trace import implementations
from resnet_fused.kernels.activation import IDENTITY, decode
from resnet_fused.kernels.batch_norm import batch_norm_apply, batch_norm_stats
from resnet_fused.kernels.chain import Link
from resnet_fused.kernels.conv import output_size
from resnet_fused.kernels.conv_pool import pooled_size
from resnet_fused.kernels.epilogue import Norm, Residual
from resnet_fused.kernels.launch import dry_target
from resnet_fused.kernels.norm_backward import batch_norm_reduce
from resnet_fused.kernels.norm_pool import Peaks, batch_norm_pool
from resnet_fused.kernels.squeeze import gate_gradient

_library = torch.library.Library("resnet_fused", "DEF")
_library.define(
    "conv_bn_act(Tensor x, Tensor w, Tensor? bias, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, "
    "Tensor? gate, Tensor? residual, int residual_step, int residual_before, int[] convolution, str activation, "
    "ScalarType out_dtype) -> Tensor"
)
_library.define(
    "conv_bn_act_means(Tensor x, Tensor w, Tensor? bias, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, "
    "float eps, int[] convolution, str activation) -> (Tensor, Tensor)"
)
_library.define(
    "conv_bn_act_pool(Tensor x, Tensor w, Tensor? bias, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, "
    "float eps, int[] convolution) -> Tensor"
)
_library.define("affine(Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, Tensor? bias, float eps) -> Tensor")
_library.define("chain(Tensor x, Tensor?[] weights, Tensor?[] affines, Tensor residual, int[] convolution) -> Tensor[]")
_UNIT = (
    "Tensor x, Tensor? x_stats, Tensor w, str before, Tensor? bias, Tensor? gamma, Tensor? beta, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, float? momentum, float eps, "
    "bool batch_stats, int[] convolution, str group"
)
_library.define(f"unit_forward({_UNIT}) -> (Tensor, Tensor)")
_library.define(f"squeezed_forward({_UNIT}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "gate_backward(Tensor dz, Tensor? z, Tensor y, Tensor stats, Tensor gate, Tensor? residual, "
    "Tensor? residual_stats, int step, int before, str activation) -> Tensor[]"
)
_library.define(
    "join_forward(Tensor y, Tensor stats, Tensor? gate, Tensor? residual, Tensor? residual_stats, int step, "
    "int before, str activation, ScalarType out_dtype) -> Tensor"
)
_library.define(
    "norm_forward(Tensor x, Tensor[] moments, int rows, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? batches, float? momentum, float eps, bool batch_stats, str group) -> Tensor"
)
_library.define(
    "raw_sum(Tensor x, Tensor x_stats, Tensor w, str before, Tensor residual, int[] convolution) -> "
    "(Tensor, Tensor[], int)"
)
_library.define(
    "preact_conv(Tensor x, Tensor? x_stats, Tensor w, str before, Tensor? mean, Tensor? var, Tensor? gamma, "
    "Tensor? beta, float eps, str activation, Tensor? residual, int[] convolution) -> Tensor"
)
_library.define(
    "preact_backward(Tensor dz, Tensor[] weights, Tensor[] ys, Tensor[] stats, int[] convolutions, "
    "int[] weight_strides, bool[] frozen, str[] groups, str[] activations, bool[] needs, ScalarType weight_dtype, "
    "ScalarType norm_dtype) -> Tensor[]"
)
_library.define("pool_forward(Tensor y, Tensor stats) -> (Tensor, Tensor, Tensor)")
_CHAIN = (
    "Tensor[] weights, Tensor?[] biases, Tensor?[] ys, Tensor[] stats, int[] convolutions, int[] weight_strides, "
    "bool[] frozen, str[] groups, str[] activations, str kind, int step, int before, bool[] needs, "
    "ScalarType weight_dtype, ScalarType norm_dtype"
)
_library.define(
    "residual_backward(Tensor dz, Tensor? z, Tensor x, Tensor? shortcut, Tensor? peak, Tensor? place, "
    f"{_CHAIN}) -> Tensor[]"
)
_library.define(
    "squeezed_backward(Tensor g, Tensor sums, Tensor gate, Tensor dsqueeze, Tensor means, Tensor x, Tensor? shortcut, "
    f"{_CHAIN}) -> Tensor[]"
)


def _conv_bn_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    gate: Tensor | None,
    residual: Tensor | None,
    residual_step: int,
    residual_before: int,
    convolution: list[int],
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    norm = Norm(mean, var, gamma, beta, eps)
    added = None if residual is None else Residual(residual, residual_step, residual_before)
    conv = forward.decided(convolution, x, w, "inference", residual=residual is not None)
    with torch.cuda.device_of(x):
        return forward.inference(x, w, bias, norm, gate, added, conv, decode(activation), out_dtype)


def _conv_bn_act_fake(x: Tensor, w: Tensor, *arguments: Any) -> Tensor:
    if dry_target() is not None:
        return _conv_bn_act(x, w, *arguments)
    shape = _output_shape(x, w, arguments[10])
    return torch.empty(shape, dtype=arguments[12], device=x.device, memory_format=torch.channels_last)


def _conv_bn_act_means(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    convolution: list[int],
    activation: str,
) -> tuple[Tensor, Tensor]:
    conv = forward.decided(convolution, x, w, "inference")
    with torch.cuda.device_of(x):
        return forward.inference_means(x, w, bias, Norm(mean, var, gamma, beta, eps), conv, decode(activation))


def _conv_bn_act_means_fake(x: Tensor, w: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    if dry_target() is not None:
        return _conv_bn_act_means(x, w, *arguments)
    shape = _output_shape(x, w, arguments[6])
    z = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return z, x.new_empty(*shape[:2], 1, 1)


def _conv_bn_act_pool(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    convolution: list[int],
) -> Tensor:
    conv = forward.decided(convolution, x, w, "inference")
    with torch.cuda.device_of(x):
        return forward.inference_pooled(x, w, bias, Norm(mean, var, gamma, beta, eps), conv)


def _conv_bn_act_pool_fake(x: Tensor, w: Tensor, *arguments: Any) -> Tensor:
    if dry_target() is not None:
        return _conv_bn_act_pool(x, w, *arguments)
    n, co, p, q = _output_shape(x, w, arguments[6])
    shape = n, co, pooled_size(p), pooled_size(q)
    return torch.empty(shape, dtype=w.dtype, device=x.device, memory_format=torch.channels_last)


def _affine(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``affine`` of a :class:`Link`: scale and shift, fp32 [2, C], of batch norm with constants behind ``bias``."""
    if bias is not None:
        mean = mean.float() - bias.float()
    with torch.cuda.device_of(mean):
        return batch_norm_stats(None, gamma, beta, eps, running_mean=mean, running_var=var)[2:4]


def _affine_fake(mean: Tensor, *arguments: Any) -> Tensor:
    if dry_target() is not None:
        return _affine(mean, *arguments)
    return mean.new_empty((2, mean.shape[0]), dtype=torch.float32)


def _chain(
    x: Tensor,
    weights: list[Tensor | None],
    affines: list[Tensor | None],
    residual: Tensor,
    convolution: list[int],
) -> list[Tensor]:
    links = [None if w is None or v is None else Link(w, v) for w, v in zip(weights, affines, strict=True)]
    with torch.cuda.device_of(x):
        return forward.chain(x, links, residual, forward.Convolution.decode(convolution))


def _chain_fake(x: Tensor, weights: list[Tensor | None], *arguments: Any) -> list[Tensor]:
    if dry_target() is not None:
        return _chain(x, weights, *arguments)
    n, _, p, q = arguments[1].shape
    channels = [w.shape[0] for w in weights[1:] if w is not None]
    return [x.new_empty(n, co, p, q).contiguous(memory_format=torch.channels_last) for co in channels]


def _output_shape(x: Tensor, w: Tensor, convolution: Sequence[int]) -> tuple[int, int, int, int]:
    stride, padding, dilation, _ = forward.Convolution.decode(convolution).geometry
    p, q = (output_size(*size) for size in zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True))
    return x.shape[0], w.shape[0], p, q


def _unit_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _unit(False, x, *arguments)


def _squeezed_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _unit(True, x, *arguments)


def _unit(
    squeezes: bool,
    x: Tensor,
    x_stats: Tensor | None,
    w: Tensor,
    before: str,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    eps: float,
    batch_stats: bool,
    convolution: list[int],
    group: str,
) -> tuple[Tensor, ...]:
    """What an operator on a unit does; ``squeezes``: see :func:`forward.unit_forward`."""
    raw = None if x_stats is None else forward.Before(x_stats, decode(before))
    running = forward.Running(running_mean, running_var, batches, momentum)
    conv = forward.decided(convolution, x, w, "training", prologue=x_stats is not None)
    with torch.cuda.device_of(x):
        return forward.unit_forward(x, raw, w, bias, gamma, beta, running, eps, batch_stats, conv, group, squeezes)


def _unit_forward_fake(x: Tensor, x_stats: Tensor | None, w: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if dry_target() is not None:
        return _unit_forward(x, x_stats, w, *arguments)
    shape = _output_shape(x, w, arguments[10])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, x.new_empty(5, w.shape[0], dtype=torch.float32)


def _squeezed_forward_fake(x: Tensor, x_stats: Tensor | None, w: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if dry_target() is not None:
        return _squeezed_forward(x, x_stats, w, *arguments)
    n, channels = x.shape[0], w.shape[0]
    means = x.new_empty(n, channels, dtype=torch.float32)
    return *_unit_forward_fake(x, x_stats, w, *arguments), x.new_empty(n, channels, 1, 1), means


def _norm_forward(
    x: Tensor,
    moments: list[Tensor],
    rows: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    eps: float,
    batch_stats: bool,
    group: str,
) -> Tensor:
    running = forward.Running(running_mean, running_var, batches, momentum)
    with torch.cuda.device_of(x):
        return forward.norm_forward(x, forward.Taken(moments, rows), gamma, beta, running, eps, batch_stats, group)


def _norm_forward_fake(x: Tensor, *arguments: Any) -> Tensor:
    if dry_target() is not None:
        return _norm_forward(x, *arguments)
    return x.new_empty(5, x.shape[1], dtype=torch.float32)


def _preact_conv(
    x: Tensor,
    x_stats: Tensor | None,
    w: Tensor,
    before: str,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    convolution: list[int],
) -> Tensor:
    raw = None if x_stats is None else forward.Before(x_stats, decode(before))
    direction = "inference" if raw is None or mean is not None else "training"
    conv = forward.decided(convolution, x, w, direction, prologue=direction == "training")
    with torch.cuda.device_of(x):
        if mean is None or var is None:
            return forward.convolve(x, raw, w, None, conv, residual)
        norm = Norm(mean, var, gamma, beta, eps)
        return forward.inference(x, w, None, norm, None, None, conv, decode(activation), x.dtype, raw)


def _preact_conv_fake(x: Tensor, x_stats: Tensor | None, w: Tensor, *arguments: Any) -> Tensor:
    if dry_target() is not None:
        return _preact_conv(x, x_stats, w, *arguments)
    shape = _output_shape(x, w, arguments[8])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _raw_sum(
    x: Tensor, x_stats: Tensor, w: Tensor, before: str, residual: Tensor, convolution: list[int]
) -> tuple[Tensor, list[Tensor], int]:
    conv = forward.decided(convolution, x, w, "training", prologue=True)
    with torch.cuda.device_of(x):
        z, taken = forward.raw_sum(x, forward.Before(x_stats, decode(before)), w, residual, conv)
    return z, *taken


def _raw_sum_fake(x: Tensor, x_stats: Tensor, w: Tensor, *arguments: Any) -> tuple[Tensor, list[Tensor], int]:
    """Without moments, which depend on the tile: who finds none takes them."""
    if dry_target() is not None:
        return _raw_sum(x, x_stats, w, *arguments)
    return torch.empty_like(arguments[1], memory_format=torch.channels_last), [], 0


def _join_forward(
    y: Tensor,
    stats: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    step: int,
    before: int,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    added = None if residual is None else Residual(residual, step, before)
    with torch.cuda.device_of(y):
        return batch_norm_apply(
            y,
            stats,
            gate=gate,
            residual=added,
            residual_stats=residual_stats,
            activation=decode(activation),
            out_dtype=out_dtype,
        )


def _join_forward_fake(y: Tensor, *arguments: Any) -> Tensor:
    if dry_target() is not None:
        return _join_forward(y, *arguments)
    return torch.empty_like(y, dtype=arguments[7], memory_format=torch.channels_last)


def _gate_backward(
    dz: Tensor,
    z: Tensor | None,
    y: Tensor,
    stats: Tensor,
    gate: Tensor,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    step: int,
    before: int,
    activation: str,
) -> list[Tensor]:
    dz, z, y, residual = _restored(dz), _restored(z), _restored(y), _restored(residual)
    stats, gate = (t.resolve_neg().contiguous() for t in (stats, gate))
    residual_stats = None if residual_stats is None else residual_stats.resolve_neg().contiguous()
    raw = residual is not None and residual_stats is not None
    added = Residual(residual, step, before) if residual is not None and not raw else None
    second = (residual, residual_stats) if residual is not None and residual_stats is not None else None
    with torch.cuda.device_of(dz):
        g, sums = batch_norm_reduce(
            dz, y, stats, activation=decode(activation), z=z, second=second, gate=gate, residual=added
        )
        dgate, by_image = gate_gradient(sums, stats, y.shape[0], gate.dtype)
    return [dgate, by_image] if g is dz else [dgate, by_image, g]


def _gate_backward_fake(dz: Tensor, z: Tensor | None, y: Tensor, *arguments: Any) -> list[Tensor]:
    if dry_target() is not None:
        return _gate_backward(dz, z, y, *arguments)
    gate, rows, activation = arguments[1], 2 if arguments[3] is None else 3, decode(arguments[6])
    found = [torch.empty_like(gate), gate.new_empty(rows, *gate.shape, dtype=torch.float32)]
    return found if activation == IDENTITY else [*found, torch.empty_like(dz, memory_format=torch.channels_last)]


def _pool_forward(y: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(y):
        z, peaks = batch_norm_pool(y, stats)
    return z, *peaks


def _pool_forward_fake(y: Tensor, stats: Tensor) -> tuple[Tensor, ...]:
    if dry_target() is not None:
        return _pool_forward(y, stats)
    n, c, p, q = y.shape
    z = torch.empty(
        (n, c, pooled_size(p), pooled_size(q)), dtype=y.dtype, device=y.device, memory_format=torch.channels_last
    )
    return z, torch.empty_like(z), torch.empty_like(z, dtype=torch.int8)


def _residual_backward(
    dz: Tensor,
    z: Tensor | None,
    x: Tensor,
    shortcut: Tensor | None,
    peak: Tensor | None,
    place: Tensor | None,
    *chain: Any,
) -> list[Tensor]:
    peaks = None if peak is None or place is None else Peaks(_restored(peak), _restored(place))
    return _chain_backward(dz, z, x, shortcut, peaks, None, *chain)


def _squeezed_backward(
    g: Tensor,
    sums: Tensor,
    gate: Tensor,
    dsqueeze: Tensor,
    means: Tensor,
    x: Tensor,
    shortcut: Tensor | None,
    *chain: Any,
) -> list[Tensor]:
    gated = backward.Gated(*(t.resolve_neg().contiguous() for t in (sums, gate, dsqueeze, means)))
    return _chain_backward(g, None, x, shortcut, None, gated, *chain)


def _chain_backward(
    dz: Tensor,
    z: Tensor | None,
    x: Tensor,
    shortcut: Tensor | None,
    peaks: Peaks | None,
    gated: backward.Gated | None,
    weights: list[Tensor],
    biases: list[Tensor | None],
    ys: list[Tensor | None],
    stats: list[Tensor],
    convolutions: list[int],
    weight_strides: list[int],
    frozen: list[bool],
    groups: list[str],
    activations: list[str],
    kind: str,
    step: int,
    before: int,
    needs: list[bool],
    weight_dtype: torch.dtype,
    norm_dtype: torch.dtype,
) -> list[Tensor]:
    # What was saved may come back in another layout, from hooks that keep it elsewhere.
    dz, x, weights = _restored(dz), _restored(x), [_restored(w) for w in weights]
    z, shortcut, ys = _restored(z), _restored(shortcut), [_restored(y) for y in ys]
    units = []
    for i, w in enumerate(weights):
        projection = kind == "projection" and i == len(weights) - 1
        source = (x if shortcut is None else shortcut) if projection else x if i == 0 else ys[i - 1]
        assert source is not None
        code = convolutions[forward.CODE_LENGTH * i : forward.CODE_LENGTH * (i + 1)]
        conv = forward.decided(code, source, w, "training", prologue=not projection and i > 0)
        stride, need = tuple(weight_strides[4 * i : 4 * i + 4]), backward.Needs(*needs[2 + 4 * i : 6 + 4 * i])
        units.append(
            backward.UnitBackward(
                *(conv, w, stride, biases[i], ys[i], stats[i].resolve_neg().contiguous(), frozen[i], groups[i], need),
                decode(activations[i]),
            )
        )
    branch, last = (units[:-1], units[-1]) if kind == "projection" else (units, None)
    wanted = backward.Wanted(needs[0], needs[1], weight_dtype, norm_dtype)
    join = backward.Join(kind, step, before, peaks, gated)
    with torch.cuda.device_of(x):
        dx, d_shortcut = backward.backward(dz, z, x, shortcut, branch, last, join, wanted)
    found = [dx, d_shortcut]
    for unit in units:
        found += [unit.gradients.w, unit.gradients.bias, unit.gradients.gamma, unit.gradients.beta]
    return [gradient for gradient, need in zip(found, needs, strict=True) if need and gradient is not None]


def _preact_backward(
    dz: Tensor,
    weights: list[Tensor],
    ys: list[Tensor],
    stats: list[Tensor],
    convolutions: list[int],
    weight_strides: list[int],
    frozen: list[bool],
    groups: list[str],
    activations: list[str],
    needs: list[bool],
    weight_dtype: torch.dtype,
    norm_dtype: torch.dtype,
) -> list[Tensor]:
    dz, weights, ys = _restored(dz), [_restored(w) for w in weights], [_restored(y) for y in ys]
    units = []
    for i, w in enumerate(weights):
        at = i % len(ys)  # behind the branch's, the projection reads what the first does
        code = convolutions[forward.CODE_LENGTH * i : forward.CODE_LENGTH * (i + 1)]
        conv = forward.decided(code, ys[at], w, "training", prologue=True)
        gamma, beta = needs[2 + 3 * at : 4 + 3 * at]
        units.append(
            backward.UnitBackward(
                *(
                    conv,
                    w,
                    tuple(weight_strides[4 * i : 4 * i + 4]),
                    None,
                    ys[at],
                    stats[at].resolve_neg().contiguous(),
                ),
                *(frozen[at], groups[at], backward.Needs(needs[1 + 3 * i], False, gamma, beta)),
                decode(activations[at]),
            )
        )
    branch, projection = units[: len(ys)], units[-1] if len(units) > len(ys) else None
    with torch.cuda.device_of(dz):
        dx = backward.preact_backward(
            dz, branch, projection, backward.Wanted(needs[0], False, weight_dtype, norm_dtype)
        )
    found = [dx]
    for unit in units:
        found += [unit.gradients.w, unit.gradients.gamma, unit.gradients.beta]
    return [gradient for gradient, need in zip(found, needs, strict=False) if need and gradient is not None]


T = TypeVar("T", Tensor, Tensor | None)


def channels_last(x: T) -> T:
    """``x`` itself if it is channels_last or None, else a copy that is."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def _restored(x: T) -> T:
    """``x`` as it was saved: channels_last, and without a pending negation."""
    return None if x is None else x.resolve_neg().contiguous(memory_format=torch.channels_last)


def _residual_backward_fake(dz: Tensor, z: Tensor | None, x: Tensor, shortcut: Tensor | None, *arguments: Any) -> Any:
    if dry_target() is not None:
        return _residual_backward(dz, z, x, shortcut, *arguments)
    return _chain_backward_fake(x, shortcut, *arguments[2:])


def _squeezed_backward_fake(*arguments: Any) -> Any:
    return _squeezed_backward(*arguments) if dry_target() is not None else _chain_backward_fake(*arguments[5:])


def _chain_backward_fake(x: Tensor, shortcut: Tensor | None, *chain: Any) -> list[Tensor]:
    weights, strides, needs, weight_dtype, norm_dtype = chain[0], chain[5], *chain[12:15]
    found = [None if t is None else torch.empty_like(t, memory_format=torch.channels_last) for t in (x, shortcut)]
    for i, w in enumerate(weights):
        found.append(_filter_gradient_fake(w, strides, i, weight_dtype))
        found += [w.new_empty(w.shape[0], dtype=dtype) for dtype in (weight_dtype, norm_dtype, norm_dtype)]
    return [t for t, need in zip(found, needs, strict=True) if need and t is not None]


def _filter_gradient_fake(w: Tensor, strides: list[int], i: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(w.shape, strides[4 * i : 4 * i + 4], dtype=dtype, device=w.device)


def _preact_backward_fake(dz: Tensor, weights: list[Tensor], ys: list[Tensor], *arguments: Any) -> Any:
    if dry_target() is not None:
        return _preact_backward(dz, weights, ys, *arguments)
    strides, needs, weight_dtype, norm_dtype = arguments[2], *arguments[6:9]
    found = [torch.empty_like(ys[0], memory_format=torch.channels_last)]
    for i, w in enumerate(weights):
        found.append(_filter_gradient_fake(w, strides, i, weight_dtype))
        found += [w.new_empty(ys[i % len(ys)].shape[1], dtype=norm_dtype) for _ in range(2)]
    return [t for t, need in zip(found, needs, strict=False) if need]


def _selected(value: Any, dims: Any, i: int) -> Any:
    if isinstance(value, list | tuple) and isinstance(dims, list | tuple):
        return [_selected(item, dim, i) for item, dim in zip(value, dims, strict=True)]
    return value if dims is None else value.select(dims, i)


def _flops(x: Tensor, w: Tensor, convolution: Sequence[int]) -> int:
    """Floating-point operations of a convolution, as FlopCounterMode counts them.

    Its hooks have the modules of blocks run by themselves; a frozen model has none.
    """
    return 2 * math.prod(_output_shape(x, w, convolution)) * math.prod(w.shape[1:])


def _register(
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    repeated: bool = False,
) -> Callable[..., Any]:
    """Make the operator; returns a function that calls it, or what it runs where nobody could tell the difference.

    PyTorch's dispatcher takes as long as the rest of a launch from Python, for the sake of those who watch.
    ``repeated``: the launches are so many that to repeat them takes less than to find them out again.
    """
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_fused::{name}", fake, lib=_library)
    packet = getattr(torch.ops.resnet_fused, name)
    operator = packet.default
    implementations[operator] = implementation
    if flops is not None:
        register_flop_formula(packet, get_raw=True)(lambda *arguments, out_val: flops(*arguments))

    def call(*arguments: Any) -> Any:
        if replay.is_watched(arguments):
            return operator(*arguments)
        return replay.run(implementation, arguments) if repeated else implementation(*arguments)

    return call


conv_bn_act = _register("conv_bn_act", _conv_bn_act, _conv_bn_act_fake, lambda x, w, *rest: _flops(x, w, rest[10]))
conv_bn_act_means = _register(
    "conv_bn_act_means", _conv_bn_act_means, _conv_bn_act_means_fake, lambda x, w, *rest: _flops(x, w, rest[6])
)
conv_bn_act_pool = _register(
    "conv_bn_act_pool", _conv_bn_act_pool, _conv_bn_act_pool_fake, lambda x, w, *rest: _flops(x, w, rest[6])
)
affine = _register("affine", _affine, _affine_fake)
chain = _register("chain", _chain, _chain_fake)
unit_forward = _register("unit_forward", _unit_forward, _unit_forward_fake, repeated=True)
squeezed_forward = _register(
    "squeezed_forward",
    _squeezed_forward,
    _squeezed_forward_fake,
    lambda x, x_stats, w, *rest: _flops(x, w, rest[10]),
    repeated=True,
)
pool_forward = _register("pool_forward", _pool_forward, _pool_forward_fake)
join_forward = _register("join_forward", _join_forward, _join_forward_fake)
norm_forward = _register("norm_forward", _norm_forward, _norm_forward_fake)
preact_conv = _register(
    "preact_conv", _preact_conv, _preact_conv_fake, lambda x, x_stats, w, *rest: _flops(x, w, rest[8])
)
raw_sum = _register("raw_sum", _raw_sum, _raw_sum_fake)


def _batchable(name: str, call: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """``call``, which calls the operator; for gradients that are several at once, which ``is_grads_batched`` makes,
    one by one.

    PyTorch batches those by an older vmap, for which an operator cannot have a rule; for ``torch.vmap`` it has.
    """

    def one_by_one(each: list[list[Any]]) -> list[Tensor]:
        results = [gradients_of(*arguments) for arguments in each]
        return [torch.stack(gradients) for gradients in zip(*results, strict=True)]

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[list[Tensor], list[int]]:
        each = [
            [_selected(value, dims, i) for value, dims in zip(arguments, in_dims, strict=True)]
            for i in range(info.batch_size)
        ]
        stacked = one_by_one(each)
        return stacked, [0] * len(stacked)

    torch.library.register_vmap(f"resnet_fused::{name}", rule, lib=_library)

    def gradients_of(*arguments: Any) -> list[Tensor]:
        functorch = torch._C._functorch
        tensors = [] if torch.compiler.is_compiling() else [a for a in arguments if isinstance(a, Tensor)]
        if any(map(functorch.is_batchedtensor, tensors)):
            return cast(list[Tensor], getattr(torch.ops.resnet_fused, name)(*arguments))
        if not any(map(functorch.is_legacy_batchedtensor, tensors)):
            return call(*arguments)
        level = max(torch._C._vmapmode_increment_nesting() - 1, 1)  # autograd's own threads are at no level
        torch._C._vmapmode_decrement_nesting()
        legacy = [isinstance(a, Tensor) and functorch.is_legacy_batchedtensor(a) for a in arguments]
        several = [
            torch._remove_batch_dim(a, level, 0, 0).unbind() if among else None
            for a, among in zip(arguments, legacy, strict=True)
        ]
        each = [
            [a if parts is None else parts[i] for a, parts in zip(arguments, several, strict=True)]
            for i in range(next(len(parts) for parts in several if parts is not None))
        ]
        if any(functorch.is_legacy_batchedtensor(a) for a in each[0] if isinstance(a, Tensor)):
            raise NotImplementedError("fused residual blocks take batched gradients at one level, not nested ones")
        return [torch._add_batch_dim(gradients, 0, level) for gradients in one_by_one(each)]

    return gradients_of


residual_backward = _batchable(
    "residual_backward", _register("residual_backward", _residual_backward, _residual_backward_fake, repeated=True)
)
gate_backward = _batchable("gate_backward", _register("gate_backward", _gate_backward, _gate_backward_fake))
squeezed_backward = _batchable(
    "squeezed_backward", _register("squeezed_backward", _squeezed_backward, _squeezed_backward_fake, repeated=True)
)
preact_backward = _batchable(
    "preact_backward", _register("preact_backward", _preact_backward, _preact_backward_fake, repeated=True)
)
