"""The plan of every layer of the benchmarks' models, as text: ``python -m tests.plans`` writes the snapshots anew."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.shapes import MODELS, layers
from resnet_fused.plan.decide import decide
from resnet_fused.plan.problem import Problem

ARCHITECTURES = (80, 89, 90, 100, 120)
BATCHES = {"inference": (1, 32), "frozen": (1,), "training": (128,)}


def path(arch: int) -> Path:
    return Path(__file__).with_name("plans") / f"sm_{arch}.txt"


def text(arch: int) -> str:
    """Each distinct layer once, in bf16: what runs it, and the times that the model predicts."""
    lines = [f"sm_{arch}, bfloat16: implementation, and predicted microseconds of each", ""]
    found = dict.fromkeys(layer for model in MODELS for layer in layers(model))
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
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for arch in ARCHITECTURES:
        path(arch).parent.mkdir(exist_ok=True)
        path(arch).write_text(text(arch))
