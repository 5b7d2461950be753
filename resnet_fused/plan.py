"""Which implementation runs, with which tiles, and why: in words."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils import checkpoint

from resnet_fused import roofline
from resnet_fused.kernels.launch import INTERPRETER, dry_target, interpreting
from resnet_fused.problem import Problem, Tiles

logger = logging.getLogger("resnet_fused")

IMPLEMENTATIONS = ("auto", "triton", "mixed", "eager")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)
MAX_FILTER = 7


def _checked(name: str, source: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, IMPLEMENTATIONS))}; got {name!r}")
    return name


class _Request(NamedTuple):
    """An implementation asked for, and the backward pass inside which it was, or -1."""

    name: str
    backward: int


_DEFAULT = _Request(
    _checked(os.environ.get("RESNET_FUSED") or "auto", "the environment variable RESNET_FUSED"), backward=-1
)
_requested: ContextVar[_Request] = ContextVar("resnet_fused_implementation", default=_DEFAULT)


class _Traced(threading.local):
    """The same for torch.compile, of which not every supported version can read a context variable."""

    def __init__(self) -> None:
        self.name = _DEFAULT.name


_traced = _Traced()


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
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
    token = _requested.set(_Request(_checked(name, "implementation"), torch._C._current_graph_task_id()))
    before, _traced.name = _traced.name, name
    try:
        yield
    finally:
        _traced.name = before
        _requested.reset(token)


def tf32(dtype: torch.dtype) -> bool:
    """Whether a convolution in ``dtype`` may round its factors to TF32: as cuDNN may.

    Asks for what both ``torch.backends.cudnn.allow_tf32`` and the newer ``cudnn.conv.fp32_precision`` set: the former
    can not be read once the latter was used. By the function behind the property, which takes a quarter of the time.
    """
    return dtype == torch.float32 and torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"


def requested(module: nn.Module | None = None) -> str:
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

    last: str
    checkpointed: WeakKeyDictionary[Any, str] = field(default_factory=WeakKeyDictionary)


_forwards: WeakKeyDictionary[nn.Module, _Forwards] = WeakKeyDictionary()
"""By module; one that is missing has only ever been told the default."""


def _remember(module: nn.Module, request: _Request) -> None:
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


def _recall(module: nn.Module) -> str:
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


@dataclass(frozen=True)
class Plan:
    """How a unit runs, and why.

    ``implementation``: "fused" (Triton convolves), "mixed" (PyTorch convolves, with our kernels around), "eager", or
    "cudnn" (one call of cuDNN with batch norm folded in: in a frozen model, where that was measured to be fastest).
    ``seconds``: what it takes, measured if ``source`` is "tuned", predicted if it is "model", None if it is "forced".
    ``alternatives``: every implementation with the seconds that the model predicts for the GPU, fastest first.
    """

    implementation: str
    tiles: Tiles
    seconds: float | None
    source: str
    reason: str
    alternatives: tuple[tuple[str, float], ...]


class Entry(Protocol):
    """What was measured of a problem."""

    @property
    def implementation(self) -> str: ...
    @property
    def tiles(self) -> Tiles: ...
    @property
    def seconds(self) -> float: ...
    @property
    def reason(self) -> str: ...


class Table(Protocol):
    """Measurements of one GPU."""

    def lookup(self, problem: Problem) -> Entry | None:
        """What was measured of ``problem``, or of the nearest number of pixels."""

    def __hash__(self) -> int:
        """That of its identity."""


HOST_SECONDS = {"fused": 45e-6, "mixed": 75e-6, "eager": 45e-6}
"""What the host takes to launch a unit in inference, as ``python -m resnet_fused.benchmarks.host`` measured it without
a GPU (docs/results.md): eager PyTorch's launches on one are not in it."""


def waited(problem: Problem, implementation: str, seconds: float) -> float:
    """``seconds`` of the GPU, or those of the host where it takes longer: in inference outside of a CUDA graph.

    Not in a frozen model, which replays one; nor in training, where the batches are large as a rule.
    """
    return max(seconds, HOST_SECONDS[implementation]) if problem.direction == "inference" else seconds


_ROADS = {"triton": "fused", "mixed": "mixed", "eager": "eager"}


