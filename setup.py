"""Package layout: ``kernels/`` and ``benchmarks/`` are installed inside the package ``resnet_fused``."""

from setuptools import setup

INSIDE = {"resnet_fused.kernels": "kernels", "resnet_fused.benchmarks": "benchmarks"}

ROOMS = ["resnet_fused", "resnet_fused.engine", "resnet_fused.plan", "resnet_fused.commands"]

setup(packages=[*ROOMS, *INSIDE], package_dir={"resnet_fused": "resnet_fused", **INSIDE})
