"""What every launcher shares: a kernel call as a value that can be run, compiled for any GPU, or counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime import driver
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from .gpus import ARCHITECTURES

INTERPRETER = 0
"""The architecture that stands for Triton's interpreter."""

KEPT_LAYOUTS = 4096
"""For how many sizes and formats of tensors it is kept what follows from them: for more than a process meets."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels compute with: they widen whatever they load to fp32."""


@dataclass(frozen=True)
class TileConfig:
    """How a kernel is cut into programs: the tile of one program, its warps and its software pipeline.

    ``max_registers`` per thread: without it, the compiler weighs spilling a few against one more program at a time.
    ``box``: the images, rows and columns that the ``block_m`` pixels of a convolution's tile are, for TMA to load;
    None: they follow each other, and every thread gathers its own. ``splits``: how many programs share the sum that a
    tile of ``conv_forward`` or ``conv_wgrad`` is; a second launch adds up their parts.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None
    box: tuple[int, int, int] | None = None
    splits: int = 1

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
        _, _, kinds = self._bind(GPUTarget("cuda", ARCHITECTURES[0], 32))
        return self.kernel.__name__, *kinds, *self.config.options.items()

    def compile(self, arch: int) -> Any:
        """The kernel compiled for ``arch`` (80 for sm_80 ...) as this call would specialise it; needs no GPU.

        Triton's JIT finds it in Triton's cache, and this what the JIT has compiled. Returns Triton's compiled kernel:
        ``.asm["ptx"]``, ``.asm["cubin"]``, ``.metadata.shared``.
        """
        target, options = GPUTarget("cuda", arch, 32), self.config.options
        backend, bound, kinds = self._bind(target)
        _, signature, constexprs, attrs = self.kernel._pack_args(backend, options, bound, kinds, options)
        source = ASTSource(self.kernel, signature, constexprs, attrs)
        return triton.compile(source, target=target, options=options)

    def _bind(self, target: GPUTarget) -> tuple[Any, dict[str, Any], list[tuple[str, Any]]]:
        """The compiler's backend; the arguments by name; per argument its type, and what counts of its value.

        By the JIT's own functions: what it notes, and so the name under which it caches, differs by Triton's version.
        """
        backend, bind = _binder(self.kernel, target)
        bound, kinds, _ = bind(**self.arguments, **self.config.options)
        return backend, bound, kinds


@cache
def _binder(kernel: Any, target: GPUTarget) -> tuple[Any, Callable[..., Any]]:
    backend = make_backend(target)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


class Vector(NamedTuple):
    """What a kernel takes for granted of a tensor that it reads or writes element after element.

    ``argument``: what the launcher's caller knows it as.
    """

    argument: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def require(self, tensor: Tensor) -> None:
        """Raise ValueError for one that the kernel would read or write beside its elements."""
        if tensor.shape == self.shape and tensor.is_contiguous() and tensor.dtype in self.dtypes:
            return
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        raise ValueError(
            f"{self.argument} must be contiguous {dtypes} {list(self.shape)}; got {tensor.dtype} "
            f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        )


class Boxes(NamedTuple):
    """How TMA sees a tensor: sizes, elements from one to the next in each dimension, and the box of one load or store.

    The innermost dimension comes last. What lies outside of the sizes is loaded as zero, and not stored.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def fits(self, itemsize: int) -> bool:
        """Whether TMA takes it (CUDA driver API, cuTensorMapEncodeTiled), at an address that 16 bytes divide."""
        dense = self.strides[-1] == 1
        aligned = all(0 < stride * itemsize < 2**40 and stride * itemsize % 16 == 0 for stride in self.strides[:-1])
        return dense and aligned and max(self.box) <= 256 and all(0 < size < 2**31 for size in self.shape)

    def of(self, tensor: Tensor) -> TensorDescriptor:
        """``tensor``, whose layout is the one that this was made for, as Triton takes it."""
        descriptor = object.__new__(TensorDescriptor)  # its own checks of what is known take as long as a launch
        vars(descriptor).update(vars(_template(self)), base=tensor)
        return descriptor


@lru_cache(maxsize=KEPT_LAYOUTS)
def _template(boxes: Boxes) -> TensorDescriptor:
    return TensorDescriptor(torch.empty(0, device="meta"), list(boxes.shape), list(boxes.strides), list(boxes.box))


