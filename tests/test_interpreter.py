"""The interpreter as the tests use it: the language is its own again afterwards, and integers can be checked."""

import pytest
import torch
import triton
import triton.language as tl

from resnet_fused.kernels.launch import interpreting
from tests.interpreter import checked_for_overflow

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU runs the compiled kernels, the interpreter is off")


@triton.jit
def doubled(v):
    return v + v


@triton.jit
def double_kernel(x_ptr):
    i = tl.arange(0, 2)
    tl.store(x_ptr + i, doubled(tl.load(x_ptr + i) + tl.zeros((2,), tl.int32)))


def test_an_overflow_raises_where_it_is_looked_for():
    large = torch.tensor([2**30, 1], dtype=torch.int32)
    double_kernel[(1,)](large)
    assert large.tolist() == [-(2**31), 2]
    with checked_for_overflow(), pytest.raises(Exception, match="int32 overflow detected for operation add"):
        double_kernel[(1,)](large)
    double_kernel[(1,)](large)


def test_outside_of_a_launch_the_language_is_tritons():
    double_kernel[(1,)](torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"Did you forget to add @triton\.jit"):
        tl.load(0)
