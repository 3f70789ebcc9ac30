"""The attacks of the code released with the dual-model paper, defects included: for its numbers, not for a verdict.

Their results are still judged on the real model in fp32, inside the ball.
"""

# A samples given to the search

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from phalanx.attacks.apgd import auto_pgd
from phalanx.attacks.base import Attack
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found, Tracker
from phalanx.rng import SampleRng

MEAN_PIXEL = 0.4734
"""Of CIFAR-10, over channels. The released code subtracts each channel's own: that moves the point of the first
gradient, never where the first step ends."""


def _in_half(gradient: Tensor) -> Tensor:
    return gradient.half().to(gradient.dtype)


@dataclass(frozen=True, kw_only=True)
class _Released(Attack):
    """What the two share: Linf, cross-entropy, half precision, one run."""

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

    def _climbing(self, target: Target, batch: int) -> Target:
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
        threat, climbing = self.threat, self._climbing(target, self.batch)
        tracker = Tracker(target, keep="last", early_drop=False)
        noise = rng.uniform("start", target.x.shape[1:]).to(target.x.dtype) * 2 - 1
        x_adv = target.x + threat.epsilon * noise - MEAN_PIXEL
        for step in range(self.steps):
            climb = climbing.climb(x_adv)
            assert climb.gradient is not None
            gradient = _in_half(climb.gradient)
            tracker.observe(x_adv, climb._replace(gradient=gradient), target, restart=0, step=step)
            x_adv = threat.step(x_adv, gradient, threat.epsilon / 4, target.x)
        tracker.take_last(x_adv, restart=0)
        return tracker.found


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
        return auto_pgd(self._climbing(target, 1), self.threat, self.steps, _in_half)
