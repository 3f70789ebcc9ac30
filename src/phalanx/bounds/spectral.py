"""Upper bounds of spectral norms. Power iteration approaches the norm from below and proves nothing; these never do."""

# F frequencies, O output channels, I input channels

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDING = 1e-9
"""Relative, added to every constant: far above what float64 loses in making it."""

_GRAMS = 8
"""Squarings: the bound is then within a factor d^(1/512) of the norm, d the smaller side, and mostly equal to it."""


def gram_upper(matrices: Tensor, grams: int = _GRAMS) -> Tensor:
    """(..., O, I) to (...): at least the largest singular value of each matrix, real or complex, in float64.

    ||W||_2 <= ||(W* W)^(2^(n-1))||_F^(1 / 2^n) holds for every n, and the right side falls to the left one (Delattre et
    al., ICML 2023). n = 0 is the Frobenius norm; from n = 1 on a sharper bound of the last power's largest eigenvalue
    stands in its place.
    """
    gram = matrices.to(torch.complex128 if matrices.is_complex() else torch.float64)
    if gram.shape[-2] < gram.shape[-1]:
        gram = gram.mH
    # true value = gram * exp(logarithm); kept apart, so that no power overflows
    logarithm = gram.real.new_zeros(gram.shape[:-2])
    for _ in range(grams):
        size = torch.linalg.matrix_norm(gram)
        gram = gram / size.clamp_min(1e-300)[..., None, None]
        gram = gram.mH @ gram
        logarithm = 2 * (logarithm + size.log())
    largest = _largest_eigenvalue(gram) if grams else torch.linalg.matrix_norm(gram)
    bound: Tensor = ((largest.log() + logarithm) / 2**grams).exp()
    return bound * (1 + ROUNDING)


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """(..., n, n) Hermitian to (...): m + sqrt(1 - 1/n) ||G - m I||_F, m the mean eigenvalue, is at least the largest
    one, and the best that trace and Frobenius norm tell (Wolkowicz & Styan 1980): never above ||G||_F, and exact for a
    multiple of the identity, where ||G||_F is sqrt(n) times too large: for orthogonal layers."""
    n = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    bound: Tensor = mean + math.sqrt(1 - 1 / n) * torch.linalg.matrix_norm(gram - mean[..., None, None] * eye)
    return bound


def conv_upper(kernel: Tensor, sizes: Sequence[int], stride: int = 1, padding: int = 0) -> float:
    """At least the spectral norm of a zero-padded convolution, kernel (O, I, h, w), on features of `sizes` (H, W).

    At stride 1 the padded convolution is part of a circular one on a torus of side at least H + h - 1, which the
    discrete Fourier transform splits into one O x I matrix for each frequency. With a stride, the pixels of each phase
    become channels (space to depth) and the rest is the same. The norm of the reshaped kernel is no bound.
    """
    kernel = _polyphase(kernel.double(), stride, padding)
    if kernel.shape[-2:] == (1, 1):
        # the same matrix at every frequency
        return float(gram_upper(kernel[:, :, 0, 0]))
    torus = [-(-size // stride) + taps - 1 for size, taps in zip(sizes, kernel.shape[-2:], strict=True)]
    frequencies_FOI = torch.fft.rfft2(kernel, s=torus).flatten(2).permute(2, 0, 1)
    return float(gram_upper(frequencies_FOI).max())


def _polyphase(kernel: Tensor, stride: int, padding: int) -> Tensor:
    """The kernel of the same convolution at stride 1 on pixels gathered by phase: (O, I * stride^2, h', w')."""
    if stride == 1:
        return kernel
    before = -padding % stride
    after = [-(before + taps) % stride for taps in kernel.shape[-2:]]
    kernel = F.pad(kernel, (before, after[1], before, after[0]))
    outputs, inputs, height, width = kernel.shape
    split = kernel.reshape(outputs, inputs, height // stride, stride, width // stride, stride)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(outputs, inputs * stride**2, height // stride, width // stride)
