"""The walk of Auto-PGD: ascent whose step length follows from how the search fares (Croce & Hein 2020, Algorithm 1)."""

# A samples given to the search

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from phalanx.attacks.target import Climb, Target
from phalanx.threat import ThreatModel, per_image, unit_l2

MOMENTUM = 0.75
"""alpha: the share of the new step; the rest is the last move repeated."""
IMPROVING = 0.75
"""rho: the step is halved where a smaller share of the steps since the last checkpoint has raised the objective."""


class Point(NamedTuple):
    """Where each sample is, and what was found there."""

    x_adv: Tensor
    gain: Tensor
    """(A,) -inf where the objective is not a finite number."""
    gradient: Tensor
    """(A, ...) 0 where it is not finite."""

    def where(self, chosen_A: Tensor, other: Point) -> Point:
        """`other` for the chosen samples."""
        return Point(
            *(torch.where(per_image(chosen_A, mine), new, mine) for mine, new in zip(self, other, strict=True))
        )

    def kept(self, stay_A: Tensor) -> Point:
        return Point(*(field[stay_A] for field in self))


class Pace(ABC):
    """Direction and length of every sample's next step, with what they depend on."""

    @abstractmethod
    def advance(self, here: Point) -> Tensor:
        """(A, ...) the next iterate, inside the ball."""

    @abstractmethod
    def reconsider(self, step: int, rose_A: Tensor, best: Point) -> Tensor | None:
        """The samples (A,) to send back to their best point, None for nobody; `rose_A` are those whose gain the step
        has raised."""

    @abstractmethod
    def keep(self, stay_A: Tensor) -> None:
        """Forgets all other samples."""


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


class MomentumPace(Pace):
    """Algorithm 1, for Linf and L2: a first step of 2 eps, halved where it stops paying, and inertia."""

    def __init__(self, threat: ThreatModel, x: Tensor, steps: int, start: Point) -> None:
        """`x` (A, ...) are the clean images."""
        self._threat = threat
        self._x = x
        self._previous: Tensor | None = None
        self._marks = checkpoints(steps)
        self._last_mark = 0
        self._size_A = torch.full_like(start.gain, 2 * threat.epsilon)
        self._rises_A = torch.zeros_like(start.gain)
        self._halved_A = torch.zeros_like(start.gain, dtype=torch.bool)
        self._best_at_mark_A = start.gain

    def _direction(self, gradient: Tensor) -> Tensor:
        if self._threat.norm == "Linf":
            return gradient.sign()
        return unit_l2(gradient)

    def advance(self, here: Point) -> Tensor:
        stride = per_image(self._size_A, self._x) * self._direction(here.gradient)
        x_adv = self._threat.project(here.x_adv + stride, self._x)
        if self._previous is not None:
            inertia = (1 - MOMENTUM) * (here.x_adv - self._previous)
            x_adv = self._threat.project(here.x_adv + MOMENTUM * (x_adv - here.x_adv) + inertia, self._x)
        self._previous = here.x_adv
        return x_adv

    def reconsider(self, step: int, rose_A: Tensor, best: Point) -> Tensor | None:
        self._rises_A = self._rises_A + rose_A
        if step not in self._marks:
            return None
        few_A = self._rises_A < IMPROVING * (step - self._last_mark)
        stuck_A = few_A | (~self._halved_A & (best.gain == self._best_at_mark_A))
        self._size_A = torch.where(stuck_A, self._size_A / 2, self._size_A)
        self._halved_A, self._best_at_mark_A, self._last_mark = stuck_A, best.gain, step
        self._rises_A = torch.zeros_like(self._rises_A)
        return stuck_A

    def keep(self, stay_A: Tensor) -> None:
        self._x = self._x[stay_A]
        self._size_A, self._rises_A = self._size_A[stay_A], self._rises_A[stay_A]
        self._halved_A, self._best_at_mark_A = self._halved_A[stay_A], self._best_at_mark_A[stay_A]
        if self._previous is not None:
            self._previous = self._previous[stay_A]


Evaluate: TypeAlias = Callable[[Target, Tensor, bool], Climb]
"""(target, iterate, is it the last) -> what is found there; the last needs no gradient."""
Observe: TypeAlias = Callable[[Target, Tensor, Climb, int], Tensor | None]
"""(target, iterate, what was found there, step) -> the samples to go on with, None for all."""
MakePace: TypeAlias = Callable[[Point], Pace]


def walk(target: Target, start: Tensor, steps: int, pace_from: MakePace, evaluate: Evaluate, observe: Observe) -> Point:
    """`steps` steps from `start`; of the samples that `observe` left, the point of the largest gain.

    Costs steps + 1 evaluations of each sample that stays. A gain that is not a finite number never wins, a gradient
    entry that is not moves nothing.
    """
    x_adv, climb = start, evaluate(target, start, False)
    here = best = _point(x_adv, climb)
    pace, before_A = pace_from(here), here.gain
    for step in range(steps + 1):
        if step > 0:
            x_adv, before_A = pace.advance(here), here.gain
            climb = evaluate(target, x_adv, step == steps)
            here = _point(x_adv, climb)
        stay_A = observe(target, x_adv, climb._replace(gain=here.gain), step)
        if stay_A is not None:
            target, here, best, before_A = target[stay_A], here.kept(stay_A), best.kept(stay_A), before_A[stay_A]
            pace.keep(stay_A)
            if not len(target):
                break
        best = best.where(here.gain > best.gain, here)
        back_A = pace.reconsider(step, here.gain > before_A, best) if step > 0 else None
        if back_A is not None:
            here = here.where(back_A, best)
    return best


def _point(x_adv: Tensor, climb: Climb) -> Point:
    gradient = torch.zeros_like(x_adv) if climb.gradient is None else climb.gradient.nan_to_num(0, 0, 0)
    return Point(x_adv, torch.where(climb.gain.isfinite(), climb.gain, float("-inf")), gradient)
