"""The command line: what the demo shows, the files it takes, and its errors."""

import hashlib
import http.client
import io
import os
import re
import struct
import subprocess
import sys
import urllib.error
import zlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import get_model

from resnet_fused import __version__
from resnet_fused.__main__ import main
from resnet_fused.commands import demo

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


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Trained weights as torchvision publishes them, and where they are to be in a cache that is empty."""
    saved = io.BytesIO()
    torch.save(get_model("resnet18", weights=None).state_dict(), saved)
    name = f"resnet18-{hashlib.sha256(saved.getvalue()).hexdigest()[:8]}.pth"
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(url=f"https://somewhere/{name}"))
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda _: weights)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return saved.getvalue(), tmp_path / "hub" / "checkpoints" / name


def answering(content, monkeypatch):
    """Whoever is asked for a file answers with ``content``, or fails so; returns the list of what was asked for."""
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        if isinstance(content, Exception):
            raise content
        return io.BytesIO(content)

    monkeypatch.setattr(demo.urllib.request, "urlopen", urlopen)
    return asked


def test_trained_weights_are_downloaded_once(capsys, photograph, published, monkeypatch):
    content, file = published
    asked = answering(content, monkeypatch)
    for how in ("downloaded to", "from"):
        code, out, _ = run(capsys, "--weights", "default", "--image", photograph)
        assert code == 0
        assert re.search(rf"The weights are trained: torchvision's .*, {how} {re.escape(str(file))}", out)
        assert "MEANINGLESS" not in out
    assert len(asked) == 1
    assert file.read_bytes() == content
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (urllib.error.URLError("no route"), "no route"),
        (http.client.IncompleteRead(b"half"), "IncompleteRead"),
        (b"something else", "the hash of what came is not the one in its name"),
        (b"late", "it takes more than -1 seconds"),
    ],
)
def test_why_trained_weights_cannot_be_had(content, reason, published, monkeypatch):
    _, file = published
    answering(content, monkeypatch)
    if content == b"late":
        monkeypatch.setattr(demo, "DOWNLOAD_SECONDS", -1)
    found, said = demo.find_trained("resnet18")
    assert found is None
    assert f"torchvision's trained weights are not in {file.parent} and cannot be had: " in said
    assert reason in said
    assert not list(file.parent.iterdir())


def test_random_weights_where_trained_ones_cannot_be_had(capsys, photograph, published, monkeypatch):
    answering(urllib.error.URLError("no route"), monkeypatch)
    code, out, _ = run(capsys, "--weights", "default", "--image", photograph)
    assert code == 0
    assert "no route" in out
    assert "LABELS ARE MEANINGLESS" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.png"], "cannot read the image missing.png"),
        (["--image", __file__], "cannot read the image"),
        (["--weights", "missing.pth"], "cannot read weights from missing.pth"),
        (["--weights", "missing.safetensors"], "cannot read weights from missing.safetensors"),
        (["--weights", __file__], "cannot read weights"),
        (["--size", "16"], "whole number from 32"),
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


def chunked(*chunks):
    """A PNG of these chunks, each with a right checksum."""
    parts = (
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width, height):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)


BROKEN = {
    "empty": lambda: b"",
    "text": lambda: b"not an image",
    "cut off": lambda: picture()[:200],
    "without data": lambda: chunked(header(40, 50), (b"IEND", b"")),
    "garbled": lambda: chunked(header(40, 50), (b"IDAT", b"garbage"), (b"IEND", b"")),
    "a bomb": lambda: chunked(header(50_000, 50_000), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")),
    "half a bomb": lambda: chunked(header(12_000, 10_000), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")),
    "no pixels": lambda: chunked(header(0, 50), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")),
    "a negative size": lambda: b"P6 -5 5 255 " + bytes(75),
    "a size of many digits": lambda: b"P6 99999999999999999999 5 255 ",
}


def picture():
    file = io.BytesIO()
    Image.effect_noise((50, 40), 100).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("kind", [*BROKEN, "a directory"])
def test_a_broken_image_is_one_line(capsys, tmp_path, kind):
    path = tmp_path / "broken.png"
    path.mkdir() if kind == "a directory" else path.write_bytes(BROKEN[kind]())
    code, out, err = run(capsys, "--image", str(path))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"cannot read the image {path}: " in err


@pytest.mark.parametrize("error", [SyntaxError("broken\nfile"), struct.error("unpack"), MemoryError(), EOFError("end")])
def test_whatever_pil_raises_is_one_line(capsys, photograph, monkeypatch, error):
    def fails(self, mode):
        raise error

    monkeypatch.setattr(Image.Image, "convert", fails)
    code, _, err = run(capsys, "--image", photograph)
    assert (code, len(err.splitlines())) == (2, 1)


def test_a_strip_of_an_image_takes_no_more_memory_than_any(tmp_path):
    shape = demo.preprocess(torch.zeros(1, 40_000_000, 3, dtype=torch.uint8), 32).shape
    assert shape == (3, 32, 32)


@pytest.mark.parametrize(
    "state",
    [{"fc.bias": torch.zeros(0)}, {"fc.bias": torch.tensor(1.0)}, {3: torch.zeros(2)}, {}, {"state_dict": 3}, "text"],
    ids=str,
)
def test_weights_that_are_none(capsys, tmp_path, state):
    torch.save(state, tmp_path / "weights.pth")
    code, _, err = run(capsys, "--weights", str(tmp_path / "weights.pth"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "does not hold the weights" in err or "no state dict" in err


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
    assert main(["demo", "--dtype", "float64"]) == 2


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
