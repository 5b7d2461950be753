"""How everything is measured: what runs in each phase, and how it is timed."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import implementation
from resnet_fused.commands.clock import ColdClock
from resnet_fused.plan.decide import tf32
from resnet_fused.plan.problem import dtype_name, number_format

from .peers import Peer
from .shapes import Case, LayerCase

FORWARD, BACKWARD, STEP = PHASES = ("forward", "forward+backward", "training step")
WARM_UP = 3


@dataclass(frozen=True)
class Setting:
    """One thing to measure. ``phase``: one of :data:`PHASES`; the forward alone is that of inference."""

    case: Case
    batch: int
    dtype: torch.dtype
    phase: str
    device: torch.device

    @property
    def training(self) -> bool:
        """Whether gradients are computed."""
        return self.phase != FORWARD

    @property
    def number_format(self) -> str:
        """What a GPU multiplies in: tf32, or the dtype's name."""
        return number_format(self.dtype, tf32(self.dtype))

    def __str__(self) -> str:
        return f"{self.case.name}, batch {self.batch}, {dtype_name(self.dtype)}, {self.phase}"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each call, in the order of the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the calls took no longer."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third; of a single call, itself."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third


class PeerRunner:
    """A peer at work on a setting: call it to run the phase once.

    Training runs under autocast where the dtype has 16 bits, with fp32 parameters, as mixed precision does; inference
    with parameters in the dtype. On a GPU the forward of a single layer is a CUDA graph, so that what is timed is the
    GPU's work. Raises whatever the peer raises.
    """

    def __init__(self, peer: Peer, setting: Setting) -> None:
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        self.peer, self.setting = peer, setting
        self.model, self.x = operands(setting, setting.device)
        with self.conditions():
            with _autocast(setting):
                forward = peer.prepare(self.model, self.x)
            run = _under_autocast(setting, forward)
            self._run = self._replay = phase_function(setting.phase, run, self.model, self.x, setting.device)
            for _ in range(WARM_UP):
                self._run()
            alone = isinstance(setting.case, LayerCase) and not setting.training
            if setting.device.type == "cuda" and alone and not peer.own_graph:
                self._replay = _graph(self._run, setting.device)

    @contextlib.contextmanager
    def conditions(self) -> Iterator[None]:
        """What must be in force around a call, and is not timed."""
        with implementation(self.peer.implementation), torch.set_grad_enabled(self.setting.training):
            yield

    def __call__(self) -> Any:
        return self._replay()

    def peak_memory(self) -> int | None:
        """Bytes that a call allocates at most, above what is there before.

        None on a CPU, where nobody counts them, and for a peer that has a CUDA graph, which holds its own before.
        """
        device = self.setting.device
        if device.type != "cuda" or self.peer.own_graph:
            return None
        self.model.zero_grad(set_to_none=True)
        self.x.grad = None
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with self.conditions():
            self._run()
        return torch.cuda.max_memory_allocated(device) - before


class Stopwatch:
    """Milliseconds of one call: by the clock on a CPU; on a GPU by events, with a cold L2."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._gpu = ColdClock(device) if device.type == "cuda" else None

    def flush(self) -> None:
        """Empty the GPU's L2 of everything that a call might read."""
        if self._gpu is not None:
            self._gpu.flush()

    def __call__(self, function: Callable[[], object]) -> float:
        if self._gpu is not None:
            with torch.cuda.device(self.device):
                return self._gpu.seconds(function) * 1e3
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3


def synchronised() -> float:
    """Seconds on the clock once the GPU, if there is one, has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleave(runners: Mapping[str, PeerRunner], rounds: Iterable[int], device: torch.device) -> dict[str, Timing]:
    """Time every runner once per round, in an order that shifts from round to round.

    So whatever else the machine does meets all of them alike, and times of one round may be compared.
    """
    stopwatch, names = Stopwatch(device), list(runners)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in rounds:
        shift = i % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            with runners[name].conditions():
                samples[name].append(stopwatch(runners[name]))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def operands(setting: Setting, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A fresh model and its input: the gradient of images nobody needs, that of anything else is needed."""
    with torch.device(device):
        model = setting.case.build().train(setting.training)
        x = torch.randn(setting.batch, *setting.case.image).to(setting.dtype)
    if not setting.training:
        model.requires_grad_(False).to(setting.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    return model, x.requires_grad_(setting.training and x.shape[1] != 3)


def _autocast(setting: Setting) -> torch.autocast:
    enabled = setting.training and setting.dtype != torch.float32
    return torch.autocast(setting.device.type, setting.dtype if enabled else None, enabled=enabled)


def _under_autocast(setting: Setting, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``forward`` under autocast where it is needed; the backward stays outside, as PyTorch advises."""
    if not _autocast(setting)._enabled:
        return forward

    def run() -> Tensor:
        with _autocast(setting):
            return forward()

    return run


def phase_function(
    phase: str, forward: Callable[[], Tensor], model: nn.Module, x: Tensor, device: torch.device
) -> Callable[[], Any]:
    """What runs ``phase`` once, where ``forward`` computes ``model(x)`` on ``device``."""
    if phase == FORWARD:
        return forward
    if phase == BACKWARD:
        dy = torch.randn_like(forward())

        def both() -> None:
            model.zero_grad(set_to_none=True)
            x.grad = None
            forward().backward(dy)

        return both
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=x.dtype == torch.float16)
    labels = torch.zeros(len(x), dtype=torch.long, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(F.cross_entropy(forward().float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def _graph(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``function``, which is warm, recorded once and replayed from then on."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        # a capture that fails stays on its stream
        with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
            out = function()

    def replay() -> Any:
        graph.replay()
        return out

    return replay
