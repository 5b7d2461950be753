"""Every distinct layer (convolution, batch norm, ReLU) alone: ``pytest benchmarks/bench_layers.py``."""

from __future__ import annotations

from typing import Any

import pytest

from .measure import BACKWARD, FORWARD
from .peers import Peer
from .shapes import LayerCase
from .suite import LAYERS, combinations, run, timed

pytestmark = timed


@combinations(FORWARD, BACKWARD)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_layer(benchmark: Any, layer: LayerCase, phase: str, peer: Peer) -> None:
    run(benchmark, peer, layer, phase)
