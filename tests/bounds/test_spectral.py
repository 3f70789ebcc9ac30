"""Spectral norms are bounded from above, whatever the matrix or convolution, and hardly more than they are."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.bounds import conv_upper, gram_upper


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (7, 7), (12, 30), (30, 12)])
def test_grams_bound_the_norm_and_fall_towards_it(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    bounds = [float(gram_upper(matrix, grams)) for grams in range(10)]
    assert all(bound >= exact for bound in bounds)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(bounds))
    assert bounds[8] == pytest.approx(exact, rel=1e-2)


def test_zero_tiny_huge_and_complex_matrices() -> None:
    assert float(gram_upper(torch.zeros(3, 4))) == 0
    for size in (1e-120, 1e120):
        assert float(gram_upper(size * torch.eye(3, dtype=torch.float64))) == pytest.approx(size, rel=1e-2)
    complex_ = torch.randn(4, 3, 5, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    assert bool((gram_upper(complex_) >= torch.linalg.matrix_norm(complex_, 2)).all())


def _as_matrix(kernel: Tensor, size: int, stride: int, padding: int) -> Tensor:
    inputs = kernel.shape[1] * size * size
    basis = torch.eye(inputs, dtype=torch.float64).reshape(inputs, kernel.shape[1], size, size)
    return F.conv2d(basis, kernel, stride=stride, padding=padding).flatten(1).T


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("taps", [1, 3, 4, 5])
def test_a_convolution_is_bounded_by_little_more_than_its_norm(taps: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(taps)
    kernel = torch.randn(4, 3, taps, taps, dtype=torch.float64, generator=generator)
    for padding, size in itertools.product(sorted({0, taps // 2, taps - 1}), (6, 9)):
        exact = float(torch.linalg.matrix_norm(_as_matrix(kernel, size, stride, padding), 2))
        bound = conv_upper(kernel, (size, size), stride, padding)
        assert exact <= bound, (padding, size)
        # few pixels see the whole of a large kernel
        assert bound <= 1.6 * exact, (padding, size)


def test_the_reshaped_kernel_is_no_bound() -> None:
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    reshaped = float(torch.linalg.matrix_norm(kernel.flatten(1), 2))
    assert (
        reshaped < float(torch.linalg.matrix_norm(_as_matrix(kernel, 8, 1, 1), 2)) <= conv_upper(kernel, (8, 8), 1, 1)
    )
