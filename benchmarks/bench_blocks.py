"""Every distinct residual block alone: ``pytest benchmarks/bench_blocks.py``."""

from __future__ import annotations

from typing import Any

import pytest

from .measure import BACKWARD, FORWARD
from .peers import Peer
from .shapes import BlockCase, PreActCase
from .suite import BLOCKS, combinations, run, timed

pytestmark = timed


@combinations(FORWARD, BACKWARD)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block(benchmark: Any, block: BlockCase | PreActCase, phase: str, peer: Peer) -> None:
    run(benchmark, peer, block, phase)
