"""Peers side by side: one row for each peer at each setting, with what was measured and what was counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from resnet_fused.plan.problem import dtype_name
from resnet_fused.table import render

from .count import count, counted_gpu, least_work, roof
from .measure import PeerRunner, Setting, Timing, interleave
from .peers import OURS, Peer

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class PeerRow:
    """One peer at one setting; what was not measured is None. Columns of counts and of the model are named so.

    Times are milliseconds per batch: median, quartiles, extremes. ``tflops`` and ``gbs``: counted operations and bytes
    over the measured time; ``percent_of_roof``: the time of the roof over it. ``over_ours``: this peer's time over
    that of this library's fastest in the same round, median and quartiles of all rounds. Counts and the roof: of one
    batch, for the GPU ``planned_for`` in ``planned_format``. The roof is that of the least bytes that a peer moves.
    """

    level: str
    case: str
    batch: int
    dtype: str
    phase: str
    peer: str
    reason: str | None
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    rounds: int | None = None
    over_ours: float | None = None
    over_ours_q1: float | None = None
    over_ours_q3: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    percent_of_roof: float | None = None
    peak_memory_mb: float | None = None
    planned_for: str | None = None
    planned_format: str | None = None
    counted_launches: int | None = None
    counted_gflop: float | None = None
    counted_mb: float | None = None
    counted_mb_convolution: float | None = None
    counted_mb_batch_norm: float | None = None
    counted_mb_relu_and_addition: float | None = None
    counted_mb_other: float | None = None
    counted_saved_mb: float | None = None
    model_roof_ms: float | None = None


def compare(
    setting: Setting, peers: Sequence[Peer], rounds: Iterable[int], tell: Callable[[Peer], None] = lambda _: None
) -> list[PeerRow]:
    """Measure every peer that can run at ``setting``, and count the work of those whose launches can be seen.

    ``tell`` is called with each before it is prepared.
    """
    torch.compiler.reset()  # a block compiled for too many shapes would reach the limit of dynamo's cache
    runners: dict[str, PeerRunner] = {}
    rows: list[PeerRow] = []
    for peer in peers:
        tell(peer)
        runner = prepare(peer, setting)
        if isinstance(runner, PeerRunner):
            runners[peer.name] = runner
        rows.append(_row(peer, setting, runner if isinstance(runner, str) else None))
    timings = interleave(runners, rounds, setting.device)
    return [
        replace(row, **_counted(peer, setting), **_measured(row.peer, timings, runners, setting))
        for peer, row in zip(peers, rows, strict=True)
    ]


def failed(peers: Sequence[Peer], setting: Setting, error: Exception) -> list[PeerRow]:
    """The rows of a setting that could not be measured."""
    return [_row(peer, setting, _failure(error)) for peer in peers]


def prepare(peer: Peer, setting: Setting) -> PeerRunner | str:
    """The peer at work, or why it is not."""
    if (reason := peer.why_not(setting.device, setting.training)) is not None:
        return reason
    try:
        return PeerRunner(peer, setting)
    except Exception as error:  # other libraries raise what they like, and the rest is measured all the same
        if peer in OURS:
            raise
        return _failure(error)


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]}"


def _row(peer: Peer, setting: Setting, reason: str | None) -> PeerRow:
    case, dtype = setting.case, dtype_name(setting.dtype)
    return PeerRow(case.level, case.name, setting.batch, dtype, setting.phase, peer.name, reason)


def _measured(
    name: str, timings: Mapping[str, Timing], runners: Mapping[str, PeerRunner], setting: Setting
) -> dict[str, Any]:
    if name not in timings:
        return {}
    timing = timings[name]
    first, third = timing.quartiles
    row = {
        "median_ms": timing.median,
        "q1_ms": first,
        "q3_ms": third,
        "min_ms": min(timing.samples),
        "max_ms": max(timing.samples),
        "rounds": len(timing.samples),
        **derived(runners[name], timing.median / 1e3),
    }
    ours = [peer.name for peer in OURS if peer.name in timings]
    if ours:
        best = min(ours, key=lambda candidate: timings[candidate].median)
        ratio = Timing(tuple(a / b for a, b in zip(timing.samples, timings[best].samples, strict=True)))
        first, third = ratio.quartiles
        row |= {"over_ours": ratio.median, "over_ours_q1": first, "over_ours_q3": third}
    return row


def derived(runner: PeerRunner, seconds: float) -> dict[str, float | None]:
    """What follows from ``seconds`` per call: rates, and on a GPU the share of its roof and the peak of its memory."""
    setting, memory = runner.setting, runner.peak_memory()
    work, least = count(runner.peer, setting), least_work(setting)
    on_gpu = setting.device.type == "cuda"
    return {
        "tflops": least.flops / seconds / 1e12 if least else None,
        "gbs": work.moved / seconds / 1e9 if work and on_gpu else None,
        "percent_of_roof": 100 * roof(least, setting) / seconds if least and on_gpu else None,
        "peak_memory_mb": None if memory is None else memory / 1e6,
    }


def _counted(peer: Peer, setting: Setting) -> dict[str, Any]:
    work, least = count(peer, setting), least_work(setting)
    if work is None or least is None:
        return {}
    kinds = {f"counted_mb_{kind.lower().replace(' ', '_')}": size / 1e6 for kind, size in work.bytes.items()}
    return {
        "planned_for": counted_gpu(setting.device).name,
        "planned_format": setting.number_format,
        "counted_launches": work.launches,
        "counted_gflop": work.flops / 1e9,
        "counted_mb": work.moved / 1e6,
        **kinds,
        "counted_saved_mb": work.saved / 1e6 if setting.training else None,
        "model_roof_ms": roof(least, setting) * 1e3,
    }


def table(rows: Sequence[PeerRow]) -> str:
    """The times as text, and below them why the others were not measured."""
    columns = ["case", "batch", "dtype", "phase", "peer", "median ms", "quartiles", "over ours"]
    cells = []
    for row in rows:
        if row.median_ms is not None:
            faster = None if row.over_ours is None else round(row.over_ours, 2)
            spread = f"{row.q1_ms:.2f} to {row.q3_ms:.2f}"
            case = row.case, row.batch, row.dtype, row.phase, row.peer
            cells.append((*case, round(row.median_ms, 2), spread, faster))
    missing = dict.fromkeys(f"{NOT_MEASURED}: {row.peer}: {row.reason}" for row in rows if row.reason is not None)
    return "\n".join([render("Times", columns, cells), *missing])
