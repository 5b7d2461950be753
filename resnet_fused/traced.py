"""What the forward of a stranger's module does, as a graph: traced symbolically, on a twin, in every mode."""

from __future__ import annotations

import copy
import dis
import enum
import operator
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, isroutine, signature
from types import CodeType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from resnet_fused.engine.request import requested
from resnet_fused.modules import traced_forward
from resnet_fused.plan.decide import tf32


class Untraceable(Exception):
    """Says why the forward of a module is not known."""


class State(NamedTuple):
    """In which a forward is traced; ``frozen``: batch norms are in evaluation all the same; ``autocast``: under it."""

    training: bool
    frozen: bool = False
    autocast: bool = False

    def __str__(self) -> str:
        if self.autocast:
            return "under autocast"
        if self.frozen:
            return "in training with batch norm in evaluation"
        return "in training" if self.training else "with gradients"


EVALUATION = State(training=False)
STATES = (
    State(training=True),
    State(training=True, frozen=True),
    EVALUATION,
    State(training=False, autocast=True),
)


def forward_of(module: nn.Module, through: frozenset[str]) -> fx.Graph:
    """The graph of the forward of ``module``, the same in training as in evaluation, and with batch norms frozen.

    ``through``: the dotted names of the modules inside that are seen through; all others are called as they are.
    Raises :class:`Untraceable` for a forward that looks at sizes, values or types, that writes, draws random numbers,
    computes with tensors of its own, switches modes, or differs between these.
    """

    def tracer() -> Tracer:
        return Tracer(lambda _, name: name not in through)

    with torch.no_grad():
        graph = trace(module, EVALUATION, tracer)
    with torch.enable_grad():
        for state in STATES:
            try:
                other = trace(module, state, tracer)
            except Untraceable as reason:
                raise Untraceable(f"{state}, {reason}") from reason
            if _text(other) != _text(graph):
                raise Untraceable(f"its forward {state} is not that in evaluation")
    return graph


def _text(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(node.op, node.target, repr(node.args), repr(node.kwargs)) for node in graph.nodes]


class Value(fx.Proxy):
    """A proxy that tells ``a += b`` from ``a = a + b``, and does not lie to a forward that asks for its type."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __getattr__(self, name: str) -> Any:
        if self.node.op == "placeholder" and not hasattr(Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return super().__getattr__(name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        asking = str(sys._getframe(1).f_globals.get("__name__"))
        if asking.startswith(("torch.", "resnet_fused.")):  # but for torch.is_tensor
            return type(self)
        if self.node.op == "placeholder":
            return Tensor
        raise Untraceable("its forward looks at the type of a value")


class Tracer(fx.Tracer):
    """``leaf``: whether a module, of this name, is called as it is."""

    def __init__(self, leaf: Callable[[nn.Module, str], bool]) -> None:
        super().__init__()
        self.leaf = leaf
        self.modes = modes()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaf(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_module(m, traced_forward(m, forward), args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if modes() != self.modes:
            raise Untraceable("its forward switches gradients, autocast, saved-tensor hooks, libraries or streams")
        return super().create_node(*args, **kwargs)


class NoArithmetic(TorchDispatchMode):
    """A graph would keep what comes of tensors that are no inputs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable("its forward computes with tensors of its own, or draws random numbers")


