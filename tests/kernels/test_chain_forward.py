"""chain_forward against the fp64 reference: both roads' geometry, residuals, masked tails, values not finite, cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnet_fused.kernels.chain_forward import Link, chain_forward
from resnet_fused.kernels.conv import Geometry
from resnet_fused.kernels.epilogue import Residual
from resnet_fused.kernels.launch import TileConfig, observe
from tests.kernels.test_conv_forward import DTYPES, random, random_norm
from tests.rule import assert_within_rule

PADDED = Geometry((1, 1), (1, 1))
SHAPES = {
    "even": (16, 16, 64, 16),
    "one block and a tail": (20, 24, 72, 17),
    "wide": (32, 64, 160, 32),
    "narrow": (3, 5, 7, 9),
}
"""Channels of the input, of the 3x3, of z, of y."""


def link(co, ci, taps=1, dtype=torch.float32):
    return Link(random(co, ci, taps, taps, dtype=dtype), torch.stack([random_norm(co).gamma, random(co)]))


def apply(link, x, geometry, residual=0.0):
    """In the dtype of ``x``."""
    if link is None:
        return x
    scale, shift = (v[:, None, None].to(x.dtype) for v in link.affine)
    return torch.relu(F.conv2d(x, link.w.to(x.dtype), None, *geometry) * scale + shift + residual)


def specification(x, links, geometry, residual, rounded):
    """z and y; ``rounded``: the dtype of what is between the convolutions, here as in the kernel."""
    spatial, expand, reduce = links
    inner = apply(spatial, x, geometry).to(rounded).to(x.dtype)
    z = apply(expand, inner, Geometry(), 0.0 if residual is None else residual.to(x.dtype))
    return z, None if reduce is None else apply(reduce, z.to(rounded).to(x.dtype), Geometry())


def check(x, links, geometry=PADDED, residual=None, **arguments):
    ours = chain_forward(
        x, *links, geometry=geometry, residual=None if residual is None else Residual(residual), **arguments
    )
    eager = specification(x, links, geometry, residual, x.dtype)
    exact = specification(x.double(), links, geometry, residual, x.dtype)
    for got, expected, reference in zip(ours, eager, exact, strict=True):
        if expected is None:
            assert got is None
            continue
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert_within_rule(got, expected, reference)
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["triple", "3x3 and 1x1", "1x1 and 1x1"])
def test_shapes(kind, name, dtype):
    ci, middle, wide, following = SHAPES[name]
    spatial = None if kind == "1x1 and 1x1" else link(middle, ci, 3, dtype)
    reduce = None if kind == "3x3 and 1x1" else link(following, wide, 1, dtype)
    x = random(2, ci if spatial else middle, 5, 6, dtype=dtype)
    geometry = PADDED if spatial else Geometry()
    check(x, (spatial, link(wide, middle, 1, dtype), reduce), geometry, random(2, wide, 5, 6, dtype=dtype))
