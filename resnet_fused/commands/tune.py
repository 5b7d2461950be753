"""Measure, on the user's GPU, which way each unit of a model is fastest, and keep it in a table for the plan.

No candidate is timed before its result was verified, none can take the user's process along, and the default stays
unless another is faster by more than the spread of both.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice, repeat
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from resnet_fused.commands.shared import (
    DTYPES,
    NETWORKS,
    UserError,
    add_size_argument,
    chosen_input,
    images,
    network,
    python,
    tracked,
)
from resnet_fused.commands.tune_trial import Candidate, ChainCandidate, candidates, chain_candidates
from resnet_fused.convert import fuse
from resnet_fused.engine.request import implementation
from resnet_fused.inference import optimize_for_inference
from resnet_fused.kernels.chain import Chain
from resnet_fused.kernels.launch import dry_run, interpreting
from resnet_fused.plan import decide, tuned
from resnet_fused.plan.constants import ASSUMED, Constants
from resnet_fused.plan.problem import Problem, Tiles, on_gpu, shown, units_of
from resnet_fused.plan.tuned import DIRECTIONS, ChainEntry, Entry, Table
from resnet_fused.table import render

C = TypeVar("C", Candidate, ChainCandidate)

TIMEOUT = 120.0
"""Seconds after which a candidate that does not answer is given up."""


class Failure(Exception):
    """A candidate did not come through: its message says why. ``candidate``: which, if it is known."""

    def __init__(self, reason: str, candidate: Candidate | ChainCandidate | None = None) -> None:
        super().__init__(reason)
        self.candidate = candidate


class Runner:
    """Runs candidates in a child process, which is replaced when one crashes it or does not answer in time.

    Every method raises Failure where the candidate, or what runs it, failed.
    """

    def __init__(self, command: Sequence[str], timeout: float = TIMEOUT) -> None:
        self.command, self.timeout = command, timeout
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.problem: Problem | Chain | None = None

    def open(self, problem: Problem | Chain) -> None:
        """Make the tensors of ``problem``, which the next calls are about."""
        self.problem = problem
        if self.process is None:
            self._start()
        self._ask({"problem": tuned.asked_out(problem)})

    def verify(self, candidate: C) -> float:
        """The largest error over the allowed one."""
        self._revive()
        return float(self._ask({"verify": candidate.encode()})["ratio"])

    def time(self, ways: Sequence[C]) -> list[list[float]]:
        """Seconds of every run, by candidate; the Failure names the one that it was up to."""
        self._revive()
        at = 0
        try:
            answer = self._ask({"time": [way.encode() for way in ways]})
            while "at" in answer:
                at = int(answer["at"])
                answer = self._answer()
        except Failure as failure:
            raise Failure(str(failure), ways[at]) from failure
        return [[float(second) for second in samples] for samples in answer["samples"]]

    def why_not_compiled(self, candidate: C) -> str | None:
        """Why the candidate's kernels do not compile, or None."""
        self._revive()
        reason = self._ask({"compile": candidate.encode()})["reason"]
        return None if reason is None else str(reason)

    def constants(self, arch: int, gpu: str) -> Constants:
        """What the model of the plan takes for granted, as measured."""
        if self.process is None:
            self._start()
        try:
            return Constants.from_dict(self._ask({"constants": [arch, gpu]})["constants"])
        except ValueError as error:
            raise Failure(str(error)) from error

    def close(self) -> None:
        """Nothing will be asked any more."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _revive(self) -> None:
        if self.process is None:
            assert self.problem is not None
            self.open(self.problem)

    def _start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.answers = queue.Queue()
        threading.Thread(target=_forward, args=(self.process.stdout, self.answers), daemon=True).start()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            self._give_up()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            line = self.answers.get(timeout=self.timeout)
        except queue.Empty:
            self.close()
            raise Failure(f"no answer within {self.timeout:g} s") from None
        if line is None:
            self._give_up()
        try:
            answer = json.loads(line or "")
        except ValueError:
            self.close()
            raise Failure("the worker answered what is no JSON") from None
        if not isinstance(answer, dict) or "error" in answer:
            if not isinstance(answer, dict) or answer.get("fatal"):
                self.close()
            raise Failure(str(answer["error"] if isinstance(answer, dict) else answer))
        return answer

    def _give_up(self) -> None:
        assert self.process is not None
        code = self.process.wait()
        self.process = None
        raise Failure(f"the process died of signal {-code}" if code < 0 else f"the process ended with code {code}")


class Compilers:
    """Child processes that compile candidates side by side, and need no GPU; a crash of the compiler is one's own."""

    def __init__(self, command: Sequence[str] = ()) -> None:
        command = command or python("resnet_fused.commands.tune_worker", "meta")
        self.runners = [Runner(command) for _ in range(min(os.cpu_count() or 1, 8))]
        self.closed = False

    def __call__(self, problem: Problem | Chain, ways: Sequence[C]) -> dict[C, str]:
        """The fused candidates that cannot be compiled, each with the reason."""
        fused = [way for way in ways if way.implementation == "fused"]
        # What they have in common is compiled once: the default tiles before the others, and those that differ in no
        # tile, but in splits, by one process.
        alike = [list(group) for _, group in groupby(fused, _compiled)]
        failed: dict[C, str] = {}

        def work(runner: Runner, left: Iterator[list[C]]) -> None:
            for way in chain.from_iterable(left):
                try:
                    if runner.problem != problem:
                        runner.open(problem)
                    reason = runner.why_not_compiled(way)
                except Failure as failure:
                    reason = str(failure)
                if self.closed:
                    return
                if reason is not None:
                    failed[way] = reason

        with ThreadPoolExecutor(len(self.runners)) as pool:
            try:
                others = iter(alike)
                work(self.runners[0], islice(others, 1))
                list(pool.map(work, self.runners, repeat(others)))
            except BaseException:
                self.close()
                raise
        return failed

    def close(self) -> None:
        """End the processes."""
        self.closed = True
        for runner in self.runners:
            runner.close()


