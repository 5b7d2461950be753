"""Recognition: what a module computes, read off its own forward."""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from resnet_fused import recognise_preact
from resnet_fused.engine import eligible
from resnet_fused.kernels.activation import IDENTITY, RELU
from resnet_fused.modules import BlockLayout, FusedBlock, StemLayout, UnitNames, traced_forward

_PARTS = {"conv": nn.Conv2d, "norm": _BatchNorm, "relu": nn.ReLU, "identity": nn.Identity, "pool": nn.AvgPool2d}
_EXACT = (nn.ReLU, nn.Identity, nn.AvgPool2d)
_CALLS = {
    "relu": (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
    "add": (operator.add, operator.iadd, torch.add, "add", "add_"),
}
_IN_PLACE = (operator.iadd, "add_")


class _NoBlock(Exception):
    """Says why a module is not recognised."""


def recognise(module: nn.Module) -> BlockLayout | str:
    """The layout of ``module``, or in words why it cannot run fused.

    Its submodules must be those of a plain block, without hooks or parametrizations. Then the module's own forward is
    traced symbolically, in training and in evaluation, and must come to ``relu(units(x) + shortcut(x))``, or to units
    alone, and to nothing else, and to the same in both. So it matters neither which library the class is from nor how
    it names its submodules; a forward that looks at shapes or values, or that writes to the module, is refused. Nothing
    is computed, and the module is not touched.
    """
    try:
        _check_parts(module)
        with torch.no_grad():
            layout = _match(module, _trace(module, _State(training=False)))
        with torch.enable_grad():
            for state in _STATES:
                _compare(module, layout, state)
        _check_units(module, layout)
    except _NoBlock as reason:
        return str(reason)
    return layout


NETWORKS = (
    ("torchvision.models.resnet", "ResNet"),
    ("timm.models.resnet", "ResNet"),
    ("transformers.models.resnet.modeling_resnet", "ResNetEmbeddings"),
)
"""Modules and names of classes whose forwards, up to a pool, are known. That of a whole network may look at more than a
trace shows: at its tensors' values, its children's kinds, attributes that come later."""


def recognise_stem(module: nn.Module) -> StemLayout | None:
    """How ``module``, one of NETWORKS, begins, if that is a convolution, batch norm, ReLU and max pool; else None.

    Its forward is traced as by :func:`recognise`, but for its children, which are called as they are: the first of them
    on the input alone, each on the result of the one before. One of them may be a block of a convolution, batch norm
    and ReLU. What comes behind the pool does not matter.
    """
    kind = _own_class(module)
    if (kind.__module__, kind.__qualname__) not in NETWORKS:
        return None
    if not any(eligible.why_not_pooled(child) is None for child in module.children()):
        return None
    state = _State(training=False)
    try:
        with torch.no_grad():
            stem = _match_stem(module, _trace(module, state, _StemTracer))
        with torch.enable_grad():
            return stem if stem == _match_stem(module, _trace(module, state, _StemTracer)) else None
    except _NoBlock:
        return None


def _match_stem(module: nn.Module, graph: fx.Graph) -> StemLayout | None:
    before = next(node for node in graph.nodes if node.op == "placeholder")
    parts: list[str] = []
    while len(before.users) == 1 and (node := next(iter(before.users))).op == "call_module":
        if node.args != (before,) or node.kwargs:
            break
        parts.append(str(node.target))
        if eligible.why_not_pooled(module.get_submodule(parts[-1])) is None:
            return _stem(module, parts)
        before = node
    return None


def _stem(module: nn.Module, parts: list[str]) -> StemLayout | None:
    *unit, pool = parts
    if len(unit) == 3:
        conv, norm, relu = map(module.get_submodule, unit)
        fits = eligible.why_unfusable(conv, norm) is None and type(relu) is nn.ReLU
        return StemLayout(unit[0], unit[1], pool, tuple(parts)) if fits else None
    if len(unit) != 1:
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
    return StemLayout(conv_name, norm_name, pool, tuple(parts))


def _check_parts(module: nn.Module, prefix: str = "") -> None:
    for name, part in module.named_children():
        name = prefix + name
        if "forward" in vars(part):
            raise _NoBlock(f"the forward of {name} is replaced on the instance")
        if eligible.hooked(part):
            raise _NoBlock(f"hooks are registered on {name}")
        if parametrize.is_parametrized(part):
            raise _NoBlock(f"{name} is parametrised")
        if type(part) in _EXACT or isinstance(part, nn.Conv2d | _BatchNorm):
            continue
        if not part._modules and not isinstance(part, nn.Sequential):
            raise _NoBlock(f"{name} is {type(part).__qualname__}, which is no part of a plain block")
        _check_parts(part, f"{name}.")


class _BlockProxy(fx.Proxy):
    """A proxy that tells ``a += b`` from ``a = a + b``."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _BlockTracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.modes = _modes()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _BlockProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, tuple(_PARTS.values()))

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_module(m, traced_forward(m, forward), args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise _NoBlock("its forward switches gradients, autocast or saved-tensor hooks")
        return super().create_node(*args, **kwargs)


class _StemTracer(_BlockTracer):
    """Calls every child of the root as it is. The input has as many channels as the first convolution takes."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op != "placeholder":
            return super().proxy(node)
        convs = (m for m in cast(nn.Module, self.root).modules() if isinstance(m, nn.Conv2d))
        return _Image(node, self, next((conv.in_channels for conv in convs), 0))


class _Image(_BlockProxy):
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
            raise _NoBlock("its forward looks at the size of its input")
        return self.channels


def _modes() -> tuple[Any, ...]:
    """What a forward may switch for a part of itself."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


class _State(NamedTuple):
    """In which the forward is traced; ``frozen``: batch norms are in evaluation all the same."""

    training: bool
    frozen: bool = False

    def __str__(self) -> str:
        if self.frozen:
            return "in training with batch norm in evaluation"
        return "in training" if self.training else "with gradients"


_STATES = (_State(training=True), _State(training=True, frozen=True), _State(training=False))


def _compare(module: nn.Module, layout: BlockLayout, state: _State) -> None:
    try:
        other = _match(module, _trace(module, state))
    except _NoBlock as reason:
        raise _NoBlock(f"{state}, {reason}") from reason
    if other != layout:
        raise _NoBlock(f"its forward {state} is not that in evaluation")


def _trace(module: nn.Module, state: _State, tracer: type[_BlockTracer] = _BlockTracer) -> fx.Graph:
    if "forward" in vars(module):
        raise _NoBlock("its forward is replaced on the instance")
    parameters = list(signature(_own_class(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
        raise _NoBlock("its forward takes more than one input")
    twins: dict[nn.Module, nn.Module] = {}
    failure = ""
    with same_random_numbers(_NoBlock):
        try:
            twin = _twin(module, state, twins)
            before = [_attributes(part) for part in twins.values()]
            graph = tracer().trace(twin)
        except _NoBlock as reason:
            failure = str(reason)
        except Exception as error:  # whatever the forward of a stranger may raise
            failure = f"its forward cannot be traced: {(str(error) or type(error).__name__).splitlines()[0]}"
    if failure:  # raised here, where the error is gone, and with it what the forward had open
        raise _NoBlock(failure)
    for part, attributes in zip(twins.values(), before, strict=True):
        now = _attributes(part)
        if now.keys() != attributes.keys() or any(not _is_same(now[k], v) for k, v in attributes.items()):
            raise _NoBlock("its forward writes to the module")
    return graph


@contextmanager
def same_random_numbers(error: type[Exception]) -> Iterator[None]:
    """Random states stay as they are; raises ``error`` if the ``with`` block draws from them."""
    with _disable_current_modes():  # in which a state would be a tensor without data
        python, states = random.getstate(), torch.get_rng_state()
    try:
        yield
        with _disable_current_modes():
            drawn = random.getstate() != python or not torch.equal(torch.get_rng_state(), states)
        if drawn:
            raise error("its forward draws random numbers")
    finally:
        with _disable_current_modes():
            random.setstate(python)
            torch.set_rng_state(states)


def _attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    """All that a forward might write to: values, containers with what they hold, tensors with their version."""
    own = {("", name): value for name, value in vars(module).items()}
    kept = ("_parameters", "_buffers", "_modules")
    own |= {(kind, name): value for kind in kept for name, value in vars(module)[kind].items()}
    return {key: (value, _content(value)) for key, value in own.items()}


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    return copy.copy(value) if type(value) in (list, dict, set) else None


def _is_same(now: tuple[Any, Any], before: tuple[Any, Any]) -> bool:
    """Whether a value and its content are: what a container holds is told apart by identity."""
    if now[0] is not before[0] or type(now[1]) is not type(before[1]):
        return False
    if isinstance(now[1], list | dict | set):
        held, held_before = (list(c.items() if isinstance(c, dict) else c) for c in (now[1], before[1]))
        return len(held) == len(held_before) and all(map(_is_identical, held, held_before))
    return bool(now[1] == before[1])


def _is_identical(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, tuple) and len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True)))


def _own_class(module: nn.Module) -> type[nn.Module]:
    """That of ``module``, or what it was before it was converted."""
    return cast(type[nn.Module], getattr(module, "original", type(module)))


def _twin(module: nn.Module, state: _State, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy to be traced: attributes, containers and tensors of its own, so that the original stays untouched.

    ``twins``: of every module so far, by the original. Parts that are not traced into keep their tensors.
    """
    if module not in twins:
        twin = object.__new__(_own_class(module))
        twins[module] = twin
        frozen = state.frozen and isinstance(module, _BatchNorm)
        vars(twin).update(vars(module), training=state.training and not frozen)
        leaf = not module._modules
        for name in ("_parameters", "_buffers"):
            vars(twin)[name] = {k: t if leaf else _copied(t) for k, t in vars(module)[name].items()}
        vars(twin)["_modules"] = {
            name: None if part is None else _twin(part, state, twins) for name, part in module._modules.items()
        }
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                vars(twin)[name] = _own(value, twins) if name != "training" else vars(twin)["training"]
    return twins[module]


def _own(value: Any, twins: dict[nn.Module, nn.Module]) -> Any:
    """``value``; a container, which the forward may write to, as a copy that holds twins instead of modules."""
    if type(value) in (list, tuple, set):
        return type(value)(_own(v, twins) for v in value)
    if type(value) is dict:
        return {k: _own(v, twins) for k, v in value.items()}
    return twins.get(value, value) if isinstance(value, nn.Module) else value


def _copied(t: Tensor | None) -> Tensor | None:
    """The same values in memory of their own."""
    if t is None:
        return None
    with torch.no_grad():
        return nn.Parameter(t.clone(), t.requires_grad) if isinstance(t, nn.Parameter) else t.clone()


def _match(module: nn.Module, graph: fx.Graph) -> BlockLayout:
    if (found := recognise_preact.match(module, graph)) is not None:
        return found
    *inner, output = [node for node in graph.nodes if node.op != "placeholder"]
    if any(len(node.users) != 1 for node in inner) or not isinstance(output.args[0], fx.Node):
        raise _NoBlock("its forward uses a value twice, drops one, or returns more than one tensor")
    result = output.args[0]
    relu = _kind(module, result) == "relu"
    join = _operand(module, result) if relu else result
    if _kind(module, join) != "add":
        return BlockLayout(_units(module, _path(module, result)), residual=False)
    paths = [_path(module, operand) for operand in _operands(join)]
    if join.target in _IN_PLACE and not paths[0]:
        raise _NoBlock("its forward adds to its input in place")
    branch, shortcut = sorted(paths, key=lambda path: (_pooled(module, path), -len(path)))
    *units, last = _units(module, branch)
    if last.activation != IDENTITY:
        raise _NoBlock("a ReLU stands between the last batch norm and the addition")
    in_place = join.target in _IN_PLACE
    layout = BlockLayout((*units, last._replace(activation=RELU if relu else IDENTITY)), in_place=in_place)
    if not shortcut:
        return layout
    pool = str(shortcut.pop(0).target) if _pooled(module, shortcut) else None
    projection = _units(module, shortcut)
    if len(projection) != 1 or projection[0].activation != IDENTITY:
        raise _NoBlock("its shortcut is neither the identity nor one convolution with batch norm")
    return layout._replace(shortcut=projection[0], pool=pool)


def _kind(module: nn.Module, node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        return next(kind for kind, types in _PARTS.items() if isinstance(part, types))
    for kind, targets in _CALLS.items():
        if node.target in targets:
            return kind
    raise _NoBlock(f"its forward computes {getattr(node.target, '__name__', node.target)}")


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    if len(node.args) == 2 and not node.kwargs and len(node.all_input_nodes) == 2:
        return node.all_input_nodes[0], node.all_input_nodes[1]
    raise _NoBlock("its forward adds something else than a branch and a shortcut")


def _operand(module: nn.Module, node: fx.Node) -> fx.Node:
    """The node that the unary ``node`` works on, behind any identities."""
    if len(node.all_input_nodes) != 1:
        raise _NoBlock(f"its forward calls {node.target} with other arguments than one tensor")
    before = node.all_input_nodes[0]
    return _operand(module, before) if _kind(module, before) == "identity" else before


def _path(module: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The operations from the input to ``node``, without identities."""
    path: list[fx.Node] = []
    while (kind := _kind(module, node)) != "input":
        if kind == "add":
            raise _NoBlock("it is more than one block")
        if kind != "identity":
            path.insert(0, node)
        node = _operand(module, node)
    return path


def _pooled(module: nn.Module, path: list[fx.Node]) -> bool:
    return bool(path) and _kind(module, path[0]) == "pool"


def _units(module: nn.Module, path: list[fx.Node]) -> tuple[UnitNames, ...]:
    kinds = [_kind(module, node) for node in path]
    units, at = [], 0
    while at < len(path):
        if kinds[at : at + 2] != ["conv", "norm"]:
            raise _NoBlock(f"{path[at].target} is not part of a convolution, batch norm and ReLU in this order")
        relu = kinds[at + 2 : at + 3] == ["relu"]
        units.append(UnitNames(str(path[at].target), str(path[at + 1].target), RELU if relu else IDENTITY))
        at += 3 if relu else 2
    if not units:
        raise _NoBlock("it has no convolution")
    return tuple(units)


def _check_units(module: nn.Module, layout: BlockLayout) -> None:
    channels = []
    for unit in layout.all_units():
        conv, norm = module.get_submodule(unit.conv), module.get_submodule(unit.norm)
        inside = layout.norm_first and eligible.activation_in(norm) == unit.activation
        if (reason := eligible.why_unfusable(conv, norm, with_activation=inside)) is not None:
            raise _NoBlock(f"{unit.conv}: {reason}")
        channels.append((conv.in_channels, conv.out_channels))
    width = channels[len(layout.units) - 1][1]
    other = channels[-1][1] if layout.shortcut is not None else channels[0][0]
    if layout.residual and width != other:
        raise _NoBlock(f"its branch has {width} channels and its shortcut {other}")
