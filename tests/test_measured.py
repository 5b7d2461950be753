"""The plan of each unit of a ResNet-50 beside what its ways were measured to take on an H100."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resnet_fused.kernels import chain_forward
from resnet_fused.plan import roofline
from resnet_fused.plan.constants import ASSUMED
from resnet_fused.plan.decide import best_tiles, decide, decide_chain
from resnet_fused.plan.problem import Tiles
from resnet_fused.plan.tuned import Table
from tests.measured import GPU, Measured, measured, measured_chains, size

NO_HOST = replace(ASSUMED, host_seconds=dict.fromkeys(ASSUMED.host_seconds, 1e-8))
"""The times are the GPU's."""
ROADS, TILES = measured("roads"), measured("tiles")


def name(row: Measured) -> str:
    p = row.problem
    return f"{p}{', prologue' if p.prologue else ''}{', residual' if p.residual else ''}"


@pytest.mark.parametrize("row", ROADS, ids=name)
def test_the_way_that_is_planned_is_among_the_fastest_measured(row):
    plan = decide(row.problem, table=Table(GPU, constants=NO_HOST))
    predicted = {way: seconds * 1e6 for way, seconds in plan.alternatives}
    assert predicted.keys() - row.times.keys() <= {"fused"}
    taken = row.times.get(plan.implementation, predicted[plan.implementation])
    assert taken <= 1.05 * min(row.times.values())


def ran(row: Measured) -> Tiles:
    """The tiles with which the unit was measured."""
    p = row.problem
    forward, dgrad = (row.boxes.get(kernel, size(None)) for kernel in ("forward", "dgrad"))
    (tiles,) = (t for t in roofline.choices(p) if size(t.forward) == forward and t.splits == 1)
    if p.direction != "training":
        return tiles
    (gradient,) = (t for t in roofline.gradient_choices(p) if size(t.dgrad) == dgrad)
    return replace(tiles, dgrad=gradient.dgrad)


@pytest.mark.parametrize("row", ROADS, ids=name)
def test_every_way_is_predicted_to_take_about_as_long_as_measured(row):
    for way, microseconds in row.times.items():
        launches = roofline.predict(row.problem, way, ran(row))
        predicted = sum(x.seconds for x in launches if x.kernel != "batch_norm_stats") * 1e6
        assert 0.75 <= predicted / microseconds <= 1.33, (way, predicted, microseconds)


@pytest.mark.parametrize("row", TILES, ids=name)
def test_the_tile_that_is_planned_is_among_the_fastest_measured(row):
    chosen = row.times[size(best_tiles(row.problem).forward)]
    assert len(row.times) > 3
    assert chosen <= 1.10 * min(row.times.values())


@pytest.fixture
def chains_as_measured(monkeypatch):
    """Gathered, with tails of two stages, in the tiles of Triton 3.6."""
    tiles = (128, 64, 128, 8, 3, 256), (128, 64, 64, 8, 3, 272), (64, 64, 64, 8, 3, 512)
    monkeypatch.setitem(chain_forward.TILES, 90, tiles)
    monkeypatch.setattr(roofline, "tail_stages", lambda links, tile: 2)
    monkeypatch.setattr(chain_forward.chain_box, "tiles", lambda links: ())
    decide_chain.cache_clear()
    yield
    decide_chain.cache_clear()


CHAINS = pytest.mark.parametrize(
    ("links", "times"), measured_chains(), ids=lambda value: str(getattr(value, "expand", ""))
)


@CHAINS
@pytest.mark.usefixtures("chains_as_measured")
def test_the_chain_that_is_planned_is_among_the_fastest_measured(links, times):
    parts = tuple(length for length, _ in decide_chain(links).parts)
    assert times[parts] <= 1.06 * min(times.values())


@CHAINS
@pytest.mark.usefixtures("chains_as_measured")
def test_every_chain_is_predicted_to_take_about_as_long_as_measured(links, times):
    """Beside cuDNN, whose times are scaled to what they are predicted to be: of each run, and of what is apart."""
    predicted = dict(decide_chain(links).alternatives)
    apart = (1,) * 3
    for parts, microseconds in times.items():
        ratio = predicted[parts] / predicted[apart] * times[apart] / microseconds
        assert 0.90 <= ratio <= 1.11, (parts, ratio)
