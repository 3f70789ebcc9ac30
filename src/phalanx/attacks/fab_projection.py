"""The least move onto a hyperplane inside the box [0, 1]: what every step of FAB solves, without sorting the pixels."""

# A samples, D pixels of one image

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.threat import Norm

_FLAT = 1e-12
"""Pixels whose slope is smaller than this, relative to the largest of the image, do not move."""
_HALVINGS = 32
"""In L1: the threshold lies between `_FLAT` and 1, and so many halvings of its logarithm find it to 1e-8."""


def onto_hyperplane(x_AD: Tensor, slope_AD: Tensor, value_A: Tensor, norm: Norm) -> Tensor:
    """(A, D) the move d of least `norm` with value + <slope, d> = 0 and 0 <= x + d <= 1 (Croce & Hein 2020b, sec. 2).

    Where the box does not reach the hyperplane, the move to its point nearest to it: every pixel that has a slope goes
    to an end of its range. Without any slope nothing moves.

    Args:
        x_AD: points of the box.
        slope_AD: finite.
        value_A: of the linear function at `x_AD`, finite.
    """
    # towards the hyperplane, in units of the steepest pixel, so that no product underflows
    steepest_A1 = slope_AD.abs().amax(1, keepdim=True).clamp_min(torch.finfo(slope_AD.dtype).tiny)
    downhill_AD = -slope_AD * value_A.sign()[:, None]
    steep_AD = slope_AD.abs() / steepest_A1
    needed_A1 = value_A.abs()[:, None] / steepest_A1
    room_AD = torch.where(downhill_AD > 0, 1 - x_AD, x_AD).masked_fill(steep_AD < _FLAT, 0)
    if norm == "Linf":
        size_AD = room_AD.minimum(_level(steep_AD, room_AD, needed_A1))
    elif norm == "L2":
        cap_AD = room_AD / steep_AD.clamp_min(_FLAT)
        size_AD = steep_AD * cap_AD.minimum(_level(steep_AD.square(), cap_AD, needed_A1))
        size_AD = size_AD.minimum(room_AD)
    else:
        size_AD = room_AD * _steepest_first(steep_AD, steep_AD * room_AD, needed_A1)
    return downhill_AD.sign() * size_AD


def _level(weight_AD: Tensor, cap_AD: Tensor, needed_A1: Tensor) -> Tensor:
    """(A, 1) the level t with sum_i weight_i min(t, cap_i) = needed; infinite where the caps are too low for it.

    The sum is concave and piecewise linear in t: Newton's method from 0 never overshoots, and ends at the exact root as
    soon as a pass fills no further pixel, after three to five passes on images.
    """
    mass_AD = weight_AD * cap_AD
    full_AD = cap_AD <= 0
    level_A1 = torch.zeros_like(needed_A1)
    while True:
        left_A1 = needed_A1 - torch.where(full_AD, mass_AD, 0).sum(1, keepdim=True)
        rate_A1 = torch.where(full_AD, 0, weight_AD).sum(1, keepdim=True)
        # a maximum: what is full stays full whatever the rounding, so that the loop ends
        level_A1 = level_A1.maximum(torch.where(rate_A1 > 0, left_A1 / rate_A1, float("inf")))
        now_AD = cap_AD <= level_A1
        if torch.equal(now_AD, full_AD):
            return level_A1
        full_AD = now_AD


def _steepest_first(steep_AD: Tensor, mass_AD: Tensor, needed_A1: Tensor) -> Tensor:
    """(A, D) the share of its room that each pixel moves in L1: the steepest move all the way, until `needed` is met.

    Bisection finds the slope where that is. The pixels left between its two ends have the same slope up to rounding,
    and share what is left.
    """
    low_A1, high_A1 = torch.full_like(needed_A1, _FLAT), torch.ones_like(needed_A1)
    for _ in range(_HALVINGS):
        middle_A1 = (low_A1 * high_A1).sqrt()
        enough_A1 = torch.where(steep_AD > middle_A1, mass_AD, 0).sum(1, keepdim=True) >= needed_A1
        low_A1, high_A1 = torch.where(enough_A1, middle_A1, low_A1), torch.where(enough_A1, high_A1, middle_A1)
    first_AD = steep_AD > high_A1
    last_AD = (steep_AD > low_A1) & ~first_AD
    left_A1 = needed_A1 - torch.where(first_AD, mass_AD, 0).sum(1, keepdim=True)
    share_A1 = left_A1 / torch.where(last_AD, mass_AD, 0).sum(1, keepdim=True)
    share_A1 = torch.where(left_A1 > 0, share_A1, 0).clamp(0, 1)
    return torch.where(first_AD, 1, torch.where(last_AD, share_A1, 0))
