"""Units in the graph of a forward: which of its operations run as one chain, and the forward that is left."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from inspect import ismodule
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from resnet_fused.engine import eligible
from resnet_fused.kernels.activation import IDENTITY, Activation
from resnet_fused.modules import BlockLayout, UnitNames

_IN_PLACE = (operator.iadd, "add_")
_ADDITIONS = (operator.add, torch.add, "add", *_IN_PLACE)
_PRODUCTS = (operator.mul, torch.mul, "mul")
_EXPANSION = ("call_method", "expand_as")


class Piece(NamedTuple):
    """Units that run as one chain on one input, with the addition of a shortcut of another value if it is residual.

    ``passed``: the modules on the way that are activations or identities, by name. ``gate``: the number of the function
    that makes of the mean of each image what the branch is multiplied with, or None; ``pools``: the modules that take
    that mean where the forward does.
    """

    layout: BlockLayout
    passed: tuple[tuple[str, Activation], ...]
    gate: int | None = None
    pools: tuple[str, ...] = ()


class Program:
    """Functions by their ``sources``: Python, and what it calls by name that is not PyTorch's. Pickles as these."""

    def __init__(self, sources: tuple[tuple[str, dict[str, Any]], ...]) -> None:
        self.sources = sources
        self.functions = tuple(_made(*source) for source in sources)

    def __reduce__(self) -> Any:
        return Program, (self.sources,)

    def __deepcopy__(self, memo: Any) -> Program:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.sources == other.sources

    __hash__ = None  # type: ignore[assignment]


_NAMES = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan, "NoneType": type(None)}


def _made(text: str, names: dict[str, Any]) -> Any:
    space = {**_NAMES, **names}
    exec(compile(text, "<resnet_fused.pieces>", "exec"), space)
    return space["forward"]


class UnitsLayout(NamedTuple):
    """What a module computes, with ``pieces`` that run fused between operations that run as they are.

    ``program``: its forward; then each piece as its modules compute it, of its input and what its shortcut reads; then
    the gates.
    ``through``: the names of the modules inside that are seen through. ``joins``: whether two values are added.
    ``rest``: the convolutions that are in no piece, by name, and why.
    """

    pieces: tuple[Piece, ...]
    program: Program
    through: tuple[str, ...]
    joins: bool
    rest: tuple[tuple[str, str], ...]