@lru_cache(maxsize=4096)
def decide(problem: Problem, request: str = "auto", table: Table | None = None) -> Plan:
    """The plan for ``problem``: what the user forces, else what was measured, else what the model predicts.

    Pure: it looks at its arguments alone, and needs no GPU. The model: :mod:`resnet_fused.roofline`.
    """
    entry = table.lookup(problem) if table is not None else None
    tiles = entry.tiles if entry is not None and entry.implementation == "fused" else Tiles()
    alternatives = () if problem.arch == INTERPRETER else roofline.compare(problem, tiles)
    if request != "auto":
        return Plan(_ROADS[request], tiles, None, "forced", f"implementation({request!r}) is in force", alternatives)
    if entry is not None:
        return Plan(entry.implementation, tiles, entry.seconds, "tuned", entry.reason, alternatives)
    if not alternatives:
        return Plan("fused", tiles, None, "model", "the interpreter has no speed to predict", ())
    best, seconds = min(alternatives, key=lambda way: (waited(problem, *way), way[1]))
    return Plan(best, tiles, seconds, "model", _why(problem, best, alternatives[0][0], tiles), alternatives)


def _why(problem: Problem, best: str, fastest: str, tiles: Tiles) -> str:
    slowest = max(roofline.predict(problem, best, tiles), key=lambda launch: launch.seconds)
    but = "" if best == fastest else f" but {fastest}, which would keep the host longer"
    reason = f"predicted fastest{but}; longest: {slowest.kernel}, bound by {slowest.bound}"
    if best == "fused":
        return reason
    held_up = max(roofline.predict(problem, "fused", tiles), key=lambda launch: launch.seconds)
    return f"{reason}; fused: {held_up.kernel} {held_up.seconds * 1e6:.1f} us, bound by {held_up.bound}"


_records: list[list[Problem]] = []


@contextlib.contextmanager
def record() -> Iterator[list[Problem]]:
    """The problems that are planned inside the ``with`` block, in order, each as often as it comes up."""
    found: list[Problem] = []
    _records.append(found)
    try:
        yield found
    finally:
        _records[:] = [other for other in _records if other is not found]


def note(problem: Problem) -> None:
    """That ``problem`` is planned, for :func:`record` to see."""
    for found in _records:
        found.append(problem)


def target(device: torch.device) -> tuple[int, str]:
    """Architecture and name of the GPU that a launch on ``device`` runs on; 0 and "" for the interpreter."""
    if (named := dry_target()) is not None:
        return named
    if interpreting() or device.type != "cuda":
        return INTERPRETER, ""
    return _gpu(device)


@cache
def _gpu(device: torch.device) -> tuple[int, str]:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_name(device)


def present_gpu(arch: int) -> str:
    """The name of this process's CUDA GPU if it is of ``arch``, so that its measurements count; else ""."""
    if not torch.cuda.is_available():
        return ""
    found, name = _gpu(torch.device("cuda", torch.cuda.current_device()))
    return name if found == arch else ""


FORCED = "implementation('eager') is in force"
NO_GPU = "the input is not on a CUDA GPU"
TRACED = "torch.fx traces it"
_EXPECTED = (FORCED, NO_GPU, TRACED)


def why_eager(x: Tensor, request: str | None = None) -> str | None:
    """Why a unit whose input is ``x`` cannot be fused where it stands, or None if it can.

    ``request``: see :func:`requested`, which is asked without it.
    """
    if not isinstance(x, Tensor):
        return TRACED if isinstance(x, fx.Proxy) else f"the input is {type(x).__qualname__}, not a tensor"
    request = requested() if request is None else request
    if request == "eager":
        return FORCED
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "a transform of torch.func is active"
        if forward_ad._current_level >= 0:
            return "forward-mode differentiation is active"
    if request == "auto":
        if not torch.compiler.is_compiling() and dry_target() is not None:
            return None
        if not x.is_cuda:
            return NO_GPU
        if (found := torch.cuda.get_device_capability(x.device)) < MIN_CAPABILITY:
            return f"the GPU has compute capability {found[0]}.{found[1]}: the kernels need 8.0 or newer"
    return None


_reported: set[str] = set()


def report_once(reason: str) -> None:
    """Log why a unit is not fused, the first time that ``reason`` comes up, unless it was to be expected."""
    if reason not in _EXPECTED:
        warn_once(f"runs eager: {reason}")


def warn_once(message: str) -> None:
    """Log ``message`` the first time that it comes up."""
    if not torch.compiler.is_compiling() and message not in _reported:
        _reported.add(message)
        logger.warning(message)
