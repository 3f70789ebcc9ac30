"""Projected gradient ascent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from phalanx.attacks.base import Attack
from phalanx.attacks.target import Climb, Target
from phalanx.attacks.tracker import Found, Keep, Tracker
from phalanx.rng import SampleRng
from phalanx.threat import parse_epsilon


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent (Madry et al. 2018, eq. 2.1): steepest ascent in the threat's norm.

    The step direction is the sign of the gradient for Linf, the normalised gradient for L2 and the sign on the few
    largest entries for L1 (Tramer & Boneh 2019).
    """

    name: Literal["pgd"] = "pgd"
    steps: int = 10
    """Gradient steps per restart."""
    step_size: float | str | None = None
    """Length of a step in pixel units; by default eps / 4 (2/255 at 8/255)."""
    restarts: int = 1
    """Independent random starts; with `early_drop` only the samples still standing are restarted."""
    random_start: bool = True
    """Start uniformly in the ball instead of at the clean image."""
    gaussian_start: float | None = None
    """Start at x + this * N(0, 1) instead, in pixel units: 0.001 in the code of TRADES and AdvMoE. As there it is not
    clipped before the first step, except under `run`, whose verdicts are about points of the ball."""
    keep: Keep | None = None
    """Return the "best" iterate (an error before all others, then the largest objective) or the "last" one, which is of
    the last restart; by default the best under `run` and of several restarts, else the last, as in training."""
    early_drop: bool | None = None
    """Stop attacking a sample at its first error; by default under `run` only, which confirms it on the real model."""
    eot: int = 1
    """Passes that objective, gradient and logits are averaged over at every point, for a model with random answers
    (expectation over transformation, Athalye et al. 2018, sec. 4.2); an error is then one of the mean logits. The
    cost grows in proportion, and a deterministic model gets the same result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.restarts < 1:
            raise ValueError(f"restarts must be at least 1, got {self.restarts}")
        if self.eot < 1:
            raise ValueError(f"eot must be at least 1, got {self.eot}")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts must be 1 without random_start, got {self.restarts}: all would be the same")
        if self.gaussian_start is not None:
            self._check_gaussian(self.gaussian_start)
        if self.step_size is not None:
            self._check_step(self.step_size)

    def _check_step(self, step_size: float | str) -> None:
        try:
            positive = parse_epsilon(step_size) > 0
        except ValueError:
            positive = False
        if not positive:
            raise ValueError(f"step_size must be a positive number or a fraction such as '2/255', got {step_size!r}")

    def _check_gaussian(self, deviation: float) -> None:
        if not 0 < deviation < math.inf:
            raise ValueError(f"gaussian_start must be positive and finite, got {deviation}; leave it out for none")
        if not self.random_start:
            raise ValueError(f"gaussian_start is {deviation}, but random_start is false; leave one of them out")

    @property
    def gradient_steps(self) -> int:
        return self.steps * self.restarts

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        tracker = Tracker(
            target,
            keep=self.keep or ("best" if target.judged or self.restarts > 1 else "last"),
            early_drop=target.judged if self.early_drop is None else self.early_drop,
        )
        for restart in range(self.restarts):
            if len(tracker.rows):
                self._walk(tracker, rng[tracker.rows], restart)
        return tracker.found

    def _walk(self, tracker: Tracker, rng: SampleRng, restart: int) -> None:
        threat = self.threat
        step_size = threat.epsilon / 4 if self.step_size is None else float(parse_epsilon(self.step_size))
        alive, before = tracker.alive(), restart * self.steps
        x_adv = self._start(alive, rng, restart)
        for step in range(self.steps):
            climb = self._averaged(alive.climb, x_adv, tracker)
            gradient = climb.gradient
            assert gradient is not None
            stay = tracker.observe(x_adv, climb, alive, restart=restart, step=step, steps_before=before)
            if stay is not None:
                alive, x_adv, gradient = alive[stay], x_adv[stay], gradient[stay]
                if not len(alive):
                    return
            x_adv = threat.step(x_adv, gradient, step_size, alive.x)
        if tracker.watching:
            end = self._averaged(alive.look, x_adv, tracker)
            tracker.observe(x_adv, end, alive, restart=restart, step=self.steps, steps_before=before, final=True)
        else:
            tracker.take_last(x_adv, restart=restart)

    def _start(self, target: Target, rng: SampleRng, restart: int) -> Tensor:
        x = target.x
        if self.gaussian_start is not None:
            noise = rng.normal("start.gaussian", x.shape[1:], restart=restart).to(x.dtype)
            start = x + self.gaussian_start * noise
            return self.threat.project(start, x) if target.judged else start
        return self.threat.random_start(x, rng, restart=restart) if self.random_start else x

    def _averaged(self, evaluate: Callable[[Tensor], Climb], x_adv: Tensor, tracker: Tracker) -> Climb:
        if self.eot > 1:
            # the tracker counts one pass itself
            tracker.found.queries[tracker.rows] += self.eot - 1
        return averaged(evaluate, x_adv, self.eot)


def averaged(evaluate: Callable[[Tensor], Climb], x_adv: Tensor, passes: int) -> Climb:
    """The mean of so many evaluations at `x_adv` (A, ...)."""
    mean = evaluate(x_adv)
    for count in range(2, passes + 1):
        mean = _moved(mean, evaluate(x_adv), 1 / count)
    return mean


def _moved(mean: Climb, new: Climb, weight: float) -> Climb:
    """A running mean: of equal passes it is exactly each of them, so that a deterministic model's walk is the same."""
    gradient = mean.gradient
    if gradient is not None and new.gradient is not None:
        gradient = gradient.lerp(new.gradient, weight)
    return Climb(mean.gain.lerp(new.gain, weight), gradient, mean.logits.lerp(new.logits, weight))
