"""Recognition: what a module computes, read off its own forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from resnet_fused import recognise_preact
from resnet_fused.engine import eligible
from resnet_fused.kernels.activation import RELU
from resnet_fused.modules import BlockLayout, FusedBlock, StemLayout
from resnet_fused.pieces import Graph, UnitsLayout, block_of, units_of
from resnet_fused.traced import EVALUATION, Tracer, Untraceable, Value, forward_of, own_class, trace


def recognise(module: nn.Module) -> BlockLayout | UnitsLayout | str:
    """The layout of ``module``, or in words why it cannot run fused.

    The module's own forward is traced symbolically, in training and in evaluation, and must be the same in both. If it
    comes to ``act(units(x) + shortcut(x))``, or to units alone, or to a pre-activation block, and to nothing else, it
    is a block. Otherwise the units in it are found, with what stands between them. So it matters neither which library
    the class is from nor how it names its submodules; a forward that branches on shapes or values, or that writes to
    the module, is refused. Nothing is computed, and the module is not touched.
    """
    try:
        through, forward = _traced(module)
    except Untraceable as reason:
        return str(reason)
    graph = Graph(module, forward)
    found = recognise_preact.match(graph) or block_of(graph) if _is_plain(module) else None
    return found or units_of(graph, through)


def _traced(module: nn.Module) -> tuple[list[str], fx.Graph]:
    """The names of the modules inside ``module`` that are seen through, and its graph.

    Inside that are called as they are: modules without units, and those that can not be traced by themselves.
    """
    through = _through(module)
    try:
        return through, forward_of(module, frozenset(through))
    except Untraceable:
        narrower = _traceable(module)
        if narrower == through:
            raise
    return narrower, forward_of(module, frozenset(narrower))


def _traceable(module: nn.Module, prefix: str = "") -> list[str]:
    """Those of :func:`_through` that can be traced by themselves."""
    found: list[str] = []
    for name, part in module._modules.items():
        if part is None or _is_leaf(part):
            continue
        if is_container(part):
            found += [prefix + name, *_traceable(part, f"{prefix}{name}.")]
            continue
        try:
            inside, _ = _traced(part)
        except Untraceable:
            continue
        found += [prefix + name, *(f"{prefix}{name}.{inner}" for inner in inside)]
    return found


def _through(module: nn.Module, prefix: str = "") -> list[str]:
    """The names of the modules inside ``module`` that may be seen through: containers, and what has units."""
    found: list[str] = []
    for name, part in module._modules.items():
        if part is None or _is_leaf(part):
            continue
        found += [prefix + name, *_through(part, f"{prefix}{name}.")]
    return found


def _is_leaf(module: nn.Module) -> bool:
    if _is_norm_or_convolution(module) or _is_watched(module):
        return True
    if is_container(module):
        return False
    if not module._modules or module._parameters or module._buffers:
        return not has_units(module)
    return not (has_units(module) or _is_plain(module) or _is_gate(module))


def _is_gate(module: nn.Module) -> bool:
    """Whether ``module`` multiplies its input with what it makes of the means of its images."""
    if not any(isinstance(part, _ConvNd | nn.Linear) for part in module.modules()):
        return False
    try:
        with torch.no_grad():
            graph = Graph(module, trace(module, EVALUATION, lambda: Tracer(lambda part, _: not is_container(part))))
    except Untraceable:
        return False
    x, *_, output = graph.nodes
    gate = graph.gate(x) if x.op == "placeholder" else None
    return gate is not None and output.args[0] is gate.product


def is_container(module: nn.Module) -> bool:
    """Whether ``module`` only holds others, in a list, a dictionary or a sequence."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict) or own_class(module).forward is nn.Sequential.forward


def has_units(module: nn.Module) -> bool:
    """Whether a convolution and a batch norm are inside ``module``."""
    parts = list(module.modules())
    convolutions = any(isinstance(part, nn.Conv2d) for part in parts)
    return convolutions and any(isinstance(part, _BatchNorm) or eligible.is_norm(part) for part in parts)


def _is_plain(module: nn.Module) -> bool:
    """Whether all modules inside ``module`` are what units and shortcuts are made of, and nobody watches them."""
    return all(
        not _is_watched(part)
        and (_is_small(part) or _is_norm_or_convolution(part) or is_container(part) or bool(part._modules))
        and (_is_norm_or_convolution(part) or _is_plain(part))
        for part in module._modules.values()
        if part is not None
    )


