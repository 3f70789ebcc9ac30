"""The attacks of the code released with the dual-model paper and with AdvMoE, defects included: for their numbers, not
for a verdict.

Their results are still judged on the real model in fp32, inside the ball.
"""

# A samples given to the search

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from phalanx.attacks.autopgd import MomentumPace, walk
from phalanx.attacks.base import Attack
from phalanx.attacks.target import Climb, Target
from phalanx.attacks.tracker import Found, Tracker
from phalanx.rng import SampleRng
from phalanx.threat import ThreatModel

MEAN_PIXEL = 0.4734
"""Of CIFAR-10, over channels. The released code subtracts each channel's own: that moves the point of the first
gradient, never where the first step ends."""


def _in_half(gradient: Tensor) -> Tensor:
    return gradient.half().to(gradient.dtype)


@dataclass(frozen=True, kw_only=True)
class _Released(Attack):
    """What they share: Linf, one run, a loss that the caller does not choose."""

    reproduction: ClassVar[bool] = True
    name: str
    steps: int

    def __post_init__(self) -> None:
        self._check_fixed("a released attack", objective="cross_entropy", targeted=False)
        super().__post_init__()
        if self.norm not in (None, "Linf"):
            raise ValueError(f"norm of a released attack must be Linf, got {self.norm}; use pgd")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    @property
    def gradient_steps(self) -> int:
        return self.steps

    def _walk(self, target: Target, start: Tensor, rounded: Callable[[Tensor], Tensor]) -> Found:
        """Sign ascent from `start` in steps of eps / 4; the last iterate."""
        tracker = Tracker(target, keep="last", early_drop=False)
        x_adv = start
        for step in range(self.steps):
            climb = target.climb(x_adv)
            assert climb.gradient is not None
            gradient = rounded(climb.gradient)
            tracker.observe(x_adv, climb._replace(gradient=gradient), target, restart=0, step=step)
            x_adv = self.threat.step(x_adv, gradient, self.threat.epsilon / 4, target.x)
        tracker.take_last(x_adv, restart=0)
        return tracker.found

    def _noise(self, target: Target, rng: SampleRng) -> Tensor:
        """Uniform in [-eps, eps], of the shape of the images."""
        return self.threat.epsilon * (rng.uniform("start", target.x.shape[1:]).to(target.x.dtype) * 2 - 1)


def _half(target: Target, batch: int) -> Target:
    return replace(target, objective=f"cross_entropy_fp16-{batch}")


@dataclass(frozen=True, kw_only=True)
class ReleasedPGD(_Released):
    """PGD as released: a start that is no start, a loss too small for its precision, the last iterate.

    - Start. The noise n, uniform in [-eps, eps], goes through the normalisation of images, (n - mean) / std, before it
      is added to the normalised image: in pixels the start is x + n - mean, about 125/255 too dark. The first gradient
      is taken there, outside the ball. Whatever it says, x + n - mean + step < x - eps for eps up to 4/9 of the mean:
      the projection after the first step puts every pixel of at least eps at exactly x - eps and all others at 0, the
      same corner for every seed. One step is spent on that, and restarts would all be one.
    - Precision. Cross-entropy is averaged over the batch and differentiated in fp16 without loss scaling: the gradient
      of a confident image is exactly 0, and the image stays in the corner. Here the logits, their gradient and the
      image's gradient are rounded to fp16, the same on every device: a lower bound of the underflow (see
      `cross_entropy_fp16`).
    """

    name: Literal["pgd_released"] = "pgd_released"
    steps: int = 50
    """Gradient steps of eps / 4, the lost one included: 50 at test time, 10 in training."""
    batch: int = 512
    """What the loss is divided by, 1..9999: the released batch size, whatever ours is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.batch <= 9999:
            raise ValueError(f"batch must be in 1..9999, got {self.batch}")

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        start = target.x + self._noise(target, rng) - MEAN_PIXEL
        return self._walk(_half(target, self.batch), start, _in_half)


def auto_pgd(target: Target, threat: ThreatModel, steps: int, rounded: Callable[[Tensor], Tensor]) -> Found:
    """One run from the clean images: a first step of 2 eps, halved where it stops paying; the best point of each.

    `rounded` is applied to every gradient. The search watches the objective alone: it returns the point where that was
    largest, an error or not. Costs steps + 1 passes, no random numbers.
    """
    zero_gradient = torch.zeros(len(target), dtype=torch.bool, device=target.x.device)

    def evaluate(target: Target, x_adv: Tensor, last: bool) -> Climb:
        climb = target.look(x_adv) if last else target.climb(x_adv)
        return climb if climb.gradient is None else climb._replace(gradient=rounded(climb.gradient))

    def observe(_target: Target, _x_adv: Tensor, climb: Climb, step: int) -> None:
        nonlocal zero_gradient
        if step == 0 and climb.gradient is not None:
            zero_gradient = (climb.gradient == 0).flatten(1).all(1)

    best = walk(target, target.x, steps, partial(MomentumPace, threat, target.x, steps), evaluate, observe)
    spent = torch.full((len(target),), steps + 1, dtype=torch.int64, device=target.x.device)
    return Found(
        x_adv=best.x_adv,
        loss=best.gain,
        queries=spent,
        first_success=torch.full_like(spent, -1),
        restart=torch.zeros_like(spent),
        zero_gradient=zero_gradient,
    )


@dataclass(frozen=True, kw_only=True)
class ReleasedAPGD(_Released):
    """What is released under the name AutoAttack: one run of Auto-PGD on the cross-entropy (Croce & Hein 2020, Alg. 1).

    From the clean image, without restarts, targeted losses, FAB or Square. The loss is summed, so half precision costs
    it far less than `ReleasedPGD`; the rounding is the same but for the divisor. Returns the point of the largest loss.
    """

    name: Literal["apgd_released"] = "apgd_released"
    steps: int = 10
    """Gradient steps; the first is 2 eps long."""

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        del rng
        return auto_pgd(_half(target, 1), self.threat, self.steps, _in_half)


@dataclass(frozen=True, kw_only=True)
class ReleasedAdvMoE(_Released):
    """The "RA" of AdvMoE's released code: PGD on CE(f, y) + 6 CE(scores, y mod E), one run, the last iterate.

    - Loss. On a mixture whose router was trained to know y mod E the second term dominates the sign of the gradient,
      and the budget is spent on the router's answer; dense networks meet the cross-entropy alone, so that the two
      numbers are not of one attack.
    - Weight. The 6 is the one variable that also weighs both KL terms of training; here it is fixed.
    - Start. Uniform in the ball, not clipped to [0, 1] before the first gradient.
    """

    name: Literal["pgd_released_advmoe"] = "pgd_released_advmoe"
    steps: int = 10
    """Gradient steps of eps / 4, which at 8/255 are the released 2/255."""

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        climbing = replace(target, objective="cross_entropy_route-6")
        return self._walk(climbing, target.x + self._noise(target, rng), lambda gradient: gradient)
