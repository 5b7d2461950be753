"""The command ``bench``: measures models and their layers against every peer, and writes down what came of it."""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from resnet_fused import check, verify
from resnet_fused.commands import UserError, pick_device

from .compare import Row, compare, table
from .count import counted_gpu
from .machine import describe
from .measure import BACKWARD, FORWARD, STEP, WARM_UP, Setting
from .peers import PEERS, Peer
from .shapes import MODELS, Case, Network, layers

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"batch": [1, 8], "dtype": ["float32"], "rounds": 15},
    "cuda": {"batch": [1, 32, 256], "dtype": ["bfloat16"], "rounds": 50},
}
CLOCKS = {
    "cpu": "the clock of the processor",
    "cuda": "CUDA events behind a write of 256 MB, which empties L2; the forward of a layer as a CUDA graph",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m resnet_fused bench``."""
    add = parser.add_argument
    add("--models", nargs="+", default=["resnet50"], choices=MODELS, metavar="NAME", help=f"of {', '.join(MODELS)}")
    add("--batch", nargs="+", type=int, metavar="N", help="default: 1 8 on a CPU, 1 32 256 on a GPU")
    add("--dtype", nargs="+", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--train", action="store_true", help="training too: forward+backward, and whole steps of the models")
    add("--skip", nargs="+", default=[], choices=PEERS, metavar="PEER", help=f"of {', '.join(map(repr, PEERS))}")
    add("--rounds", type=int, metavar="N", help="calls of each peer (default: 15 on a CPU, 50 on a GPU)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: a CUDA GPU if there is one)")
    add("--out", type=Path, default=Path("bench"), metavar="DIR", help="for the results (default: bench)")


def main(options: argparse.Namespace) -> int:
    """Measure, and write ``results.json``, ``results.csv`` and ``report.html``; returns 0.

    Raises UserError for wrong options, where the self-test fails, and where matplotlib is missing.
    """
    device = pick_device(options.device)
    for name, value in DEFAULTS[device.type].items():
        setattr(options, name, getattr(options, name) or value)
    if min(*options.batch, options.rounds) < 1:
        raise UserError(f"--batch and --rounds take numbers from 1 on; got {options.batch} and {options.rounds}")
    try:
        from . import report
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'resnet-fused[bench]'") from None
    require_check(device)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {options.out}: {error.strerror}") from None
    machine = describe(device)  # now, for the load on it before
    rows = measure(options, device)
    gpu = counted_gpu(device)
    results: dict[str, Any] = {
        "machine": machine,
        "method": method(options, device),
        "planned_for": {"name": gpu.name, "arch": gpu.arch},
        "rows": [asdict(row) for row in rows],
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    with (options.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        writer.writerows(results["rows"])
    (options.out / "report.html").write_text(report.page(results))
    print(table([row for row in rows if row.level == "network"]))
    print(f"written: results.json, results.csv and report.html in {options.out}")
    return 0


def measure(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Everything, one setting after the other."""
    rows: list[Row] = []
    todo = settings(options, device)
    for i, setting in enumerate(todo, 1):
        print(f"{i} of {len(todo)}: {setting}", file=sys.stderr, flush=True)
        rows += compare(setting, peers(setting, options.skip), range(options.rounds))
    return rows


def require_check(device: torch.device) -> None:
    """Raise UserError unless the self-test passes on ``device``, or did so before with the same software."""
    if verify.verified(device):
        return
    print("checking that the kernels are right ...", file=sys.stderr, flush=True)
    if (result := check.run(device)).failed:
        failures = sum(row.status == "failed" for row in result.rows)
        raise UserError(
            f"nothing is timed while the self-test fails ({failures} of {len(result.rows)} cases): {verify.COMMAND}"
        )


def settings(options: argparse.Namespace, device: torch.device) -> list[Setting]:
    """What is measured: the models, then their distinct layers."""
    phases = [FORWARD, BACKWARD] if options.train else [FORWARD]
    todo: dict[Case, list[str]] = {
        Network(model): [*phases, STEP] if options.train else phases for model in options.models
    }
    todo |= {layer: phases for model in options.models for layer in layers(model)}
    return [
        Setting(case, batch, DTYPES[dtype], phase, device)
        for case, wanted in todo.items()
        for batch in options.batch
        for dtype in options.dtype
        for phase in wanted
    ]


def peers(setting: Setting, skip: list[str]) -> list[Peer]:
    """Those to compare, without those to ``skip``: all that do it on a model, on a layer what a roofline needs.

    On a GPU one that replays a graph of its own is left out of the layers: it copies input and output besides.
    """

    def wanted(peer: Peer) -> bool:
        alone = peer.layers and not (peer.own_graph and setting.device.type == "cuda")
        return peer.does(setting.training) and (alone or isinstance(setting.case, Network))

    return [peer for peer in PEERS.values() if peer.name not in skip and wanted(peer)]


def method(options: argparse.Namespace, device: torch.device) -> dict[str, str]:
    """How and when it was measured."""
    command = f"python -m resnet_fused bench --models {shlex.join(options.models)}"
    command += f" --batch {' '.join(map(str, options.batch))} --dtype {' '.join(options.dtype)}"
    command += " --train" * options.train + f" --rounds {options.rounds}"
    command += f" --skip {shlex.join(options.skip)}" if options.skip else ""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "times": f"medians with quartiles, by {CLOCKS[device.type]}; {WARM_UP} calls to warm up",
        "rounds": "each calls every peer once, in an order that shifts from round to round",
        "inputs": "random; models with random weights, torchvision's where it has them",
        "inference": "weights and input in the dtype, without gradients",
        "training": "weights in fp32, under autocast where the dtype has 16 bits; steps with SGD with momentum",
        "counts": "from shapes, nothing is run: every operand of a launch once, parameters in the dtype",
    }
