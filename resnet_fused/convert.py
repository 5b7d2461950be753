"""Conversion of existing models in place: the class of each block that is recognised is swapped, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from resnet_fused import functional, plan, verify
from resnet_fused.modules import FusedBlock, Layout, descendants
from resnet_fused.recognise import recognise

Filter = Callable[[str, nn.Module], bool]

_STATE = ("layout", "kinds", "relaid", "memory")
MEMORY = ("default", "recompute")
_CLAIMED = (*_STATE, "original", "why_eager", "eager_forward")


class Converted(FusedBlock):
    """A module of another library, its class swapped for a subclass of it; eager, it runs its own class's forward."""

    original: type[nn.Module]
    relaid: tuple[str, ...] = ()

    def eager_forward(self, x: Tensor) -> Tensor:
        return self.original.forward(self, x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = ConvertedSequential if isinstance(self, ConvertedSequential) else ConvertedBlock
        return _blank, (kind, self.original), *cast(tuple[Any, ...], super().__reduce_ex__(protocol))[2:]


class ConvertedBlock(Converted):
    """A converted block. ``kinds``: the types of its submodules when it was recognised."""

    layout: Layout
    kinds: tuple[type[nn.Module], ...]

    def why_eager(self, x: Tensor) -> str | None:
        if _kinds(self) != self.kinds:
            return "its submodules are not those that were recognised"
        return super().why_eager(x)


class ConvertedSequential(Converted):
    """A converted ``nn.Sequential``: each run of convolution, batch norm and ReLU in it is fused."""

    def why_eager(self, x: Tensor) -> str | None:
        children = list(self.children())
        runs = [children[i : i + 2] for i in range(len(children)) if _run_length(children[i : i + 3])]
        return functional.why_eager(x, cast(Any, runs)) if runs else "it has no convolution with batch norm any more"

    def forward(self, x: Tensor) -> Tensor:
        children = list(self.children())
        at = 0
        while at < len(children):
            run = _run_length(children[at : at + 3])
            reason = functional.why_eager(x, [(children[at], children[at + 1])]) if run else None
            if reason is not None:
                plan.report_once(reason)
            if run and reason is None:
                conv, norm = children[at : at + 2]
                layer = functional.Layer(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm), relu=run == 3)
                x = functional.residual_block(x, [layer], recompute=self.memory == "recompute")
                at += run
            else:
                x = children[at](x)
                at += 1
        return x


_classes: dict[tuple[type, type], type] = {}


def _converted(kind: type[Converted], original: type[nn.Module]) -> type[Converted]:
    """The class that ``original`` is swapped for, made once."""
    key = kind, original
    if key not in _classes:
        attributes = {"original": original, "__module__": __name__, "__doc__": kind.__doc__}
        _classes[key] = type(f"Fused{original.__name__}", key, attributes)
    return _classes[key]


def _blank(kind: type[Converted], original: type[nn.Module]) -> Converted:
    return cast(Converted, object.__new__(_converted(kind, original)))


