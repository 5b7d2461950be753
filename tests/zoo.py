"""Models of other libraries for the tests: small inputs, no downloads, random but moderate statistics."""

from __future__ import annotations

import timm
import torch
import torchvision
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import resnet_fused


def hugging_face(layer_type: str = "bottleneck") -> nn.Module:
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 2, 1, 1], layer_type=layer_type, num_labels=10
    )
    return ResNetForImageClassification(config)


MODELS = {
    "torchvision resnet18": torchvision.models.resnet18,
    "torchvision resnet50": torchvision.models.resnet50,
    "ours resnet50": resnet_fused.resnet50,
    "ours resnet20": resnet_fused.resnet20,
    "timm resnet50": lambda: timm.create_model("resnet50", pretrained=False),
    "timm resnet50d": lambda: timm.create_model("resnet50d", pretrained=False),
    "Hugging Face": hugging_face,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    randomise_norms(model)
    return model.eval()


def randomise_norms(model: nn.Module) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.normal_(0.5, 0.5)
                module.bias.normal_(0, 0.1)


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


class Gated(nn.Module):
    """A block of a branch of 1x1, 3x3 and 1x1 convolution, squeeze and excitation behind it, and a shortcut."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, act: nn.Module | None = None) -> None:
        super().__init__()
        width = planes // 4
        sizes = (inplanes, width, 1), (width, width, 3), (width, planes, 1)
        for i, (ci, co, taps) in enumerate(sizes, 1):
            conv = nn.Conv2d(ci, co, taps, stride if taps == 3 else 1, taps // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(co))
        self.se = torchvision.ops.SqueezeExcitation(planes, width, activation=nn.SiLU)
        self.act = act or nn.ReLU()
        self.downsample = None
        if stride > 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.se(self.bn3(self.conv3(out)))
        return self.act(out + (x if self.downsample is None else self.downsample(x)))
