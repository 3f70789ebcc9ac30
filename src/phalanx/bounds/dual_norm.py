"""The most that a linear function can gain within a ball, with or without the pixel range [0, 1].

Notation: p the ball's norm, q its dual (1/p + 1/q = 1), v a direction, d a perturbation.
"""

# B images, D pixels, P directions, E experts

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.threat import Norm, ThreatModel

_DUAL_ORDER: dict[Norm, float] = {"Linf": 1.0, "L2": 2.0, "L1": float("inf")}

_L2_ROUNDS = 12
"""Of the search for the L2 multiplier; it ends after a handful, and every stage is a bound."""


def dual_norm(directions: Tensor, norm: Norm) -> Tensor:
    """(..., D) to (...): max v . d over ||d||_p <= 1, which is ||v||_q."""
    size: Tensor = torch.linalg.vector_norm(directions, ord=_DUAL_ORDER[norm], dim=-1)
    return size


def pairwise_lipschitz(weights: Tensor, norm: Norm) -> Tensor:
    """(E, D) to (E, E): rho_ij = ||w_i - w_j||_q, the Lipschitz constant in `norm` of the difference of two scores that
    are linear in the pixels."""
    return dual_norm(weights[:, None] - weights[None], norm)


def largest_increase(directions: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """(B, P): max v . d over {d: ||d||_p <= eps, x + d in [0, 1]}, directions v (P, D) and images x (B, D) in [0, 1].

    Exact for Linf (each pixel moves alone) and for L1 (a fractional knapsack: the steepest pixels first). For L2 it is
    the value of the dual problem at the multiplier that Newton's method ends at: exact where that has converged, and
    an upper bound anywhere.
    """
    up_BD, down_BD = 1 - x, x
    if threat.norm == "Linf":
        up_BD, down_BD = up_BD.clamp_max(threat.epsilon), down_BD.clamp_max(threat.epsilon)
        return up_BD @ directions.clamp_min(0).T + down_BD @ directions.clamp_max(0).neg().T
    gain = _gain_l1 if threat.norm == "L1" else _gain_l2
    gains = [gain(v.abs(), torch.where(v > 0, up_BD, down_BD), threat.epsilon) for v in directions]
    return torch.stack(gains, 1) if gains else x.new_zeros(len(x), 0)


def _gain_l1(slope_D: Tensor, room_BD: Tensor, radius: float) -> Tensor:
    """(B,) max sum slope * t over 0 <= t <= room, sum t <= radius; slope at least 0."""
    order_D = slope_D.argsort(descending=True)
    slope_D, room_BD = slope_D[order_D], room_BD[:, order_D]
    spent_before_BD = room_BD.cumsum(1) - room_BD
    return torch.minimum(room_BD, (radius - spent_before_BD).clamp_min(0)) @ slope_D


def _gain_l2(slope_D: Tensor, room_BD: Tensor, radius: float) -> Tensor:
    """(B,) max sum slope * t over 0 <= t <= room, ||t||_2 <= radius; slope at least 0.

    The maximiser is t(s) = min(s * slope, room), s the largest with ||t(s)|| <= radius. For every s > 0, by weak
    duality, the maximum is at most sum(slope * t(s)) + (radius^2 - ||t(s)||^2) / (2 s), with equality at that s; and
    at most the gain without the radius.
    """
    everything_B = room_BD @ slope_D
    if not radius or not slope_D.any():
        return torch.zeros_like(everything_B)
    # the maximum's gradient is the maximiser (Danskin), which itself needs none
    with torch.no_grad():
        scale_B1 = _scale_l2(slope_D, room_BD, radius)
        moved_BD = torch.minimum(scale_B1 * slope_D, room_BD)
        slack_B = (radius**2 - moved_BD.square().sum(1)) / (2 * scale_B1[:, 0])
    return torch.minimum(moved_BD @ slope_D + slack_B, everything_B)


def _scale_l2(slope_D: Tensor, room_BD: Tensor, radius: float) -> Tensor:
    """(B, 1) the largest s with ||min(s * slope, room)||_2 <= radius, from below; very large where none exceeds it."""
    squares_D = slope_D.square()
    total = squares_D.sum()
    scale_B1 = radius / total.sqrt() * torch.ones_like(room_BD[:, :1])
    # pixels at the end of their range stay there as s grows, so s only grows towards the solution
    for _ in range(_L2_ROUNDS):
        full_BD = scale_B1 * slope_D >= room_BD
        left_B1 = (radius**2 - (room_BD.square() * full_BD).sum(1, keepdim=True)).clamp_min(0)
        free_B1 = total - full_BD.to(slope_D.dtype) @ squares_D[:, None]
        wanted_B1 = (left_B1 / torch.maximum(free_B1, 1e-12 * total)).sqrt()
        if torch.allclose(wanted_B1, scale_B1, rtol=1e-6, atol=0):
            break
        scale_B1 = torch.maximum(wanted_B1, scale_B1)
    return scale_B1
