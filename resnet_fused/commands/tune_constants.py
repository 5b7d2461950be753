"""Measure what the plan's model takes for granted about a GPU, in seconds: bandwidth, products, launches, the host."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused import functional
from resnet_fused.engine.request import implementation
from resnet_fused.kernels.gpus import GPU
from resnet_fused.plan.constants import FORMATS, WIDTHS, Constants
from resnet_fused.plan.decide import ROADS
from resnet_fused.plan.problem import DTYPES

ROUNDS = 7
COPIED = 256 << 20
"""Bytes of the tensor that is copied: more than any L2 holds."""
LAUNCHES = 100
IMAGES, PIXELS = 256, 56 * 56 * 64
"""Of the convolutions: a batch that fills any GPU, and pixels times channels, as in ResNet-50's stages."""

Work = Callable[[], Any]


class Clock(Protocol):
    """Seconds of calls on ``device``."""

    device: torch.device

    def prepare(self, work: Work) -> Work:
        """What to time in place of ``work``: warm, and cheap to launch."""

    def seconds(self, work: Work) -> float:
        """How long the device takes for one call."""

    def host_seconds(self, work: Work) -> float:
        """How long the host takes for one call that the device does not hold up."""


def measure(gpu: GPU, clock: Clock) -> Constants:
    """What the clock's device reaches of the nominal peaks of ``gpu``: medians of ROUNDS calls."""
    tensor = {name: _product(name, clock) / (gpu.tensor[name] * 1e12) for name in FORMATS}
    peak = tensor["bfloat16"] * gpu.tensor["bfloat16"] * 1e12
    by_width = {width: _convolution(width, clock) / peak for width in WIDTHS}
    return Constants(
        memory_of_peak=_copy(clock) / (gpu.memory * 1e9),
        tensor_of_peak=tensor,
        cudnn_of_peak=by_width[WIDTHS[-1]],
        cudnn_by_width=by_width,
        launch_seconds=_launch(clock),
        host_seconds=_host(clock),
    )


def _median(clock: Clock, work: Work) -> float:
    ready = clock.prepare(work)
    return statistics.median(clock.seconds(ready) for _ in range(ROUNDS))


def _copy(clock: Clock) -> float:
    """Bytes per second, read and written."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=clock.device)
    return 2 * COPIED / _median(clock, source.clone)


def _product(number_format: str, clock: Clock) -> float:
    """FLOP/s of a large square product; of random numbers, since tensor cores are faster with zeros."""
    dtype = DTYPES.get(number_format, torch.float32)
    n = 8192 if dtype.itemsize == 2 else 4096
    a = torch.empty(n, n, dtype=dtype, device=clock.device).normal_()
    with _matmul("tf32" if number_format == "tf32" else "ieee"):
        return 2 * n**3 / _median(clock, lambda: a @ a)


@contextmanager
def _matmul(precision: str) -> Iterator[None]:
    """Let products in fp32 be of that precision."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _convolution(width: int, clock: Clock) -> float:
    """FLOP/s of cuDNN's 3x3 convolution of ``width`` channels in bf16."""
    side = round((PIXELS / width) ** 0.5 / 7) * 7
    with clock.device:
        x, w = torch.empty(IMAGES, width, side, side), torch.empty(width, width, 3, 3)
    x, w = (t.normal_().to(torch.bfloat16, memory_format=torch.channels_last) for t in (x, w))
    with _tried_out():
        seconds = _median(clock, lambda: F.conv2d(x, w, padding=1))
    return 2 * IMAGES * side**2 * 9 * width**2 / seconds


@contextmanager
def _tried_out() -> Iterator[None]:
    """Let cuDNN try its algorithms. (``cudnn.flags`` cannot be read once the newer setting of TF32 was used.)"""
    cudnn: Any = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


def _launch(clock: Clock) -> float:
    """Seconds from the start of a kernel that does next to nothing to the start of the next."""
    t = torch.zeros(32, device=clock.device)

    def work() -> None:
        for _ in range(LAUNCHES):
            t.add_(1)

    return _median(clock, work) / LAUNCHES


def _host(clock: Clock) -> dict[str, float]:
    """Seconds of the host for a unit in inference, and for its forward and backward, by the way that it runs."""
    with clock.device:
        bn, conv = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1, bias=False)
        conv.to(memory_format=torch.channels_last)
        x = torch.zeros(1, 16, 8, 8).to(memory_format=torch.channels_last)
        g = torch.zeros_like(x)
    inputs = x.detach().requires_grad_(), *conv.parameters(), *bn.parameters()

    def inference() -> None:
        with torch.no_grad():
            functional.conv_bn_act(x, conv, bn)

    def training() -> None:
        with torch.enable_grad():
            torch.autograd.grad(functional.conv_bn_act(inputs[0], conv, bn), inputs, g)

    found: dict[str, float] = {}
    for unit in (inference, training):
        bn.train(unit is training)
        for request, way in ROADS.items():
            with implementation(request):
                found[f"{way} {unit.__name__}"] = clock.host_seconds(unit)
    return found
