"""The self-test: every kernel on this machine against eager PyTorch, in every number format and direction."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from resnet_fused.commands.check_cases import FORMATS, CheckCase, cases
from resnet_fused.commands.shared import UserError, pick_device, tracked
from resnet_fused.engine.tolerance import deterministic, error_ratio, products, references
from resnet_fused.kernels.launch import Call, dry_run, observe, target_arch
from resnet_fused.plan import decide
from resnet_fused.plan.checked import note, stack
from resnet_fused.table import render

NOT_INTERPRETED = {
    "tf32": "the interpreter multiplies in fp32",
    "bfloat16": "the interpreter cannot compute in it",
}

Progress = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class CheckRow:
    """One line of the report. ``ratio``: error over allowed error, None without one; ``detail``: what is wrong."""

    kernel: str
    case: str
    dtype: str
    ratio: float | None
    status: str
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values for JSON, which has no infinity."""
        finite = self.ratio is not None and math.isfinite(self.ratio)
        return {**vars(self), "ratio": self.ratio if finite else None}


@dataclass(frozen=True)
class CheckReport:
    """What :func:`run` found; ``str()`` of it is a table and one line of summary."""

    device: torch.device
    stack: dict[str, str]
    rows: tuple[CheckRow, ...]

    @property
    def failed(self) -> bool:
        """Whether a row failed."""
        return any(row.status == "failed" for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        rows = [row.to_dict() for row in self.rows]
        return {"device": str(self.device), "stack": self.stack, "failed": self.failed, "rows": rows}

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {value}" for name, value in self.stack.items() if value)
        columns = ["kernel", "case", "dtype", "error / allowed", "status"]
        table = [
            (
                *(row.kernel, row.case, row.dtype),
                "" if row.ratio is None else f"{row.ratio:.2f}",
                f"{row.status}: {row.detail}" if row.detail else row.status,
            )
            for row in sorted(self.rows, key=lambda row: row.status == "failed")  # where they are seen
        ]
        count = Counter(row.status for row in self.rows)
        numbers = ", ".join(f"{count[status]} {status}" for status in ("passed", "failed", "skipped"))
        return f"{render(versions, columns, table)}\n{numbers} on {self.stack['gpu'] or 'the CPU, interpreted'}"


def run(device: torch.device, progress: Progress | None = None) -> CheckReport:
    """Check every kernel on ``device``: a CUDA GPU, or the CPU, whose kernels run in Triton's interpreter.

    Each runs twice, which must agree to the bit, and may err against fp64 by what :func:`error_ratio` allows, compared
    with eager PyTorch in the same number format. ``progress(items, label)`` passes on its items, and may show them.
    """
    progress = progress or (lambda items, _: items)
    everything = cases(device.type)
    skipped = NOT_INTERPRETED if device.type == "cpu" else {}
    left_out = [CheckRow("every kernel", "", name, None, "skipped", why) for name, why in skipped.items()]
    everything = [case for case in everything if case.number_format not in skipped]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), deterministic():
        if device.type == "cuda":
            _compile(everything, progress)
        rows = [_judge(case, device) for case in progress(everything, "checking")]
    return CheckReport(device, stack(device), (*rows, *left_out))


def _compile(everything: Sequence[CheckCase], progress: Progress) -> None:
    """Compile what the cases will launch, on all processors at a time; what fails here fails again in its row."""
    calls = dict[Any, Call]()
    with dry_run(target_arch()), observe(lambda call: calls.setdefault(call.specialization(), call)):
        for case in everything:
            with suppress(Exception), products(case.number_format == "tf32"):
                case.comparison(torch.device("meta")).ours()
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        kernels = [c.kernel.warmup(grid=c.grid, **c.arguments, **c.config.options) for c in calls.values()]
        for kernel in progress([k for k in kernels if isinstance(k, triton.FutureKernel)], "compiling"):
            kernel.result(ignore_errors=True)


def _judge(case: CheckCase, device: torch.device) -> CheckRow:
    """The row of a case; whatever it raises is its failure."""
    row = partial(CheckRow, case.kernel, case.name, case.number_format)
    try:
        comparison = case.comparison(device)
        launches: list[Call] = []
        tf32 = case.number_format == "tf32"
        with products(tf32), observe(launches.append):
            ours, again = comparison.ours(), comparison.ours()
        exact, eager = references(lambda dtype: comparison.expected(dtype, ours), FORMATS[case.number_format], tf32)
        ratios = {name: error_ratio(ours[name], eager[name], exact[name], comparison.sums) for name in exact}
        different = [name for name in ours if not _same(ours[name], again[name])]
    except Exception as error:  # a kernel may fail in any way, and the others are to be checked nevertheless
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        return row(None, "failed", f"{type(error).__name__}: {first_line}")
    worst = max(ratios, key=lambda name: ratios[name])
    wrong = [f"{worst} is wrong"] if ratios[worst] > 1 else []
    wrong += [] if launches else ["no kernel was launched"]
    wrong += [f"two runs differ in {', '.join(different)}"] if different else []
    return row(ratios[worst], "failed" if wrong else "passed", "; ".join(wrong))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree to the bit, NaN included."""
    first, second = (t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m resnet_fused check``."""
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: a CUDA GPU if there is one)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")


def main(options: argparse.Namespace) -> int:
    """Run the self-test; returns 0 if everything passed, else 1."""
    device = pick_device(options.device)
    if device.type == "cuda" and (reason := decide.why_too_old(device)) is not None:
        raise UserError(reason)
    report = run(device, tracked)
    print(json.dumps(report.to_dict(), indent=1) if options.json else report)
    if device.type == "cuda" and not report.failed:
        try:
            note(device)
        except OSError as error:
            print(f"resnet_fused: cannot write down that this GPU was checked: {error}", file=sys.stderr)
    return int(report.failed)
