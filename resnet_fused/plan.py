"""Which implementation runs, and why not the fused one, in words."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from resnet_fused.kernels.launch import dry_running

logger = logging.getLogger("resnet_fused")

IMPLEMENTATIONS = ("auto", "triton", "mixed", "eager")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)
MAX_FILTER = 7


def _checked(name: str, source: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, IMPLEMENTATIONS))}; got {name!r}")
    return name


_requested: ContextVar[str] = ContextVar(
    "resnet_fused_implementation",
    default=_checked(os.environ.get("RESNET_FUSED", "auto"), "the environment variable RESNET_FUSED"),
)


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Force a road inside the ``with`` block, for this thread or task.

    ``"triton"`` launches the kernels on whatever tensors come (on CPU tensors: in Triton's interpreter under
    ``TRITON_INTERPRET=1``), convolutions included. ``"mixed"`` does the same, but leaves the convolutions to PyTorch.
    ``"eager"`` runs PyTorch's own operators. ``"auto"`` (the default, or what the environment variable
    ``RESNET_FUSED`` says) launches the kernels on CUDA tensors, chooses per unit who convolves (see
    :func:`choose`), and runs eager elsewhere.

    Raises ValueError for any other name.
    """
    token = _requested.set(_checked(name, "implementation"))
    try:
        yield
    finally:
        _requested.reset(token)


def tf32(dtype: torch.dtype) -> bool:
    """Whether a convolution in ``dtype`` may round its factors to TF32: as cuDNN may.

    Reads what both ``torch.backends.cudnn.allow_tf32`` and the newer ``cudnn.conv.fp32_precision`` set: the former can
    not be read once the latter was used.
    """
    return dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def requested() -> str:
    """The implementation in force: ``"auto"``, ``"triton"``, ``"mixed"`` or ``"eager"``."""
    return _requested.get()


def choose(conv: nn.Conv2d, training: bool) -> str:
    """Who computes a unit that the kernels can take: ``"fused"``, ``"mixed"`` (PyTorch convolves) or ``"eager"``.

    A convolution of R x S taps and C channels does ``R*S*C/2`` operations per byte of 16-bit activations. Up to some
    300, about what a GPU does in the time that it moves a byte, memory is what fusion must save. Above, arithmetic
    decides, and in training a prologue would cost it more than the passes over memory that it saves.
    """
    request = requested()
    if request != "auto":
        return "fused" if request == "triton" else request
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    per_byte = taps * conv.in_channels // conv.groups / 2
    return "fused" if not training or taps == 1 or max(conv.stride) > 1 or per_byte < 300 else "mixed"


FORCED = "implementation('eager') is in force"
NO_GPU = "the input is not on a CUDA GPU"


def why_eager(x: Tensor) -> str | None:
    """Why a unit whose input is ``x`` cannot be fused where it stands, or None if it can."""
    request = requested()
    if request == "eager":
        return FORCED
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    if request == "auto":
        if dry_running():
            return None
        if not x.is_cuda:
            return NO_GPU
        if (found := torch.cuda.get_device_capability(x.device)) < MIN_CAPABILITY:
            return f"the GPU has compute capability {found[0]}.{found[1]}: the kernels need 8.0 or newer"
    return None


_reported: set[str] = set()


def report_once(reason: str) -> None:
    """Log why a unit is not fused, the first time that ``reason`` comes up, unless it was to be expected."""
    if reason not in (FORCED, NO_GPU) and reason not in _reported and not torch.compiler.is_compiling():
        _reported.add(reason)
        logger.warning("runs eager: %s", reason)