class Graph:
    """The graph of the forward of ``module``, with questions about its nodes."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.nodes = module, list(graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.calls = Counter(module.get_submodule(str(n.target)) for n in self.nodes if n.op == "call_module")
        self.read = {str(n.target).rpartition(".")[0] for n in self.nodes if n.op == "get_attr"}
        self._roots: dict[fx.Node, frozenset[fx.Node]] = {}

    def part(self, node: fx.Node) -> nn.Module:
        """The module that ``node`` calls."""
        return self.module.get_submodule(str(node.target))

    def kind(self, node: fx.Node) -> str:
        """What ``node`` does: input, conv, norm, activation, identity, pool, add, or other."""
        if node.op == "placeholder":
            return "input"
        if (activation := self.activation(node)) is not None:
            return "identity" if activation == IDENTITY else "activation"
        if node.op != "call_module":
            return "add" if node.target in _ADDITIONS else "other"
        part = self.part(node)
        if not _is_alone(node):
            return "other"
        if isinstance(part, nn.Conv2d):
            return "conv"
        if isinstance(part, _BatchNorm) or eligible.is_norm(part):
            return "norm"
        return "pool" if type(part) is nn.AvgPool2d else "other"

    def activation(self, node: fx.Node) -> Activation | None:
        """That which ``node`` is of one value, or None."""
        if node.op == "call_module":
            return eligible.activation_of(self.part(node)) if _is_alone(node) else None
        if node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
            return eligible.activation_of_call(node.target, node.args, node.kwargs)
        return None

    def operands(self, node: Any) -> tuple[fx.Node, ...]:
        """The two values that ``node`` adds, or nothing if it is no such addition."""
        if not isinstance(node, fx.Node) or self.kind(node) != "add" or len(node.args) != 2 or node.kwargs:
            return ()
        return tuple(node.all_input_nodes) if len(node.all_input_nodes) == 2 else ()

    def is_in_place(self, add: fx.Node) -> bool:
        """Whether an addition writes to its first operand."""
        return add.target in _IN_PLACE

    def behind(self, node: Any) -> Any:
        """The value that ``node`` is, behind any identities."""
        while isinstance(node, fx.Node) and self.kind(node) == "identity":
            node = node.all_input_nodes[0]
        return node

    def unread(self, node: fx.Node) -> list[fx.Node]:
        """``node``, and the identities behind it up to one that is not read by another identity alone."""
        found = [node]
        while len(found[-1].users) == 1 and self.kind(user := next(iter(found[-1].users))) == "identity":
            found.append(user)
        return found

    def following(self, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
        """The identities behind ``node``, and the only one that reads their result; None if several do, or nobody."""
        passed: list[fx.Node] = []
        while len(node.users) == 1:
            user = next(iter(node.users))
            if self.kind(user) != "identity":
                return passed, user
            passed.append(user)
            node = user
        return passed, None

    def gate(self, value: fx.Node) -> Gate | None:
        """That which ``value``, a norm's result, is multiplied with, if it depends on the means of its images alone."""
        product = next((user for user in value.users if user.target in _PRODUCTS and len(user.args) == 2), None)
        if product is None or product.kwargs or value not in product.args:
            return None
        _, result = sorted(product.args, key=lambda operand: operand is not value)
        if not isinstance(result, fx.Node) or result is value:
            return None
        expansion = result if (result.op, result.target, result.args[1:]) == (*_EXPANSION, (value,)) else None
        gate = Gate(value, result if expansion is None else cast(fx.Node, result.args[0]), product, expansion)
        pending = [gate.result]
        while pending:
            node = pending.pop()
            if node is value or node in gate.nodes:
                continue
            if not isinstance(node, fx.Node) or node.op in ("placeholder", "get_attr", "output"):
                return None
            if value in node.all_input_nodes and not (self.is_squeeze(node) or self._counts_images(node)):
                return None
            gate.nodes.append(node)
            pending += node.all_input_nodes
        nodes = {value, *gate.all_nodes()}
        apart = all(user in nodes or user is product for node in nodes for user in node.users)
        # Of several, each might be written to.
        squeezes = [node for node in gate.nodes if value in node.all_input_nodes and self.is_squeeze(node)]
        return gate if apart and len(squeezes) == 1 else None

    def is_squeeze(self, node: fx.Node) -> bool:
        """Whether ``node`` is the mean of each image of its input."""
        if node.op == "call_module":
            return eligible.takes_means(self.part(node)) and _is_alone(node)
        if node.target is F.adaptive_avg_pool2d:
            return len(node.args) == 2 and node.args[1] in (1, (1, 1), [1, 1]) and not node.kwargs
        if node.target not in ("mean", torch.mean) or len(node.args) < 2 or not isinstance(node.args[1], tuple | list):
            return False
        known = node.kwargs.keys() <= {"keepdim"} and len(node.args) < 4
        return known and sorted(d % 4 for d in node.args[1] if isinstance(d, int)) == [2, 3]

    def _counts_images(self, node: fx.Node) -> bool:
        """Whether ``node`` is the shape of a value, of which images and channels alone are read."""
        if (node.target, node.args[1:]) != (getattr, ("shape",)):
            return node.target == "size" and node.args[1:] in ((0,), (1,))
        return all(user.target is operator.getitem and user.args[1] in (0, 1) for user in node.users)

    def roots(self, node: fx.Node) -> frozenset[fx.Node]:
        """The values whose memory that of ``node`` may be."""
        if node not in self._roots:
            found = frozenset([node])
            if self.kind(node) not in ("input", "conv", "norm"):
                found = found.union(*map(self.roots, node.all_input_nodes))
            self._roots[node] = found
        return self._roots[node]

    def writes(self, node: fx.Node) -> bool:
        """Whether ``node`` may write to what it reads."""
        if node.op == "call_module":
            parts = self.part(node).modules()
            return any(getattr(part, "inplace", not type(part).__module__.startswith("torch.nn.")) for part in parts)
        if node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
            switched = any(value is True for value in (*node.args, node.kwargs.get("inplace"))) or "out" in node.kwargs
            return switched or name in _WRITERS or (name.endswith("_") and not name.endswith("__"))
        return False

    def is_safe(self, view: fx.Node, pieces: Container[fx.Node]) -> bool:
        """Whether ``view`` may as well be a copy: of the same dtype, and nothing outside of ``pieces`` writes to it."""
        if any(isinstance(size, torch.dtype) for size in view.args):
            return False
        writers = (node for node in self.nodes if node not in pieces and self.writes(node))
        return not any(self.roots(view) & self.roots(source) for node in writers for source in node.all_input_nodes)

    def is_free(self, nodes: Sequence[fx.Node], *reads: fx.Node | None) -> bool:
        """Whether ``nodes`` might all run where the last of them stands: nothing between writes to what they read."""
        own, places = set(nodes), [self.place[node] for node in nodes]
        read = frozenset().union(*(self.roots(node) for node in reads if node is not None))
        between = (node for node in self.nodes[min(places) : max(places)] if node not in own and self.writes(node))
        return not any(read & self.roots(source) for node in between for source in node.all_input_nodes)


