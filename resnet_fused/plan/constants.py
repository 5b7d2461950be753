"""What the plan's model takes for granted of a GPU and its software, beside published peaks: assumed, or measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from resnet_fused.plan.problem import Way

FORMATS = ("bfloat16", "float16", "tf32", "float32")
WIDTHS = (64, 128, 256)
"""Output channels at which cuDNN's convolutions are measured."""
HOSTED = tuple(f"{way} {direction}" for direction in ("inference", "training") for way in ("fused", "mixed", "eager"))


def _nominal() -> dict[str, float]:
    return dict.fromkeys(FORMATS, 1.0)


def _host() -> dict[str, float]:
    return dict(zip(HOSTED, (19e-6, 37e-6, 42e-6, 96e-6, 162e-6, 112e-6), strict=True))


@dataclass(frozen=True)
class Constants:
    """Shares of nominal peaks, and seconds. The defaults are assumed, each as its source says.

    ``memory_of_peak``: of the bandwidth, what a kernel that streams reaches; assumed.
    ``tensor_of_peak``: of the tensor cores' dense peak, by number format, what a large product reaches; assumed.
    ``cudnn_of_peak``: of that, what cuDNN's convolutions reach where arithmetic bounds a wide tile: 3x3 of 256 and of
    512 channels, measured on an H100 (:data:`roofline.PACES`); assumed of others.
    ``cudnn_by_width``: the same by the number of output channels, each for those up to it; empty where it was not
    measured: then as much less as a narrower tile multiplies less per factor that it reads (:mod:`roofline`).
    ``triton_of_cudnn``: of cuDNN's speed, what convolutions in Triton reach (PyTorch forum, thread 201550: "always ~20%
    slower").
    ``launch_seconds``: from the end of a kernel to the start of the next, with its ramp up and down; assumed.
    ``host_seconds``: what the host takes to launch a unit in inference, or its forward and backward in training, by
    the way that it runs: as ``python -m resnet_fused.benchmarks.host`` measured it without a GPU (docs/results.md),
    and 5 us for each launch or call of a library on one, which are assumed.
    """

    memory_of_peak: float = 0.90
    tensor_of_peak: Mapping[str, float] = field(default_factory=_nominal)
    cudnn_of_peak: float = 0.78
    cudnn_by_width: Mapping[int, float] = field(default_factory=dict)
    triton_of_cudnn: float = 0.80
    launch_seconds: float = 2e-6
    host_seconds: Mapping[str, float] = field(default_factory=_host)

    def cudnn(self, width: int) -> float | None:
        """What was measured of cuDNN for so many output channels, or None."""
        wider = [share for known, share in sorted(self.cudnn_by_width.items()) if known >= width]
        return wider[0] if wider else self.cudnn_of_peak if self.cudnn_by_width else None

    def host(self, way: Way, direction: str) -> float:
        """Seconds of the host for a unit that runs so, in inference or in training."""
        return self.host_seconds[f"{way} {direction}"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {"cudnn_by_width": {str(width): share for width, share in self.cudnn_by_width.items()}}

    @classmethod
    def from_dict(cls, content: Any) -> Constants:
        """The inverse of :meth:`to_dict`. Raises ValueError for what is none, or no share or time that can be."""
        names = {known.name for known in fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise ValueError(f"its constants must be {', '.join(sorted(names))}; got {content!r}"[:400])
        tables = {"tensor_of_peak": FORMATS, "host_seconds": HOSTED, "cudnn_by_width": tuple(map(str, WIDTHS))}
        found: dict[str, Any] = {}
        for name, value in content.items():
            if name not in tables:
                found[name] = _positive(name, value)
                continue
            if not isinstance(value, dict) or (set(value) != set(tables[name]) and (name, value) != (_WIDTHS, {})):
                raise ValueError(f"its constant {name} must have {', '.join(tables[name])}; got {value!r}"[:400])
            found[name] = {key: _positive(name, number) for key, number in value.items()}
        found[_WIDTHS] = {int(width): share for width, share in found[_WIDTHS].items()}
        return cls(**found)


_WIDTHS = "cudnn_by_width"

ASSUMED = Constants()
"""Those of a GPU that was not measured."""


def _positive(name: str, value: Any) -> float:
    """A share of a nominal peak, which a GPU that is planned for as another's neighbour may exceed; or seconds."""
    most = 1.0 if name.endswith("_seconds") else 16.0
    if type(value) not in (int, float) or not (math.isfinite(value) and 1e-9 < value <= most):
        raise ValueError(f"its constant {name} must be a number above 0 and at most {most:g}; got {value!r}"[:400])
    return float(value)
