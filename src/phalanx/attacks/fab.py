"""Fast adaptive boundary attack: the minimum-norm member of AutoAttack."""

# A samples still attacked, C classes, D pixels of one image

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from phalanx.attacks.base import Attack
from phalanx.attacks.fab_projection import onto_hyperplane
from phalanx.attacks.nearest import Nearest
from phalanx.attacks.surfaces import SURFACES
from phalanx.attacks.target import Target, wrong_classes
from phalanx.attacks.tracker import Found
from phalanx.rng import SampleRng
from phalanx.threat import Norm, per_image

_DUAL: dict[Norm, float] = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}
_ORDER: dict[Norm, float] = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """Fast adaptive boundary attack (Croce & Hein 2020b, Algorithm 1): looks for the nearest error of each image.

    Every step goes to the linearised decision boundary, a little past it and biased towards the clean image; from an
    error it goes back towards the clean image. The first run starts there, each restart uniformly at random in the ball
    of half the radius. Only an error within eps is a success. Where there is none, the nearest error found is refined
    by the published final search and handed to the verdict projected onto the ball. Of AutoAttack "fab-t", and with
    `targets=0` its "fab".
    """

    name: Literal["fab"] = "fab"
    objective: str = "margin"
    """Fixed: FAB climbs nothing, it reports the margin of the label."""
    steps: int = 100
    """Steps of a run, two passes each: one for the boundary, one to see where the step has led."""
    restarts: int = 1
    """Runs, of each target."""
    targets: int = 9
    """Of how many most likely wrong classes of the clean image the boundary is approached, one after the other, on the
    samples still standing. 0: at each point the nearest boundary of all, at C - 1 backward passes a step."""
    alpha_max: float = 0.1
    """Largest weight of the step that starts at the clean image."""
    eta: float = 1.05
    """Overshoot: 1 ends on the linearised boundary."""
    beta: float = 0.9
    """An error's distance to the clean image is multiplied by this."""

    def __post_init__(self) -> None:
        self._check_fixed("FAB", targeted=False, objective="margin")
        super().__post_init__()
        for field, least in (("steps", 1), ("restarts", 1), ("targets", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}")
        for field, low, high in (("alpha_max", 0, 1), ("eta", 1, 2), ("beta", 0, 1)):
            if not low <= getattr(self, field) <= high:
                raise ValueError(f"{field} must be from {low} to {high}, got {getattr(self, field)}")

    @property
    def reads_clean_pass(self) -> bool:
        return self.targets > 0 or super().reads_clean_pass

    @property
    def reads_clean_logits(self) -> bool:
        return self.targets > 0 or super().reads_clean_logits

    @property
    def gradient_steps(self) -> int:
        return self.steps * self.restarts * max(self.targets, 1)

    def for_classes(self, num_classes: int) -> Self:
        """This attack with the number of targets that a model of so many classes has: for a ledger's spec."""
        return replace(self, targets=min(self.targets, max(num_classes - 1, 1)))

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        nearest = Nearest(target, self.threat)
        runs = (aim for aim in self._aims(target) for _ in range(self.restarts))
        for attempt, aim in enumerate(runs):
            rows = nearest.rows
            if not len(rows):
                break
            self._run(nearest, aim[rows], rng[rows], attempt)
        nearest.refine(steps=self.gradient_steps)
        return nearest.found

    def _aims(self, target: Target) -> Iterator[Target]:
        if not self.targets:
            yield target
            return
        for wanted in wrong_classes(target, self.targets):
            yield replace(target, wanted=wanted)

    def _run(self, nearest: Nearest, aim: Target, rng: SampleRng, attempt: int) -> None:
        x_adv = aim.x
        if attempt % self.restarts:
            half = replace(self.threat, eps=self.threat.epsilon / 2)
            x_adv = half.random_start(aim.x, rng, restart=attempt)
        for step in range(1, self.steps + 1):
            value_A, slope = boundary(aim, x_adv, self.threat.norm)
            nearest.count_gradient(slope, first=attempt == 0 and step == 1)
            x_adv = self._stepped(aim.x, x_adv, value_A, slope)
            _, error_A, stay_A = nearest.observe(x_adv, aim, steps=attempt * self.steps + step, attempt=attempt)
            x_adv = torch.where(per_image(error_A, x_adv), aim.x + self.beta * (x_adv - aim.x), x_adv)
            if stay_A is not None:
                aim, x_adv = aim[stay_A], x_adv[stay_A]
                if not len(aim):
                    return

    def _stepped(self, x: Tensor, x_adv: Tensor, value_A: Tensor, slope: Tensor) -> Tensor:
        """(A, ...) a mean of the steps onto the boundary from the iterate and from the clean image."""
        norm = self.threat.norm
        x_AD, x_adv_AD, slope_AD = x.flatten(1), x_adv.flatten(1), slope.flatten(1)
        at_clean_A = value_A + ((x_AD - x_adv_AD) * slope_AD).sum(1)
        move_AD, back_AD = onto_hyperplane(
            torch.cat([x_adv_AD, x_AD]), slope_AD.repeat(2, 1), torch.cat([value_A, at_clean_A]), norm
        ).chunk(2)
        move_A1, back_A1 = (
            torch.linalg.vector_norm(step_AD, ord=_ORDER[norm], dim=1, keepdim=True) for step_AD in (move_AD, back_AD)
        )
        alpha_A1 = (move_A1 / (move_A1 + back_A1).clamp_min(1e-12)).clamp_max(self.alpha_max)
        new_AD = (x_adv_AD + self.eta * move_AD).lerp(x_AD + self.eta * back_AD, alpha_A1)
        return new_AD.clamp(0, 1).reshape(x.shape)


def boundary(aim: Target, x_adv: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(A,) z_k - z_y of the attacked surface at `x_adv` (A, ...), and its gradient with respect to the images.

    y is the label; k the wanted class, without one that whose linearised boundary is the nearest in `norm`.
    What is not finite is 0.
    """
    with torch.enable_grad():
        leaf = x_adv.detach().requires_grad_()
        logits_AC = SURFACES[aim.surface](aim.search, leaf, aim.x, aim.clean).logits
        classes = logits_AC.shape[1]
        others = [(aim.y + rank) % classes for rank in range(1, classes)] if aim.wanted is None else [aim.wanted]
        label_A = logits_AC.gather(1, aim.y[:, None])
        leads = [(logits_AC.gather(1, other[:, None]) - label_A).squeeze(1) for other in others]
        nearest_A = torch.full_like(label_A.detach().squeeze(1), float("inf"))
        value_A, slope = torch.zeros_like(nearest_A), torch.zeros_like(x_adv)
        for number, lead_A in enumerate(leads):
            gradient = _gradient(lead_A, leaf, keep=number + 1 < len(leads))
            lead_A = lead_A.detach().nan_to_num(0, 0, 0)
            length_A = torch.linalg.vector_norm(gradient.flatten(1), ord=_DUAL[norm], dim=1)
            # a class without a slope is out of reach, but better than none
            distance_A = lead_A.abs() / length_A.clamp_min(torch.finfo(length_A.dtype).tiny)
            nearer_A = distance_A < nearest_A
            nearest_A, value_A = torch.where(nearer_A, distance_A, nearest_A), torch.where(nearer_A, lead_A, value_A)
            slope = torch.where(per_image(nearer_A, slope), gradient, slope)
    return value_A, slope


def _gradient(lead_A: Tensor, leaf: Tensor, *, keep: bool) -> Tensor:
    # a model may ignore its input: that is a zero gradient, not an error
    if not lead_A.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(lead_A.sum(), leaf, retain_graph=keep, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient.nan_to_num(0, 0, 0)