def _compiled(way: Candidate | ChainCandidate) -> tuple[Any, ...]:
    """What of a fused candidate the compiler sees."""
    if isinstance(way, ChainCandidate):
        return way.parts
    tiles = way.tiles
    forward = tiles.forward and replace(tiles.forward, splits=min(tiles.forward.splits, 2))
    return forward, tiles.dgrad, tiles.wgrad and replace(tiles.wgrad, splits=1)


def _forward(stream: Iterable[str], answers: queue.Queue[str | None]) -> None:
    for line in stream:
        answers.put(line)
    answers.put(None)


@dataclass(frozen=True)
class CandidateTime:
    """Median seconds of a candidate, and half the range of the middle half of its samples."""

    median: float
    spread: float


@dataclass
class TuneReport:
    """What :func:`tune` did; ``str()`` of it is a table. ``failed``: problems that could not be set up, and why.

    ``constants``: what came of measuring those of the plan's model, in words.
    """

    table: Table
    tuned: list[Entry | ChainEntry] = field(default_factory=list)
    known: list[Entry | ChainEntry] = field(default_factory=list)
    failed: list[tuple[Problem | Chain, str]] = field(default_factory=list)
    constants: str = ""

    def __str__(self) -> str:
        columns = ["unit", "runs", "us", "+- us", "quarantined", "because"]
        rows: list[tuple[object, ...]] = [
            (
                _name(entry),
                str(_winner(entry)),
                round(entry.seconds * 1e6, 1),
                round(entry.spread * 1e6, 1),
                len(entry.quarantined),
                entry.reason,
            )
            for entry in [*self.tuned, *self.known]
        ]
        rows += [(shown(problem), "", None, None, None, f"not tuned: {reason}") for problem, reason in self.failed]
        bad = [f"  {_name(e)}: {way}: {reason}" for e in self.tuned for way, reason in e.quarantined]
        title = f"{len(self.tuned)} units and chains tuned, {len(self.known)} known before, on {self.table.gpu}"
        constants = [self.constants] if self.constants else []
        return "\n".join([render(title, columns, rows), *constants, *(["Quarantined:"] if bad else []), *bad])


