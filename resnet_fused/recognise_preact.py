"""Recognition of pre-activation blocks: batch norm and activation stand in front of each convolution."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from resnet_fused.engine import eligible
from resnet_fused.kernels.activation import IDENTITY, Activation
from resnet_fused.modules import BlockLayout, UnitNames

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def match(module: nn.Module, graph: fx.Graph) -> BlockLayout | None:
    """The layout of ``module`` if its traced forward comes to ``units(x) + shortcut`` with the norms first, else None.

    Each unit is batch norm, an activation, which timm has inside of its batch norm, and a convolution. The shortcut is
    x, or a convolution of the first unit's activations. Nothing else is computed.
    """
    x, *inner, output = graph.nodes
    total = output.args[0]
    if not isinstance(total, fx.Node) or total.target not in _ADDITIONS or total.kwargs:
        return None
    operands = [node for node in total.args if isinstance(node, fx.Node)]
    if not len(operands) == len(total.args) == 2:
        return None
    called = [node.target for node in inner if isinstance(_part(module, node), nn.Conv2d | nn.BatchNorm2d)]
    if len(set(called)) < len(called):
        return None
    seen = {x, output, total}
    ways = [_units(module, node, x, seen) for node in operands]
    branch, shortcut = sorted(ways, key=lambda way: -len(way or ()))
    if not branch or shortcut is None or len(seen) != len(graph.nodes):
        return None
    if not shortcut:
        in_place = total.target in (operator.iadd, "add_") and _behind(module, operands[0], set()) is x
        return None if in_place else BlockLayout(branch, norm_first=True)
    first, (projection, *others) = branch[0], shortcut
    if others or projection[1:] != first[1:] or len(branch) < 2:
        return None
    return BlockLayout(branch, projection, norm_first=True)


def _units(module: nn.Module, node: fx.Node, x: fx.Node, seen: set[fx.Node]) -> tuple[UnitNames, ...] | None:
    """Those from ``x`` to ``node``, none if it is x itself; None if the way is another. Its nodes are ``seen``."""
    node = _behind(module, node, seen)
    if node is x:
        return ()
    if not isinstance(_part(module, node), nn.Conv2d):
        return None
    before = _behind(module, node.all_input_nodes[0], seen)
    activation = _activation(module, before)
    norm = before
    if activation is not None:
        norm = _behind(module, before.all_input_nodes[0], seen)
    part = _part(module, norm)
    inside = None if part is None else eligible.activation_in(part)
    if activation is None:
        activation = inside
    elif inside not in (None, IDENTITY):
        return None
    if activation is None or not isinstance(part, nn.BatchNorm2d):
        return None
    others = _units(module, norm.all_input_nodes[0], x, seen)
    return None if others is None else (*others, UnitNames(str(node.target), str(norm.target), activation))


def _behind(module: nn.Module, node: fx.Node, seen: set[fx.Node]) -> fx.Node:
    """``node``, or what it repeats if it is an identity."""
    seen.add(node)
    return _behind(module, node.all_input_nodes[0], seen) if type(_part(module, node)) is nn.Identity else node


def _part(module: nn.Module, node: fx.Node) -> nn.Module | None:
    """What ``node`` calls with one tensor and nothing else, if that is a module."""
    alone = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
    return module.get_submodule(str(node.target)) if node.op == "call_module" and alone else None


_CONSTANT = ("relu", "silu", "hardswish")
"""Activations without numbers or variants, which could be changed where nobody looks again."""


def _activation(module: nn.Module, node: fx.Node) -> Activation | None:
    """That which ``node`` is, if it is one that stays as it is."""
    found: Any = None
    if (part := _part(module, node)) is not None:
        found = eligible.activation_of(part)
    elif node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        found = eligible.activation_of_call(node.target, node.args, node.kwargs)
    return found if found is not None and found.name in _CONSTANT else None
