"""Package layout: the folder ``kernels/`` is installed as ``resnet_fused.kernels``."""

from setuptools import setup

setup(
    packages=["resnet_fused", "resnet_fused.kernels"],
    package_dir={"resnet_fused": "resnet_fused", "resnet_fused.kernels": "kernels"},
)
