"""The note of the GPUs and versions on which the self-test found the kernels right."""

from __future__ import annotations

import ctypes
import json
import logging
from functools import cache
from pathlib import Path

import torch
from torch import nn

from resnet_fused.plan import decide
from resnet_fused.plan.cache import cache_dir, locked, read, versions, write_whole

logger = logging.getLogger("resnet_fused")


COMMAND = "python -m resnet_fused check"


def stack(device: torch.device) -> dict[str, str]:
    """What compiled code on ``device`` depends on: its GPU and driver ("" for the CPU) and the software's versions."""
    on_gpu = device.type == "cuda"
    gpu = {"gpu": torch.cuda.get_device_name(device) if on_gpu else "", "driver": _driver() if on_gpu else ""}
    return gpu | versions()


@cache
def _driver() -> str:
    """The version of NVIDIA's driver, which compiles nothing but loads everything; "unknown" where NVML is missing."""
    text = ctypes.create_string_buffer(80)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlSystemGetDriverVersion(text, len(text)) != 0:
        return "unknown"
    return text.value.decode()


def verified(device: torch.device) -> bool:
    """Whether the self-test passed on the :func:`stack` of ``device`` before, as :func:`note` wrote it down."""
    return stack(device) in _noted()


def note(device: torch.device) -> Path:
    """Write down that the self-test passed on the :func:`stack` of ``device``; returns the file.

    Raises OSError where it cannot be written.
    """
    path = _note_path()
    with locked(path):
        stacks = [known for known in _noted() if known != stack(device)] + [stack(device)]
        write_whole(path, json.dumps(stacks, indent=1))
    return path


def _note_path() -> Path:
    return cache_dir() / "checked.json"


def _noted() -> list[object]:
    """The stacks in the file; none if it is missing or corrupt, which costs no more than another self-test."""
    try:
        stacks = json.loads(read(_note_path()))
    except (OSError, ValueError, RecursionError):
        return []
    return stacks if isinstance(stacks, list) else []


_reminded = False


def remind_once(model: nn.Module) -> None:
    """Log, the first time that ``model`` lies on a GPU on which the self-test has not passed yet, how to run it."""
    global _reminded
    if _reminded or not torch.cuda.is_available():
        return
    device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    if device is None or decide.why_too_old(device) or verified(device):
        return
    _reminded = True
    name = torch.cuda.get_device_name(device)
    logger.warning("the kernels were not checked yet on this %s with these versions: run `%s`", name, COMMAND)
