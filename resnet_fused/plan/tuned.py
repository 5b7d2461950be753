"""What was measured of one GPU: a table of problems, kept as JSON, that the plan looks things up in."""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

from resnet_fused.kernels import chain_forward, conv_box, dgrad_box
from resnet_fused.kernels.chain import Chain
from resnet_fused.kernels.conv import ConvProblem
from resnet_fused.kernels.conv_dgrad import conv_dgrad
from resnet_fused.kernels.conv_forward import conv_forward
from resnet_fused.kernels.conv_wgrad import conv_wgrad
from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.kernels.launch import TileConfig, dry_run
from resnet_fused.plan.cache import cache_dir, locked, read, versions, write_whole
from resnet_fused.plan.constants import Constants
from resnet_fused.plan.problem import DTYPES, PARTS, WAYS, Parts, Problem, Tiles, Way, changed, cut, dtype_name

logger = logging.getLogger("resnet_fused")


SCHEMA = 1


DIRECTIONS = ("inference", "frozen", "training")


@dataclass(frozen=True)
class Entry:
    """What was found about ``problem``: the fastest right way, its median seconds and their spread.

    ``quarantined``: candidates that must not run, each with its reason: wrong, crashing, out of resources.
    """

    problem: Problem
    implementation: Way
    tiles: Tiles
    seconds: float
    spread: float
    reason: str
    quarantined: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ChainEntry:
    """The same of a chain: how its ``links``, which are problems, are fastest cut into launches."""

    links: Chain
    parts: Parts
    seconds: float
    spread: float
    reason: str
    quarantined: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Table:
    """What was measured of one GPU under the present :func:`versions`. Compared by identity.

    ``constants``: None where they were not measured.
    """

    gpu: str
    entries: tuple[Entry, ...] = ()
    constants: Constants | None = None
    chains: tuple[ChainEntry, ...] = ()

    def with_entry(self, entry: Entry | ChainEntry) -> Table:
        """A table in which ``entry`` stands for its problem or chain."""
        if isinstance(entry, ChainEntry):
            return replace(self, chains=(*(known for known in self.chains if known.links != entry.links), entry))
        others = tuple(known for known in self.entries if known.problem != entry.problem)
        return replace(self, entries=(*others, entry))

    def exact(self, problem: Problem | Chain) -> Entry | ChainEntry | None:
        """The entry of this very problem or chain."""
        if isinstance(problem, Chain):
            return next((entry for entry in self.chains if entry.links == problem), None)
        return next((entry for entry in self.entries if entry.problem == problem), None)

    def lookup(self, problem: Problem) -> Entry | None:
        """The entry of ``problem``, or of that which differs in the number of images alone, by the smallest factor.

        What was measured of inference serves a frozen model where nothing was measured of that.
        """
        for direction in (problem.direction, "inference") if problem.direction == "frozen" else (problem.direction,):
            kind = replace(problem, n=1, gpu="", direction=direction)
            alike = [entry for entry in self.entries if replace(entry.problem, n=1, gpu="") == kind]
            if alike:
                found = min(alike, key=lambda entry: _distance(entry.problem.n, problem.n))
                return found if found.problem.n == problem.n else replace(found, tiles=_covering(found.tiles, problem))
        return None

    def lookup_chain(self, links: Chain) -> ChainEntry | None:
        """The same of a chain."""
        kind = changed(links, n=1, gpu="")
        alike = [entry for entry in self.chains if changed(entry.links, n=1, gpu="") == kind]
        found = min(alike, key=lambda entry: _distance(entry.links.first.n, links.first.n), default=None)
        if found is None or found.links.first.n == links.first.n:
            return found
        parts = cut(links, [length for length, _ in found.parts])
        firsts = (part.first if isinstance(part, Chain) else part for part in parts)
        boxed = ((n, _boxed(tile, first)) for (n, tile), first in zip(found.parts, firsts, strict=True))
        return replace(found, parts=tuple(boxed))


def _covering(tiles: Tiles, problem: Problem) -> Tiles:
    """``tiles`` with the boxes that cover this many images best."""
    dgrad = tiles.dgrad
    if dgrad is not None and dgrad.box is not None:
        dgrad = replace(dgrad, box=dgrad_box.least_waste(problem.gradient, dgrad.block_m))
    return replace(tiles, forward=_boxed(tiles.forward, problem), dgrad=dgrad)


