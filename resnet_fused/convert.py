"""Conversion of existing models in place: the class of each block that is recognised is swapped, and nothing else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import isroutine, signature
from types import FunctionType
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from resnet_fused import functional
from resnet_fused.engine import eligible
from resnet_fused.kernels.activation import IDENTITY, RELU
from resnet_fused.kernels.launch import KEPT_LAYOUTS
from resnet_fused.modules import BlockLayout, FusedBlock, StemLayout, descendants, in_range, runs_fused
from resnet_fused.plan import checked
from resnet_fused.recognise import recognise, recognise_stem

Filter = Callable[[str, nn.Module], bool]

MEMORY = ("default", "recompute")
_STATE = ("_conversion", "memory")
_CLAIMED = (
    *(*_STATE, "original", "described", "why_eager", "why_unfusable", "is_stale", "eager_forward"),
    *("title", "forward_ahead", "_infer", "_launched", "_repetition", "_run", "_resolve", "_layer", "_shortcut"),
    *("_unit", "_why_stale"),
)


class _Conversion(NamedTuple):
    """What is known of a converted module. ``memory``: see :class:`FusedBlock`; ``layout``: None for a sequence.

    ``kinds``: names and types of its submodules when it was recognised; ``plain``: its plain attributes; ``name``: its
    own, in the model that was fused.
    """

    memory: str = "default"
    layout: BlockLayout | StemLayout | None = None
    kinds: tuple[Any, ...] = ()
    plain: tuple[tuple[str, Any], ...] = ()
    name: str = ""


class Converted(FusedBlock):
    """A module of another library, its class swapped for a subclass of it; eager, it runs its own class's forward.

    One that was never recognised, made by calling its class, has the ``_conversion`` of its class.
    """

    original: type[nn.Module]
    _conversion = _Conversion()

    def described(self) -> tuple[Any, str]:
        return self._conversion.layout, self._conversion.memory

    def title(self) -> str:
        kind, name = self.original.__name__, self._conversion.name
        return f"{name} ({kind})" if name else kind

    def eager_forward(self, x: Tensor) -> Tensor:
        return self.original.forward(self, x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = next(kind for kind in _KINDS if isinstance(self, kind))
        return _blank, (kind, self.original), *cast(tuple[Any, ...], super().__reduce_ex__(protocol))[2:]


class ConvertedBlock(Converted):
    """A converted block."""

    def why_unfusable(self) -> str | None:
        return self._why_stale() or super().why_unfusable()

    def is_stale(self) -> bool:
        """Whether it is not what was recognised."""
        return self._why_stale() is not None

    def _why_stale(self) -> str | None:
        if _kinds(self) != self._conversion.kinds:
            return "its submodules are not those that were recognised"
        return _why_changed(self, self._conversion.plain)


class ConvertedStem(Converted):
    """A converted network that begins as ``pooled_stem`` says: up to its pool it is one call.

    Its own forward runs, on a view of it whose first children pass on what was computed.
    """

    def title(self) -> str:
        return f"{super().title()}, up to its pool"

    def why_eager(self, x: Tensor) -> str | None:
        found = self._unit(x)
        return found if isinstance(found, str) else None

    def forward(self, x: Tensor) -> Tensor:
        found = self._unit(x)
        if isinstance(found, str):
            eligible.report_once(found)
            return self.eager_forward(x)
        stem, _ = self.described()
        view = object.__new__(self.original)
        vars(view).update(vars(self), _modules=self._modules | _parts(self, stem, found))
        return self.original.forward(view, x)

    def _unit(self, x: Tensor) -> functional.PooledUnit | str:
        stem, _ = self.described()
        if torch.compiler.is_compiling():
            return eligible.COMPILED
        if stem is None:
            return "it was never recognised"
        if (reason := _why_changed(self, self._conversion.plain)) is not None:
            return reason
        try:
            conv, norm, pool = (cast(Any, self.get_submodule(name)) for name in stem[:3])
            parts = [self._modules[name] for name in stem.parts]
        except (AttributeError, KeyError) as name:
            return f"it has no submodule {name} any more"
        for part in parts[:-1]:
            if part is None or eligible.hooked(part):
                return "hooks are registered on a submodule"
            if part is not conv and part is not norm and type(part) is not nn.ReLU and not _is_unit(part, stem):
                return f"{type(part).__qualname__} is not what was recognised"
        return functional.pooled_unit(x, conv, norm, pool)


def _is_unit(part: nn.Module, stem: StemLayout) -> bool:
    """Whether ``part`` is a fused block of the stem's convolution, batch norm and ReLU, as it was recognised."""
    if not isinstance(part, ConvertedBlock) or part.why_unfusable() is not None:
        return False
    names = [f"{stem.parts[0]}.{name}" for unit in part.described()[0].all_units() for name in unit[:2]]
    return names == [stem.conv, stem.norm]


