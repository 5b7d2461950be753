"""Timings against eager PyTorch and other compilers, installed as ``resnet_fused.benchmarks``.

``run`` is the command ``bench``; ``host`` runs as a module of its own; ``bench_*.py`` run under pytest.
"""
