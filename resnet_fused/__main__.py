"""The command line: ``python -m resnet_fused``, also installed as ``resnet-fused``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import torch

from resnet_fused import __version__
from resnet_fused.commands.shared import NeedsInterpreter, Parser, UserError, python

COMMANDS = {
    "demo": ("commands.demo", "classify photographs with a ResNet, eager and fused"),
    "env": ("commands.env", "tell what a report of a fault should: versions, GPU, flags, cache and tables"),
    "check": ("commands.check", "compare every kernel with eager PyTorch on this machine"),
    "tune": ("commands.tune", "measure which way each unit of a ResNet is fastest on this GPU, and keep it"),
    "bench": ("benchmarks.run", "time ResNets and their layers against every other way to run them"),
    "explain": ("commands.explain", "show how each unit of a ResNet would run on a GPU, and why"),
    "cost": ("commands.cost", "compile the planned kernels for any GPU and show what they cost"),
}
"""Each names a module, with ``add_arguments(parser)`` and ``main(options) -> exit code``, and says what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: the process's own); returns the exit code: 2 for a user's mistake."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="resnet_fused", description="Fused residual blocks for PyTorch.")
    parser.add_argument("--version", action="version", version=f"resnet_fused {__version__}")
    subparsers = parser.add_subparsers(metavar="command", dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        importlib.import_module(f"resnet_fused.{module}").add_arguments(command)
    try:
        options = parser.parse_args(arguments)
        return int(importlib.import_module(f"resnet_fused.{COMMANDS[options.command][0]}").main(options))
    except NeedsInterpreter:
        _restart_with_interpreter(arguments)
    except UserError as error:
        _complain(str(error))
    except (MemoryError, RuntimeError) as error:
        # On a CPU, PyTorch has no type of its own for it.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        _complain(f"out of memory: {error}")
    return 2


def _complain(message: str) -> None:
    print("resnet_fused:", " ".join(message.splitlines()), file=sys.stderr)


def _restart_with_interpreter(arguments: list[str]) -> None:
    """Start over with Triton's interpreter on, which must be chosen before the kernels are imported."""
    print("On a CPU the kernels run in Triton's interpreter: starting it ...", file=sys.stderr, flush=True)
    os.execve(sys.executable, python("resnet_fused", *arguments), {**os.environ, "TRITON_INTERPRET": "1"})


if __name__ == "__main__":
    sys.exit(main())