def modes() -> tuple[Any, ...]:
    """What a forward may switch for a part of itself."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        requested(),
        tf32(torch.float32),
        *(torch._C._get_cudnn_enabled(), torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_deterministic()),
        torch.cuda.is_initialized() and torch.cuda.current_stream(),
    )


def trace(module: nn.Module, state: State, tracer: Callable[[], Tracer]) -> fx.Graph:
    """The graph of what ``module`` does in ``state``. Nothing is computed, and the module is not touched.

    Raises :class:`Untraceable`.
    """
    if "forward" in vars(module):
        raise Untraceable("its forward is replaced on the instance")
    parameters = list(signature(own_class(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
        raise Untraceable("its forward takes more than one input")
    twins: dict[nn.Module, nn.Module] = {}
    failure = ""
    with same_random_numbers(Untraceable):
        try:
            twin = _twin(module, state, twins)
            before = [_attributes(part) for part in twins.values()]
            with NoArithmetic(), autocast_told(state.autocast):
                graph = tracer().trace(twin)
        except Untraceable as reason:
            failure = str(reason)
        except Exception as error:  # whatever the forward of a stranger may raise
            failure = f"its forward cannot be traced: {(str(error) or type(error).__name__).splitlines()[0]}"
    if failure:  # raised here, where the error is gone, and with it what the forward had open
        raise Untraceable(failure)
    for part, attributes in zip(twins.values(), before, strict=True):
        now = _attributes(part)
        if now.keys() != attributes.keys() or any(not _is_same(now[k], v) for k, v in attributes.items()):
            raise Untraceable("its forward writes to the module")
    return graph


@contextmanager
def autocast_told(enabled: bool) -> Iterator[None]:
    """What a forward that asks for autocast is told, whichever devices there are."""
    before = [(device, torch.is_autocast_enabled(device)) for device in ("cpu", "cuda")]
    try:
        for device, was in before:
            torch.set_autocast_enabled(device, enabled or was)
        yield
    finally:
        for device, was in before:
            torch.set_autocast_enabled(device, was)


@contextmanager
def same_random_numbers(error: type[Exception]) -> Iterator[None]:
    """Random states stay as they are; raises ``error`` if the ``with`` block draws from them."""
    with _disable_current_modes():  # in which a state would be a tensor without data
        python, states = random.getstate(), torch.get_rng_state()
    try:
        yield
        with _disable_current_modes():
            drawn = random.getstate() != python or not torch.equal(torch.get_rng_state(), states)
        if drawn:
            raise error("its forward draws random numbers")
    finally:
        with _disable_current_modes():
            random.setstate(python)
            torch.set_rng_state(states)


def _attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    """All that a forward might write to: values, containers with what they hold, tensors with their version."""
    own = {("", name): value for name, value in vars(module).items()}
    kept = ("_parameters", "_buffers", "_modules")
    own |= {(kind, name): value for kind in kept for name, value in vars(module)[kind].items()}
    return {key: (value, _content(value)) for key, value in own.items()}


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    return copy.copy(value) if type(value) in (list, dict, set) else None


def _is_same(now: tuple[Any, Any], before: tuple[Any, Any]) -> bool:
    """Whether a value and its content are: what a container holds is told apart by identity."""
    if now[0] is not before[0] or type(now[1]) is not type(before[1]):
        return False
    if isinstance(now[1], list | dict | set):
        held, held_before = (list(c.items() if isinstance(c, dict) else c) for c in (now[1], before[1]))
        return len(held) == len(held_before) and all(map(_is_identical, held, held_before))
    return bool(now[1] == before[1])


def _is_identical(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, tuple) and len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True)))


def code_of(values: Iterable[Any]) -> Iterator[CodeType]:
    """That of functions and properties among ``values``, of what they wrap, and of the functions in them."""
    waiting: list[Any] = [*values]
    while waiting:
        value = waiting.pop()
        waiting += [
            held for held in (getattr(value, name, None) for name in ("fget", "__wrapped__", "__code__")) if held
        ]
        if isinstance(value, CodeType):
            yield value
            waiting += [constant for constant in value.co_consts if isinstance(constant, CodeType)]


@cache
def attributes_read(kind: type) -> frozenset[str]:
    """Names that the functions of ``kind`` ask something for, or might, once it is made: texts in them count as well.

    Not counted are those of PyTorch's own classes.
    """
    found: set[str] = set()
    bases = [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.")]
    own = [value for base in bases for name, value in vars(base).items() if name != "__init__"]
    for part in code_of(own):
        found.update(value for value in part.co_consts if isinstance(value, str))
        found.update(i.argval for i in dis.get_instructions(part) if i.opname in ("LOAD_ATTR", "LOAD_METHOD"))
    return frozenset(name for name in found if name.isidentifier() and not name.startswith("__"))


def own_class(module: nn.Module) -> type[nn.Module]:
    """That of ``module``, or what it was before it was converted."""
    return cast(type[nn.Module], getattr(module, "original", type(module)))


def _twin(module: nn.Module, state: State, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy to be traced: attributes, containers and tensors of its own, so that the original stays untouched.

    ``twins``: of every module so far, by the original. Parts that are not traced into keep their tensors.
    """
    if module not in twins:
        twin = object.__new__(own_class(module))
        twins[module] = twin
        frozen = state.frozen and isinstance(module, _BatchNorm)
        vars(twin).update(vars(module), training=state.training and not frozen)
        leaf = not module._modules
        for name in ("_parameters", "_buffers"):
            vars(twin)[name] = {k: t if leaf else _copied(t) for k, t in vars(module)[name].items()}
        vars(twin)["_modules"] = {
            name: None if part is None else _twin(part, state, twins) for name, part in module._modules.items()
        }
        for name, value in vars(module).items():
            if name not in INTERNAL:
                vars(twin)[name] = _own(value, twins)
    return twins[module]


def _own(value: Any, twins: dict[nn.Module, nn.Module]) -> Any:
    """``value``; a container, which the forward may write to, as a copy that holds twins instead of modules."""
    if type(value) in (list, tuple, set):
        return type(value)(_own(v, twins) for v in value)
    if type(value) is dict:
        return {k: _own(v, twins) for k, v in value.items()}
    if isinstance(value, nn.Module):
        return twins.get(value, value)
    return value if isinstance(value, Tensor) or is_plain(value) else _Unknown(type(value).__qualname__)


class _Unknown:
    """In place of an object that may change without a trace: a forward may pass it on, but not look at it."""

    def __init__(self, kind: str) -> None:
        object.__setattr__(self, "kind", kind)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise Untraceable(f"its forward reads an attribute that is {object.__getattribute__(self, 'kind')}")

    __getattr__ = __setattr__ = __call__ = __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = _refuse
    __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__


INTERNAL = frozenset(vars(nn.Module()))
"""The attributes of every module."""

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type, enum.Enum, slice, range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def is_plain(value: Any) -> bool:
    """Whether ``value`` is one that a forward may branch on, and that can be compared: a number, text, a type ..."""
    if isinstance(value, list | tuple | set):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, (*value, *value.values())))
    return isinstance(value, _PLAIN) or isroutine(value)


def _copied(t: Tensor | None) -> Tensor | None:
    """The same values in memory of their own."""
    if t is None:
        return None
    with torch.no_grad():
        return nn.Parameter(t.clone(), t.requires_grad) if isinstance(t, nn.Parameter) else t.clone()
