"""A soft gate over linear functions below its experts: minima of the sum, not sums of minima."""

# N samples, E experts, C classes, D pixels

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phalanx.bounds import Ball, Planes

_MOST_EXPERTS = 8
"""Every vertex of a box of scores is looked at, 2^E of them."""


@dataclass(frozen=True, eq=False)
class Joint:
    """slopes_i . x' + constants_i is at most f_i^y - f_i^k in the ball, for every expert i."""

    slopes: Tensor
    """(N, E, C, D)."""
    constants: Tensor
    """(N, E, C)."""
    ball: Ball

    @classmethod
    def of(cls, planes: Sequence[Planes], ball: Ball) -> Joint | None:
        """None for more experts than boxes are searched for."""
        if len(planes) > _MOST_EXPERTS:
            return None
        return cls(torch.stack([p.slopes for p in planes], 1), torch.stack([p.constants for p in planes], 1), ball)

    def among(self, experts: Sequence[int]) -> Joint:
        """Of some of the experts."""
        chosen = list(experts)
        return Joint(self.slopes[:, chosen], self.constants[:, chosen], self.ball)

    def low(self, low: Tensor, high: Tensor) -> Tensor:
        """(N, C): lower bounds of sum_i softmax(z)_i (f_i^y - f_i^k) for scores low <= z <= high, (N, C, E) each.

        For weights a the sum is at least min over x' of sum_i a_i (slopes_i . x' + constants_i), which is concave in a:
        over the convex hull of what the box's softmaxes are it is least at a vertex. A linear function of a softmax is
        least at a vertex of the box (`softmax_min`), so the hull's vertices are those of the box.
        """
        found = []
        for up in itertools.product((False, True), repeat=low.shape[2]):
            weights_NCE = torch.where(torch.tensor(up, device=low.device), high, low).softmax(2)
            slopes = torch.einsum("nce,necd->ncd", weights_NCE, self.slopes)
            constants = torch.einsum("nce,nec->nc", weights_NCE, self.constants)
            found.append(Planes(slopes, constants).least(self.ball))
        return torch.stack(found).amin(0)
