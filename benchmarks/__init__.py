"""Timings against eager PyTorch and other compilers, installed as ``resnet_fused.benchmarks``.

``run`` is the command ``bench``; ``host`` and ``family`` run as modules of their own; ``bench_*.py`` run under pytest.
"""
