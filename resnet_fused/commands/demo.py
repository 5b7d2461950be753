"""The demonstration: a ResNet classifies photographs, eager and fused, and shows how the two differ."""

from __future__ import annotations

import argparse
import copy
import hashlib
import statistics
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from resnet_fused import models
from resnet_fused.commands.shared import DTYPES, UserError, pick_device, pixels, tracked
from resnet_fused.convert import fuse
from resnet_fused.engine.request import implementation
from resnet_fused.engine.trace import trace
from resnet_fused.explain import explain
from resnet_fused.inference import optimize_for_inference
from resnet_fused.kernels.launch import dry_run
from resnet_fused.models import MODELS
from resnet_fused.plan.problem import Request, dtype_name
from resnet_fused.table import render

CLASSIFIERS = [name for name, side in MODELS.items() if side == 224]
"""The models for photographs."""
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
CALIBRATION_BATCHES, CALIBRATION_VIEWS = 6, 8
PLANNED = 80
"""The compute capability (times ten) for which launches are planned where there is no GPU."""
ROUNDS = {"cpu": 10, "cuda": 50}
SECONDS = 20
"""Timing ends after ``ROUNDS``, or at the end of the round in which this time is up."""

TRAINED = Path("default")
"""What ``--weights`` says for torchvision's trained weights."""
PATIENCE, DOWNLOAD_SECONDS = 5, 30
"""Seconds without an answer, and in all, after which a download is given up."""

Function = Callable[[Tensor], Tensor]
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m resnet_fused demo``."""
    add = parser.add_argument
    add("--model", default="resnet50", choices=CLASSIFIERS, metavar="NAME", help=f"one of {', '.join(CLASSIFIERS)}")
    add("--image", nargs="+", type=Path, default=[], metavar="FILE", help="photographs (default: scikit-image's)")
    weights = "state dict, .pth or .safetensors; or 'default': torchvision's trained ones (otherwise: random weights)"
    add("--weights", type=Path, metavar="FILE", help=weights)
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: a CUDA GPU if there is one)")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--size", type=pixels, default=224, metavar="PIXELS", help="side of the network's input (default: 224)")


def main(options: argparse.Namespace) -> int:
    """Run the demonstration; returns 0."""
    device = pick_device(options.device)
    run(options.model, options.image, options.weights, device, options.dtype, options.size)
    return 0


def run(
    name: str, images: list[Path], weights: Path | None, device: torch.device, chosen: str | None, size: int
) -> None:
    """Everything that ``python -m resnet_fused demo`` shows. Raises UserError for unusable files and options."""
    dtype = DTYPES[chosen or ("bfloat16" if device.type == "cuda" else "float32")]
    torch.backends.cudnn.benchmark = True
    photographs = load_photographs(images, size)
    x = torch.stack(list(photographs.values())).to(device, memory_format=torch.channels_last)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{name} in {dtype_name(dtype)} on {_describe(device)}; {versions}")
    print(f"{len(x)} photographs at {size}x{size}: {', '.join(photographs)}\n")

    if weights == TRAINED:
        weights, said = find_trained(name)
        print(f"{said}\n", flush=True)
    model = load_model(name, weights).to(device).to(memory_format=torch.channels_last)
    if weights is None:
        calibrate(model, x)
        print(
            "The weights are random, with batch-norm statistics calibrated on the photographs: the arithmetic is the\n"
            f"real one, the LABELS ARE MEANINGLESS. For real ones: --weights default, or --weights {name}.pth\n"
        )
    model.eval().requires_grad_(False)

    print("preparing the fused models ...", flush=True)
    with torch.inference_mode():
        eager = copy.deepcopy(model).to(dtype)
        fused = fuse(copy.deepcopy(eager))
        variants: dict[str, Function] = {"eager": implementation("eager")(eager.forward)}
        if device.type == "cuda":
            variants["fused"] = fused
        variants["optimize_for_inference"] = optimize_for_inference(model, x.to(dtype), dtype=dtype)
        show_fusion(fused, x.to(dtype))
        show_comparison(model, variants, list(photographs), x, dtype)
        show_traffic(eager, fused, x.to(dtype))
        if device.type == "cpu":
            show_kernels(fuse(copy.deepcopy(model)), x[:1])


def load_photographs(images: list[Path], size: int) -> dict[str, Tensor]:
    """The images, else scikit-image's photographs, by name, each as :func:`preprocess` returns it."""
    if images:
        return {str(path): preprocess(_read_image(path), size) for path in images}
    try:
        from skimage import data
    except ImportError:
        raise UserError("scikit-image is missing: pip install 'resnet-fused[demo]', or pass --image FILE") from None
    return {name: preprocess(torch.from_numpy(getattr(data, name)()), size) for name in PHOTOGRAPHS}


