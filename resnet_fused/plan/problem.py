"""What a unit is to the planning: everything that the choice of its implementation and tiles may depend on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, cast, get_args

import torch

from resnet_fused.kernels.chain import Chain
from resnet_fused.kernels.conv import ConvProblem
from resnet_fused.kernels.launch import FLOATS, KEPT_LAYOUTS, TileConfig

Request = Literal["auto", "triton", "mixed", "eager"]
"""An implementation that a user can ask for; see :func:`resnet_fused.implementation`."""

Way = Literal["fused", "mixed", "eager", "cudnn"]
"""Who computes a unit; see :class:`resnet_fused.plan.decide.Plan`."""

REQUESTS: tuple[Request, ...] = get_args(Request)
WAYS: tuple[Way, ...] = get_args(Way)


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(dtype): dtype for dtype in FLOATS}
"""Those of the kernels, by name."""


def number_format(dtype: torch.dtype, tf32: bool) -> str:
    """What factors in ``dtype`` are multiplied in: tf32, where they may be rounded to it, or the dtype's name."""
    return "tf32" if tf32 else dtype_name(dtype)


@dataclass(frozen=True)
class Problem(ConvProblem):
    """A convolution with its batch norm.

    ``direction``: "inference" (fixed statistics, no gradient); "frozen": that of a unit whose weights never change, so
    that batch norm may be folded into them; or "training": the forward and both gradients.
    ``prologue``: in training, the input is the raw output of the unit before, which is normalised on the way in.
    ``residual``: in inference, one is added. ``relu``: in a frozen model, one follows, which cuDNN's one call of all of
    it cannot leave out, and nothing stands in front, which that call lacks. ``pooled``: a ReLU and a 3x3/2 max pool
    with padding 1 follow, as in a network's stem, and nobody wants the gradient of the input. ``gpu``: its name as
    PyTorch gives it, or "" for any of that architecture.
    """

    direction: str
    residual: bool
    gpu: str = ""
    pooled: bool = False
    relu: bool = True

    @property
    def gradient(self) -> Problem:
        """As the gradient of the input sees it: ``prologue`` then tells whether that computes dy.

        Of a filter wider than 1x1, the filter's gradient has kept dy.
        """
        return replace(self, prologue=self.r * self.s == 1)

    @property
    def number_format(self) -> str:
        """The factors' format in the product."""
        return number_format(self.dtype, self.tf32)

    @property
    def layer(self) -> str:
        """The geometry, for people."""
        size = f"{self.r}x{self.s}" + (f"/{self.stride[0]}" if self.stride != (1, 1) else "")
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        image = f"{self.n}x{self.h}x{self.w}"
        pool = ", pooled" if self.pooled else ""
        return f"{size} {self.ci}->{self.co}{groups} of {image}{pool}"

    def __str__(self) -> str:
        behind = (", residual" if self.residual else "") + ("" if self.relu else ", no ReLU")
        return f"{self.layer}{behind}, {self.number_format} {self.direction}"


Parts = tuple[tuple[int, TileConfig | None], ...]
"""How many convolutions of a chain each launch computes, in order, with its tile (None: the kernel's own).

One alone is a unit, with the plan of its own.
"""

PARTS = {2: ((2,), (1, 1)), 3: ((3,), (1, 2), (2, 1), (1, 1, 1))}
"""By the number of links, how many each launch may compute."""


def apart(links: Chain) -> Parts:
    """Each by itself."""
    return ((1, None),) * len(links.links)


def cut(links: Chain, lengths: Iterable[int]) -> Iterator[Chain | Problem]:
    """The parts of so many links each, which are problems; one alone is a problem."""
    named: list[tuple[str, Any]] = [(name, link) for name, link in links._asdict().items() if link is not None]
    for length in lengths:
        part, named = named[:length], named[length:]
        yield part[0][1] if length == 1 else Chain(**{**dict.fromkeys(Chain._fields), **dict(part)})


def changed(links: Chain, **fields: Any) -> Chain:
    """With these fields in each of its problems."""
    return Chain(*(None if link is None else replace(link, **fields) for link in links))  # type: ignore[arg-type]


def on_gpu(problem: Problem | Chain, gpu: str) -> Problem | Chain:
    """The problem or chain on the GPU of that name."""
    return changed(problem, gpu=gpu) if isinstance(problem, Chain) else replace(problem, gpu=gpu)


def units_of(problem: Problem | Chain) -> tuple[Problem, ...]:
    """The links of a chain; of a problem, itself."""
    return cast(Any, problem.links) if isinstance(problem, Chain) else (problem,)


def shown(problem: Problem | Chain) -> str:
    """A problem, or the geometry of each link of a chain and what they have in common, for people."""
    if not isinstance(problem, Chain):
        return str(problem)
    *layers, last = units_of(problem)
    return " > ".join([*(layer.layer for layer in layers), str(last)])


@dataclass(frozen=True)
class Tiles:
    """The configurations of a fused unit's kernels; None: the kernel's own ``default_config``."""

    forward: TileConfig | None = None
    dgrad: TileConfig | None = None
    wgrad: TileConfig | None = None

    @property
    def splits(self) -> int:
        """How many programs share the sum of one tile of the forward."""
        return 1 if self.forward is None else self.forward.splits

    def encode(self) -> list[int]:
        """As integers, for the schema of an operator."""
        return [n for tile in (self.forward, self.dgrad, self.wgrad) for n in _encode(tile)]

    @classmethod
    def decode(cls, code: tuple[int, ...]) -> Tiles:
        """The inverse of :meth:`encode`."""
        return _decode(code)


_NUMBERS = 10
_NO_TILE = [0] * _NUMBERS


def _encode(tile: TileConfig | None) -> list[int]:
    if tile is None:
        return _NO_TILE
    sizes = tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages, tile.max_registers or 0
    return [*sizes, *(tile.box or (0, 0, 0)), tile.splits]


@lru_cache(maxsize=KEPT_LAYOUTS)
def _decode(code: tuple[int, ...]) -> Tiles:
    tiles: list[TileConfig | None] = []
    for i in range(0, len(code), _NUMBERS):
        m, n, k, warps, stages, registers, images, rows, columns, splits = code[i : i + _NUMBERS]
        box = (images, rows, columns) if images else None
        tiles.append(TileConfig(m, n, k, warps, stages, registers or None, box, splits) if m else None)
    return Tiles(*tiles)