def _name(entry: Entry | ChainEntry) -> str:
    return shown(entry.links if isinstance(entry, ChainEntry) else entry.problem)


def _winner(entry: Entry | ChainEntry) -> Candidate | ChainCandidate:
    return (
        ChainCandidate(entry.parts) if isinstance(entry, ChainEntry) else Candidate(entry.implementation, entry.tiles)
    )


def tune(
    model: nn.Module,
    *shapes: Sequence[int],
    dtype: torch.dtype | None = None,
    direction: str = "inference",
    device: torch.device | str = "cuda",
) -> TuneReport:
    """Measure every distinct unit of ``model`` on inputs of the given shapes, and keep the results for the plan.

    And, once, the constants of the GPU by which the plan's model predicts units that were not measured.

    ``shapes`` [N, 3, H, W]: batches as they will come. ``dtype``: that of the model's input (default: of its first
    parameter). ``direction``: "inference", "frozen" (that of ``optimize_for_inference``, which cuDNN may do whole) or
    "training" (forward and backward). What the table has already is not measured again, so that an interrupted call can
    be repeated. Runs in processes of its own, with the caller's setting of ``torch.backends.cudnn.benchmark``.

    Returns a report; the table takes effect at once in this process. Raises RuntimeError where there is no CUDA GPU
    that the kernels run on, ValueError without shapes or for another direction, OSError where the table cannot be
    written.
    """
    if not shapes:
        raise ValueError("shapes must name at least one shape [N, C, H, W] of the model's input; got none")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(map(repr, DIRECTIONS))}; got {direction!r}")
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or interpreting():
        raise RuntimeError("tune measures on a CUDA GPU, and there is none here that the kernels run on")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise RuntimeError(f"there is no {device}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here")
    if (reason := decide.why_too_old(device)) is not None:
        raise RuntimeError(reason)
    arch, gpu = decide.arch_of(device), torch.cuda.get_device_name(device)
    dtype = dtype or next(model.parameters()).dtype
    problems = [on_gpu(p, gpu) for p in find_problems(model, shapes, dtype, direction, arch)]
    options = ["--cudnn-benchmark"] if torch.backends.cudnn.benchmark else []
    runner = Runner(python("resnet_fused.commands.tune_worker", str(device), *options))
    compilers = Compilers()
    try:
        constants = keep_constants(arch, gpu, runner)
        report = tune_problems(problems, gpu, runner, compiled=compilers)
    finally:
        runner.close()
        compilers.close()
    report.constants = constants
    return report


def keep_constants(arch: int, gpu: str, runner: Runner) -> str:
    """Measure those constants of ``gpu`` that the user's table lacks, and save them; returns what came of it, in words.

    Raises OSError where the table cannot be written, before anything is measured.
    """
    tuned.require_writable(gpu)
    if (table := tuned.load(gpu)) is not None and table.constants is not None:
        return "The constants of the plan's model were measured before."
    try:
        constants = runner.constants(arch, gpu)
    except Failure as failure:
        return f"The constants of the plan's model stay assumed: {failure}"
    tuned.change(gpu, lambda table: replace(table, constants=constants))
    return "The constants of the plan's model were measured."


def find_problems(
    model: nn.Module, shapes: Iterable[Sequence[int]], dtype: torch.dtype, direction: str, arch: int
) -> list[Problem | Chain]:
    """The distinct units that ``model`` plans on inputs of these shapes, in order, then its chains. Nothing runs."""
    training, network = direction == "training", copy.deepcopy(model).to("meta")
    with implementation("auto"), dry_run(arch), decide.record() as found, torch.set_grad_enabled(training):
        network = optimize_for_inference(network) if direction == "frozen" else fuse(network).train(training)
        for shape in shapes:
            network(torch.empty(*shape, dtype=dtype, device="meta"))
    chains = dict.fromkeys(planned for planned in found if isinstance(planned, Chain))
    units = dict.fromkeys(unit for planned in found for unit in units_of(planned))
    return [*units, *chains]


