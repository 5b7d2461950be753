"""What the commands share: numbers, folders to write to, and processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resnet_fused
from resnet_fused.__main__ import main
from resnet_fused.commands import demo
from resnet_fused.commands.shared import UserError, python, require_writable
from resnet_fused.commands.tune import Compilers, Runner
from resnet_fused.plan.tuned import Table
from tests.test_tune import problem

BAD_NUMBERS = ["0", "-3", "1.5", "many", "", "1e3", "9" * 30, "9" * 9999]


@pytest.mark.parametrize("number", BAD_NUMBERS)
@pytest.mark.parametrize(
    "arguments",
    [
        *(["explain", "--arch", "sm_90", option] for option in ("--batch", "--size")),
        *(["cost", option] for option in ("--batch", "--size")),
        *(["tune", option] for option in ("--batch", "--size")),
        *(["bench", option] for option in ("--batch", "--size", "--rounds")),
        ["demo", "--size"],
    ],
    ids=" ".join,
)
def test_a_number_out_of_range_is_one_line_and_exit_code_2(capsys, arguments, number):
    assert main([*arguments[:-1], f"{arguments[-1]}={number}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{arguments[-1]}: must be a whole number from " in err
    assert len(err.splitlines()) == 1
    assert len(err) < 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["abacus"], "invalid choice: 'abacus'"),
        (["demo", "--dtype", "float64"], "--dtype: invalid choice"),
        (["demo", "--size"], "--size: expected one argument"),
        (["explain", "--size", "1"], "from 32 to 4096; got '1'"),
        (["explain", "--size", "4097"], "from 32 to 4096; got '4097'"),
        (["bench", "--batch", "65537"], "from 1 to 65536; got '65537'"),
        (["check", "a\nb"], "unrecognized arguments: a b"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "--help" in err
    assert len(err.splitlines()) == 1


def fails_by_itself():
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried")


@pytest.mark.parametrize("fails", [fails_by_itself, lambda: torch.empty(2**50), lambda: bytearray(2**60)])
def test_out_of_memory_is_one_line(capsys, monkeypatch, fails):
    monkeypatch.setattr(demo, "main", lambda options: fails())
    assert main(["demo"]) == 2
    err = capsys.readouterr().err
    assert "out of memory" in err
    assert len(err.splitlines()) == 1


def test_what_is_no_mistake_of_the_users_keeps_its_trace(monkeypatch):
    def fails(options):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(demo, "main", fails)
    with pytest.raises(RuntimeError, match="of ours"):
        main(["demo"])


def test_the_largest_numbers_are_planned(capsys):
    assert main(["explain", "--model", "resnet18", "--arch", "sm_90", "--batch", "65536", "--size", "4096"]) == 0
    assert "65536x1024x1024" in capsys.readouterr().out


def test_explain_shows_a_fused_model_with_its_chains(capsys):
    assert main(["explain", "--model", "resnet50", "--arch", "sm_90", "--batch", "256"]) == 0
    assert "Chains, each once" in capsys.readouterr().out


OWN_SIZES = [
    ("resnet20", "16->16 of 32x32x32"),
    ("resnet18", "64->64 of 32x56x56"),
    ("resnet50_v2", "256->64 of 32x56x56"),
]


@pytest.mark.parametrize(("model", "layer"), OWN_SIZES)
def test_without_a_size_a_model_is_planned_for_images_of_its_own(model, layer, capsys):
    assert main(["explain", "--model", model, "--arch", "sm_90"]) == 0
    assert layer in capsys.readouterr().out


def test_without_a_size_every_model_is_tuned_for_images_of_its_own(monkeypatch):
    seen = []
    tune = sys.modules["resnet_fused.commands.tune"]
    monkeypatch.setattr(tune, "tune", lambda model, *shapes, **_: seen.extend(shapes))
    assert main(["tune", "--model", "resnet20", "resnet18_v2", "--batch", "1", "8"]) == 0
    assert seen == [(n, 3, side, side) for side in (32, 224) for n in (1, 8)]


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    require_writable(tmp_path, "--out")
    require_writable(tmp_path / "new" / "deep", "--out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "message"), [("file", "Not a directory"), ("below", "Not a directory"), ("link", "No such file")]
)
def test_a_folder_that_cannot_be_written_is_told(tmp_path, kind, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    folder = tmp_path / {"file": "file", "below": "file/deep", "link": "link"}[kind]
    with pytest.raises(UserError, match=f"--out {folder}: {message}"):
        require_writable(folder, "--out")


def test_a_folder_on_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match=r"--out .*: No space left on device"):
        require_writable(tmp_path, "--out")


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU that can be named, and no more."""
    monkeypatch.setattr(sys.modules["resnet_fused.commands.tune"], "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")


