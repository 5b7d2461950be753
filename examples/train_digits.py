"""Train a small residual network on scikit-learn's handwritten digits, by eager PyTorch and by the kernels.

    pip install -e '.[examples]'
    python examples/train_digits.py                      # on a CUDA GPU
    TRITON_INTERPRET=1 python examples/train_digits.py   # without: the kernels run in Triton's interpreter

Both start from the same weights and see the same batches. Prints the accuracy on held-out digits and plots the losses.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import resnet_fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Digits:
    """Images [N, 1, 8, 8] in fp32 and their digits [N]; a fifth of the 1797 is held out."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Run:
    """What a training leaves: the model, the loss of each step, and the seconds that it took."""

    model: nn.Module
    losses: list[float]
    seconds: float


def load() -> Digits:
    bunch = load_digits()
    split = train_test_split(bunch.images, bunch.target, test_size=0.2, random_state=0, stratify=bunch.target)
    images, test_images = (torch.tensor(part / 16 - 0.3, dtype=torch.float32)[:, None].to(DEVICE) for part in split[:2])
    labels, test_labels = (torch.tensor(part).to(DEVICE) for part in split[2:])
    return Digits(images, labels, test_images, test_labels)


def small_resnet(seed: int, channels: int = 8) -> nn.Module:
    """Eight layers: a stem, three of torchvision's blocks, and a classifier."""
    torch.manual_seed(seed)
    c = channels
    return nn.Sequential(
        nn.Conv2d(1, c, 3, padding=1, bias=False),
        nn.BatchNorm2d(c),
        nn.ReLU(inplace=True),
        BasicBlock(c, c),
        BasicBlock(c, 2 * c, 2, _projection(c, 2 * c)),
        BasicBlock(2 * c, 4 * c, 2, _projection(2 * c, 4 * c)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * c, 10),
    ).to(DEVICE)


def _projection(inplanes: int, planes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, 2, bias=False), nn.BatchNorm2d(planes))


def train(
    digits: Digits,
    implementation: str,
    steps: int,
    batch: int = 128,
    seed: int = 0,
    rate: float = 0.2,
    advance: Callable[[], None] = lambda: None,
) -> Run:
    """SGD with momentum and a cosine schedule; ``advance`` is called after each step."""
    model = small_resnet(seed)
    if implementation != "eager":
        resnet_fused.fuse(model)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    start = time.perf_counter()
    with resnet_fused.implementation(implementation):
        for chosen in _batches(len(digits.labels), batch, steps, seed):
            loss = F.cross_entropy(model(digits.images[chosen]), digits.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            advance()
    return Run(model, losses, time.perf_counter() - start)


def _batches(count: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """Indices of each step's images: every epoch in an order of its own, its incomplete last batch left out."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = count // batch
    orders = [torch.randperm(count, generator=generator)[: per_epoch * batch] for _ in range(-(-steps // per_epoch))]
    return [chosen.to(DEVICE) for chosen in torch.cat(orders).split(batch)[:steps]]


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, implementation: str) -> Tensor:
    """Logits [N, 10] in evaluation mode."""
    with resnet_fused.implementation(implementation):
        return model.eval()(images)


def accuracy(model: nn.Module, digits: Digits, implementation: str) -> float:
    logits = predict(model, digits.test_images, implementation)
    return (logits.argmax(1) == digits.test_labels).double().mean().item()


def plot(runs: dict[str, Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (name, run), style in zip(runs.items(), ("-", "--", ":", "-."), strict=False):
        axes.plot(range(1, len(run.losses) + 1), run.losses, style, label=name, linewidth=1.4)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--implementation",
        choices=["eager", "auto", "triton", "mixed", "both"],
        default="both",
        help="both: eager, and what the kernels do here (auto on a GPU, triton in the interpreter)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("train_digits.png"), help="the plot of the losses")
    chosen = parser.parse_args()
    if chosen.epochs < 1 or not 1 <= chosen.batch <= 1437:
        parser.error("--epochs must be 1 or more, --batch from 1 to 1437, the digits that are trained on")
    try:
        chosen.out.open("ab").close()
    except OSError as error:
        parser.error(f"--out {chosen.out}: {error.strerror}")
    return chosen


def names(requested: str) -> list[str]:
    kernels = "auto" if DEVICE == "cuda" else "triton"
    chosen = ["eager", kernels] if requested == "both" else [requested]
    if DEVICE == "cpu" and set(chosen) & {"triton", "mixed"} and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("Without a CUDA GPU the kernels need Triton's interpreter: set TRITON_INTERPRET=1.")
    return chosen


def main() -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    args = options()
    digits, runs = load(), {}
    steps = args.epochs * (len(digits.labels) // args.batch)
    with Progress("{task.description:7}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        for name in names(args.implementation):
            task = progress.add_task(name, total=steps)
            runs[name] = train(
                digits, name, steps, args.batch, args.seed, advance=lambda task=task: progress.advance(task)
            )
    for name, run in runs.items():
        found = accuracy(run.model, digits, name)
        print(f"{name}: accuracy {found:.2%}, last loss {run.losses[-1]:.4f}, {run.seconds:.0f} s for {steps} steps")
    if len(runs) == 2:
        pairs = list(zip(*(run.losses for run in runs.values()), strict=True))
        gaps = [abs(ours - eager) / eager for eager, ours in pairs]
        print(f"losses differ by at most {max(gaps[:10]):.1e} in the first 10 steps, {max(gaps):.1e} in all (relative)")
    plot(runs, args.out)


if __name__ == "__main__":
    main()
