"""Which experts an attacker can send an image to: the reachable set, in closed form.

A router whose regions are cut out by linear functions of the pixels can be turned to expert j only where each of j's
conditions a . x + c >= 0 can hold somewhere in the ball; the most that a . x can gain there is known exactly
(`phalanx.bounds.largest_increase`). Conditions are tested one by one. So the set is exact for one condition (two
experts) and otherwise errs on the safe side: an expert that is not in it cannot be reached; one that is, perhaps not.
The exact rule for several conditions is a linear program for each image and belongs to certification.
"""

# B images, D pixels, P conditions, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from phalanx.bounds import dual_norm, largest_increase
from phalanx.nn import Normalize
from phalanx.routing.moe import MixtureOfExperts
from phalanx.routing.routers import LinearRouter
from phalanx.threat import ThreatModel

_CHUNK = 2048
"""Images looked at together: memory does not grow with their number."""


@dataclass(frozen=True, eq=False)
class Regions:
    """Regions of [0, 1]^D, one for each expert: expert j answers only where `signs[p, j] * (directions[p] . x +
    offsets[p]) >= 0` for every condition p that it has."""

    directions: Tensor
    """(P, D)."""
    offsets: Tensor
    """(P,)."""
    signs: Tensor
    """(P, E) 1 or -1, or 0 where the expert does not have the condition."""
    rounding: Tensor
    """(P,) how far the deployed router's own arithmetic may be from the condition's exact value."""

    def reached(self, x: Tensor, threat: ThreatModel) -> Tensor:
        """(B, E) bool: the experts that are not ruled out for images x (B, D)."""
        # a bound that is not a number rules nothing out
        if threat.norm == "Linf":
            return ~(self.bound(x, threat) < 0)
        # the dual norm costs nothing and settles most images; only the others need the pixel range
        found_BE = ~(self.bound(x, threat, pixel_range=False) < 0)
        open_ = (found_BE.sum(1) > 1).nonzero()[:, 0]
        found_BE[open_] &= ~(self.bound(x[open_], threat) < 0)
        return found_BE

    def bound(self, x: Tensor, threat: ThreatModel, *, pixel_range: bool = True) -> Tensor:
        """(B, E) U_j(x): an upper bound of what expert j's tightest condition can come to within `threat` of images
        x (B, D), rounding included; without `pixel_range` a looser one. Where it is negative, j cannot be reached."""
        values_BP = x @ self.directions.T + self.offsets
        if pixel_range:
            both = torch.cat([self.directions, -self.directions])
            up_BP, down_BP = largest_increase(both, x, threat).chunk(2, 1)
        else:
            up_BP = down_BP = threat.epsilon * dual_norm(self.directions, threat.norm)
        infinite = torch.full_like(values_BP[:, :, None], float("inf"))
        sides = (up_BP + values_BP, down_BP - values_BP)
        tightest = [
            torch.where(self.signs == sign, (side + self.rounding)[:, :, None], infinite).amin(1)
            for sign, side in zip((1, -1), sides, strict=True)
        ]
        return torch.minimum(*tightest)


@runtime_checkable
class ProvableRouter(Protocol):
    """A router that says which experts are reachable."""

    def reachable(self, x: Tensor, threat: ThreatModel) -> Tensor: ...


def regions_of_scores(weights: Tensor, offsets: Tensor) -> Regions:
    """Of a router that takes the largest score `weights . x + offsets` (E, D), (E,): every pair of experts is one
    condition, that the first of them scores at least as much."""
    experts = len(weights)
    first, second = torch.triu_indices(experts, experts, 1, device=weights.device)
    signs = torch.zeros(len(first), experts, dtype=torch.int8, device=weights.device)
    rows = torch.arange(len(first), device=weights.device)
    signs[rows, first], signs[rows, second] = 1, -1
    error_E = rounding_error(weights, offsets)
    return Regions(
        weights[first] - weights[second], offsets[first] - offsets[second], signs, error_E[first] + error_E[second]
    )


def rounding_error(weights: Tensor, offsets: Tensor) -> Tensor:
    """(P,) a bound on the difference between linear functions (P, D), (P,) of pixels in [0, 1] and what any order of
    summation in the weights' own precision makes of them, here and in the router (Higham 2002, eq. 3.5), both times.
    Infinite for more pixels than the precision bears: 252 in bfloat16, 2,044 in float16."""
    terms, unit = weights.shape[1] + 4, torch.finfo(weights.dtype).eps / 2
    if terms * unit >= 1:
        return torch.full_like(offsets, float("inf"))
    return 4 * terms * unit / (1 - terms * unit) * (weights.abs().sum(1) + offsets.abs())


def in_chunks(regions: Regions, x: Tensor, threat: ThreatModel, answering: Tensor) -> Tensor:
    """(B, E) bool: the experts that `regions` do not rule out for images x (B, ...), and in any case those that the
    router has `answering` (B,) at x itself: no proof is better than that."""
    flat_BD = x.detach().flatten(1).to(regions.directions.dtype)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        parts = [regions.reached(part, threat) for part in torch.split(flat_BD, _CHUNK)]
    found_BE = torch.cat(parts) if parts else flat_BD.new_zeros(0, regions.signs.shape[1], dtype=torch.bool)
    return found_BE.scatter(1, answering[:, None], True)


def reachable(model: object, x: Tensor, threat: ThreatModel) -> Tensor | None:
    """(B, E) bool: the experts that a top-1 mixture may answer with somewhere within `threat` of images x (B, C, H, W)
    in [0, 1]; None where nothing can be proved: another model, several experts at once, or a router that is not linear
    in the pixels. A route with one reachable expert cannot be flipped."""
    if not isinstance(model, MixtureOfExperts) or model.top_k != 1 or model.router is None:
        return None
    if isinstance(model.router, ProvableRouter):
        return model.router.reachable(x, threat)
    if isinstance(model.router, LinearRouter):
        with torch.no_grad():
            answering = model.router(x).argmax(1)
        return in_chunks(_regions_of_linear(model.router), x, threat, answering)
    return None


def _regions_of_linear(router: LinearRouter) -> Regions:
    """Its normalisation becomes part of the weights."""
    normalize, linear = router[0], router[2]
    assert isinstance(normalize, Normalize) and isinstance(linear, nn.Linear)
    weights = linear.weight.detach().reshape(len(linear.weight), len(normalize.mean), -1)
    weights = weights / normalize.std.reshape(1, -1, 1)
    offsets = linear.bias.detach() - (weights * normalize.mean.reshape(1, -1, 1)).sum((1, 2))
    return regions_of_scores(weights.flatten(1), offsets)
