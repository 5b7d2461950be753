"""Residual blocks whose batch norm, ReLU and residual addition run inside their convolutions, forward and backward."""

from resnet_fused.commands.tune import tune
from resnet_fused.convert import fuse, unfuse
from resnet_fused.engine.request import implementation
from resnet_fused.engine.trace import trace
from resnet_fused.explain import explain
from resnet_fused.inference import optimize_for_inference
from resnet_fused.models import (
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from resnet_fused.models_v2 import resnet18_v2, resnet34_v2, resnet50_v2, resnet101_v2, resnet152_v2
from resnet_fused.modules import BasicBlock, Bottleneck, PreActBlock, PreActBottleneck, ResidualBlock
from resnet_fused.version import __version__

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "PreActBlock",
    "PreActBottleneck",
    "ResidualBlock",
    "__version__",
    "explain",
    "functional",
    "fuse",
    "implementation",
    "optimize_for_inference",
    "resnet18",
    "resnet18_v2",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet34_v2",
    "resnet44",
    "resnet50",
    "resnet50_v2",
    "resnet56",
    "resnet101",
    "resnet101_v2",
    "resnet110",
    "resnet152",
    "resnet152_v2",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "trace",
    "tune",
    "unfuse",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
