"""What the commands of the command line share."""

from __future__ import annotations

import torch

from resnet_fused.kernels.gpus import ARCHITECTURES
from resnet_fused.kernels.launch import interpreting

MODELS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
)
DTYPES = ("float32", "float16", "bfloat16")


class UserError(Exception):
    """A mistake in what the user asked for; its message is one line for the screen."""


class NeedsInterpreter(Exception):
    """The command must start over in a process whose kernels run in Triton's interpreter."""


def pick_device(name: str | None) -> torch.device:
    """The device to run on: the one named, else a CUDA GPU if there is one, else the CPU.

    Raises UserError for a device that is not there, NeedsInterpreter for the CPU where the interpreter is off.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {name}: PyTorch knows no such device") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: the kernels run on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here")
    if device.type == "cuda" and interpreting():
        raise UserError("TRITON_INTERPRET is set: unset it to run the kernels on the GPU, or pass --device cpu")
    if device.type == "cpu" and not interpreting():
        raise NeedsInterpreter
    return device


def pick_arch(name: str | None) -> int:
    """The architecture named (``sm_90``, or ``90``), else that of the GPU here. Raises UserError for one unknown."""
    if name is None:
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA GPU here: name an architecture to plan for, as --arch sm_90")
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    number = name.removeprefix("sm_")
    if not number.isdecimal() or int(number) not in ARCHITECTURES:
        raise UserError(f"--arch {name}: must be one of {', '.join(f'sm_{arch}' for arch in ARCHITECTURES)}")
    return int(number)
