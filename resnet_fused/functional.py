"""The public door: arguments are checked, autocast is followed and memory layout is settled here, and nowhere below."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from resnet_fused import ops, plan, reference
from resnet_fused.reference import PaddedIdentity

__all__ = ["PaddedIdentity", "conv_bn_act"]


def conv_bn_act(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    residual: Tensor | PaddedIdentity | None = None,
    relu: bool = True,
) -> Tensor:
    """``relu(bn(conv(x)) + residual)`` in one launch; the residual and the ReLU are optional.

    ``x``: [N, CI, H, W], fp32, fp16 or bf16, any memory format. ``residual``: a tensor of the output's shape
    [N, CO, P, Q], or a :class:`PaddedIdentity`. Returns [N, CO, P, Q] in channels_last, in the dtype that the same
    modules would return (autocast included).

    Units that cannot be fused as they stand (training mode, gradients needed, unsupported arguments, hooks on the
    modules) run ``conv`` and ``bn`` themselves, and the reason is logged once.

    Raises TypeError or ValueError for arguments that do not fit each other.
    """
    _check(x, conv, bn, residual)
    if (reason := why_eager(x, [(conv, bn)])) is not None:
        plan.report_once(reason)
        return reference.conv_bn_act(x, conv, bn, residual, relu)
    return launch(x, conv, bn, residual, relu)


def why_eager(x: Tensor, units: Iterable[tuple[nn.Module, nn.Module]]) -> str | None:
    """Why a chain of (convolution, batch norm) ``units`` on input ``x`` runs eager as things stand, or None."""
    if (reason := plan.why_eager(x)) is not None:
        return reason
    if x.dtype not in plan.DTYPES:
        return f"the input is {x.dtype}: the kernels take float32, float16 and bfloat16"
    recording = torch.is_grad_enabled()
    if recording and x.requires_grad:
        return "the input requires gradients"
    for conv, bn in units:
        if (reason := why_unfusable(conv, bn)) is not None:
            return reason
        if bn.training or bn.running_mean is None:
            return "batch norm uses the statistics of the batch (training mode, or none are tracked)"
        if recording and any(p.requires_grad for m in (conv, bn) for p in m._parameters.values() if p is not None):
            return "parameters require gradients and gradients are enabled (serve under torch.inference_mode())"
    return None


def why_unfusable(conv: nn.Module, bn: nn.Module) -> str | None:
    """Why the modules of a unit rule the kernels out whatever their input (types, hooks, padding ...), or None."""
    if type(conv) is not nn.Conv2d:
        return f"the convolution is {_named(conv)}, not torch.nn.Conv2d itself"
    if type(bn) is not nn.BatchNorm2d:
        return f"the normalisation is {_named(bn)}, not torch.nn.BatchNorm2d itself"
    if hooked(conv) or hooked(bn):
        return "hooks, or a forward of its own, are set on the convolution or the batch norm"
    if conv.padding_mode != "zeros":
        return f"the convolution has padding_mode={conv.padding_mode!r}"
    if max(conv.kernel_size) > plan.MAX_FILTER:
        return f"the filter is {conv.kernel_size[0]}x{conv.kernel_size[1]}: the kernels go up to 7x7"
    if conv.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        return "padding='same' pads one side more than the other"
    return None


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` would run hooks or a forward set on the instance, which fusing would bypass."""
    return "forward" in vars(module) or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
    )


def launch(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    residual: Tensor | PaddedIdentity | None = None,
    relu: bool = True,
) -> Tensor:
    """:func:`conv_bn_act` for a unit that :func:`why_eager` has already cleared."""
    device, dtype = x.device.type, x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    res, step, before = residual if isinstance(residual, PaddedIdentity) else (residual, 1, 0)
    assert bn.running_mean is not None and bn.running_var is not None
    return ops.conv_bn_act(
        channels_last(x.to(dtype)),
        channels_last(conv.weight.to(dtype)),
        conv.bias,
        bn.running_mean,
        bn.running_var,
        bn.weight,
        bn.bias,
        bn.eps,
        None if res is None else channels_last(res),
        step,
        before,
        conv.stride,
        _padding(conv),
        conv.dilation,
        conv.groups,
        relu,
        dtype if res is None else torch.promote_types(dtype, res.dtype),
    )


def _padding(conv: nn.Conv2d) -> tuple[int, ...]:
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return tuple(int(p) for p in conv.padding)


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
    _check_residual(output_shape(x, conv), residual)


def output_shape(x: Tensor, conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Shape [N, CO, P, Q] of ``conv(x)``."""
    padding = _padding(conv)
    p, q = (
        ops.output_size(x.shape[2 + i], conv.kernel_size[i], conv.stride[i], padding[i], conv.dilation[i])
        for i in (0, 1)
    )
    return x.shape[0], conv.out_channels, p, q


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
