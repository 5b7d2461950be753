"""The command line: ``python -m resnet_fused``, also installed as ``resnet-fused``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from resnet_fused import __version__, demo
from resnet_fused.kernels.launch import interpreting


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: the process's own); returns the exit code: 2 for a user's mistake."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(arguments)
    try:
        device = demo.pick_device(options.device)
        if device.type == "cpu" and not interpreting():
            _restart_with_interpreter(arguments)
        demo.run(options.model, options.image, options.weights, device, options.dtype, options.size)
    except demo.UserError as error:
        print(f"resnet_fused: {error}", file=sys.stderr)
        return 2
    return 0


def _restart_with_interpreter(arguments: list[str]) -> None:
    """Start over with Triton's interpreter on, which must be chosen before the kernels are imported."""
    print("On a CPU the kernels run in Triton's interpreter: starting it ...", flush=True)
    command = [sys.executable, "-m", "resnet_fused", *arguments]
    os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resnet_fused", description="Fused residual blocks for PyTorch.")
    parser.add_argument("--version", action="version", version=f"resnet_fused {__version__}")
    command = parser.add_subparsers(metavar="command", required=True).add_parser(
        "demo",
        help="classify photographs with a ResNet, eager and fused",
        description="Classify photographs with a ResNet, eager and fused; compare answers, times and memory traffic.",
    )
    add = command.add_argument
    add("--model", default="resnet50", choices=demo.MODELS, metavar="NAME", help=f"one of {', '.join(demo.MODELS)}")
    add("--image", nargs="+", type=Path, default=[], metavar="FILE", help="photographs (default: scikit-image's)")
    add("--weights", type=Path, metavar="FILE", help="state dict, .pth or .safetensors (default: random weights)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: a CUDA GPU if there is one)")
    add("--dtype", choices=demo.DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--size", type=int, default=224, metavar="PIXELS", help="side of the network's input (default: 224)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