def _read_image(path: Path) -> Tensor:
    try:
        import numpy
        from PIL import Image

        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                pixels = torch.from_numpy(numpy.array(image.convert("RGB")))
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'resnet-fused[demo]'") from None
    except Exception as error:  # a broken file makes PIL raise whatever its decoder stumbles over
        raise UserError(f"cannot read the image {path}: {_first_line(error)}") from None
    if pixels.numel() == 0:
        raise UserError(f"cannot read the image {path}: it has no pixels")
    return pixels


def preprocess(image: Tensor, size: int) -> Tensor:
    """uint8 [H, W, 3] to fp32 [3, size, size]: the central square to 8/7 of ``size``, its centre cut, normalised."""
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    x = image[top : top + side, left : left + side].permute(2, 0, 1).float() / 255
    scaled = round(size * 8 / 7)
    x = F.interpolate(x[None], (scaled, scaled), mode="bilinear", antialias=True)[0]
    cut = (scaled - size) // 2
    x = x[:, cut : cut + size, cut : cut + size]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None]


def load_model(name: str, weights: Path | None) -> nn.Module:
    """torchvision's model where torchvision is installed, else ours; with the weights of the file, else random ones."""
    torch.manual_seed(0)
    state = {} if weights is None else _read_weights(weights)
    classes = state["fc.bias"].numel() if "fc.bias" in state else 1000
    if classes == 0:
        raise UserError(f"{weights} does not hold the weights of {name}: fc.bias is empty")
    try:
        from torchvision.models import get_model
    except ImportError:
        model: nn.Module = getattr(models, name)(num_classes=classes)
    else:
        model = get_model(name, weights=None, num_classes=classes)
    if weights is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            detail = str(error).splitlines()[-1].strip()
            raise UserError(f"{weights} does not hold the weights of {name}: {detail[:200]}") from None
    return model


def find_trained(name: str) -> tuple[Path | None, str]:
    """The file of torchvision's trained weights, from its cache or downloaded to it, or None; and which, or why not."""
    try:
        from torchvision.models import get_model_weights
    except ImportError:
        return None, "torchvision, whose trained weights were asked for, is missing: pip install 'resnet-fused[demo]'"
    weights: Any = get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if file.exists():
        return file, f"The weights are trained: torchvision's {weights}, from {file}."
    try:
        _download(weights.url, file)
    except (OSError, HTTPException, ValueError) as error:
        return None, f"torchvision's trained weights are not in {file.parent} and cannot be had: {_first_line(error)}."
    return file, f"The weights are trained: torchvision's {weights}, downloaded to {file}."


def _download(url: str, file: Path) -> None:
    """Raises OSError or HTTPException, and ValueError if the hash of what came does not begin as its name ends."""
    digest, deadline = hashlib.sha256(), time.monotonic() + DOWNLOAD_SECONDS
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        kept = Path(folder) / file.name
        with urllib.request.urlopen(url, timeout=PATIENCE) as source, kept.open("wb") as target:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it takes more than {DOWNLOAD_SECONDS} seconds")
        if not digest.hexdigest().startswith(file.stem.rpartition("-")[2]):
            raise ValueError("the hash of what came is not the one in its name")
        kept.replace(file)


def _read_weights(path: Path) -> dict[str, Tensor]:
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError("safetensors is missing: pip install 'resnet-fused[demo]'") from None
    except Exception as error:  # the two readers share no exception of their own
        raise UserError(f"cannot read weights from {path}: {_first_line(error)}") from None
    if isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict: tensors by name are needed")
    return state


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor) -> None:
    """Give every batch norm of ``model`` the statistics of random crops and flips of the photographs ``x``."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # a plain average over all batches
        norm.reset_running_stats()
    model.train()
    generator = torch.Generator().manual_seed(0)
    for _ in tracked(range(CALIBRATION_BATCHES), "calibrating batch norm"):
        model(torch.stack([_view(x, generator) for _ in range(CALIBRATION_VIEWS)]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _view(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of a random photograph, scaled back to full size, flipped every other time."""
    size = x.shape[-1]
    which, flip, cut, top, left = torch.rand(5, generator=generator).tolist()
    side = size - int(cut * size / 2)
    top, left = int(top * (size - side)), int(left * (size - side))
    view = x[int(which * len(x)), :, top : top + side, left : left + side]
    view = F.interpolate(view[None], size, mode="bilinear", antialias=True)[0]
    return view.flip(-1) if flip < 0.5 else view


