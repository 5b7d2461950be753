"""A tuning worker with an injected clock and injected faults: on the GPU, or where there is none, interpreted.

``python -m tests.faulty_worker '{"abort": "mixed"}'``: the fault strikes when the candidate so named runs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from resnet_fused.commands import tune_worker
from resnet_fused.commands.tune_trial import Candidate, Trial
from resnet_fused.commands.tune_worker import Work, serve
from resnet_fused.plan.problem import Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAULTS: dict[str, str] = {}


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

    def release(self) -> None:
        """There are no graphs."""

    def usable(self) -> bool:
        return "poison" not in FAULTS


def why_not_compiled(problem: Problem, candidate: Candidate) -> None:
    if FAULTS.get("compile") == str(candidate):
        os.abort()


def make(problem: Problem) -> Trial:
    return FaultyTrial(problem, DEVICE)


def run(faults: str) -> None:
    FAULTS.update(json.loads(faults))
    tune_worker.ROUNDS = 2
    tune_worker.why_not_compiled = why_not_compiled
    with torch.no_grad():
        serve(sys.stdin, sys.stdout, make, Clock())


class Forked:
    """In the place of ``subprocess.Popen``: this worker as a fork of the process that asks."""

    def __init__(self, command: list[str], **options: Any) -> None:
        requests, asking = os.pipe()
        answering, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                faulthandler.disable()  # pytest's: a crash here is meant
                os.close(asking)
                os.close(answering)
                sys.stdin, sys.stdout = os.fdopen(requests), os.fdopen(answers, "w")
                run(command[-1])
                code = 0
            finally:
                os._exit(code)
        os.close(requests)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(asking, "w"), os.fdopen(answering)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


if __name__ == "__main__":
    run(sys.argv[1])
