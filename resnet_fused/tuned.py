"""Measurements of one GPU, as a table in the user's cache directory. (Being written.)"""

from __future__ import annotations

import os
from pathlib import Path

from resnet_fused.plan import Table


def load(gpu: str) -> Table | None:
    """The table of ``gpu``, or None."""
    return None


def cache_dir() -> Path:
    """Where tables and notes are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("RESNET_FUSED_CACHE") or base / "resnet_fused")
