"""What the commands of the command line share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TypeVar

import torch

from resnet_fused.kernels.gpus import ARCHITECTURES
from resnet_fused.kernels.launch import interpreting

MODELS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
)
T = TypeVar("T")
DTYPES = ("float32", "float16", "bfloat16")


class UserError(Exception):
    """A mistake in what the user asked for; its message is one line for the screen."""


class NeedsInterpreter(Exception):
    """The command must start over in a process whose kernels run in Triton's interpreter."""


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name a network, its input and what is done with it."""
    add = parser.add_argument
    add("--model", default="resnet50", choices=MODELS, metavar="NAME", help=f"one of {', '.join(MODELS)}")
    add("--batch", type=int, default=32, metavar="N", help="images (default: 32)")
    add("--size", type=int, default=224, metavar="PIXELS", help="side of the network's input (default: 224)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    add("--train", action="store_true", help="a training step, not inference")


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


def tracked(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
    """``items``, with a progress bar and the time left on standard error where rich is installed and somebody watches.

    ``total``: how many they are, where they have no length.
    """
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track
        except ImportError:
            pass
        else:
            return track(items, label, total, console=Console(stderr=True), transient=True)
    print(f"{label} ...", file=sys.stderr, flush=True)
    return items