def _boxed(tile: TileConfig | None, problem: ConvProblem) -> TileConfig | None:
    """The same of a tile of the forward."""
    if tile is None or tile.box is None:
        return tile
    return replace(tile, box=conv_box.least_waste(problem, tile.block_m))


def _distance(known: int, images: int) -> float:
    return abs(math.log(known / max(images, 1)))


def path(gpu: str) -> Path:
    """The file of the user's table of ``gpu`` under the present versions. Raises as :func:`cache_dir` does."""
    name = re.sub(r"[^A-Za-z0-9.+]+", "-", "-".join([gpu, *versions().values()]))
    return cache_dir() / "tuned" / f"{name}.json"


@cache
def load(gpu: str) -> Table | None:
    """The user's table of ``gpu``, or None.

    A file that cannot be read, or is no table that is legal throughout (corrupt, of another GPU or other versions, with
    tiles that the GPU cannot run), is refused with one logged message.
    """
    if not gpu:
        return None
    try:
        file = path(gpu)
    except FileNotFoundError:
        return None
    try:
        return parse(read(file), gpu)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _warn_once(f"the table {file} is ignored: {error}")
    return None


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def add(gpu: str, entry: Entry | ChainEntry) -> Table:
    """Put ``entry`` into the user's table of ``gpu``; see :func:`change`."""
    return change(gpu, lambda table: table.with_entry(entry))


def change(gpu: str, altered: Callable[[Table], Table]) -> Table:
    """Replace the user's table of ``gpu`` by ``altered`` of what this and other processes have saved; returns it.

    Raises OSError if it cannot be written.
    """
    with locked(path(gpu)):
        load.cache_clear()
        table = altered(load(gpu) or Table(gpu))
        save(table)
    return table


def save(table: Table) -> Path:
    """Write the user's table; whoever reads it finds the old one or the new one, whole. Raises OSError if it cannot."""
    file = path(table.gpu)
    write_whole(file, render(table))
    load.cache_clear()
    return file


def require_writable(gpu: str) -> None:
    """Raise OSError unless the user's table of ``gpu`` can be written."""
    with locked(path(gpu)), tempfile.TemporaryFile(dir=path(gpu).parent):
        pass


def render(table: Table) -> str:
    """The table as JSON."""
    entries = [
        {
            "problem": problem_out(entry.problem),
            "implementation": entry.implementation,
            "tiles": entry.tiles.encode(),
            **_measured_out(entry),
        }
        for entry in table.entries
    ]
    chains = [
        {"links": chain_out(entry.links), "parts": parts_out(entry.parts), **_measured_out(entry)}
        for entry in table.chains
    ]
    constants = None if table.constants is None else table.constants.to_dict()
    head = {"schema": SCHEMA, "gpu": table.gpu, "versions": versions(), "constants": constants}
    return json.dumps(head | {"entries": entries, "chains": chains}, indent=1)


def _measured_out(entry: Entry | ChainEntry) -> dict[str, Any]:
    quarantined = [list(pair) for pair in entry.quarantined]
    return {"seconds": entry.seconds, "spread": entry.spread, "reason": entry.reason, "quarantined": quarantined}


def kept() -> dict[Path, Table | str]:
    """Every file among the user's tables: its table, or why it is ignored. Raises as :func:`cache_dir` does."""
    found: dict[Path, Table | str] = {}
    for file in sorted((cache_dir() / "tuned").glob("*.json")):
        try:
            table = parse(read(file))
        except (OSError, ValueError) as error:
            found[file] = str(error)
        else:
            found[file] = table if file == path(table.gpu) else f"its name should be {path(table.gpu).name}"
    return found


def parse(text: str, gpu: str | None = None) -> Table:
    """The inverse of :func:`render`.

    Raises ValueError for what is no table of ``gpu``, or of any GPU, under the present versions.
    """
    try:
        return _table(json.loads(text), gpu)
    except ValueError:
        raise
    except Exception as error:  # whatever a rehearsed launch raises would be raised by the user's forward
        raise ValueError(f"it is malformed: {type(error).__name__}: {error}") from error


def _table(content: Any, gpu: str | None) -> Table:
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"it is not a table of schema {SCHEMA}")
    gpu = _text(content.get("gpu")) if gpu is None else gpu
    for name, here in (("gpu", gpu), ("versions", versions())):
        if content.get(name) != here:
            raise ValueError(f"its {name} is {content.get(name)!r}, here it is {here!r}")
    chains = content.get("chains", [])  # which older tables lack
    if not isinstance(content["entries"], list) or not isinstance(chains, list):
        raise ValueError("its entries are no list")
    constants = content.get("constants")
    found = None if constants is None else Constants.from_dict(constants)
    entries = tuple(_entry(row, gpu) for row in content["entries"])
    return Table(gpu, entries, found, tuple(_chain_entry(row, gpu) for row in chains))


