"""``python -m tests.mutate [substring ...]``: whether the tests notice that a line of the project is wrong.

Each of :data:`tests.mutations.MUTATIONS`, or of those whose line in the report contains a substring, is made in a copy
of the tree, where its tests are run. It is killed (they fail), survived (they pass), does not run (they are not even
collected), no longer applies, or proves nothing because its tests fail unchanged. Exits with 1 unless all are killed.
It takes minutes, so it is not part of the tests.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
LIMIT = 600
"""Seconds for the tests of one mutation. What hangs is noticed too."""
INSIDE = ("kernels", "benchmarks")
"""Folders that are installed inside the package: an editable installation would find the tree's own there."""


def main(substrings: Sequence[str]) -> int:
    chosen = [m for m in MUTATIONS if not substrings or any(text in str(m) for text in substrings)]
    if not chosen:
        raise SystemExit(f"no mutation names {' or '.join(map(repr, substrings))}")
    counts: Counter[str] = Counter()
    for mutation, outcome in run(ROOT, chosen):
        print(f"{outcome}  {mutation}", flush=True)
        counts[outcome] += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return int(counts.keys() != {"killed"})


def run(root: Path, mutations: Iterable[Mutation]) -> Iterator[tuple[Mutation, str]]:
    """Each mutation of the tree under ``root`` and what came of it, as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(root, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build"))
        for name in INSIDE:
            (tree / "resnet_fused" / name).symlink_to(tree / name)
        unchanged: dict[str, int | None] = {}
        for mutation in mutations:
            yield mutation, _outcome(tree, mutation, unchanged)


def _outcome(tree: Path, mutation: Mutation, unchanged: dict[str, int | None]) -> str:
    """``unchanged``: how pytest ended on the selections of tests that were run without a mutation."""
    file, old, new, tests = mutation
    text = (tree / file).read_text()
    if text.count(old) != 1:
        return "no longer applies"
    if tests not in unchanged:
        unchanged[tests] = _pytest(tree, tests)
    if unchanged[tests] != pytest.ExitCode.OK:
        return "its tests fail unchanged"
    (tree / file).write_text(text.replace(old, new))
    ended = _pytest(tree, tests)
    (tree / file).write_text(text)
    if ended in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        return "does not run"
    return "survived" if ended == pytest.ExitCode.OK else "killed"


def _pytest(tree: Path, tests: str) -> int | None:
    """How pytest ends on ``tests`` in the tree; None if it takes too long."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider", *shlex.split(tests)]
    # Python takes cached bytecode for that of any file of the same second and size: two mutations can share both.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            return process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that its tests started


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
