"""Lower bounds of the margins of several models averaged: the dual model for any alpha, and ensembles."""

# P parts, N samples, C classes

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phalanx.bounds import prob_margin_low
from phalanx.certification.moe import Low, Mixture, Seen
from phalanx.certification.networks import Method
from phalanx.routing.dual import Mix


def mixed_low(margins: Sequence[Tensor], weights: Sequence[float], y: Tensor, mix: Mix) -> Tensor:
    """(P, N, C): what each part adds to the margin of sum_i weight_i F_i, from lower bounds (N, C) of the margins of
    the parts' logits, infinite at k = y. Their sum is a lower bound of the whole, for any weights that are at least 0.

    Averaging probabilities, a part of which nothing is known (minus infinity) adds at worst minus its weight, and one
    whose label is certified at least 0. Logits have no worst case.
    """
    if mix == "logits":
        return torch.stack([weight * low for low, weight in zip(margins, weights, strict=True)])
    # nothing is asked of how far y can lead: the other classes' probabilities may vanish
    nothing = torch.full_like(margins[0], -math.inf)
    return torch.stack(
        [weight * prob_margin_low(nothing, -low, y) for low, weight in zip(margins, weights, strict=True)]
    )


@dataclass(frozen=True)
class _CombinedSeen:
    parts: tuple[Seen | None, ...]

    def select(self, index: Tensor) -> _CombinedSeen:
        return _CombinedSeen(tuple(part if part is None else part.select(index) for part in self.parts))


@dataclass(frozen=True, eq=False)
class Combined:
    """sum_i weight_i F_i, of the parts' probabilities or of their logits."""

    parts: tuple[Mixture | None, ...]
    """None for one of which nothing is known but that it answers with probabilities."""
    weights: tuple[float, ...]
    mix: Mix
    names: tuple[str, ...]
    rounding: float
    """Allowance for forming probabilities, which are at most 1, and their average in the deployed precision."""

    @property
    def classes(self) -> int:
        """See `Certifiable`."""
        return next(part.classes for part in self.parts if part is not None)

    @property
    def mixtures(self) -> tuple[Mixture, ...]:
        """See `Certifiable`."""
        return tuple(part for part in self.parts if part is not None)

    def see(self, x: Tensor) -> _CombinedSeen:
        """See `Certifiable`."""
        return _CombinedSeen(tuple(part if part is None else part.see(x) for part in self.parts))

    def low(self, seen: Seen, y: Tensor, radius: Tensor, method: Method) -> Low:
        """See `Certifiable`."""
        assert isinstance(seen, _CombinedSeen)
        known = [
            None if part is None or own is None else part.low(own, y, radius, method).margins
            for part, own in zip(self.parts, seen.parts, strict=True)
        ]
        like = next(low for low in known if low is not None)
        nothing = torch.full_like(like, -math.inf).scatter(1, y[:, None], math.inf)
        found_PNC = mixed_low([nothing if low is None else low for low in known], self.weights, y, self.mix)
        slack = self.rounding if self.mix == "probabilities" else 0.0
        return Low(found_PNC.sum(0) - slack, found_PNC.argmin(0))
