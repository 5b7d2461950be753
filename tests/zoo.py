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