@pytest.mark.parametrize(
    "command", [["explain", "--train"], ["cost", "--train"], ["tune", "--direction", "training"]], ids=" ".join
)
def test_an_input_that_the_network_does_not_take_is_one_line(a_gpu, command, monkeypatch, capsys):
    monkeypatch.setattr("resnet_fused.commands.cost.interpreting", lambda: False)
    arch = [] if command[0] == "tune" else ["--arch", "sm_90"]
    assert main([*command, *arch, "--model", "resnet18", "--batch", "1", "--size", "32"]) == 2
    err = capsys.readouterr().err
    assert "Expected more than 1 value per channel when training" in err
    assert len(err.splitlines()) == 1


def test_tune_names_a_gpu_that_is_not_there_or_too_old(a_gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["resnet_fused.commands.tune"], "find_problems", lambda *_: pytest.fail("too late"))
    assert main(["tune", "--device", "cuda:1"]) == 2
    assert "there is no cuda:1: PyTorch sees 1 CUDA GPUs here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert main(["tune"]) == 2
    assert "compute capability 7.5: the kernels need 8.0" in capsys.readouterr().err


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """A current directory full of modules that leave a mark when they are imported."""
    names = ("torch", "triton", "numpy", "json", "runpy", "argparse", "multiprocessing", "resnet_fused", "socket", "re")
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'a').write('{name} ')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    return tmp_path / "sprung"


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_a_module_is_run_with_its_arguments(trap):
    done = subprocess.run(python("json.tool", "--help"), capture_output=True, text=True, check=True)
    assert "--sort-keys" in done.stdout
    assert not trap.exists()


@pytest.mark.parametrize("end", ["", "/nowhere"])
def test_a_process_imports_from_where_its_parent_does(trap, end, monkeypatch, tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "fruit.py").write_text("import sys; print(*sys.argv[1:])")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "library"), end])
    done = subprocess.run(python("fruit", "-c", "a b"), capture_output=True, text=True, check=True)
    assert done.stdout == "-c a b\n"
    assert not trap.exists()


def test_workers_import_nothing_from_the_current_directory(trap, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    runner = Runner(Compilers().runners[0].command)
    try:
        runner.open(problem())
    finally:
        runner.close()
    assert not trap.exists()


def test_the_measuring_process_is_started_so_too(a_gpu, trap, monkeypatch):
    tune = sys.modules["resnet_fused.commands.tune"]  # the package's attribute of that name is the function
    commands = []

    def measured(problems, gpu, runner, compiled):
        commands.append(runner.command)
        return tune.TuneReport(Table(gpu))

    monkeypatch.setattr(tune, "tune_problems", measured)
    monkeypatch.setattr(tune, "keep_constants", lambda arch, gpu, runner: commands.append(runner.command) or "kept")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with torch.device("meta"):
        model = resnet_fused.resnet18()
    report = resnet_fused.tune(model, (1, 3, 64, 64))
    assert commands == 2 * [python("resnet_fused.commands.tune_worker", "cuda:0", "--cudnn-benchmark")]
    assert str(report).endswith("kept")


def test_the_restart_imports_nothing_from_the_current_directory(trap):
    """As the installed command, which does not import from there itself."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU nothing starts over")
    command = python("resnet_fused", "demo", "--model", "resnet18", "--image", "missing.png")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "starting it ..." in done.stderr
    assert done.stderr.splitlines()[-1].startswith("resnet_fused: cannot read the image missing.png")
    assert not trap.exists()


def test_the_compilers_of_cost_import_nothing_from_the_current_directory(trap, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("resnet_fused.commands.cost.interpreting", lambda: False)
    monkeypatch.setattr("resnet_fused.commands.cost.find_problems", lambda *_: [problem(direction="inference")])
    assert main(["cost", "--model", "resnet20", "--arch", "sm_90", "--implementation", "mixed"]) == 0
    assert "for sm_90 (H100)" in capsys.readouterr().out
    assert not trap.exists()
