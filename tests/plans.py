"""The plan of every layer of the benchmarks' models, as text: ``python -m tests.plans`` writes the snapshots anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton

from benchmarks.shapes import NETWORKS, NetworkCase, layers
from resnet_fused import explain, fuse
from resnet_fused.kernels.chain import Chain
from resnet_fused.plan.decide import decide, decide_chain
from resnet_fused.plan.problem import Problem

ARCHITECTURES = (80, 89, 90, 100, 120)
BATCHES = {"inference": (1, 32), "frozen": (1,), "training": (128,)}


def path(arch: int) -> Path:
    return Path(__file__).with_name("plans") / f"sm_{arch}.txt"


def text(arch: int) -> str:
    """Each distinct layer once, in bf16: what runs it, and the times that the model predicts."""
    lines = [f"sm_{arch}, bfloat16: implementation, and predicted microseconds of each", ""]
    found = dict.fromkeys(layer for model in NETWORKS for layer in layers(model))
    for direction, batches in BATCHES.items():
        for batch in batches:
            for layer in found:
                problem = Problem(
                    *(batch, layer.height, layer.width, layer.in_channels, layer.out_channels, layer.kernel),
                    *(layer.kernel, (layer.stride,) * 2, (layer.padding,) * 2, (1, 1), layer.groups, torch.bfloat16),
                    *(False, direction == "training", arch, direction, False),
                )
                plan = decide(problem)
                times = "  ".join(f"{way} {seconds * 1e6:.1f}" for way, seconds in sorted(plan.alternatives))
                lines.append(f"{problem!s:<75} {plan.implementation:<6} {times}")
    lines += [
        "",
        "chains of a frozen ResNet-50: convolutions of each launch, and predicted microseconds of each road",
        "",
    ]
    for batch in CHAINED:
        for chain in dict.fromkeys(chains(batch, arch)):
            plan = decide_chain(chain)
            times = "  ".join(f"{_parts(parts)} {seconds * 1e6:.1f}" for parts, seconds in sorted(plan.alternatives))
            names = ", ".join(link.layer for link in chain.links)
            lines.append(f"{names:<100} {_parts(length for length, _ in plan.parts):<6} {times}")
    if arch == WHOLE:
        for name in ("resnet50", "resnet50_v2"):
            for batch in CHAINED:
                lines += ["", *network(name, batch, arch)]
        lines += ["", *network("resnet50_v2", *BATCHES["training"], arch, training=True)]
    return "\n".join(lines) + "\n"


def _parts(lengths: Iterable[int]) -> str:
    return "+".join(map(str, lengths))


CHAINED = (1, 32, 256)
IN_CHAINS = 7 if triton.__version__.startswith("3.6.") else 13
"""Blocks of a live ResNet-50 that share launches, batch 256, H100: for 256 channels Triton 3.6 has no good tiles."""
WHOLE = 90
"""The architecture for which whole networks are planned."""


def network(name: str, batch: int, arch: int, training: bool = False) -> Iterator[str]:
    """A fused network, live: of each block the launches, its units and their ways, and which of them share one."""
    case = NetworkCase(name)
    with torch.device("meta"):
        model = fuse(case.build().to(torch.bfloat16, memory_format=torch.channels_last).eval())
        x = torch.empty(batch, *case.image, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    found = explain(model, x, arch=arch, training=training)
    total = found.totals()[0].to_dict()
    step = "a training step, " if training else ""
    yield (
        f"a fused {name}, {step}{batch} images: {total['launches']} launches, "
        f"{total['bytes_per_image'] / 1e6:.2f} MB and {total['seconds'] * 1e6 / batch:.2f} us an image predicted"
    )
    yield ""
    for row in found.rows:
        ways = ", ".join(decide(problem).implementation for problem in row.problems)
        chains = "".join(f"; in one launch: {_parts(n for n, _ in decide_chain(x).parts)}" for x in row.chains)
        yield f"{row.name:<10} {len(row.launches)} launches for {ways}{chains}"


def chains(batch: int, arch: int) -> Iterator[Chain]:
    """Of each block of a ResNet-50 its 3x3 and its last 1x1, and the first 1x1 of the next block."""
    side = 56
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(blocks):
            stride = 2 if i == 0 and width > 64 else 1
            following = width if i + 1 < blocks else 2 * width
            unit = partial(_unit, batch, arch)
            spatial, expand = unit(side, width, width, 3, stride), unit(side // stride, width, 4 * width, residual=True)
            side //= stride
            reduce = None if (width, i) == (512, 2) else unit(side, 4 * width, following)
            yield Chain(spatial, expand, reduce)


def _unit(
    batch: int, arch: int, side: int, ci: int, co: int, taps: int = 1, stride: int = 1, residual: bool = False
) -> Problem:
    sizes = batch, side, side, ci, co, taps, taps, (stride, stride), (taps // 2, taps // 2), (1, 1), 1
    return Problem(*sizes, torch.bfloat16, False, False, arch, "frozen", residual)


if __name__ == "__main__":
    for arch in ARCHITECTURES:
        path(arch).parent.mkdir(exist_ok=True)
        path(arch).write_text(text(arch))