class _Part:
    """What stands for a part of a stem in a view: to be called as it, it answers for all else as the ``module``.

    The first, which has the ``unit``, computes all of the stem; each of the others returns what the one ``before``
    returned. A part that is called again is its module.
    """

    def __init__(self, network: ConvertedStem, module: nn.Module | None, before: _Part | None) -> None:
        self.network, self.module, self.before = network, module, before
        self.unit: functional.PooledUnit | None = None
        self.result: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.unit is not None:
            self.result, self.unit = in_range(self.network, functional.run_pooled, x, self.unit), None
            return self.result
        if self.before is None or x is not self.before.result:
            return cast(nn.Module, self.module)(x)
        self.before.result = None
        self.result = x
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _LastPart(_Part):
    """Keeps nothing of what it returns."""

    def __call__(self, x: Tensor) -> Tensor:
        result = super().__call__(x)
        self.result = None
        return result


def _parts(network: ConvertedStem, stem: StemLayout, unit: functional.PooledUnit) -> dict[str, Any]:
    """What stands for the parts of the ``stem`` in a view, by their names."""
    found: dict[str, Any] = {}
    before: _Part | None = None
    for name in stem.parts:
        kind = _LastPart if name == stem.parts[-1] else _Part
        found[name] = before = kind(network, network._modules[name], before)
    found[stem.parts[0]].unit = unit
    return found


class ConvertedSequential(Converted):
    """A converted ``nn.Sequential``: each run of convolution, batch norm and ReLU in it is fused."""

    def why_eager(self, x: Tensor) -> str | None:
        children = list(self._modules.values())
        runs = [children[i : i + 2] for i in range(len(children)) if _run_length(children[i : i + 3])]
        return eligible.why_eager(x, runs) if runs else "it has no convolution with batch norm any more"

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return self.eager_forward(input)
        x, children = input, list(self._modules.values())  # a module may stand there twice
        at = 0
        while at < len(children):
            run = _run_length(children[at : at + 3])
            chain = functional.chain_of(x, [_layer(children[at : at + run])]) if run else None
            if isinstance(chain, functional.Chain):
                x = in_range(self, functional.run, chain, recompute=self._conversion.memory == "recompute")
                at += run
                continue
            if chain is not None:
                eligible.report_once(chain)
            x = cast(nn.Module, children[at])(x)
            at += 1
        return x


class ConvertedBlocks(Converted):
    """A converted ``nn.Sequential`` of blocks: the end of one and the beginning of the next share launches, as planned.

    Without gradients, and where nobody looks at what is between them.
    """

    def forward(self, input: Tensor) -> Tensor:
        tracing = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if torch.is_grad_enabled() or tracing or not isinstance(input, Tensor):
            return self.eager_forward(input)
        situation = functional.situation(input)
        known = _apart.get(self)
        if known is not None and situation in known:
            return self.eager_forward(input)
        z, apart = self._run(input)
        if apart:
            _apart[self] = {situation, *(known if known is not None and len(known) < KEPT_LAYOUTS else ())}
        return z

    def why_eager(self, x: Tensor) -> str | None:
        """That of the first of its blocks."""
        blocks = [child for child in self._modules.values() if runs_fused(child)]
        return cast(FusedBlock, blocks[0]).why_eager(x) if blocks else "it has no fused block any more"

    def _run(self, x: Tensor) -> tuple[Tensor, bool]:
        """What the blocks return, one behind the other, and whether the plan has each unit of theirs by itself."""
        children = cast(list[Any], list(self._modules.values()))
        blocks = [child if runs_fused(child) and not eligible.answered(child) else None for child in children]
        ran, apart = functional.Ran(x), True
        for child, block, following in zip(children, blocks, [*blocks[1:], None], strict=True):
            if block is None:
                ran = functional.Ran(child(ran.z), apart=not runs_fused(child))
            else:
                ran = _looked_at(block, ran, following)
            apart = apart and ran.apart
        return ran.z, apart


def _looked_at(block: FusedBlock, before: functional.Ran, following: FusedBlock | None) -> functional.Ran:
    """What ``block`` makes of the output ``before`` it, with its onlookers told."""
    for look in block._forward_pre_hooks.values():
        look(block, (before.z,))
    ran = block.forward_ahead(before.z, before.ahead, following)
    for look in block._forward_hooks.values():
        look(block, (before.z,), ran.z)
    return ran


