"""What every launcher shares: a kernel call as a value that can be run, compiled for any GPU, or counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver

INTERPRETER = 0
"""The architecture that stands for Triton's interpreter."""

_POINTERS = {"float32": "*fp32", "int64": "*i64", "float16": "*fp16", "bfloat16": "*bf16"}


@dataclass(frozen=True)
class TileConfig:
    """How a kernel is cut into programs: the tile of one program, its warps and its software pipeline.

    ``max_registers`` per thread: without it, the compiler weighs spilling a few against one more program at a time.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told beside the tile; the default for contracting to fma differs by its version."""
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": True,
        }
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class Cost:
    """What a launch costs at the least.

    ``flops`` counts a multiply-accumulate as two. ``bytes_read`` and ``bytes_written`` count each byte of a tensor that
    the result depends on once: what device memory carries if the caches are perfect.
    """

    flops: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Call:
    """One launch of ``kernel``, as observers see it: the grid, every argument by name, and the configuration."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: TileConfig
    cost: Callable[[], Cost]

    def specialization(self) -> tuple[Any, ...]:
        """What Triton's JIT compiles a kernel anew for: two calls that agree in it share their compiled code."""
        return self.kernel.__name__, *self._signature(), *self.config.options.items()

    def compile(self, arch: int) -> Any:
        """The kernel compiled for ``arch`` (80 for sm_80 ...) as this call would specialise it; needs no GPU.

        Returns Triton's compiled kernel: ``.asm["ptx"]``, ``.asm["cubin"]``, ``.metadata.shared``.
        """
        signature = self._signature()
        # The JIT notes that it looked at an argument's divisibility and found none. So does this: then both find what
        # either has compiled in Triton's cache.
        looked_at = [
            kind == "constexpr" or not (kind == "fp32" or parameter.do_not_specialize)
            for (_, kind, _, _), parameter in zip(signature, self.kernel.params, strict=True)
        ]
        source = ASTSource(
            self.kernel,
            {name: kind for name, kind, _, _ in signature},
            constexprs={name: value for name, kind, _, value in signature if kind == "constexpr"},
            attrs={
                (i,): [["tt.divisibility", 16]] if divisible else []
                for i, (_, _, divisible, _) in enumerate(signature)
                if divisible or looked_at[i]
            },
        )
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.config.options)

    def _signature(self) -> list[tuple[str, str, bool, Any]]:
        """Per parameter: its name, type, whether it counts as divisible by 16, and its value if it is a constant."""
        signature = []
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            kind, divisible = _specialise(value, parameter)
            signature.append((parameter.name, kind, divisible, value if kind == "constexpr" else None))
        return signature


def _specialise(value: Any, parameter: Any) -> tuple[str, bool]:
    """The type that Triton's JIT gives an argument, and whether it counts as divisible by 16."""
    if isinstance(value, Tensor):
        return _POINTERS[str(value.dtype).removeprefix("torch.")], value.data_ptr() % 16 == 0
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0 and not parameter.do_not_specialize


@dataclass(frozen=True, eq=False)
class Recipe:
    """One launch of ``kernel`` but for its tensors: the grid, every other argument by name, and the configuration.

    Launchers make one per problem and keep it, since it keeps the compiled code: Triton's JIT, which looks at every
    argument of every launch to find that code, takes several times as long as the launch itself. ``cost``: from the
    tensors by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    scalars: Mapping[str, Any]
    config: TileConfig
    cost: Callable[[Mapping[str, Any]], Cost]
    _compiled: dict[Any, Callable[..., None]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _pointers(self) -> tuple[str, ...]:
        """The names of the kernel's tensors, its first parameters."""
        names = self.kernel.arg_names
        count = len(names) - len(self.scalars)
        assert set(names[count:]) == set(self.scalars), f"{self.kernel.__name__} takes its tensors first"
        return tuple(names[:count])

    @cached_property
    def _values(self) -> tuple[Any, ...]:
        return tuple(self.scalars[name] for name in self.kernel.arg_names[len(self._pointers) :])

    def run(self, **tensors: Tensor | None) -> None:
        """Launch, unless there is nothing to compute, and tell the observers."""
        if 0 in self.grid:
            return
        if dry_target() is None:
            self._launch(tensors)
        for callback in _observers:
            cost = partial(self.cost, tensors)
            callback(Call(self.kernel, self.grid, {**tensors, **self.scalars}, self.config, cost))

    def _launch(self, tensors: dict[str, Tensor | None]) -> None:
        if interpreting():
            # The interpreter moves data by PyTorch's operators, which are none that a caller may count or transform.
            with _disable_current_modes():
                self.kernel[self.grid](**tensors, **self.scalars, **self.config.options)
            return
        pointers = [tensors[name] for name in self._pointers]
        # All that the compiled code depends on beside the scalars.
        key = (
            *[t if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in pointers],
            driver.active.get_current_device(),
        )
        launch = self._compiled.get(key)
        if launch is not None:
            launch(*pointers, *self._values)
            return
        compiled = self.kernel[self.grid](*pointers, *self._values, **self.config.options)
        if isinstance(compiled, CompiledKernel):  # and not what a tool in the JIT's place returns
            self._compiled[key] = compiled[(*self.grid, 1, 1)[:3]]


_observers: list[Callable[[Call], None]] = []


@contextmanager
def observe(callback: Callable[[Call], None]) -> Iterator[None]:
    """Pass each :class:`Call` that runs inside the ``with`` block to ``callback``."""
    _observers.append(callback)
    try:
        yield
    finally:
        _observers.remove(callback)


_dry_target: ContextVar[tuple[int, str] | None] = ContextVar("dry_target", default=None)


@contextmanager
def dry_run(arch: int, gpu: str = "") -> Iterator[None]:
    """Launch nothing inside the ``with`` block: calls are planned for ``arch`` and observed; meta tensors will do.

    In this thread or task alone.

    ``gpu``: the name of one GPU as PyTorch gives it, where not just any of that architecture is meant.
    """
    token = _dry_target.set((arch, gpu))
    try:
        yield
    finally:
        _dry_target.reset(token)


def dry_target() -> tuple[int, str] | None:
    """The architecture and the GPU that the open :func:`dry_run` block names, or None outside of one."""
    return _dry_target.get()


@cache
def interpreting() -> bool:
    """Whether ``@triton.jit`` makes functions for Triton's interpreter in this process."""
    return bool(triton.knobs.runtime.interpret)


def target_arch() -> int:
    """The architecture that a launch made now runs on: 80 for sm_80 ..., or ``INTERPRETER``.

    Inside :func:`dry_run`, the architecture named there. Raises RuntimeError where nothing can execute a Triton kernel.
    """
    if (named := dry_target()) is not None:
        return named[0]
    if interpreting():
        return INTERPRETER
    try:
        return _arch(driver.active.get_current_device())
    except RuntimeError as error:
        raise RuntimeError(
            "nothing here can execute a Triton kernel: Triton finds no CUDA GPU, and its interpreter is off "
            "(set TRITON_INTERPRET=1 before the first import to run the kernels on CPU tensors)"
        ) from error


@cache
def _arch(device: int) -> int:
    """Of the GPU number ``device``, the current one."""
    return int(driver.active.get_current_target().arch)
