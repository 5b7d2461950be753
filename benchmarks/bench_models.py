"""Whole models, in inference, forward and backward, and in steps of training: ``pytest benchmarks/bench_models.py``."""

from __future__ import annotations

from typing import Any

import pytest

from .measure import BACKWARD, FORWARD, STEP
from .peers import Peer
from .shapes import NetworkCase
from .suite import MODELS, combinations, run, timed

pytestmark = timed


@combinations(FORWARD, BACKWARD, STEP)
@pytest.mark.parametrize("name", MODELS)
def test_model(benchmark: Any, name: str, phase: str, peer: Peer) -> None:
    run(benchmark, peer, NetworkCase(name), phase)
