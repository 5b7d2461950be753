"""Conversion of existing models in place: blocks are recognised by structure and their class is swapped."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from resnet_fused import functional, plan
from resnet_fused.modules import FusedBlock, Layout, Unit
from resnet_fused.reference import conv_bn_act
from resnet_fused.table import render
from resnet_fused.trace import Launch, trace

Filter = Callable[[str, nn.Module], bool]


class ConvertedBlock(FusedBlock):
    """A block of another library with this class in place of its own; eager, it runs its own class's forward."""

    original: type[nn.Module]
    relaid: tuple[str, ...]

    def eager_forward(self, x: Tensor) -> Tensor:
        return self.original.forward(self, x)


class ConvertedSequential(nn.Sequential):
    """An ``nn.Sequential`` whose runs of convolution, batch norm and ReLU are one launch each."""

    original: type[nn.Module] = nn.Sequential
    relaid: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        children = list(self)
        at = 0
        while at < len(children):
            run = _run_length(children[at : at + 3])
            if run and functional.why_eager(x, [(children[at], children[at + 1])]) is None:
                x = functional.launch(x, *children[at : at + 2], relu=run == 3)  # type: ignore[arg-type]
                at += run
            else:
                x = children[at](x)
                at += 1
        return x


def _run_length(modules: list[nn.Module]) -> int:
    """How many of the first modules make one launch: convolution, batch norm and perhaps a ReLU; 0 if none do."""
    if len(modules) < 2 or not isinstance(modules[1], nn.modules.batchnorm._BatchNorm):
        return 0
    if functional.why_unfusable(modules[0], modules[1]) is not None:
        return 0
    return 3 if len(modules) > 2 and type(modules[2]) is nn.ReLU and not functional.hooked(modules[2]) else 2


def fuse(model: nn.Module, *, filter_fn: Filter | None = None, strict: bool = False) -> nn.Module:
    """Let the residual blocks of ``model`` run fused, in place; returns ``model``.

    Recognises, by their submodules, the blocks of torchvision's ResNets, of timm's plain, ``d``, ResNeXt and wide ResNets,
    and of Hugging Face's ``ResNetForImageClassification``, and runs of convolution, batch norm and ReLU in an
    ``nn.Sequential``. A recognised block is checked once against its own forward, in fp64, before its class is swapped. Keys,
    ``Parameter`` objects and values stay; the weights of fused convolutions become channels_last in memory. Works before
    or after loading, moving, wrapping or training, and again on a model that is fused already.

    ``filter_fn(name, module)``: return False to leave a block alone. ``strict``: raise ValueError, changing nothing, if
    any block cannot be fused. Warns (UserWarning) if nothing was fused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__qualname__}")
    found = [f for f in _find(model) if filter_fn is None or filter_fn(f.name, f.module)]
    refused = [f for f in found if isinstance(f.verdict, str)]
    if strict and refused:
        reasons = "\n".join(f"  {f.name or '(the model)'}: {f.verdict}" for f in refused)
        raise ValueError(f"model has {len(refused)} block(s) that cannot be fused:\n{reasons}")
    for block in found:
        _swap(block)
    if len(found) == len(refused):
        reasons = "; ".join(sorted({str(f.verdict) for f in refused})) or "no residual block was recognised"
        warnings.warn(f"nothing was fused: {reasons}", UserWarning, stacklevel=2)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse` in place: every converted module has its own class and memory format again; returns ``model``."""
    for module in model.modules():
        if isinstance(module, ConvertedBlock | ConvertedSequential):
            for name in module.relaid:
                conv = cast(nn.Conv2d, module.get_submodule(name))
                conv.weight.data = conv.weight.data.contiguous()
            original = module.original
            for attribute in ("layout", "original", "relaid"):
                module.__dict__.pop(attribute, None)
            module.__class__ = original
    return model


@dataclass
class _Found:
    """A module that is or could be fused; ``verdict``: its layout, True for a run or a fused block, or why not."""

    name: str
    module: nn.Module
    verdict: Layout | bool | str


