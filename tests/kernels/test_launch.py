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
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
class Fake:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = get_current_stream = staticmethod(lambda *device: 0)
driver.set_active(Fake())
from resnet_fused.problem import Problem
from resnet_fused.trial import Candidate, rehearse
sizes = 3, 7, 5, 64, 60, 3, 3, (1, 1), (1, 1), (1, 1), 1
calls, _ = rehearse(Problem(*sizes, torch.bfloat16, False, "training", True, False, 90), Candidate("fused"))
for call in calls:
    jitted = call.kernel.warmup(grid=call.grid, **call.arguments, **call.config.options)
    print(call.kernel.__name__, call.compile(90).hash == jitted.hash)
"""
    lines = compiler_on(code, check=True).stdout.splitlines()
    assert len(lines) >= 5
    assert all(line.endswith("True") for line in lines), lines


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
