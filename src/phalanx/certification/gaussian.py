"""Radii of functions that are averaged over Gaussian noise."""

from __future__ import annotations

from statistics import NormalDist

_NORMAL = NormalDist()
_HALVINGS = 60
_ROUNDED_DOWN = 1 - 1e-12
"""The open ball that is proved holds this closed one."""


def smoothed_radius(low: float, high: float, sigma: float, lead: float = 0.0) -> float:
    """The radius in L2 within which h_y - h_k stays above `lead`, from h_y >= low and h_k <= high at the image.

    h_c is the average over N(0, sigma^2 I) of any function into [0, 1], so Phi^-1(h_c) is 1/sigma-Lipschitz (Salman et
    al. 2019, lemma 2), and h_y - h_k >= Phi(Phi^-1(low) - r/sigma) - Phi(Phi^-1(high) + r/sigma) at distance r. With
    lead 0 this is sigma/2 (Phi^-1(low) - Phi^-1(high)) (Cohen et al. 2019, theorem 1). 0 unless low - high > lead.

    Args:
        low, high: in (0, 1).
        lead: at least 0.
    """
    if not low - high > lead:
        return 0.0
    ahead, behind = _NORMAL.inv_cdf(low), _NORMAL.inv_cdf(high)
    least, most = 0.0, (ahead - behind) / 2
    if not lead:
        return sigma * most * _ROUNDED_DOWN
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        if _NORMAL.cdf(ahead - middle) - _NORMAL.cdf(behind + middle) > lead:
            least = middle
        else:
            most = middle
    return sigma * least * _ROUNDED_DOWN