@dataclass(eq=False)
class Gate:
    """``product``: of ``value`` and of what ``nodes`` make of its images' means, the ``result``; perhaps expanded."""

    value: fx.Node
    result: fx.Node
    product: fx.Node
    expansion: fx.Node | None
    nodes: list[fx.Node] = field(default_factory=list)

    def all_nodes(self) -> list[fx.Node]:
        """All but the product."""
        return self.nodes if self.expansion is None else [*self.nodes, self.expansion]


def _is_alone(node: fx.Node) -> bool:
    """Whether ``node`` has one argument, and that is a value."""
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


_WRITERS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")


@dataclass(eq=False)
class Chain:
    """Units in a graph, one on the result of the other: the nodes of each, in order, and their names.

    Those of the last hold the product with the ``gate``, and the addition of what ``source`` is, or of the
    ``projection`` of it, if there are any.
    """

    nodes: list[list[fx.Node]]
    units: list[UnitNames]
    gate: Gate | None = None
    source: fx.Node | None = None
    projection: Chain | None = None
    in_place: bool = False
    parts: list[Chain] = field(default_factory=list)

    @property
    def x(self) -> fx.Node:
        return self.nodes[0][0].all_input_nodes[0]

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1][-1]

    @property
    def read(self) -> fx.Node | None:
        """What the shortcut reads."""
        return self.source if self.projection is None else self.projection.x

    def all_nodes(self) -> list[fx.Node]:
        """Those of the units, of the gate and of the projection."""
        own = self.own_nodes() + ([] if self.gate is None else self.gate.all_nodes())
        return own if self.projection is None else own + self.projection.all_nodes()

    def own_nodes(self) -> list[fx.Node]:
        """Those of the units."""
        return [node for unit in self.nodes for node in unit]

    def split(self) -> list[Chain]:
        """Each unit by itself."""
        if len(self.units) == 1 and self.projection is None:
            return []
        *inner, last = (Chain([nodes], [unit]) for nodes, unit in zip(self.nodes, self.units, strict=True))
        last.in_place, last.source, last.gate = self.in_place, self.source, self.gate
        if self.projection is None:
            return [*inner, last]
        last.source = self.projection.end
        return [*inner, self.projection, last]


def units_of(graph: Graph, through: Sequence[str]) -> UnitsLayout | str:
    """The units in ``graph``, or why there are none. ``through``: see :class:`UnitsLayout`."""
    chains, rest = _chains(graph)
    if not chains:
        return "; ".join(f"{name}: {reason}" for name, reason in rest) or "its forward calls no convolution"
    for chain in chains:
        chain.parts = chain.split()
    every = [*chains, *(part for chain in chains for part in chain.parts)]
    numbers = {chain: i for i, chain in enumerate(every)}
    sources = [_source(graph, graph.nodes, chains, numbers), *(_piece_source(graph, chain, numbers) for chain in every)]
    gates = list(dict.fromkeys(chain.gate for chain in every if chain.gate is not None))
    where = {gate: len(sources) + i for i, gate in enumerate(gates)}
    sources += [_gate_source(graph, gate) for gate in gates]
    pieces = tuple(_piece(graph, chain, where) for chain in every)
    joins = any(map(graph.operands, graph.nodes))
    return UnitsLayout(pieces, Program(tuple(sources)), tuple(through), joins, tuple(rest))


