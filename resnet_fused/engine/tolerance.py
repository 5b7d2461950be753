"""Whether results are right: what they are compared with, and how far off they may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def error_ratio(ours: Tensor, eager: Tensor, exact: Tensor, sums: int = 0) -> float:
    """The error of ``ours`` over the error that it may have: right is what is at most 1.

    ``ours`` and ``eager`` have one shape and dtype, ``exact`` is fp64. An error is the largest difference from
    ``exact`` over the tensor; allowed is ``2*error(eager) + tiny``, where ``tiny`` is one rounding of the largest value
    and ``sums`` roundings of it in fp32: how many sums in a row lie behind the result, which the kernels and PyTorch on
    a GPU take in fp32, but PyTorch on a CPU in fp64.

    NaN and infinity are right where ``exact``, rounded to the dtype, has the same, and infinitely wrong elsewhere; so
    is everything where ``eager`` has them and ``exact`` has not, which leaves nothing to compare with.

    Raises ValueError for tensors that do not compare.
    """
    if not ours.shape == eager.shape == exact.shape:
        raise ValueError(
            f"ours, eager and exact must have one shape; got {tuple(ours.shape)}, {tuple(eager.shape)} and "
            f"{tuple(exact.shape)}"
        )
    if ours.dtype != eager.dtype or exact.dtype != torch.float64 or not exact.numel():
        raise ValueError(
            f"ours and eager must have one dtype, exact float64, and an element at least; got {ours.dtype}, "
            f"{eager.dtype}, {exact.dtype} and shape {tuple(exact.shape)}"
        )
    rounding = torch.finfo(ours.dtype).eps + sums * torch.finfo(torch.float32).eps
    # What the dtype cannot hold is right as infinity; what it can hold stays as it is.
    exact = torch.where(exact.to(ours.dtype).isinf(), exact.to(ours.dtype).double(), exact)
    tiny = rounding * torch.where(exact.isfinite(), exact, 0.0).abs().max().item()
    error, allowed = _error(ours, exact), 2 * _error(eager, exact) + tiny
    if error == 0:
        return 0.0 if math.isfinite(allowed) else math.inf
    return error / allowed if 0 < allowed < math.inf else math.inf


def _error(got: Tensor, exact: Tensor) -> float:
    got = got.double()
    agree = (got == exact) | (got.isnan() & exact.isnan())
    return torch.where(agree, 0.0, (got - exact).abs()).nan_to_num(nan=math.inf, posinf=math.inf).max().item()


Results = dict[str, Tensor]


def references(expected: Callable[[torch.dtype], Results], dtype: torch.dtype, tf32: bool) -> tuple[Results, Results]:
    """What results are compared with: ``expected`` in fp64, and as eager PyTorch computes it in ``dtype``.

    ``tf32``: each result is the one with the larger error of two, of PyTorch as it is with TF32 allowed, and with the
    factors of its convolutions cut to TF32: what cuDNN does for a shape depends on its version and the GPU.
    """
    with deterministic():
        with products(tf32=False):
            exact = expected(torch.float64)
            with _Tf32Factors() if tf32 else nullcontext():
                eager = expected(dtype)
        if not tf32:
            return exact, eager
        with products(tf32=True):
            own = expected(dtype)
    return exact, {name: max(eager[name], own[name], key=partial(_error, exact=exact[name])) for name in exact}


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's own convolutions are the same in every run."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Let convolutions in fp32 use TF32, or not."""
    cudnn = torch.backends.cudnn
    conv = cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    try:
        allowed = cudnn.allow_tf32
    except RuntimeError:  # which cannot be read once the newer setting was used
        allowed = None
    conv.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        if allowed is None:
            conv.fp32_precision = before
        else:
            cudnn.allow_tf32 = allowed


class _Tf32Factors(TorchDispatchMode):
    """Cuts the factors of every convolution to TF32's ten bits, as tensor cores do."""

    FACTORS: ClassVar = {torch.ops.aten.convolution.default: 2, torch.ops.aten.convolution_backward.default: 3}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        count = self.FACTORS.get(func, 0)
        return func(*map(cut, args[:count]), *args[count:], **(kwargs or {}))


def cut(t: Tensor) -> Tensor:
    """``t`` in fp32 without the bits that TF32 has not."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)
