"""Activations: what stands behind batch norm or behind the residual addition. Values on the host, and device code."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

COUNTS = {
    "identity": 0,
    "relu": 0,
    "leaky_relu": 1,
    "hardtanh": 2,
    "hardswish": 0,
    "silu": 0,
    "gelu": 0,
    "gelu_tanh": 0,
}
"""The activations by name, and of how many numbers each is a function."""


class Activation(NamedTuple):
    """One of :data:`COUNTS` with its numbers: of leaky_relu the slope, of hardtanh the least and the largest value."""

    name: str
    numbers: tuple[float, ...] = ()

    @property
    def light(self) -> bool:
        """Whether it and its derivative are one comparison: all others take registers of their own."""
        return self.name in ("identity", "relu")

    @property
    def code(self) -> str:
        """As a string, for the schema of an operator; :func:`decode` is the inverse."""
        if not self.numbers:  # at once, since every launch asks
            return self.name
        return " ".join([self.name, *[repr(float(number)) for number in self.numbers]])

    def require(self) -> None:
        """Raise ValueError for one that the kernels lack."""
        count = COUNTS.get(self.name)
        if count is None:
            raise ValueError(f"activation.name must be one of {', '.join(map(repr, COUNTS))}; got {self.name!r}")
        if len(self.numbers) != count or not all(map(_is_normal, self.numbers)):
            raise ValueError(f"activation.numbers of {self.name} must be {count} floats of fp32; got {self.numbers!r}")
        if self.name == "hardtanh" and self.numbers[0] > self.numbers[1]:
            raise ValueError(f"activation.numbers of hardtanh must be in order; got {self.numbers!r}")


def _is_normal(number: float) -> bool:
    """Whether fp32 holds it as it holds most, which is how Triton takes it for fp32."""
    return isinstance(number, float) and (number == 0 or 2.0**-126 <= abs(number) < 2.0**128)


@lru_cache(maxsize=1024)
def decode(code: str) -> Activation:
    """The activation of :attr:`Activation.code`."""
    name, *numbers = code.split()
    return Activation(name, tuple(map(float, numbers)))


IDENTITY = Activation("identity")
RELU = Activation("relu")
RELU6 = Activation("hardtanh", (0.0, 6.0))


@triton.jit
def relu(v):
    """max(v, 0) that keeps NaN, as PyTorch's does (``tl.maximum`` would drop it)."""
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def hardtanh(v, LEAST: tl.constexpr, MOST: tl.constexpr):
    """``v`` between two limits; keeps NaN, too."""
    return tl.minimum(tl.maximum(v, LEAST, propagate_nan=tl.PropagateNan.ALL), MOST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def logistic(v):
    """``1/(1 + exp(-v))``."""
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def normal_cdf(v):
    """How likely a normal variable is to be smaller than ``v``."""
    return 0.5 * (1.0 + tl.math.erf(v * 0.7071067811865476))


@triton.jit
def near_cdf(v):
    """What gelu_tanh takes for it: ``(1 + tanh(u))/2``, which is ``logistic(2*u)``, ``u`` being a cubic function."""
    return logistic(1.5957691216057308 * (v + 0.044715 * (v * v * v)))


@triton.jit
def activate(v, ACT: tl.constexpr):
    """The activation of ``v`` in fp32; infinity and NaN as PyTorch's."""
    if ACT.name == "relu":
        return relu(v)
    elif ACT.name == "leaky_relu":
        return tl.where(v > 0, v, v * ACT.numbers[0])
    elif ACT.name == "hardtanh":
        return hardtanh(v, ACT.numbers[0], ACT.numbers[1])
    elif ACT.name == "hardswish":
        return v * hardtanh(v + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif ACT.name == "silu":
        return v / (1.0 + tl.exp(-v))
    elif ACT.name == "gelu":
        return v * normal_cdf(v)
    elif ACT.name == "gelu_tanh":
        return v * near_cdf(v)
    else:
        tl.static_assert(ACT.name == "identity")
        return v


@triton.jit
def in_front(g, v, ACT: tl.constexpr):
    """The gradient in front of the activation of ``v`` from ``g``, the one behind it; both in fp32.

    Of a ReLU, ``v`` may be its output, too.
    """
    if ACT.name == "relu":
        return tl.where(v <= 0, 0.0, g)
    elif ACT.name == "leaky_relu":
        return tl.where(v > 0, g, g * ACT.numbers[0])
    elif ACT.name == "hardtanh":
        return tl.where(v <= ACT.numbers[0], 0.0, tl.where(v >= ACT.numbers[1], 0.0, g))
    elif ACT.name == "hardswish":
        return tl.where(v <= -3.0, 0.0, tl.where(v < 3.0, g * (v * (1.0 / 3.0) + 0.5), g))
    elif ACT.name == "silu":
        s = logistic(v)
        return g * (s * (1.0 + v * (1.0 - s)))
    elif ACT.name == "gelu":
        return g * (normal_cdf(v) + v * (tl.exp(-0.5 * v * v) * 0.3989422804014327))
    elif ACT.name == "gelu_tanh":
        s = near_cdf(v)
        # The other side's, since 1 - s would be a rounding alone.
        return g * (s + v * (s * near_cdf(-v)) * (1.5957691216057308 * (1.0 + 0.134145 * (v * v))))
    else:
        tl.static_assert(ACT.name == "identity")
        return g
