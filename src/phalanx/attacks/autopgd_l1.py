"""How Auto-PGD walks in L1: few pixels at a time, fewer as the best point gets sparser (Croce & Hein 2021)."""

# A samples given to the search, D pixels of one image

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.attacks.autopgd import Pace, Point
from phalanx.threat import ThreatModel, per_image

PHASES = ((3, 0.3), (2, 0.3), (1, 0.4))
"""Times eps, share of the steps: the search comes from larger balls, where a sparse error is easier to find, and is
projected onto the next at each end (sec. 4.3, "multi-eps"). Only the last is the ball."""
FIRST_SHARE = 0.2
"""Of the pixels that the first steps move."""
SPARSER = 1.5
"""A step moves this many times fewer pixels than the best point has changed; a step that stops paying is so many times
shorter."""
STALLED = 0.95
"""The step is shortened where the best point has at least this share of the pixels it had at the last checkpoint."""
SHORTEST = 0.1
"""Of eps, the length of a step at least."""


def phases(steps: int) -> list[tuple[int, int]]:
    """(times eps, steps) of each phase that has steps; they sum to `steps`, and the ball itself gets what is left."""
    wide = [(factor, int(share * steps)) for factor, share in PHASES[:-1]]
    left = steps - sum(count for _, count in wide)
    return [(factor, count) for factor, count in [*wide, (PHASES[-1][0], left)] if count]


def _changed(x_adv: Tensor, x: Tensor) -> Tensor:
    """(A,) how many pixels differ."""
    return (x_adv != x).flatten(1).sum(1).to(x.dtype)


class SparsePace(Pace):
    """Croce & Hein 2021, Algorithm 1: sign steps of L1 length eps along the k largest gradient entries.

    Every 4 % of the steps: k becomes 1 / 1.5 of the pixels that the best point changes; where these have hardly become
    fewer the step is shortened, elsewhere it is eps again and the walk goes on from the best point.
    """

    def __init__(self, threat: ThreatModel, x: Tensor, steps: int, start: Point, *, fresh: bool) -> None:
        """`fresh`: at a random start, whose pixels say nothing about how many to move."""
        self._threat = threat
        self._x = x
        self._period = max(steps * 4 // 100, 1)
        pixels = x[0].numel()
        changed_A = _changed(start.x_adv, x)
        self._changed_A = torch.full_like(changed_A, pixels) if fresh else changed_A
        self._moved_A = torch.full_like(changed_A, FIRST_SHARE * pixels) if fresh else changed_A / SPARSER
        self._size_A = torch.full_like(changed_A, threat.epsilon)

    def _direction(self, gradient: Tensor) -> Tensor:
        size_AD = gradient.abs().flatten(1)
        moved_A1 = self._moved_A.round().clamp(1, size_AD.shape[1]).long()[:, None]
        threshold_A1 = size_AD.sort(dim=1, descending=True).values.gather(1, moved_A1 - 1)
        sign_AD = torch.where(size_AD >= threshold_A1, gradient.flatten(1).sign(), 0)
        return (sign_AD / sign_AD.abs().sum(1, keepdim=True).clamp_min(1)).reshape(gradient.shape)

    def advance(self, here: Point) -> Tensor:
        stride = per_image(self._size_A, self._x) * self._direction(here.gradient)
        return self._threat.project(here.x_adv + stride, self._x)

    def reconsider(self, step: int, rose_A: Tensor, best: Point) -> Tensor | None:
        del rose_A
        if step % self._period:
            return None
        changed_A, epsilon = _changed(best.x_adv, self._x), self._threat.epsilon
        sparser_A = changed_A < STALLED * self._changed_A
        shorter_A = (self._size_A / SPARSER).clamp_min(SHORTEST * epsilon)
        self._size_A = torch.where(sparser_A, torch.full_like(shorter_A, epsilon), shorter_A)
        self._changed_A, self._moved_A = changed_A, changed_A / SPARSER
        return sparser_A

    def keep(self, stay_A: Tensor) -> None:
        self._x = self._x[stay_A]
        self._changed_A, self._moved_A = self._changed_A[stay_A], self._moved_A[stay_A]
        self._size_A = self._size_A[stay_A]
