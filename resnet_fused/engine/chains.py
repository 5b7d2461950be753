"""Convolutions that follow each other, in as few launches as the plan has: of a frozen model, and of live blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from resnet_fused.engine import ops
from resnet_fused.engine.forward import Convolution
from resnet_fused.engine.ops import channels_last
from resnet_fused.kernels.chain import Link
from resnet_fused.kernels.conv import Geometry
from resnet_fused.kernels.launch import TileConfig
from resnet_fused.plan.problem import Parts, Tiles

U = TypeVar("U")
Alone = Callable[[U, Tensor, Tensor | None], Tensor]
Together = Callable[[Sequence[U | None], Tensor, Tensor, TileConfig | None], list[Tensor]]

EXPAND = 1
"""The place among the members of the one that adds the residual."""


def run(
    members: tuple[U | None, U, U | None],
    parts: Parts,
    x: Tensor,
    residual: Tensor,
    alone: Alone[U],
    together: Together[U],
) -> tuple[Tensor, Tensor | None]:
    """``z = expand(spatial(x), residual)`` and ``y = reduce(z)``, or None, by the launches that ``parts`` has.

    ``members``: spatial, expand and reduce. ``alone(member, x, residual)`` computes one; ``together(members, x,
    residual, tile)`` those that are not None, and returns what :func:`launch` does.
    """
    left = [place for place, member in enumerate(members) if member is not None]
    z = x
    for length, tile in parts:
        part, left = left[:length], left[length:]
        if length > 1:
            outputs = together([member if i in part else None for i, member in enumerate(members)], x, residual, tile)
            z, x = outputs[0], outputs[-1]
            continue
        member = members[part[0]]
        assert member is not None
        x = alone(member, x, residual if part[0] == EXPAND else None)
        z = x if part[0] == EXPAND else z
    return z, None if members[-1] is None else x


def launch(
    links: Sequence[Link | None], geometry: Geometry, x: Tensor, residual: Tensor, tile: TileConfig | None
) -> list[Tensor]:
    """z, and y if the last of the ``links`` is there; ``geometry``: that of the first. See :func:`ops.chain`."""
    weights, affines = zip(*(link or (None, None) for link in links), strict=True)
    code = Convolution(geometry, True, Tiles(forward=tile)).encode()
    x, residual = channels_last(x.resolve_neg()), channels_last(residual.resolve_neg())
    outputs: list[Tensor] = ops.chain(x, weights, affines, residual, code)
    return outputs
