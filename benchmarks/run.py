"""The command ``bench``: measures models and their layers against every peer, and writes down what came of it."""

from __future__ import annotations

import argparse
import csv
import io
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from resnet_fused.commands import check
from resnet_fused.commands.machine import describe
from resnet_fused.commands.shared import (
    DTYPES,
    NETWORKS,
    UserError,
    add_size_argument,
    images,
    pick_device,
    require_writable,
    rounds,
)
from resnet_fused.plan import cache, checked

from .compare import PeerRow, compare, failed, table
from .count import counted_gpu
from .measure import BACKWARD, FORWARD, STEP, WARM_UP, Setting
from .peers import PEERS, Peer
from .shapes import Case, NetworkCase, layers

FILES = ("results.json", "results.csv", "report.html")
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
    add("--models", nargs="+", default=["resnet50"], choices=NETWORKS, metavar="NAME", help=f"of {', '.join(NETWORKS)}")
    add("--batch", nargs="+", type=images, metavar="N", help="default: 1 8 on a CPU, 1 32 256 on a GPU")
    add_size_argument(parser)
    add("--dtype", nargs="+", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--train", action="store_true", help="training too: forward+backward, and whole steps of the models")
    add("--skip", nargs="+", default=[], choices=PEERS, metavar="PEER", help=f"of {', '.join(map(repr, PEERS))}")
    add("--rounds", type=rounds, metavar="N", help="calls of each peer (default: 15 on a CPU, 50 on a GPU)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: a CUDA GPU if there is one)")
    add("--out", type=Path, default=Path("bench"), metavar="DIR", help="for the results (default: bench)")


def main(options: argparse.Namespace) -> int:
    """Measure, and write ``results.json`` and ``results.csv`` as it goes, at the end ``report.html``; returns 0.

    Raises UserError for wrong options, where the self-test fails, where matplotlib is missing, and where nothing can be
    written.
    """
    device = pick_device(options.device)
    for name, value in DEFAULTS[device.type].items():
        setattr(options, name, getattr(options, name) or value)
    try:
        from . import report
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'resnet-fused[bench]'") from None
    require_writable(options.out, "--out")
    if taken := [name for name in FILES if (options.out / name).is_dir()]:
        raise UserError(f"--out {options.out}: {taken[0]} is a directory there")
    require_check(device)
    gpu = counted_gpu(device)
    results: dict[str, Any] = {
        "machine": describe(device),  # now, for the load on it before
        "method": method(options, device),
        "planned_for": {"name": gpu.name, "arch": gpu.arch},
    }
    rows: list[PeerRow] = []
    try:
        for found in measure(options, device):
            rows += found
            results["rows"] = [asdict(row) for row in rows]
            write(options.out, results)
        cache.write_whole(options.out / "report.html", report.page(results))
    except OSError as error:
        raise UserError(f"--out {options.out}: {error.strerror}") from None
    print(table([row for row in rows if row.level == "network"]))
    print(f"written: {', '.join(FILES)} in {options.out}")
    return 0


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write what was measured so far. Raises OSError."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, [column.name for column in fields(PeerRow)])
    writer.writeheader()
    writer.writerows(results["rows"])
    cache.write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    cache.write_whole(folder / "results.csv", lines.getvalue())


def measure(options: argparse.Namespace, device: torch.device) -> Iterator[list[PeerRow]]:
    """Everything, one setting after the other; one that fails is rows with the reason."""
    todo = settings(options, device)
    for i, setting in enumerate(todo, 1):
        print(f"{i} of {len(todo)}: {setting}", file=sys.stderr, flush=True)
        compared = peers(setting, options.skip)
        try:
            rows = compare(setting, compared, range(options.rounds), partial(_tell, setting))
        except Exception as error:  # of whatever kind, it is no reason to lose the settings behind it
            rows = failed(compared, setting, error)
        yield rows


def _tell(setting: Setting, peer: Peer) -> None:
    """Say which peer comes next, where it may take minutes: on a network, which others compile."""
    if isinstance(setting.case, NetworkCase) and peer.why_not(setting.device, setting.training) is None:
        print(f"    preparing {peer.name}", file=sys.stderr, flush=True)


def require_check(device: torch.device) -> None:
    """Raise UserError unless the self-test passes on ``device``, or did so before with the same software."""
    if checked.verified(device):
        return
    print("checking that the kernels are right ...", file=sys.stderr, flush=True)
    if (result := check.run(device)).failed:
        failures = sum(row.status == "failed" for row in result.rows)
        raise UserError(
            f"nothing is timed while the self-test fails ({failures} of {len(result.rows)} cases): {checked.COMMAND}"
        )


def settings(options: argparse.Namespace, device: torch.device) -> list[Setting]:
    """What is measured: the models, then their distinct layers."""
    phases = [FORWARD, BACKWARD] if options.train else [FORWARD]
    todo: dict[Case, list[str]] = {
        NetworkCase(model, options.size): [*phases, STEP] if options.train else phases for model in options.models
    }
    todo |= {layer: phases for model in options.models for layer in layers(model, options.size)}
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
        return peer.does(setting.training) and (alone or isinstance(setting.case, NetworkCase))

    return [peer for peer in PEERS.values() if peer.name not in skip and wanted(peer)]


def method(options: argparse.Namespace, device: torch.device) -> dict[str, str]:
    """How and when it was measured."""
    command = f"python -m resnet_fused bench --models {shlex.join(options.models)}"
    command += f" --batch {' '.join(map(str, options.batch))} --dtype {' '.join(options.dtype)}"
    command += f" --size {options.size}" if options.size else ""
    command += " --train" * options.train + f" --rounds {options.rounds}"
    command += f" --skip {shlex.join(options.skip)}" if options.skip else ""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "times": f"medians with quartiles, by {CLOCKS[device.type]}; {WARM_UP} calls to warm up",
        "rounds": "each calls every peer once, in an order that shifts from round to round",
        "inputs": "random; models with random weights, torchvision's or timm's where they have them",
        "inference": "weights and input in the dtype, without gradients",
        "training": "weights in fp32, under autocast where the dtype has 16 bits; steps with SGD with momentum",
        "counts": "from shapes, nothing is run: every operand of a launch once, parameters in the dtype",
    }
