"""A stand-in for Triton's driver: kernels are compiled for a GPU that is not there, and launched to no effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


def install(arch: int, launch: Callable[..., None]) -> None:
    """Let Triton find one GPU of ``arch``, for the rest of the process; ``launch`` takes what Triton's launcher would.

    That is the grid's three numbers, stream, function, metadata (twice), two hooks, and the kernel's arguments.
    """

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        launcher_cls = staticmethod(lambda source, metadata: launch)
        utils = _Utils

    driver.set_active(Driver())


class _Utils:
    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, int, int, int, int]:
        """Module, function, registers, spills, threads at most."""
        return name, hash(kernel), 32, 0, 1024

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    @staticmethod
    def unload_module(module: Any) -> None:
        return None