def _find(model: nn.Module) -> Iterator[_Found]:
    """Every block of ``model``, from the outside in; what lies inside a block belongs to it."""
    pending = [("", model)]
    while pending:
        name, module = pending.pop(0)
        verdict = _examine(module)
        if verdict is not None:
            yield _Found(name, module, verdict)
        if verdict is None or isinstance(module, nn.Sequential):
            pending += [(f"{name}.{child}".lstrip("."), m) for child, m in module.named_children()]


def _examine(module: nn.Module) -> Layout | bool | str | None:
    """The verdict on ``module``, or None if it is neither a block nor a run."""
    if isinstance(module, FusedBlock | ConvertedSequential):
        return True
    if type(module) is nn.Sequential:
        children = list(module)
        return True if any(_run_length(children[i : i + 3]) for i in range(len(children))) else None
    children = dict(module.named_children())
    if {"conv1", "bn1", "conv2"} <= children.keys():
        layout = _numbered_layout(module, children)
    elif {"layer", "shortcut", "activation"} <= children.keys() and isinstance(children["layer"], nn.Sequential):
        layout = _named_layout(module, children)
    elif {"convolution", "normalization", "activation"} <= children.keys():
        layout = _single_layout(children)
    else:
        return None
    return layout if isinstance(layout, str) else _why_unfusable(module, layout) or layout


def _numbered_layout(module: nn.Module, children: dict[str, nn.Module]) -> Layout | str:
    """Blocks with ``conv1, bn1, conv2, bn2 ...`` and ``downsample``: torchvision, timm."""
    depth = next(i for i in range(1, 100) if f"conv{i + 1}" not in children)
    norms = [name for name in (f"bn{i}" for i in range(1, depth + 1)) if name not in children]
    if norms:
        return f"it has no {norms[0]}"
    numbered = {f"{kind}{i}" for kind in ("conv", "bn") for i in range(1, depth + 1)}
    for name, child in children.items():
        if name not in numbered and name != "downsample" and type(child) not in (nn.ReLU, nn.Identity):
            return f"{name} is {type(child).__qualname__}"
    units = tuple(Unit(f"conv{i}", f"bn{i}") for i in range(1, depth + 1))
    downsample = children.get("downsample")
    if downsample is None:
        return Layout(units)
    parts = list(downsample.children()) if type(downsample) is nn.Sequential else []
    if len(parts) == 3 and type(parts[0]) in (nn.AvgPool2d, nn.Identity):
        return Layout(units, Unit("downsample.1", "downsample.2", relu=False), pool="downsample.0")
    if len(parts) == 2:
        return Layout(units, Unit("downsample.0", "downsample.1", relu=False))
    return f"downsample is {type(downsample).__qualname__} of {', '.join(type(p).__qualname__ for p in parts) or 'unknown'}"


def _named_layout(module: nn.Module, children: dict[str, nn.Module]) -> Layout | str:
    """Blocks with a ``layer`` of (convolution, normalization, activation) and a ``shortcut``: Hugging Face."""
    extra = children.keys() - {"layer", "shortcut", "activation"}
    if extra:
        return f"it has a submodule {min(extra)}"
    if type(children["activation"]) is not nn.ReLU:
        return f"activation is {type(children['activation']).__qualname__}"
    units = []
    for name, part in children["layer"].named_children():
        parts = dict(part.named_children())
        last = len(units) == len(cast(nn.Sequential, children["layer"])) - 1
        if parts.keys() != {"convolution", "normalization", "activation"}:
            return f"layer.{name} is {type(part).__qualname__}"
        if type(parts["activation"]) is not (nn.Identity if last else nn.ReLU):
            return f"layer.{name}.activation is {type(parts['activation']).__qualname__}"
        units.append(Unit(f"layer.{name}.convolution", f"layer.{name}.normalization"))
    shortcut = dict(children["shortcut"].named_children())
    if type(children["shortcut"]) is nn.Identity:
        return Layout(tuple(units))
    if shortcut.keys() == {"convolution", "normalization"}:
        return Layout(tuple(units), Unit("shortcut.convolution", "shortcut.normalization", relu=False))
    return f"shortcut is {type(children['shortcut']).__qualname__}"


