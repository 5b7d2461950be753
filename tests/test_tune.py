"""The tuner, with injected clocks and faults: who wins, who is quarantined, and what is left when it is stopped."""

from __future__ import annotations

import errno
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from signal import Signals
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import resnet_fused
from resnet_fused.__main__ import main
from resnet_fused.commands.tune import (
    CandidateTime,
    Compilers,
    Failure,
    Runner,
    _beats,
    find_problems,
    tune_problem,
    tune_problems,
)
from resnet_fused.commands.tune_trial import Candidate, Trial, candidates, rehearse
from resnet_fused.commands.tune_worker import serve, why_not_compiled
from resnet_fused.engine import backward, forward, tolerance
from resnet_fused.kernels import conv_wgrad
from resnet_fused.kernels.launch import Call, TileConfig
from resnet_fused.plan import cache, decide, tuned
from resnet_fused.plan.problem import Problem, Tiles
from tests import faulty_worker

pytestmark = pytest.mark.usefixtures("on_device", "own_cache")

GPU = "NVIDIA Test 1000"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def problem(**change) -> Problem:
    base = Problem(
        *(1, 5, 4, 16, 24, 3, 3, (1, 1), (1, 1), (1, 1), 1, torch.float32, False, True, 90, "training", False, GPU)
    )
    return replace(base, **change)


class FakeRunner:
    """``times``: seconds by the candidate's name, 1 ms for others; ``faults``: reason by (method, name)."""

    def __init__(self, times=None, faults=None, ratios=None, spread=0.0) -> None:
        self.times, self.faults, self.ratios, self.spread = times or {}, faults or {}, ratios or {}, spread
        self.timed: list[list[str]] = []
        self.opened: list[Problem] = []
        self.closed = False

    def open(self, problem: Problem) -> None:
        self.opened.append(problem)
        if ("open", "") in self.faults:
            raise Failure(self.faults["open", ""])

    def verify(self, candidate: Candidate) -> float:
        if ("verify", str(candidate)) in self.faults:
            raise Failure(self.faults["verify", str(candidate)])
        return self.ratios.get(str(candidate), 0.5)

    def time(self, ways: Sequence[Candidate]) -> list[list[float]]:
        for way in ways:
            if ("time", str(way)) in self.faults:
                raise Failure(self.faults["time", str(way)], way)
        self.timed.append([str(way) for way in ways])
        seconds = [self.times.get(str(way), 1e-3) for way in ways]
        return [[s - self.spread, s - self.spread, s, s + self.spread, s + self.spread] for s in seconds]

    def close(self) -> None:
        self.closed = True


def nothing(problem: Problem, ways: Sequence[Candidate]) -> dict[Candidate, str]:
    return {}


def default_of(p: Problem) -> str:
    return decide.decide(p).implementation


def test_the_fastest_wins_if_it_wins_by_more_than_the_spread():
    other = "mixed" if default_of(problem()) == "fused" else "fused"
    for spread, winner in ((1e-5, other), (2e-4, default_of(problem()))):
        entry = tune_problem(problem(), FakeRunner({other: 0.9e-3}, spread=spread), nothing)
        assert entry.implementation == winner
        assert entry.seconds == (0.9e-3 if winner == other else 1e-3)
        assert entry.spread == pytest.approx(spread)
        assert "measured" in entry.reason


def test_who_beats_whom():
    """By more than the larger of the two spreads."""
    for one, other, expected in (((0.8, 0.1), (1.0, 0.1), True), ((0.8, 0.1), (1.0, 0.3), False)):
        assert _beats(CandidateTime(*one), CandidateTime(*other)) is expected
        assert _beats(CandidateTime(one[0], other[1]), CandidateTime(other[0], one[1])) is expected
    assert not _beats(CandidateTime(1.0, 0.0), CandidateTime(1.0, 0.0))