_apart: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()
"""The situations in which nothing in a sequence of blocks shares a launch."""


def _layer(run: Sequence[Any]) -> eligible.Layer:
    """That of the modules of one unit."""
    return eligible.Layer(run[0], run[1], RELU if len(run) == 3 else IDENTITY)


_KINDS = ConvertedSequential, ConvertedBlocks, ConvertedStem, ConvertedBlock
_classes: dict[tuple[type, type], type] = {}


def _converted(kind: type[Converted], original: type[nn.Module]) -> type[Converted]:
    """The class that ``original`` is swapped for, made once."""
    key = kind, original
    if key not in _classes:
        attributes: dict[str, Any] = {"original": original, "__module__": __name__, "__doc__": kind.__doc__}
        _, parameter = signature(original.forward).parameters
        if parameter != "x" and kind not in (ConvertedSequential, ConvertedBlocks):
            attributes["forward"] = _taking(kind.forward, parameter)
        if original.__new__ is not object.__new__:  # FSDP's looks among the bases for what a slice is made of
            attributes["__new__"] = lambda _, *args, **named: original.__new__(original, *args, **named)
        _classes[key] = type(_fused_name(original), key, attributes)
    return _classes[key]


@cache
def _reverted(kind: Any) -> type:
    """The class that ``kind`` was made of; of one that others derived from ours, as FSDP does, what it would be."""
    original = kind.original
    if "original" in vars(kind):
        return original
    bases = tuple(_reverted(base) if issubclass(base, Converted) else base for base in kind.__bases__)
    return type(kind.__name__.replace(_fused_name(original), original.__name__), bases, dict(vars(kind)))


def _fused_name(original: type) -> str:
    return f"Fused{original.__name__}"


def _taking(forward: Any, parameter: str) -> FunctionType:
    """``forward`` for callers who name its ``parameter`` as the original does."""
    own, _, *rest = forward.__code__.co_varnames
    return FunctionType(forward.__code__.replace(co_varnames=(own, parameter, *rest)), forward.__globals__, "forward")


def _blank(kind: type[Converted], original: type[nn.Module]) -> Converted:
    return cast(Converted, object.__new__(_converted(kind, original)))


def _kinds(module: nn.Module) -> tuple[Any, ...]:
    """Names and types of the submodules, with their own; ``convert_sync_batchnorm`` may come before or after."""
    found: list[Any] = []
    for name, part in module._modules.items():
        kind = type(part)
        found += name, nn.BatchNorm2d if kind is nn.SyncBatchNorm else kind
        if part is not None and part._modules:
            found.append(_kinds(part))
    return tuple(found)


