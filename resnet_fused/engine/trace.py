"""What ran: kernel launches and library calls, with their floating-point operations and bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from resnet_fused.kernels.launch import Call, TileConfig, dry_target, observe
from resnet_fused.table import render

_NO_WORK = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "set_",
    "as_strided_",
}


_LIBRARIES = ("aten", "mkldnn")


@dataclass(frozen=True)
class Launch:
    """One kernel launch of this library, or one call of PyTorch's (``aten.*``) or of oneDNN (``mkldnn.*``).

    ``flops`` counts a multiply-accumulate as two; for library calls, only convolutions and matrix products are counted.
    ``bytes_read`` and ``bytes_written`` count every operand once. ``grid`` and ``config`` are None for library calls.
    """

    name: str
    grid: tuple[int, ...] | None
    config: TileConfig | None
    flops: int
    bytes_read: int
    bytes_written: int


@dataclass
class Trace:
    """The launches of a :func:`trace` block, in order."""

    launches: list[Launch] = field(default_factory=list)

    def table(self) -> str:
        """The launches as text, one row each."""
        rows = [
            (
                x.name,
                "x".join(map(str, x.grid or ())),
                f"{x.config.block_m}x{x.config.block_n}x{x.config.block_k}" if x.config else "",
                round(x.flops / 1e6, 2),
                round(x.bytes_read / 1e6, 3),
                round(x.bytes_written / 1e6, 3),
            )
            for x in self.launches
        ]
        return render(f"{len(rows)} launches", ["name", "grid", "tile", "MFLOP", "MB read", "MB written"], rows)


@contextmanager
def trace() -> Iterator[Trace]:
    """Record every kernel launch and every library call that computes or moves data inside the ``with`` block.

    Views and allocations are left out. Costs time in the block; what runs is the same.
    """
    record = Trace()

    def add(call: Call) -> None:
        cost = call.cost()
        name = call.kernel.__name__.removesuffix("_kernel")
        record.launches.append(Launch(name, call.grid, call.config, cost.flops, cost.bytes_read, cost.bytes_written))

    with observe(add), _LibraryCalls(record.launches):
        yield record


def is_watched() -> bool:
    """Whether a dispatch mode other than that of :func:`trace` is to see what runs."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return not all(isinstance(mode, _LibraryCalls) for mode in _get_current_dispatch_mode_stack())


implementations: dict[Any, Callable[..., Any]] = {}
"""What operators of this package run, by operator: :func:`trace` records the library calls inside."""


class _LibraryCalls(TorchDispatchMode):
    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in implementations and (dry_target() is not None or not args[0].is_meta):
            with self:
                return implementations[func](*args, **kwargs)
        if func.namespace == "aten" and func._can_decompose() and not func.is_view:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if func.namespace in _LIBRARIES and _does_work(func):
            self.launches.append(_library_launch(func, args, kwargs, result))
        return result


def _does_work(func: Any) -> bool:
    if func._schema.name.removeprefix("aten::") in _NO_WORK:
        return False
    returns_alias = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return bool(func._schema.returns) and not returns_alias


def _library_launch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Launch:
    count: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
    read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    written = {id(t): t for t in tree_leaves(result) if isinstance(t, Tensor)}
    return Launch(
        func._schema.name.replace("::", "."),
        None,
        None,
        count(*args, **kwargs, out_val=result) if count else 0,
        sum(map(_bytes, read.values())),
        sum(map(_bytes, written.values())),
    )


def _bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements: a broadcast dimension (stride 0) is read once."""
    if tensor.layout != torch.strided:  # packed by oneDNN
        return tensor.numel() * tensor.element_size()
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size() if tensor.numel() else 0
