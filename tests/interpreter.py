"""Triton's interpreter without what it repeats for every operation: small launches take a third of the time.

No number changes. By default it looks at every sum and product of integers for an overflow, and tells nobody: here it
does not look, but for tests whose tensors are large enough for one, where it raises (the fixture
``checked_for_overflow``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter


class _AsItIs:
    """In place of what would take the patching of the language back."""

    def restore(self) -> None:
        """Do nothing: whoever patched it will."""


def quicken() -> None:
    """For this process; to be called once, before the first kernel runs."""
    interpreter._patch_lang = _once(interpreter._patch_lang)
    interpreter._get_np_dtype = _looked_up(interpreter._get_np_dtype)
    _check_overflow(False)


@contextmanager
def checked_for_overflow() -> Iterator[None]:
    """Integers that overflow raise inside the ``with`` block."""
    _check_overflow(True)
    try:
        yield
    finally:
        _check_overflow(False)


@contextmanager
def reads_only(*tensors: Tensor) -> Iterator[None]:
    """A load inside the ``with`` block from anywhere but the storages of ``tensors`` raises."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    ranges = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]

    def load(pointers: Any, itemsize: int) -> None:
        inside = sum((first <= pointers) & (pointers < end) for first, end in ranges)
        assert np.all(inside), "a load from outside of the tensors"

    with _seen(load, lambda pointers, itemsize: None):
        yield


class Touched:
    """How many distinct bytes were read and written since the last :meth:`take`."""

    def __init__(self) -> None:
        self.read: list[Any] = []
        self.written: list[Any] = []

    def take(self) -> tuple[int, int]:
        """Those numbers, which start again at zero."""
        found = len(_distinct(self.read)), len(_distinct(self.written))
        self.read.clear()
        self.written.clear()
        return found


@contextmanager
def touched() -> Iterator[Touched]:
    """Notes every byte that kernels load and store inside the ``with`` block, but for those that are masked."""
    found = Touched()
    with _seen(
        lambda pointers, itemsize: found.read.append(_bytes(pointers, itemsize)),
        lambda pointers, itemsize: found.written.append(_bytes(pointers, itemsize)),
    ):
        yield found


def _bytes(pointers: Any, itemsize: int) -> Any:
    return (np.unique(pointers)[:, None] + np.arange(itemsize, dtype=np.uint64)).ravel()


def _distinct(parts: list[Any]) -> Any:
    return np.unique(np.concatenate(parts)) if parts else np.empty(0)


def _unmasked(pointers: Any, mask: Any) -> Any:
    return np.asarray(pointers)[np.asarray(mask).astype(bool)]


@contextmanager
def _seen(load: Callable[[Any, int], None], store: Callable[[Any, int], None]) -> Iterator[None]:
    """Pass the addresses of every load and store that is not masked, and the size of an element, to the functions."""
    whole = interpreter._interpreter

    class Seen:
        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

        def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
            load(_unmasked(pointers, mask), np.dtype(dtype).itemsize)
            return whole.load(pointers, mask, other, dtype)

        def store(self, pointers: Any, values: Any, mask: Any) -> Any:
            store(_unmasked(pointers, mask), np.asarray(values).dtype.itemsize)
            return whole.store(pointers, values, mask)

    interpreter._interpreter = Seen()
    try:
        yield
    finally:
        interpreter._interpreter = whole


def _check_overflow(check: bool) -> None:
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=check, sanitize_overflow=check)


def _once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A kernel's launch patches the language, and so would every call of a device function within."""

    @cache
    def languages(function: Any) -> list[Any]:
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def patched(function: Any) -> Any:
        found = languages(function)
        if found and not any(tl.core.is_builtin(language.load) for language in found):
            return _AsItIs()
        return patch(function)

    return patched


def _looked_up(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's type for one of Triton's, of which only those of pointers can not be hashed."""
    known = cache(np_dtype)
    return lambda dtype: np_dtype(dtype) if isinstance(dtype.scalar, tl.pointer_type) else known(dtype.scalar)
