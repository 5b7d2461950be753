"""The command line: what the demo shows, the files it takes, and its errors."""

import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import get_model

from resnet_fused import __version__, demo
from resnet_fused.__main__ import main

SMALL = ["demo", "--model", "resnet18", "--size", "32"]
ON_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _two_rounds(monkeypatch):
    monkeypatch.setattr(demo, "ROUNDS", dict.fromkeys(demo.ROUNDS, 2))


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "photo.png"
    Image.effect_noise((50, 40), 100).save(path)
    return str(path)


def run(capsys, *arguments):
    code = main([*SMALL, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_shows_everything_on_random_weights(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    for words in ("chelsea", "MEANINGLESS", "optimize_for_inference", "speed-up", "MB per image"):
        assert words in out
    assert re.search(r"optimize_for_inference .* of 20 ", out)
    assert ON_GPU or "conv_forward" in out.partition("layer2.1 at work")[2]


def test_bfloat16(capsys):
    code, out, _ = run(capsys, "--dtype", "bfloat16")
    assert code == 0
    assert "bfloat16" in out


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_reads_weights_and_images(capsys, tmp_path, photograph, suffix):
    state = get_model("resnet18", weights=None, num_classes=10).state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state, "epoch": 3}, path)
    code, out, _ = run(capsys, "--weights", str(path), "--image", photograph)
    assert code == 0
    assert photograph in out
    assert "class " in out
    assert "MEANINGLESS" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.png"], "cannot read the image missing.png"),
        (["--image", __file__], "cannot read the image"),
        (["--weights", "missing.pth"], "cannot read weights from missing.pth"),
        (["--weights", "missing.safetensors"], "cannot read weights from missing.safetensors"),
        (["--weights", __file__], "cannot read weights"),
        (["--size", "16"], "32 pixels or more"),
        (["--device", "abacus"], "no such device"),
        (["--device", "meta"], "run on cpu and cuda"),
        (["--device", "cuda:99"], "CUDA GPUs here"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_weights_of_another_model(capsys, tmp_path):
    torch.save(get_model("resnet34", weights=None).state_dict(), tmp_path / "34.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    code, _, err = run(capsys, "--weights", str(tmp_path / "34.pth"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "does not hold the weights of resnet18" in err
    code, _, err = run(capsys, "--weights", str(tmp_path / "list.pth"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "no state dict" in err


def test_unknown_arguments_exit_with_2():
    with pytest.raises(SystemExit) as error:
        main(["demo", "--dtype", "float64"])
    assert error.value.code == 2


def test_preprocess_centres_and_normalises():
    image = torch.zeros(40, 90, 3, dtype=torch.uint8)
    image[:, 25:65] = 255
    x = demo.preprocess(image, 32)
    assert x.shape == (3, 32, 32)
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x, white[:, None, None].expand_as(x))


def test_calibration_makes_evaluation_like_training():
    model = get_model("resnet18", weights=None)
    x = torch.randn(4, 3, 32, 32)
    demo.calibrate(model, x)
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}
    assert all(m.num_batches_tracked == demo.CALIBRATION_BATCHES for m in model.modules() if hasattr(m, "running_var"))
    activations = model.eval().layer1(model.maxpool(model.bn1(model.conv1(x))))
    assert 0.1 < activations.std() < 10


@pytest.mark.skipif(ON_GPU, reason="with a GPU the interpreter stays off")
def test_switches_the_interpreter_on_by_itself():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "resnet_fused", *SMALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "conv_forward" in done.stdout
    assert "Traceback" not in done.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    assert error.value.code == 0
    assert __version__ in capsys.readouterr().out