def test_the_best_tiles_of_each_kernel_are_tried_together():
    ways = candidates(problem())
    forward = next(way for way in ways if way.tiles.forward)
    wgrad = next(way for way in ways if way.tiles.wgrad)
    both = Candidate("fused", Tiles(forward=forward.tiles.forward, wgrad=wgrad.tiles.wgrad))
    runner = FakeRunner({str(forward): 0.8e-3, str(wgrad): 0.7e-3, str(both): 0.5e-3})
    entry = tune_problem(problem(), runner, nothing)
    assert (entry.implementation, entry.tiles, entry.seconds) == ("fused", both.tiles, 0.5e-3)
    assert runner.timed[-1][0] == str(both)


@pytest.mark.parametrize("fault", ["wrong", "nan", "verify", "time", "compile"])
def test_a_bad_candidate_is_quarantined_and_the_others_go_on(fault):
    bad = candidates(problem())[1]
    runner = FakeRunner({str(bad): 1e-9})
    compiled = nothing
    if fault in ("wrong", "nan"):
        runner.ratios = {str(bad): 1.5 if fault == "wrong" else float("nan")}
    elif fault == "compile":
        compiled = lambda problem, ways: {bad: "out of resources"}  # noqa: E731
    else:
        runner.faults = {(fault, str(bad)): "the process died of signal 11"}
    entry = tune_problem(problem(), runner, compiled)
    assert [name for name, _ in entry.quarantined] == [str(bad)]
    reason = entry.quarantined[0][1]
    expected = {"wrong": "1.5 times the allowed", "nan": "wrong", "compile": "out of resources"}
    assert expected.get(fault, "signal 11") in reason
    assert all(str(bad) not in ways for ways in runner.timed)
    assert entry.seconds == 1e-3


def test_a_candidate_that_fails_the_second_time_is_out():
    """Though it was the fastest the first time."""

    class FailsLater(FakeRunner):
        def time(self, ways: Sequence[Candidate]) -> list[list[float]]:
            if self.timed and Candidate("mixed") in ways:
                raise Failure("crashed", Candidate("mixed"))
            return super().time(ways)

    forward, wgrad = (next(way for way in candidates(problem()) if getattr(way.tiles, k)) for k in ("forward", "wgrad"))
    runner = FailsLater({"mixed": 0.1e-3, str(forward): 0.8e-3, str(wgrad): 0.7e-3})
    entry = tune_problem(problem(), runner, nothing)
    assert entry.quarantined == (("mixed", "crashed"),)
    assert entry.implementation == "fused"
    assert "mixed" not in entry.reason


@pytest.mark.parametrize(("direction", "winner"), [("frozen", "mixed"), ("inference", "fused")])
def test_a_mixed_unit_that_keeps_the_host_longer_than_the_gpu_does_not_win(direction, winner):
    times = {"fused": 2e-5, "mixed": 1e-5, "eager": 3e-5, "cudnn": 3e-5}
    entry = tune_problem(problem(direction=direction, prologue=False), FakeRunner(times), nothing)
    assert entry.implementation == winner


def test_the_tile_of_the_plan_stays_unless_another_wins_by_more_than_the_spread():
    """A box, where the plan without a measurement takes one."""
    wide = problem(n=32, h=56, w=56, ci=64, co=64, dtype=torch.bfloat16, direction="inference", prologue=False)
    planned = decide.decide(wide)
    assert planned.implementation == "fused"
    assert planned.tiles.forward.box is not None
    for spread, winner in ((1e-5, Tiles()), (2e-4, planned.tiles)):
        entry = tune_problem(wide, FakeRunner({"fused": 0.9e-3}, spread=spread), nothing)
        assert (entry.implementation, entry.tiles) == ("fused", winner)


def test_a_default_that_is_wrong_is_replaced():
    default = default_of(problem())
    entry = tune_problem(problem(), FakeRunner(faults={("time", default): "crashed"}), nothing)
    assert entry.implementation != default or entry.tiles != Tiles()


def test_a_problem_that_does_not_fit_is_reported_and_not_saved():
    report = tune_problems([problem()], GPU, FakeRunner(faults={("open", ""): "out of memory"}), compiled=nothing)
    assert report.failed == [(problem(), "out of memory")]
    assert tuned.load(GPU) is None
    assert "not tuned: out of memory" in " ".join(str(report).split())