def _kinds(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """The types of the submodules; ``convert_sync_batchnorm`` may come before or after."""
    types = map(type, descendants(module))
    return tuple([nn.BatchNorm2d if kind is nn.SyncBatchNorm else kind for kind in types])


def _run_length(modules: list[nn.Module]) -> int:
    """How many of the first modules make one unit: convolution, batch norm and perhaps a ReLU; 0 if none do."""
    if len(modules) < 2 or functional.why_unfusable(modules[0], modules[1]) is not None:
        return 0
    return 3 if len(modules) > 2 and type(modules[2]) is nn.ReLU and not functional.hooked(modules[2]) else 2


def fuse(
    model: nn.Module, *, filter_fn: Filter | None = None, strict: bool = False, memory: str = "default"
) -> nn.Module:
    """Let the residual blocks of ``model`` run fused, in training and in inference, in place; returns ``model``.

    A block is recognised by what its own forward does (see :func:`resnet_fused.recognise.recognise`): those of
    torchvision's ResNets, of timm's plain, ``d``, ResNeXt and wide ResNets, of Hugging Face's
    ``ResNetForImageClassification``, and any other that computes the same; also runs of convolution, batch norm and
    ReLU in an ``nn.Sequential``. The class of what is recognised becomes a subclass of its own. Keys, ``Parameter``
    objects and values stay; the weights of fused convolutions become channels_last in memory. Works before or after
    loading, moving, wrapping or training, and again on a model that is fused already.

    ``filter_fn(name, module)``: return False to leave a block alone. ``strict``: raise ValueError, changing nothing, if
    any block cannot be fused. ``memory``: ``"default"`` keeps the raw output of each convolution for the backward;
    ``"recompute"`` computes the last one of each block, and its projection, again. Warns (UserWarning) if nothing was
    fused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__qualname__}")
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(map(repr, MEMORY))}; got {memory!r}")
    found = [f for f in find(model) if filter_fn is None or filter_fn(f.name, f.module)]
    refused = [f for f in found if isinstance(f.verdict, str)]
    if strict and refused:
        reasons = "\n".join(f"  {f.name or '(the model)'}: {f.verdict}" for f in refused)
        raise ValueError(f"model has {len(refused)} block(s) that cannot be fused:\n{reasons}")
    with torch.inference_mode(False):
        for block in found:
            _swap(block)
            if isinstance(block.module, FusedBlock):
                block.module.memory = memory
    if len(found) == len(refused):
        reasons = "; ".join(sorted({str(f.verdict) for f in refused})) or "no residual block was recognised"
        warnings.warn(f"nothing was fused: {reasons}", UserWarning, stacklevel=2)
    else:
        verify.remind_once(model)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse` in place: classes and memory formats are as they were; returns ``model``."""
    with torch.inference_mode(False):
        for module in model.modules():
            _revert(module)
    return model


@dataclass
class Found:
    """A module that is or could be fused; ``verdict``: its layout, True for a sequence with runs, or why not."""

    name: str
    module: nn.Module
    verdict: Layout | bool | str


def find(model: nn.Module) -> Iterator[Found]:
    """Every block of ``model``, from the outside in; inside one that can be fused, there is no other."""
    seen: set[nn.Module] = set()
    pending = [("", model)]
    while pending:
        name, module = pending.pop(0)
        if module in seen:
            continue
        seen.add(module)
        verdict = _examine(module)
        if isinstance(verdict, str) and not _is_innermost(module):
            verdict = None
        if verdict is not None:
            yield Found(name, module, verdict)
        if not isinstance(verdict, Layout):
            pending += [(f"{name}.{child}".lstrip("."), m) for child, m in module.named_children()]


def _examine(module: nn.Module) -> Layout | bool | str | None:
    """The verdict on ``module``, or None if there is nothing to fuse in it."""
    if isinstance(module, FusedBlock):
        return isinstance(module, ConvertedSequential) or module.layout
    if isinstance(module, nn.Conv2d) or not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return None
    if taken := [name for name in _CLAIMED if hasattr(module, name)]:
        return f"it has an attribute {taken[0]!r} of its own"
    if type(module).forward is nn.Sequential.forward:
        children = list(module.children())
        return any(_run_length(children[i : i + 3]) for i in range(len(children))) or None
    return recognise(module)


def _is_innermost(module: nn.Module) -> bool:
    """Whether ``module`` itself holds convolutions and norms, and no module inside it does: a block, not a network."""
    return [part for part in module.modules() if _holds_units(part)] == [module]


def _holds_units(module: nn.Module) -> bool:
    children = list(module.children())
    return (
        not isinstance(module, nn.Sequential)
        and any(isinstance(child, nn.Conv2d) for child in children)
        and any("Norm" in type(child).__name__ for child in children)
    )


def _swap(found: Found) -> None:
    module, verdict = found.module, found.verdict
    if isinstance(verdict, str) or isinstance(module, FusedBlock):
        return
    for part in module.modules():
        _revert(part)
    if isinstance(verdict, Layout):
        convolutions = [unit.conv for unit in verdict.all_units()]
        vars(module).update(layout=verdict, kinds=_kinds(module))
        module.__class__ = _converted(ConvertedBlock, type(module))
    else:
        convolutions = [name for name, child in module.named_children() if type(child) is nn.Conv2d]
        module.__class__ = _converted(ConvertedSequential, type(module))
    relaid = tuple(name for name in convolutions if _lay_out(cast(nn.Conv2d, module.get_submodule(name))))
    vars(module).update(relaid=relaid)


def _revert(module: nn.Module) -> None:
    if not isinstance(module, Converted):
        return
    for name in module.relaid:
        conv = cast(nn.Conv2d, module.get_submodule(name))
        conv.weight.data = conv.weight.data.contiguous()
    for attribute in _STATE:
        vars(module).pop(attribute, None)
    module.__class__ = module.original  # type: ignore[assignment]


def _lay_out(conv: nn.Conv2d) -> bool:
    """Store the weight channels_last, as the kernels read it; returns whether it was not so before."""
    weight = conv.weight
    if weight.is_contiguous(memory_format=torch.channels_last):
        return False
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return True
