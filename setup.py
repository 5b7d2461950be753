"""Package layout: ``kernels/`` and ``benchmarks/`` are installed inside the package ``resnet_fused``."""

from setuptools import setup

INSIDE = {"resnet_fused.kernels": "kernels", "resnet_fused.benchmarks": "benchmarks"}

setup(packages=["resnet_fused", *INSIDE], package_dir={"resnet_fused": "resnet_fused", **INSIDE})
