"""Calls as values: observed, planned without running; and where nothing can run them."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from resnet_fused.kernels.conv_forward import conv_forward
from resnet_fused.kernels.launch import INTERPRETER, dry_run, dry_target, interpreting, observe, target_arch

ROOT = Path(__file__).parents[2]


def planned(n: int = 8, ci: int = 64, arch: int = 90):
    calls = []
    with dry_run(arch), observe(calls.append):
        x = torch.empty(n, ci, 14, 14, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
        y = conv_forward(x, torch.empty(128, ci, 1, 1, dtype=torch.float16, device="meta"))
    assert y.shape == (n, 128, 14, 14)
    return calls[0]


def test_dry_run_launches_nothing_and_ends():
    call = planned()
    assert call.arguments["M"] == 8 * 14 * 14
    assert dry_target() is None


@pytest.mark.skipif(not interpreting(), reason="a GPU runs the compiled kernels, the interpreter is off")
def test_target_of_the_interpreter():
    assert target_arch() == INTERPRETER


def test_specialisation_follows_divisibility_and_not_the_batch():
    code = """
from tests.kernels.test_launch import planned
assert planned(n=64).specialization() == planned(n=65).specialization()
assert planned(ci=64).specialization() != planned(ci=60).specialization()
"""
    compiler_on(code, check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that the JIT would compile for is a fake one here")
def test_what_is_compiled_ahead_the_jit_finds_in_the_cache():
    code = """
from resnet_fused.problem import Problem
from resnet_fused.trial import Candidate, rehearse
sizes = 3, 7, 5, 64, 60, 3, 3, (1, 1), (1, 1), (1, 1), 1
calls, _ = rehearse(Problem(*sizes, torch.bfloat16, False, "training", True, False, 90), Candidate("fused"))
for call in calls:
    jitted = call.kernel.warmup(grid=call.grid, **call.arguments, **call.config.options)
    print(call.kernel.__name__, call.compile(90).hash == jitted.hash)
"""
    lines = compiler_on(STAND_IN + code, check=True).stdout.splitlines()
    assert len(lines) >= 5
    assert all(line.endswith("True") for line in lines), lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is launched on is a fake one here")
def test_a_launch_without_the_jit_is_what_the_jit_would_launch():
    """Whatever changes: sizes, which tensors there are, their dtypes, and how their addresses are aligned."""
    code = """
from resnet_fused.kernels.batch_norm import batch_norm_stats
from resnet_fused.kernels.conv_forward import conv_forward
from resnet_fused.kernels.launch import observe
from resnet_fused.kernels.tile import Norm
from triton.runtime.jit import JITFunction

def unit(n=2, offset=0, norm=True, dtype=torch.bfloat16, vectors=torch.float32):
    x = torch.zeros(n, 64, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    vector = torch.zeros(65, dtype=vectors)[offset : offset + 64]
    normalise = Norm(vector, vector, None, None, 1e-5) if norm else None
    conv_forward(x, torch.zeros(64, 64, 1, 1, dtype=dtype), bias=vector, norm=normalise)
    batch_norm_stats(None, vector, None, 1e-5, running_mean=vector, running_var=vector)

changes = [{}, {"n": 1}, {"offset": 1}, {"norm": False}, {"dtype": torch.float16}, {"vectors": torch.float16}]
run = JITFunction.run
for round in range(2):
    for change in changes:
        launched.clear()
        calls = []
        JITFunction.run = None if round else run
        with observe(calls.append):
            unit(**change)
        JITFunction.run = run
        for call, launch in zip(calls, launched[:], strict=True):
            jitted = call.kernel.warmup(grid=call.grid, **call.arguments, **call.config.options)
            expected = [call.arguments[name] for name in call.kernel.arg_names]
            right = launch[:3] == (*call.grid, 1, 1)[:3] and launch[4] == jitted.function
            print(round, right and all(a is b for a, b in zip(launch[9:], expected, strict=True)))
"""
    lines = compiler_on(STAND_IN + code, check=True).stdout.splitlines()
    assert lines == ["0 True"] * 12 + ["1 True"] * 12


STAND_IN = """
import torch
from resnet_fused.benchmarks import stand_in

launched = []
stand_in.install(90, lambda *arguments: launched.append(arguments))
"""


def test_a_dry_run_is_that_of_its_thread():
    with dry_run(90, "NVIDIA H200"), ThreadPoolExecutor() as pool:
        assert dry_target() == (90, "NVIDIA H200")
        assert pool.submit(dry_target).result() is None


def test_observers_are_forgotten():
    calls = []
    with observe(calls.append):
        pass
    planned()
    assert calls == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels can be executed")
def test_without_gpu_and_interpreter_the_error_says_so():
    code = (
        "import torch; from resnet_fused.kernels.conv_forward import conv_forward;"
        "conv_forward(torch.zeros(1, 16, 1, 1), torch.zeros(16, 16, 1, 1))"
    )
    run = compiler_on(code, check=False)
    assert run.returncode == 1
    assert "RuntimeError: nothing here can execute a Triton kernel" in run.stderr
    assert "TRITON_INTERPRET=1" in run.stderr


def compiler_on(code: str, check: bool) -> subprocess.CompletedProcess:
    """Run ``code`` in a process where Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=check)
