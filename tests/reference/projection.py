"""Nearest points by bisection in float64, one image at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_in_l1_ball(delta: Tensor, low: Tensor, high: Tensor, radius: float) -> Tensor:
    """The point nearest to `delta` (D,) with L1 norm at most `radius` and low <= point <= high, where low <= 0 <= high.

    Its Lagrangian is separable: for a multiplier t, each coordinate is soft-thresholded by t and clipped to its range;
    the norm falls as t grows, so bisection finds the smallest t that fits.
    """
    delta, low, high = delta.double(), low.double(), high.double()

    def at(shift: float) -> Tensor:
        shrunk = delta.sign() * (delta.abs() - shift).clamp_min(0)
        return torch.minimum(torch.maximum(shrunk, low), high)

    if float(at(0.0).abs().sum()) <= radius:
        return at(0.0)
    below, above = 0.0, float(delta.abs().max())
    for _ in range(200):
        middle = (below + above) / 2
        if float(at(middle).abs().sum()) > radius:
            below = middle
        else:
            above = middle
    return at(above)
