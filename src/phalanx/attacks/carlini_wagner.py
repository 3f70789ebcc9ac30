"""Carlini & Wagner's attack: Adam on the margin, for the least L2 perturbation or inside the ball."""

# A samples given to the search, L samples still attacked

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from phalanx.attacks.base import Attack
from phalanx.attacks.nearest import Nearest
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found, Tracker
from phalanx.rng import SampleRng
from phalanx.threat import ThreatModel, per_image

_DECAY = 0.9, 0.999
"""Of Adam's two moments (Kingma & Ba 2015)."""
_INSIDE = 0.999
"""Pixels are drawn towards 0.5 by this share: at 0 and 1 the tanh has no inverse, and near them Adam is long on its
way. The authors' code has 0.999999."""
_FIRST_C = 1e-3
"""Of the binary search, as in the authors' code."""
_LARGEST_C = 1e10


@dataclass(frozen=True, kw_only=True)
class CarliniWagner(Attack):
    """Carlini & Wagner 2017, with their f_6 at confidence 0: the margin, up to 0.

    In L2 their attack (sec. VI-A): Adam on w, x' = (tanh w + 1) / 2, lowers |x' - x|^2 + c f(x'), with a binary search
    for c; an error within eps is a success. Without their early stop, which depends on the batch. Their Linf attack
    lowers a penalty on the pixels above a limit that falls step by step, to find the least radius; here the radius is
    given. So in Linf Adam climbs the margin inside the ball instead, projected after each step: the variant that is
    usual under the name CW-Linf. For L1 they have no attack, and Adam, which makes all pixels move alike, no use.
    """

    name: Literal["carlini_wagner"] = "carlini_wagner"
    objective: str = "margin"
    """Fixed."""
    steps: int = 100
    """Adam steps for each c, or of each walk."""
    searches: int | None = None
    """In L2 values of c; in Linf walks, the first from the clean image, the others from random points of the ball, each
    on what still stands. By default 9 in L2, 1 in Linf."""
    learning_rate: float | None = None
    """Of Adam: by default in L2 the published 0.01, for w, or 3 / `steps` where that is more (a pixel at an end of its
    range begins 3.8 from its middle); in Linf eps / 10, in pixel units."""

    def __post_init__(self) -> None:
        self._check_fixed("CarliniWagner", targeted=False, objective="margin")
        super().__post_init__()
        if self.norm == "L1":
            raise ValueError("norm must be L2 or Linf for CarliniWagner, got 'L1'; use APGD")
        for field in ("steps", "searches"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    @property
    def _searches(self) -> int:
        return self.searches or (9 if self.norm == "L2" else 1)

    @property
    def gradient_steps(self) -> int:
        return self.steps * self._searches

    def within(self, threat: ThreatModel) -> Self:
        """Also with the number of searches that the norm asks for."""
        fitted = super().within(threat)
        return replace(fitted, searches=fitted._searches)

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        return self._least(target) if self.threat.norm == "L2" else self._inside(target, rng)

    # -- the least perturbation ------------------------------------------------------------------------------------

    def _least(self, target: Target) -> Found:
        nearest, weight = Nearest(target, self.threat), _Weight.first(target.x)
        for search in range(self._searches):
            erred_L, stay_L = self._descend(nearest, target[nearest.rows], weight.c, search)
            if not len(nearest.rows):
                break
            weight = weight.kept(stay_L).next(erred_L)
        return nearest.found

    def _descend(self, nearest: Nearest, aim: Target, c_L: Tensor, search: int) -> tuple[Tensor, Tensor]:
        """One value of c for each sample. Of those left (L,): whether an error was seen; and the mask of the left."""
        w = torch.atanh((2 * aim.x - 1) * _INSIDE)
        adam, erred_L = _Adam.zero(w), torch.zeros(len(w), dtype=torch.bool, device=w.device)
        at = torch.arange(len(w), device=w.device)
        given = len(w)
        for step in range(self.steps + 1):
            x_adv = (w.tanh() + 1) / 2
            climb = aim.climb(x_adv) if step < self.steps else aim.look(x_adv)
            if climb.gradient is not None:
                nearest.count_gradient(climb.gradient, first=search == 0 and step == 0)
            else:
                nearest.found.queries[nearest.rows] += 1
            done = search * self.steps + step
            _, error_L, stay_L = nearest.observe(x_adv, aim, steps=done, attempt=search, look=climb)
            erred_L = erred_L | error_L
            if climb.gradient is not None:
                slope = torch.where(per_image(climb.gain < 0, w), climb.gradient.nan_to_num(0, 0, 0), 0)
                # lowered: |x' - x|^2 - c min(margin, 0), through the tanh
                downhill = (2 * (x_adv - aim.x) - per_image(c_L, w) * slope) * (1 - w.tanh() ** 2) / 2
                adam, move = adam.step(downhill)
                w = w - (self.learning_rate or max(0.01, 3 / self.steps)) * move
            if stay_L is not None:
                aim, w, adam, c_L = aim[stay_L], w[stay_L], adam.kept(stay_L), c_L[stay_L]
                erred_L, at = erred_L[stay_L], at[stay_L]
                if not len(aim):
                    break
        return erred_L, torch.zeros(given, dtype=torch.bool, device=w.device).index_fill(0, at, True)

    # -- inside the ball -------------------------------------------------------------------------------------------

    def _inside(self, target: Target, rng: SampleRng) -> Found:
        tracker = Tracker(target, keep="best", early_drop=target.judged)
        for walk in range(self._searches):
            if len(tracker.rows):
                self._walk(tracker, rng[tracker.rows], walk)
        return tracker.found

    def _walk(self, tracker: Tracker, rng: SampleRng, walk: int) -> None:
        threat, aim = self.threat, tracker.alive()
        rate = threat.epsilon / 10 if self.learning_rate is None else self.learning_rate
        x_adv = threat.random_start(aim.x, rng, restart=walk) if walk else aim.x
        adam = _Adam.zero(x_adv)
        for step in range(self.steps + 1):
            final = step == self.steps
            climb = aim.look(x_adv) if final else aim.climb(x_adv)
            before = walk * self.steps
            stay_L = tracker.observe(x_adv, climb, aim, restart=walk, step=step, steps_before=before, final=final)
            if climb.gradient is not None:
                adam, move = adam.step(climb.gradient.nan_to_num(0, 0, 0))
                x_adv = threat.project(x_adv + rate * move, aim.x)
            if stay_L is not None:
                aim, x_adv, adam = aim[stay_L], x_adv[stay_L], adam.kept(stay_L)
                if not len(aim):
                    return


class _Adam(NamedTuple):
    """Its state for samples (L, ...), all after the same number of steps."""

    mean: Tensor
    square: Tensor
    steps: int

    @staticmethod
    def zero(like: Tensor) -> _Adam:
        return _Adam(torch.zeros_like(like), torch.zeros_like(like), 0)

    def step(self, gradient: Tensor) -> tuple[_Adam, Tensor]:
        """The state after a gradient, and the move it asks for at learning rate 1."""
        (first, second), steps = _DECAY, self.steps + 1
        mean = first * self.mean + (1 - first) * gradient
        square = second * self.square + (1 - second) * gradient**2
        move = mean / (1 - first**steps) / ((square / (1 - second**steps)).sqrt() + 1e-8)
        return _Adam(mean, square, steps), move

    def kept(self, stay_L: Tensor) -> _Adam:
        return _Adam(self.mean[stay_L], self.square[stay_L], self.steps)


class _Weight(NamedTuple):
    """The binary search for c, sample by sample (L,)."""

    c: Tensor
    low: Tensor
    """The largest that was too small."""
    high: Tensor
    """The smallest that led to an error; infinite if none has."""

    @staticmethod
    def first(x: Tensor) -> _Weight:
        zero_L = x.new_zeros(len(x))
        return _Weight(zero_L + _FIRST_C, zero_L, zero_L + float("inf"))

    def kept(self, stay_L: Tensor) -> _Weight:
        return _Weight(*(field[stay_L] for field in self))

    def next(self, erred_L: Tensor) -> _Weight:
        high = torch.where(erred_L, torch.minimum(self.high, self.c), self.high)
        low = torch.where(erred_L, self.low, torch.maximum(self.low, self.c))
        c = torch.where(high.isfinite(), (low + high) / 2, 10 * self.c)
        return _Weight(c.clamp_max(_LARGEST_C), low, high)
