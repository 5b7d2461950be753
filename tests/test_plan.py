"""The plan: which road is requested, and when fp32 may be rounded to TF32."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from resnet_fused import plan


@pytest.fixture
def cudnn():
    yield torch.backends.cudnn
    torch.backends.cudnn.allow_tf32 = True


def test_tf32_follows_both_of_torchs_settings(cudnn):
    for allowed in (False, True):
        cudnn.allow_tf32 = allowed
        assert plan.tf32(torch.float32) is allowed
    cudnn.conv.fp32_precision = "ieee"
    assert not plan.tf32(torch.float32)
    cudnn.conv.fp32_precision = "tf32"
    assert plan.tf32(torch.float32)
    assert not plan.tf32(torch.bfloat16)


@pytest.mark.parametrize(("value", "code", "text"), [("eager", 0, "eager"), ("cuda", 1, "RESNET_FUSED must be one of")])
def test_environment_variable(value, code, text):
    command = [sys.executable, "-c", "from resnet_fused import plan; print(plan.requested())"]
    environment = {**os.environ, "RESNET_FUSED": value}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == code
    assert text in run.stdout + run.stderr
