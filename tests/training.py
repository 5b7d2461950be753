"""A training step three ways: in fp64, by eager PyTorch and by ours, and the comparison of everything it leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resnet_fused import implementation
from tests.rule import assert_within_rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(
    build: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[nn.Module, Tensor, Tensor]:
    """A block, an input and a gradient of its output such that no input of a ReLU lies within rounding of zero.

    There, one rounding decides whether a gradient passes, and no two implementations agree.
    """
    margin = 2 * torch.finfo(dtype).eps
    for seed in range(500):
        torch.manual_seed(seed)
        block = build().to(DEVICE)
        randomise(block)
        block.to(dtype)
        x = torch.randn(shape, device=DEVICE).to(dtype)
        if smallest_relu_input(block, x) > margin:
            with torch.no_grad(), implementation("eager"):
                z = copy.deepcopy(block)(x)
            return block, x, torch.randn_like(z)
    raise AssertionError("no seed keeps every input of a ReLU away from zero")


def randomise(block: nn.Module) -> None:
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                if module.weight is not None:
                    module.weight.normal_(0, 1)
                    module.bias.normal_(0, 0.5)
                if module.running_mean is not None:
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)


class _Watch(TorchFunctionMode):
    """Notes the smallest magnitude that goes into a ReLU."""

    smallest = float("inf")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.relu:
            self.smallest = min(self.smallest, args[0].abs().min().item())
        return func(*args, **(kwargs or {}))


def smallest_relu_input(block: nn.Module, x: Tensor) -> float:
    with torch.no_grad(), implementation("eager"), _Watch() as watch:
        copy.deepcopy(block).double()(x.double())
    return watch.smallest


def step(block: nn.Module, x: Tensor, dz: Tensor, road: str) -> dict[str, Tensor]:
    """One forward and backward of a copy of ``block``; everything that it leaves, by name."""
    block, x = copy.deepcopy(block), x.clone().requires_grad_()
    with implementation(road):
        z = block(x)
        z.backward(dz.to(z.dtype))
    left = {"z": z.detach(), "x.grad": x.grad}
    left |= {f"{name}.grad": p.grad for name, p in block.named_parameters() if p.grad is not None}
    return left | dict(block.named_buffers())


def check(block: nn.Module, x: Tensor, dz: Tensor, road: str) -> None:
    """Ours against fp64 by the rule of twice eager's error, for the output, every gradient and every buffer."""
    exact = step(copy.deepcopy(block).double(), x.double(), dz.double(), "eager")
    eager, ours = step(block, x, dz, "eager"), step(block, x, dz, road)
    assert exact.keys() == eager.keys() == ours.keys()
    for name, value in exact.items():
        if value.dtype == torch.int64:
            assert ours[name] == value, name
            continue
        try:
            assert_within_rule(ours[name], eager[name], value, sums=16)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
