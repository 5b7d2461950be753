"""Which implementation is asked for: in this thread or task, and again where a backward pass recomputes."""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils import checkpoint

from resnet_fused.plan.problem import REQUESTS, Request


def _checked(name: str, source: str) -> Request:
    for known in REQUESTS:
        if name == known:
            return known
    raise ValueError(f"{source} must be one of {', '.join(map(repr, REQUESTS))}; got {name!r}")


class _Asked(NamedTuple):
    """An implementation asked for, and the backward pass inside which it was, or -1."""

    name: Request
    backward: int


_DEFAULT = _Asked(
    _checked(os.environ.get("RESNET_FUSED") or "auto", "the environment variable RESNET_FUSED"), backward=-1
)


_requested: ContextVar[_Asked] = ContextVar("resnet_fused_implementation", default=_DEFAULT)


class _Traced(threading.local):
    """The same for torch.compile, of which not every supported version can read a context variable."""

    def __init__(self) -> None:
        self.name = _DEFAULT.name


_traced = _Traced()


@contextlib.contextmanager
def implementation(name: Request) -> Iterator[None]:
    """Force a road inside the ``with`` block, for this thread or task.

    ``"triton"`` launches the kernels on whatever tensors come (on CPU tensors: in Triton's interpreter under
    ``TRITON_INTERPRET=1``), convolutions included. ``"mixed"`` does the same, but leaves the convolutions to PyTorch.
    ``"eager"`` runs PyTorch's own operators. ``"auto"`` (the default, or what the environment variable
    ``RESNET_FUSED`` says) launches the kernels on CUDA tensors, chooses per unit (see
    :func:`decide`), and runs eager elsewhere.

    What a backward pass computes again (``torch.utils.checkpoint``) takes the road of its forward, wherever
    ``backward()`` is called.

    Raises ValueError for any other name.
    """
    token = _requested.set(_Asked(_checked(name, "implementation"), torch._C._current_graph_task_id()))
    before, _traced.name = _traced.name, name
    try:
        yield
    finally:
        _traced.name = before
        _requested.reset(token)


def requested(module: nn.Module | None = None) -> Request:
    """The implementation in force: ``"auto"``, ``"triton"``, ``"mixed"`` or ``"eager"``.

    ``module``: whose forward asks. Inside a backward pass, which is no place of the user's, it is told what its forward
    before was told; unless the forward itself opens an :func:`implementation` block, and so does again.
    """
    if torch.compiler.is_dynamo_compiling():
        return _traced.name
    request = _requested.get()
    if module is None or (request is _DEFAULT and not _forwards):
        return request.name
    backward = torch._C._current_graph_task_id()
    if backward == -1:
        _remember(module, request)
    elif request.backward != backward:
        return _recall(module)
    return request.name


@dataclass
class _Forwards:
    """What the forwards of a module were told: the last one, and those that a checkpoint may still compute again."""

    last: Request
    checkpointed: WeakKeyDictionary[Any, Request] = field(default_factory=WeakKeyDictionary)


_forwards: WeakKeyDictionary[nn.Module, _Forwards] = WeakKeyDictionary()
"""By module; one that is missing has only ever been told the default."""


def _remember(module: nn.Module, request: _Asked) -> None:
    found = _forwards.get(module)
    if found is None:
        if request is _DEFAULT:
            return
        found = _forwards[module] = _Forwards(request.name)
    found.last = request.name
    if (frame := _checkpoint_frame()) is not None:
        found.checkpointed[frame] = request.name
    elif request is _DEFAULT and not found.checkpointed:
        _forwards.pop(module, None)  # another thread may have been faster


def _recall(module: nn.Module) -> Request:
    found = _forwards.get(module)
    if found is None:
        return _DEFAULT.name
    frame = _checkpoint_frame()
    return found.last if frame is None else found.checkpointed.get(frame, found.last)


def _checkpoint_frame() -> Any:
    """What PyTorch keeps of the innermost checkpointed call that runs, or is computed again, here; None outside of one.

    Both install hooks for saved tensors that hold on to it.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or getattr(hooks[0], "__module__", "") != checkpoint.__name__:
        return None
    pending = [hooks[0]]
    while pending:
        for cell in getattr(pending.pop(), "__closure__", None) or ():
            held = cell.cell_contents
            held = held() if isinstance(held, weakref.ref) else held
            if isinstance(held, checkpoint._CheckpointFrame):
                return held
            if inspect.isfunction(held):  # some versions wrap the hook
                pending.append(held)
    return None
