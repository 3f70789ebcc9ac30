"""Closed-form certificates, to compare with: what the library certifies is never less.

Those of soft mixtures (A1 to A3) certify eps < min over k of m_k / D_k, with m_k the clean margin of class k. Constants
are valid on the ball, or everywhere; in the ball's norm. docs/certification.md has the proofs.
"""

# N samples, E experts, C classes

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from phalanx.certification.gates import quotient

_NORMAL = NormalDist()


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


def top1_radius(margins: Tensor, constants: Tensor, entries: Tensor) -> Tensor:
    """(N,): the certified radius of a top-1 mixture of Lipschitz experts, min_i max(enter_i, break_i).

    An expert is a threat only once it can be reached and may be wrong: break_i = min_k margin / constant, from margins
    at the clean image and constants (N, E, C) of f_i^y - f_i^k. Certified is the open ball.
    """
    return torch.maximum(entries, quotient(margins, constants).amin(2)).amin(1)


def mixed_radius_closed(low: float, high: float, sigma: float, lead: float) -> float:
    """Bai et al. 2024 in closed form: sigma/2 (Phi^-1(low / (1 + lead)) - Phi^-1((high + lead) / (1 + lead))). Sound:
    never above `smoothed_radius`, which knows that h_k comes from a function into [0, 1], where this one uses only that
    (h_k + lead) / (1 + lead) does."""
    if not low - high > lead:
        return 0.0
    ahead, behind = low / (1 + lead), (high + lead) / (1 + lead)
    return sigma / 2 * (_NORMAL.inv_cdf(ahead) - _NORMAL.inv_cdf(behind)) * (1 - 1e-12)
