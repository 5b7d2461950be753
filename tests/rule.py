"""The tolerance of every numerical test: twice eager's own error, and one rounding of the largest value."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_rule(ours: Tensor, eager: Tensor, exact: Tensor, roundings: int = 1) -> None:
    """``error(ours) <= 2 * error(eager) + tiny`` against ``exact`` (fp64), each the largest over the tensor.

    ``tiny``: so many roundings of the largest value; several where a result lies behind several stored tensors.
    """
    assert ours.shape == exact.shape
    assert ours.dtype == eager.dtype
    error, allowed = _error(ours, exact), 2 * _error(eager, exact) + roundings * _tiny(ours, exact)
    assert error <= allowed, f"error {error:.3e} is above 2x eager's own error + tiny = {allowed:.3e}"


def _error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()


def _tiny(got: Tensor, exact: Tensor) -> float:
    return torch.finfo(got.dtype).eps * exact.abs().max().item()
