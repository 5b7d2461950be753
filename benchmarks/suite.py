"""What the pytest-benchmark suites share: small settings on a CPU, everything on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .compare import derived, prepare
from .count import count
from .measure import PHASES, Setting, Stopwatch, synchronised
from .peers import PEERS, Peer
from .shapes import NETWORKS, BlockCase, LayerCase, PreActCase, blocks, distinct, distinct_blocks, layers

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BATCH, DTYPE, ROUNDS = (32, torch.bfloat16, 50) if ON_GPU else (1, torch.float32, 5)
LAYERS: list[LayerCase] = distinct() if ON_GPU else list(layers("resnet20"))
BLOCKS: list[BlockCase | PreActCase] = distinct_blocks() if ON_GPU else list(blocks("resnet20"))
MODELS: list[str] = list(NETWORKS) if ON_GPU else ["resnet18", "resnet20"]

timed = pytest.mark.benchmark(timer=synchronised, disable_gc=True)
"""Marks a suite: its clock waits for the GPU."""


def combinations(*phases: str) -> Any:
    """Parametrises a test by every phase and every peer that does it, the heavy ones marked as such."""
    assert set(phases) <= set(PHASES)
    pairs = [
        pytest.param(phase, peer, id=f"{phase}-{peer.name}", marks=[pytest.mark.heavy] * peer.heavy)
        for phase in phases
        for peer in PEERS.values()
        if peer.does(phase != PHASES[0])
    ]
    return pytest.mark.parametrize(("phase", "peer"), pairs)


def run(benchmark: Any, peer: Peer, case: Any, phase: str) -> None:
    """Time ``peer``, or skip with its reason; what was counted stands beside it as ``extra_info``."""
    setting = Setting(case, BATCH, DTYPE, phase, DEVICE)
    torch.compiler.reset()
    runner = prepare(peer, setting)
    if isinstance(runner, str):
        pytest.skip(runner)
    stopwatch, work = Stopwatch(DEVICE), count(peer, setting)
    benchmark.group = str(setting)
    with runner.conditions():
        benchmark.pedantic(runner, setup=stopwatch.flush, rounds=ROUNDS)
    benchmark.extra_info |= {
        "counted_launches": work.launches if work else None,
        "counted_mb": work.moved / 1e6 if work else None,
        **derived(runner, benchmark.stats.stats.median),
    }
