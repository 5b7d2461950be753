"""The command ``env``: versions, GPU, flags, cache and tables of this machine, for whoever reports what went wrong."""

from __future__ import annotations

import argparse
import json
import os

import torch

from resnet_fused.commands.machine import describe
from resnet_fused.engine.request import requested
from resnet_fused.kernels.launch import interpreting
from resnet_fused.plan import checked, decide, tuned
from resnet_fused.plan.cache import cache_dir
from resnet_fused.plan.tuned import Table

VARIABLES = ("RESNET_FUSED", "TRITON_", "TORCH", "PYTORCH_", "CUDA_", "CUBLAS_", "NVIDIA_TF32_", "ONEDNN_", "OMP_")
"""How the environment variables begin that change what is run here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m resnet_fused env``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """Print what there is; returns 0, whatever is broken of it."""
    found = environment()
    print(json.dumps(found, indent=1) if options.json else _as_text(found))
    return 0


def environment() -> dict[str, dict[str, str]]:
    """Each section with its facts, by their names; what cannot be read is told in place of its value."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return {"machine": describe(device), "flags": _flags(device), "cache": _cache(device), "tables": _tables()}


def _flags(device: torch.device) -> dict[str, str]:
    """What decides here how kernels run, and the environment variables that are set."""
    return {
        "kernels run": _how_kernels_run(device),
        "implementation": requested(),
        "TF32 in convolutions": str(decide.tf32(torch.float32)),
        "cudnn.benchmark": str(torch.backends.cudnn.benchmark),
        "cudnn.deterministic": str(torch.backends.cudnn.deterministic),
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def _how_kernels_run(device: torch.device) -> str:
    if interpreting():
        return "in Triton's interpreter"
    if device.type != "cuda":
        return "nowhere: there is no CUDA GPU"
    return decide.why_too_old(device) or f"compiled for sm_{decide.arch_of(device)}"


def _cache(device: torch.device) -> dict[str, str]:
    try:
        folder = cache_dir()
    except FileNotFoundError as error:
        return {"folder": str(error)}
    passed = "passed here" if checked.verified(device) else f"not passed here yet: {checked.COMMAND}"
    return {"folder": str(folder), "self-test": passed if device.type == "cuda" else "noted of a GPU alone"}


def _tables() -> dict[str, str]:
    """By file, what was measured, or why it does not count."""
    try:
        found = tuned.kept()
    except FileNotFoundError:
        return {}
    return {file.name: _about(table) for file, table in found.items()}


def _about(table: Table | str) -> str:
    if isinstance(table, str):
        return f"ignored: {table}"
    return f"{table.gpu}, units: {len(table.entries)}, chains: {len(table.chains)}"


def _as_text(found: dict[str, dict[str, str]]) -> str:
    lines: list[str] = []
    for section, facts in found.items():
        lines += [section, *([f"  {name}: {value}" for name, value in facts.items()] or ["  none"])]
    return "\n".join(lines)
