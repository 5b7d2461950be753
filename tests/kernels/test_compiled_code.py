"""Every kernel that the models can launch, compiled for every supported GPU: tensor cores used, nothing spilled.

Compilation needs no GPU, but it needs Triton's compiler in place of its interpreter, so it runs in processes of its
own. Triton caches what it compiled, so that only the first run takes minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_fused.kernels.gpus import ARCHITECTURES, gpu_of

ROOT = Path(__file__).parents[2]
MODELS = ("resnet20", "resnet18", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2")
TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}

TENSOR_CORE_KERNELS = ("conv_forward_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills_and_tensor_cores(arch):
    kernels = compile_all(arch)
    assert len(kernels) >= 80
    assert set(TENSOR_CORE_KERNELS) <= {kernel["kernel"] for kernel in kernels}
    for kernel in kernels:
        label = f"sm_{arch}: {kernel}"
        assert kernel["spilled_bytes"] == 0, label
        assert kernel["registers"] <= 255, label
        assert kernel["contracted_sums"] == 0, label
        assert kernel["shared"] <= gpu_of(arch).shared, label
        if kernel["number_format"] != "float32" and kernel["kernel"] in TENSOR_CORE_KERNELS:
            # The wide instructions of sm_90 and sm_100 take 64 rows at the least.
            wide = kernel["arguments"]["BLOCK_M"] >= 64
            assert (TENSOR_CORE[arch] if wide else "mma.sync") in kernel["ptx_instructions"], label


def compile_all(arch: int) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_models", str(arch), *MODELS]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
