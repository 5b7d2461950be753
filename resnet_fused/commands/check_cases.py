"""What the self-test checks: inputs for every kernel and whole blocks, and the results that they should have."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused.engine import reference
from resnet_fused.engine.forward import Convolution, inference_pooled
from resnet_fused.engine.request import implementation
from resnet_fused.kernels import chain_forward, conv_box, dgrad_box
from resnet_fused.kernels.activation import IDENTITY, RELU, Activation
from resnet_fused.kernels.batch_norm import batch_norm_apply, batch_norm_stats, channel_moments, merge_moments
from resnet_fused.kernels.chain import Chain, Link
from resnet_fused.kernels.conv import ConvProblem, Geometry, output_size
from resnet_fused.kernels.conv_dgrad import conv_dgrad
from resnet_fused.kernels.conv_forward import conv_forward, conv_forward_moments, default_config, steps, wide_tiles
from resnet_fused.kernels.conv_pool import POOL
from resnet_fused.kernels.conv_wgrad import conv_wgrad
from resnet_fused.kernels.epilogue import Norm, Prologue, Residual
from resnet_fused.kernels.launch import INTERPRETER, TileConfig, target_arch
from resnet_fused.kernels.norm_backward import (
    batch_norm_backward,
    batch_norm_coefs,
    batch_norm_reduce,
    batch_norm_sums,
    merge_sums,
)
from resnet_fused.kernels.norm_pool import batch_norm_pool, batch_norm_pool_backward
from resnet_fused.kernels.squeeze import gate_gradient, image_means, squeeze, squeeze_gradient
from resnet_fused.modules import BasicBlock, Bottleneck, PaddedShortcut, PreActBlock, PreActBottleneck
from resnet_fused.plan.problem import Request, Tiles

FORMATS = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The number formats of a convolution's factors, and the dtype of its tensors."""

Results = dict[str, Tensor]