Compiled = Callable[..., dict[Any, str]]


def tune_problems(problems: Sequence[Problem | Chain], gpu: str, runner: Runner, *, compiled: Compiled) -> TuneReport:
    """Tune what the user's table of ``gpu`` lacks, and save it problem by problem.

    ``compiled`` returns the candidates that cannot be compiled, each with the reason. Raises OSError where the table
    cannot be written, before anything is measured.
    """
    report = TuneReport(tuned.load(gpu) or Table(gpu))
    try:
        tuned.require_writable(gpu)
        for problem in tracked(problems, "tuning"):
            if (entry := report.table.exact(problem)) is not None:
                report.known.append(entry)
                continue
            try:
                constants = decide.constants_of(report.table)
                if isinstance(problem, Chain):
                    entry = tune_chain(problem, runner, compiled, constants)
                else:
                    entry = tune_problem(problem, runner, compiled, constants)
            except Failure as failure:
                report.failed.append((problem, str(failure)))
                continue
            report.table = tuned.add(gpu, entry)
            report.tuned.append(entry)
    finally:
        runner.close()
    return report


def tune_problem(problem: Problem, runner: Runner, compiled: Compiled, constants: Constants = ASSUMED) -> Entry:
    """Verify, then time, every candidate for ``problem``. Raises Failure where not one of them came through.

    ``constants``: by which the plan's model names the default.
    """
    trial: _Tournament[Candidate] = _Tournament(runner)
    ways = candidates(problem)
    trial.quarantined = compiled(problem, ways)
    runner.open(problem)
    trial.play(ways)
    best = Tiles(**{kernel: _best_tile(trial.timings, kernel) for kernel in vars(Tiles())})
    if Candidate("fused", best) not in trial.timings:
        # Each kernel's best tile was found on its own: together they are a candidate like any other.
        rivals = [way for way in trial.timings if way.tiles == Tiles()]
        trial.play([Candidate("fused", best), *rivals])
    plan = decide.decide(problem, table=Table(problem.gpu, constants=constants))
    default = Candidate(plan.implementation, plan.tiles if plan.implementation == "fused" else Tiles())

    def waited(way: Candidate, seconds: float) -> float:
        return decide.waited(problem, way.implementation, seconds, way.tiles, constants)

    winner = trial.winner(default, waited)
    return Entry(problem, winner.implementation, winner.tiles, *trial.measured(winner, lambda way: way.implementation))


def tune_chain(links: Chain, runner: Runner, compiled: Compiled, constants: Constants = ASSUMED) -> ChainEntry:
    """The same of a chain, whose units were tuned before."""
    trial: _Tournament[ChainCandidate] = _Tournament(runner)
    ways = chain_candidates(links)
    trial.quarantined = compiled(links, ways)
    runner.open(links)
    trial.play(ways)
    plan = decide.decide_chain(links, table=Table(links.first.gpu, constants=constants))  # type: ignore[attr-defined]

    def waited(way: ChainCandidate, seconds: float) -> float:
        return decide.parts_waited(links, way.parts, seconds, constants)

    winner = trial.winner(ChainCandidate(plan.parts), waited)
    return ChainEntry(links, winner.parts, *trial.measured(winner, lambda way: [length for length, _ in way.parts]))


def _best_tile(timings: dict[Candidate, CandidateTime], kernel: str) -> Any:
    """The tile with which the fused candidate that varies ``kernel`` alone beats the default tiles, or None."""
    base = timings.get(Candidate("fused"))
    own = {
        way: timing
        for way, timing in timings.items()
        if getattr(way.tiles, kernel) is not None and way.tiles == Tiles(**{kernel: getattr(way.tiles, kernel)})
    }
    best = min(own, key=lambda way: own[way].median, default=None)
    return getattr(best.tiles, kernel) if best and (base is None or _beats(own[best], base)) else None


