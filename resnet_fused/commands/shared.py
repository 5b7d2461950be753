"""What the commands of the command line share."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from torch import nn

from resnet_fused import models, models_v2
from resnet_fused.kernels.gpus import ARCHITECTURES
from resnet_fused.kernels.launch import interpreting
from resnet_fused.plan.decide import arch_of
from resnet_fused.plan.problem import DTYPES

T = TypeVar("T")
NETWORKS = models.MODELS | models_v2.MODELS
"""The names of all that :func:`network` makes, each with the side of the images that it is made for."""
MAX_IMAGES, MAX_PIXELS, MAX_ROUNDS = 2**16, 2**12, 10**6
"""The largest batch, side of an image, and number of calls that a command takes."""


class UserError(Exception):
    """A mistake in what the user asked for; its message is one line for the screen."""


class NeedsInterpreter(Exception):
    """The command must start over in a process whose kernels run in Triton's interpreter."""


class Parser(argparse.ArgumentParser):
    """A parser to which a mistake is the user's, in one line, as any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def whole(least: int, most: int) -> Callable[[str], int]:
    """What reads a number from ``least`` to ``most`` on the command line."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:  # of too many digits, too
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}; got {text[:40]!r}")
        return number

    return read


images, pixels, rounds = whole(1, MAX_IMAGES), whole(32, MAX_PIXELS), whole(1, MAX_ROUNDS)
"""What reads ``--batch``, ``--size`` (ResNets halve an image five times) and ``--rounds``."""


def require_writable(folder: Path, option: str) -> None:
    """Raise UserError unless files can be made in ``folder``, or in that which it will be made in; leaves nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"{option} {folder}: {error.strerror}") from None


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs ``module`` in a process that imports from where this one does.

    Not from its current directory, which ``python -m`` and ``python -c`` put first: what lies there may be anybody's.
    """
    # Last comes where this package is, in case the directory was all that led there.
    path = [*filter(None, sys.path), str(Path(__file__).parents[2])]
    code = f"import sys; sys.path = {path}; import runpy; runpy.run_module({module!r}, None, '__main__', True)"
    return [sys.executable, "-c", code, *arguments]


@contextmanager
def chosen_input() -> Iterator[None]:
    """What a network says of an input that it does not take, such as one value per channel in training, is a mistake.

    Raises UserError for ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def add_size_argument(parser: argparse.ArgumentParser) -> None:
    """The option ``--size``, None without it: each model then takes images of the side that it is made for."""
    parser.add_argument(
        "--size", type=pixels, metavar="PIXELS", help="side of the input (default: what each model is made for)"
    )


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name a network, its input and what is done with it."""
    add = parser.add_argument
    add("--model", default="resnet50", choices=NETWORKS, metavar="NAME", help=f"one of {', '.join(NETWORKS)}")
    add("--batch", type=images, default=32, metavar="N", help="images (default: 32)")
    add_size_argument(parser)
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    add("--train", action="store_true", help="a training step, not inference")


def network(name: str) -> nn.Module:
    """The one of :data:`NETWORKS` with this name."""
    made: nn.Module = getattr(models if name in models.MODELS else models_v2, name)()
    return made


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
        return arch_of(torch.device("cuda", torch.cuda.current_device()))
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
