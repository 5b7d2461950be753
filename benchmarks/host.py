"""What the host takes for a unit until its kernels are launched: ``python -m resnet_fused.benchmarks.host``.

The tensors are so small that a GPU waits for the host. Without a GPU, kernels are launched on a stand-in, which leaves
out what CUDA takes for a launch; and eager PyTorch runs on the CPU, where it computes a little and launches nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnet_fused import Bottleneck, fuse, implementation
from resnet_fused.commands.machine import describe
from resnet_fused.kernels.conv_forward import conv_forward
from resnet_fused.kernels.launch import TileConfig, interpreting
from resnet_fused.plan.problem import Request
from resnet_fused.table import render

from . import stand_in

BLOCKS, ROUNDS, REPEATS, LAUNCHES = 16, 30, 5, 48
ROADS: tuple[Request, ...] = ("eager", "triton", "mixed")


def main() -> int:
    """Print the table; returns 0."""
    if interpreting():
        print("the kernels are interpreted here: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    if device.type == "cpu":
        stand_in.install(90, lambda *arguments: None)
    rows = [(road, *(round(_microseconds(road, training, device), 1) for training in (False, True))) for road in ROADS]
    title = f"Microseconds of the host per unit of {BLOCKS} bottlenecks, fp32, median of {ROUNDS}"
    print(render(title, ["implementation", "inference", "forward and backward"], rows))
    print(f"a convolution whose sum is split takes {_second_launch(device):.1f} microseconds longer")
    if device.type == "cpu":  # the plan of a GPU has no chain for so few channels
        one, all_blocks, unit = _fused(1, device), _fused(BLOCKS, device), _microseconds("triton", False, device)
        three, two = (all_blocks - one) / (BLOCKS - 1), one - unit
        print(f"a live chain of three convolutions takes {three:.1f} microseconds, one of two {two:.1f}")
    print("\n".join(f"{name}: {value}" for name, value in describe(device).items()))
    return 0


def _microseconds(road: Request, training: bool, device: torch.device) -> float:
    blocks, x = _blocks(BLOCKS, device)
    blocks.train(training)
    x.requires_grad_(training)
    with implementation(road), torch.set_grad_enabled(training):
        return 1e6 / (3 * BLOCKS) * _seconds(lambda: _step(blocks, x), device)


def _fused(count: int, device: torch.device) -> float:
    """Microseconds of so many blocks in a sequence: one convolution, chains of three, and at the end one of two."""
    blocks, x = _blocks(count, device)
    fuse(blocks.eval())
    with implementation("triton"), torch.no_grad():
        return 1e6 * _seconds(lambda: _step(blocks, x), device)


def _blocks(count: int, device: torch.device) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    with device:
        blocks = nn.Sequential(*(Bottleneck(16, 4) for _ in range(count)))
        x = torch.randn(2, 16, 2, 2)
    return blocks.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


def _second_launch(device: torch.device) -> float:
    """Microseconds that a split sum adds to a convolution: its launch, and memory for the parts."""
    with device:
        x, w = torch.randn(2, 32, 2, 2), torch.randn(32, 32, 1, 1)
    x = x.to(memory_format=torch.channels_last)

    def seconds(splits: int) -> float:
        tile = TileConfig(16, 16, 16, splits=splits)

        def work() -> None:
            for _ in range(LAUNCHES):
                conv_forward(x, w, config=tile)

        return _seconds(work, device)

    return 1e6 / LAUNCHES * (seconds(2) - seconds(1))


def _step(blocks: nn.Module, x: Tensor) -> None:
    z = blocks(x)
    if z.requires_grad:
        z.backward(z)
        for parameter in blocks.parameters():
            parameter.grad = None


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    def timed() -> float:
        start = time.perf_counter()
        for _ in range(REPEATS):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / REPEATS

    timed()
    return statistics.median(timed() for _ in range(ROUNDS))


if __name__ == "__main__":
    sys.exit(main())