def test_what_is_known_is_not_measured_again():
    problems = [problem(n=n) for n in (1, 2)]
    first = tune_problems(problems[:1], GPU, FakeRunner(), compiled=nothing)
    runner = FakeRunner()
    second = tune_problems(problems, GPU, runner, compiled=nothing)
    assert runner.opened == problems[1:]
    assert runner.closed
    assert (len(first.tuned), len(second.tuned), len(second.known)) == (1, 1, 1)
    table = tuned.load(GPU)
    assert table is not None
    assert {entry.problem for entry in table.entries} == set(problems)
    assert decide.decide(problems[0], table=table).source == "tuned"


@pytest.mark.parametrize("place", ["a file", "no home"])
def test_a_table_that_cannot_be_written_is_found_before_anything_is_measured(place, monkeypatch, tmp_path):
    if place == "a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "file"))
    else:
        for name in ("RESNET_FUSED_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(cache.Path, "home", homeless)
    runner = FakeRunner()
    with pytest.raises(OSError, match="RESNET_FUSED_CACHE must name" if place == "no home" else "file"):
        tune_problems([problem()], GPU, runner, compiled=nothing)
    assert runner.opened == []
    assert runner.closed


def homeless():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("function", ["fsync", "replace", "write"])
def test_a_full_disk_leaves_the_old_table(function, monkeypatch, tmp_path):
    tune_problems([problem(n=1)], GPU, FakeRunner(), compiled=nothing)
    before = tuned.path(GPU).read_text()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if function == "write":
        monkeypatch.setattr(cache, "open", full, raising=False)
    else:
        monkeypatch.setattr(cache.os, function, full)
    runner = FakeRunner()
    with pytest.raises(OSError, match="No space left"):
        tune_problems([problem(n=2)], GPU, runner, compiled=nothing)
    assert runner.closed
    assert tuned.path(GPU).read_text() == before
    assert {file.name for file in tuned.path(GPU).parent.iterdir()} == {tuned.path(GPU).name, ".lock"}


@pytest.mark.parametrize(
    ("stage", "signal"),
    [
        *((stage, "SIGKILL") for stage in ("open", "verify", "time", "write", "fsync", "replace", "replaced")),
        *((stage, "SIGINT") for stage in ("time", "fsync")),
    ],
)
def test_killed_at_any_stage_the_table_is_whole_and_the_next_run_goes_on(stage, signal):
    from tests import killed_tuner

    number = Signals[signal]
    assert killed_tuner.run(stage, number) == (-number if signal == "SIGKILL" else 1)
    saved = 2 if stage == "replaced" else 1
    table = tuned.load(GPU)
    assert table is not None
    assert len(table.entries) == saved
    again = tune_problems([problem(n=n) for n in (1, 2, 3)], GPU, FakeRunner(), compiled=nothing)
    assert (len(again.tuned), len(again.known)) == (3 - saved, saved)


def child(timeout: float = 60.0, **faults: str) -> Runner:
    return Runner([sys.executable, "-m", "tests.faulty_worker", json.dumps(faults)], timeout)


@pytest.fixture
def _forked(monkeypatch):
    """Workers are forks of this process and import nothing, but where they need a GPU, which a fork cannot use.

    Nor autograd, once it was used here: their problems are of inference.
    """
    if not torch.cuda.is_available():
        monkeypatch.setattr("resnet_fused.commands.tune.subprocess.Popen", faulty_worker.Forked)


def test_the_worker_verifies_and_times():
    runner = child()
    try:
        runner.open(problem())
        assert runner.verify(Candidate("fused")) <= 1
        samples = runner.time([Candidate("fused"), Candidate("mixed"), Candidate("eager")])
        assert [len(times) for times in samples] == [2, 2, 2]
        # Interleaved: one round after the other, each in an order of its own.
        assert sorted(second for times in samples for second in times[:1]) == pytest.approx([1e-3, 2e-3, 3e-3])
        assert samples[1][1] < samples[0][1]
    finally:
        runner.close()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("abort", "died of signal 6"),
        ("segfault", "died of signal 11"),
        ("exit", "ended with code 3"),
        ("raise", "RuntimeError: out of resource"),
        ("poison", "RuntimeError: out of resource"),
        ("garbage", "no JSON"),
    ],
)
@pytest.mark.usefixtures("_forked")
def test_a_crash_is_the_workers_own_and_the_next_candidate_gets_a_new_one(fault, reason):
    runner = child(**{fault: "mixed"})
    try:
        runner.open(problem(direction="inference", prologue=False))
        process = runner.process
        with pytest.raises(Failure, match=reason):
            runner.verify(Candidate("mixed"))
        assert (runner.process is process) == (fault == "raise")
        assert runner.verify(Candidate("fused")) <= 1
        with pytest.raises(Failure, match=reason) as failure:
            runner.time([Candidate("fused"), Candidate("mixed")])
        assert failure.value.candidate == Candidate("mixed")
        assert len(runner.time([Candidate("fused")])[0]) == 2
    finally:
        runner.close()


