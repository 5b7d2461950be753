"""Eager's outcome in unusual situations: values, gradients, statistics and errors, whatever was done to the modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from resnet_fused import fuse, implementation
from tests.training import randomise

pytestmark = pytest.mark.usefixtures("on_device")


def projection(ci: int, co: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))


def basic() -> nn.Module:
    return BasicBlock(8, 8)


def projected() -> nn.Module:
    return BasicBlock(8, 12, 2, projection(8, 12, 2))


def sequence() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 1))


BUILDS = [basic, projected, sequence]


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def outcome(model: nn.Module, x: Tensor, road: str) -> dict[str, Any]:
    """What one step leaves: output, gradients and buffers, or the type of the error; and the buffers then."""
    x = x.detach().requires_grad_() if x.is_floating_point() or x.is_complex() else x
    with implementation(road):
        try:
            z = model(x)
            left = {"z": z.detach(), "dtype": z.dtype}
            if z.requires_grad:
                torch.manual_seed(1)
                z.backward(torch.randn(z.shape).to(z.dtype))
                left |= {f"{name}.grad": p.grad for name, p in model.named_parameters()} | {"x.grad": x.grad}
        except Exception as error:
            left = {"error": type(error)}
    return left | {name: b.clone() for name, b in model.named_buffers()}


def assert_same(ours: dict[str, Any], eager: dict[str, Any]) -> None:
    assert ours.get("error") == eager.get("error")
    assert ours.keys() == eager.keys()
    for name, value in eager.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(
                ours[name],
                value,
                rtol=2e-4,
                atol=2e-4,
                equal_nan=True,
                check_stride=False,
                msg=lambda m, n=name: f"{n}: {m}",
            )
        else:
            assert ours[name] == value, name


def compare(build: Callable[[], nn.Module], change: Callable[[nn.Module], Any], x: Tensor, training: bool) -> None:
    torch.manual_seed(0)
    model = build()
    randomise(model)
    fuse(model.train(training))

    def changed() -> nn.Module:
        """A copy that is changed itself: what is copied has negative bits no more."""
        torch.manual_seed(1)
        twin = copy.deepcopy(model)
        change(twin)
        return twin

    for road in ("triton", "mixed"):
        assert_same(outcome(changed(), x, road), outcome(changed(), x, "eager"))


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 8, 5, 6)))


def gap(v: Tensor) -> Tensor:
    """The same values as every other element of a larger tensor."""
    return torch.stack([v, v + 1], 1)[:, 0]


def negative(t: Tensor) -> Tensor:
    """The same values as a view with the negative bit."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def only_negative(t: Tensor) -> Tensor:
    """The same, laid out as the kernels take it: nobody copies it for another reason."""
    return torch._neg_view(-(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t))