def _entry(row: dict[str, Any], gpu: str) -> Entry:
    problem, code = problem_in(row["problem"]), _integers(row["tiles"])
    if problem.gpu != gpu:
        raise ValueError(f"an entry is of the GPU {problem.gpu!r}")
    if len(code) != len(Tiles().encode()):
        raise ValueError(f"an entry has {len(code)} numbers for its tiles, not {len(Tiles().encode())}")
    tiles = Tiles.decode(tuple(code))
    if tiles.encode() != code:
        raise ValueError(f"an entry's tiles are not to be told from {code}")
    known = WAYS if problem.direction == "frozen" and problem.relu and not problem.pooled else WAYS[:-1]
    if row["implementation"] not in known:
        raise ValueError(f"an entry has the implementation {row['implementation']!r}")
    for tile in (tiles.forward, tiles.dgrad, tiles.wgrad and replace(tiles.wgrad, splits=1)):
        if tile is not None and not legal(tile, problem, gradient=tile is tiles.dgrad):
            raise ValueError(f"the tile {tile} is not legal for {problem}")
    _rehearse(tiles, problem)
    return Entry(problem, row["implementation"], tiles, *_measured_in(row))


def _chain_entry(row: dict[str, Any], gpu: str) -> ChainEntry:
    links, parts = chain_in(row["links"]), parts_in(row["parts"])
    if any(link.gpu != gpu for link in links.links):  # type: ignore[attr-defined]
        raise ValueError("a chain is of another GPU")
    lengths = tuple(length for length, _ in parts)
    if lengths not in PARTS[len(links.links)]:
        raise ValueError(f"a chain of {len(links.links)} is cut in {lengths}")
    for part, (_, tile) in zip(cut(links, lengths), parts, strict=True):
        if tile not in ([None] if isinstance(part, Problem) else chain_forward.tiles(part)):
            raise ValueError(f"the tile {tile} is not legal for {part}")
    return ChainEntry(links, parts, *_measured_in(row))


def _measured_in(row: dict[str, Any]) -> tuple[float, float, str, tuple[tuple[str, str], ...]]:
    seconds, spread = _number(row["seconds"]), _number(row["spread"])
    if not (0 < seconds < math.inf and 0 <= spread < math.inf):
        raise ValueError(f"an entry took {seconds} +- {spread} seconds")
    quarantined = tuple((_text(candidate), _text(reason)) for candidate, reason in row["quarantined"])
    return seconds, spread, _text(row["reason"]), quarantined


def chain_out(links: Chain) -> list[dict[str, Any] | None]:
    """The chain as plain values."""
    return [None if link is None else problem_out(cast(Problem, link)) for link in links]


def chain_in(rows: list[dict[str, Any] | None]) -> Chain:
    """The inverse of :func:`chain_out`, by way of JSON. Raises ValueError for what is none."""
    spatial, expand, reduce = (None if row is None else problem_in(row) for row in rows)
    if expand is None or (spatial is None and reduce is None):
        raise ValueError(f"{rows} is no chain")
    links = Chain(spatial, expand, reduce)
    for link, following in zip(links.links, links.links[1:], strict=False):
        if (link.n, link.co, link.p, link.q) != (following.n, following.ci, following.h, following.w):
            raise ValueError(f"{following} does not read what {link} returns")
    return links


def asked_out(problem: Problem | Chain) -> Any:
    """A problem or a chain as plain values."""
    return chain_out(problem) if isinstance(problem, Chain) else problem_out(problem)


def asked_in(content: Any) -> Problem | Chain:
    """The inverse of :func:`asked_out`. Raises ValueError for what is neither."""
    return chain_in(content) if isinstance(content, list) else problem_in(content)


def parts_out(parts: Parts) -> list[list[Any]]:
    """The parts as plain values."""
    return [[length, Tiles(forward=tile).encode()] for length, tile in parts]


def parts_in(rows: list[list[Any]]) -> Parts:
    """The inverse of :func:`parts_out`."""
    return tuple((length, Tiles.decode(tuple(_integers(code))).forward) for length, code in rows)


