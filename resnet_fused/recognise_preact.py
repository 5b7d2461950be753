"""Recognition of pre-activation blocks: batch norm and activation stand in front of each convolution."""

from __future__ import annotations

from typing import cast

from torch import fx, nn

from resnet_fused.engine import eligible
from resnet_fused.kernels.activation import IDENTITY
from resnet_fused.modules import BlockLayout, UnitNames
from resnet_fused.pieces import Graph


def match(graph: Graph) -> BlockLayout | None:
    """The layout of a module whose forward comes to ``units(x) + shortcut`` with the norms first, else None.

    Each unit is batch norm, an activation, which timm has inside of its batch norm, and a convolution. The shortcut is
    x, or a convolution of the first unit's activations. Nothing else is computed.
    """
    x, *_, output = graph.nodes
    total = graph.behind(output.args[0])
    operands = graph.operands(total)
    if not operands:
        return None
    known = {x, output, total}
    ways = [_units(graph, node, x, known) for node in operands]
    branch, shortcut = sorted(ways, key=lambda way: -len(way or ()))
    others = any(node not in known and graph.kind(node) != "identity" for node in graph.nodes)
    if not branch or shortcut is None or others or _channels(graph, branch[-1])[1] != _added(graph, branch, shortcut):
        return None
    if not shortcut:
        writes_x = graph.is_in_place(total) and graph.behind(operands[0]) is x
        return None if writes_x else BlockLayout(branch, norm_first=True)
    first, (projection, *more) = branch[0], shortcut
    if more or projection[1:] != first[1:] or len(branch) < 2:
        return None
    return BlockLayout(branch, projection, norm_first=True)


def _added(graph: Graph, branch: tuple[UnitNames, ...], shortcut: tuple[UnitNames, ...]) -> int:
    """The channels of the shortcut."""
    return _channels(graph, shortcut[-1])[1] if shortcut else _channels(graph, branch[0])[0]


def _channels(graph: Graph, unit: UnitNames) -> tuple[int, int]:
    conv = cast(nn.Conv2d, graph.module.get_submodule(unit.conv))
    return conv.in_channels, conv.out_channels


def _units(graph: Graph, node: fx.Node, x: fx.Node, known: set[fx.Node]) -> tuple[UnitNames, ...] | None:
    """Those from ``x`` to ``node``, none if it is x itself; None if the way is another. Their nodes are ``known``."""
    conv = graph.behind(node)
    if conv is x:
        return ()
    if graph.kind(conv) != "conv":
        return None
    norm = graph.behind(conv.all_input_nodes[0])
    activation = graph.activation(norm) or IDENTITY
    if activation != IDENTITY:
        known.add(norm)
        norm = graph.behind(norm.all_input_nodes[0])
    if graph.kind(norm) != "norm":
        return None
    known |= {conv, norm}
    parts = graph.part(conv), graph.part(norm)
    if eligible.why_unfusable(*parts) is not None or eligible.is_frozen(parts[1]):
        return None
    if any(graph.calls[part] > 1 for part in parts) or IDENTITY not in (activation, eligible.activation_in(parts[1])):
        return None
    others = _units(graph, norm.all_input_nodes[0], x, known)
    return None if others is None else (*others, UnitNames(str(conv.target), str(norm.target), activation))
