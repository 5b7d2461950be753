"""Conversion of existing models in place: the class of each block that is recognised is swapped, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from inspect import Parameter, signature
from itertools import accumulate, pairwise
from types import FunctionType
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.autograd import profiler
from torch.nn.modules.conv import _ConvNd

from resnet_fused import functional
from resnet_fused.engine import eligible
from resnet_fused.engine.forward import settings
from resnet_fused.engine.replay import Repetition, can_repeat
from resnet_fused.engine.request import requested
from resnet_fused.kernels.activation import IDENTITY
from resnet_fused.kernels.launch import KEPT_LAYOUTS
from resnet_fused.modules import (
    BlockLayout,
    FusedBlock,
    StemLayout,
    descendant,
    descendants,
    in_range,
    is_norm_first,
    runs_fused,
)
from resnet_fused.pieces import Piece, UnitsLayout
from resnet_fused.plan import checked
from resnet_fused.recognise import has_units, is_container, recognise, recognise_stem
from resnet_fused.stages import recognise_stage
from resnet_fused.traced import INTERNAL, attributes_read, is_plain, own_class

Filter = Callable[[str, nn.Module], bool]

Layout = BlockLayout | UnitsLayout | StemLayout

MEMORY = ("default", "recompute")
_STATE = ("_conversion", "memory")
_CLAIMED = (
    *(*_STATE, "original", "described", "why_eager", "why_unfusable", "is_stale", "eager_forward"),
    *("title", "forward_ahead", "_infer", "_launched", "_repetition", "_run", "_resolve", "_chain", "_piece"),
    *("_repeated", "_repetition_of", "_shared", "read_by", "_called"),
    *("_why_apart", "_layer", "_shortcut", "_unit", "_why_here", "_why_stale"),
)


class _Conversion(NamedTuple):
    """What is known of a converted module. ``memory``: see :class:`FusedBlock`.

    ``layout``: None for a sequence or a stage; ``kinds``: names and types of its submodules when it was recognised;
    ``plain``: its plain attributes; ``seen``: of a module with units, or a stage, what is known of itself and of the
    modules inside that are seen through, by their names; ``calls``: the names of the modules that a stage calls;
    ``name``: its own, in the model that was fused.
    """

    memory: str = "default"
    layout: Layout | None = None
    kinds: tuple[Any, ...] = ()
    plain: tuple[tuple[str, Any], ...] = ()
    seen: tuple[tuple[str, _Seen], ...] = ()
    calls: tuple[str, ...] = ()
    name: str = ""


class _Seen(NamedTuple):
    """A module that is seen through: its class, its children's names and whether they are there, its attributes."""

    kind: type
    children: tuple[tuple[str, bool], ...]
    plain: tuple[tuple[str, Any], ...]


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

    def is_stale(self) -> bool:
        """Whether it is not what was recognised."""
        return self._why_stale() is not None

    def _why_stale(self) -> str | None:
        return None

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = next(kind for kind in _KINDS if isinstance(self, kind))
        return _blank, (kind, self.original), *cast(tuple[Any, ...], super().__reduce_ex__(protocol))[2:]


class ConvertedBlock(Converted):
    """A converted block."""

    def why_unfusable(self) -> str | None:
        return self._why_stale() or super().why_unfusable()

    def _why_stale(self) -> str | None:
        if _kinds(self) != self._conversion.kinds:
            return "its submodules are not those that were recognised"
        return _why_changed(self, self._conversion.plain)


