"""The plan's model against throughputs that others published of ResNet-50: within 1.5 times of each."""

from __future__ import annotations

import sys

import pytest
import torch
import torchvision

from resnet_fused import explain, fuse

TIMM = "huggingface/pytorch-image-models, results/benchmark-"
PUBLISHED = [
    ("RTX 4090", 89, 1024, False, "mixed", 8039, f"{TIMM}infer-amp-nchw-pt291-cu128-4090-dynamo.csv"),
    ("RTX 4090", 89, 256, False, "mixed", 8237, f"{TIMM}infer-amp-nchw-pt240-cu124-rtx4090-dynamo.csv"),
    ("RTX 4090", 89, 512, False, "eager", 5088, f"{TIMM}infer-amp-nhwc-pt240-cu124-rtx4090.csv"),
    ("RTX 5090", 120, 1024, False, "mixed", 12401, f"{TIMM}infer-amp-nchw-pt291-cu130-5090-dynamo.csv"),
    ("RTX 3090", 86, 1024, False, "eager", 3730, f"{TIMM}infer-amp-nhwc-pt240-cu124-rtx3090.csv"),
    ("RTX 3090", 86, 512, True, "eager", 1218, f"{TIMM}train-amp-nhwc-pt112-cu113-rtx3090.csv"),
    ("A100", 80, 256, True, "eager", 2470, "NVIDIA/DeepLearningExamples, ResNet50 v1.5 for PyTorch, README.md: 1 GPU"),
]
"""GPU, architecture, images, whether a training step, the nearest road, images per second, where they stand.

``torch.compile`` leaves convolutions to cuDNN, or to templates of its own, with fused pointwise kernels behind them: so
do mixed units.
"""


@pytest.mark.parametrize(("gpu", "arch", "images", "training", "road", "published", "source"), PUBLISHED)
def test_what_was_published_is_predicted(gpu, arch, images, training, road, published, source, monkeypatch):
    monkeypatch.setattr(sys.modules["resnet_fused.explain"], "present_gpu", lambda arch: gpu)
    with torch.device("meta"):
        model = fuse(torchvision.models.resnet50()).to(torch.float16, memory_format=torch.channels_last)
        x = torch.empty(images, 3, 224, 224, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    totals = {total.road: total for total in explain(model, x, arch=arch, training=training).totals()}
    predicted = images / totals[road].seconds
    assert published / 1.5 < predicted < 1.5 * published, source
    assert images / totals["roof"].seconds > published, "nobody is faster than the roof"
