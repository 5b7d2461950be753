"""Freeze torchvision's ResNet-50 for serving on a CPU or GPU, save it, load it back, and time it against eager."""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torchvision.models import resnet50

import resnet_fused


def medians(models: list[torch.nn.Module], x: torch.Tensor, rounds: int = 20) -> list[float]:
    """Milliseconds of one call of each model: warm, taken in turns."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 3):
        for model, samples in zip(models, times, strict=True):
            start = time.perf_counter()
            model(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            samples.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(samples[3:]) for samples in times]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = resnet50().eval().to(device, memory_format=torch.channels_last)
    x = torch.randn(1, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        torch.save(resnet_fused.optimize_for_inference(model, x), Path(folder) / "resnet50.pt")
        served = torch.load(Path(folder) / "resnet50.pt", weights_only=False)
        served.prepare(x)  # a CUDA graph is not saved
        print(f"largest difference {(served(x) - model(x)).abs().max().item():.1e}")
        print("{}: eager {:.1f} ms, optimized {:.1f} ms".format(device, *medians([model, served], x)))


if __name__ == "__main__":
    main()