class ConvertedUnits(Converted):
    """A converted module whose units run fused, and all between them as it is.

    Its program runs, which is its own forward with calls of :meth:`_piece`.
    """

    def why_eager(self, x: Tensor) -> str | None:
        if (reason := eligible.why_not_here(x, requested(self)) or self._why_stale()) is not None:
            return reason
        return None if x.dim() == 4 else f"the input is {x.dim()}-dimensional"

    def forward(self, x: Tensor) -> Tensor:
        reason = self.why_eager(x)
        if reason is not None:
            eligible.report_once(reason)
            return self.eager_forward(x)
        return cast(Tensor, in_range(self, self._conversion.layout.program.functions[0], self, x))  # type: ignore[union-attr]

    def _piece(self, number: int, x: Tensor, source: Tensor | None) -> Tensor:
        """The result of a piece on ``x``, and on ``source``, which its shortcut reads."""
        layout = cast(UnitsLayout, self._conversion.layout)
        piece = layout.pieces[number]
        reason = self._why_apart(piece, x, source)
        if reason is None and piece.gate is None:
            repetition = self._repetition_of(piece.layout, x, source)
            if repetition is not None and repetition.is_known:
                return cast(Tensor, repetition.play())
        else:
            repetition = None
        read = x if source is None else source
        found = reason or self._chain(piece.layout, x, read, requested(self))
        if isinstance(found, str):
            eligible.report_once(found)
            return cast(Tensor, layout.program.functions[number + 1](self, x, source))
        if repetition is not None and not torch.is_grad_enabled():
            return cast(Tensor, repetition.run(partial(self._infer, piece.layout, x, read)))
        if piece.gate is None or not isinstance(found, functional.Chain):
            return self._launched(found, repetition)
        return functional.run_gated(found, partial(layout.program.functions[piece.gate], self))

    def _repetition_of(self, layout: BlockLayout, x: Tensor, source: Tensor | None) -> Repetition | None:
        """The call of a piece without a gate, if it may be one that was seen before."""
        inputs = (x,) if source is None else (x, source)
        if not can_repeat(*inputs):
            return None
        # Of each piece by itself, however many there are; what its convolution is in besides counts in the call.
        return self._repeated(descendant(self, layout.units[0].conv), layout, requested(self), *inputs)

    def _why_apart(self, piece: Piece, x: Tensor, source: Tensor | None) -> str | None:
        """Why the modules of ``piece`` are called one by one, as they are now, or None."""
        if not isinstance(x, Tensor) or not isinstance(source, Tensor | None):
            return "a unit reads something else than a tensor"
        try:
            passed: list[Any] = [descendant(self, name) for name, _ in piece.passed]
            units: list[Any] = [descendant(self, name) for unit in piece.layout.all_units() for name in unit[:2]]
            pools: list[Any] = [descendant(self, name) for name in piece.pools]
        except KeyError as missing:
            return f"it has no submodule {missing} any more"
        if eligible.hooked(*passed, *units, *pools):
            return "hooks are registered on a submodule"
        if not all(map(eligible.takes_means, pools)):
            return "a pool does not take the means of images any more"
        if piece.gate is not None and eligible.activation_in(units[2 * len(piece.layout.units) - 1]) != IDENTITY:
            return "a batch norm has an activation of its own, in front of the gate"
        for part, (name, activation) in zip(passed, piece.passed, strict=True):
            if eligible.activation_of(part) != activation:
                return f"{name} is {part}, which is not {activation}"
        return None

    def _why_stale(self) -> str | None:
        return _why_unlike(self, self._conversion.seen)


def _why_unlike(module: nn.Module, known: tuple[tuple[str, _Seen], ...]) -> str | None:
    """Why ``module``, or one inside that is seen through, is not as it is ``known`` by its name, or None."""
    if not known:
        return "it was never recognised"
    for name, seen in known:
        try:
            part: nn.Module = descendant(module, name) if name else module
        except KeyError:
            return f"it has no submodule {name} any more"
        if name and (own_class(part) is not seen.kind or eligible.hooked(part)):
            return f"{name} is not what was recognised, or hooks are registered on it"
        if _children(part) != seen.children:
            return "its submodules are not those that were recognised"
        if (reason := _why_changed(part, seen.plain)) is not None:
            return reason
    return None


