"""What a model's units cost on a GPU, without one: their compiled kernels, beside Inductor's, and the roofline model.

Counted and compiled facts stand beside predictions, which are named so: a column with MODEL in its name is no
measurement.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch

from resnet_fused.commands import cost_inductor, cost_machine_code
from resnet_fused.commands.cost_machine_code import MachineCode, Occupancy, occupancy
from resnet_fused.commands.shared import (
    NETWORKS,
    UserError,
    add_network_arguments,
    chosen_input,
    network,
    pick_arch,
    tracked,
)
from resnet_fused.commands.tune import find_problems
from resnet_fused.commands.tune_trial import Candidate, ChainCandidate, rehearse
from resnet_fused.engine.trace import Launch
from resnet_fused.kernels.chain import Chain
from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.kernels.launch import Call, TileConfig, interpreting
from resnet_fused.plan import decide, roofline, tuned
from resnet_fused.plan.constants import Constants
from resnet_fused.plan.problem import Problem, Request, cut, on_gpu, units_of
from resnet_fused.table import render

TEMPLATE = "Inductor's template"


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel of a unit, and how the model sees its launch (None where it has no such launch).

    ``flops``, ``bytes``: counted, each operand once. ``code``: None where compilation failed, for the ``reason``.
    """

    name: str
    tile: str
    flops: int
    bytes: int
    code: MachineCode | None
    occupancy: Occupancy | None
    predicted: roofline.PredictedLaunch | None
    reason: str = ""


@dataclass(frozen=True)
class UnitCost:
    """A unit or a chain as planned: what it launches, of that what is compiled here; and a unit by Inductor's template.

    ``implementation``: of a chain, how many convolutions each launch computes.

    ``launches``, ``flops`` and ``bytes`` are counted, of the forward and in training of the backward too, libraries'
    calls included. ``compulsory_bytes``: see :func:`roofline.compulsory`. ``predicted``: by the model.
    """

    layer: str
    implementation: str
    launches: int
    flops: int
    bytes: int
    compulsory_bytes: int
    predicted: tuple[roofline.PredictedLaunch, ...]
    kernels: tuple[Kernel, ...]

    @property
    def seconds(self) -> float:
        """Of the whole unit, predicted."""
        return sum(launch.seconds for launch in self.predicted)

    @property
    def bound(self) -> str:
        """What bounds its longest launch, as predicted."""
        longest = max(self.predicted, key=lambda launch: launch.seconds)
        return f"{longest.kernel}: {longest.bound}"


