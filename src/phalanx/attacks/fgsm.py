"""The fast gradient sign method, from the clean image or from a random point of the ball."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from phalanx.attacks.base import Attack
from phalanx.attacks.pgd import PGD
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.rng import SampleRng


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One step of length eps from the clean image (Goodfellow et al. 2015, eq. 3); for L2 and L1 the steepest step."""

    name: Literal["fgsm"] = "fgsm"

    @property
    def gradient_steps(self) -> int:
        return 1

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        return _one_step(self, self.threat.epsilon, random_start=False).perturb(target, rng)


@dataclass(frozen=True, kw_only=True)
class FGSMRS(Attack):
    """FGSM with a random start (Wong et al. 2020, Algorithm 3): one step from a point drawn uniformly from the ball,
    projected back.

    The cheapest attack that adversarial training has been shown to work with. The longer its step, the sooner a network
    learns to mislead this one step and nothing else (catastrophic overfitting).
    """

    name: Literal["fgsm_rs"] = "fgsm_rs"
    step: float = 1.25
    """Length of the step in multiples of eps; 1.25 is the paper's, 2 reaches a corner of the ball from anywhere."""
    random_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.step) and self.step > 0):
            raise ValueError(f"step must be positive, in multiples of eps, got {self.step}; the paper's is 1.25")

    @property
    def gradient_steps(self) -> int:
        return 1

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        return _one_step(self, self.step * self.threat.epsilon, random_start=True).perturb(target, rng)


def _one_step(attack: Attack, length: float, *, random_start: bool) -> PGD:
    return PGD(
        eps=attack.eps,
        norm=attack.norm,
        objective=attack.objective,
        surface=attack.surface,
        targeted=attack.targeted,
        steps=1,
        # 0 where the radius is, and so is PGD's own
        step_size=length or None,
        random_start=random_start,
        keep="last",
        early_drop=False,
    )
