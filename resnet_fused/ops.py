"""The operator boundary: kernels as ``torch.library`` operators with fakes of exact strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused import plan
from resnet_fused.kernels.conv_forward import Norm, conv_forward, output_size
from resnet_fused.kernels.launch import dry_running

_library = torch.library.Library("resnet_fused", "DEF")
_library.define(
    "conv_bn_act(Tensor x, Tensor w, Tensor? bias, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, "
    "Tensor? residual, int residual_step, int residual_before, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups, bool relu, ScalarType out_dtype) -> Tensor"
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
    residual: Tensor | None,
    residual_step: int,
    residual_before: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    with torch.cuda.device_of(x):
        return conv_forward(
            x,
            w,
            stride=(stride[0], stride[1]),
            padding=(padding[0], padding[1]),
            dilation=(dilation[0], dilation[1]),
            groups=groups,
            bias=bias,
            norm=Norm(mean, var, gamma, beta, eps),
            residual=residual,
            residual_step=residual_step,
            residual_before=residual_before,
            relu=relu,
            tf32=plan.tf32(x.dtype),
            out_dtype=out_dtype,
        )


def _conv_bn_act_fake(x: Tensor, w: Tensor, *arguments: Any) -> Tensor:
    if dry_running():
        return _conv_bn_act(x, w, *arguments)
    stride, padding, dilation, out_dtype = *arguments[9:12], arguments[14]
    p, q = (output_size(x.shape[2 + i], w.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    shape = (x.shape[0], w.shape[0], p, q)
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)


_library.impl("conv_bn_act", _conv_bn_act, "CompositeExplicitAutograd")
torch.library.register_fake("resnet_fused::conv_bn_act", _conv_bn_act_fake, lib=_library)

conv_bn_act = torch.ops.resnet_fused.conv_bn_act.default