def block_of(graph: Graph) -> BlockLayout | None:
    """The layout of a module that computes one chain on its input, with a shortcut of that, and nothing else."""
    chains, _ = _chains(graph)
    if len(chains) != 1 or chains[0].gate is not None:
        return None
    (chain,) = chains
    start, *_, output = graph.nodes
    read, pool = graph.behind(chain.read), None
    if chain.projection is not None and read is not None and graph.kind(read) == "pool":
        read, pool = graph.behind(read.all_input_nodes[0]), read
    known = {*chain.all_nodes(), pool, start, output}
    others = [node for node in graph.nodes if node not in known and graph.kind(node) != "identity"]
    reads = {graph.behind(chain.x), read or start}
    if others or reads != {start} or graph.behind(output.args[0]) is not chain.end:
        return None
    layout = _piece(graph, chain, {}).layout
    convs = [cast(nn.Conv2d, graph.module.get_submodule(unit.conv)) for unit in layout.all_units()]
    shortcut = convs[0].in_channels if layout.shortcut is None else convs[-1].out_channels
    if layout.residual and convs[len(layout.units) - 1].out_channels != shortcut:
        return None
    return layout if pool is None else layout._replace(pool=str(pool.target))


def _chains(graph: Graph) -> tuple[list[Chain], list[tuple[str, str]]]:
    """The chains, and the convolutions that are in none, with the reason."""
    units: dict[fx.Node, Chain] = {}
    rest: list[tuple[str, str]] = []
    gates = {gate.value: gate for node in graph.nodes if graph.kind(node) == "norm" and (gate := _gate(graph, node))}
    gating = {node for gate in gates.values() for node in gate.nodes}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(graph.part(node), _ConvNd) and node not in gating:
            unit = _unit(graph, node)
            if isinstance(unit, str):
                rest.append((str(node.target), unit))
            else:
                units[node] = unit
    chains: list[Chain] = []
    while units:
        chains.append(_gated(graph, _extended(graph, units.pop(next(iter(units))), units), gates))
    return _joined(graph, chains), rest


def _gate(graph: Graph, norm: fx.Node) -> Gate | None:
    """That behind ``norm``, if what it makes of a convolution's output is multiplied with one."""
    gate, conv = graph.gate(graph.unread(norm)[-1]), graph.behind(norm.all_input_nodes[0])
    if gate is None or graph.kind(conv) != "conv":
        return None
    return gate if gives_gates(graph, gate, cast(Tensor, graph.part(conv).weight)) else None


def gives_gates(graph: Graph, gate: Gate, like: Tensor) -> bool:
    """Whether a gate is a number for each image and channel, in the dtype of the means.

    ``like`` has that dtype, and as many channels in its first dimension. What the layers of the gate make of means is
    found out on copies of them, whose tensors have no data.
    """
    parts = [part for node in gate.nodes if node.op == "call_module" for part in graph.part(node).modules()]
    known = all(type(part).__module__.startswith(("torch.nn.modules.", "timm.layers.activations")) for part in parts)
    if not known or eligible.hooked(*parts):
        return False
    shape, function = (3, like.shape[0], 1, 1), _made(*_gate_source(graph, gate))
    try:
        with FakeTensorMode(), torch.no_grad():
            means = torch.empty(shape, dtype=like.dtype, device=like.device)
            found = function(_hollow_layers(graph, gate), means)
    except Exception:  # whatever layers say of means that they do not take
        return False
    return isinstance(found, Tensor) and (found.shape, found.dtype) == (shape, like.dtype)


def _hollow_layers(graph: Graph, gate: Gate) -> SimpleNamespace:
    """What holds a copy of each layer of the ``gate`` under its name."""
    root = SimpleNamespace()
    for node in gate.nodes:
        if node.op == "call_module":
            *path, name = str(node.target).split(".")
            holder = root
            for step in path:
                holder = holder.__dict__.setdefault(step, SimpleNamespace())
            setattr(holder, name, _hollow(graph.part(node)))
    return root


