"""``pytest benchmarks --benchmark-only``; ``-m "not heavy"`` leaves out what takes long to compile."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Keep to one process, whatever the tests are configured for: two that run at once would time each other."""
    config.option.numprocesses = 0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "heavy: takes minutes to prepare")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """The suites are called ``bench_*.py``, so that the tests leave them alone."""
    named = parent.session.isinitpath(file_path)  # then pytest collects it anyway
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None
