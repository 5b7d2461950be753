"""A tuner of three problems that is killed at a stage of the second."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence

from resnet_fused.commands.tune import tune_problems
from resnet_fused.commands.tune_trial import Candidate
from resnet_fused.plan import cache, tuned
from tests.test_tune import GPU, FakeRunner, problem

Strike = Callable[[str, bool], None]


class Killed(FakeRunner):
    def __init__(self, strike: Strike) -> None:
        super().__init__()
        self.strike = strike

    def open(self, problem) -> None:
        self.strike("open", len(self.opened) == 1)
        super().open(problem)

    def verify(self, candidate: Candidate) -> float:
        self.strike("verify", len(self.opened) == 2)
        return super().verify(candidate)

    def time(self, ways: Sequence[Candidate]) -> list[list[float]]:
        self.strike("time", len(self.opened) == 2)
        return super().time(ways)


def run(stage: str, number: signal.Signals) -> int | None:
    """How a process of its own ends that tunes and kills itself at the stage; a fork, since it need import nothing."""
    process = multiprocessing.get_context("fork").Process(target=_tune, args=(stage, number))
    process.start()
    process.join(60)
    return process.exitcode


def _tune(stage: str, number: signal.Signals) -> None:
    def strike(here: str, now: bool) -> None:
        if now and here == stage:
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background is born deaf to it
    tuned.render = _strikes_second(strike, tuned.render, "write")
    cache.os.fsync = _strikes_second(strike, os.fsync, "fsync")
    cache.os.replace = _strikes_second(strike, os.replace, "replace", "replaced")
    tune_problems([problem(n=n) for n in (1, 2, 3)], GPU, Killed(strike), compiled=lambda problem, ways: {})


def _strikes_second(strike: Strike, function, before: str, after: str = ""):
    calls = [0]

    def patched(*args, **kwargs):
        calls[0] += 1
        strike(before, calls[0] == 2)
        result = function(*args, **kwargs)
        strike(after, calls[0] == 2)
        return result

    return patched
