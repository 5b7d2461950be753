"""Training on real images, scikit-learn's digits: the kernels follow eager PyTorch step by step and arrive as well."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import nn

import resnet_fused
from examples import train_digits
from examples.train_digits import Digits, Run
from resnet_fused.engine.tolerance import products
from resnet_fused.engine.trace import Trace
from tests.rule import assert_within_rule
from tests.training import DEVICE

ENOUGH = 24
"""Steps to more than 90 % accuracy."""
STEPS = {"triton": ENOUGH if DEVICE == "cuda" else 4, "mixed": ENOUGH}
"""A step takes the interpreter three seconds where it convolves too."""


@pytest.fixture(autouse=True)
def _without_tf32() -> Iterator[None]:
    with products(tf32=False):
        yield


@pytest.fixture(scope="module")
def digits() -> Digits:
    return train_digits.load()


@lru_cache
def trained(road: str, steps: int) -> tuple[Run, int]:
    """A training, and how many kernels it launched."""
    with resnet_fused.trace() as seen:
        run = train_digits.train(train_digits.load(), road, steps, batch=32, rate=0.2)
    return run, kernels(seen)


def kernels(seen: Trace) -> int:
    return sum(launch.config is not None for launch in seen.launches)


@pytest.mark.parametrize("road", STEPS)
def test_training_follows_eager_and_arrives_as_well(road, digits):
    """Losses agree up to rounding at first; later a ReLU's input within rounding of zero falls on either side of it."""
    steps = STEPS[road]
    (ours, launches), (eager, none) = trained(road, steps), trained("eager", steps)
    assert launches > 40 * steps
    assert none == 0
    found, expected = torch.tensor(ours.losses), torch.tensor(eager.losses)
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[:10], expected[:10], rtol=1e-2, atol=0)
    assert_same_predictions(ours.model, ours.model, digits, road)
    if steps == ENOUGH:
        accuracy, wanted = (
            train_digits.accuracy(run.model, digits, by) for run, by in ((ours, road), (eager, "eager"))
        )
        standard_error = math.sqrt(wanted * (1 - wanted) / len(digits.test_labels))
        assert accuracy > 0.9
        assert abs(accuracy - wanted) <= 3 * standard_error


def test_a_checkpoint_of_eager_predicts_the_same_when_fused(digits):
    eager = trained("eager", ENOUGH)[0].model
    fused = train_digits.small_resnet(seed=1)
    fused.load_state_dict(eager.state_dict())
    assert_same_predictions(resnet_fused.fuse(fused), eager, digits, "triton")
    assert train_digits.accuracy(fused, digits, "triton") > 0.9


def assert_same_predictions(ours: nn.Module, model: nn.Module, digits: Digits, road: str) -> None:
    """``ours`` by ``road`` predicts what ``model`` does by eager PyTorch."""
    images = digits.test_images[:32]
    exact = train_digits.predict(copy.deepcopy(model).double(), images.double(), "eager")
    eager = train_digits.predict(model, images, "eager")
    with resnet_fused.trace() as seen:
        logits = train_digits.predict(ours, images, road)
    assert kernels(seen)
    assert_within_rule(logits, eager, exact, sums=48)
    assert torch.equal(logits.argmax(1), exact.argmax(1))
