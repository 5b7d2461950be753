"""Fuse torchvision's ResNet-50 and time it against eager on this machine's GPU."""

import copy
import statistics

import torch
from torchvision.models import resnet50

import resnet_fused


def medians(models: list[torch.nn.Module], x: torch.Tensor, rounds: int = 50) -> list[float]:
    """Milliseconds of one call of each model: warm, taken in turns."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 5):
        for model, samples in zip(models, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            model(x)
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end))
    return [statistics.median(samples[5:]) for samples in times]


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("This example times the kernels, which needs a CUDA GPU. On a CPU, see serve_inference.py.")
    torch.backends.cudnn.benchmark = True
    eager = resnet50().eval().to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    fused = resnet_fused.fuse(copy.deepcopy(eager))
    x = torch.randn(32, 3, 224, 224, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        print(resnet_fused.explain(fused, x))
        print(f"{torch.cuda.get_device_name()}, batch 32, bfloat16")
        print("eager {:.2f} ms, fused {:.2f} ms".format(*medians([eager, fused], x)))


if __name__ == "__main__":
    main()
