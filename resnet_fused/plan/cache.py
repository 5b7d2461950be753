"""Where measurements and notes are kept on disk, what they hold for, and how they are read and replaced whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
import triton

from resnet_fused import kernels
from resnet_fused.version import __version__


def cache_dir() -> Path:
    """Where tables and notes are kept: RESNET_FUSED_CACHE, else resnet_fused in XDG_CACHE_HOME or ~/.cache.

    Raises FileNotFoundError where none of them is set and the user has no home directory.
    """
    if own := os.environ.get("RESNET_FUSED_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_fused"
    except RuntimeError:
        message = "this user has no home directory: RESNET_FUSED_CACHE must name a folder for what is kept"
        raise FileNotFoundError(message) from None


def versions() -> dict[str, str]:
    """Those that a measurement holds for; that of the kernels is what their files say."""
    software = {"torch": torch.__version__, "triton": triton.__version__, "resnet_fused": __version__}
    return software | {"kernels": digest(Path(kernels.__file__).parent)}


@cache
def digest(folder: Path) -> str:
    """Twelve hexadecimal digits that tell the Python files of ``folder``, names and text, from any others."""
    texts = [(file.name, file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.py"))]
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:12]


def read(file: Path) -> str:
    """The text of ``file``. Raises OSError, and ValueError for what is no UTF-8; a pipe or device is not waited for."""
    mode = file.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError("it is no regular file")
    return file.read_text(encoding="utf-8")


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Let one process at a time read ``file`` and replace it. Raises OSError if its folder cannot be made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(OSError):  # a file system without locks: who writes at the very same time may win
            lock = stack.enter_context(open(file.parent / ".lock", "a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_whole(file: Path, text: str) -> None:
    """Replace ``file`` in one step: at no time is it half-written. Raises OSError, and leaves the old one then."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "x", encoding="utf-8") as stream:  # with the permissions that the umask leaves
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
