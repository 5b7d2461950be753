"""What is counted without running it: launches, operations, bytes, and the time that a roofline allows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_fused import implementation, trace
from resnet_fused.kernels.gpus import GPU, gpu_of
from resnet_fused.kernels.launch import dry_run
from resnet_fused.plan.decide import arch_of

from .measure import STEP, Setting, operands, phase_function
from .peers import PEERS, Peer

PLANNED = 90
"""The architecture for which launches are counted where there is no GPU: the H100's."""


def counted_gpu(device: torch.device) -> GPU:
    """The facts about ``device``; on a CPU, about the GPU that stands for :data:`PLANNED`."""
    if device.type != "cuda":
        return gpu_of(PLANNED)
    return gpu_of(arch_of(device), torch.cuda.get_device_name(device))


@dataclass(frozen=True)
class CountedWork:
    """What a phase launches, and what that costs at the least, for one batch: counted from shapes, nothing is run.

    ``bytes`` by kind of launch (:func:`kind`); each operand counts once per launch. ``saved``: bytes kept for the
    backward, without parameters and input.
    """

    launches: int
    flops: int
    bytes: Mapping[str, int]
    saved: int

    @property
    def moved(self) -> int:
        """All bytes."""
        return sum(self.bytes.values())


KINDS = ("convolution", "batch norm", "ReLU and addition", "other")


def kind(launch: str) -> str:
    """Which of :data:`KINDS` a launch is, by the name that ``trace()`` gives it. A fused one is a convolution."""
    name = launch.removeprefix("aten.")
    if name.startswith("conv"):
        return "convolution"
    if "batch_norm" in name or name in ("channel_moments", "merge_moments", "merge_sums"):
        return "batch norm"
    if name in ("relu", "relu_", "threshold_backward", "add", "add_"):
        return "ReLU and addition"
    return "other"


@cache
def count(peer: Peer, setting: Setting) -> CountedWork | None:
    """The work of ``peer``, planned for :func:`counted_gpu`; None for a whole step, and where launches cannot be seen.

    Parameters have the dtype of the input: the casts of mixed precision are left out.
    """
    if not peer.counted or setting.phase == STEP:
        return None
    cpu, gpu = torch.device("cpu"), counted_gpu(setting.device)
    model, image = operands(replace(setting, batch=1), cpu)
    model.to(setting.dtype)
    saved: dict[int, Tensor] = {}  # with the tensors, lest a storage that is freed give its address to the next

    def pack(t: Tensor) -> Tensor:
        saved.setdefault(_storage(t), t)
        return t

    # Tensors without data, but on a CPU: on the meta device a convolution forgets channels_last.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        fake,
        implementation(peer.implementation),
        torch.set_grad_enabled(setting.training),
        dry_run(gpu.arch, torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else ""),
    ):
        x = image.detach().new_empty(setting.batch, *setting.case.image).contiguous(memory_format=torch.channels_last)
        x.requires_grad_(image.requires_grad)
        function = phase_function(setting.phase, peer.prepare(model, x), model, x, cpu)
        with trace() as seen, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function()
        kept = [x, *model.parameters(), *model.buffers()]
        held = {_storage(t) for t in kept} | {_storage(fake.from_tensor(t)) for t in kept}
    bytes_by_kind: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for launch in seen.launches:
        bytes_by_kind[kind(launch.name)] += launch.bytes_read + launch.bytes_written
    flops = sum(launch.flops for launch in seen.launches)
    size = sum(t.untyped_storage().nbytes() for storage, t in saved.items() if storage not in held)
    return CountedWork(len(seen.launches), flops, dict(bytes_by_kind), size)


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def least_work(setting: Setting) -> CountedWork | None:
    """The work of the peer that is counted to move the least; None if nothing is counted there."""
    works = [count(peer, setting) for peer in PEERS.values() if peer.does(setting.training)]
    return min((work for work in works if work is not None), key=lambda work: work.moved, default=None)


def roof(work: CountedWork, setting: Setting) -> float:
    """Seconds that ``work`` takes at the published peaks of :func:`counted_gpu`: a model, and a bound from below.

    The roofline of Williams, Waterman and Patterson 2009 (doi:10.1145/1498765.1498785).
    """
    gpu = counted_gpu(setting.device)
    return max(work.flops / (gpu.tensor[setting.number_format] * 1e12), work.moved / (gpu.memory * 1e9))
