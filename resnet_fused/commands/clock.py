"""How long a GPU takes for a call whose data lies in device memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

FLUSHED = 256 << 20
"""Bytes written before each call: more than any L2, and enough to hide the host's own time for a launch."""


class ColdClock:
    """Events on the current stream of ``device``, after a write that leaves nothing in L2."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def flush(self) -> None:
        """Empty L2 of everything that a call might read."""
        self.flushed.zero_()

    def seconds(self, work: Callable[[], object]) -> float:
        """How long one call takes."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3
