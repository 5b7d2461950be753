"""What each block of a model runs, and why."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.convert import ConvertedStem, Found, find
from resnet_fused.engine.request import requested
from resnet_fused.engine.trace import Launch, trace
from resnet_fused.kernels.launch import dry_run
from resnet_fused.modules import FusedBlock, StemLayout
from resnet_fused.plan import roofline, tuned
from resnet_fused.plan.decide import Plan, decide, present_gpu, record, waited
from resnet_fused.plan.problem import Problem, Tiles, Way
from resnet_fused.table import render


@dataclass
class BlockRow:
    """One block of :func:`explain`."""

    name: str
    block: str
    implementation: Way
    reason: str = ""
    launches: list[Launch] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values; bytes and floating-point operations are those of the launches that were seen."""
        kernels = [x for x in self.launches if x.config is not None]
        tiles = sorted({f"{c.block_m}x{c.block_n}x{c.block_k}" for c in (x.config for x in kernels) if c is not None})
        return {
            "name": self.name,
            "block": self.block,
            "implementation": self.implementation,
            "tiles": tiles,
            "launches": len(self.launches),
            "bytes": sum(x.bytes_read + x.bytes_written for x in self.launches),
            "flops": sum(x.flops for x in self.launches),
            "reason": self.reason,
            "units": [_unit(problem) for problem in self.problems],
        }


def _unit(problem: Problem) -> dict[str, Any]:
    plan = _plan(problem)
    return {
        "unit": str(problem),
        "implementation": plan.implementation,
        "source": plan.source,
        "reason": plan.reason,
        "predicted_seconds": dict(plan.alternatives),
    }


def _plan(problem: Problem) -> Plan:
    return decide(problem, requested(), tuned.load(problem.gpu))


@dataclass(frozen=True)
class Total:
    """What one input of ``images`` takes on one ``road``: launches, bytes of device memory, and predicted seconds.

    ``road``: "as planned", an implementation for all units, or "roof": every byte of :func:`roofline.compulsory` once
    and all arithmetic, at the GPU's nominal peaks.
    """

    road: str
    images: int
    launches: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        images_per_second = self.images / self.seconds
        return asdict(self) | {"bytes_per_image": self.bytes / self.images, "images_per_second": images_per_second}


@dataclass
class Explanation:
    """What :func:`explain` found; ``str()`` of it is a table of blocks, one of their units, and one of the totals.

    ``ran``: whether there was an input; ``rest``: what was launched outside of the blocks, and in eager ones.
    """

    rows: list[BlockRow]
    ran: bool
    rest: list[Launch] = field(default_factory=list)

    @property
    def problems(self) -> list[Problem]:
        """The units of all blocks, each as often as it comes up."""
        return [problem for row in self.rows for problem in row.problems]

    def totals(self) -> list[Total]:
        """What the model takes by its plan, by one implementation for all units, and at the least.

        A unit outside of a CUDA graph takes what its launches or the host take, as for the plan. The rest counts as it
        is launched. Empty where nothing can be predicted: without units, images or a GPU; and for a training step, of
        which the forward alone is seen.
        """
        plans = [(problem, _plan(problem)) for problem in self.problems]
        if not all(p.m and p.direction != "training" and plan.alternatives for p, plan in plans) or not plans:
            return []
        beside = plans[0][0]
        sizes = [(x.name, x.flops, x.bytes_read + x.bytes_written) for x in self.rest]
        rest = [roofline.library(*size, beside) for size in sizes]

        def total(road: str, way: Way | None) -> Total:
            launches, seconds = list(rest), sum(x.seconds for x in rest)
            for problem, plan in plans:
                chosen = way or plan.implementation
                tiles = plan.tiles if chosen == "fused" else Tiles()
                unit = roofline.predict(problem, chosen, tiles)
                launches += unit
                seconds += waited(problem, chosen, sum(x.seconds for x in unit), tiles)
            return Total(road, beside.n, len(launches), sum(x.bytes for x in launches), seconds)

        products = (x.flops for p, _ in plans for x in roofline.predict(p, "fused", Tiles()))
        flops = sum(x.flops for x in self.rest) + sum(products)
        least = sum(size for *_, size in sizes) + sum(map(roofline.compulsory, self.problems))
        roof = Total("roof", beside.n, 0, least, roofline.roof(flops, least, beside))
        return [total("as planned", None), *(total(way, way) for way in roofline.PREDICTED), roof]

    def to_dict(self) -> list[dict[str, Any]]:
        """One dictionary per block."""
        return [row.to_dict() for row in self.rows]

    def __str__(self) -> str:
        columns = ["name", "block", "implementation", "tiles", "launches", "MB", "reason"]
        rows = []
        for row in self.to_dict():
            seen = (
                (", ".join(row["tiles"]), row["launches"], round(row["bytes"] / 1e6, 3))
                if self.ran
                else ("", None, None)
            )
            rows.append((row["name"], row["block"], row["implementation"], *seen, row["reason"]))
        fused = sum(row.implementation == "fused" for row in self.rows)
        blocks = render(f"{fused} of {len(rows)} blocks fused", columns, rows)
        tables = [blocks]
        if problems := list(dict.fromkeys(self.problems)):
            tables.append(units_table(problems))
        if totals := self.totals():
            tables.append(totals_table(totals))
        return "\n".join(tables)


