"""A training step three ways: in fp64, by eager PyTorch and by ours, and the comparison of everything it leaves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resnet_fused import functional, implementation
from tests.rule import assert_within_rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Stem(nn.Module):
    """What a ResNet begins with; for fp32. In 16 bits values of a window are equal that are not in fp64."""

    def __init__(self, channels: int = 12, filter_size: int = 3, bias: bool = False, **norm: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, filter_size, 2, filter_size // 2, bias=bias)
        self.bn, self.pool = nn.BatchNorm2d(channels, **norm), nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv_bn_act_pool(x, self.conv, self.bn, self.pool)


def draw(
    build: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[nn.Module, Tensor, Tensor]:
    """A block, an input and a gradient of its output such that no input of a ReLU lies within rounding of zero.

    There, roundings decide whether a gradient passes, and no two implementations agree.
    """
    margin = max(4 * torch.finfo(dtype).eps, 1e-4)
    for seed in range(20):
        torch.manual_seed(seed)
        block = build().to(DEVICE)
        randomise(block)
        block.to(dtype)
        x = torch.randn(shape, device=DEVICE).to(dtype)
        move_norms(block, x, margin)
        if smallest_relu_input(block, x) > margin:
            with torch.no_grad(), implementation("eager"):
                z = copy.deepcopy(block)(x)
            return block, x, torch.randn_like(z)
    raise AssertionError("no seed keeps every input of an activation away from its limits")


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


def move_norms(block: nn.Module, x: Tensor, margin: float) -> None:
    """Change the shifts of the batch norms until hardly an input of a ReLU is left within ``margin`` of zero."""
    twin = copy.deepcopy(block).double()
    with torch.no_grad(), implementation("eager"), _MovedNorms(4 * margin):
        twin(x.double())
    with torch.no_grad():
        for moved, own in zip(twin.modules(), block.modules(), strict=True):
            if isinstance(own, nn.BatchNorm2d) and own.bias is not None:
                own.bias.copy_(moved.bias)


class _MovedNorms(TorchFunctionMode):
    """Puts zero into a gap, ``width`` wide, of the inputs of each ReLU: by the shift of the batch norm before it."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width
        self.shift: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            self.shift = kwargs["bias"]
        if func is F.relu and self.shift is not None:
            gap = self._nearest_gap(args[0].transpose(0, 1).flatten(1))
            self.shift -= gap
            args = (args[0] - gap[:, None, None], *args[1:])
        return func(*args, **(kwargs or {}))

    def _nearest_gap(self, values: Tensor) -> Tensor:
        """The centre of the gap nearest to zero in each row; the ends are open."""
        least, most = values.amin(1, keepdim=True) - self.width, values.amax(1, keepdim=True) + self.width
        ordered = torch.cat([least, values, most], 1).sort(1).values
        centres, widths = (ordered[:, 1:] + ordered[:, :-1]) / 2, ordered.diff()
        distance = centres.abs().masked_fill(widths < 0.999 * self.width, math.inf)
        return centres.gather(1, distance.argmin(1, keepdim=True))[:, 0]


LIMITS = {F.relu: (0.0,), F.leaky_relu: (0.0,), F.hardswish: (-3.0, 3.0)}
"""Where the derivative of an activation jumps; that of F.hardtanh where its arguments say."""


class WatchedReLU(TorchFunctionMode):
    """Notes the inputs of every ReLU, and of other activations whose derivatives jump; from where they do."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        limits = args[1:3] if func is F.hardtanh else LIMITS.get(func, ())
        self.inputs += [args[0] - limit for limit in limits]
        return func(*args, **(kwargs or {}))


def smallest_relu_input(block: nn.Module, x: Tensor) -> float:
    with torch.no_grad(), implementation("eager"), WatchedReLU() as watch:
        copy.deepcopy(block).double()(x.double())
    return min((v.abs().min().item() for v in watch.inputs), default=math.inf)


Through = Callable[[nn.Module], Callable[[Tensor], Tensor]]
"""What a block is called through: itself, a compiler, checkpointing."""


def step(
    block: nn.Module, x: Tensor, dz: Tensor, road: str, through: Through = lambda block: block
) -> dict[str, Tensor]:
    """One forward and backward of a copy of ``block``, which spares ``dz``; everything that it leaves, by name."""
    block, x = copy.deepcopy(block), x.clone().requires_grad_()
    with implementation(road):
        z = through(block)(x)
        given = dz.to(z.dtype, copy=True)
        z.backward(given)
    torch.testing.assert_close(given, dz.to(z.dtype), rtol=0, atol=0, equal_nan=True)
    left = {"z": z.detach(), "x.grad": x.grad}
    left |= {f"{name}.grad": p.grad for name, p in block.named_parameters() if p.grad is not None}
    return left | dict(block.named_buffers())


def check(
    block: nn.Module, x: Tensor, dz: Tensor, road: str, sums: int = 16, through: Through = lambda block: block
) -> None:
    """Ours against fp64 by the rule of twice eager's error, for the output, every gradient and every buffer.

    ``sums``: see :func:`resnet_fused.engine.tolerance.error_ratio`.
    """
    exact = step(copy.deepcopy(block).double(), x.double(), dz.double(), "eager", through)
    eager, ours = step(block, x, dz, "eager", through), step(block, x, dz, road, through)
    assert exact.keys() == eager.keys() == ours.keys()
    for name, value in exact.items():
        if value.dtype == torch.int64:
            assert ours[name] == value, name
            continue
        try:
            assert_within_rule(ours[name], eager[name], value, sums)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
