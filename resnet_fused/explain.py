"""What each block of a model runs, and why."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.convert import Found, find
from resnet_fused.engine.request import requested
from resnet_fused.engine.trace import Launch, trace
from resnet_fused.kernels.launch import dry_run
from resnet_fused.modules import FusedBlock
from resnet_fused.plan import roofline, tuned
from resnet_fused.plan.decide import Plan, decide, present_gpu, record
from resnet_fused.plan.problem import Problem, Way
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


@dataclass
class Explanation:
    """What :func:`explain` found; ``str()`` of it is a table of blocks and one of their units."""

    rows: list[BlockRow]
    ran: bool

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
        problems = dict.fromkeys(problem for row in self.rows for problem in row.problems)
        return f"{blocks}\n{units_table(list(problems))}" if problems else blocks


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


def explain(
    model: nn.Module, x: Tensor | None = None, *, arch: int | None = None, training: bool = False
) -> Explanation:
    """Which implementation each block of ``model`` runs, and why.

    With an input ``x`` for the model, runs it once in eval mode without gradients and reports what was launched: tiles,
    number of launches, bytes, the reason for each block that ran eager; and of each unit the plan, with the times that
    the model of :mod:`resnet_fused.plan.roofline` predicts for it and its alternatives. With ``arch`` (90 for sm_90
    ...) nothing runs: it is planned for a GPU of that architecture, for the one here if it is of it. ``training``,
    which needs an ``arch``: the forward of a training step. Without ``x``, the structure alone is judged.

    Raises ValueError for ``training`` without ``arch``.
    """
    if training and arch is None:
        raise ValueError("training=True needs an arch: a training step is planned, not run")
    if x is not None and arch is not None:
        model, x = copy.deepcopy(model).to("meta").train(training), x.to("meta")
    rows = {f.module: BlockRow(f.name, _class_name(f.module), *_judge(f)) for f in find(model)}
    if x is not None:
        with nullcontext() if arch is None else dry_run(arch, present_gpu(arch)), torch.set_grad_enabled(training):
            _observe(model, x, rows, training)
    return Explanation(list(rows.values()), ran=x is not None)


def _judge(found: Found) -> tuple[Way, str]:
    if isinstance(found.module, FusedBlock):
        return "fused", ""
    return "eager", found.verdict if isinstance(found.verdict, str) else "not converted: call fuse(model)"


def _class_name(module: nn.Module) -> str:
    return getattr(module, "original", type(module)).__qualname__


def _observe(model: nn.Module, x: Tensor, rows: dict[nn.Module, BlockRow], training: bool) -> None:
    """Run ``model`` once and note in ``rows`` what each block planned and launched, and why it ran eager if it did."""
    starts: dict[nn.Module, tuple[int, int]] = {}
    modes = [(module, module.training) for module in model.modules()]

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        starts[module] = len(seen.launches), len(planned)
        if isinstance(module, FusedBlock) and (reason := module.why_eager(args[0])) is not None:
            rows[module].implementation, rows[module].reason = "eager", reason

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        launches, problems = starts[module]
        rows[module].launches += seen.launches[launches:]
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
