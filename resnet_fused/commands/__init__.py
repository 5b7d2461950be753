"""The commands of ``python -m resnet_fused``, one module each, and what is theirs alone."""