def _single_layout(children: dict[str, nn.Module]) -> Layout | str:
    """One unit outside a block, as in the stem of Hugging Face's models."""
    activation = type(children["activation"])
    if len(children) != 3 or activation not in (nn.ReLU, nn.Identity):
        return f"activation is {activation.__qualname__}, or it has further submodules"
    return Layout((Unit("convolution", "normalization", activation is nn.ReLU),), residual=False)


def _why_unfusable(module: nn.Module, layout: Layout) -> str | None:
    for unit in layout.all_units():
        if (
            reason := functional.why_unfusable(module.get_submodule(unit.conv), module.get_submodule(unit.norm))
        ) is not None:
            return f"{unit.conv}: {reason}"
    if any(functional.hooked(child) for child in module.modules() if child is not module):
        return "hooks are registered on a submodule"
    if not _agrees(module, layout):
        return f"the forward of {type(module).__qualname__} computes something else than its submodules suggest"
    return None


_agreed: dict[tuple[type[nn.Module], Layout, str], bool] = {}


def _agrees(module: nn.Module, layout: Layout) -> bool:
    """Whether ``module`` computes its layout: its own forward against the reference, in fp64 with random parameters.

    The parameters of the model are neither read nor copied, and neither its state nor the global random state changes.
    """
    key = (type(module), layout, repr(module))
    if key not in _agreed:
        _agreed[key] = _probe(module, layout)
    return _agreed[key]


def _probe(module: nn.Module, layout: Layout) -> bool:
    twin = _random_twin(module)
    first = twin.get_submodule(layout.units[0].conv)
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(2, cast(nn.Conv2d, first).in_channels, 7, 6, dtype=torch.float64, device="cpu", generator=generator)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), plan.implementation("eager"):
        try:
            got = twin(x.clone())
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            plan.logger.info("%s could not be tried: %s", type(module).__qualname__, error)
            return False
        want = _by_reference(twin, layout, x)
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-9, atol=1e-9)


