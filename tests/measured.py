"""What every unit of a ResNet-50 at batch 256 took in bf16 on an H100, in microseconds: ``plans/measured_h100.json``.

Of an NVIDIA H100 80GB HBM3 (driver 580.159, torch 2.11.0, CUDA 13.0, Triton 3.6.0): "roads", the kernels of each way to
run a unit, by PyTorch's profiler, without the merge of batch norm's statistics, whose kernel is a new one since; and
"tiles", medians of a fused unit alone with a cold L2, by the sizes of the tiles that load boxes. Of frozen units whose
1x1 filter has few channels the fused way is the fastest of these, or missing where it was not measured with the kernel
of today; in training their forward is in the times as it was before, up to a third slower. That of the frozen stem are
its two launches in a CUDA graph. "chains" are measured as the tiles are: cuDNN's convolutions with all that is behind
them, one after the other, and ours in their fastest tile.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnet_fused.kernels.chain import Chain
from resnet_fused.kernels.launch import TileConfig
from resnet_fused.plan.problem import Problem

CONTENT = Path(__file__).with_name("plans") / "measured_h100.json"
GPU = "NVIDIA H100 80GB HBM3"
GATHERED = "gathered"


class Measured(NamedTuple):
    """``times``: by way or tile. ``boxes``: sizes of the tiles that loaded boxes as the unit ran fused, by kernel."""

    problem: Problem
    times: dict[str, float]
    boxes: dict[str, str]


def measured(table: str) -> list[Measured]:
    """Those of "roads" or "tiles"."""
    content = json.loads(CONTENT.read_text())
    names = content["unit"]
    return [Measured(_problem(dict(zip(names, unit, strict=True))), *rest) for unit, *rest in content[table]]


def measured_chains() -> list[tuple[Chain, dict[tuple[int, ...], float]]]:
    """Blocks of the four stages with what follows, and microseconds by the links of each launch (decide.PARTS)."""
    found = []
    for n, side, middle, roads in json.loads(CONTENT.read_text())["chains"]:
        unit = {"n": n, "size": side, "stride": 1, "prologue": False, "residual": False, "pooled": False}
        spatial = unit | {"ci": middle, "co": middle, "filter": 3, "padding": 1}
        expand = unit | {"ci": middle, "co": 4 * middle, "filter": 1, "padding": 0, "residual": True}
        reduce = unit | {"ci": 4 * middle, "co": middle, "filter": 1, "padding": 0}
        links = Chain(*(_problem(link | {"direction": "frozen"}) for link in (spatial, expand, reduce)))
        found.append((links, {tuple(map(int, parts.split())): time for parts, time in roads.items()}))
    return found


def size(tile: TileConfig | None) -> str:
    """As the table names a tile."""
    return GATHERED if tile is None or tile.box is None else f"{tile.block_m}x{tile.block_n}x{tile.block_k}"


def _problem(u: dict[str, Any]) -> Problem:
    return Problem(
        *(u["n"], u["size"], u["size"], u["ci"], u["co"], u["filter"], u["filter"]),
        *((u["stride"],) * 2, (u["padding"],) * 2, (1, 1), 1, torch.bfloat16),
        *(False, u["prologue"], 90, u["direction"], u["residual"], GPU, u["pooled"]),
    )
