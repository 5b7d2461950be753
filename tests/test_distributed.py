"""Two processes on one machine: SyncBatchNorm, DistributedDataParallel, and FSDP2."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests import distributed_worker as worker
from tests.distributed_worker import Arrays
from tests.rule import assert_within_rule
from tests.training import DEVICE, step

# PyTorch's own SyncBatchNorm, the eager road, refuses CPU tensors.
ROADS = ["triton", "mixed"] if DEVICE == "cpu" else ["triton", "mixed", "eager"]
RANKS = 2
PATIENCE = 120

Run = Callable[..., list[Arrays]]


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Calls a function of tests.distributed_worker in every rank; returns what each returned."""
    rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
    spawn = multiprocessing.get_context("spawn")
    pools = [
        ProcessPoolExecutor(1, spawn, initializer=worker.join, initargs=(rank, RANKS, str(rendezvous)))
        for rank in range(RANKS)
    ]

    def call(function: Callable[..., Arrays], *args: object) -> list[Arrays]:
        calls = [pool.submit(function, *args) for pool in pools]
        return [each.result(PATIENCE) for each in calls]

    try:
        yield call
    finally:
        for pool in pools:
            pool.submit(worker.leave)
            pool.shutdown()


def assert_as_one(ranks: list[Arrays], name: str, images: int, sums: int = 16) -> None:
    """What two ranks left, their parameters' gradients added up, is what one process leaves that has the whole batch.

    That process runs plain batch norm.
    """
    model, x, dz = worker.sample(name, images)
    exact = step(copy.deepcopy(model).double(), x.double(), dz.double(), "eager")
    eager = step(model, x, dz, "eager")
    assert all(rank.keys() == exact.keys() for rank in ranks)
    for key, value in exact.items():
        parts = [torch.from_numpy(rank[key]).to(DEVICE) for rank in ranks]
        if key in ("z", "x.grad"):
            check(key, torch.cat(parts), eager[key], value, sums)
        elif key.endswith(".grad"):
            check(key, sum(parts), eager[key], value, sums)
        else:
            for part in parts:
                check(key, part, eager[key], value, sums)


def check(key: str, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, sums: int) -> None:
    if exact.dtype == torch.int64:
        assert torch.equal(ours, exact), key
        return
    try:
        assert_within_rule(ours, eager, exact, sums)
    except AssertionError as error:
        raise AssertionError(f"{key}: {error}") from error


def assert_same(found: Arrays, expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(torch.from_numpy(found[key]), value.cpu()), key


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("split", [(3, 2), (1, 3)])
@pytest.mark.parametrize("name", [name for name in worker.MODELS if name != "small model"])
def test_synchronised_ranks_train_as_one_process(run, name, split, road):
    assert_as_one(run(worker.sync_step, name, split, road), name, sum(split))


@pytest.mark.parametrize("road", ROADS)
def test_a_group_that_is_not_the_default_one(run, road):
    name, split = "bottleneck, projection", (3, 2)
    assert_as_one(run(worker.sync_step, name, split, road, "all"), name, sum(split))


@pytest.mark.parametrize("road", ROADS)
def test_a_group_of_one_rank_shares_nothing(run, road):
    name, split = "basic, projection", (3, 2)
    model, x, dz = worker.sample(name, sum(split))
    ranks = run(worker.sync_step, name, split, road, "own")
    for found, own_x, own_dz in zip(ranks, x.split(split), dz.split(split), strict=True):
        assert_same(found, step(model, own_x, own_dz, road))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("conversion", ["fuse, then synchronise", "synchronise, then fuse"])
def test_a_synchronised_model_trains_as_one_process(run, conversion, road):
    """DistributedDataParallel averages the gradients; it takes SyncBatchNorm on a GPU only."""
    parallel = DEVICE != "cpu"
    ranks = run(worker.model_step, conversion, (3, 2), road, parallel)
    assert_as_one(ranks, "small model", 5, sums=48)


@pytest.mark.parametrize("road", ["triton", "mixed", "eager"])
def test_data_parallel_gradients_are_the_mean_over_ranks(run, road):
    parallel, alone = (run(worker.model_step, "fuse", (3, 2), road, parallel) for parallel in (True, False))
    for key in parallel[0]:
        if key in ("z", "x.grad"):
            assert all((here[key] == there[key]).all() for here, there in zip(parallel, alone, strict=True)), key
        elif key.endswith(".grad"):
            mean = (alone[0][key] + alone[1][key]) / 2
            assert all((rank[key] == mean).all() for rank in parallel), key


@pytest.mark.parametrize("road", ["triton", "mixed", "eager"])
@pytest.mark.parametrize("reverts", [False, True], ids=["fused", "unfused again"])
@pytest.mark.parametrize("sharding", worker.SHARDINGS)
def test_sharded_gradients_are_those_of_data_parallel_ranks(run, sharding, reverts, road):
    split = (3, 2)
    sharded = run(worker.shard_step, sharding, split, road, reverts)
    parallel = run(worker.model_step, "fuse", split, "eager" if reverts else road, True)
    for found, expected in zip(sharded, parallel, strict=True):
        assert_same(found, {key: torch.from_numpy(value) for key, value in expected.items()})


@pytest.mark.parametrize("sharding", worker.SHARDINGS)
def test_a_distributed_checkpoint_is_read_fused_or_not_sharded_or_not(run, sharding, tmp_path):
    first, second = run(worker.checkpoint, sharding, str(tmp_path))
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first if "running" not in key)


@pytest.mark.parametrize("road", ROADS)
def test_evaluation_does_not_communicate(run, road):
    """Each rank has a batch of its own, whose statistics stay its own where there are no running ones."""
    name, split = "no running statistics", (3, 2)
    model, x, dz = worker.sample(name, sum(split))
    ranks = run(worker.evaluate, name, split, road)
    for found, own_x, own_dz in zip(ranks, x.split(split), dz.split(split), strict=True):
        assert_same(found, step(model.eval(), own_x, own_dz, road))