def _random_twin(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in fp64 and eval mode, whose parameters and buffers are random and of moderate size."""
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {id(t): _on_meta(t) for t in tensors}
    twin = copy.deepcopy(module, memo).to_empty(device="cpu").double().eval()
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for t in (*twin.parameters(), *twin.buffers()):
            if t.is_floating_point():
                t.uniform_(0.5, 1.5, generator=generator) if t.dim() < 2 else t.normal_(
                    0, t[0].numel() ** -0.5, generator=generator
                )
    return twin


def _on_meta(t: Tensor) -> Tensor:
    meta = torch.empty_like(t, device="meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(t, nn.Parameter) else meta


def _by_reference(module: nn.Module, layout: Layout, x: Tensor) -> Tensor:
    def run(x: Tensor, unit: Unit, residual: Tensor | None = None) -> Tensor:
        conv, norm = cast(nn.Conv2d, module.get_submodule(unit.conv)), module.get_submodule(unit.norm)
        return conv_bn_act(x, conv, cast(nn.BatchNorm2d, norm), residual, unit.relu)

    shortcut: Tensor | None = x if layout.residual else None
    if layout.pool is not None:
        shortcut = module.get_submodule(layout.pool)(x)
    if isinstance(layout.shortcut, Unit):
        shortcut = run(cast(Tensor, shortcut), layout.shortcut)
    *inner, last = layout.units
    for unit in inner:
        x = run(x, unit)
    return run(x, last, shortcut)


def _swap(found: _Found) -> None:
    module = found.module
    if isinstance(found.verdict, str) or isinstance(module, FusedBlock | ConvertedSequential):
        return
    if isinstance(found.verdict, Layout):
        convolutions = [unit.conv for unit in found.verdict.all_units()]
        module.layout, module.original = found.verdict, type(module)  # type: ignore[assignment]
        module.__class__ = ConvertedBlock
    else:
        convolutions = [name for name, child in module.named_children() if type(child) is nn.Conv2d]
        module.__class__ = ConvertedSequential
    module.relaid = tuple(name for name in convolutions if _lay_out(cast(nn.Conv2d, module.get_submodule(name))))


def _lay_out(conv: nn.Conv2d) -> bool:
    """Store the weight channels_last, as the kernels read it; returns whether it was not so before."""
    weight = conv.weight
    if weight.is_contiguous(memory_format=torch.channels_last):
        return False
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return True


@dataclass
class Row:
    """One block of :func:`explain`."""

    name: str
    block: str
    implementation: str
    reason: str = ""
    launches: list[Launch] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values; bytes and floating-point operations are those of the launches that were seen."""
        kernels = [x for x in self.launches if x.config is not None]
        tiles = sorted({f"{c.block_m}x{c.block_n}x{c.block_k}" for c in (x.config for x in kernels) if c is not None})
        return {
            "name": self.name,
            "block": self.block,
            "implementation": self.implementation,
            "tiles": tiles,
            "launches": len(self.launches),
            "bytes": sum(x.bytes_read + x.bytes_written for x in self.launches),
            "flops": sum(x.flops for x in self.launches),
            "reason": self.reason,
        }


@dataclass
class Explanation:
    """What :func:`explain` found; ``str()`` of it is a table."""

    rows: list[Row]
    ran: bool

    def to_dict(self) -> list[dict[str, Any]]:
        """One dictionary per block."""
        return [row.to_dict() for row in self.rows]

    def __str__(self) -> str:
        columns = ["name", "block", "implementation", "tiles", "launches", "MB", "reason"]
        rows = []
        for row in self.to_dict():
            seen = (
                (", ".join(row["tiles"]), row["launches"], round(row["bytes"] / 1e6, 3))
                if self.ran
                else ("", None, None)
            )
            rows.append((row["name"], row["block"], row["implementation"], *seen, row["reason"]))
        fused = sum(row.implementation == "fused" for row in self.rows)
        return render(f"{fused} of {len(rows)} blocks fused", columns, rows)


def explain(model: nn.Module, x: Tensor | None = None) -> Explanation:
    """Which implementation each block of ``model`` runs, and why.

    With an input ``x`` for the model, runs it once in eval mode without gradients and reports what was launched: tiles,
    number of launches, bytes, and the reason for each block that ran eager. Without, the structure alone is judged.
    """
    found = list(_find(model))
    names = {f.module: f for f in found}
    rows = {f.module: Row(f.name, _class_name(f.module), *_judge(f)) for f in found}
    if x is not None:
        _observe(model, x, rows, [m for m in names if not isinstance(m, nn.Sequential)])
    return Explanation(list(rows.values()), ran=x is not None)


def _judge(found: _Found) -> tuple[str, str]:
    if isinstance(found.module, FusedBlock | ConvertedSequential):
        return "fused", ""
    return "eager", found.verdict if isinstance(found.verdict, str) else "not converted: call fuse(model)"


def _class_name(module: nn.Module) -> str:
    return getattr(module, "original", type(module)).__qualname__


def _observe(model: nn.Module, x: Tensor, rows: dict[nn.Module, Row], blocks: list[nn.Module]) -> None:
    starts: dict[nn.Module, int] = {}
    training = [module for module in model.modules() if module.training]

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        starts[module] = len(seen.launches)
        reason = module.why_eager(args[0]) if isinstance(module, FusedBlock) else None
        if reason is not None:
            rows[module].implementation, rows[module].reason = "eager", reason

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        rows[module].launches = seen.launches[starts[module] :]

    handles = [h for b in rows for h in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
    try:
        model.eval()
        with trace() as seen, torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
