"""Whether results are right, and the note of the GPUs and versions on which the self-test found them so."""

from __future__ import annotations

import ctypes
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import plan, tuned

logger = logging.getLogger("resnet_fused")

COMMAND = "python -m resnet_fused check"


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

    ``tf32``: the factors of its convolutions are cut to TF32, for every shape: where cuDNN does so itself depends on
    its version and the GPU.
    """
    with deterministic(), products(tf32=False):
        exact = expected(torch.float64)
        with _Tf32Factors() if tf32 else nullcontext():
            return exact, expected(dtype)


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


def stack(device: torch.device) -> dict[str, str]:
    """What compiled code on ``device`` depends on: its GPU and driver ("" for the CPU) and the software's versions."""
    on_gpu = device.type == "cuda"
    gpu = {"gpu": torch.cuda.get_device_name(device) if on_gpu else "", "driver": _driver() if on_gpu else ""}
    return gpu | tuned.versions()


@cache
def _driver() -> str:
    """The version of NVIDIA's driver, which compiles nothing but loads everything; "unknown" where NVML is missing."""
    text = ctypes.create_string_buffer(80)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlSystemGetDriverVersion(text, len(text)) != 0:
        return "unknown"
    return text.value.decode()


def verified(device: torch.device) -> bool:
    """Whether the self-test passed on the :func:`stack` of ``device`` before, as :func:`note` wrote it down."""
    return stack(device) in _noted()


def note(device: torch.device) -> Path:
    """Write down that the self-test passed on the :func:`stack` of ``device``; returns the file.

    Raises OSError where it cannot be written.
    """
    path = _note_path()
    with tuned.locked(path):
        stacks = [known for known in _noted() if known != stack(device)] + [stack(device)]
        tuned.write_whole(path, json.dumps(stacks, indent=1))
    return path


def _note_path() -> Path:
    return tuned.cache_dir() / "checked.json"


def _noted() -> list[object]:
    """The stacks in the file; none if it is missing or corrupt, which costs no more than another self-test."""
    try:
        stacks = json.loads(tuned.read(_note_path()))
    except (OSError, ValueError, RecursionError):
        return []
    return stacks if isinstance(stacks, list) else []


_reminded = False


def remind_once(model: nn.Module) -> None:
    """Log, the first time that ``model`` lies on a GPU on which the self-test has not passed yet, how to run it."""
    global _reminded
    if _reminded or not torch.cuda.is_available():
        return
    device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    if device is None or torch.cuda.get_device_capability(device) < plan.MIN_CAPABILITY or verified(device):
        return
    _reminded = True
    name = torch.cuda.get_device_name(device)
    logger.warning("the kernels were not checked yet on this %s with these versions: run `%s`", name, COMMAND)
