"""The convolutions read nothing beside their tensors, not even what they drop: a GPU faults where a page ends."""

from __future__ import annotations

import pytest
import torch

from resnet_fused.kernels.conv_dgrad import conv_dgrad
from resnet_fused.kernels.conv_forward import conv_forward
from resnet_fused.kernels.conv_wgrad import conv_wgrad
from resnet_fused.kernels.epilogue import Prologue
from resnet_fused.kernels.launch import TileConfig, interpreting
from tests.interpreter import reads_only
from tests.kernels.test_conv_dgrad import ALL, drawn, random_stats
from tests.kernels.test_conv_forward import random

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU runs the compiled kernels, the interpreter is off")


@pytest.mark.parametrize("tile", [None, TileConfig(32, 128, 32)])
@pytest.mark.parametrize("name", ALL)
def test_nothing_beside_the_tensors_is_read(name, tile):
    dy, w, size, geometry = drawn(name, torch.float32)
    x = random(dy.shape[0], w.shape[1] * geometry.groups, *size)
    stats = random_stats(x.shape[1])
    prologue = Prologue(stats[2].clone(), stats[3].clone())
    with reads_only(x, w, *prologue[:2]):
        conv_forward(x, w, geometry=geometry, config=tile)
        conv_forward(x, w, geometry=geometry, prologue=prologue, config=tile)
    with reads_only(dy, w):
        conv_dgrad(dy, w, size, geometry=geometry, config=tile)
    with reads_only(dy, w, x, stats):
        conv_dgrad(dy, w, size, geometry=geometry, mask=(x, stats), config=tile)
        conv_wgrad(dy, x, w.shape[2:], geometry=geometry, x_stats=stats, config=tile)


def test_a_load_from_elsewhere_is_noticed():
    x, w = random(1, 16, 2, 2), random(16, 16, 1, 1)
    with reads_only(x), pytest.raises(Exception, match="a load from outside of the tensors"):
        conv_forward(x, w)
