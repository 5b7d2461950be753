"""The command ``env``: what it tells of a machine, whatever is broken there."""

from __future__ import annotations

import json

import pytest
import torch

import resnet_fused
from resnet_fused import implementation
from resnet_fused.__main__ import main
from resnet_fused.commands import env
from resnet_fused.plan import cache, checked, tuned
from resnet_fused.plan.tuned import Table
from tests.test_tuned import ENTRY, GPU

pytestmark = pytest.mark.usefixtures("own_cache")
ON_GPU = torch.cuda.is_available()
SECTIONS = ["machine", "flags", "cache", "tables"]


def told(capsys) -> dict[str, dict[str, str]]:
    """What the command prints as JSON; it never fails."""
    assert main(["env", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_text_and_json_tell_the_same(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (1.0, 2.0, 3.0))
    found = told(capsys)
    assert list(found) == SECTIONS
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = [f"  {name}: {value}" for section in SECTIONS for name, value in found[section].items()]
    assert lines == [
        *("machine", *facts[: len(found["machine"])]),
        *("flags", *facts[len(found["machine"]) : -len(found["cache"])]),
        *("cache", *facts[-len(found["cache"]) :]),
        *("tables", "  none"),
    ]
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["resnet_fused"] == resnet_fused.__version__
    assert found["machine"]["kernels"] == cache.versions()["kernels"]
    assert found["cache"]["folder"] == str(tmp_path)


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu(capsys, monkeypatch):
    found = told(capsys)
    assert (found["machine"]["GPU"], found["machine"]["GPU driver"]) == ("none", "none")
    assert found["flags"]["kernels run"] == "in Triton's interpreter"
    assert found["cache"]["self-test"] == "noted of a GPU alone"
    monkeypatch.setattr(env, "interpreting", lambda: False)
    assert told(capsys)["flags"]["kernels run"] == "nowhere: there is no CUDA GPU"


def test_flags_are_those_in_force(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_DEBUG", "1")
    monkeypatch.setenv("FORGE_TOKEN", "secret")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr("resnet_fused.plan.decide.tf32", lambda dtype: False)
    with implementation("mixed"):
        flags = told(capsys)["flags"]
    assert (flags["implementation"], flags["TRITON_DEBUG"], flags["cudnn.benchmark"]) == ("mixed", "1", "True")
    assert flags["TF32 in convolutions"] == "False"
    assert "FORGE_TOKEN" not in flags
    assert told(capsys)["flags"]["implementation"] == "auto"


def test_a_gpu_and_its_self_test(capsys, monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_900)
    monkeypatch.setattr(env, "interpreting", lambda: False)
    found = told(capsys)
    assert (found["machine"]["GPU"], found["machine"]["cuDNN"]) == (GPU, "91900")
    assert found["flags"]["kernels run"] == "compiled for sm_90"
    assert found["cache"]["self-test"] == f"not passed here yet: {checked.COMMAND}"
    checked.note(gpu)
    assert told(capsys)["cache"]["self-test"] == "passed here"
    (cache.cache_dir() / "checked.json").write_text("{")
    assert told(capsys)["cache"]["self-test"].startswith("not passed here yet")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 7.5: the kernels need 8.0" in told(capsys)["flags"]["kernels run"]


def test_tables_are_told_with_what_is_in_them(capsys):
    file = tuned.save(Table(GPU, (ENTRY,)))
    other = tuned.save(Table("NVIDIA A100"))
    assert told(capsys)["tables"] == {
        file.name: f"{GPU}, units: 1, chains: 0",
        other.name: "NVIDIA A100, units: 0, chains: 0",
    }


def directory(file) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda file: file.write_text(file.read_text()[:200]), "ignored: "),
        (lambda file: file.write_bytes(b"\xff\xfe{}"), "can't decode"),
        (lambda file: file.write_text("[]"), "ignored: it is not a table of schema 1"),
        (lambda file: file.write_text('{"schema": 1, "gpu": ["H100"]}'), "ignored: ['H100'] should be text"),
        (lambda file: file.write_text(file.read_text().replace(cache.versions()["kernels"], "0" * 12)), "its versions"),
        (lambda file: file.write_text(file.read_text().replace('"fused"', '"magic"')), "implementation 'magic'"),
        (directory, "Is a directory"),
    ],
)
def test_a_corrupt_table_is_told_in_one_line(breaks, message, capsys):
    file = tuned.save(Table(GPU, (ENTRY,)))
    breaks(file)
    found = told(capsys)
    assert list(found["tables"]) == [file.name]
    assert message in found["tables"][file.name]
    assert len(found["tables"][file.name].splitlines()) == 1


def test_a_table_that_nobody_looks_for_is_told(capsys):
    file = tuned.save(Table(GPU, (ENTRY,)))
    moved = file.rename(file.with_name("mine.json"))
    assert told(capsys)["tables"] == {moved.name: f"ignored: its name should be {file.name}"}


def test_a_cache_that_is_no_folder(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "file"))
    found = told(capsys)
    assert found["cache"]["folder"] == str(tmp_path / "file")
    assert found["tables"] == {}


def test_a_user_without_a_home(capsys, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", home)
    for name in ("RESNET_FUSED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    found = told(capsys)
    assert "RESNET_FUSED_CACHE must name a folder" in found["cache"]["folder"]
    assert found["tables"] == {}
