"""What each process of tests/test_distributed.py runs. Tensors travel between processes as NumPy arrays, by value."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet

from resnet_fused import BasicBlock, Bottleneck, PreActBottleneck, ResidualBlock, fuse, implementation, unfuse
from resnet_fused.convert import Converted
from tests.training import Stem, draw
from tests.zoo import Gated

Arrays = dict[str, np.ndarray]


def projection(inplanes: int, planes: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def small_model() -> nn.Module:
    """torchvision's blocks behind a stem, and one with squeeze and excitation, for ``fuse`` to convert."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        resnet.BasicBlock(8, 8),
        resnet.Bottleneck(8, 4, 2, projection(8, 16, 2)),
        Gated(16, 16),
    )


def averaging() -> nn.Module:
    """A block whose running statistics are the average over all batches."""
    block = ResidualBlock(6, [nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1, bias=False)])
    block.bn1.momentum = None
    return block


def without_running_statistics() -> nn.Module:
    block = BasicBlock(6, 6)
    block.bn2 = nn.BatchNorm2d(6, track_running_stats=False)
    return block


MODELS = {
    "basic, projection": (lambda: BasicBlock(6, 10, 2, projection(6, 10, 2)), (6, 5, 7)),
    "bottleneck, projection": (lambda: Bottleneck(6, 4, 2, projection(6, 16, 2)), (6, 5, 4)),
    "bias, average of all batches": (averaging, (6, 3, 4)),
    "no running statistics": (without_running_statistics, (6, 3, 4)),
    "one pixel": (lambda: BasicBlock(6, 6), (6, 1, 1)),
    "small model": (small_model, (3, 6, 5)),
    "stem": (Stem, (3, 14, 11)),
    "squeeze and excitation": (lambda: fuse(Gated(6, 16, 2)), (6, 5, 4)),
    "pre-activation": (lambda: PreActBottleneck(6, 16, 2), (6, 5, 4)),
    "pre-activation, in a row": (
        lambda: fuse(nn.Sequential(PreActBottleneck(6, 16, 2), PreActBottleneck(16, 16))),
        (6, 5, 4),
    ),
}


def sample(name: str, images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The same model, whole batch and gradient of its output in every process."""
    build, shape = MODELS[name]
    return draw(build, (images, *shape), torch.float32)


def join(rank: int, ranks: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # as tests/conftest.py has it
    torch.backends.cudnn.deterministic = True
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, timeout=limit)


def leave() -> None:
    dist.destroy_process_group()


def _own(batch: Tensor, split: tuple[int, ...]) -> Tensor:
    return batch.split(split)[dist.get_rank()]


def _step(model: nn.Module, x: Tensor, dz: Tensor, road: str) -> Arrays:
    """One forward and backward; what it leaves, under the names of tests.training.step."""
    x = x.clone().requires_grad_()
    with implementation(road), warnings.catch_warnings():
        if road != "eager":  # whose own gradients of 1x1 filters bring this warning
            warnings.filterwarnings("error", message="Grad strides do not match bucket view strides")
        z = model(x)
        z.backward(dz)
    module = model.module if isinstance(model, DistributedDataParallel) else model
    left = {"z": z.detach(), "x.grad": x.grad}
    left |= {f"{name}.grad": _whole(p.grad) for name, p in module.named_parameters()}
    return {name: t.cpu().numpy() for name, t in (left | dict(module.named_buffers())).items()}


def _whole(t: Tensor) -> Tensor:
    """All of a tensor that is sharded over the ranks."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def sync_step(name: str, split: tuple[int, ...], road: str, group: str = "default") -> Arrays:
    """A step of this rank's share of the batch, every batch norm converted to SyncBatchNorm.

    ``group`` that shares the statistics: the default one, "all" (another one of all ranks) or "own" (this rank alone).
    """
    model, x, dz = sample(name, sum(split))
    every, alone = list(range(len(split))), [dist.new_group([rank]) for rank in range(len(split))]
    groups = {"default": None, "all": dist.new_group(every), "own": alone[dist.get_rank()]}
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model, groups[group])
    before = dist.group.WORLD._get_sequence_number_for_group()
    left = _step(model, _own(x, split), _own(dz, split), road)
    messages = dist.group.WORLD._get_sequence_number_for_group() - before
    assert (messages > 0) == (group == "default"), f"{messages} messages in the default group"
    return left


def _fuse_then_synchronise(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(fuse(model))


def _synchronise_then_fuse(model: nn.Module) -> nn.Module:
    return fuse(nn.SyncBatchNorm.convert_sync_batchnorm(model))


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fuse, then synchronise": _fuse_then_synchronise,
    "synchronise, then fuse": _synchronise_then_fuse,
    "fuse": fuse,
}


def model_step(conversion: str, split: tuple[int, ...], road: str, parallel: bool) -> Arrays:
    """A step of this rank's share of the batch, under DistributedDataParallel if ``parallel``."""
    model, x, dz = sample("small model", sum(split))
    model = CONVERSIONS[conversion](model)
    if parallel:
        model = DistributedDataParallel(model)
    return _step(model, _own(x, split), _own(dz, split), road)


def _shard(model: nn.Module) -> nn.Module:
    for block in model[3:]:
        fully_shard(block)
    return fully_shard(model)


SHARDINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fuse, then shard": lambda model: _shard(fuse(model)),
    "shard, then fuse": lambda model: fuse(_shard(model)),
    "fuse, shard, fuse": lambda model: fuse(_shard(fuse(model))),
}


def shard_step(sharding: str, split: tuple[int, ...], road: str, reverts: bool) -> Arrays:
    """A step of this rank's share of the batch by FSDP2; after ``unfuse`` if ``reverts``."""
    model, x, dz = sample("small model", sum(split))
    model = SHARDINGS[sharding](model)
    kinds = {False: 4, True: 0}  # a sequence with a run, and its three blocks
    if reverts:
        unfuse(model)
        assert [type(part).__name__ for part in model[3:]] == ["FSDPBasicBlock", "FSDPBottleneck", "FSDPGated"]
    assert sum(isinstance(part, Converted) for part in model.modules()) == kinds[reverts]
    assert all(isinstance(part, FSDPModule) for part in (model, *model[3:]))
    return _step(model, _own(x, split), _own(dz, split), road)


def checkpoint(sharding: str, folder: str) -> Arrays:
    """What a sharded, fused model saved, as a sharded one reads it that is not fused, and a fused one of one piece."""
    saved, x, dz = sample("small model", 3)
    saved = SHARDINGS[sharding](saved)
    _step(saved, x, dz, "triton")
    dcp.save(get_model_state_dict(saved), checkpoint_id=folder)
    left: Arrays = {}
    for name, other in (("sharded", _shard(small_model())), ("whole", fuse(small_model()))):
        state = get_model_state_dict(other)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(other, state)
        for key, value in other.state_dict().items():
            assert torch.equal(_whole(value), _whole(saved.state_dict()[key])), key
            left[f"{name}.{key}"] = _whole(value).cpu().numpy()
    return left


def evaluate(name: str, split: tuple[int, ...], road: str) -> Arrays:
    """A step in evaluation mode with SyncBatchNorm."""
    model, x, dz = sample(name, sum(split))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    return _step(model, _own(x, split), _own(dz, split), road)
