"""What was measured of one GPU: a table of problems, kept as JSON, that the plan looks things up in."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.kernels.launch import TileConfig
from resnet_fused.problem import Problem, Tiles
from resnet_fused.version import __version__

logger = logging.getLogger("resnet_fused")

SCHEMA = 1
IMPLEMENTATIONS = ("fused", "mixed", "eager", "cudnn")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Entry:
    """What was found about ``problem``: the fastest right way, its median seconds and their spread.

    ``quarantined``: candidates that must not run, each with its reason: wrong, crashing, out of resources.
    """

    problem: Problem
    implementation: str
    tiles: Tiles
    seconds: float
    spread: float
    reason: str
    quarantined: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Table:
    """The entries of one GPU under the present versions of triton, torch and this library. Compared by identity."""

    gpu: str
    entries: tuple[Entry, ...] = ()

    def with_entry(self, entry: Entry) -> Table:
        """A table in which ``entry`` stands for its problem."""
        others = tuple(known for known in self.entries if known.problem != entry.problem)
        return Table(self.gpu, (*others, entry))

    def exact(self, problem: Problem) -> Entry | None:
        """The entry of this very problem."""
        return next((entry for entry in self.entries if entry.problem == problem), None)

    def lookup(self, problem: Problem) -> Entry | None:
        """The entry of ``problem``, or of that which differs in the number of images alone, by the smallest factor.

        What was measured of inference serves a frozen model where nothing was measured of that.
        """
        for direction in (problem.direction, "inference") if problem.direction == "frozen" else (problem.direction,):
            kind = replace(problem, n=1, gpu="", direction=direction)
            alike = [entry for entry in self.entries if replace(entry.problem, n=1, gpu="") == kind]
            if alike:
                return min(alike, key=lambda entry: abs(math.log(entry.problem.n / problem.n)))
        return None


def cache_dir() -> Path:
    """Where tables and notes are kept: RESNET_FUSED_CACHE, else resnet_fused in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("RESNET_FUSED_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_fused"


def versions() -> dict[str, str]:
    """Those that a measurement holds for."""
    return {"torch": torch.__version__, "triton": triton.__version__, "resnet_fused": __version__}


def path(gpu: str) -> Path:
    """The file of the user's table of ``gpu`` under the present versions."""
    return cache_dir() / "tuned" / _file_name(gpu)


def _file_name(gpu: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+]+", "-", "-".join([gpu, *versions().values()])) + ".json"


@cache
def load(gpu: str) -> Table | None:
    """The user's table of ``gpu``, else the one that the package ships, else None.

    A file that is corrupt or foreign (another GPU, other versions, tiles that the GPU cannot run) is refused with one
    logged message.
    """
    if not gpu:
        return None
    for file in (path(gpu), Path(__file__).with_name("tables") / _file_name(gpu)):
        try:
            return parse(file.read_text(), gpu)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            logger.warning("the table %s is ignored: %s", file, error)
    return None


def save(table: Table) -> Path:
    """Write the user's table; whoever reads it finds the old one or the new one, whole. Raises OSError if it cannot."""
    file = path(table.gpu)
    write_whole(file, render(table))
    load.cache_clear()
    return file


def write_whole(file: Path, text: str) -> None:
    """Replace ``file`` in one step: at no time is it half-written. Raises OSError, and leaves the old one then."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with open(handle, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def render(table: Table) -> str:
    """The table as JSON."""
    entries = [
        {
            "problem": _problem_out(entry.problem),
            "implementation": entry.implementation,
            "tiles": entry.tiles.encode(),
            "seconds": entry.seconds,
            "spread": entry.spread,
            "reason": entry.reason,
            "quarantined": [list(pair) for pair in entry.quarantined],
        }
        for entry in table.entries
    ]
    return json.dumps({"schema": SCHEMA, "gpu": table.gpu, "versions": versions(), "entries": entries}, indent=1)


def parse(text: str, gpu: str) -> Table:
    """The inverse of :func:`render`. Raises ValueError for what is no table of ``gpu`` under the present versions."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"it is not a table of schema {SCHEMA}")
    for name, here in (("gpu", gpu), ("versions", versions())):
        if content.get(name) != here:
            raise ValueError(f"its {name} is {content.get(name)!r}, here it is {here!r}")
    try:
        entries = tuple(_entry(row) for row in content["entries"])
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"an entry is malformed: {type(error).__name__}: {error}") from error
    return Table(gpu, entries)


def _entry(row: dict[str, Any]) -> Entry:
    problem, code = problem_in(row["problem"]), tuple(_integers(row["tiles"]))
    if len(code) != len(Tiles().encode()):
        raise ValueError(f"an entry has {len(code)} numbers for its tiles, not {len(Tiles().encode())}")
    tiles = Tiles.decode(code)
    known = IMPLEMENTATIONS if problem.direction == "frozen" else IMPLEMENTATIONS[:-1]
    if row["implementation"] not in known:
        raise ValueError(f"an entry has the implementation {row['implementation']!r}")
    for tile in (tiles.forward, tiles.dgrad, tiles.wgrad and tiles.wgrad.tile):
        if tile is not None and not legal(tile, problem):
            raise ValueError(f"the tile {tile} is not legal for {problem}")
    seconds, spread = float(row["seconds"]), float(row["spread"])
    if not (0 < seconds < math.inf and 0 <= spread < math.inf):
        raise ValueError(f"an entry took {seconds} +- {spread} seconds")
    quarantined = tuple((str(candidate), str(reason)) for candidate, reason in row["quarantined"])
    return Entry(problem, row["implementation"], tiles, seconds, spread, str(row["reason"]), quarantined)


def _problem_out(problem: Problem) -> dict[str, Any]:
    return asdict(problem) | {"dtype": str(problem.dtype).removeprefix("torch.")}


def problem_in(fields: dict[str, Any]) -> Problem:
    """The problem that ``asdict`` made ``fields`` of, by way of JSON. Raises ValueError for what is none."""
    pairs = {name: tuple(_integers(fields[name])) for name in ("stride", "padding", "dilation")}
    sizes = {name: fields[name] for name in ("n", "h", "w", "ci", "co", "r", "s", "groups", "arch")}
    problem = Problem(**(fields | pairs | {"dtype": _DTYPES[fields["dtype"]]}))
    if min(_integers(sizes.values())) < 1 or any(len(pair) != 2 for pair in pairs.values()) or min(problem.m, 1) < 1:
        raise ValueError(f"{fields} is no problem")
    return problem


def _integers(values: Any) -> list[int]:
    found = list(values)
    if not all(type(value) is int for value in found):
        raise ValueError(f"{found} should be integers")
    return found


def legal(tile: TileConfig, problem: Problem) -> bool:
    """Whether the problem's GPU can run kernels with ``tile``, as far as that can be told without compiling one."""
    sizes = tile.block_m, tile.block_n, tile.block_k
    buffers = tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k * problem.dtype.itemsize
    return (
        all(size >= 16 and size & (size - 1) == 0 for size in sizes)
        and tile.num_warps == 4
        and 1 <= tile.num_stages <= 8
        and (tile.max_registers is None or 32 <= tile.max_registers <= 255)
        and buffers <= gpu_of(problem.arch, problem.gpu).shared
    )
