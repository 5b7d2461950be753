"""Which share of the arithmetic of timm's ResNets is in launches of this library, as a table: run as a module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from resnet_fused import fuse, implementation, trace
from resnet_fused.convert import Found, find
from resnet_fused.explain import fused_share
from resnet_fused.kernels.launch import dry_run
from resnet_fused.pieces import UnitsLayout

from .count import PLANNED

PATTERNS = (
    *("resnet*", "resnext*", "wide_resnet*", "seresnet*", "seresnext*", "ecaresnet*", "ecaresnext*", "resnetv2*"),
    *("res2net*", "resnest*", "skresnet*", "skresnext*", "gcresnet*", "gcresnext*", "legacy_seresne*"),
)
LEFT_OUT = ("101", "152", "200", "201", "269", "270", "350", "420", "x16_clip", "x64_clip", "_bit")
"""Deeper and wider ones have the same blocks; BiT's convolutions are none of PyTorch's."""

BATCH = 32
ENOUGH = 0.95


class Row(NamedTuple):
    """One network: the share in inference and in a training step, and for each reason the share that is left."""

    name: str
    inference: float
    training: float
    rest: tuple[tuple[str, float], ...]


def names() -> list[str]:
    """The networks of the table."""
    found = dict.fromkeys(name for pattern in PATTERNS for name in timm.list_models(pattern))
    return [name for name in found if not any(part in name for part in LEFT_OUT)]


def planned(name: str) -> Row:
    """The row of one network, planned for the GPU of :data:`PLANNED` on tensors without data; nothing is run."""
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    size = model.default_cfg["input_size"]
    model = fuse(model.to_empty(device="cpu").to(torch.bfloat16, memory_format=torch.channels_last))
    found = list(find(model))
    names = {id(parameter): name.removesuffix(".weight") for name, parameter in model.named_parameters()}
    with _Convolutions() as left:
        inference, work = _share(model, size, training=False)
    reasons: Counter[str] = Counter()
    for parameter, flops in left.flops:
        reasons[_reason(found, names.get(parameter))] += flops
    training, _ = _share(model, size, training=True)
    return Row(name, inference, training, tuple((reason, flops / work) for reason, flops in reasons.most_common()))


def _share(model: nn.Module, size: tuple[int, int, int], training: bool) -> tuple[float, int]:
    """The share, and the floating-point operations of all convolutions."""
    model.train(training)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, dry_run(PLANNED), implementation("triton"), torch.set_grad_enabled(training), trace() as seen:
        x = torch.empty(BATCH, *size, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        z = model(x)
        if training:
            z.backward(torch.empty_like(z))
    convolutions = [x for x in seen.launches if x.config is not None or x.name.startswith("aten.convolution")]
    return fused_share(convolutions) or 0.0, sum(x.flops for x in convolutions)


class _Convolutions(TorchFunctionMode):
    """Notes the filter and the floating-point operations of every convolution that is a call of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.conv2d:
            self.flops.append((id(args[1]), 2 * result.numel() * args[1][0].numel()))
        return result


def _reason(found: Sequence[Found], name: str | None) -> str:
    """Why the convolution of this name is in no unit; in a block, without the names of its parts."""
    if name is None:
        return "a filter is no parameter"
    for block in found:
        inside = name.removeprefix(f"{block.name}.") if block.name else name
        if isinstance(block.verdict, UnitsLayout) and inside != name:
            return f"{inside}: {dict(block.verdict.rest).get(inside, 'it is called by a module without units')}"
        if isinstance(block.verdict, str) and inside != name:
            return block.verdict
    return f"{name} is in no block"


def table(rows: Sequence[Row]) -> str:
    """``docs/family.md``."""
    enough = [sum(share >= ENOUGH for share in shares) for shares in zip(*(row[1:3] for row in rows), strict=True)]
    lines = [
        "# timm's ResNets",
        "",
        f"Which share of the convolutions' arithmetic this library launches, in {len(rows)} networks of timm",
        f'{timm.__version__}: planned for an H100 with `implementation("triton")` in bf16, counted on tensors without',
        "data by `python -m resnet_fused.benchmarks.family`; nothing was run.",
        "",
        f"At least {ENOUGH:.0%}: {enough[0]} of {len(rows)} in inference, {enough[1]} in a training step.",
        "",
        "| network | inference | training step | the rest of an inference |",
        "|---|---|---|---|",
        *(f"| {row.name} | {row.inference:.1%} | {row.training:.1%} | {_rest(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _rest(row: Row) -> str:
    return "; ".join(f"{share:.1%} {reason}" for reason, share in row.rest[:2] if share >= 0.001)


def main() -> None:
    """Write ``docs/family.md`` beside the package's sources."""
    path = Path(__file__).parent.parent / "docs" / "family.md"
    path.write_text(table([planned(name) for name in names()]))


if __name__ == "__main__":
    main()
