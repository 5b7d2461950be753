"""The tuner's clock, on a pretended GPU that treats the memory of CUDA graphs as PyTorch's allocator does."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager
from itertools import count

import pytest
import torch

from resnet_fused.commands.tune_trial import Trial
from resnet_fused.commands.tune_worker import Clock, serve
from resnet_fused.plan.problem import Problem
from resnet_fused.plan.tuned import problem_out

CPU = torch.device("cpu")
TINY = Problem(1, 4, 4, 8, 8, 1, 1, (1, 1), (0, 0), (1, 1), 1, torch.float32, False, False, 90, "inference", False, "")


class FakeGraphs:
    """The CUDA graphs of ``torch.cuda``, each of a memory pool, which is used up when its last graph is gone."""

    def __init__(self, monkeypatch) -> None:
        self.users: dict[int, int] = {}
        handles, users = count(), self.users

        class Graph:
            handle: int

            def pool(self) -> int:
                return self.handle

            def __del__(self) -> None:
                users[self.handle] -= 1

        @contextmanager
        def capture(graph, pool=None):
            graph.handle = next(handles) if pool is None else pool
            dead = users.get(graph.handle) == 0
            users[graph.handle] = users.get(graph.handle, 0) + 1
            if dead:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            yield

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    @property
    def pools(self) -> list[int]:
        """How many graphs live in each pool that has one."""
        return [n for n in self.users.values() if n]


@pytest.fixture
def graphs(monkeypatch):
    return FakeGraphs(monkeypatch)


@pytest.fixture
def clock(monkeypatch, graphs):
    def seconds(self, work):
        work()
        return 1e-4

    monkeypatch.setattr(Clock, "seconds", seconds)
    return Clock(CPU)


def test_graphs_are_captured_after_all_earlier_ones_are_gone(clock):
    for _ in range(3):
        prepared = [clock.prepare(lambda: None) for _ in range(2)]
        del prepared
    assert clock.usable()


def test_graphs_share_their_memory(clock, graphs):
    prepared = [clock.prepare(lambda: None) for _ in range(3)]
    assert graphs.pools == [len(prepared)]


def test_another_problem_has_the_memory_of_the_graphs(clock, graphs):
    clock.prepare(lambda: None)
    left = []

    def make(problem):
        left.append(graphs.pools)
        return Trial(problem, torch.device("meta"))

    serve([json.dumps({"problem": problem_out(TINY)})], io.StringIO(), make, clock)
    assert left == [[]]
    clock.prepare(lambda: None)
    assert graphs.pools == [1]


def test_long_work_needs_no_graph(clock, graphs, monkeypatch):
    monkeypatch.setattr(Clock, "seconds", lambda *_: 1.0)
    work = object
    assert clock.prepare(work) is work
    assert graphs.pools == []


@pytest.mark.parametrize("calls", [1, 5])
def test_the_device_is_lost_by_an_error_in_a_capture_alone(calls, clock):
    """Whose stream and memory are left as they were in it."""
    left = iter(range(calls - 1))

    def work():
        if next(left, None) is None:
            raise ValueError("a kernel that cannot be launched")

    with pytest.raises(ValueError, match="cannot be launched"):
        clock.prepare(work)
    assert clock.usable() == (calls == 1)
