"""Where something was measured: processor, GPU, versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from resnet_fused.plan.checked import stack

PACKAGES = (
    *("numpy", "torchvision", "timm", "transformers"),
    *("onnxruntime", "openvino", "torch_tensorrt", "nvidia-cudnn-frontend", "matplotlib"),
)


def describe(device: torch.device) -> dict[str, str]:
    """Processor, threads, load, GPU and versions, by what they are; "none" for what is not there."""
    versions = {name: version for name, version in stack(device).items() if name not in ("gpu", "driver")}
    on_gpu = device.type == "cuda"
    gpu = {
        "GPU": stack(device)["gpu"] if on_gpu else "none",
        "GPU driver": stack(device)["driver"] if on_gpu else "none",
        "cuDNN": str(torch.backends.cudnn.version()) if on_gpu else "none",
        "CUDA": str(torch.version.cuda) if on_gpu else "none",
    }
    return {
        "processor": f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "load average": ", ".join(f"{load:.1f}" for load in os.getloadavg()),
        **gpu,
        "system": platform.platform(),
        "Python": platform.python_version(),
        **versions,
        **{package: _version(package) for package in PACKAGES},
    }


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
