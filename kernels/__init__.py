"""Triton kernels and their launchers. Imports torch and triton, nothing of the package above.

Glossary, used in every file:

======== =====================================================================================
N H W CI  images, height, width and channels of the input ``x`` (NHWC in memory: channels last)
R S       height and width of the filter ``w``
P Q CO    height, width and channels of the output ``y``
M K       the convolution as a matrix product: ``M = N*P*Q`` rows, ``K = R*S*CI``, ``CO`` columns
res       the residual that is added before the last activation
y a z     raw output of a convolution; after batch norm and activation; output of a block
stats     fp32 [5, C], what batch norm does to each channel of ``y``: mean, rstd, ``scale = gamma*rstd``,
          ``shift = beta - mean*scale``, and 1/count (0 where batch norm does not use the batch's own statistics)
g         gradient in front of an activation: ``dz`` times its derivative (of a ReLU, where ``z > 0``; else 0)
coefs     fp32 [3, C]: the gradient of ``y`` is ``coefs[0]*g + coefs[1]*y + coefs[2]``
Widths    channels and strides of a launch, Form: which of the kernel's cases it is, Blocks: its tile
pixel     one (n, h, w); tensors are *pixel-linear*: element ``(pixel, c)`` at ``pixel*stride + c``
======== =====================================================================================
"""