@pytest.mark.usefixtures("_forked")
def test_a_wrong_result_and_a_hang_are_noticed():
    runner = child(wrong="mixed")
    try:
        runner.open(problem(direction="inference", prologue=False))
        assert runner.verify(Candidate("mixed")) > 1
    finally:
        runner.close()
    runner = child(hang="mixed")
    try:
        runner.open(problem(direction="inference", prologue=False))
        assert runner.verify(Candidate("fused")) <= 1
        runner.timeout = 0.5
        with pytest.raises(Failure, match=r"no answer within 0\.5 s"):
            runner.verify(Candidate("mixed"))
        runner.timeout = 60.0
        assert runner.verify(Candidate("fused")) <= 1
    finally:
        runner.close()


def test_the_protocol_answers_every_line():
    requests = [
        {"verify": Candidate("fused").encode()},
        {"problem": asdict(problem()) | {"dtype": "float32"}},
        {"verify": Candidate("fused").encode()},
        {"problem": {"n": 0}},
        {"verify": Candidate("fused").encode()},  # the one before is gone
    ]
    out = io.StringIO()
    serve(map(json.dumps, requests), out, lambda p: Trial(p, DEVICE), clock=None)
    answers = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [list(answer) for answer in answers] == [["error", "fatal"], [], ["ratio"], *2 * [["error", "fatal"]]]


def test_what_runs_is_verified_in_the_problems_format(monkeypatch):
    trial, seen = Trial(problem(tf32=True), DEVICE), []
    work = trial.work(Candidate("fused"))
    monkeypatch.setattr(trial, "work", lambda way: lambda: (seen.append(decide.tf32(torch.float32)), work())[1])
    with tolerance.products(tf32=False):
        assert trial.ratio(Candidate("fused")) <= 1
    assert seen == [True]


def test_the_worker_multiplies_in_the_problems_format():
    requests = [{"problem": asdict(problem(tf32=tf32)) | {"dtype": "float32"}} for tf32 in (True, False, True)]
    seen = []
    with tolerance.products(tf32=False):  # and back to what was before
        serve(map(json.dumps, requests), io.StringIO(), lambda p: seen.append(decide.tf32(p.dtype)), clock=None)
    assert seen == [True, False, True]


@pytest.mark.parametrize("direction", ["inference", "training"])
@pytest.mark.parametrize("way", ["fused", "mixed"])
@pytest.mark.parametrize(
    "change", [{}, {"r": 1, "s": 1, "padding": (0, 0)}, {"stride": (2, 2)}, {"dtype": torch.float16}]
)
def test_verification_passes_what_is_right(way, direction, change):
    p = problem(direction=direction, prologue=direction == "training", residual=direction == "inference", **change)
    assert Trial(p, DEVICE).ratio(Candidate(way)) <= 1


