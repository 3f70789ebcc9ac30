"""The walk of Auto-PGD for Linf (Croce & Hein 2020, Algorithm 1)."""

# A samples given to the search

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.threat import ThreatModel

MOMENTUM = 0.75
"""alpha: the share of the new step; the rest is the last move repeated."""
IMPROVING = 0.75
"""rho: the step is halved where a smaller share of the steps since the last checkpoint has raised the objective."""


class _Point(NamedTuple):
    """Where each sample is, and what was found there."""

    x_adv: Tensor
    gain: Tensor
    gradient: Tensor

    def where(self, chosen_A: Tensor, other: _Point) -> _Point:
        """`other` for the chosen samples."""
        return _Point(*(torch.where(_like(chosen_A, mine), new, mine) for mine, new in zip(self, other, strict=True)))


def _like(values_A: Tensor, images: Tensor) -> Tensor:
    return values_A.reshape(-1, *([1] * (images.dim() - 1)))


def checkpoints(steps: int) -> list[int]:
    """w_j = ceil(p_j steps), the steps after which the step size is reconsidered: p_1 = .22, and each gap is .03
    shorter than the one before, at least .06 (sec. 3)."""
    # in hundredths: rounding in binary fractions would move a checkpoint
    share, gap, found = 22, 22, []
    while share <= 100:
        found.append(-(-share * steps // 100))
        gap = max(gap - 3, 6)
        share += gap
    return sorted(set(found))


def auto_pgd(target: Target, threat: ThreatModel, steps: int, rounded: Callable[[Tensor], Tensor]) -> Found:
    """One run from the clean images: a first step of 2 eps, halved where it stops paying; the best point of each.

    `rounded` is applied to every gradient. The search watches the objective alone: it returns the point where that was
    largest, an error or not. Costs steps + 1 passes, no random numbers.
    """

    def point(x_adv: Tensor) -> _Point:
        climb = target.climb(x_adv)
        assert climb.gradient is not None
        return _Point(x_adv, climb.gain.nan_to_num(nan=float("-inf")), rounded(climb.gradient).nan_to_num(0, 0, 0))

    start = here = best = point(target.x)
    previous = target.x
    size_A = torch.full_like(start.gain, 2 * threat.epsilon)
    rises_A, halved_A = torch.zeros_like(start.gain), torch.zeros_like(start.gain, dtype=torch.bool)
    best_before_A, last = start.gain, 0
    marks = checkpoints(steps)
    for step in range(1, steps + 1):
        x_adv = threat.project(here.x_adv + _like(size_A, here.x_adv) * here.gradient.sign(), target.x)
        if step > 1:
            inertia = (1 - MOMENTUM) * (here.x_adv - previous)
            x_adv = threat.project(here.x_adv + MOMENTUM * (x_adv - here.x_adv) + inertia, target.x)
        previous, before_A, here = here.x_adv, here.gain, point(x_adv)
        rises_A = rises_A + (here.gain > before_A)
        best = best.where(here.gain > best.gain, here)
        if step in marks:
            stuck_A = (rises_A < IMPROVING * (step - last)) | (~halved_A & (best.gain == best_before_A))
            size_A = torch.where(stuck_A, size_A / 2, size_A)
            here = here.where(stuck_A, best)
            halved_A, best_before_A, last, rises_A = stuck_A, best.gain, step, torch.zeros_like(rises_A)
    spent = torch.full((len(target),), steps + 1, dtype=torch.int64, device=target.x.device)
    return Found(
        x_adv=best.x_adv,
        loss=best.gain,
        queries=spent,
        first_success=torch.full_like(spent, -1),
        restart=torch.zeros_like(spent),
        zero_gradient=(start.gradient == 0).flatten(1).all(1),
    )