def _children(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    return tuple([(name, part is not None) for name, part in module._modules.items()])


class ConvertedStem(Converted):
    """A converted network that begins as its :class:`StemLayout` says: up to its ``end`` it is one call.

    Its own forward runs, on a view of it whose first children pass on what was computed.
    """

    def title(self) -> str:
        return f"{super().title()}, up to its {self.described()[0].end}"

    def why_eager(self, x: Tensor) -> str | None:
        reason = self._why_here(x)
        if reason is not None or self.described()[0].is_deep:
            return reason
        found = self._unit(x)
        return found if isinstance(found, str) else None

    def forward(self, x: Tensor) -> Tensor:
        if (reason := self._why_here(x)) is not None:
            eligible.report_once(reason)
            return self.eager_forward(x)
        view = object.__new__(self.original)
        vars(view).update(vars(self), _modules=self._modules | _parts(self, self.described()[0]))
        return self.original.forward(view, x)

    def _why_here(self, x: Tensor) -> str | None:
        """Why its own forward runs on ``x`` as it is, or None."""
        if torch.compiler.is_compiling():
            return eligible.COMPILED
        return eligible.why_not_here(x, requested(self)) or self._why_stale()

    def _why_stale(self) -> str | None:
        stem, _ = self.described()
        if stem is None:
            return "it was never recognised"
        if (reason := _why_changed(self, self._conversion.plain)) is not None:
            return reason
        try:
            first, conv, norm = (descendant(self, name) for name in (stem.parts[0], stem.conv, stem.norm))
            parts: list[Any] = [self._modules[name] for name in stem.parts]
        except KeyError as name:
            return f"it has no submodule {name} any more"
        if stem.is_deep and (not isinstance(first, nn.Sequential) or first[-1] is not conv):
            return f"{stem.conv} is not the last of its sequence"
        known = (first, conv, norm) if stem.is_deep else (conv, norm)
        for part in parts if stem.pool is None else parts[:-1]:
            if part is None or eligible.hooked(part):
                return "hooks are registered on a submodule"
            if part not in known and eligible.activation_of(part) != stem.activation and not _is_unit(part, stem):
                return f"{type(part).__qualname__} is not what was recognised"
        return None

    def _unit(self, x: Tensor) -> functional.PooledUnit | functional.Chain | str:
        """The unit on ``x``, what its convolution reads."""
        stem, _ = self.described()
        conv, norm = descendant(self, stem.conv), descendant(self, stem.norm)
        if stem.pool is None:
            return functional.chain_of(x, [eligible.Layer(conv, norm, stem.activation)])
        return functional.pooled_unit(x, conv, norm, descendant(self, stem.pool))


def _is_unit(part: nn.Module, stem: StemLayout) -> bool:
    """Whether ``part`` is a fused block of the stem's convolution, batch norm and ReLU, as it was recognised."""
    if not isinstance(part, ConvertedBlock) or part.why_unfusable() is not None:
        return False
    names = [f"{stem.parts[0]}.{name}" for unit in part.described()[0].all_units() for name in unit[:2]]
    return names == [stem.conv, stem.norm]


class _Part:
    """What stands for a part of a stem in a view: to be called as it, it answers for all else as the ``module``.

    It returns what the one ``before`` returned, once; called on anything else, it is its module.
    """

    def __init__(self, module: nn.Module | None, before: _Part | None) -> None:
        self.module, self.before = module, before
        self.result: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.before is None or x is not self.before.result:
            return cast(nn.Module, self.module)(x)
        self.before.result = None
        self.result = x
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _FirstPart(_Part):
    """Computes, when it is called for the first time, all of the ``stem`` of the ``network``."""

    def __init__(self, module: nn.Module, network: ConvertedStem) -> None:
        super().__init__(module, None)
        self.network: ConvertedStem | None = network

    def __call__(self, x: Tensor) -> Tensor:
        network, self.network = self.network, None
        if network is None:
            return super().__call__(x)
        stem, _ = network.described()
        if stem.is_deep:
            x = _without_last(cast(nn.Sequential, self.module))(x)
        found = network._unit(x)
        if isinstance(found, str):
            eligible.report_once(found)
            return cast(Tensor, (descendant(network, stem.conv) if stem.is_deep else cast(nn.Module, self.module))(x))
        if isinstance(found, functional.Chain):
            self.result = in_range(network, functional.run, found)
        else:
            self.result = in_range(network, functional.run_pooled, x, found)
        return self.result


def _without_last(sequence: nn.Sequential) -> nn.Sequential:
    """A view of ``sequence``."""
    view = cast(nn.Sequential, object.__new__(type(sequence)))
    vars(view).update(vars(sequence), _modules=dict(list(sequence._modules.items())[:-1]))
    return view


class _LastPart(_Part):
    """Keeps nothing of what it returns."""

    def __call__(self, x: Tensor) -> Tensor:
        result = super().__call__(x)
        self.result = None
        return result


def _parts(network: ConvertedStem, stem: StemLayout) -> dict[str, Any]:
    """What stands for the parts of the ``stem`` in a view, by their names."""
    first, *rest = stem.parts
    before: _Part = _FirstPart(cast(nn.Module, network._modules[first]), network)
    found: dict[str, Any] = {first: before}
    for name in rest:
        kind = _LastPart if name == rest[-1] else _Part
        found[name] = before = kind(network._modules[name], before)
    return found


class ConvertedSequential(Converted):
    """A converted ``nn.Sequential``: each run of convolution, batch norm and activation in it is fused."""

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

    Without gradients, or of pre-activation blocks; and where nobody looks at what is between them.
    """

    def forward(self, input: Tensor) -> Tensor:
        tracing = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if tracing or not isinstance(input, Tensor):
            return self.eager_forward(input)
        if torch.is_grad_enabled():
            called = self._called()
            return self._run(input, called)[0] if any(map(is_norm_first, called)) else self.eager_forward(input)
        situation = functional.situation(input)
        known = _apart.get(self)
        if (known is not None and situation in known) or not (called := self._called()):
            return self.eager_forward(input)
        repetition = self._repetition_of(input, called)
        if repetition is None:
            return self._shared(input, called, situation)
        if repetition.is_known:
            return cast(Tensor, repetition.play())
        return cast(Tensor, repetition.run(partial(self._shared, input, called, situation)))

    def _repetition_of(self, x: Tensor, called: list[Any]) -> Repetition | None:
        """The call of all blocks at once, if it may be one that was seen before, and nobody is to see them apart."""
        if profiler._is_profiler_enabled or not can_repeat(x) or x.layout is not torch.strided:
            return None
        tensors: list[Tensor | None] = [x]
        key: list[Any] = [settings(x.device)]
        for block in called:
            if not runs_fused(block) or eligible.answered(block) or eligible.hooked(block):
                return None
            request = requested(block)
            if eligible.why_not_here(x, request) is not None or block.why_unfusable() is not None:
                return None
            if (read := block.read_by(block.described()[0], tensors)) is None:
                return None
            key += request, read
        return Repetition(self, tuple(key), tensors)

    def _shared(self, x: Tensor, called: list[Any], situation: tuple[Any, ...]) -> Tensor:
        """What the blocks return without gradients; ``situation``: kept if they share nothing in it."""
        z, apart = self._run(x, called)
        if apart:
            known = _apart.get(self, set())
            _apart[self] = {situation, *(known if len(known) < KEPT_LAYOUTS else ())}
        return z

    def why_eager(self, x: Tensor) -> str | None:
        """That of the first of its blocks."""
        blocks = [child for child in self._called() if runs_fused(child)]
        return cast(FusedBlock, blocks[0]).why_eager(x) if blocks else "it has no fused block any more"

    def _called(self) -> list[Any]:
        """The modules that its own forward calls, one behind the other; none if that is not known any more."""
        return list(self._modules.values())

    def _run(self, x: Tensor, called: list[Any]) -> tuple[Tensor, bool]:
        """What those ``called`` return in the end, and whether the plan has each unit of theirs by itself."""
        known = is_norm_first if torch.is_grad_enabled() else runs_fused
        blocks = [child if known(child) and not eligible.answered(child) else None for child in called]
        ran, apart = functional.Ran(x), True
        for child, block, following in zip(called, blocks, [*blocks[1:], None], strict=True):
            if block is None:
                ran = functional.Ran(child(ran.z), apart=not runs_fused(child))
            else:
                ran = _looked_at(block, ran, following)
            apart = apart and ran.apart
        return ran.z, apart


class ConvertedStage(ConvertedBlocks):
    """A converted module whose own forward calls its blocks as a sequence would: they share launches as there."""

    def _called(self) -> list[Any]:
        return [] if self.is_stale() else [descendant(self, name) for name in self._conversion.calls]

    def _why_stale(self) -> str | None:
        return _why_unlike(self, self._conversion.seen)


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
    return eligible.Layer(run[0], run[1], IDENTITY if len(run) == 2 else eligible.activation_of(run[2]) or IDENTITY)


_KINDS = ConvertedSequential, ConvertedStage, ConvertedBlocks, ConvertedStem, ConvertedUnits, ConvertedBlock
_classes: dict[tuple[type, type], type] = {}


def _converted(kind: type[Converted], original: type[nn.Module]) -> type[Converted]:
    """The class that ``original`` is swapped for, made once."""
    key = kind, original
    if key not in _classes:
        attributes: dict[str, Any] = {"original": original, "__module__": __name__, "__doc__": kind.__doc__}
        _, taken = signature(original.forward).parameters.values()
        if taken.name != kind.forward.__code__.co_varnames[1] or taken.default is not taken.empty:
            attributes["forward"] = _taking(kind.forward, taken)
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


def _taking(forward: Any, parameter: Parameter) -> FunctionType:
    """``forward`` for callers who name its ``parameter`` as the original does, or leave it out where that may be."""
    own, _, *rest = forward.__code__.co_varnames
    code = forward.__code__.replace(co_varnames=(own, parameter.name, *rest))
    defaults = () if parameter.default is parameter.empty else (parameter.default,)
    return FunctionType(code, forward.__globals__, "forward", defaults)


def _blank(kind: type[Converted], original: type[nn.Module]) -> Converted:
    return cast(Converted, object.__new__(_converted(kind, original)))


def _kinds(module: nn.Module) -> tuple[Any, ...]:
    """Names and types of the submodules, with their own, and which activations they are.

    ``convert_sync_batchnorm`` may come before or after.
    """
    found: list[Any] = []
    for name, part in module._modules.items():
        kind = type(part)
        found += name, nn.BatchNorm2d if kind is nn.SyncBatchNorm else kind
        if part is not None and part._modules:
            found.append(_kinds(part))
        elif part is not None and kind not in (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm):
            found.append(eligible.activation_of(part))
    return tuple(found)


def _plain(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What a forward may branch on: attributes that are numbers, text, flags or functions, or hold some of these.

    Those that its class asks for and that it does not have by itself, it has as ``_Missing``.
    """
    names = [name for name in vars(module) if name not in INTERNAL and name not in _STATE]
    kind: type = own_class(module)
    missing = [name for name in attributes_read(kind) if _attribute(module, name) is _Missing]
    plain = [(name, _copied(vars(module)[name])) for name in names if is_plain(vars(module)[name])]
    return *plain, *((name, _Missing) for name in sorted(missing))


class _Missing:
    """In place of an attribute that an instance does not have."""


def _attribute(module: nn.Module, name: str) -> Any:
    """That of the instance; a parameter, buffer or submodule that is None is missing."""
    own = vars(module)
    if name in own:
        return own[name]
    held = (own[kind].get(name) for kind in ("_parameters", "_buffers", "_modules"))
    return next((value for value in held if value is not None), _Missing)


def _copied(value: Any) -> Any:
    """``value``, the containers in it as copies."""
    if type(value) in (list, tuple, set):
        return type(value)(map(_copied, value))
    return {k: _copied(v) for k, v in value.items()} if type(value) is dict else value


def _why_changed(module: nn.Module, plain: tuple[tuple[str, Any], ...]) -> str | None:
    """Why ``module`` does not have the attributes of :func:`_plain` any more, or None."""
    for name, value in plain:
        now = _attribute(module, name)
        if now is not value and not (is_plain(now) and now == value):
            return f"its attribute {name!r} is not what it was when it was recognised"
    return None


def _run_length(modules: Sequence[Any]) -> int:
    """How many of the first modules make one unit: convolution, batch norm and perhaps an activation; 0 if none do."""
    if len(modules) < 2 or eligible.why_unfusable(*modules[:2]) is not None or eligible.hooked(*modules[:2]):
        return 0
    if len(modules) < 3 or eligible.activation_in(modules[1]) != IDENTITY or eligible.hooked(modules[2]):
        return 2
    return 2 if eligible.activation_of(modules[2]) in (None, IDENTITY) else 3


def fuse(
    model: nn.Module, *, filter_fn: Filter | None = None, strict: bool = False, memory: str = "default"
) -> nn.Module:
    """Let the residual blocks of ``model`` run fused, in training and in inference, in place; returns ``model``.

    A block is recognised by what its own forward does (see :func:`resnet_fused.recognise.recognise`): those of
    torchvision's, timm's and Hugging Face's ResNets, those of pre-activation too, and any other that computes the same.
    In blocks that do more, the units (convolution, batch norm, activation, residual addition) run fused, and all
    between them as it is; also in an ``nn.Sequential``. The class of what is recognised becomes a subclass of its own,
    and nothing else
    changes: keys, ``Parameter`` objects, values, and how they lie in memory stay. Works before or after loading,
    moving, wrapping or training, and again on a fused model. Whatever is raised on the way, ``model`` is as before.

    The kernels read filters in channels_last: others cost a copy in every forward, which
    ``model.to(memory_format=torch.channels_last)`` saves.

    ``filter_fn(name, module)``: return False to leave a block alone. ``strict``: raise ValueError, changing nothing, if
    any block cannot be fused, or there is none. ``memory``: ``"default"`` keeps the raw output of each convolution for
    the backward; ``"recompute"`` computes the last one of each block, and its projection, again, but for those that a
    gate of squeeze and excitation multiplies. Warns (UserWarning) if nothing was fused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__qualname__}")
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(map(repr, MEMORY))}; got {memory!r}")
    found = [f for f in find(model) if filter_fn is None or filter_fn(f.name, f.module)]
    refused = [f for f in found if isinstance(f.verdict, str)]
    if strict and not found:
        raise ValueError(
            f"model must have something to fuse; {type(model).__qualname__} has no unit that is recognised"
        )
    if strict and refused:
        reasons = "\n".join(f"  {f.name or '(the model)'}: {f.verdict}" for f in refused)
        raise ValueError(f"model has {len(refused)} block(s) that cannot be fused:\n{reasons}")
    changed = [block for block in found if not isinstance(block.verdict, str)]
    with _restored_on_error(list(model.modules())):
        for block in changed:
            _swap(block, memory)
        for part in list(model.modules()):
            _let_share(part, memory)
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
    verdict: Layout | bool | str


def find(model: nn.Module) -> Iterator[Found]:
    """Every block of ``model``, from the outside in; inside one that can be fused, what is called as it is alone."""
    verdicts: dict[nn.Module, Verdict] = {}
    seen: set[nn.Module] = set()
    pending = [("", model)]
    while pending:
        name, module = pending.pop(0)
        if module in seen:
            continue
        seen.add(module)
        foreign = _foreign(module)
        verdict = foreign or _examine(module, verdicts)
        if isinstance(verdict, str) and not (foreign or _is_innermost(module)):
            verdict = None
        if verdict is not None:
            yield Found(name, module, verdict)
        if isinstance(verdict, UnitsLayout):
            verdicts.update((module.get_submodule(part), None) for part in verdict.through)
        if not (foreign or isinstance(verdict, BlockLayout)):
            pending += [(f"{name}.{child}".lstrip("."), m) for child, m in module.named_children()]


Verdict = Layout | bool | str | None


def _examine(module: nn.Module, verdicts: dict[nn.Module, Verdict]) -> Verdict:
    """The verdict on ``module``, or None if there is nothing to fuse in it. ``verdicts``: those so far."""
    if module not in verdicts:
        verdicts[module] = _judged(module, verdicts)
    return verdicts[module]


def _judged(module: nn.Module, verdicts: dict[nn.Module, Verdict]) -> Verdict:
    if isinstance(module, ConvertedSequential):
        return True
    if isinstance(module, FusedBlock) and not isinstance(module, Converted):
        return module.layout
    if isinstance(module, ConvertedBlock | ConvertedUnits) and not module.is_stale():
        return cast(Verdict, module.described()[0])
    if isinstance(module, _ConvNd) or not any(isinstance(part, _ConvNd) for part in module.modules()):
        return None
    if taken := _taken(module):
        return f"it has an attribute {taken[0]!r} of its own"
    if own_class(module).forward is nn.Sequential.forward:
        children = list(module._modules.values())
        return any(_run_length(children[i : i + 3]) for i in range(len(children))) or None
    if (stem := recognise_stem(module)) is not None:
        return stem
    if not has_units(module) and not _is_innermost(module):
        return None
    if any(_joins(part, verdicts) for part in module.children()):
        return None
    verdict = recognise(module)
    if isinstance(verdict, UnitsLayout) and not (
        verdict.joins or (_is_innermost(module) and _holds(module.children()))
    ):
        return None
    return verdict


def _joins(module: nn.Module, verdicts: dict[nn.Module, Verdict]) -> bool:
    """Whether ``module`` is, or holds, what adds the result of units to something: a residual block."""
    if not has_units(module):
        return False
    verdict = _examine(module, verdicts)
    if isinstance(verdict, BlockLayout | UnitsLayout):
        return verdict.residual if isinstance(verdict, BlockLayout) else verdict.joins
    return any(_joins(part, verdicts) for part in module.children())


def _foreign(module: nn.Module) -> str | None:
    """What ``module`` is, if it is nothing whose class can be swapped, or None."""
    if isinstance(module, fx.GraphModule):
        return "it is a torch.fx.GraphModule: fuse the model before it is traced"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a torch.jit.ScriptModule: fuse the model before it is scripted"
    return None


def _is_innermost(module: nn.Module) -> bool:
    """Whether ``module`` holds convolutions and norms, and no module inside it does: a block, not a network."""
    return [part for part in module.modules() if not is_container(part) and _holds(part.modules())] == [module]


def _holds(modules: Iterable[nn.Module]) -> bool:
    """Whether ``modules`` have a convolution and something that is named a norm."""
    parts = list(modules)
    return any(isinstance(part, _ConvNd) for part in parts) and any("Norm" in type(part).__name__ for part in parts)


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
        state = _Conversion(memory, verdict, _kinds(module), _plain(module), name=name)
    elif isinstance(verdict, UnitsLayout):
        kind = ConvertedUnits
        seen = [(path, module.get_submodule(path)) for path in ("", *verdict.through)]
        for _, part in seen[1:]:  # it runs what they hold itself
            _revert(part)
        state = _Conversion(memory, verdict, seen=tuple((path, _seen(part)) for path, part in seen), name=name)
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


def _let_share(module: nn.Module, memory: str) -> None:
    """Swap the class of ``module`` if it calls blocks one behind the other of which some may share launches."""
    if (isinstance(module, FusedBlock) and not isinstance(module, ConvertedStage)) or _foreign(module):
        return
    if type(module).forward is nn.Sequential.forward:
        if _may_share(module._modules.values()) and not _taken(module):
            _become(module, ConvertedBlocks, _Conversion(memory))
        return
    held = list(_held(module))
    if not (_may_share(held) and all(part._modules for part in held)) or _taken(module):
        return
    calls = recognise_stage(module)
    if _may_share(map(module.get_submodule, calls)):
        around = dict.fromkeys(path for call in calls for path in accumulate(call.split(".")[:-1], "{}.{}".format))
        seen = tuple([(path, _seen(module.get_submodule(path))) for path in ("", *around)])
        _become(module, ConvertedStage, _Conversion(memory, seen=seen, calls=calls))


def _taken(module: nn.Module) -> list[str]:
    """The names of ours that a stranger's ``module`` has attributes of."""
    return [] if isinstance(module, Converted) else [name for name in _CLAIMED if hasattr(module, name)]


def _may_share(modules: Iterable[nn.Module | None]) -> bool:
    """Whether one of the ``modules`` may share a launch with what is called behind it."""
    called = list(modules)
    return any(map(_ends_pointwise, called)) or any(is_norm_first(a) and is_norm_first(b) for a, b in pairwise(called))


def _held(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that ``module`` holds, itself or in containers."""
    for child in module.children():
        yield from _held(child) if is_container(child) else (child,)


def _ends_pointwise(block: nn.Module | None) -> bool:
    if block is None or not runs_fused(block):
        return False
    layout = cast(FusedBlock, block).described()[0]
    conv = cast(nn.Conv2d, block.get_submodule(layout.units[-1].conv))
    return layout.residual and not layout.norm_first and conv.weight.shape[2:] == (1, 1)


def _seen(module: nn.Module) -> _Seen:
    return _Seen(own_class(module), _children(module), _plain(module))


def _revert(module: nn.Module) -> None:
    if isinstance(module, Converted):
        module.__class__ = _reverted(cast(Any, type(module)))
        vars(module).pop("_conversion", None)