def replace(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Set what was a parameter or a buffer to a plain attribute."""
    delattr(module, name)
    setattr(module, name, tensor)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda m: None,
    "a batch norm of more features": lambda m: norms(m)[0].__init__(16),
    "a batch norm of fewer features": lambda m: norms(m)[0].__init__(4),
    "a cut running mean": lambda m: norms(m)[0].register_buffer("running_mean", torch.zeros(3)),
    "a cut running variance": lambda m: norms(m)[0].register_buffer("running_var", torch.ones(3)),
    "a bias of the wrong size": lambda m: convolutions(m)[0].register_parameter("bias", nn.Parameter(torch.zeros(3))),
    "a longer bias": lambda m: convolutions(m)[0].register_parameter("bias", nn.Parameter(torch.zeros(64))),
    "gamma of one element": lambda m: norms(m)[0].register_parameter("weight", nn.Parameter(torch.ones(1))),
    "gamma expanded": lambda m: replace(norms(m)[0], "weight", torch.full((), 0.7).expand(norms(m)[0].num_features)),
    "beta with gaps": lambda m: replace(norms(m)[0], "bias", gap(torch.randn(norms(m)[0].num_features))),
    "beta with the negative bit": lambda m: replace(norms(m)[0], "bias", negative(norms(m)[0].bias.detach())),
    "gamma with nothing but the negative bit": lambda m: replace(
        norms(m)[0], "weight", only_negative(norms(m)[0].weight.detach())
    ),
    "a bias with gaps": lambda m: replace(
        convolutions(m)[0], "bias", gap(torch.randn(convolutions(m)[0].out_channels))
    ),
    "running statistics with gaps": lambda m: [
        norms(m)[0].register_buffer(name, gap(getattr(norms(m)[0], name))) for name in ("running_mean", "running_var")
    ],
    "running statistics expanded": lambda m: replace(
        norms(m)[0], "running_mean", torch.zeros(()).expand(norms(m)[0].num_features)
    ),
    "a filter with the negative bit": lambda m: replace(
        convolutions(m)[0], "weight", negative(convolutions(m)[0].weight.detach())
    ),
    "a filter with nothing but the negative bit": lambda m: replace(
        convolutions(m)[0], "weight", only_negative(convolutions(m)[0].weight.detach())
    ),
    "a filter that is a buffer": lambda m: (
        delattr(convolutions(m)[0], "weight"),
        convolutions(m)[0].register_buffer("weight", torch.randn(convolutions(m)[0].out_channels, 8, 3, 3)),
    ),
    "a filter of other channels": lambda m: setattr(
        convolutions(m)[0], "weight", nn.Parameter(torch.randn(8, 3, 3, 3))
    ),
    "a filter of three dimensions": lambda m: setattr(convolutions(m)[0], "weight", nn.Parameter(torch.randn(8, 8, 3))),
    "a larger filter": lambda m: setattr(convolutions(m)[0], "weight", nn.Parameter(torch.randn(12, 8, 7, 7) / 20)),
    "a filter of fp64": lambda m: convolutions(m)[0].double(),
    "a filter of fp16": lambda m: convolutions(m)[0].half(),
    "a norm of fp64": lambda m: norms(m)[0].double(),
    "a norm of fp16": lambda m: norms(m)[0].half(),
    "gamma alone of fp64": lambda m: setattr(norms(m)[0], "weight", nn.Parameter(norms(m)[0].weight.double())),
    "beta alone of fp64": lambda m: setattr(norms(m)[0], "bias", nn.Parameter(norms(m)[0].bias.double())),
    "a running variance of fp64": lambda m: norms(m)[0].register_buffer(
        "running_var", norms(m)[0].running_var.double()
    ),
    "stride as a number": lambda m: setattr(convolutions(m)[-1], "stride", 1),
    "stride 2 as a number": lambda m: setattr(convolutions(m)[0], "stride", 2),
    "stride of one element": lambda m: setattr(convolutions(m)[0], "stride", (1,)),
    "stride of three elements": lambda m: setattr(convolutions(m)[0], "stride", (1, 1, 1)),
    "stride of zero": lambda m: setattr(convolutions(m)[0], "stride", (0, 0)),
    "stride as a list": lambda m: setattr(convolutions(m)[0], "stride", [1, 1]),
    "stride as a float": lambda m: setattr(convolutions(m)[0], "stride", (1.0, 1.0)),
    "padding as a number": lambda m: setattr(convolutions(m)[0], "padding", 1),
    "padding of one element": lambda m: setattr(convolutions(m)[0], "padding", (1,)),
    "padding below zero": lambda m: setattr(convolutions(m)[0], "padding", (-1, -1)),
    "padding by name": lambda m: setattr(convolutions(m)[0], "padding", "same"),
    "padding by an unknown name": lambda m: setattr(convolutions(m)[0], "padding", "none"),
    "dilation as a number": lambda m: setattr(convolutions(m)[0], "dilation", 1),
    "other groups": lambda m: setattr(convolutions(m)[0], "groups", 2),
    "groups of zero": lambda m: setattr(convolutions(m)[0], "groups", 0),
    "eps as a tensor": lambda m: setattr(norms(m)[0], "eps", torch.tensor(1e-3)),
    "eps of zero": lambda m: setattr(norms(m)[0], "eps", 0.0),
    "eps below zero": lambda m: setattr(norms(m)[0], "eps", -1e-5),
    "eps as text": lambda m: setattr(norms(m)[0], "eps", "0.1"),
    "stride as flags": lambda m: setattr(convolutions(m)[0], "stride", (True, True)),
    "statistics that require gradients": lambda m: norms(m)[0].running_mean.requires_grad_(),
    "statistics of two dimensions": lambda m: norms(m)[0].register_buffer("running_mean", torch.zeros(4, 2)),
    "gamma of two dimensions": lambda m: norms(m)[0].register_parameter("weight", nn.Parameter(torch.ones(4, 2))),
    "momentum as a tensor": lambda m: setattr(norms(m)[0], "momentum", torch.tensor(0.3)),
    "momentum as an integer": lambda m: setattr(norms(m)[0], "momentum", 1),
    "a cumulative average": lambda m: setattr(norms(m)[0], "momentum", None),
    "no statistics from the start": lambda m: norms(m)[0].__init__(norms(m)[0].num_features, track_running_stats=False),
    "no statistics any more": lambda m: setattr(norms(m)[0], "track_running_stats", False),
    "running statistics removed": lambda m: [setattr(norms(m)[0], n, None) for n in ("running_mean", "running_var")],
    "running mean removed": lambda m: setattr(norms(m)[0], "running_mean", None),
    "no counter": lambda m: setattr(norms(m)[0], "num_batches_tracked", None),
    "a cumulative average without a counter": lambda m: [
        setattr(norms(m)[0], name, None) for name in ("momentum", "num_batches_tracked")
    ],
    "a counter of floats": lambda m: norms(m)[0].register_buffer("num_batches_tracked", torch.tensor(1.0)),
    "no affine": lambda m: [norms(m)[0].register_parameter(n, None) for n in ("weight", "bias")],
    "a norm in evaluation": lambda m: norms(m)[0].eval(),
    "a norm in evaluation, frozen": lambda m: norms(m)[0].eval().requires_grad_(False),
    "a norm in evaluation without statistics": lambda m: norms(m)[0].eval().__setattr__("running_mean", None),
    "constant gamma": lambda m: norms(m)[0].weight.requires_grad_(False),
    "filters frozen": lambda m: [c.requires_grad_(False) for c in convolutions(m)],
    "all frozen": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", CHANGES)
def test_after_a_change(name, build, training):
    compare(build, CHANGES[name], image(), training)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "NCHW": image,
    "channels_last": lambda: image().contiguous(memory_format=torch.channels_last),
    "every other image and pixel": lambda: image(4, 8, 10, 12)[::2, :, ::2, ::2],
    "a slice of channels": lambda: image(2, 20, 5, 6).contiguous(memory_format=torch.channels_last)[:, 3:11],
    "expanded": lambda: image(1, 8, 5, 6).expand(2, 8, 5, 6),
    "the negative bit": lambda: negative(image()),
    "nothing but the negative bit": lambda: only_negative(image()),
    "fp16": lambda: image().half(),
    "fp64": lambda: image().double(),
    "integers": lambda: torch.ones(2, 8, 5, 6, dtype=torch.int64),
    "complex": lambda: torch.complex(image(), image()),
    "three dimensions": lambda: image(8, 5, 6),
    "five dimensions": lambda: image(1, 2, 8, 5, 6),
    "other channels": lambda: image(2, 7, 5, 6),
    "no images": lambda: image(0, 8, 5, 6),
    "no pixels": lambda: image(2, 8, 0, 6),
    "one pixel": lambda: image(1, 8, 1, 1),
    "two images of one pixel": lambda: image(2, 8, 1, 1),
    "sparse": lambda: image().to_sparse(),
    "infinite": lambda: image().index_fill(0, torch.tensor([1]), float("inf")),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", INPUTS)
def test_an_input(name, build, training):
    torch.manual_seed(2)
    compare(build, lambda m: None, INPUTS[name](), training)


def test_a_filter_larger_than_the_padded_image():
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 12, 5), nn.BatchNorm2d(12), nn.ReLU())

    for training in (True, False):
        for size in ((3, 9), (9, 3), (4, 9), (9, 4), (5, 5)):
            compare(build, lambda m: None, image(2, 8, *size), training)
