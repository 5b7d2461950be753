"""The tolerance of every numerical test: twice eager's own error, and one rounding of the largest value."""

from __future__ import annotations

from torch import Tensor

from resnet_fused.engine.tolerance import error_ratio


def assert_within_rule(ours: Tensor, eager: Tensor, exact: Tensor, sums: int = 0) -> None:
    """``error(ours) <= 2 * error(eager) + tiny`` against ``exact`` (fp64): see :func:`error_ratio`."""
    assert exact.isfinite().all(), "a comparison with what is not finite proves nothing"
    ratio = error_ratio(ours, eager, exact, sums)
    assert ratio <= 1, f"the error is {ratio:.3g} times what twice eager's own error + tiny allow"