def _plain(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What a forward may branch on: attributes that are numbers, text, flags or functions, or hold some of these."""
    names = [name for name in vars(module) if name[0] != "_" and name != "training"]
    return tuple((name, copy.copy(vars(module)[name])) for name in names if _is_plain(vars(module)[name]))


_GONE = object()


def _why_changed(module: nn.Module, plain: tuple[tuple[str, Any], ...]) -> str | None:
    """Why ``module`` does not have the attributes of :func:`_plain` any more, or None."""
    own = vars(module)
    for name, value in plain:
        now = own.get(name, _GONE)
        if now is not value and not (_is_plain(now) and now == value):
            return f"its attribute {name!r} is not what it was when it was recognised"
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str) or isroutine(value)


def _run_length(modules: Sequence[Any]) -> int:
    """How many of the first modules make one unit: convolution, batch norm and perhaps a ReLU; 0 if none do."""
    if len(modules) < 2 or eligible.why_unfusable(*modules[:2]) is not None or eligible.hooked(*modules[:2]):
        return 0
    return 3 if len(modules) > 2 and type(modules[2]) is nn.ReLU and not eligible.hooked(modules[2]) else 2


def fuse(
    model: nn.Module, *, filter_fn: Filter | None = None, strict: bool = False, memory: str = "default"
) -> nn.Module:
    """Let the residual blocks of ``model`` run fused, in training and in inference, in place; returns ``model``.

    A block is recognised by what its own forward does (see :func:`resnet_fused.recognise.recognise`): those of
    torchvision's ResNets, of timm's plain, ``d``, ResNeXt, wide and pre-activation ResNets, of Hugging Face's
    ``ResNetForImageClassification``, and any other that computes the same; also runs of convolution, batch norm and
    ReLU in an ``nn.Sequential``. The class of what is recognised becomes a subclass of its own, and nothing else
    changes: keys, ``Parameter`` objects, values, and how they lie in memory stay. Works before or after loading,
    moving, wrapping or training, and again on a fused model. Whatever is raised on the way, ``model`` is as before.

    The kernels read filters in channels_last: others cost a copy in every forward, which
    ``model.to(memory_format=torch.channels_last)`` saves.

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
    changed = [block for block in found if not isinstance(block.verdict, str)]
    with _restored_on_error(list(model.modules())):
        for block in changed:
            _swap(block, memory)
        for sequence in [part for part in model.modules() if _holds_chains(part)]:
            _become(sequence, ConvertedBlocks, _Conversion(memory))
    if len(found) == len(refused):
        reasons = "; ".join(sorted({str(f.verdict) for f in refused})) or "no residual block was recognised"
        warnings.warn(f"nothing was fused: {reasons}", UserWarning, stacklevel=2)
    else:
        checked.remind_once(model)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse` in place: classes are as they were; returns ``model``. Whatever is raised, it is as before."""
    converted = [module for module in model.modules() if isinstance(module, Converted)]
    with _restored_on_error(converted):
        for module in converted:
            _revert(module)
    return model


@dataclass
class Found:
    """A module that is or could be fused; ``verdict``: its layout, True for a sequence with runs, or why not."""

    name: str
    module: nn.Module
    verdict: BlockLayout | StemLayout | bool | str


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
        if not isinstance(verdict, BlockLayout):
            pending += [(f"{name}.{child}".lstrip("."), m) for child, m in module.named_children()]


def _examine(module: nn.Module) -> BlockLayout | StemLayout | bool | str | None:
    """The verdict on ``module``, or None if there is nothing to fuse in it."""
    if isinstance(module, ConvertedSequential):
        return True
    if isinstance(module, FusedBlock) and not isinstance(module, Converted):
        return module.layout
    if isinstance(module, ConvertedBlock) and not module.is_stale():
        return module.described()[0]
    if isinstance(module, nn.Conv2d) or not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return None
    if not isinstance(module, Converted) and (taken := [name for name in _CLAIMED if hasattr(module, name)]):
        return f"it has an attribute {taken[0]!r} of its own"
    if type(module).forward in (nn.Sequential.forward, ConvertedBlocks.forward):
        children = list(module._modules.values())
        return any(_run_length(children[i : i + 3]) for i in range(len(children))) or None
    return recognise_stem(module) or recognise(module)


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


@contextmanager
def _restored_on_error(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Classes and attributes of ours are those of before if the ``with`` block does not come to its end."""
    before = [(module, type(module), {k: v for k, v in vars(module).items() if k in _STATE}) for module in modules]
    try:
        yield
    except BaseException:
        for module, kind, state in before:
            module.__class__ = kind
            for attribute in _STATE:
                vars(module).pop(attribute, None)
            vars(module).update(state)
        raise


def _swap(found: Found, memory: str) -> None:
    name, module, verdict = found.name, found.module, found.verdict
    state = _Conversion(memory, name=name)
    kind: type[Converted] = ConvertedSequential
    if isinstance(verdict, BlockLayout) and (isinstance(module, ConvertedBlock) or not isinstance(module, FusedBlock)):
        kind = ConvertedBlock
        for part in descendants(module):  # the block runs them itself
            _revert(part)
        state = _Conversion(memory, verdict, _kinds(module), _plain(module), name)
    elif isinstance(verdict, StemLayout):
        kind = ConvertedStem
        state = _Conversion(memory, verdict, plain=_plain(module), name=name)
    if isinstance(module, FusedBlock) and not isinstance(module, Converted):
        module.memory = memory
        return
    _become(module, kind, state)


def _become(module: nn.Module, kind: type[Converted], state: _Conversion) -> None:
    _revert(module)
    vars(module)["_conversion"] = state
    module.__class__ = _converted(kind, type(module))


def _holds_chains(module: nn.Module) -> bool:
    """Whether ``module`` is a plain sequence of which a block may share a launch with what comes behind it."""
    plain = type(module).forward is nn.Sequential.forward and not any(hasattr(module, name) for name in _CLAIMED)
    return plain and any(map(_ends_pointwise, module._modules.values()))


def _ends_pointwise(block: nn.Module | None) -> bool:
    if block is None or not runs_fused(block):
        return False
    layout = cast(FusedBlock, block).described()[0]
    conv = cast(nn.Conv2d, block.get_submodule(layout.units[-1].conv))
    return layout.residual and not layout.norm_first and conv.weight.shape[2:] == (1, 1)


def _revert(module: nn.Module) -> None:
    if isinstance(module, Converted):
        module.__class__ = _reverted(cast(Any, type(module)))
        vars(module).pop("_conversion", None)
