"""``python -m tests.killed_tuner STAGE SIGNAL``: tune three problems, and be killed at a stage of the second."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from resnet_fused.commands.tune import tune_problems
from resnet_fused.commands.tune_trial import Candidate
from resnet_fused.plan import cache, tuned
from tests.test_tune import GPU, FakeRunner, problem

STAGES = ("open", "verify", "time", "write", "fsync", "replace", "replaced")


class Killed(FakeRunner):
    problems = 0

    def open(self, problem) -> None:
        self.problems += 1
        strike("open", self.problems == 2)
        super().open(problem)

    def verify(self, candidate: Candidate) -> float:
        strike("verify", self.problems == 2)
        return super().verify(candidate)

    def time(self, ways: Sequence[Candidate]) -> list[list[float]]:
        strike("time", self.problems == 2)
        return super().time(ways)


def strike(stage: str, now: bool) -> None:
    if now and stage == sys.argv[1]:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))


def strikes_second(function, before: str, after: str = ""):
    calls = [0]

    def patched(*args, **kwargs):
        calls[0] += 1
        strike(before, calls[0] == 2)
        result = function(*args, **kwargs)
        strike(after, calls[0] == 2)
        return result

    return patched


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background is born deaf to it
    tuned.render = strikes_second(tuned.render, "write")
    cache.os.fsync = strikes_second(os.fsync, "fsync")
    cache.os.replace = strikes_second(os.replace, "replace", "replaced")
    problems = [problem(n=n) for n in (1, 2, 3)]
    report = tune_problems(problems, GPU, Killed(), compiled=lambda problem, ways: {})
    print(len(report.tuned), len(report.known))
