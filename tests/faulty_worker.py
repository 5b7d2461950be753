"""A tuning worker with an injected clock and injected faults: on the GPU, or where there is none, interpreted.

``python -m tests.faulty_worker '{"abort": "mixed"}'``: the fault strikes when the candidate so named runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from resnet_fused.commands import tune_worker
from resnet_fused.commands.tune_trial import Candidate, Trial
from resnet_fused.commands.tune_worker import Work, serve
from resnet_fused.plan.problem import Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAULTS = json.loads(sys.argv[1])


class FaultyTrial(Trial):
    def work(self, candidate: Candidate) -> Work:
        run = super().work(candidate)

        def faulty():
            fault = next((fault for fault, name in FAULTS.items() if name == str(candidate)), None)
            if fault == "abort":
                os.abort()
            if fault == "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            if fault == "exit":
                os._exit(3)
            if fault == "hang":
                time.sleep(60)
            if fault in ("raise", "poison"):
                raise RuntimeError("out of resource: shared memory")
            if fault == "garbage":
                print("what is this", flush=True)
            results = run()
            return {name: 2 * result for name, result in results.items()} if fault == "wrong" else results

        return faulty


class Clock:
    """Every call takes a millisecond more than the one before."""

    def __init__(self) -> None:
        self.now = 0.0

    def prepare(self, work: Work) -> Work:
        return work

    def seconds(self, work: Work) -> float:
        work()
        self.now += 1e-3
        return self.now

    def usable(self) -> bool:
        return "poison" not in FAULTS


def why_not_compiled(problem: Problem, candidate: Candidate) -> None:
    if FAULTS.get("compile") == str(candidate):
        os.abort()


def make(problem: Problem) -> Trial:
    return FaultyTrial(problem, DEVICE)


if __name__ == "__main__":
    tune_worker.ROUNDS = 2
    tune_worker.why_not_compiled = why_not_compiled
    with torch.no_grad():
        serve(sys.stdin, sys.stdout, make, Clock())
