"""What the planning must know about a GPU: peaks, bandwidths, sizes. Facts alone, nothing measured here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class GPU:
    """One GPU. ``tensor``: dense peaks in TFLOP/s with fp32 accumulation, by number format.

    ``arch``: 80 for sm_80 ... ``clock``: boost, in GHz. ``memory`` and ``l2`` in GB/s, ``l2_size`` in MB. ``shared``:
    bytes of shared memory that one program may use, ``sm_shared``: those of a multiprocessor, for all its programs
    (CUDA C++ Programming Guide).
    """

    name: str
    arch: int
    multiprocessors: int
    clock: float
    tensor: dict[str, float]
    memory: float
    l2: float
    l2_size: int
    shared: int
    sm_shared: int
    source: str

    def __hash__(self) -> int:
        return hash(self.name)


def _tensor(half: float, tf32: float, fp32: float) -> dict[str, float]:
    return {"bfloat16": half, "float16": half, "tf32": tf32, "float32": fp32}


# The first of an architecture stands for it where no GPU is named. L2 is what programs may hope for: of A100 and H100
# 70 % of 5120 bytes per clock (A100 whitepaper), of the others a rough estimate. Clocks: the same sources, or what the
# peak comes to where they leave it out (H100, H200, B200).
_TABLE = (
    GPU("A100", 80, 108, 1.41, _tensor(312, 156, 19.5), 2039, 5000, 40, 166912, 167936, "A100 datasheet, whitepaper"),
    GPU("A40", 86, 84, 1.74, _tensor(149.7, 74.8, 37.4), 696, 2500, 6, 101376, 102400, "A40 datasheet"),
    GPU("RTX 3090", 86, 82, 1.695, _tensor(71, 35.6, 35.6), 936, 2500, 6, 101376, 102400, "GA102 whitepaper"),
    GPU("RTX 4090", 89, 128, 2.52, _tensor(165.2, 82.6, 82.6), 1008, 5000, 72, 101376, 102400, "AD102 whitepaper"),
    GPU("L40S", 89, 142, 2.52, _tensor(362, 183, 91.6), 864, 5000, 96, 101376, 102400, "L40S datasheet"),
    GPU("H100", 90, 132, 1.83, _tensor(989.4, 494.7, 66.9), 3350, 6500, 50, 232448, 233472, "H100 SXM datasheet"),
    GPU("H200", 90, 132, 1.83, _tensor(989.4, 494.7, 66.9), 4800, 6500, 50, 232448, 233472, "H200 SXM datasheet"),
    GPU("B200", 100, 148, 1.85, _tensor(2250, 1125, 75), 7700, 10000, 126, 232448, 233472, "HGX B200 datasheet"),
    GPU("RTX 5090", 120, 170, 2.407, _tensor(209.5, 104.8, 104.8), 1792, 7000, 96, 101376, 102400, "GB202 whitepaper"),
)

ARCHITECTURES = tuple(dict.fromkeys(gpu.arch for gpu in _TABLE))


@cache
def gpu_of(arch: int, name: str = "") -> GPU:
    """The GPU whose name occurs in ``name`` (as PyTorch reports it), else the one that stands for its architecture.

    An architecture that the table lacks is planned for as the nearest older one, the oldest at the least.
    """
    nearest = max((known for known in ARCHITECTURES if known <= arch), default=ARCHITECTURES[0])
    known = [gpu for gpu in _TABLE if gpu.arch == nearest]
    return next((gpu for gpu in known if gpu.name in name), known[0])