def show_fusion(fused: nn.Module, x: Tensor) -> None:
    """What was fused, and with which tiles: on a CPU, those that an A100 would run."""
    if x.is_cuda:
        print(explain(fused, x))
        return
    with dry_run(PLANNED), implementation("triton"):
        print(f"On a GPU (tiles for compute capability {PLANNED / 10}):")
        print(explain(fused, x))


def show_comparison(
    model: nn.Module, variants: dict[str, Function], names: list[str], x: Tensor, dtype: torch.dtype
) -> None:
    """Labels, errors against fp64, and times of the variants."""
    exact_model = copy.deepcopy(model).double()
    exact = torch.cat([exact_model(image[None].double()) for image in tracked(x, "computing in fp64")])
    x = x.to(dtype)
    outputs = {name: function(x).double() for name, function in variants.items()}
    times = median_times(variants, x)

    labels = _labels(exact.shape[1])
    top = {name: output.topk(min(5, exact.shape[1])).indices.tolist() for name, output in outputs.items()}
    answers = [[photo, *(labels[top[name][i][0]] for name in variants)] for i, photo in enumerate(names)]
    print(render("Answers", ["photograph", *variants], answers))

    rows = []
    for name, output in outputs.items():
        error = (output - exact).abs().max().item()
        shared = sum(len(set(a) & set(b)) for a, b in zip(top[name], top["eager"], strict=True))
        agreement = f"{shared} of {sum(map(len, top[name]))}"
        rows.append([name, agreement, f"{error:.2e}", f"{times[name]:.2f}", f"{times['eager'] / times[name]:.2f}x"])
    columns = ["", "top-5 agreement", "largest error against fp64", "median ms", "speed-up"]
    title = f"{len(x)} images in {dtype_name(dtype)}, channels_last; logits up to {exact.abs().max():.2f}"
    print(render(title, columns, rows))


def median_times(variants: dict[str, Function], x: Tensor) -> dict[str, float]:
    """Milliseconds per call of each variant on ``x``: warm, taken in turns, the median of all rounds."""
    for function in variants.values():
        function(x), function(x)
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + SECONDS
    for _ in tracked(range(ROUNDS[x.device.type]), "timing"):
        for name, function in variants.items():
            times[name].append(_milliseconds(function, x))
        if time.perf_counter() > end:
            break
    return {name: statistics.median(samples) for name, samples in times.items()}


def _milliseconds(function: Function, x: Tensor) -> float:
    if not x.is_cuda:
        start = time.perf_counter()
        function(x)
        return (time.perf_counter() - start) * 1e3
    with torch.cuda.device(x.device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(x)
        end.record()
        end.synchronize()
    return begin.elapsed_time(end)


def show_traffic(eager: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Launches and bytes of one forward on a GPU, counted from the shapes."""
    before, after = count(eager, x, "eager"), count(fused, x, "triton")
    ratio = [round(a / b, 2) for a, b in zip(before, after, strict=True)]
    rows = [["eager", *before], ["fused", *after], ["ratio", *ratio]]
    print(render("On a GPU, counted", ["", "launches", "MB per image"], rows))


def count(model: nn.Module, x: Tensor, road: Request) -> tuple[int, float]:
    """Kernel launches and library calls of ``model(x)`` on a GPU, and megabytes per image; the kernels do not run."""
    with dry_run(PLANNED), implementation(road), trace() as t:
        model(x)
    return len(t.launches), round(sum(c.bytes_read + c.bytes_written for c in t.launches) / len(x) / 1e6, 1)


def show_kernels(fused: Any, x: Tensor) -> None:
    """One block of the fused model through Triton's interpreter, on what the layers before it make of a photograph."""
    block, inputs = fused.layer2[1], []
    with implementation("eager"):
        with block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
            fused(x)
        (h,) = inputs
        exact = copy.deepcopy(block).double()(h.double())
        eager = block(h)
    with implementation("triton"), trace() as calls:
        start = time.perf_counter()
        z = block(h)
        seconds = time.perf_counter() - start
    errors = [(y.double() - exact).abs().max().item() for y in (z, eager)]
    print(f"The Triton kernels of layer2.1 at work: {seconds:.1f} s in Triton's interpreter on the CPU, in fp32")
    print(calls.table())
    print(f"largest error against fp64: {errors[0]:.2e} (eager's own: {errors[1]:.2e})")


def _labels(classes: int) -> list[str]:
    """ImageNet's class names where torchvision is installed and their number fits, else numbers."""
    try:
        from torchvision.models import ResNet50_Weights
    except ImportError:
        pass
    else:
        names: list[str] = ResNet50_Weights.DEFAULT.meta["categories"]
        if len(names) == classes:
            return names
    return [f"class {i}" for i in range(classes)]


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
