"""docs/ecosystem.md: every snippet runs, and what is said beside it holds."""

from __future__ import annotations

import importlib.util
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fused import explain, implementation
from resnet_fused.convert import Converted, ConvertedBlock

TEXT = (Path(__file__).parents[1] / "docs" / "ecosystem.md").read_text()
SNIPPETS = dict(re.findall(r"^## (.+?)$.*?^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages, about themselves


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder of its own, and what torchrun tells a process that is the only one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in (address | {"RANK": "0", "WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _run(title: str) -> dict[str, Any]:
    """What the snippet below ``title`` leaves."""
    code = SNIPPETS[title]
    for line in re.findall(r"^import (.+?)(?: as \w+)?$", code, re.MULTILINE):
        for name in line.split(", "):
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                pytest.skip(f"{name} is not installed")
    left: dict[str, Any] = {}
    exec(compile(code, f"docs/ecosystem.md: {title}", "exec"), left)
    return left


def _blocks(model: torch.nn.Module) -> int:
    return sum(isinstance(part, ConvertedBlock) for part in model.modules())


def test_every_section_has_a_snippet():
    assert list(SNIPPETS) == re.findall(r"^## (.+)$", TEXT, re.MULTILINE)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("title", SNIPPETS)
def test_a_snippet_runs(title):
    left = _run(title)
    models = [value for value in left.values() if isinstance(value, torch.nn.Module)]
    assert any(isinstance(part, Converted) for model in models for part in model.modules()) or "Classifier" in left


def test_blocks_with_an_adapter_run_eager_until_it_is_merged():
    code = SNIPPETS["LoRA and other adapters"]
    left: dict[str, Any] = {}
    x = torch.randn(1, 3, 33, 33)
    verdicts = []
    for part in code.split("# train, and then:\n"):
        exec(part, left)
        with implementation("triton"):
            row = next(row for row in explain(left["model"], x).rows if row.name == "layer4.1")
        verdicts.append(row.implementation)
    assert verdicts == ["eager", "fused"]


def test_detectors_segmenters_and_extractors_keep_their_blocks():
    assert _blocks(_run("Detection")["detector"]) == 8
    assert _blocks(_run("Segmentation")["model"]) == 16
    left = _run("Feature extractors")
    assert _blocks(left["extractor"]) == 8
    with torch.no_grad():
        assert {name: t.shape[1] for name, t in left["features"].items()} == {"fine": 128, "coarse": 512}