@dataclass(frozen=True)
class CostReport:
    """The units of one model on one architecture; ``str()`` of it is two tables."""

    title: str
    arch: int
    units: tuple[UnitCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {"title": self.title, "arch": self.arch, "gpu": gpu_of(self.arch).name} | asdict(self)

    def __str__(self) -> str:
        columns = ["unit", "runs", "launches", "GFLOP", "MB", "MB compulsory", "us (MODEL)", "bound (MODEL)"]
        rows = [
            (
                *(unit.layer, unit.implementation, unit.launches, _giga(unit.flops), _mega(unit.bytes)),
                *(_mega(unit.compulsory_bytes), _micro(unit.seconds), unit.bound),
            )
            for unit in self.units
        ]
        heads = ["unit", "kernel", "tile", "registers", "spilled B", "shared KB", "programs / SM", "% of warps"]
        heads += ["issue slots / tensor cycle", "us (MODEL)"]
        code = [
            (unit.layer if kernel is unit.kernels[0] else "", *_cells(kernel))
            for unit in self.units
            for kernel in unit.kernels
        ]
        notes = dict.fromkeys(f"{k.name}: {k.reason}" for unit in self.units for k in unit.kernels if k.reason)
        return "\n".join([render(self.title, columns, rows), render("Compiled kernels", heads, code), *notes])


def _cells(kernel: Kernel) -> tuple[object, ...]:
    code, seen, predicted = kernel.code, kernel.occupancy, kernel.predicted
    compiled: tuple[object, ...] = (None,) * 6
    if code is not None and seen is not None:
        slots = _slots(code, kernel.name)
        shared = round(code.shared / 1024, 1)
        compiled = (code.registers, code.spilled, shared, seen.programs, round(seen.percent), slots)
    return (kernel.name, kernel.tile, *compiled, None if predicted is None else _micro(predicted.seconds))


def _slots(code: MachineCode, kernel: str) -> float | str | None:
    """Of the main loop; of a chain, of its walk over the taps and of the loop behind it."""
    if kernel in ("chain_forward", "chain_box") and len(code.loop_slots) > 1:
        return ", ".join("?" if slots is None else f"{slots:.2f}" for slots in code.loop_slots)
    return None if code.issue_slots is None else round(code.issue_slots, 2)


def _giga(count: float) -> float:
    return round(count / 1e9, 2)


def _mega(count: float) -> float:
    return round(count / 1e6, 2)


def _micro(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def examine(problem: Problem | Chain, request: Request) -> UnitCost | None:
    """Compile what the plan of ``problem`` launches, and Inductor's template for the same layer; needs no GPU.

    None for a chain of which each convolution is launched by itself.
    """
    table = tuned.load(units_of(problem)[0].gpu)
    if isinstance(problem, Chain):
        plan = decide.decide_chain(problem, request, table)
        return examine_chain(problem, plan, decide.constants_of(table)) if plan.together else None
    chosen, constants = decide.decide(problem, request, table), decide.constants_of(table)
    calls, launches = rehearse(problem, Candidate(chosen.implementation, chosen.tiles))
    predicted = roofline.predict(problem, chosen.implementation, chosen.tiles, constants)
    by_name = {launch.kernel: launch for launch in predicted}
    distinct = {call.specialization(): call for call in calls}.values()
    return UnitCost(
        layer=problem.layer + ", prologue" * problem.prologue + ", residual" * problem.residual,
        implementation=chosen.implementation,
        launches=len(launches),
        flops=sum(launch.flops for launch in launches),
        bytes=sum(_bytes(launch) for launch in launches),
        compulsory_bytes=roofline.compulsory(problem),
        predicted=predicted,
        kernels=(
            *(_compiled(call, problem, by_name.get(_name(call))) for call in distinct),
            _inductor(problem, calls, constants),
        ),
    )


def examine_chain(links: Chain, plan: decide.ChainPlan, constants: Constants) -> UnitCost:
    """The same of convolutions of which some share a launch."""
    calls, launches = rehearse(links, ChainCandidate(plan.parts))
    predicted: list[roofline.PredictedLaunch] = []
    for part, (_, tile) in zip(cut(links, (length for length, _ in plan.parts)), plan.parts, strict=True):
        if isinstance(part, Chain):
            predicted += roofline.chain(part, cast(TileConfig, tile), constants)
        else:
            unit = decide.decide(part, "auto", tuned.load(part.gpu))
            predicted += roofline.predict(part, unit.implementation, unit.tiles, constants)
    by_name = {launch.kernel: launch for launch in predicted}
    first, distinct = units_of(links)[0], {call.specialization(): call for call in calls}.values()
    return UnitCost(
        layer=" > ".join(unit.layer for unit in units_of(links)),
        implementation="+".join(str(length) for length, _ in plan.parts),
        launches=len(launches),
        flops=sum(launch.flops for launch in launches),
        bytes=sum(_bytes(launch) for launch in launches),
        compulsory_bytes=roofline.compulsory_of_chain(links),
        predicted=tuple(predicted),
        kernels=tuple(_compiled(call, first, by_name.get(_name(call))) for call in distinct),
    )


def _name(call: Call) -> str:
    return str(call.kernel.__name__.removesuffix("_kernel"))


def _bytes(launch: Launch) -> int:
    return launch.bytes_read + launch.bytes_written


def _compiled(call: Call, problem: Problem, predicted: roofline.PredictedLaunch | None) -> Kernel:
    cost, t = call.cost(), call.config
    code = cost_machine_code.read(call.compile(problem.arch), problem.arch)
    tile = f"{t.block_m}x{t.block_n}x{t.block_k}"
    size = cost.bytes_read + cost.bytes_written
    reason = code.reason if cost.flops else ""
    return Kernel(_name(call), tile, cost.flops, size, code, _occupancy(code, problem.arch), predicted, reason)


def _occupancy(code: MachineCode, arch: int) -> Occupancy:
    return occupancy(code.registers, code.shared, code.warps, arch, code.tensor_memory)


def _inductor(problem: Problem, calls: Sequence[Call], constants: Constants) -> Kernel:
    """The template's convolution alone, with the best of the configurations near our tile (or, without one, 128x128).

    The best: the fewest issue slots, of those that spill the least.
    """
    convolutions = ("conv_forward", "conv_box")
    own = next((call.config for call in calls if _name(call) in convolutions), TileConfig(128, 128, 64))
    try:
        filled = cost_inductor.fill_in(problem, own.block_m, own.block_n)
        read = [(cost_machine_code.read(t.compile(problem.arch), problem.arch), t) for t in filled]
    except cost_inductor.Unavailable as reason:
        return Kernel(TEMPLATE, "", 0, 0, None, None, None, str(reason))
    code, best = min(read, key=lambda pair: (pair[0].spilled, pair[0].issue_slots or float("inf")))
    tile = TileConfig(*best.tile, best.num_warps, best.num_stages)
    predicted = None if code.issue_slots is None else roofline.template(problem, tile, code.issue_slots, constants)
    flops, size = (0, 0) if predicted is None else (predicted.flops, predicted.bytes)
    name = "x".join(map(str, best.tile))
    return Kernel(TEMPLATE, name, flops, size, code, _occupancy(code, problem.arch), predicted, code.reason)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m resnet_fused cost``."""
    add_network_arguments(parser)
    add = parser.add_argument
    add("--arch", nargs="+", default=["sm_90"], metavar="ARCH", help="sm_80, sm_90 ... (default: sm_90)")
    add("--implementation", choices=("auto", "triton", "mixed"), default="auto", help="default: auto")
    add("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """Compile the planned kernels of a model and print what they cost; returns 0."""
    if interpreting():
        raise UserError("TRITON_INTERPRET is set: unset it, for the kernels are compiled here, not interpreted")
    reports = [report(options, pick_arch(name)) for name in options.arch]
    if options.json:
        print(json.dumps([found.to_dict() for found in reports], indent=1))
    else:
        print(*reports, sep="\n\n")
    return 0


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Let processes start in the root directory: until they know this one's path they import from where they stand."""
    here = os.open(".", os.O_RDONLY)
    os.chdir("/")
    try:
        yield
    finally:
        os.fchdir(here)
        os.close(here)


def report(options: argparse.Namespace, arch: int) -> CostReport:
    """The report on the model and its input that ``options`` name."""
    dtype, side = getattr(torch, options.dtype), options.size or NETWORKS[options.model]
    shape = options.batch, 3, side, side
    with torch.device("meta"):
        model = network(options.model).to(dtype)
    direction = "training" if options.train else "inference"
    gpu = decide.present_gpu(arch)
    with chosen_input():
        problems = [on_gpu(p, gpu) for p in find_problems(model, [shape], dtype, direction, arch)]
    spawn = multiprocessing.get_context("spawn")
    with _elsewhere():
        pool = ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=spawn)
        examined = pool.map(partial(examine, request=options.implementation), problems)
    with pool:
        found = tracked(examined, f"compiling for sm_{arch}", len(problems))
        units = tuple(unit for unit in found if unit is not None)
    what = f"{'a training step' if options.train else 'inference'} in {units_of(problems[0])[0].number_format}"
    title = f"{options.model}, {what}, batch {options.batch}, for sm_{arch} ({gpu_of(arch).name}); each unit once"
    return CostReport(title, arch, units)