def _hollow(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with empty tensors, whatever kind its own are of."""
    hollow = copy(module)
    for name in ("_parameters", "_buffers"):
        held = vars(module)[name].items()
        vars(hollow)[name] = {
            key: None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for key, t in held
        }
    vars(hollow)["_modules"] = {key: part if part is None else _hollow(part) for key, part in module._modules.items()}
    return hollow


def _gated(graph: Graph, chain: Chain, gates: Mapping[fx.Node, Gate]) -> Chain:
    """``chain`` with the one of the ``gates`` that follows, if one does."""
    passed = graph.unread(chain.end)
    gate = gates.get(passed[-1]) if _is_open(graph, chain) else None
    if gate is None or not graph.is_free([*chain.all_nodes(), *passed, *gate.all_nodes(), gate.product], chain.x):
        return chain
    chain.nodes[-1] += [*passed[1:], gate.product]
    chain.gate = gate
    return chain


def _unit(graph: Graph, conv: fx.Node) -> Chain | str:
    """The unit that begins with ``conv``, or why it does not."""
    passed, norm = graph.following(conv)
    if norm is None:
        return "its result is read more than once, or returned"
    if norm.op != "call_module":
        return f"what follows is {norm.name}, not a batch norm"
    modules = graph.part(conv), graph.part(norm)
    if type(modules[0]) is nn.Conv2d and "Norm" not in type(modules[1]).__name__:
        return f"what follows is {type(modules[1]).__qualname__}, not a batch norm"
    if (reason := eligible.why_unfusable(*modules)) is not None:
        return reason
    if any(graph.calls[module] > 1 for module in modules):
        return "it, or its batch norm, is called more than once"
    if {str(conv.target), str(norm.target)} & graph.read:
        return "its tensors are read elsewhere"
    if (graph.kind(conv), graph.kind(norm)) != ("conv", "norm"):
        return "it, or its batch norm, takes more than one input"
    nodes = [conv, *passed, norm]
    activation = _activation(graph, nodes) if eligible.activation_in(modules[1]) == IDENTITY else IDENTITY
    if not graph.is_free(nodes, conv.all_input_nodes[0]):
        return "something writes to its input while it runs"
    return Chain([nodes], [UnitNames(str(conv.target), str(norm.target), activation)])


def _activation(graph: Graph, nodes: list[fx.Node]) -> Activation:
    """That which follows ``nodes``, which hold it then; or none, which is the identity."""
    passed, following = graph.following(nodes[-1])
    activation = None if following is None else graph.activation(following)
    if following is None or activation is None:
        return IDENTITY
    nodes += [*passed, following]
    return activation


def _is_open(graph: Graph, chain: Chain) -> bool:
    """Whether ``chain`` ends with a batch norm, which no activation is part of."""
    last = chain.units[-1]
    return last.activation == eligible.activation_in(graph.module.get_submodule(last.norm)) == IDENTITY


def _extended(graph: Graph, chain: Chain, units: dict[fx.Node, Chain]) -> Chain:
    """``chain`` with those of ``units``, which it takes away, that follow."""
    while True:
        passed, user = graph.following(chain.end)
        if user not in units:
            return chain
        follower = units[user]
        longer = [*chain.all_nodes(), *passed, *follower.all_nodes()]
        if not graph.is_free(longer, chain.x):
            return chain
        chain.nodes[-1] += passed
        chain.nodes += follower.nodes
        chain.units += follower.units
        del units[user]


def _joined(graph: Graph, chains: list[Chain]) -> list[Chain]:
    """``chains`` with the additions behind them, and without those that became a projection."""
    ends: dict[fx.Node, list[tuple[Chain, list[fx.Node]]]] = {}
    for chain in chains:
        passed, add = graph.following(chain.end)
        if add is not None and _is_open(graph, chain) and graph.operands(add):
            ends.setdefault(add, []).append((chain, passed))
    kept = list(chains)
    for add, found in ends.items():
        operands = graph.operands(add)
        behind = {(passed[-1] if passed else chain.end): (chain, passed) for chain, passed in found}
        sides = [behind.get(operand) for operand in operands]
        in_place = graph.is_in_place(add)
        first = _branch(sides, in_place)
        if first is None:
            continue
        (chain, passed), other = sides[first], sides[1 - first]  # type: ignore[misc]
        projection = other[0] if other is not None and len(other[0].units) == 1 and not other[1] else None
        if projection is not None and projection.gate is not None:
            projection = None
        nodes = [*passed, add]
        activation = _activation(graph, nodes)
        source = operands[1 - first]
        reads = chain.x, source if projection is None else projection.x
        taken = [*chain.all_nodes(), *nodes, *(projection.all_nodes() if projection is not None else ())]
        if not graph.is_free(taken, *reads):
            continue
        chain.nodes[-1] += nodes
        chain.units[-1] = chain.units[-1]._replace(activation=activation)
        chain.source, chain.projection, chain.in_place = source, projection, in_place
        if projection is not None:
            kept.remove(projection)
    return kept


def _branch(sides: Sequence[tuple[Chain, list[fx.Node]] | None], in_place: bool) -> int | None:
    """Which of both sides of an addition is the branch: a chain, the longer one; what is written to, in place."""
    lengths = [0 if side is None else len(side[0].units) for side in sides]
    if in_place:
        return 0 if lengths[0] else None
    return lengths.index(max(lengths)) if any(lengths) else None


def _piece(graph: Graph, chain: Chain, gates: Mapping[Gate, int]) -> Piece:
    """``gates``: their functions by number."""
    projection = None if chain.projection is None else chain.projection.units[0]
    residual = chain.source is not None
    layout = BlockLayout(tuple(chain.units), projection, residual=residual, in_place=chain.in_place)
    nodes = chain.own_nodes() + ([] if chain.projection is None else chain.projection.own_nodes())
    called = [(str(node.target), graph.activation(node)) for node in nodes if node.op == "call_module"]
    passed = tuple((name, activation) for name, activation in called if activation is not None)
    if chain.gate is None:
        return Piece(layout, passed)
    squeezes = [node for node in chain.gate.nodes if node.op == "call_module" and graph.is_squeeze(node)]
    return Piece(layout, passed, gates[chain.gate], tuple(str(node.target) for node in squeezes))


def _gate_source(graph: Graph, gate: Gate) -> tuple[str, dict[str, Any]]:
    """Python that computes the gate of the means of images, [N, C, 1, 1]."""
    made = fx.Graph()
    means = made.placeholder("means")
    values = {gate.value: means}
    for node in sorted(gate.nodes, key=graph.place.__getitem__):
        if gate.value in node.all_input_nodes and graph.is_squeeze(node):
            values[node] = means if keeps_dimensions(node) else made.call_method("flatten", (means, 1))
        else:
            values[node] = made.node_copy(node, values.__getitem__)
            values[node].type = None
    made.output(values[gate.result])
    return _text_of(made)


def keeps_dimensions(squeeze: fx.Node) -> bool:
    """Whether the mean of each image that ``squeeze`` takes is [N, C, 1, 1], and not [N, C]."""
    if squeeze.op == "call_module" or squeeze.target is F.adaptive_avg_pool2d:
        return True
    return bool(squeeze.kwargs.get("keepdim", squeeze.args[2] if len(squeeze.args) > 2 else False))


def _piece_source(graph: Graph, chain: Chain, numbers: dict[Chain, int]) -> tuple[str, dict[str, Any]]:
    nodes = sorted(chain.all_nodes(), key=graph.place.__getitem__)
    return _source(graph, nodes, chain.parts, numbers, chain)


def _source(
    graph: Graph,
    nodes: Sequence[fx.Node],
    chains: Sequence[Chain],
    numbers: dict[Chain, int],
    whole: Chain | None = None,
) -> tuple[str, dict[str, Any]]:
    """Python that computes ``nodes``, with calls of ``chains`` for theirs; ``whole``: the chain that they are of."""
    made = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    if whole is not None:
        x, source = made.placeholder("x"), made.placeholder("source")
        if whole.read is not None:
            values[whole.read] = source
        values[whole.x] = x
    inside = {node: chain for chain in chains for node in chain.all_nodes()}
    for node in nodes:
        chain = inside.get(node)
        if chain is None:
            values[node] = made.node_copy(node, values.__getitem__)
            values[node].type = None
            if node.target == "view" and graph.is_safe(node, inside):
                values[node].target = "reshape"  # pieces return channels_last
        elif node is chain.end:
            read = None if chain.read is None else values[chain.read]
            values[node] = made.create_node("call_module", "_piece", (numbers[chain], values[chain.x], read))
    if whole is not None:
        made.output(values[whole.end])
    return _text_of(made)


def _text_of(made: fx.Graph) -> tuple[str, dict[str, Any]]:
    """As Python, and what that calls by name that is not PyTorch's."""
    code = made.python_code("self")
    return code.src, {k: v for k, v in code.globals.items() if k not in _NAMES and not ismodule(v)}
