"""Adversarial training: cross-entropy on images that an attack on the whole model has perturbed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch

from phalanx.attacks import PGD, AnyAttack
from phalanx.methods.base import LabelledBatch, Loss, Stateless, Update, accuracy_of, check_weight, loss_of_pass
from phalanx.methods.draws import Draws, check_draws, draw
from phalanx.methods.units import Units, in_pixels, pixels_per_unit
from phalanx.rng import Rng
from phalanx.routing import RoutedModel
from phalanx.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class AT(Stateless):
    """Madry et al. 2018, eq. 2.1: the inner maximum by `attack`, the outer minimum by the trainer.

    With FGSM and one expert it is FGSM-AT of a single network, with FGSM-RS the fast training of Wong et al. 2020
    (whose attack saw training mode), with PGD it is PGD-AT. The attack runs in evaluation mode, so BatchNorm never sees
    its iterates; the loss runs in training mode.

    `draw_eps` with FGSM is an FGSM expert of Divided We Fall (its Algorithm 1: 0.01, 0.02, ..., 0.09), `draw_steps`
    with PGD from the clean image a PGD expert (its Algorithm 2: 10, 20, ..., 50).
    """

    name: Literal["at"] = "at"
    attack: AnyAttack = field(default_factory=PGD)
    """The inner maximisation; its eps and norm are the recipe's threat unless set here."""
    adversarial_share: float = 1.0
    """Share of each batch that is attacked, in (0, 1]; the rest is trained on clean, in the same forward pass."""
    draw_eps: tuple[float | str, ...] | None = None
    """Radii; each batch is attacked at one of them, drawn uniformly, in place of the attack's eps."""
    draw_steps: tuple[int, ...] | None = None
    """Step counts; each batch is attacked with one of them, drawn uniformly, in place of the attack's steps."""
    draw_step_size: tuple[float | str, ...] | None = None
    """Step sizes; each batch is attacked with one of them, drawn uniformly, in place of the attack's step_size."""
    units: Units = "pixel"
    """What every radius and step size is measured in, the threat's and the drawn ones included; "normalised" multiplies
    each by the mean deviation of the model's normalisation layer, one number for all channels. Training alone:
    evaluation measures in pixels."""
    balance: float = 0.1
    """Weight of the load-balance loss."""
    streams: ClassVar[tuple[str, ...]] = ("train",)

    def __post_init__(self) -> None:
        check_weight("balance", self.balance)
        if not 0 < self.adversarial_share <= 1:
            raise ValueError(f"adversarial_share must be in (0, 1], got {self.adversarial_share}; for 0 use method st")
        check_draws(self.attack, self._draws, {field: f"draw_{field}" for field in self._draws})

    @property
    def _draws(self) -> Draws:
        return {"eps": self.draw_eps, "steps": self.draw_steps, "step_size": self.draw_step_size}

    def check(self, model: RoutedModel, num_classes: int) -> None:
        del num_classes
        pixels_per_unit(self.units, model)

    def within(self, threat: ThreatModel) -> Self:
        return replace(self, attack=self.attack.within(threat))

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        x, y, ids = batches["train"].x, batches["train"].y, batches["train"].ids
        # the loader shuffles, so the first images are a random share
        attacked = max(1, round(self.adversarial_share * len(x)))
        attack, drawn = draw(self.attack, self._draws, rng, x.device)
        attack = in_pixels(attack, pixels_per_unit(self.units, model))
        found = attack.search(model, x[:attacked], y[:attacked], rng=rng.fold("attack").samples(ids[:attacked]))
        inputs = torch.cat([found.x_adv, x[attacked:]])
        logs = {"zero_gradient": found.zero_gradient.float().mean(), **drawn}

        def loss() -> Loss:
            passed = model.routed(inputs)
            whole = loss_of_pass(passed, y, self.balance)
            right = accuracy_of(passed.logits[:attacked], y[:attacked])
            return Loss(whole.value, {**whole.logs, "adversarial_accuracy": right})

        yield Update(loss, logs=logs)
