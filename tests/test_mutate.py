"""The mutations: every one still applies, and what a run of them reports."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests import mutate
from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_every_mutation_applies(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1, "the old text must stand there exactly once"
    assert mutation.new != mutation.old
    assert (ROOT / mutation.tests.split()[0].partition("::")[0]).exists()


def test_no_mutation_is_listed_twice():
    assert [m for m, times in Counter((m.file, m.old, m.new) for m in MUTATIONS).items() if times > 1] == []


LIBRARY = """
def add(a, b):
    return a + b

def double(a):
    return add(a, a)
"""
TESTS = """
import subprocess, sys
from pathlib import Path
from resnet_fused.kernels import sums

def test_add(): assert sums.add(2, 2) == 4
def test_double(): assert sums.double(3) == 6
def test_that_fails_anyway(): assert False
def test_that_this_is_the_copy_in_child_processes_too():
    here = Path(__file__).parents[1] / "resnet_fused" / "kernels" / "sums.py"
    command = [sys.executable, "-c", "from resnet_fused.kernels import sums; print(sums.__file__)"]
    assert subprocess.check_output(command, cwd="/", text=True).strip() == sums.__file__ == str(here)
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """A tree like this project's, with a library and tests that take no time."""
    for path, text in {
        "resnet_fused/__init__.py": "",
        "kernels/__init__.py": "",
        "benchmarks/__init__.py": "",
        "kernels/sums.py": LIBRARY,
        "tests/test_sums.py": TESTS,
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_what_is_reported(tree, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "tests/test_of_another_tree.py")
    everything, add = "tests/test_sums.py -k 'not anyway'", "tests/test_sums.py::test_add"
    expected = {
        Mutation("kernels/sums.py", "a + b", "a - b", everything): "killed",
        Mutation("kernels/sums.py", "a + b", "a * b", add): "survived",
        Mutation("kernels/sums.py", "add(a, a)", "add(2, a)", everything): "killed",
        Mutation("kernels/sums.py", "add(a, a)", "add(2, a)", add): "survived",
        Mutation("kernels/sums.py", "a + b", "a +", add): "does not run",
        Mutation("kernels/sums.py", "a / b", "a - b", add): "no longer applies",
        Mutation("kernels/sums.py", "return", "yield", add): "no longer applies",
        Mutation("kernels/sums.py", "a + b", "a - b", "tests/test_sums.py -k anyway"): "its tests fail unchanged",
    }
    assert dict(mutate.run(tree, expected)) == expected
    assert (tree / "kernels" / "sums.py").read_text() == LIBRARY, "the tree itself is not touched"


def test_what_hangs_is_ended(tree, monkeypatch):
    monkeypatch.setattr(mutate, "LIMIT", 5)
    (tree / "tests" / "test_slow.py").write_text("import time\n\ndef test_that_hangs(): time.sleep(600)\n")
    assert mutate._pytest(tree, "tests/test_slow.py") is None


def test_the_command_fails_unless_all_are_killed(monkeypatch, capsys):
    killed = Mutation("kernels/sums.py", "a + b", "a - b", "tests/test_sums.py")
    survivor = Mutation("kernels/sums.py", "a + b", "a * b", "tests/test_sums.py")
    outcomes = {killed: "killed", survivor: "survived"}
    monkeypatch.setattr(mutate, "MUTATIONS", list(outcomes))
    monkeypatch.setattr(mutate, "run", lambda root, mutations: ((m, outcomes[m]) for m in mutations))
    assert mutate.main(["a - b"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"killed  {killed}", "1 killed"]
    assert mutate.main([]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [f"survived  {survivor}", "1 killed, 1 survived"]
    with pytest.raises(SystemExit, match="no mutation names 'a / b'"):
        mutate.main(["a / b"])
