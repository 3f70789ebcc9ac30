"""The fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
        step = PGD(
            eps=self.eps,
            norm=self.norm,
            objective=self.objective,
            surface=self.surface,
            targeted=self.targeted,
            steps=1,
            step_size=self.threat.epsilon,
            random_start=False,
            keep="last",
            early_drop=False,
        )
        return step.perturb(target, rng)
