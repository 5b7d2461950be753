"""The process in which candidates run: a kernel that crashes takes this one, not the user's.

It reads a line of JSON, answers with lines of JSON, and goes on until its input ends:

    {"problem": {...}}                  {}                          tensors are made; of a chain, by its links
    {"compile": candidate}              {"reason": null}            or why its kernels do not compile
    {"verify": candidate}               {"ratio": 0.3}              at most 1 is right
    {"time": [candidate, ...]}          {"at": 0} {"at": 1} ... {"samples": [[seconds, ...], ...]}
    {"constants": [arch, name]}         {"constants": {...}}        of the GPU, which needs no problem

or {"error": "...", "fatal": false} where that failed, true where no more can be asked; "at" says which candidate runs
first from here on.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import torch

from resnet_fused.commands.clock import ColdClock
from resnet_fused.commands.tune_constants import measure
from resnet_fused.commands.tune_trial import Candidate, ChainCandidate, decoded, rehearse, trial_of
from resnet_fused.kernels.chain import Chain
from resnet_fused.kernels.gpus import gpu_of
from resnet_fused.plan.problem import Problem
from resnet_fused.plan.tuned import asked_in

WARM_UPS = 3
ROUNDS = 25
HOST_CALLS = 20
GRAPH_BELOW = 5e-3
"""Shorter work is timed inside a CUDA graph, so that the host's own time for its launches does not count."""

Work = Callable[[], Any]


class Clock(ColdClock):
    """Times candidates on ``device``: as CUDA graphs, where the host would be slower."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.captured: torch.cuda.CUDAGraph | None = None
        self.capturing = False

    def prepare(self, work: Work) -> Work:
        """What to time in place of ``work``: warm, and cheap to launch."""
        for _ in range(WARM_UPS):
            work()
        if self.seconds(work) > GRAPH_BELOW:
            return work
        # The graphs keep nothing that another may not overwrite, and together they would not fit. A pool of memory may
        # be shared while a graph of it lives: the last one is kept.
        pool = None if self.captured is None else self.captured.pool()
        graph = torch.cuda.CUDAGraph()
        self.capturing = True
        with torch.cuda.graph(graph, pool=pool):
            work()
        self.capturing = False
        self.captured = graph

        def replay(work: Work = work) -> None:  # the graph reads tensors that ``work`` alone may hold
            graph.replay()

        return replay

    def release(self) -> None:
        """What was prepared is not needed any more, nor its memory."""
        self.captured = None

    def host_seconds(self, work: Work) -> float:
        """How long the host takes for one call: the median of ROUNDS, while the device has nothing else to do."""
        for _ in range(WARM_UPS):
            work()
        samples = []
        for _ in range(ROUNDS):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                work()
            samples.append((time.perf_counter() - start) / HOST_CALLS)
        return statistics.median(samples)

    def usable(self) -> bool:
        """Whether the device still works, after an error."""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return not self.capturing


def serve(lines: Iterable[str], out: TextIO, make_trial: Callable[[Problem | Chain], Any], clock: Clock | None) -> None:
    """Answer requests until ``lines`` end."""

    def answer(content: dict[str, Any]) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    trial: Any = None
    for line in lines:
        request = json.loads(line)
        try:
            if "problem" in request:
                trial = None  # its memory is needed, and that of its graphs
                if clock is not None:
                    clock.release()
                problem = asked_in(request["problem"])
                tf32 = (problem.first if isinstance(problem, Chain) else problem).tf32
                torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]
                trial = make_trial(problem)
                answer({})
            elif "constants" in request:
                if clock is None:
                    raise ValueError("constants are measured on a CUDA GPU, and there is none here")
                trial = None
                answer({"constants": measure(gpu_of(*request["constants"]), clock).to_dict()})
            elif trial is None:
                raise ValueError("there is no problem yet")
            elif "compile" in request:
                answer({"reason": why_not_compiled(trial.problem, decoded(request["compile"]))})
            elif "verify" in request:
                answer({"ratio": trial.ratio(decoded(request["verify"]))})
            elif clock is None:
                raise ValueError("there is no clock")
            else:
                answer({"samples": _time(trial, request["time"], clock, lambda i: answer({"at": i}))})
        except Exception as error:
            fatal = clock is not None and not clock.usable()
            answer({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300], "fatal": fatal})


def why_not_compiled(problem: Problem | Chain, candidate: Candidate | ChainCandidate) -> str | None:
    """Why the candidate's kernels do not compile for the problem's GPU, or None. Needs no GPU."""
    first: Any = problem.first if isinstance(problem, Chain) else problem
    shared = gpu_of(first.arch, first.gpu).shared
    try:
        for call in rehearse(problem, candidate)[0]:
            needed = call.compile(first.arch).metadata.shared
            if needed > shared:
                return f"out of resources: {needed} bytes of shared memory, the GPU has {shared}"
    except Exception as error:
        return f"does not compile: {type(error).__name__}: {error}".splitlines()[0][:300]
    return None


def _time(trial: Any, encoded: list[Any], clock: Clock, tell: Callable[[int], None]) -> list[list[float]]:
    """Round by round, every candidate once, in an order that shifts, so that all meet the same drift of the clocks."""
    works = []
    for i, fields in enumerate(encoded):
        tell(i)
        works.append(clock.prepare(trial.work(decoded(fields))))
    samples: list[list[float]] = [[] for _ in works]
    for turn in range(ROUNDS):
        for step in range(len(works)):
            i = (turn + step) % len(works)
            tell(i)
            samples[i].append(clock.seconds(works[i]))
    return samples


def main() -> None:
    """Serve on standard input and output, for a CUDA device, or for "meta", where candidates can only be compiled.

    What else is printed goes to standard error.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device = torch.device(sys.argv[1])
    torch.backends.cudnn.benchmark = "--cudnn-benchmark" in sys.argv
    if device.type == "meta":
        serve(sys.stdin, out, lambda problem: trial_of(problem, device), None)
        return
    with torch.cuda.device(device), torch.no_grad():
        serve(sys.stdin, out, lambda problem: trial_of(problem, device), Clock(device))


if __name__ == "__main__":
    main()
