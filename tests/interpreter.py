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
    whole = interpreter._interpreter

    class Checked:
        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

        def load(self, pointers: Any, mask: Any, *rest: Any) -> Any:
            inside = sum((first <= pointers) & (pointers < end) for first, end in ranges)
            assert (inside | ~mask.astype(bool)).all(), "a load from outside of the tensors"
            return whole.load(pointers, mask, *rest)

    interpreter._interpreter = Checked()
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
