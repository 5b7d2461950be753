"""Stages: modules that call what they hold, one on the result of the other, and do nothing else.

A symbolic trace would show what a forward calls, but not what it looked at to get there: a flag of a block, its class,
an attribute that may come later. So the forward runs on stand-ins that can be called and iterated over, and answer
nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from inspect import Parameter, signature
from typing import Any, NoReturn

import torch
from torch import nn

from resnet_fused.traced import (
    INTERNAL,
    NoArithmetic,
    Untraceable,
    autocast_told,
    code_of,
    is_plain,
    modes,
    own_class,
    same_random_numbers,
)


def recognise_stage(module: nn.Module) -> tuple[str, ...]:
    """The names of the modules that ``module`` calls, if its forward looks at nothing but plain attributes of its own.

    With gradients, without, in inference mode, and under autocast, it must call the same. Else there are none.
    """
    forward = own_class(module).forward
    parameters = list(signature(forward).parameters.values())[1:]
    variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    if "forward" in vars(module) or len(parameters) != 1 or parameters[0].kind in variable:
        return ()
    if any(not _ASKING.isdisjoint(code.co_names) for code in code_of([forward])):
        return ()
    found = {_calls(module, mode(), autocast) for mode in _MODES for autocast in (False, True)}
    return found.pop() if len(found) == 1 else ()


_MODES = (torch.no_grad, torch.enable_grad, torch.inference_mode)
_ASKING = frozenset(("type", "id", "vars", "dir"))
"""What a stand-in would have to answer."""


def _calls(module: nn.Module, mode: AbstractContextManager[Any], autocast: bool) -> tuple[str, ...]:
    try:
        with same_random_numbers(Untraceable), mode, autocast_told(autocast), NoArithmetic():
            log = _Log()
            result = own_class(module).forward(_Self(module, log), log.last)  # type: ignore[arg-type]
            return tuple(log.calls) if result is log.last and not log.refused else ()
    except Exception:  # whatever the forward of a stranger may raise
        return ()


class _Log:
    """What was called so far, by name, and what came of it in the end; whether anything was ``refused``."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refused = False
        self.last = _Value(self)
        self.modes = modes()

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
        if len(args) != 1 or args[0] is not self.last or kwargs or modes() != self.modes:
            self.refuse("calls a module on something else than what came of the one before")
        self.calls.append(name)
        self.last = _Value(self)
        return self.last

    def refuse(self, reason: str) -> NoReturn:
        self.refused = True  # a forward may catch what is raised
        raise Untraceable(f"its forward {reason}")


class _Silent:
    """Answers nothing."""

    def __init__(self, log: _Log) -> None:
        object.__setattr__(self, "log", log)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        log: _Log = object.__getattribute__(self, "log")
        log.refuse("looks at what it calls, or at what comes of it")

    __getattribute__ = __setattr__ = __delattr__ = __eq__ = __ne__ = __bool__ = __len__ = _refuse  # type: ignore[assignment]
    __iter__ = __getitem__ = __contains__ = __repr__ = __format__ = __call__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class _Value(_Silent):
    """In place of a tensor."""


class _Part(_Silent):
    """In place of a module of this ``name``."""

    def __init__(self, name: str, log: _Log) -> None:
        super().__init__(log)
        object.__setattr__(self, "name", name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        log, name = (object.__getattribute__(self, held) for held in ("log", "name"))
        return log.call(name, args, kwargs)


class _Container(_Part):
    """In place of a container of modules; of a sequence, which can be called as well."""

    def __init__(self, module: nn.Module, name: str, log: _Log) -> None:
        super().__init__(name, log)
        parts = _parts(module, log, f"{name}.")
        object.__setattr__(self, "parts", parts if isinstance(module, nn.ModuleDict) else [*parts.values()])

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(object.__getattribute__(self, "parts"))

    def __len__(self) -> int:  # type: ignore[override]
        return len(object.__getattribute__(self, "parts"))

    def __getitem__(self, key: Any) -> Any:
        return object.__getattribute__(self, "parts")[key]


class _Self(_Silent):
    """In place of the ``module`` itself: has its submodules, and its own plain attributes, as copies."""

    def __init__(self, module: nn.Module, log: _Log) -> None:
        super().__init__(log)
        object.__setattr__(self, "held", (module, _parts(module, log, "")))

    def __getattribute__(self, name: str) -> Any:
        module, parts = object.__getattribute__(self, "held")
        if name == "children" and own_class(module).children is nn.Module.children:
            return lambda: iter(parts.values())
        if name in parts:
            return parts[name]
        value = vars(module).get(name, _Silent)
        if name in INTERNAL or value is _Silent or not is_plain(value):
            object.__getattribute__(self, "log").refuse(f"reads {name!r}")
        return copy.copy(value)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        module, parts = object.__getattribute__(self, "held")
        if getattr(own_class(module), "__iter__", None) is not nn.Sequential.__iter__:
            object.__getattribute__(self, "log").refuse("iterates over the module")
        return iter(parts.values())


def _parts(module: nn.Module, log: _Log, prefix: str) -> dict[str, _Part]:
    """What stands for the submodules, by name. Raises :class:`Untraceable` for one that is missing, or there twice."""
    modules = list(module._modules.values())
    if None in modules or len(set(modules)) < len(modules):
        raise Untraceable("a submodule is missing, or has several names")
    return {name: _part(part, f"{prefix}{name}", log) for name, part in module._modules.items() if part is not None}


def _part(module: nn.Module, name: str, log: _Log) -> _Part:
    held = own_class(module) in (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    return _Container(module, name, log) if held else _Part(name, log)
