"""HopSkipJump: along the decision boundary to the nearest error, with nothing but labels."""

# L samples still attacked, K points of each

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.attacks.base import Attack
from phalanx.attacks.black_box import LabelSearch
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.rng import SampleRng
from phalanx.threat import per_image

_GRIDS = (None, 1, 2, 4, 8)
"""Cells along each side of the starting images, in turn; None for one a pixel."""
_BLENDING_STEPS = 10
"""Halvings of the line from a starting image to the clean one, before clipping takes over."""
_MOST_HALVINGS = 24
"""Of a distance, or of a step: float32 tells no more points of [0, 1] apart."""


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(Attack):
    """HopSkipJump (Chen, Jordan & Wainwright 2020, Algorithm 2), untargeted, for L2 and Linf.

    From an image that is answered wrongly: a binary search to the boundary, an estimate of the boundary's normal from
    the labels of points around (eq. 9, less their mean as in eq. 16), a step along it (its sign for Linf) halved until
    it still errs, and again, with more points each time. Sees labels alone, of the deployed model. Broken where an
    error is asked for within eps.

    As published an iteration costs `evaluations` * sqrt(iteration) queries; the search ends with its budget. Starting
    images are published as uniform noise, which a network often sends to one class; here every other kind is coarser,
    down to one colour. A sample for which none of `starts` errs keeps its clean image.
    """

    name: Literal["hop_skip_jump"] = "hop_skip_jump"
    objective: str = "margin"
    """Fixed: labels show no objective, and none is reported."""
    queries: int = 10_000
    """Images sent for each sample, over all iterations."""
    evaluations: int = 100
    """Points of the first estimate."""
    starts: int = 100
    """Starting images that are tried at most."""

    def __post_init__(self) -> None:
        self._check_fixed("HopSkipJump", targeted=False, objective="margin", surface="whole")
        super().__post_init__()
        if self.norm == "L1":
            raise ValueError("norm must be L2 or Linf for HopSkipJump, got 'L1'; use Square")
        for field in ("queries", "evaluations", "starts"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")

    @property
    def gradient_steps(self) -> int:
        """Queries: the steps of a search without gradients."""
        return self.queries

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        search = LabelSearch(target, self.threat, self.queries)
        x_adv, found_L = self._start(search, rng)
        stay_L = found_L & (search.left > 0)
        search.keep(stay_L)
        x_adv, rng = x_adv[stay_L], rng[stay_L]
        if self.threat.norm == "Linf":
            x_adv = self._halved(search, x_adv, _BLENDING_STEPS, blend=True)
        before_L = self._distance(search, x_adv)
        x_adv = self._to_boundary(search, x_adv)
        iteration = 0
        while True:
            stay_or_none = search.narrowed()
            if stay_or_none is not None:
                x_adv, before_L, rng = x_adv[stay_or_none], before_L[stay_or_none], rng[stay_or_none]
            if not len(search.rows):
                return search.found
            iteration += 1
            normal = self._normal(search, x_adv, self._reach(x_adv, before_L, iteration), rng, iteration)
            moved, went_L = self._stepped(search, x_adv, normal, iteration)
            before_L = torch.where(went_L, self._distance(search, moved), before_L)
            x_adv = self._to_boundary(search, moved)

    # -- the start -------------------------------------------------------------------------------------------------

    def _start(self, search: LabelSearch, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """(L, ...) an image that errs for each sample, and (L,) whether there is one."""
        x = search.target.x
        x_adv, found_L = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for attempt in range(self.starts):
            open_L = ~found_L & (search.left > 0)
            if not bool(open_L.any()):
                break
            noise = _noise(x, rng, attempt)
            error, _ = search.asked(noise[:, None], open_L[:, None])
            x_adv = torch.where(per_image(error[:, 0], x), noise, x_adv)
            found_L = found_L | error[:, 0]
        return x_adv, found_L

    # -- binary searches -------------------------------------------------------------------------------------------

    def _theta(self, pixels: int) -> float:
        """Precision of the boundary as a share of the way to it: D ** -1.5 in L2, D ** -2 in Linf (App. A)."""
        return 1 / (pixels * math.sqrt(pixels) if self.threat.norm == "L2" else pixels**2)

    def _to_boundary(self, search: LabelSearch, x_adv: Tensor) -> Tensor:
        """The nearest point found that errs, between each clean image and an error (Algorithm 1)."""
        halvings = math.ceil(-math.log2(self._theta(x_adv[0].numel()))) if len(x_adv) else 0
        return self._halved(search, x_adv, min(max(halvings, 1), _MOST_HALVINGS), blend=self.threat.norm == "L2")

    def _halved(self, search: LabelSearch, x_adv: Tensor, halvings: int, *, blend: bool) -> Tensor:
        """So many halvings of the way from the clean image, along the line or by clipping to a smaller and smaller
        cube; (L, ...) the last point that errs."""
        x = search.target.x
        low_L = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        high_L = low_L + 1 if blend else (x_adv - x).flatten(1).abs().amax(1).double()
        best = x_adv
        for _ in range(halvings):
            middle_L = (low_L + high_L) / 2
            share = per_image(middle_L, x).to(x.dtype)
            middle = x + share * (x_adv - x) if blend else torch.minimum(torch.maximum(x_adv, x - share), x + share)
            middle = middle.clamp(0, 1)
            error, sent = search.asked(middle[:, None])
            error_L, sent_L = error[:, 0], sent[:, 0]
            best = torch.where(per_image(error_L, x), middle, best)
            high_L = torch.where(error_L, middle_L, high_L)
            low_L = torch.where(sent_L & ~error_L, middle_L, low_L)
        return best

    # -- a step ----------------------------------------------------------------------------------------------------

    def _distance(self, search: LabelSearch, x_adv: Tensor) -> Tensor:
        return self.threat.distance(x_adv, search.target.x)

    def _reach(self, x_adv: Tensor, before_L: Tensor, iteration: int) -> Tensor:
        """(L,) how far from the boundary the points of an estimate are: 0.1 at first, then as far as the binary search
        may have missed it, times D ** 0.5 in L2 and D in Linf (App. A)."""
        if iteration == 1:
            return torch.full_like(before_L, 0.1)
        pixels = x_adv[0].numel()
        return before_L * self._theta(pixels) * (pixels**0.5 if self.threat.norm == "L2" else pixels)

    def _normal(self, search: LabelSearch, x_adv: Tensor, reach_L: Tensor, rng: SampleRng, iteration: int) -> Tensor:
        """(L, ...) the estimated direction into the errors, of length 1; its sign in Linf."""
        due, reach = int(self.evaluations * math.sqrt(iteration)), per_image(reach_L, x_adv).to(x_adv.dtype)
        total, hits = torch.zeros_like(x_adv), torch.zeros_like(x_adv)
        asked_L, wrong_L = x_adv.new_zeros(len(x_adv)), x_adv.new_zeros(len(x_adv))
        at_once = max(search.at_once // len(x_adv), 1)
        for first in range(0, due, at_once):
            count = min(at_once, due - first)
            moves = [_direction(x_adv, rng, self.threat.norm == "L2", iteration, first + k) for k in range(count)]
            points = torch.stack([(x_adv + reach * move).clamp(0, 1) for move in moves], 1)
            error, sent = search.asked(points)
            # point by point, so that the sum is the same however many are asked together
            for k in range(count):
                move = (points[:, k] - x_adv) / reach * per_image(sent[:, k], x_adv)
                total = total + move
                hits = hits + move * per_image(error[:, k], x_adv)
            asked_L, wrong_L = asked_L + sent.sum(1), wrong_L + error.sum(1)
        share_L = wrong_L / asked_L.clamp_min(1)
        # sum over (phi - mean phi) v, phi = 2 error - 1; where all labels agree, the mean of phi v
        one_sided_L = (share_L == 0) | (share_L == 1)
        normal = 2 * hits - 2 * per_image(share_L, x_adv) * total
        agreed = per_image(2 * share_L - 1, x_adv) * total
        normal = torch.where(per_image(one_sided_L, x_adv), agreed, normal)
        if self.threat.norm == "Linf":
            return normal.sign()
        return normal / per_image(normal.flatten(1).norm(dim=1).clamp_min(1e-12), normal)

    def _stepped(self, search: LabelSearch, x_adv: Tensor, normal: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """(L, ...) the point after a step of distance / sqrt(iteration), halved until it errs; (L,) whether one did."""
        size_L = self._distance(search, x_adv) / math.sqrt(iteration)
        moved, went_L = x_adv, torch.zeros(len(x_adv), dtype=torch.bool, device=x_adv.device)
        for _ in range(_MOST_HALVINGS):
            open_L = ~went_L & (search.left > 0)
            if not bool(open_L.any()):
                break
            new = (x_adv + per_image(size_L, x_adv).to(x_adv.dtype) * normal).clamp(0, 1)
            error, _ = search.asked(new[:, None], open_L[:, None])
            moved = torch.where(per_image(error[:, 0], x_adv), new, moved)
            went_L = went_L | error[:, 0]
            size_L = size_L / 2
        return moved, went_L


def _noise(x: Tensor, rng: SampleRng, attempt: int) -> Tensor:
    """(L, ...) uniform colours on a grid of as many cells as the attempt has."""
    grid = _GRIDS[attempt % len(_GRIDS)]
    if grid is None or x.dim() != 4:
        return rng.uniform("hop.start", x.shape[1:], restart=attempt).to(x.dtype)
    cells = rng.uniform("hop.start", (x.shape[1], grid, grid), restart=attempt).to(x.dtype)
    return F.interpolate(cells, size=x.shape[2:], mode="nearest")


def _direction(x: Tensor, rng: SampleRng, gaussian: bool, iteration: int, number: int) -> Tensor:
    """(L, ...) of L2 length 1, uniform on the sphere or, for Linf, towards a uniform point of the cube."""
    shape = x.shape[1:]
    if gaussian:
        move = rng.normal("hop", shape, restart=iteration, step=number).to(x.dtype)
    else:
        move = rng.uniform("hop", shape, restart=iteration, step=number).to(x.dtype) * 2 - 1
    return move / per_image(move.flatten(1).norm(dim=1).clamp_min(1e-12), move)