def _is_small(module: nn.Module) -> bool:
    return type(module) is nn.AvgPool2d or eligible.activation_of(module) is not None


def _is_norm_or_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | _BatchNorm) or eligible.is_norm(module)


def _is_watched(module: nn.Module) -> bool:
    return "forward" in vars(module) or eligible.hooked(module) or parametrize.is_parametrized(module)


NETWORKS = (
    ("torchvision.models.resnet", "ResNet"),
    ("timm.models.resnet", "ResNet"),
    ("transformers.models.resnet.modeling_resnet", "ResNetEmbeddings"),
)
"""Modules and names of classes whose forwards, up to a pool, are known. That of a whole network may look at more than a
trace shows: at its tensors' values, its children's kinds, attributes that come later."""


def recognise_stem(module: nn.Module) -> StemLayout | None:
    """How ``module``, one of NETWORKS, begins, if that is a convolution, batch norm and activation; else None.

    Its forward is traced as by :func:`recognise`, but for its children, which are called as they are: the first of them
    on the input alone, each on the result of the one before. The first may be a sequence that ends with the
    convolution; or, with a max pool behind it, a block of all three. What comes behind does not matter.
    """
    kind = own_class(module)
    if (kind.__module__, kind.__qualname__) not in NETWORKS:
        return None
    try:
        with torch.no_grad():
            stem = _match_stem(module, trace(module, EVALUATION, _StemTracer))
        with torch.enable_grad():
            return stem if stem == _match_stem(module, trace(module, EVALUATION, _StemTracer)) else None
    except Untraceable:
        return None


def _match_stem(module: nn.Module, graph: fx.Graph) -> StemLayout | None:
    parts = [str(call.target) for call in _calls(graph)]
    for i, part in enumerate(parts):
        if eligible.why_not_pooled(module.get_submodule(part)) is None:
            return _stem(module, parts[:i], part)
    return _stem(module, parts[:3], None)


def _calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """The calls of modules from the input on, each on the result of the one before, which nothing else reads."""
    before = next(node for node in graph.nodes if node.op == "placeholder")
    while len(before.users) == 1 and (node := next(iter(before.users))).op == "call_module":
        if node.args != (before,) or node.kwargs:
            return
        yield node
        before = node


def _stem(module: nn.Module, unit: list[str], pool: str | None) -> StemLayout | None:
    if len(unit) == 3:
        first, norm, act = map(module.get_submodule, unit)
        name, conv = unit[0], cast(Any, first)
        if own_class(first).forward is nn.Sequential.forward and first._modules:
            last, conv = list(first._modules.items())[-1]
            name = f"{name}.{last}"
        activation = eligible.activation_of(act)
        if activation is None or eligible.why_unfusable(conv, norm) is not None:
            return None
        if pool is None or activation != RELU:
            return StemLayout(name, unit[1], None, tuple(unit), activation)
        return StemLayout(name, unit[1], pool, (*unit, pool))
    if len(unit) != 1 or pool is None:
        return None
    block = module.get_submodule(unit[0])
    layout = block.described()[0] if isinstance(block, FusedBlock) else recognise(block)
    if (
        not isinstance(layout, BlockLayout)
        or layout.residual
        or len(layout.units) != 1
        or layout.units[0].activation != RELU
    ):
        return None
    conv_name, norm_name = (f"{unit[0]}.{name}" for name in layout.units[0][:2])
    return StemLayout(conv_name, norm_name, pool, (*unit, pool))


class _StemTracer(Tracer):
    """Calls every child of the root as it is. The input has as many channels as the first convolution takes."""

    def __init__(self) -> None:
        super().__init__(lambda module, name: True)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op != "placeholder":
            return super().proxy(node)
        convs = (m for m in cast(nn.Module, self.root).modules() if isinstance(m, nn.Conv2d))
        return _Image(node, self, next((conv.in_channels for conv in convs), 0))


class _Image(Value):
    """A network's input, of which a forward may ask the number of channels, and no other size."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, channels: int) -> None:
        super().__init__(node, tracer)
        self.channels = channels

    @property
    def shape(self) -> Any:
        return _Shape(self.channels)


class _Shape:
    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __getitem__(self, i: Any) -> Any:
        if i != 1:
            raise Untraceable("its forward looks at the size of its input")
        return self.channels
