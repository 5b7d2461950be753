"""What is installed, what importing it brings along, and the commands that the README promises."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import resnet_fused
import resnet_fused.kernels
from resnet_fused.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
DEMO = "pip install -e '.[demo]' && python -m resnet_fused demo"
TEST = "pip install -e '.[test]' && python -m pytest"


def test_kernels_are_installed_inside_the_package():
    assert Path(resnet_fused.kernels.__file__).parent == ROOT / "kernels"


def test_version_is_the_installed_one():
    assert metadata.version("resnet-fused") == resnet_fused.__version__


def test_public_names_exist():
    assert all(hasattr(resnet_fused, name) for name in resnet_fused.__all__)


def test_importing_needs_only_torch_and_triton():
    optional = ("torchvision", "timm", "transformers", "skimage", "safetensors", "rich", "PIL", "kernels")
    code = f"import sys, resnet_fused; print([name for name in {optional} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SOURCES = [
    path
    for folder in ("kernels", "resnet_fused", "benchmarks", "tests", "examples")
    for path in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_the_unrelated_package_kernels(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module)
        assert not any(name.partition(".")[0] == "kernels" for name in names)


def test_readme_gives_two_set_up_commands():
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("pip install")]
    assert commands == [DEMO, TEST]


def commands_of_continuous_integration() -> str:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    return "\n".join(line.partition("#")[0] for line in lines)


def test_continuous_integration_runs_the_test_command_on_the_newest_and_the_oldest_versions():
    commands = commands_of_continuous_integration()
    assert re.findall(r"^fresh (\S+)", commands, re.MULTILINE) == ["test", "test,oldest"]
    assert commands.count(TEST.partition(" && ")[2]) == 2


def test_continuous_integration_leaves_the_package_index_to_pip():
    assert not re.search(r"https?://|--index-url|--extra-index-url|-i ", commands_of_continuous_integration())


@pytest.mark.parametrize("name", ["torch", "triton", "torchvision"])
def test_the_oldest_versions_tested_are_those_that_are_declared(name):
    """``>=2.11`` wherever it is required is ``==2.11.*`` in the extra ``oldest``."""
    text = (ROOT / "pyproject.toml").read_text()
    required, tested = (re.findall(rf'"{name}{operator}([\d.]+?)(?:\.\*)?[";]', text) for operator in (">=", "=="))
    assert required
    assert set(required) == set(tested)


def test_the_readme_names_the_oldest_versions():
    pyproject, readme = ((ROOT / name).read_text() for name in ("pyproject.toml", "README.md"))
    python, torch, triton = (
        re.search(rf"{name}>=([\d.]+)", pyproject)[1] for name in ('python = "', '"torch', '"triton')
    )
    assert f"Python {python} or newer, PyTorch {torch} or newer, Triton {triton} or newer" in readme
    assert re.search(rf"^\| oldest supported \|.* {torch}\.\d+ \| {triton}\.\d+ \|", readme, re.MULTILINE)


def contracts() -> dict[str, list[str]]:
    """The layers of import-linter's contracts, by the package whose they are."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r"^\[\[tool\.importlinter\.contracts\]\]$(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    layers = {}
    for contract in found:
        if package := re.search(r'^containers = \["(.+)"\]', contract, re.MULTILINE):
            lines = re.search(r"^layers = \[(.*?)^\]", contract, re.MULTILINE | re.DOTALL)[1]
            layers[package[1]] = re.findall('"(.+)"', lines)
    return layers


def test_the_drawing_of_the_imports_is_that_of_the_contracts():
    text = (ROOT / "docs" / "design.md").read_text().partition("## The layers of code")[2]
    drawn = [re.split(" {2,}", line.strip())[0] for line in text.splitlines() if line.startswith("    ")]
    layers = contracts()
    assert len(layers) == 5
    expected = [name for layer in layers["resnet_fused"] for name in (layer, *layers.get(f"resnet_fused.{layer}", []))]
    assert drawn == expected


def test_ruff_is_the_same_before_a_commit_and_in_continuous_integration():
    pinned = re.search(r'"ruff==([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_the_commands_that_are_written_about_are_those_that_there_are():
    row = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
    table = (ROOT / "README.md").read_text().partition("On the command line")[2].partition("\n## ")[0]
    assert sorted(row.findall(table)) == sorted(COMMANDS)
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.yml")]
    named = {name for path in texts for name in re.findall(r"python -m resnet_fused (\w+)", path.read_text())}
    assert named <= COMMANDS.keys()
    assert "env" in re.findall(r"python -m resnet_fused (\w+)", (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
