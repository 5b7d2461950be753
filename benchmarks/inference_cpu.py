"""Whole-network inference on the CPU, every way side by side: ``python -m benchmarks.inference_cpu``.

One round calls each variant once, in an order that shifts from round to round, so that whatever else the machine does
meets all of them alike.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import optimize_for_inference
from resnet_fused.table import render

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Variant = Callable[[Tensor], Tensor]


def variants(model: nn.Module, x: Tensor) -> dict[str, Variant]:
    """What is compared, by name; every variant takes ``x`` [N, 3, H, W] in its own favourite memory format."""
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(copy.deepcopy(channels_last))
        compiled(x.contiguous(memory_format=torch.channels_last))
    return {
        "eager": model,
        "eager channels_last": channels_last,
        "jit.optimize_for_inference": torch.jit.optimize_for_inference(torch.jit.trace(model, x)),
        "compile + freezing": compiled,
        "resnet_fused": optimize_for_inference(model, x),
    }


def measure(ways: dict[str, Variant], x: Tensor, rounds: Iterable[int]) -> dict[str, list[float]]:
    """Milliseconds of every call, by variant, after two calls to warm each up."""
    inputs = {n: x if n in ("eager", "jit.optimize_for_inference") else _channels_last(x) for n in ways}
    for name, way in ways.items():
        for _ in range(2):
            way(inputs[name])
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for i in rounds:
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            ways[name](inputs[name])
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    options = _options()
    print(machine())
    rows: list[tuple[object, ...]] = []
    for name in options.models:
        for batch in options.batch:
            for dtype in options.dtype:
                setting = f"{name} batch {batch} {dtype}"
                rows += [(setting, *row) for row in _rows(name, batch, DTYPES[dtype], options.rounds, setting)]
    columns = ["setting", "variant", "median ms", "min ms", "max ms", "median / best other"]
    print(render("CPU inference", columns, rows))


@torch.no_grad()
def _rows(name: str, batch: int, dtype: torch.dtype, rounds: int, title: str) -> list[tuple[object, ...]]:
    torch.manual_seed(0)
    model = getattr(_zoo(), name)().eval().to(dtype)
    x = torch.randn(batch, 3, 224, 224).to(dtype)
    times = measure(variants(model, x), x, _progress(rounds, title))
    medians = {way: statistics.median(values) for way, values in times.items()}
    best = min(value for way, value in medians.items() if way != "resnet_fused")
    return [
        (way, round(medians[way], 1), round(min(values), 1), round(max(values), 1), round(medians[way] / best, 2))
        for way, values in times.items()
    ]


def machine() -> str:
    """CPU, threads and versions, in one line."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}, resnet_fused {resnet_fused.__version__}, Python {platform.python_version()}"
    return f"{cpu} ({capability}), {torch.get_num_threads()} threads; {versions}"


def _zoo() -> object:
    """torchvision's models, or ours where it is not installed."""
    try:
        import torchvision.models
    except ImportError:
        return resnet_fused
    return torchvision.models


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _progress(rounds: int, title: str) -> Iterable[int]:
    try:
        from rich.progress import track
    except ImportError:
        return range(rounds)
    return track(range(rounds), title, transient=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"], help="names in torchvision.models")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20, help="calls of each variant")
    return parser.parse_args()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # the TorchScript baseline is deprecated, and says so in every setting
    main()