@pytest.mark.parametrize("way", ["fused", "mixed", "eager"])
@pytest.mark.parametrize("residual", [False, True])
def test_verification_passes_a_frozen_unit_without_a_relu(way, residual):
    trial = Trial(problem(direction="frozen", prologue=False, residual=residual, relu=False), DEVICE)
    assert trial.ratio(Candidate(way)) <= 1
    assert trial.work(Candidate(way))()["z"].min() < 0


@pytest.mark.parametrize("way", ["fused", "mixed", "eager"])
@pytest.mark.parametrize("ci", [3, 6])
def test_verification_passes_a_stem_with_its_pool(way, ci):
    stem = {"ci": ci, "r": 7, "s": 7, "stride": (2, 2), "padding": (3, 3), "h": 20, "w": 18}
    p = problem(direction="inference", prologue=False, pooled=True, **stem)
    trial = Trial(p, DEVICE)
    assert Candidate(way) in candidates(p)
    assert trial.ratio(Candidate(way)) <= 1
    assert trial.work(Candidate(way))()["z"].shape == (1, 24, 5, 5)
    trained = Trial(replace(p, direction="training"), DEVICE)
    assert trained.ratio(Candidate(way)) <= 1
    assert trained.work(Candidate(way))()["dw"].shape == (24, ci, 7, 7)


def test_what_candidates_are_compared_with_is_computed_once(monkeypatch):
    trial, dtypes = Trial(problem(), DEVICE), []
    expected = trial._expected
    monkeypatch.setattr(trial, "_expected", lambda dtype: (dtypes.append(dtype), expected(dtype))[1])
    assert all(trial.ratio(Candidate(way)) <= 1 for way in ("fused", "mixed"))
    assert dtypes == [torch.float64, torch.float32]


@pytest.mark.parametrize(
    ("module", "launcher"), [(forward, "conv_forward_moments"), (backward, "conv_dgrad"), (backward, "conv_wgrad")]
)
def test_verification_finds_a_wrong_kernel(module, launcher, monkeypatch):
    right = getattr(module, launcher)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        (result[0] if isinstance(result, tuple) else result)[0, 0, 0, 0] += 0.01
        return result

    monkeypatch.setattr(module, launcher, wrong)
    assert Trial(problem(), DEVICE).ratio(Candidate("fused")) > 1


def cut(launcher):
    """``launcher`` with its factors cut to ten bits."""
    return lambda x, w, **options: launcher(tolerance.cut(x), tolerance.cut(w), **options)


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_judged_by_what_it_may_cost(tf32, monkeypatch):
    """Whatever PyTorch itself makes of the flag: for many a shape, and on a CPU, it multiplies in fp32."""
    p = problem(direction="inference", prologue=False, tf32=tf32)
    monkeypatch.setattr(forward, "conv_forward", cut(forward.conv_forward))
    assert (Trial(p, DEVICE).ratio(Candidate("fused")) <= 1) is tf32


@pytest.mark.parametrize("direction", ["inference", "training"])
def test_what_is_right_does_not_depend_on_the_fastest_algorithm(direction, monkeypatch):
    """cuDNN's search for it serves what is timed alone; the tensors and the reference are the same in every run."""
    seen, conv2d, cudnn = [], F.conv2d, torch.backends.cudnn

    def watched(*args, **kwargs):
        seen.append((cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision))
        return conv2d(*args, **kwargs)

    monkeypatch.setattr(F, "conv2d", watched)
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    before = cudnn.conv.fp32_precision
    p = problem(direction=direction, prologue=False, tf32=True)
    assert Trial(p, DEVICE).ratio(Candidate("fused")) <= 1
    assert {state[:2] for state in seen} == {(False, True)}
    assert [state[2] for state in seen[-3:]] == ["ieee", "ieee", "tf32"]
    assert (cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision) == (True, False, before)


