"""The bytes that a launch is said to move are those that its kernel touches, each counted once."""

from __future__ import annotations

import pytest
import torch

from resnet_fused.commands.check_cases import cases
from resnet_fused.kernels.conv_wgrad import conv_wgrad
from resnet_fused.kernels.launch import INTERPRETER, Call, TileConfig, dry_run, interpreting, observe
from tests.interpreter import touched
from tests.kernels.test_conv_forward import random
from tests.kernels.test_signatures import functions, is_device_code

pytestmark = pytest.mark.skipif(not interpreting(), reason="only the interpreter tells which bytes a kernel touches")

FORMATS = ("float32", "float16")
CASES = [case for case in cases("cpu") if case.number_format in FORMATS and not case.kernel.startswith("block")]


@pytest.fixture
def launched():
    """Every kernel launched in a test, by name; each had to touch as many bytes as its cost says."""
    names = set()
    with touched() as found, observe(lambda call: names.add(_compared(call, *found.take()))):
        yield names


def _compared(call: Call, read: int, written: int) -> str:
    cost, name = call.cost(), call.kernel.__name__
    assert (read, written) == (cost.bytes_read, cost.bytes_written), name
    return name


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}, {case.name}, {case.number_format}")
def test_bytes_of_what_the_self_test_launches(case, launched):
    case.comparison(torch.device("cpu")).ours()
    assert launched


@pytest.mark.parametrize("splits", [1, 3])
def test_bytes_of_a_sum_that_is_split(splits, launched):
    x, dy = random(2, 5, 7, 6), random(2, 12, 7, 6)
    conv_wgrad(dy, x, (1, 1), config=TileConfig(16, 16, 16, splits=splits))
    assert ("sum_splits_kernel" in launched) == (splits > 1)


def test_no_kernel_is_left_out():
    names = {"sum_splits_kernel"}
    with dry_run(INTERPRETER), observe(lambda call: names.add(call.kernel.__name__)):
        for case in CASES:
            case.comparison(torch.device("meta")).ours()
    device = {name.partition(".")[2] for name, node in functions() if is_device_code(node)}
    assert names == {name for name in device if name.endswith("_kernel")}
