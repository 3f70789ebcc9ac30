"""What a gate can make of its experts within a ball: least margins over reachable weights.

All are functions of numbers at the clean image and of Lipschitz constants; nothing here knows a network. Conventions:
margins (N, E, C) are lower bounds of f_i^y - f_i^k, infinite at k = y; `lipschitz` (E, E) holds constants of z_i - z_j;
`slack` (N,) is added to what a difference of scores may move by: the rounding of the deployed router.
"""

# N samples, E experts, C classes

from __future__ import annotations

import itertools
import math
from typing import Protocol

import torch
from torch import Tensor

from phalanx.bounds import softmax_min

MOST_SETS = 70
"""Sets of selected experts that are looked at one by one; of more, every reachable expert counts alone."""


class Summed(Protocol):
    """What is known of the experts' margins together, beyond the least of each (`Joint`)."""

    def among(self, experts: list[int]) -> Summed:
        """Of some of the experts."""
        ...

    def low(self, low: Tensor, high: Tensor) -> Tensor:
        """(N, C): lower bounds of the weighted sum for scores (N, C, E) between the two."""
        ...


def soft_low(
    margins: Tensor, scores: Tensor, lipschitz: Tensor, radius: Tensor, slack: Tensor, summed: Summed | None = None
) -> Tensor:
    """(N, C): lower bounds of sum_i a_i (f_i^y - f_i^k), a = softmax(scores), over balls of `radius` (N,).

    The scores move by D with |D_i - D_j| <= rho_ij radius. Two boxes contain these D up to a common shift, which the
    softmax does not see: D in [0, R radius], R the largest rho; and, for each r, D_r = 0 and |D_i| <= rho_ri radius.
    The minimum over each is exact (`softmax_min`); the best of them is returned. With `summed`, the sum is bounded over
    that best box as well.
    """
    moves_NEE = lipschitz * radius[:, None, None] + slack[:, None, None]
    moves_NEE = moves_NEE.masked_fill(torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device), 0)
    widest_N1E = moves_NEE.amax((1, 2))[:, None, None].expand(-1, 1, scores.shape[1])
    low = scores[:, None] - torch.cat([torch.zeros_like(widest_N1E), moves_NEE], 1)
    high = scores[:, None] + torch.cat([widest_N1E, moves_NEE], 1)
    found_NRC = softmax_min(_finite(margins).transpose(1, 2)[:, None], low[:, :, None], high[:, :, None])
    best = found_NRC.max(1)
    found_NC = best.values
    if summed is not None:
        box = best.indices[:, :, None].expand(-1, -1, scores.shape[1])
        found_NC = torch.maximum(found_NC, summed.low(low.gather(1, box), high.gather(1, box)))
    return _restored(found_NC, margins)


def topn_low(
    margins: Tensor,
    scores: Tensor,
    lipschitz: Tensor,
    radius: Tensor,
    slack: Tensor,
    n: int,
    temperature: float = 1.0,
    summed: Summed | None = None,
) -> Tensor:
    """(N, C): the same for the `n` best experts, weighted by softmax(scores / temperature) over them: the least
    `soft_low` over the sets that can be selected.

    A set is ruled out where somebody outside it surely beats somebody inside. Ties count as reachable.
    """
    ahead_NEE = surely_ahead(scores, lipschitz, radius, slack)
    experts = scores.shape[1]
    if math.comb(experts, n) > MOST_SETS:
        reachable_NE = ahead_NEE.sum(1) < n
        return margins.masked_fill(~reachable_NE[:, :, None], math.inf).amin(1)
    least_NC = torch.full_like(margins[:, 0], math.inf)
    for chosen in itertools.combinations(range(experts), n):
        inside = list(chosen)
        outside = [expert for expert in range(experts) if expert not in chosen]
        excluded_N = ahead_NEE[:, outside][:, :, inside].flatten(1).any(1)
        low_NC = soft_low(
            margins[:, inside],
            scores[:, inside] / temperature,
            lipschitz[inside][:, inside] / temperature,
            radius,
            slack / temperature,
            None if summed is None else summed.among(inside),
        )
        least_NC = torch.minimum(least_NC, low_NC.masked_fill(excluded_N[:, None], math.inf))
    return least_NC


def surely_ahead(scores: Tensor, lipschitz: Tensor, radius: Tensor, slack: Tensor) -> Tensor:
    """(N, E, E) bool: the first expert scores more than the second everywhere in the ball."""
    gap_NEE = scores[:, :, None] - scores[:, None]
    return gap_NEE > lipschitz * radius[:, None, None] + slack[:, None, None]


def entry_radii(scores: Tensor, lipschitz: Tensor, slack: Tensor) -> Tensor:
    """(N, E): below this radius an expert cannot be the best one; 0 for the one that is.

    max_j (z_j - z_i) / rho_ij: the pairwise rule. It tests rivals one by one, so the true entry may be later.
    """
    gap_NEE = (scores[:, :, None] - scores[:, None] - slack[:, None, None]).clamp_min(0)
    return quotient(gap_NEE, lipschitz).amax(1)


def quotient(margin: Tensor, constant: Tensor) -> Tensor:
    """margin / constant where the margin is positive, infinite where nothing can use it up; 0 where it is not."""
    ratio = torch.where(constant == 0, math.inf, margin / constant)
    return torch.where(margin > 0, ratio, torch.zeros_like(ratio))


def top1_low(margins: Tensor, entries: Tensor, radius: Tensor) -> Tensor:
    """(N, C): the least margin of an expert that can be reached, entries (N, E) as `entry_radii`."""
    return margins.masked_fill((entries > radius[:, None])[:, :, None], math.inf).amin(1)


def _finite(margins: Tensor) -> Tensor:
    return margins.masked_fill(margins == math.inf, 0)


def _restored(found: Tensor, margins: Tensor) -> Tensor:
    return found.masked_fill((margins == math.inf).all(1), math.inf)