@dataclass(frozen=True, eq=False)
class Recipe:
    """One launch of ``kernel`` but for its tensors: the grid, every other argument by name, and the configuration.

    Launchers make one per problem and keep it, since it keeps the compiled code: Triton's JIT, which looks at every
    argument of every launch to find that code, takes several times as long as the launch itself. ``cost``: from the
    tensors by name. ``vectors``: what is asked of tensors, by name, in every launch; of all others the layout, on which
    a recipe depends, was looked at when it was made. ``boxes``: how TMA sees the tensors that it moves, by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    scalars: Mapping[str, Any]
    config: TileConfig
    cost: Callable[[Mapping[str, Any]], Cost]
    vectors: Mapping[str, Vector] = field(default_factory=dict)
    boxes: Mapping[str, Boxes] = field(default_factory=dict)
    _compiled: dict[Any, CompiledKernel] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _pointers(self) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
        """Takes the kernel's tensors, its first parameters and two at the least, from all by name."""
        names = self.kernel.arg_names
        count = len(names) - len(self.scalars)
        assert set(names[count:]) == set(self.scalars), f"{self.kernel.__name__} takes its tensors first"
        return itemgetter(*names[:count])

    @cached_property
    def _described(self) -> list[tuple[int, str, Boxes]]:
        """The tensors that TMA loads: their places among the kernel's parameters, their names and boxes."""
        return [(self.kernel.arg_names.index(name), name, boxes) for name, boxes in self.boxes.items()]

    @cached_property
    def _values(self) -> tuple[Any, ...]:
        return tuple(self.scalars[name] for name in self.kernel.arg_names[-len(self.scalars) :])

    def run(self, **tensors: Tensor | None) -> None:
        """Launch, unless there is nothing to compute, and tell the observers.

        Raises ValueError for a tensor that is not what the kernel takes for granted.
        """
        if 0 in self.grid:
            self.check(tensors)
            return
        if dry_target() is None:
            self._launch(tensors)
        else:
            self.check(tensors)
        for callback in _observers:
            cost = partial(self.cost, tensors)
            callback(Call(self.kernel, self.grid, {**self._boxed(tensors), **self.scalars}, self.config, cost))

    def _boxed(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
        """The ``tensors`` as the kernel takes them."""
        return {**tensors, **{name: boxes.of(tensors[name]) for name, boxes in self.boxes.items()}}  # type: ignore[arg-type]

    def check(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Raise ValueError for one of the ``tensors``, by name, that is not what the kernel takes for granted."""
        for name, vector in self.vectors.items():
            tensor = tensors[name]
            if tensor is not None:
                vector.require(tensor)

    def _launch(self, tensors: dict[str, Tensor | None]) -> None:
        if interpreting():
            self.check(tensors)
            # The interpreter moves data by PyTorch's operators, which are none that a caller may count or transform.
            with _disable_current_modes():
                self.kernel[self.grid](**self._boxed(tensors), **self.scalars, **self.config.options)
            return
        device = driver.active.get_current_device()
        # What the compiled code depends on beside the scalars; whether the current device holds the tensors, which the
        # driver is not asked of bare addresses; and the size of vectors, which need no check again.
        key: list[Any] = [device]
        arguments: list[Any] = []
        for tensor in self._pointers(tensors):
            if tensor is None:
                key.append(None)
                arguments.append(None)
            else:
                address = tensor.data_ptr()
                key.append((tensor.dtype, tensor.get_device(), address % 16 == 0))
                arguments.append(address)
        for vector in map(tensors.get, self.vectors):
            key.append(vector if vector is None else vector.is_contiguous() and vector.numel())
        compiled = self._compiled.get(tuple(key))
        if compiled is None:
            compiled = self._compile(tuple(key), tensors)
        else:
            for i, name, boxes in self._described:
                arguments[i] = boxes.of(tensors[name])  # type: ignore[arg-type]
            self._start(compiled, driver.active.get_current_stream(device), arguments)
        if (note := _recorder.get()) is not None:
            note(self, compiled, tensors)

    def _compile(self, key: tuple[Any, ...], tensors: Mapping[str, Tensor | None]) -> CompiledKernel | None:
        """Launch by Triton's JIT, and keep what it compiles for those tensors that share the ``key``."""
        self.check(tensors)
        arguments = self._pointers(self._boxed(tensors))
        compiled = self.kernel[self.grid](*arguments, *self._values, **self.config.options)
        if not isinstance(compiled, CompiledKernel):
            return None  # but what a tool in the JIT's place returns
        self._compiled[key] = compiled
        return compiled

    def repeated(self, compiled: CompiledKernel, slots: Mapping[str, int]) -> Callable[[Any, Any, int], None]:
        """The launch of what was ``compiled``, for tensors like those: of a list of them, of their addresses, a stream.

        ``slots``: where in both lists each tensor stands; only those that TMA loads need be in the first.
        """
        take = itemgetter(*self._pointers(slots))
        described = [(i, slots[name], boxes) for i, name, boxes in self._described]

        def launch(tensors: Sequence[Tensor | None], addresses: Sequence[int | None], stream: int) -> None:
            arguments = [*take(addresses)]
            for i, slot, boxes in described:
                arguments[i] = boxes.of(tensors[slot])  # type: ignore[arg-type]
            self._start(compiled, stream, arguments)

        return launch

    def _start(self, compiled: CompiledKernel, stream: int, arguments: list[Any]) -> None:
        """Launch what Triton compiled, as Triton does: without the way past its hooks where there are none."""
        grid = (*self.grid, 1, 1)[:3]
        if _hooked():
            compiled[grid](*arguments, *self._values, stream=stream)
        else:
            metadata = compiled.packed_metadata
            compiled.run(*grid, stream, compiled.function, metadata, None, None, None, *arguments, *self._values)


def _hooked() -> bool:
    """Whether a tool asked Triton to tell it of launches; Triton's own value is a chain of hooks, which is empty."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


_observers: list[Callable[[Call], object]] = []


@contextmanager
def observe(callback: Callable[[Call], object]) -> Iterator[None]:
    """Pass each :class:`Call` that runs inside the ``with`` block to ``callback``."""
    observer = partial(callback)  # equal to nothing but itself, as a callback need not be
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


_recorder: ContextVar[Callable[[Recipe, CompiledKernel | None, Mapping[str, Any]], object] | None]
_recorder = ContextVar("recorder", default=None)


@contextmanager
def recording(callback: Callable[[Recipe, CompiledKernel | None, Mapping[str, Any]], object]) -> Iterator[None]:
    """Pass each launch inside the ``with`` block, in this thread or task alone, to ``callback``.

    That is the recipe, what of it is compiled (None: a tool took the JIT's place), and the tensors by name.
    """
    token = _recorder.set(callback)
    try:
        yield
    finally:
        _recorder.reset(token)


def only_launches() -> bool:
    """Whether a launch made here is that and no more: neither observed, nor just planned, nor interpreted."""
    return not _observers and _dry_target.get() is None and not interpreting()


def current_stream() -> int:
    """The one that launches on the current device go to."""
    return int(driver.active.get_current_stream(driver.active.get_current_device()))


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
    if (named := _dry_target.get()) is not None:
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
