"""Which implementation runs a problem, with which tiles, and why: in words."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import cast

import torch

from resnet_fused.kernels import chain_forward, conv_box, conv_pool, dgrad_box
from resnet_fused.kernels.chain import Chain
from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.kernels.launch import INTERPRETER, KEPT_LAYOUTS, TileConfig, dry_target, interpreting
from resnet_fused.plan import roofline
from resnet_fused.plan.constants import ASSUMED, Constants
from resnet_fused.plan.problem import PARTS, Parts, Problem, Request, Tiles, Way, apart, cut
from resnet_fused.plan.tuned import Table

MIN_CAPABILITY = (8, 0)


def tf32(dtype: torch.dtype) -> bool:
    """Whether a convolution in ``dtype`` may round its factors to TF32: as cuDNN may.

    Asks for what both ``torch.backends.cudnn.allow_tf32`` and the newer ``cudnn.conv.fp32_precision`` set: the former
    can not be read once the latter was used. By the function behind the property, which takes a quarter of the time.
    """
    return dtype == torch.float32 and torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"


@dataclass(frozen=True)
class Plan:
    """How a unit runs, and why.

    ``implementation``: "fused" (Triton convolves), "mixed" (PyTorch convolves, with our kernels around), "eager", or
    "cudnn" (one call of cuDNN with batch norm folded in: in a frozen model).
    ``seconds``: what it takes, measured if ``source`` is "tuned", predicted if it is "model", None if it is "forced".
    ``alternatives``: every implementation with the seconds that the model predicts for the GPU, fastest first.
    """

    implementation: Way
    tiles: Tiles
    seconds: float | None
    source: str
    reason: str
    alternatives: tuple[tuple[Way, float], ...]


HOST_SPLIT_SECONDS = 10e-6
"""What a fused unit takes the host longer where its sum is split, by the same command: a second launch, and memory for
the parts."""


def waited(
    problem: Problem, implementation: Way, seconds: float, tiles: Tiles, constants: Constants = ASSUMED
) -> float:
    """``seconds`` of the GPU, or those of the host where it takes longer: outside of a CUDA graph.

    Not in a frozen model, which replays one. ``tiles``: those of the fused unit.
    """
    if problem.direction == "frozen":
        return seconds
    split = implementation == "fused" and tiles.splits > 1
    return max(seconds, constants.host(implementation, problem.direction) + split * HOST_SPLIT_SECONDS)


def best_tiles(problem: Problem, constants: Constants = ASSUMED) -> Tiles:
    """Those with which a fused unit's forward, and in training its input's gradient, is predicted to be done first.

    Of several, those that take the GPU less time, and where issuing does not bound them, those that issue less.
    """

    def order(tiles: Tiles) -> tuple[float, ...]:
        seconds, slots = roofline.forward(problem, tiles, constants)
        return waited(problem, "fused", seconds, tiles, constants), seconds, slots

    tiles = min(roofline.choices(problem), key=order)
    if problem.direction != "training":
        return tiles
    best = min(roofline.gradient_choices(problem), key=lambda other: roofline.gradient(problem, other, constants))
    return replace(tiles, dgrad=best.dgrad)


ROADS: dict[Request, Way] = {"triton": "fused", "mixed": "mixed", "eager": "eager"}


@lru_cache(maxsize=KEPT_LAYOUTS)
def decide(problem: Problem, request: Request = "auto", table: Table | None = None) -> Plan:
    """The plan for ``problem``: what the user forces, else what was measured, else what the model predicts.

    With the constants of the ``table``, if they were measured.

    Pure: it looks at its arguments alone, and needs no GPU. The model: :mod:`resnet_fused.plan.roofline`.
    """
    entry = table.lookup(problem) if table is not None else None
    constants = constants_of(table)
    if entry is not None and entry.implementation == "fused":
        tiles = entry.tiles
    else:
        tiles = Tiles() if problem.arch == INTERPRETER else best_tiles(problem, constants)
    alternatives = () if problem.arch == INTERPRETER else roofline.compare(problem, tiles, constants)
    if request != "auto":
        return Plan(ROADS[request], tiles, None, "forced", f"implementation({request!r}) is in force", alternatives)
    if entry is not None:
        return Plan(entry.implementation, tiles, entry.seconds, "tuned", entry.reason, alternatives)
    if not alternatives:
        return Plan("fused", tiles, None, "model", "the interpreter has no speed to predict", ())
    best, seconds = min(alternatives, key=lambda way: (waited(problem, way[0], way[1], tiles, constants), way[1]))
    return Plan(best, tiles, seconds, "model", _why(problem, best, alternatives[0][0], tiles, constants), alternatives)


@dataclass(frozen=True)
class ChainPlan:
    """How convolutions that follow each other run.

    ``seconds``, ``source`` and ``reason``: as of a :class:`Plan`. ``alternatives``: by the number of convolutions that
    each launch computes, the seconds predicted, fastest first.
    """

    parts: Parts
    seconds: float | None
    source: str
    reason: str
    alternatives: tuple[tuple[tuple[int, ...], float], ...]

    @property
    def together(self) -> bool:
        """Whether a launch computes more than one."""
        return any(length > 1 for length, _ in self.parts)


@lru_cache(maxsize=KEPT_LAYOUTS)
def decide_chain(links: Chain, request: Request = "auto", table: Table | None = None) -> ChainPlan:
    """The plan for a chain whose links are problems: in one launch, in two, or each link by itself.

    What was measured of the chain, else what the model predicts for every road, with the constants of the ``table``, if
    they were measured; what it has of single units does not count there: a prediction does not compare with it. Pure.
    """
    forced = f"implementation({request!r}) is in force"
    if request not in ("auto", "triton"):
        return ChainPlan(apart(links), None, "forced", forced, ())
    if links.first.arch == INTERPRETER:
        whole = ((len(links.links), None),)
        return ChainPlan(whole, None, "model", "the interpreter has no speed to predict", ())
    constants = constants_of(table)
    roads = []
    for lengths in PARTS[len(links.links)]:
        found = [_part(part, request, constants) for part in cut(links, lengths)]
        times, gpus, tiles = zip(*found, strict=True)
        if math.inf not in times:
            roads.append((sum(times), sum(gpus), tuple(zip(lengths, tiles, strict=True))))
    order = [(parts, seconds) for seconds, _, parts in sorted(roads, key=lambda road: road[:2])]
    alternatives = tuple((tuple(length for length, _ in parts), seconds) for parts, seconds in order)
    entry = None if table is None or request != "auto" else table.lookup_chain(links)
    if entry is not None:
        return ChainPlan(entry.parts, entry.seconds, "tuned", entry.reason, alternatives)
    reason = "predicted fastest" if request == "auto" else forced
    return ChainPlan(*order[0], "model", reason, alternatives)


def _part(part: Chain | Problem, request: Request, constants: Constants) -> tuple[float, float, TileConfig | None]:
    """Of the fastest launch of a part its seconds, those of the GPU alone, and its tile; infinity where there is none.

    Where the host takes longer than either of two, that of which the GPU is done first.
    """
    found: list[tuple[float, float, TileConfig | None]]
    if isinstance(part, Problem):
        tiles = best_tiles(part, constants)
        ways = roofline.compare(part, tiles, constants)
        asked = [way for way in ways if request == "auto" or way[0] == ROADS[request]]
        found = [(waited(part, way, seconds, tiles, constants), seconds, None) for way, seconds in asked]
    else:
        found = [_chain(part, tile, constants) for tile in chain_forward.tiles(part)]
    return min(found, key=lambda times: times[:2], default=(math.inf, math.inf, None))


HOST_CHAIN = 2.25
"""What a live chain takes the host, in fused units, by the same command; HOST_LINK: for each of its links, whose batch
norm another launch reads. For three, 35 us and 4 launches, beside 14 us and one of a unit: no less than three units,
since what a launch takes is assumed."""
HOST_LINK = 0.25


def parts_waited(links: Chain, parts: Parts, seconds: float, constants: Constants = ASSUMED) -> float:
    """``seconds`` of the GPU for links that are launched so, or those of the host, for which live ones may wait."""
    if cast(Problem, links.first).direction == "frozen":
        return seconds
    unit = constants.host("fused", "inference")
    host = sum(1.0 if length == 1 else HOST_CHAIN + length * HOST_LINK for length, _ in parts)
    return max(seconds, unit * host)


def _chain(links: Chain, tile: TileConfig, constants: Constants) -> tuple[float, float, TileConfig]:
    """Of a chain in one launch, as :func:`_part` says; a live one has others before it, that read its batch norms."""
    seconds = sum(launch.seconds for launch in roofline.chain(links, tile, constants))
    return parts_waited(links, ((len(links.links), tile),), seconds, constants), seconds, tile


def constants_of(table: Table | None) -> Constants:
    """Those by which units that the ``table`` lacks are predicted."""
    return ASSUMED if table is None or table.constants is None else table.constants


def _why(problem: Problem, best: Way, fastest: Way, tiles: Tiles, constants: Constants) -> str:
    slowest = max(roofline.predict(problem, best, tiles, constants), key=lambda launch: launch.seconds)
    but = "" if best == fastest else f" but {fastest}, which would keep the host longer"
    reason = f"predicted fastest{but}; longest: {slowest.kernel}, bound by {slowest.bound}"
    if best == "fused":
        if problem.pooled and problem.direction != "training":
            why = conv_pool.why_not(problem)
            return f"{reason}; the image is packed first" if why is None else f"{reason}; the pool stays apart: {why}"
        return "; ".join(filter(None, (reason, *_roads(problem, tiles), _spread(problem, tiles))))
    held_up = max(roofline.predict(problem, "fused", tiles, constants), key=lambda launch: launch.seconds)
    return f"{reason}; fused: {held_up.kernel} {held_up.seconds * 1e6:.1f} us, bound by {held_up.bound}"


def _roads(problem: Problem, tiles: Tiles) -> Iterator[str]:
    """How the pixels come that are multiplied, on a GPU that has TMA."""
    if problem.arch in conv_box.TILES:
        yield _road("pixels", tiles.forward, conv_box.why_not(problem))
        if problem.direction == "training":
            yield _road("their gradients", tiles.dgrad, dgrad_box.why_not(problem.gradient))


def _road(what: str, tile: TileConfig | None, why_not: str | None) -> str:
    if tile is not None and tile.box is not None:
        return f"{what} by boxes of " + "x".join(map(str, tile.box))
    return f"{what} gathered, since {why_not or 'no box is predicted to be faster'}"


def _spread(problem: Problem, tiles: Tiles) -> str:
    """How the forward's programs are to fill the GPU, or why they do not; "" where they do without more ado."""
    programs, whole = roofline.programs(problem, tiles), gpu_of(problem.arch, problem.gpu).multiprocessors
    few = 2 * programs < whole
    if tiles.splits > 1:
        why = ", since more are not predicted to be faster" if few else ""
        return f"sums split in {tiles.splits}, for {programs} programs on {whole} multiprocessors{why}"
    if not few:
        return ""
    split = [roofline.forward(problem, other)[0] for other in roofline.choices(problem) if other.splits > 1]
    if problem.direction == "training":
        why = "sums are split in inference alone"
    elif not split:
        why = "each sum is a single step, which leaves nothing to split"
    elif min(split) < roofline.forward(problem, tiles)[0]:
        why = "a second launch would keep the host longer"
    else:
        why = "no split sum is predicted to be faster"
    return f"{programs} programs on {whole} multiprocessors, since {why}"


