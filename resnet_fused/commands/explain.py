"""The command ``explain``: how each unit of a ResNet would run on a GPU, and why."""

from __future__ import annotations

import argparse
import json

import torch

from resnet_fused.commands.shared import NETWORKS, add_network_arguments, chosen_input, network, pick_arch
from resnet_fused.convert import fuse
from resnet_fused.engine.request import implementation
from resnet_fused.explain import explain
from resnet_fused.plan.problem import REQUESTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m resnet_fused explain``."""
    add_network_arguments(parser)
    add = parser.add_argument
    add("--arch", metavar="ARCH", help="sm_80, sm_90 ... (default: that of the GPU here)")
    add("--implementation", choices=REQUESTS, default="auto", help="default: auto")
    add("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """Print the plan of a model; returns 0."""
    dtype, side = getattr(torch, options.dtype), options.size or NETWORKS[options.model]
    with torch.device("meta"), implementation(options.implementation):
        model = fuse(network(options.model).to(dtype).to(memory_format=torch.channels_last))
        x = torch.empty(options.batch, 3, side, side, dtype=dtype)
        with chosen_input():
            explanation = explain(model, x, arch=pick_arch(options.arch), training=options.train)
        totals = [total.to_dict() for total in explanation.totals()]
        constants = None if explanation.constants is None else explanation.constants.to_dict()
        found = {"blocks": explanation.to_dict(), "totals": totals, "measured_constants": constants}
        print(json.dumps(found, indent=1) if options.json else explanation)
    return 0
