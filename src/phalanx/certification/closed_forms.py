"""Closed-form certificates of soft mixtures (A1 to A3), to compare with: reachable weights (A4, `soft_low`) are better.

Each certifies eps < min over k of m_k / D_k, with m_k the clean margin of class k. Constants are valid on the ball, or
everywhere; in the ball's norm. docs/certification.md has the proofs.
"""

# N samples, E experts, C classes

from __future__ import annotations

from torch import Tensor

from phalanx.certification.gates import quotient


def slope_a1(weight_slopes: Tensor, ranges: Tensor, weights: Tensor, slopes: Tensor) -> Tensor:
    """D_k = sum_i r_i (M_i^y + M_i^k) + a_i L_i^yk.

    Args:
        weight_slopes: r (E,) Lipschitz constants of the experts' weights, idle experts included.
        ranges: M^y + M^k (E, C), bounds of |f_i^y| + |f_i^k| on the ball.
        weights: a(x) (N, E).
        slopes: L^yk (E, C), or (N, E, C), constants of f_i^y - f_i^k.
    """
    return weight_slopes @ ranges + (weights[..., None] * slopes).sum(-2)


def slope_a2(weight_slopes: Tensor, margin_ranges: Tensor, weights: Tensor, slopes: Tensor) -> Tensor:
    """D_k = sum_i r_i G_i^yk + a_i L_i^yk, with G (E, C) a bound of |f_i^y - f_i^k|; 1 for probabilities."""
    return slope_a1(weight_slopes, margin_ranges, weights, slopes)


def slope_a3(variation_slope: float, spreads: Tensor, weights: Tensor, slopes: Tensor) -> Tensor:
    """D_k = theta S_k + sum_i a_i L_i^yk.

    Args:
        variation_slope: theta, the Lipschitz constant of the weights in total variation; R / 4 for a softmax whose
            score differences have constants of at most R.
        spreads: S (C,) bounds of how much the experts' margins differ; 2 for probabilities.
    """
    return variation_slope * spreads + (weights[..., None] * slopes).sum(-2)


def closed_radius(margins: Tensor, slopes: Tensor) -> Tensor:
    """(N,): min over k of m_k / D_k; 0 where a margin (N, C) is not positive; margins are infinite at k = y."""
    return quotient(margins, slopes).amin(-1)