_records: list[list[Problem | Chain]] = []


@contextlib.contextmanager
def record() -> Iterator[list[Problem | Chain]]:
    """The problems, and chains of them, that are planned inside the ``with`` block, each as often as it comes up."""
    found: list[Problem | Chain] = []
    _records.append(found)
    try:
        yield found
    finally:
        _records[:] = [other for other in _records if other is not found]


def note(problem: Problem | Chain) -> None:
    """That ``problem`` is planned, for :func:`record` to see."""
    for found in _records:
        found.append(problem)


def target(device: torch.device) -> tuple[int, str]:
    """Architecture and name of the GPU that a launch on ``device`` runs on; 0 and "" for the interpreter."""
    if (named := dry_target()) is not None:
        return named
    if interpreting() or device.type != "cuda":
        return INTERPRETER, ""
    return _gpu(device)


@cache
def _gpu(device: torch.device) -> tuple[int, str]:
    return arch_of(device), torch.cuda.get_device_name(device)


def arch_of(device: torch.device) -> int:
    """The architecture of a CUDA GPU: 80 for sm_80 ..."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def why_too_old(device: torch.device) -> str | None:
    """Why the kernels cannot be compiled for a CUDA GPU, or None if they can."""
    if (found := torch.cuda.get_device_capability(device)) >= MIN_CAPABILITY:
        return None
    return f"the GPU has compute capability {found[0]}.{found[1]}: the kernels need 8.0 or newer"


def present_gpu(arch: int) -> str:
    """The name of this process's CUDA GPU if it is of ``arch``, so that its measurements count; else ""."""
    if not torch.cuda.is_available():
        return ""
    found, name = _gpu(torch.device("cuda", torch.cuda.current_device()))
    return name if found == arch else ""