def conv_relu(x, w, bias, residual, geometry):
    """What cuDNN computes in one call."""
    y = F.conv2d(x, w, bias, *geometry)
    return torch.relu(y if residual is None else y + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
def test_a_frozen_unit_may_be_cudnns(residual, dtype, monkeypatch):
    p = problem(direction="frozen", prologue=False, residual=residual, dtype=dtype)
    trial, candidate = Trial(p, torch.device("cpu")), Candidate("cudnn")
    assert candidate in candidates(p)
    assert candidate not in candidates(replace(p, direction="inference"))
    assert candidate not in candidates(replace(p, relu=False))
    with pytest.raises(NotImplementedError, match="cudnn_convolution"):
        trial.ratio(candidate)
    monkeypatch.setattr(forward, "cudnn_conv_relu", conv_relu)
    assert trial.ratio(candidate) <= 1
    monkeypatch.setattr(forward, "cudnn_conv_relu", lambda x, w, bias, *rest: conv_relu(x, w, 0 * bias, *rest))
    assert trial.ratio(candidate) > 1


DEEP = {"direction": "inference", "prologue": False, "ci": 512, "co": 512}
WIDE = {
    **{"direction": "inference", "prologue": False, "dtype": torch.bfloat16, "arch": 80, "gpu": ""},
    **{"n": 256, "h": 28, "w": 28, "ci": 128, "co": 128},
}
MERGED = {"groups": 8, "ci": 128, "co": 128, "dtype": torch.bfloat16}


def test_candidates_are_legal_and_distinct():
    for change in (
        {},
        {"dtype": torch.bfloat16, "ci": 256, "co": 512},
        {"groups": 4},
        {"direction": "inference"},
        DEEP,
        WIDE,
        MERGED,
    ):
        p = problem(**change)
        ways = candidates(p)
        assert len(set(ways)) == len(set(map(str, ways))) == len(ways) > 5
        assert ways[0] == Candidate("fused")
        assert {way.implementation for way in ways} == {"fused", "mixed", "eager"}
        for way in ways:
            wgrad = way.tiles.wgrad and replace(way.tiles.wgrad, splits=1)
            tiles = (way.tiles.forward, way.tiles.dgrad, wgrad)
            tuned._rehearse(way.tiles, p)  # so that what wins can be kept
            for tile in filter(None, tiles):
                assert tuned.legal(tile, p, gradient=tile is way.tiles.dgrad)
                assert tile.num_stages >= 2
        assert any(way.tiles.splits > 1 for way in ways) == (p.direction == "inference" and p.n == 1)
        gathered = [
            way.tiles.forward for way in ways if way.tiles.forward is not None and way.tiles.forward.box is None
        ]
        assert any(tile.num_warps == 8 for tile in gathered) == (change is WIDE)
        # The default is tried as such, first of all.
        assert conv_wgrad.default_config(replace(p, prologue=True)) not in {way.tiles.wgrad for way in ways}


def test_problems_of_a_model_are_found_without_running_it():
    with torch.device("meta"):
        model = resnet_fused.resnet18().bfloat16()
    inference = find_problems(model, [(8, 3, 64, 64), (16, 3, 64, 64)], torch.bfloat16, "inference", 90)
    assert len(set(inference)) == len(inference)
    assert {p.n for p in inference} == {8, 16}
    assert {p.direction for p in inference} == {"inference"}
    frozen = find_problems(model, [(8, 3, 64, 64)], torch.bfloat16, "frozen", 90)
    assert {p.direction for p in frozen} == {"frozen"}
    training = find_problems(model, [(8, 3, 64, 64)], torch.bfloat16, "training", 90)
    assert {p.direction for p in training} == {"training"}
    assert any(p.prologue for p in training)


def compilers(monkeypatch, *command: str) -> Compilers:
    """Of processes whose kernels are Triton's compiler's."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return Compilers(command) if command else Compilers()


def test_candidates_that_do_not_compile_are_told_apart(monkeypatch):
    p = problem(n=8, h=28, w=28, ci=64, co=64, dtype=torch.bfloat16, direction="inference", prologue=False)
    big = Candidate("fused", Tiles(forward=TileConfig(64, 128, 512, num_stages=4)))
    compile_all = compilers(monkeypatch)
    try:
        failed = compile_all(p, [Candidate("fused"), big, Candidate("mixed")])
        assert list(failed) == [big]
        assert "out of resources" in failed[big]
        assert compile_all(replace(p, n=9), [Candidate("fused")]) == {}
    finally:
        compile_all.close()


def test_every_kernel_of_a_candidate_is_compiled_ahead(monkeypatch):
    """One that stays behind is compiled while nothing else runs, by the process that times."""
    p = problem(n=32, h=56, w=56, ci=64, co=64, dtype=torch.bfloat16)
    way = next(way for way in candidates(p) if way.tiles.dgrad and way.tiles.dgrad.box)
    compiled, small = [], SimpleNamespace(metadata=SimpleNamespace(shared=0))
    monkeypatch.setattr(Call, "compile", lambda call, arch: compiled.append((call.kernel.__name__, arch)) or small)
    assert why_not_compiled(p, way) is None
    assert compiled == [(call.kernel.__name__, p.arch) for call in rehearse(p, way)[0]]
    assert ("dgrad_box_kernel", 90) in compiled


@pytest.mark.parametrize("unit", [problem(), problem(**DEEP)], ids=["training", "split"])
def test_nothing_is_compiled_side_by_side_with_itself(unit):
    """The default tiles come first, alone; candidates that differ in splits alone, from one process."""
    compile_all = Compilers(["nothing runs"])
    compile_all.runners = [Compiler() for _ in range(4)]
    Compiler.log.clear()
    ways = candidates(unit)
    assert compile_all(unit, ways) == {}
    assert [event[1:] for event in Compiler.log[:2]] == [("begins", ways[0]), ("ends", ways[0])]
    compiled = [(compiler, way) for compiler, event, way in Compiler.log if event == "ends"]
    by_tile = {}
    for compiler, way in compiled:
        forward = way.tiles.forward and replace(way.tiles.forward, splits=min(way.tiles.forward.splits, 2))
        tile = forward, way.tiles.dgrad, way.tiles.wgrad and replace(way.tiles.wgrad, splits=1)
        by_tile.setdefault(tile, set()).add(compiler)
    fused = [way for way in ways if way.implementation == "fused"]
    assert len(compiled) == len(fused)
    assert {way for _, way in compiled} == set(fused)
    assert {len(compilers) for compilers in by_tile.values()} == {1}
    assert len({compiler for compiler, _ in compiled}) > 1


class Compiler:
    """In a process's place; takes its time."""

    log: ClassVar[list] = []
    problem = None

    def open(self, problem: Problem) -> None:
        self.problem = problem

    def why_not_compiled(self, candidate: Candidate) -> None:
        self.log.append((id(self), "begins", candidate))
        time.sleep(0.01)
        self.log.append((id(self), "ends", candidate))

    def close(self) -> None:
        pass


def test_a_crash_of_the_compiler_is_its_candidates_alone(monkeypatch):
    bad = candidates(problem())[1]
    fault = json.dumps({"compile": str(bad)})
    compile_all = compilers(monkeypatch, sys.executable, "-m", "tests.faulty_worker", fault)
    try:
        failed = compile_all(problem(), [Candidate("fused"), bad, *candidates(problem())[2:4]])
        assert failed == {bad: "the process died of signal 6"}
    finally:
        compile_all.close()


def test_without_a_gpu_there_is_nothing_to_measure(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="tune measures on a CUDA GPU"):
        resnet_fused.tune(resnet_fused.resnet18(), (1, 3, 64, 64))
    with pytest.raises(ValueError, match="shapes must name at least one"):
        resnet_fused.tune(resnet_fused.resnet18())
    with pytest.raises(ValueError, match="direction must be one of 'inference', 'frozen', 'training'; got 'backward'"):
        resnet_fused.tune(resnet_fused.resnet18(), (1, 3, 64, 64), direction="backward")
    assert main(["tune", "--model", "resnet18"]) == 2
    assert "CUDA GPU" in capsys.readouterr().err
