"""Triton kernels and their launchers. Imports torch and triton, nothing of the package above.

Glossary, used in every file:

======== =====================================================================================
N H W CI  images, height, width and channels of the input ``x`` (NHWC in memory: channels last)
R S       height and width of the filter ``w``
P Q CO    height, width and channels of the output ``y``
M K       the convolution as a matrix product: ``M = N*P*Q`` rows, ``K = R*S*CI``, ``CO`` columns
res       the residual that is added before the last ReLU
pixel     one (n, h, w); tensors are *pixel-linear*: element ``(pixel, c)`` at ``pixel*stride + c``
======== =====================================================================================
"""
