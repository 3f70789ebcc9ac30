"""What a robust router's scores are linear in: fixed linear maps of the pixels, so that scores stay linear in them."""

# B images, D pixels, F features

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Features = Literal["pixels", "low_pass", "pooled"]

SIDE = 8
"""Waves, or blocks, along each side of a channel."""


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """A linear map of the pixels."""

    matrix: Tensor | None
    """(F, D); None is the identity."""
    pixels: int
    """D."""

    @property
    def count(self) -> int:
        """F."""
        return self.pixels if self.matrix is None else len(self.matrix)

    def of(self, x: Tensor) -> Tensor:
        """(B, D) to (B, F)."""
        return x if self.matrix is None else x @ self.matrix.T

    def to_pixels(self, weights: Tensor) -> Tensor:
        """Weights (E, F) of the features as weights (E, D) of the pixels."""
        return weights if self.matrix is None else weights @ self.matrix


def feature_map(features: Features, shape: Sequence[int]) -> FeatureMap:
    """All "pixels"; "low_pass", the lowest 8 x 8 waves of each channel's cosine transform; "pooled", the means of 8 x 8
    blocks of each channel, scaled to unit length. Smaller images keep as many as they have pixels."""
    channels, height, width = shape
    pixels = channels * height * width
    if features == "pixels":
        return FeatureMap(None, pixels)
    side = _cosines if features == "low_pass" else _blocks
    rows, columns = side(height), side(width)
    plane = torch.einsum("ih,jw->ijhw", rows, columns).flatten(2).flatten(0, 1)
    return FeatureMap(torch.kron(torch.eye(channels), plane), pixels)


def _cosines(length: int) -> Tensor:
    """(SIDE, length) the lowest waves of the orthonormal cosine transform (DCT-II)."""
    frequency, place = torch.arange(min(SIDE, length))[:, None], torch.arange(length) + 0.5
    waves = torch.cos(math.pi * frequency * place / length) * math.sqrt(2 / length)
    waves[0] /= math.sqrt(2)
    return waves


def _blocks(length: int) -> Tensor:
    """(SIDE, length) indicators of nearly equal blocks, of unit length."""
    block = torch.arange(length) * min(SIDE, length) // length
    inside = (block == torch.arange(min(SIDE, length))[:, None]).float()
    return inside / inside.sum(1, keepdim=True).sqrt()