class _Tournament(Generic[C]):
    """The candidates of one problem or chain that came through, with their times; and those that did not."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.timings: dict[C, CandidateTime] = {}
        self.quarantined: dict[C, str] = {}

    def play(self, ways: Sequence[C]) -> None:
        """Verify what is new among ``ways``, and time all that are right side by side."""
        right = [way for way in ways if way in self.timings or self._is_right(way)]
        while right:
            try:
                samples = self.runner.time(right)
            except Failure as failure:
                bad: Any = failure.candidate or right[0]
                self.quarantined[bad] = str(failure)
                self.timings.pop(bad, None)
                right = [way for way in right if way != bad]
                continue
            self.timings |= {way: _timing(times) for way, times in zip(right, samples, strict=True)}
            return

    def _is_right(self, way: C) -> bool:
        if way in self.quarantined:
            return False
        if way.implementation == "eager":
            return True  # it is what the others are compared with
        try:
            ratio = self.runner.verify(way)
        except Failure as failure:
            self.quarantined[way] = str(failure)
            return False
        if not ratio <= 1:
            self.quarantined[way] = f"wrong: its error is {ratio:.3g} times the allowed one"
        return ratio <= 1

    def winner(self, default: C, waited: Callable[[C, float], float]) -> C:
        """The fastest, if it beats the default by more than the spread.

        ``waited`` makes of the seconds of a candidate those for which a caller waits: the host's time counts too.
        """
        if not self.timings:
            reasons = "; ".join(f"{way}: {reason}" for way, reason in self.quarantined.items())
            raise Failure(f"no candidate came through: {reasons}")
        waits = {way: CandidateTime(waited(way, t.median), t.spread) for way, t in self.timings.items()}
        best = min(waits, key=lambda way: (waits[way].median, self.timings[way].median))
        stays = default in waits and not _beats(waits[best], waits[default])
        return default if stays else best

    def measured(self, winner: C, kind: Callable[[C], Any]) -> tuple[float, float, str, tuple[tuple[str, str], ...]]:
        """Of the ``winner``: seconds, spread, the reason with the best of every other ``kind``; and who is out."""
        timing = self.timings[winner]
        rivals = {str(kind(way)): self.timings[way] for way in self._by_time() if way != winner}
        against = ", ".join(f"{way} {rival.median * 1e6:.1f}" for way, rival in rivals.items())
        reason = f"measured {timing.median * 1e6:.1f} us" + (f", best others: {against}" if against else "")
        return timing.median, timing.spread, reason, tuple((str(way), why) for way, why in self.quarantined.items())

    def _by_time(self) -> list[C]:
        """The slowest first."""
        return sorted(self.timings, key=lambda way: self.timings[way].median, reverse=True)


def _timing(samples: Sequence[float]) -> CandidateTime:
    low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return CandidateTime(median, (high - low) / 2)


def _beats(one: CandidateTime, other: CandidateTime) -> bool:
    return one.median + max(one.spread, other.spread) < other.median


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m resnet_fused tune``."""
    add = parser.add_argument
    add("--model", nargs="+", default=["resnet50"], choices=NETWORKS, metavar="NAME", help=f"of {', '.join(NETWORKS)}")
    add("--batch", nargs="+", type=images, default=[32], metavar="N", help="numbers of images (default: 32)")
    add_size_argument(parser)
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    add(
        "--direction",
        choices=DIRECTIONS,
        default="inference",
        help="default: inference; frozen: optimize_for_inference",
    )
    add("--device", default="cuda", metavar="DEVICE", help="cuda, cuda:1 ... (default: cuda)")


def main(options: argparse.Namespace) -> int:
    """Tune models on the GPU; returns 0, or 130 when interrupted."""
    torch.backends.cudnn.benchmark = True
    try:
        for name in options.model:
            side = options.size or NETWORKS[name]
            shapes = [(batch, 3, side, side) for batch in options.batch]
            with torch.device("meta"):
                model = network(name).to(getattr(torch, options.dtype))
            with chosen_input():
                print(tune(model, *shapes, direction=options.direction, device=options.device))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is left", file=sys.stderr)
        return 130
    except (RuntimeError, OSError) as error:
        raise UserError(str(error)) from error
    return 0