def units_table(problems: list[Problem]) -> str:
    """How each unit runs, with what the model predicts for every way, as text."""
    columns = ["unit", "runs", *(f"{way}, predicted us" for way in roofline.PREDICTED), "because"]
    rows = []
    for problem in problems:
        plan = _plan(problem)
        predicted = dict(plan.alternatives)
        times = [round(predicted[way] * 1e6, 1) if way in predicted else None for way in roofline.PREDICTED]
        rows.append((problem.layer, plan.implementation, *times, plan.reason))
    kinds = dict.fromkeys(f"{problem.number_format} {problem.direction}" for problem in problems)
    return render(f"Units, each once: {', '.join(kinds)}", columns, rows)


def totals_table(totals: list[Total]) -> str:
    """The totals as text."""
    columns = ["road", "launches", "MB per image", "images per second, predicted"]
    rows = [
        (t.road, t.launches or None, round(x["bytes_per_image"] / 1e6, 2), round(x["images_per_second"]))
        for t, x in ((t, t.to_dict()) for t in totals)
    ]
    return render(f"The whole model, {totals[0].images} images at a time", columns, rows)


def explain(
    model: nn.Module, x: Tensor | None = None, *, arch: int | None = None, training: bool = False
) -> Explanation:
    """Which implementation each block of ``model`` runs, and why.

    With an input ``x`` for the model, runs it once in eval mode without gradients and reports what was launched: tiles,
    number of launches, bytes, the reason for each block that ran eager; and of each unit the plan, with the times that
    the model of :mod:`resnet_fused.plan.roofline` predicts for it and its alternatives; and what the whole model comes
    to on every road, with the images per second that this model of a GPU predicts. With ``arch`` (90 for sm_90
    ...) nothing runs: it is planned for a GPU of that architecture, for the one here if it is of it. ``training``,
    which needs an ``arch``: the forward of a training step. Without ``x``, the structure alone is judged.

    Raises ValueError for ``training`` without ``arch``.
    """
    if training and arch is None:
        raise ValueError("training=True needs an arch: a training step is planned, not run")
    if x is not None and arch is not None:
        model, x = copy.deepcopy(model).to("meta").train(training), x.to("meta")
    rows = {f.module: BlockRow(*_named(f), *_judge(f)) for f in find(model)}
    found = Explanation(list(rows.values()), ran=x is not None)
    if x is not None:
        with nullcontext() if arch is None else dry_run(arch, present_gpu(arch)), torch.set_grad_enabled(training):
            found.rest = _observe(model, x, rows, training)
    return found


def _judge(found: Found) -> tuple[Way, str]:
    if isinstance(found.module, FusedBlock):
        return "fused", ""
    return "eager", found.verdict if isinstance(found.verdict, str) else "not converted: call fuse(model)"


def _named(found: Found) -> tuple[str, str]:
    """The name of a block and that of its class; of a stem, which is a part of its network, its first part's."""
    kind = getattr(found.module, "original", type(found.module)).__qualname__
    if not isinstance(found.verdict, StemLayout):
        return found.name, kind
    return f"{found.name}.{found.verdict.parts[0]}".lstrip("."), f"{kind}, up to its pool"


def _observe(model: nn.Module, x: Tensor, rows: dict[nn.Module, BlockRow], training: bool) -> list[Launch]:
    """Run ``model`` once and note in ``rows`` what each block planned and launched, and why it ran eager if it did.

    Returns what was launched outside of those that planned something. A stem lasts until the first block begins.
    """
    inside: set[int] = set()
    starts: dict[nn.Module, tuple[int, int]] = {}
    modes = [(module, module.training) for module in model.modules()]

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        for stem in [open_ for open_ in starts if isinstance(open_, ConvertedStem)]:
            leave(stem, args, None)
        starts[module] = len(seen.launches), len(planned)
        if isinstance(module, FusedBlock) and (reason := module.why_eager(args[0])) is not None:
            rows[module].implementation, rows[module].reason = "eager", reason

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        if module not in starts:
            return
        launches, problems = starts.pop(module)
        rows[module].launches += seen.launches[launches:]
        if len(planned) > problems:
            inside.update(range(launches, len(seen.launches)))
        rows[module].problems += planned[problems:]

    handles = [h for b in rows for h in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
    try:
        model.train(training)
        with trace() as seen, record() as planned:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return [launch for i, launch in enumerate(seen.launches) if i not in inside]