@dataclass(frozen=True)
class CheckLayer:
    """A convolution of ``n`` images with a square filter, padded so that with stride 1 the size stays."""

    n: int
    size: tuple[int, int]
    ci: int
    co: int
    groups: int = 1
    taps: int = 1
    stride: int = 1

    @property
    def geometry(self) -> Geometry:
        """The convolution's arguments."""
        pad = self.taps // 2
        return Geometry((self.stride, self.stride), (pad, pad), groups=self.groups)

    @property
    def filter(self) -> tuple[int, int, int, int]:
        """The filter's shape."""
        return self.co, self.ci // self.groups, self.taps, self.taps

    @property
    def input(self) -> tuple[int, int, int, int]:
        """The input's shape."""
        return self.n, self.ci, *self.size

    @property
    def output(self) -> tuple[int, int, int, int]:
        """The output's shape."""
        p, q = (output_size(size, self.taps, self.stride, self.taps // 2, 1) for size in self.size)
        return self.n, self.co, p, q

    def __str__(self) -> str:
        more = (f"/{self.stride}" if self.stride > 1 else "") + (f" in {self.groups} groups" if self.groups > 1 else "")
        return f"{self.taps}x{self.taps}{more} {self.ci}->{self.co}, {self.n}x{self.size[0]}x{self.size[1]}"


def _layer(real: tuple[Any, ...], tiny: tuple[Any, ...], **shared: Any) -> dict[str, CheckLayer]:
    return {"cuda": CheckLayer(*real, **shared), "cpu": CheckLayer(*tiny, **shared)}


# On a GPU, layers of real networks, which meet the tiles that the launchers choose there; in the interpreter tiny ones
# of the same kinds, with ragged ends.
LAYERS = {
    "stem": _layer((8, (224, 224), 3, 64), (1, (9, 8), 3, 20), taps=7, stride=2),
    "reduce": _layer((8, (56, 56), 256, 64), (2, (5, 3), 40, 12)),
    "middle": _layer((8, (56, 56), 64, 64), (2, (4, 3), 16, 20), taps=3),
    "expand": _layer((16, (56, 56), 64, 256), (2, (5, 3), 12, 40)),
    "wide": _layer((8, (56, 56), 128, 128), (2, (3, 4), 24, 32), taps=3),
    "groups": _layer((8, (56, 56), 128, 128, 32), (1, (4, 3), 32, 32, 8), taps=3),
    "wide groups": _layer((8, (7, 7), 1024, 1024, 32), (1, (3, 4), 80, 48, 2), taps=3),
    "strided": _layer((8, (56, 56), 128, 128), (2, (5, 4), 24, 16), taps=3, stride=2),
    "widening": _layer((32, (56, 56), 64, 128), (2, (6, 4), 16, 24), taps=3, stride=2),
    "projection": _layer((8, (56, 56), 256, 512), (2, (5, 4), 20, 24), stride=2),
    "deep": _layer((8, (14, 14), 256, 1024), (1, (3, 3), 20, 136)),
    "narrowing": _layer((8, (14, 14), 1024, 256), (1, (3, 3), 40, 24)),
    "last": _layer((64, (7, 7), 512, 512), (2, (2, 3), 40, 24), taps=3),
}

CONV_FORWARD = (
    *(("stem", ""), ("middle", ""), ("wide", ""), ("groups", ""), ("wide groups", ""), ("strided", "")),
    ("widening", ""),
    *(("expand", "residual"), ("deep", "residual"), ("last", "padded residual"), ("projection", "no ReLU")),
    *(("expand", "residual, silu"), ("middle", "leaky_relu"), ("groups", "gelu"), ("strided", "hardtanh")),
)
CONV_BOX = (
    *(("middle", "moments"), ("wide", ""), ("strided", "moments"), ("widening", "moments")),
    *(("projection", ""), ("expand", "residual"), ("narrowing", "moments")),
    *(("last", "padded residual"), ("last", "moments"), ("expand", "residual, silu")),
)
CONV_SPLIT = (
    *(("stem", ""), ("groups", ""), ("wide groups", ""), ("strided", "residual")),
    *(("deep", "residual"), ("last", "padded residual"), ("deep", "residual, silu")),
)
CONV_WIDE = (("wide", ""), ("expand", "residual"), ("last", "padded residual"), ("last", "moments"))
CHAIN = (
    *(("middle", ""), ("wide", ""), ("widening", ""), ("strided", "padded residual")),
    *(("middle", "without 3x3"), ("wide", "without 3x3"), ("middle", "without the next"), ("wide", "without the next")),
)
CONV_MOMENTS = (
    *(("stem", ""), ("reduce", ""), ("projection", ""), ("middle", "prologue"), ("expand", "prologue")),
    *(("groups", "prologue"), ("wide groups", "prologue"), ("strided", "prologue"), ("deep", "prologue")),
    *(("last", "prologue"), ("middle", "prologue, silu"), ("expand", "prologue, hardswish")),
    *(("middle", "prologue, residual"), ("expand", "prologue, residual")),
)
SQUEEZE = (
    *(("expand", ""), ("deep", ""), ("projection", ""), ("last", "prologue"), ("expand", "prologue")),
    *(("expand", "boxes"), ("middle", "boxes"), ("deep", "boxes")),
)
CONV_GATE = (
    *(("expand", "residual"), ("deep", "residual"), ("expand", ""), ("deep", "padded residual")),
    *(("expand", "residual, silu"), ("groups", ""), ("middle", "")),
)
GATE = (("expand", ""), ("deep", "two norms"), ("expand", "two norms, silu"))
CONV_DGRAD = (
    *(("middle", "mask"), ("groups", "mask"), ("wide groups", "mask"), ("strided", "mask"), ("last", "mask")),
    *(("middle", "shortcut"), ("middle", "prologue"), ("expand", "prologue, mask"), ("deep", "prologue, mask")),
    *(("deep", "frozen prologue"), ("middle", "mask, silu"), ("expand", "prologue, mask, gelu_tanh")),
    *(("reduce", "prologue, shortcut"), ("reduce", "prologue, strided shortcut"), ("projection", "prologue")),
)
DGRAD_BOX = (
    *(("middle", "mask"), ("wide", "mask"), ("strided", "mask"), ("widening", "shortcut"), ("last", "mask")),
    *(("middle", "shortcut"), ("wide", "strided shortcut"), ("middle", "mask, silu")),
)
CONV_WGRAD = (
    *(("stem", "prologue"), ("reduce", "prologue"), ("projection", "prologue"), ("expand", "both prologues")),
    *(("deep", "both prologues"), ("middle", "both prologues, dy kept"), ("groups", "both prologues, dy kept")),
    *(("wide groups", "both prologues, dy kept"), ("strided", "both prologues, dy kept")),
    *(("last", "both prologues, dy kept"), ("middle", ""), ("middle", "both prologues, dy kept, silu")),
    ("expand", "both prologues, leaky_relu"),
)
NORM_LAYERS = ("expand", "deep")
"""Those whose outputs the kernels of batch norm are checked on."""

ACTIVATIONS = {
    **{name: Activation(name) for name in ("hardswish", "silu", "gelu", "gelu_tanh")},
    **{"leaky_relu": Activation("leaky_relu", (0.2,)), "hardtanh": Activation("hardtanh", (-1.0, 2.0))},
}
"""By the name that ends a variant; without one it is a ReLU."""

BLOCKS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "basic": (1, lambda c: BasicBlock(c, c)),
    "basic, projection": (1, lambda c: BasicBlock(c, 2 * c, 2, _projection(c, 2 * c, 2))),
    "basic, padded shortcut": (1, lambda c: BasicBlock(c, 2 * c, 2, PaddedShortcut(c, 2 * c, 2))),
    "bottleneck": (4, lambda c: Bottleneck(4 * c, c)),
    "bottleneck, projection": (4, lambda c: Bottleneck(4 * c, 2 * c, 2, _projection(4 * c, 8 * c, 2))),
    "pre-activation": (1, lambda c: PreActBlock(c, c)),
    "pre-activation, projection": (4, lambda c: PreActBottleneck(4 * c, 8 * c, 2)),
}
"""Blocks of width c, and the channels of their inputs in units of c."""

ROADS: tuple[Request, ...] = ("triton", "mixed")
"""Those of a block on which kernels are launched."""
BLOCK_SIZES = {"cuda": (8, (56, 56), 64), "cpu": (6, (7, 6), 6)}
"""Images, their size and c."""


def _projection(ci: int, co: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(ci, co, 1, stride, bias=False), nn.BatchNorm2d(co))


@dataclass
class Comparison:
    """One thing to check: what the kernels make of drawn inputs, and what they should.

    ``expected(dtype, ours)`` computes every result of ``ours()``, by name, in ``dtype``; it is given those, since sums
    are taken of values as they were stored. ``sums``: see :func:`error_ratio`; some for the longest products.
    """

    ours: Callable[[], Results]
    expected: Callable[[torch.dtype, Results], Results]
    sums: int = 16


@dataclass(frozen=True)
class CheckCase:
    """A row to come: ``prepare`` draws its inputs."""

    kernel: str
    name: str
    number_format: str
    prepare: Callable[[Draw], Comparison]

    def comparison(self, device: torch.device) -> Comparison:
        """On inputs of its own, so that no memory left over from another case holds the right results."""
        seed = zlib.crc32(f"{self.kernel} {self.name} {self.number_format}".encode())
        return self.prepare(Draw(device, FORMATS[self.number_format], self.number_format == "tf32", seed))


class Draw:
    """Random inputs on one device, in one dtype; the same for the same seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tf32: bool, seed: int) -> None:
        self.device, self.dtype, self.tf32 = device, dtype, tf32
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal values, four dimensions in channels_last."""
        t = torch.randn(shape, device=self.device, generator=self.generator).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform values in fp32."""
        return torch.rand(shape, device=self.device, generator=self.generator) * (high - low) + low

    def signs(self, *shape: int) -> Tensor:
        """1 and -1."""
        return torch.where(self.normal(*shape) < 0, -1.0, 1.0)

    def images(self, shape: Sequence[int]) -> Tensor:
        """Activations or gradients."""
        return self.normal(*shape, dtype=self.dtype)

    def activations(self, shape: Sequence[int]) -> Tensor:
        """What a convolution reads: never negative, and so of a mean other than zero."""
        return torch.relu(self.images(shape))

    def filter(self, layer: CheckLayer) -> Tensor:
        """A filter that keeps the variance."""
        return (self.normal(*layer.filter) / math.sqrt(layer.ci / layer.groups * layer.taps**2)).to(self.dtype)

    def stats(self, shape: Sequence[int]) -> Tensor:
        """What batch norm does to the channels of a tensor of ``shape``, with shifts away from zero."""
        n, c, h, w = shape
        mean, rstd, gamma = self.normal(c), self.uniform(0.5, 1.5, c), self.signs(c) * self.uniform(0.5, 1.5, c)
        shift = self.signs(c) * self.uniform(0.2, 1.0, c)
        return torch.stack([mean, rstd, gamma * rstd, shift, torch.full_like(mean, 1 / (n * h * w))])

    def normalised(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A raw output and its stats, such that no input of the ReLU behind them lies within rounding of zero."""
        y, stats = self.images(shape), self.stats(shape)
        near = reference.batch_norm_apply(y.float(), stats, activation=IDENTITY).abs() < 1e-3
        return torch.where(near, 0.0, y).to(self.dtype), stats  # of a zero, the ReLU's input is the shift

    def coefs(self, channels: int, frozen: bool = False) -> Tensor:
        """The vectors of ``dy = A*g + B*y + C``; those of constant statistics are zero but for the first."""
        coefs = self.normal(3, channels) * torch.tensor([[1.0], [1.0], [0.05]], device=self.device)
        if frozen:
            coefs[1:] = 0
        return coefs


def _act(variant: str) -> Activation:
    """The activation of a variant."""
    return IDENTITY if variant == "no ReLU" else ACTIVATIONS.get(variant.rpartition(", ")[2], RELU)


def _wide(t: torch.dtype) -> torch.dtype:
    """The dtype in which PyTorch computes batch norm of tensors in ``t``, to round once."""
    return torch.promote_types(t, torch.float32)


def _activated(y: Tensor, stats: Tensor | None, t: torch.dtype, activation: Activation = RELU) -> Tensor:
    if stats is None:
        return y.to(t)
    _, _, scale, shift, _ = stats.to(_wide(t))
    return reference.scale_shift_act(y.to(_wide(t)), scale, shift, activation=activation).to(t)


def _gradient(g: Tensor, y: Tensor, coefs: Tensor | None, t: torch.dtype) -> Tensor:
    if coefs is None:
        return g.to(t)
    wide = _wide(t)
    return reference.batch_norm_gradient(g.to(wide), y.to(wide), coefs.to(wide)).to(t)


def _named(names: str, rows: Iterable[Tensor]) -> Results:
    return dict(zip(names.split(), rows, strict=True))


def _moments(y: Tensor, t: torch.dtype) -> Results:
    """Mean and sum of squared deviations per channel."""
    values = y.to(_wide(t)).transpose(0, 1).flatten(1)
    mean = values.mean(1)
    return {"mean": mean, "squared deviations": (values - mean[:, None]).square().sum(1)}


def _masked_sums(g: Tensor, y: Tensor, stats: Tensor, t: torch.dtype) -> Results:
    return _named("sum_g sum_gy", reference.batch_norm_sums(*(v.to(_wide(t)) for v in (g, y, stats))))


def _residual(layer: CheckLayer, variant: str, draw: Draw) -> Residual | None:
    """What is added to the output of ``layer``: a tensor of its shape, or a padded one."""
    n, co, p, q = layer.output
    if "padded" in variant:
        return Residual(draw.images((n, co // 2, 2 * p, 2 * q - 1)), 2, co // 4)
    return Residual(draw.images(layer.output)) if "residual" in variant else None


def _materialized(residual: Residual, channels: int, t: torch.dtype) -> Tensor:
    return reference.PaddedIdentity(residual.tensor.to(t), residual.step, residual.before).materialize(channels)


def _check_conv_forward(layer: CheckLayer, variant: str, draw: Draw) -> Comparison:
    """Inference: convolution, batch norm, residual and ReLU in one launch."""
    x, w = draw.activations(layer.input), draw.filter(layer)
    mean, var = draw.normal(layer.co), draw.uniform(0.5, 1.5, layer.co)
    norm = Norm(mean, var, draw.normal(layer.co), draw.normal(layer.co), 1e-5)
    activation = _act(variant)
    residual = _residual(layer, variant, draw)

    def ours() -> Results:
        y = conv_forward(
            x, w, geometry=layer.geometry, norm=norm, residual=residual, activation=activation, tf32=draw.tf32
        )
        return {"y": y}

    def expected(t: torch.dtype, _: Results) -> Results:
        y = F.conv2d(x.to(t), w.to(t), None, *layer.geometry)
        mean, var, gamma, beta = (v.to(_wide(t)) for v in norm[:4] if v is not None)
        z = F.batch_norm(y.to(_wide(t)), mean, var, gamma, beta, eps=norm.eps).to(t)
        if residual is not None:
            z = z + _materialized(residual, layer.co, t)
        return {"y": reference.activate(z, activation)}

    return Comparison(ours, expected)


def _check_conv_gate(layer: CheckLayer, variant: str, draw: Draw) -> Comparison:
    """Inference: convolution, batch norm, gate, residual and activation in one launch, in every kind of tile.

    And the means of images of what there is without gate and residual.
    """
    x, w, problem = draw.activations(layer.input), draw.filter(layer), _problem(layer, draw)
    mean, var = draw.normal(layer.co), draw.uniform(0.5, 1.5, layer.co)
    norm = Norm(mean, var, draw.normal(layer.co), draw.normal(layer.co), 1e-5)
    gate, residual = draw.uniform(0.2, 1, layer.n, layer.co).to(draw.dtype), _residual(layer, variant, draw)
    shared: dict[str, Any] = {"geometry": layer.geometry, "norm": norm, "activation": _act(variant), "tf32": draw.tf32}
    tiles = [None, *(tile for tile in _box_tiles(problem) if tile.box is not None), *_split_tiles(problem)]

    def ours() -> Results:
        results: Results = {}
        for tile in tiles:
            results[f"z, {tile}"] = conv_forward(x, w, gate=gate, residual=residual, config=tile, **shared)
            if tile is None or tile.splits == 1:
                y, moments = conv_forward_moments(x, w, by_image=True, config=tile, **shared)
                results |= {f"y, {tile}": y, f"means, {tile}": image_means(moments, draw.dtype)}
        return results

    def expected(t: torch.dtype, ours: Results) -> Results:
        y = F.conv2d(x.to(t), w.to(t), None, *layer.geometry)
        mean, var, gamma, beta = (v.to(_wide(t)) for v in norm[:4] if v is not None)
        v = F.batch_norm(y.to(_wide(t)), mean, var, gamma, beta, eps=norm.eps).to(t)
        z, y = v * gate.to(t)[:, :, None, None], reference.activate(v, _act(variant))
        if residual is not None:
            z = z + _materialized(residual, layer.co, t)
        z = reference.activate(z, _act(variant))
        results = {f"{name}, {tile}": value for tile in tiles for name, value in (("z", z), ("y", y))}
        for tile in tiles:
            if f"y, {tile}" in ours:
                results[f"means, {tile}"] = ours[f"y, {tile}"].to(_wide(t)).mean((2, 3), keepdim=True).to(t)
        return {name: results[name] for name in ours}

    return Comparison(ours, expected)


def _check_conv_pool(layer: CheckLayer, variant: str, draw: Draw) -> Comparison:
    """Inference: a stem up to its pool, in two launches; in one less where tensor cores do not multiply fp32."""
    x, w = draw.activations(layer.input), draw.filter(layer)
    norm = Norm(
        draw.normal(layer.co), draw.uniform(0.5, 1.5, layer.co), draw.signs(layer.co), draw.normal(layer.co), 1e-5
    )
    fused = Convolution(layer.geometry, True, Tiles())

    def ours() -> Results:
        return {"y": inference_pooled(x, w, None, norm, fused)}

    def expected(t: torch.dtype, _: Results) -> Results:
        y = F.conv2d(x.to(t), w.to(t), None, *layer.geometry)
        mean, var, gamma, beta = (v.to(_wide(t)) for v in norm[:4] if v is not None)
        z = torch.relu(F.batch_norm(y.to(_wide(t)), mean, var, gamma, beta, eps=norm.eps)).to(t)
        return {"y": F.max_pool2d(z, *POOL)}

    return Comparison(ours, expected)


def _chain_tiles(chain: Chain) -> list[TileConfig | None]:
    """Every one that may be chosen, or the launcher's; in the interpreter that, and one of boxes."""
    if chain.first.arch == INTERPRETER:
        return [None, *_box_tiles(chain.first)]
    return [*chain_forward.tiles(chain)] or [None]


def _check_chain(layer: CheckLayer, variant: str, draw: Draw) -> Comparison:
    """Inference: ``layer``, a 1x1 to four times its channels with a residual, and one back; in each tile."""
    size, wide = layer.output[2:], 4 * layer.co
    layers = [layer, CheckLayer(layer.n, size, layer.co, wide), CheckLayer(layer.n, size, wide, layer.co)]
    kept = [variant != "without 3x3", True, variant != "without the next"]
    links = [
        Link(draw.filter(of), torch.stack([draw.uniform(0.5, 1.5, of.co), draw.normal(of.co)])) if keeps else None
        for of, keeps in zip(layers, kept, strict=True)
    ]
    x = draw.activations(layer.input if kept[0] else layer.output)
    geometry = layer.geometry if kept[0] else Geometry()
    residual = _residual(layers[1], variant, draw) or Residual(draw.images(layers[1].output))

    problems = [_problem(of, draw) if keeps else None for of, keeps in zip(layers, kept, strict=True)]
    chosen = _chain_tiles(Chain(*problems))  # type: ignore[arg-type]

    def ours() -> Results:
        results: Results = {}
        for tile in chosen:
            arguments: dict[str, Any] = {"geometry": geometry, "residual": residual, "tf32": draw.tf32, "config": tile}
            z, y = chain_forward.chain_forward(x, *links, **arguments)  # type: ignore[arg-type]
            results |= {f"z, {tile}": z} | ({} if y is None else {f"y, {tile}": y})
        return results

    def expected(t: torch.dtype, _: Results) -> Results:
        v, outputs = x.to(t), []
        for link, of in zip(links, layers, strict=True):
            if link is not None:
                added = _materialized(residual, wide, t) if of is layers[1] else None
                v = reference.conv_affine_act(v, link.w, link.affine, of.geometry, added)
            outputs.append(v)
        names = {"z": outputs[1]} | ({"y": outputs[2]} if kept[2] else {})
        return {f"{name}, {tile}": value for tile in chosen for name, value in names.items()}

    return Comparison(ours, expected)


def _check_conv_tiles(
    tiles: Callable[[ConvProblem], list[TileConfig]], layer: CheckLayer, variant: str, draw: Draw
) -> Comparison:
    """In each of the ``tiles``; without any, in that of the launcher."""
    x, w, residual = draw.activations(layer.input), draw.filter(layer), _residual(layer, variant, draw)
    product: dict[str, Any] = {"geometry": layer.geometry, "tf32": draw.tf32}
    chosen: list[TileConfig | None] = [*tiles(_problem(layer, draw))] or [None]
    configs = {str(tile): {"config": tile, **product} for tile in chosen}
    activation = _act(variant)

    def ours() -> Results:
        if variant != "moments":
            return {t: conv_forward(x, w, residual=residual, activation=activation, **p) for t, p in configs.items()}
        results = {}
        for name, config in configs.items():
            results[name], moments = conv_forward_moments(x, w, **config)
            results[f"mean, {name}"], results[f"squared deviations, {name}"] = merge_moments(moments)
        return results

    def expected(t: torch.dtype, ours: Results) -> Results:
        z = F.conv2d(x.to(t), w.to(t), None, *layer.geometry)
        if variant == "moments":
            means = {f"{key}, {name}": v for name in configs for key, v in _moments(ours[name], t).items()}
            return dict.fromkeys(configs, z) | means
        if residual is not None:
            z = z + _materialized(residual, layer.co, t)
        return dict.fromkeys(configs, reference.activate(z, activation))

    return Comparison(ours, expected)


def _problem(layer: CheckLayer, draw: Draw) -> ConvProblem:
    sizes = layer.n, *layer.size, layer.ci, layer.co, layer.taps, layer.taps
    return ConvProblem(*sizes, *layer.geometry, draw.dtype, draw.tf32, False, target_arch())


def _launchers_tile(problem: ConvProblem) -> list[TileConfig]:
    """None of one's own."""
    return []


def _box_tiles(problem: ConvProblem) -> list[TileConfig]:
    """Every one of boxes that may be chosen; none where the GPU has no TMA."""
    if problem.arch == INTERPRETER:
        return [TileConfig(32, 16, 16, box=(2, 4, 4))]
    return [*conv_box.tiles(problem)]


def _gradient_box_tiles(problem: ConvProblem) -> list[TileConfig]:
    """The same of the gradient of the input."""
    if problem.arch == INTERPRETER:
        return _box_tiles(problem)
    return [*dgrad_box.tiles(problem)]


def _split_tiles(problem: ConvProblem) -> list[TileConfig]:
    """The launcher's with its sum split, evenly and not."""
    tile = default_config(problem)
    if problem.arch == INTERPRETER and problem.merged == 1:
        tile = replace(tile, block_k=16)
    return [replace(tile, splits=splits) for splits in (2, 3, 8) if splits <= steps(problem, tile)]


def _wide_tiles(problem: ConvProblem) -> list[TileConfig]:
    """Of 256 pixels, for which the interpreter has no use."""
    return [*wide_tiles(problem)]


def _check_conv_moments(layer: CheckLayer, variant: str, draw: Draw) -> Comparison:
    """Training, forward: the raw output, with a residual if there is one, and the moments of its channels."""
    x, stats = draw.normalised(layer.input) if variant else (draw.activations(layer.input), None)
    w, residual = draw.filter(layer), _residual(layer, variant, draw)

    def ours() -> Results:
        prologue = None if stats is None else Prologue(stats[2], stats[3], _act(variant))
        options: dict[str, Any] = {"geometry": layer.geometry, "tf32": draw.tf32}
        y, moments = conv_forward_moments(x, w, prologue=prologue, residual=residual, **options)
        return {"y": y, **dict(zip(("mean", "squared deviations"), merge_moments(moments), strict=True))}

    def expected(t: torch.dtype, ours: Results) -> Results:
        y = F.conv2d(_activated(x, stats, t, _act(variant)), w.to(t), None, *layer.geometry)
        y = y if residual is None else y + residual.tensor.to(t)
        return {"y": y, **_moments(ours["y"], t)}

    return Comparison(ours, expected)


def _check_squeeze(layer: CheckLayer, variant: str, draw: Draw) -> Comparison:
    """The means of images, of what a convolution returns and of its batch norm's output; and by a pass of their own."""
    x, before = draw.normalised(layer.input) if "prologue" in variant else (draw.activations(layer.input), None)
    w, stats, n = draw.filter(layer), draw.stats(layer.output), layer.n
    tiles = _box_tiles(_problem(layer, draw)) if variant == "boxes" else []
    prologue = None if before is None else Prologue(before[2], before[3])
    chosen: list[TileConfig | None] = [*tiles] or [None]
    shared: dict[str, Any] = {"geometry": layer.geometry, "prologue": prologue, "tf32": draw.tf32}
    configs = {str(tile): {"config": tile, **shared} for tile in chosen}

    def ours() -> Results:
        results = {}
        for name, config in configs.items():
            results[name], moments = conv_forward_moments(x, w, by_image=True, **config)
            for way, found in (("", moments), (" by a pass", channel_moments(results[name], by_image=True))):
                squeezed, means = squeeze(found, stats, draw.dtype)
                results |= {f"squeeze{way}, {name}": squeezed, f"means{way}, {name}": means}
        return results

    def expected(t: torch.dtype, ours: Results) -> Results:
        results: Results = dict.fromkeys(configs, F.conv2d(_activated(x, before, t), w.to(t), None, *layer.geometry))
        _, _, scale, shift, _ = stats.to(_wide(t))
        for name, way in product(configs, ("", " by a pass")):
            means = ours[name].to(_wide(t)).mean((2, 3))
            squeezed = (means * scale + shift).to(t)
            results |= {f"squeeze{way}, {name}": squeezed.view(n, -1, 1, 1), f"means{way}, {name}": means}
        return results

    return Comparison(ours, expected)


def _check_gate(layer: CheckLayer, variant: str, draw: Draw) -> Comparison:
    """The gradients of gates, and through them and their means that of a convolution's output."""
    dz, (n, c, p, q) = draw.images(layer.output), layer.output
    (y, stats), (y2, stats2) = (draw.normalised(layer.output) for _ in range(2))
    gate, dsqueeze, coefs = (draw.uniform(0.2, 1, n, c).to(draw.dtype), draw.normal(n, c).to(draw.dtype), draw.coefs(c))
    activation, means = _act(variant), y.double().mean((2, 3)).float()
    z = torch.relu(draw.images(layer.output)) if activation == RELU else None
    second = (y2, stats2) if "two norms" in variant else None

    def ours() -> Results:
        g, sums = batch_norm_reduce(dz, y, stats, activation=activation, z=z, second=second, gate=gate)
        dgate, by_image = gate_gradient(sums, stats, n, gate.dtype)
        through, offset = squeeze_gradient(by_image, gate, dsqueeze, means, stats, p * q)
        dy = batch_norm_backward(g, y, coefs, gate=(gate, offset))
        names = "sum_g sum_gy" + " sum_gy2" * (second is not None)
        results = _named(names, by_image) | _named("total total_y", through)
        return results | {"g": g, "dgate": dgate, "offset": offset, "dy": dy}

    def expected(t: torch.dtype, ours: Results) -> Results:
        wide = _wide(t)
        v = z
        if v is None:
            other = (y2.to(wide), stats2.to(wide)) if second is not None else (None, None)
            v = reference.batch_norm_apply(y.to(wide), stats.to(wide), other[0], other[1], IDENTITY, gate.to(wide))
        g = ours["g"].to(wide)
        normal = reference.batch_norm_apply(y.to(wide), stats.to(wide), activation=IDENTITY)
        offset = dsqueeze.to(wide) / (p * q)
        total = g * gate.to(wide)[:, :, None, None] + offset[:, :, None, None]
        results = {"g": reference.in_front(dz.to(wide), v.to(wide), activation).to(t), "offset": offset}
        results |= {"dgate": (g * normal).sum((2, 3)).to(t), "dy": _gradient(total, y, coefs, t)}
        for name, values, norm in (("sum_gy", y, stats), ("sum_gy2", y2, stats2)):
            results[name] = (g * (values.to(wide) - norm.to(wide)[0, :, None, None])).sum((2, 3))
        deviation = y.to(wide) - stats.to(wide)[0, :, None, None]
        results |= {"total": total.sum((2, 3)), "total_y": (total * deviation).sum((2, 3)), "sum_g": g.sum((2, 3))}
        return {name: results[name] for name in ours}

    return Comparison(ours, expected)


def _check_conv_dgrad(
    tiles: Callable[[ConvProblem], list[TileConfig]], layer: CheckLayer, variant: str, draw: Draw
) -> Comparison:
    """Training, backward: the gradient of the input, with what stands before and behind the convolution.

    In each of the ``tiles``; without any, in that of the launcher.
    """
    g, y, w = draw.images(layer.output), draw.images(layer.output), draw.filter(layer)
    frozen = "frozen" in variant
    coefs = draw.coefs(layer.co, frozen) if "prologue" in variant else None
    mask = draw.normalised(layer.input) if "mask" in variant else None
    step, shortcut = 2 if "strided" in variant else 1, None
    if "shortcut" in variant:
        shortcut = Residual(draw.images((layer.n, layer.ci, *(-(-size // step) for size in layer.size))), step)

    named: dict[str, TileConfig | None] = {f", {tile}": tile for tile in tiles(_problem(layer, draw))} or {"": None}

    def ours() -> Results:
        results = {}
        more: dict[str, Any] = {"shortcut": shortcut, "mask": mask, "activation": _act(variant), "tf32": draw.tf32}
        raw = None if coefs is None or frozen else y
        for name, config in named.items():
            dx, sums = conv_dgrad(g, w, layer.size, geometry=layer.geometry, y=raw, coefs=coefs, config=config, **more)
            results[f"dx{name}"] = dx
            if sums is not None:
                results |= {f"{key}{name}": v for key, v in _named("sum_g sum_gy", merge_sums(sums)).items()}
        return results

    def expected(t: torch.dtype, ours: Results) -> Results:
        dy = _gradient(g, y, coefs, t)
        addend = None if shortcut is None else Residual(shortcut.tensor.to(t), step)
        dx = reference.conv_dgrad(dy, w.to(t), layer.size, layer.geometry, addend)
        if mask is None:
            return {f"dx{name}": dx for name in named}
        y_in, stats = mask
        v = reference.batch_norm_apply(y_in.double(), stats.double(), activation=IDENTITY)
        dx = reference.in_front(dx, v.to(_wide(t)), _act(variant)).to(t)
        sums = {
            f"{key}{name}": v for name in named for key, v in _masked_sums(ours[f"dx{name}"], y_in, stats, t).items()
        }
        return {f"dx{name}": dx for name in named} | sums

    return Comparison(ours, expected)


def _check_conv_wgrad(layer: CheckLayer, variant: str, draw: Draw) -> Comparison:
    """Training, backward: the gradient of the filter, computing dy and the input on the way."""
    g, y = draw.images(layer.output), draw.images(layer.output)
    coefs = draw.coefs(layer.co) if variant else None
    x, stats = draw.normalised(layer.input) if "both" in variant else (draw.activations(layer.input), None)
    keeps = "kept" in variant

    def ours() -> Results:
        kept = torch.empty_like(g) if keeps else None
        more: dict[str, Any] = {"y": None if coefs is None else y, "coefs": coefs, "x_stats": stats, "dy_out": kept}
        more["activation"] = _act(variant)
        dw = conv_wgrad(g, x, layer.filter[2:], geometry=layer.geometry, tf32=draw.tf32, **more)
        return {"dw": dw} if kept is None else {"dw": dw, "dy": kept}

    def expected(t: torch.dtype, _: Results) -> Results:
        dy = _gradient(g, y, coefs, t)
        dw = reference.conv_wgrad(dy, _activated(x, stats, t, _act(variant)), layer.filter, layer.geometry)
        return {"dw": dw, "dy": dy} if keeps else {"dw": dw}

    return Comparison(ours, expected)


def _check_stats(layer: CheckLayer, _: str, draw: Draw) -> Comparison:
    """The statistics of a batch and what they do to batch norm's buffers."""
    y = (draw.normal(*layer.output) + draw.normal(layer.co)[:, None, None]).to(draw.dtype)
    gamma, beta, mean, var = (draw.normal(layer.co) for _ in range(4))
    names = "mean rstd scale shift 1/count"

    def ours() -> Results:
        running_mean, running_var = mean.clone(), var.abs()
        batches = torch.zeros((), dtype=torch.int64, device=y.device)
        running: dict[str, Any] = {"running_mean": running_mean, "running_var": running_var, "momentum": 0.1}
        moments = channel_moments(y)
        stats = batch_norm_stats(moments, gamma, beta, 1e-5, batches=batches, **running)
        merged = dict(zip(("mean", "squared deviations"), merge_moments(moments), strict=True))
        buffers = {"running mean": running_mean, "running variance": running_var, "batches": batches.float()}
        return _named(names, stats) | merged | buffers

    def expected(t: torch.dtype, _: Results) -> Results:
        wide = _wide(t)
        running_mean, running_var = mean.to(wide), var.to(wide).abs()
        F.batch_norm(y.to(wide), running_mean, running_var, training=True, momentum=0.1)
        moments, count = _moments(y, t), y.numel() // layer.co
        variance = moments["squared deviations"] / count
        parameters = (gamma.to(wide), beta.to(wide), 1e-5, 1 / count)
        stats = reference.batch_norm_stats(moments["mean"], variance, *parameters)
        batches = torch.ones((), dtype=wide, device=y.device)
        buffers = {"running mean": running_mean, "running variance": running_var, "batches": batches}
        return _named(names, stats) | moments | buffers

    return Comparison(ours, expected)


def _check_apply(layer: CheckLayer, variant: str, draw: Draw) -> Comparison:
    """Normalisation, residual and ReLU in one pass."""
    c = layer.co
    y = draw.images(layer.output)
    fixed = variant == "fixed statistics"
    mean, var, gamma, beta = draw.normal(c), draw.uniform(0.5, 1.5, c), draw.normal(c), draw.normal(c)
    stats = draw.stats(layer.output)
    residual_stats = draw.stats(layer.output) if variant == "normalised residual" else None
    residual = _residual(layer, variant, draw)
    gate = draw.uniform(0, 1, layer.n, c).to(draw.dtype) if "gate" in variant else None

    def ours() -> Results:
        own = Norm(mean, var, gamma, beta, 1e-5) if fixed else stats
        options: dict[str, Any] = {"residual": residual, "residual_stats": residual_stats, "activation": _act(variant)}
        return {"z": batch_norm_apply(y, own, gate=gate, **options)}

    def expected(t: torch.dtype, _: Results) -> Results:
        wide = _wide(t)
        shortcut = None if residual is None else _materialized(residual, c, wide)
        added = None if residual_stats is None else residual_stats.to(wide)
        own = stats.to(wide)
        if fixed:
            own = reference.batch_norm_stats(mean.to(wide), var.to(wide), gamma.to(wide), beta.to(wide), 1e-5, 0.0)
        times = None if gate is None else gate.to(wide)
        return {"z": reference.batch_norm_apply(y.to(wide), own, shortcut, added, _act(variant), times).to(t)}

    return Comparison(ours, expected, sums=0)


def _check_norm_pool(layer: CheckLayer, _: str, draw: Draw) -> Comparison:
    """Normalisation, ReLU and max pool in one pass, and the values that the pool kept."""
    y, stats = draw.normalised(layer.output)

    def ours() -> Results:
        z, peaks = batch_norm_pool(y, stats)
        return {"z": z, "peaks": peaks.y}

    def expected(t: torch.dtype, _: Results) -> Results:
        z, peaks = reference.batch_norm_pool(y.to(_wide(t)), stats.to(_wide(t)))[:2]
        return {"z": z.to(t), "peaks": peaks.to(t)}

    return Comparison(ours, expected)


def _check_norm_pool_backward(layer: CheckLayer, variant: str, draw: Draw) -> Comparison:
    """The gradient of the convolution's output through pool, ReLU and batch norm, and the sums of the ReLU's."""
    frozen = "frozen" in variant
    y, stats = draw.normalised(layer.output)
    coefs = draw.coefs(layer.co, frozen)
    _, *found = reference.batch_norm_pool(y.double(), stats.double())
    peaks, place = (v.contiguous(memory_format=torch.channels_last) for v in found)
    peaks, dz = peaks.to(draw.dtype), draw.images(place.shape)

    def ours() -> Results:
        dy = batch_norm_pool_backward(dz, place, y, stats, coefs, frozen=frozen)
        return {"dy": dy, **_named("sum_g sum_gy", merge_sums(batch_norm_sums(dz, peaks, stats)))}

    def expected(t: torch.dtype, _: Results) -> Results:
        g = reference.max_pool_gradient(dz.to(_wide(t)), place, (y.shape[2], y.shape[3]))
        g = torch.where(reference.batch_norm_apply(y.double(), stats.double()) > 0, g, 0.0)
        return {"dy": _gradient(g, y, coefs, t), **_masked_sums(g, y, stats, t)}

    return Comparison(ours, expected)


def _check_reduce(layer: CheckLayer, variant: str, draw: Draw) -> Comparison:
    """The gradient in front of a ReLU, and its sums."""
    dz = draw.images(layer.output)
    (y, stats), (y2, stats2) = (draw.normalised(layer.output) for _ in range(2))
    activation, residual = _act(variant), _residual(layer, variant, draw)
    recomputed = variant == "mask recomputed" or activation != RELU
    z = None if recomputed else torch.relu(draw.images(layer.output))
    second = (y2, stats2) if "two norms" in variant else None

    def ours() -> Results:
        g, sums = batch_norm_reduce(dz, y, stats, activation=activation, z=z, second=second, residual=residual)
        return {"g": g, **_named("sum_g sum_gy" + " sum_gy2" * (second is not None), merge_sums(sums))}

    def expected(t: torch.dtype, ours: Results) -> Results:
        wide = _wide(t)
        v = z
        if v is None:
            added = None if residual is None else _materialized(residual, layer.co, torch.float64)
            added, other = (added, None) if second is None else (y2.double(), stats2.double())
            v = reference.batch_norm_apply(y.double(), stats.double(), added, other, IDENTITY)
        g = reference.in_front(dz.to(wide), v.to(wide), activation).to(t)
        results = {"g": g, **_masked_sums(ours["g"], y, stats, t)}
        if second is not None:
            results["sum_gy2"] = _masked_sums(ours["g"], y2, stats2, t)["sum_gy"]
        return results

    return Comparison(ours, expected)


def _check_coefs(layer: CheckLayer, _: str, draw: Draw) -> Comparison:
    """The vectors of ``dy`` and the gradients of gamma and beta."""
    tiles, channels = 300, layer.co
    sum_g, sum_gy, stats = draw.normal(tiles, channels), draw.normal(tiles, channels), draw.stats(layer.output)

    def ours() -> Results:
        coefs, dgamma, dbeta = batch_norm_coefs(sum_g, sum_gy, stats)
        return {**_named("A B C", coefs), "dgamma": dgamma, "dbeta": dbeta}

    def expected(t: torch.dtype, _: Results) -> Results:
        wide = _wide(t)
        sums = torch.stack([sum_g.to(wide).sum(0), sum_gy.to(wide).sum(0)])
        coefs = reference.batch_norm_coefs(sums, stats.to(wide))
        return {**_named("A B C", coefs), "dgamma": stats[1].to(wide) * sums[1], "dbeta": sums[0]}

    return Comparison(ours, expected)


def _check_backward(layer: CheckLayer, variant: str, draw: Draw) -> Comparison:
    """The gradients of one or two convolutions' outputs from one g; or of one, with an addend."""
    g, y, y2 = (draw.images(layer.output) for _ in range(3))
    coefs, coefs2 = draw.coefs(layer.co), draw.coefs(layer.co)

    def ours() -> Results:
        if variant != "two norms":
            return {"dy": batch_norm_backward(g, y, coefs, addend=y2 if variant else None)}
        return _named("dy dy2", batch_norm_backward(g, y, coefs, second=(y2, coefs2)))

    def expected(t: torch.dtype, _: Results) -> Results:
        dy = _gradient(g, y, coefs, t)
        if variant == "two norms":
            return {"dy": dy, "dy2": _gradient(g, y2, coefs2, t)}
        return {"dy": dy + y2.to(dy.dtype) if variant else dy}

    return Comparison(ours, expected, sums=0)


def _check_block(kind: str, road: Request, training: bool, size: tuple[Any, ...], draw: Draw) -> Comparison:
    """A whole block on one road: its output, and in training every gradient and buffer that it leaves."""
    n, image, width = size
    factor, build = BLOCKS[kind]
    with torch.device(draw.device):
        block = build(width).train(training)
    _part(block, draw)
    block.to(draw.dtype).to(memory_format=torch.channels_last)
    shape = (n, factor * width, *image)
    x = (draw.signs(*shape) * (4 + 0.1 * draw.normal(*shape))).to(draw.dtype)
    with torch.no_grad(), implementation("eager"):
        dz = draw.images(copy.deepcopy(block).to("meta")(x.to("meta")).shape)

    def step(t: torch.dtype, road: Request) -> Results:
        with implementation(road):
            if not training:
                with torch.no_grad():
                    return {"z": copy.deepcopy(block).to(t)(x.to(t))}
            return _training_step(copy.deepcopy(block).to(t), x.to(t), dz.to(t))

    # The batch norm behind each of a chain's sums makes them cancel.
    return Comparison(lambda: step(draw.dtype, road), lambda t, _: step(t, "eager"), sums=64)


def _part(block: nn.Module, draw: Draw) -> None:
    """Parameters with which no input of a ReLU comes near zero, where one rounding would decide about a gradient.

    For an input of magnitude 4 and random signs. Each channel of the first convolution follows the signs of one channel
    of the input: normalised, it is near 1 or -1. Each channel of a later one follows two that are zero or near one,
    with weights of 1 and 3: it has four levels, none near their mean. All other weights add little. The addition keeps
    the sign of the larger summand: of the identity, or of a projection, scaled to be that. In a basic pre-activation
    block the first convolution is as a later one: of two levels, the norm behind would cancel the gradients in front.
    """
    with torch.no_grad():
        for name, module in block.named_modules():
            if isinstance(module, nn.Conv2d):
                co, ci, center = module.out_channels, module.in_channels, module.kernel_size[0] // 2
                module.weight.copy_(draw.normal(*module.weight.shape) * (0.03 / math.sqrt(module.weight[0].numel())))
                to = torch.arange(co)
                module.weight[to, to % ci, center, center] += 1
                if name in ("conv2", "conv3") or isinstance(block, PreActBlock):
                    module.weight[to, (to + 1) % ci, center, center] += 3
            elif isinstance(module, nn.BatchNorm2d):
                c, scale = module.num_features, 8 if name.startswith("downsample") else 1
                module.weight.copy_(draw.signs(c) * draw.uniform(0.9, 1.0, c) * scale)
                module.bias.copy_(draw.uniform(-0.05, 0.05, c))
                module.running_mean.copy_(draw.normal(c) * 0.1)  # type: ignore[union-attr, operator]
                module.running_var.copy_(draw.uniform(0.5, 1.5, c))  # type: ignore[union-attr, operator]


def _training_step(block: nn.Module, x: Tensor, dz: Tensor) -> Results:
    x = x.clone().requires_grad_()
    z = block(x)
    z.backward(dz)
    gradients = {f"{name}.grad": p.grad for name, p in block.named_parameters()}
    buffers = {name: b for name, b in block.named_buffers() if b.is_floating_point()}
    return {"z": z.detach(), "x.grad": x.grad, **gradients, **buffers}  # type: ignore[dict-item]


def cases(device_type: str) -> list[CheckCase]:
    """Everything that is checked on ``"cuda"`` or ``"cpu"``, in the order of the report."""
    layers = {name: layer[device_type] for name, layer in LAYERS.items()}
    norms = [(name, "") for name in NORM_LAYERS]
    applied: tuple[str, ...] = ("", "residual", "normalised residual", "padded residual", "fixed statistics")
    applied += ("residual, silu", "gate", "gate, padded residual")
    reduced = ("", "mask recomputed", "two norms", "residual, silu", "two norms, silu", "padded residual, gelu")
    families: list[tuple[str, Callable[..., Comparison], Iterable[tuple[str, str]], bool]] = [
        ("conv_forward", _check_conv_forward, CONV_FORWARD, True),
        ("conv_forward, boxes", partial(_check_conv_tiles, _box_tiles), CONV_BOX, True),
        ("conv_forward, split", partial(_check_conv_tiles, _split_tiles), CONV_SPLIT, True),
        ("conv_forward, wide", partial(_check_conv_tiles, _wide_tiles), CONV_WIDE, True),
        ("conv_forward, gate", _check_conv_gate, CONV_GATE, True),
        ("conv_pool", _check_conv_pool, [("stem", "")], True),
        ("chain_forward", _check_chain, CHAIN, True),
        ("conv_forward_moments", _check_conv_moments, CONV_MOMENTS, True),
        ("conv_dgrad", partial(_check_conv_dgrad, _launchers_tile), CONV_DGRAD, True),
        ("conv_dgrad, boxes", partial(_check_conv_dgrad, _gradient_box_tiles), DGRAD_BOX, True),
        ("conv_wgrad", _check_conv_wgrad, CONV_WGRAD, True),
        ("squeeze", _check_squeeze, SQUEEZE, True),
        ("gate_gradient", _check_gate, GATE, False),
        ("batch_norm_stats", _check_stats, norms, False),
        ("batch_norm_apply", _check_apply, [("expand", variant) for variant in applied], False),
        ("batch_norm_pool", _check_norm_pool, [("stem", "")], False),
        ("batch_norm_pool", _check_norm_pool_backward, [("stem", "backward"), ("stem", "frozen backward")], False),
        ("batch_norm_reduce", _check_reduce, [("expand", variant) for variant in reduced], False),
        ("batch_norm_coefs", _check_coefs, norms, False),
        ("batch_norm_backward", _check_backward, [("expand", ""), ("expand", "addend"), ("deep", "two norms")], False),
    ]
    found = []
    for kernel, check, variants, multiplies in families:
        for layer, variant in variants:
            name = f"{layers[layer]}; {variant}" if variant else str(layers[layer])
            prepare = partial(check, layers[layer], variant)
            found += [CheckCase(kernel, name, f, prepare) for f in FORMATS if multiplies or f != "tf32"]
    for kind in BLOCKS:
        for road, training in product(ROADS, (False, True)):
            name = f"{kind}; {'training' if training else 'inference'}"
            prepare = partial(_check_block, kind, road, training, BLOCK_SIZES[device_type])
            found += [CheckCase(f"block ({road})", name, f, prepare) for f in FORMATS]
    return found
