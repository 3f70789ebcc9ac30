"""The theorems of the dual-model paper (Zhang et al., ICML 2025) as printed. UNSOUND: for reproduction alone.

No radius computed here is a certificate, and none may be reported as one; docs/certification.md has counterexamples.
"""

# N samples, E experts

from __future__ import annotations

from torch import Tensor

from phalanx.certification.gates import quotient


def printed_theorem_5_4(
    margins: Tensor, weights: Tensor, router_lipschitz: Tensor, bounds: Tensor, expert_lipschitz: Tensor
) -> Tensor:
    """(N,) the radius of Theorem 5.4 (eq. 8). UNSOUND.

    margin / sum_i (r_i M_i + a_i L_i): only the true class moves in its proof, and its constants are that class's. For
    a top-1 router r is 0 in each cell, and the switch between cells is not seen.

    Args:
        margins: (N,) of the mixture, true class over the best other.
        weights: a(x) (N, E).
        router_lipschitz, bounds, expert_lipschitz: r, M, L (E,).
    """
    return quotient(margins, (router_lipschitz * bounds).sum() + (weights * expert_lipschitz).sum(-1))


def printed_theorem_5_5(
    margins: Tensor, weights: Tensor, router_lipschitz: Tensor, expert_lipschitz: Tensor, alpha: float
) -> Tensor:
    """(N,) the radius of Theorem 5.5 (eq. 9). UNSOUND beyond its unstated hypotheses: both halves' probabilities, dense
    continuous routing, constants of both classes, the open ball.

    (alpha margin + alpha - 1) / (alpha sum_i (2 r_i + a_i (L_i^y + L_i^k))); 0 where that is negative.

    Args:
        margins: (N,) of the robust mixture.
        weights: a(x) (N, E).
        router_lipschitz: r (E,).
        expert_lipschitz: L^y + L^k (E,).
        alpha: the weight of the robust half, in [1/2, 1]. Raises ValueError for another.
    """
    if not 0.5 <= alpha <= 1:
        raise ValueError(f"alpha must be in [1/2, 1] for Theorem 5.5, got {alpha}")
    slope = 2 * router_lipschitz.sum() + (weights * expert_lipschitz).sum(-1)
    return quotient(alpha * margins + alpha - 1, alpha * slope)
