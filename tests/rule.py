"""The tolerance of every numerical test: twice eager's own error, and one rounding of the largest value."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_rule(ours: Tensor, eager: Tensor, exact: Tensor, sums: int = 0) -> None:
    """``error(ours) <= 2 * error(eager) + tiny`` against ``exact`` (fp64), each the largest over the tensor.

    ``tiny`` is one rounding of the largest value, and ``sums`` roundings of it in fp32: how many sums in a row lie
    behind the result, which the kernels and PyTorch on a GPU take in fp32, but PyTorch on a CPU in fp64.
    """
    assert ours.shape == exact.shape
    assert ours.dtype == eager.dtype
    tiny = (torch.finfo(ours.dtype).eps + sums * torch.finfo(torch.float32).eps) * exact.abs().max().item()
    error, allowed = _error(ours, exact), 2 * _error(eager, exact) + tiny
    assert error <= allowed, f"error {error:.3e} is above 2x eager's own error + tiny = {allowed:.3e}"


def _error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()