def problem_out(problem: Problem) -> dict[str, Any]:
    """The problem as plain values."""
    return asdict(problem) | {"dtype": dtype_name(problem.dtype)}


def problem_in(fields: dict[str, Any]) -> Problem:
    """The inverse of :func:`problem_out`, by way of JSON. Raises ValueError for what is none."""
    pairs = {name: tuple(_integers(fields[name])) for name in ("stride", "padding", "dilation")}
    sizes = _integers(fields[name] for name in ("n", "h", "w", "ci", "co", "r", "s", "groups", "arch"))
    problem = Problem(**(fields | pairs | {"dtype": DTYPES[fields["dtype"]]}))
    flags = problem.tf32, problem.prologue, problem.residual, problem.pooled, problem.relu
    numbers = [*sizes, *(size + 1 for size in problem.padding), *problem.stride, *problem.dilation]
    if (
        not all(1 <= number < 2**31 for number in numbers)
        or any(len(pair) != 2 for pair in pairs.values())
        or min(problem.p, problem.q) < 1
        or not all(type(flag) is bool for flag in flags)
        or problem.direction not in DIRECTIONS
        or (problem.pooled and (problem.residual or problem.prologue))
        or (problem.direction != "frozen" and not problem.relu)
        or not isinstance(problem.gpu, str)
    ):
        raise ValueError(f"{fields} is no problem")
    return problem


def _integers(values: Any) -> list[int]:
    found = list(values)
    if not all(type(value) is int for value in found):
        raise ValueError(f"{found} should be integers")
    return found


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{value!r} should be a number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} should be text")
    return value


def legal(tile: TileConfig, problem: Problem, gradient: bool = False) -> bool:
    """Whether the problem's GPU can run kernels with ``tile``, as far as that can be told without compiling one.

    ``gradient``: that of the gradient of the input.
    """
    sizes = tile.block_m, tile.block_n, tile.block_k
    buffers = tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k * problem.dtype.itemsize
    return (
        all(size >= 16 and size & (size - 1) == 0 for size in sizes)
        and max(tile.block_m, tile.block_n) <= 256
        and (tile.splits == 1 or (tile.box is None and problem.direction != "training"))
        and tile.num_warps in (4, 8)
        and (tile.box is None or _boxes(tile.box, tile, problem, gradient))
        and 1 <= tile.num_stages <= 8
        and (tile.max_registers is None or 32 <= tile.max_registers <= 255)
        and buffers <= gpu_of(problem.arch, problem.gpu).shared
    )


def _boxes(box: tuple[int, int, int], tile: TileConfig, problem: Problem, gradient: bool) -> bool:
    """Whether ``box`` is one of the tile's pixels, for a problem that boxes fit."""
    ci, co = problem.tile_channels
    why_not = dgrad_box.why_not(problem.gradient) if gradient else conv_box.why_not(problem)
    whole = all(size >= 1 and size & (size - 1) == 0 for size in box) and prod(box) == tile.block_m
    return whole and why_not is None and (co if gradient else ci) % tile.block_k == 0


def _rehearse(tiles: Tiles, problem: Problem) -> None:
    """Raise what the launchers raise for ``tiles``, and ValueError for splits that nobody would try.

    They check everything before they look at the images, of which there are none: nothing is launched.
    """
    p, gpu = problem, gpu_of(problem.arch)
    # More would be parts of sums in memory, and no programs that run at the same time.
    for tile in (tiles.forward, tiles.wgrad):
        if tile is not None and not 1 <= tile.splits <= 2 * gpu.multiprocessors:
            raise ValueError(f"an entry has {tile.splits} splits; legal are 1 to {2 * gpu.multiprocessors}")
    product: dict[str, Any] = {"geometry": p.geometry, "tf32": p.tf32}

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=p.dtype, device="meta", memory_format=torch.channels_last)

    with _disable_current_modes(), dry_run(p.arch, p.gpu):  # nobody is to see these tensors
        x, w, y = tensor(0, p.ci, p.h, p.w), tensor(p.co, p.ci // p.groups, p.r, p.s), tensor(0, p.co, p.p, p.q)
        if tiles.forward is not None:
            conv_forward(x, w, config=tiles.forward, **product)
        if tiles.dgrad is not None:
            conv_dgrad(y, w, (p.h, p.w), config=tiles.dgrad, **product)
        if tiles.wgrad is not None:
            conv_wgrad(y, x, (p.r, p.s), config=tiles.wgrad, **product)
