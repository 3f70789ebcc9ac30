"""Divided We Fall's joint phase: the whole mixture trained on clean, FGSM and PGD images at once."""

# B batch, C classes

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from phalanx.attacks import FGSM, PGD
from phalanx.methods.base import LabelledBatch, Loss, Stateless, Update, check_weight, loss_of_pass
from phalanx.methods.draws import Draws, check_draws, draw
from phalanx.methods.units import Units, in_pixels, pixels_per_unit
from phalanx.rng import Rng
from phalanx.routing import RoutedModel
from phalanx.threat import Norm, ThreatModel

KINDS = ("clean", "fgsm", "pgd")
"""What a step's batch holds, B images each, in this order."""


@dataclass(frozen=True, kw_only=True)
class DWF(Stateless):
    """Cross-entropy of the mixture over clean, FGSM and PGD images, 3B in one pass (Divided We Fall, Algorithm 3).

    Both attacks differentiate the whole model, gate included, in evaluation mode; each batch draws the radius of its
    FGSM and the step count of its PGD. In the paper nine pre-trained experts
    (one by ST, four each by AT with FGSM and with PGD, see `AT`) move together with a new soft gate; with experts
    declared frozen the gate moves alone. No code is released: where the paper is silent, the fields' defaults say what
    is done here.

    What a step costs per image, counted as for `RTER`, in passes through all the experts that answer: 2 for FGSM, 2K
    for PGD with K steps, 9 for the cross-entropy; 71 at the mean K of 30.
    """

    name: Literal["dwf"] = "dwf"
    fgsm_eps: tuple[float | str, ...] = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09)
    """Radii of FGSM; each batch draws one uniformly. One value is no draw."""
    pgd_steps: tuple[int, ...] = (10, 20, 30, 40, 50)
    """Step counts of PGD; each batch draws one uniformly. One value is no draw."""
    pgd_step_size: float | str | None = None
    """Length of a PGD step; by default eps / 4 (2/255 at 8/255)."""
    pgd_step_sizes: tuple[float | str, ...] | None = None
    """Lengths of a PGD step, in place of the one above; each batch draws one uniformly. The paper's text says that the
    step size is random too, its algorithms fix it."""
    random_start: bool = False
    """Start PGD uniformly in the ball instead of at the clean image."""
    eps: float | str | None = None
    """Radius of PGD; by default the recipe's threat."""
    norm: Norm | None = None
    """Norm of both attacks; by default the recipe's threat."""
    units: Units = "pixel"
    """What every radius and step size is measured in, the threat's included; "normalised" multiplies each by the mean
    deviation of the model's normalisation layer, one number for all channels. Training alone: evaluation measures in
    pixels."""
    batch_norm: Literal["together", "apart"] = "together"
    """BatchNorm sees the 3B images as one batch, or one kind after the other, each normalised by its own statistics;
    the running ones then move once for each kind."""
    balance: float = 0.0
    """Weight of the load-balance loss; the paper has none, and a soft gate's is constant."""
    streams: ClassVar[tuple[str, ...]] = ("train",)

    def __post_init__(self) -> None:
        check_weight("balance", self.balance)
        check_draws(self._fgsm, {"eps": self.fgsm_eps}, {"eps": "fgsm_eps"})
        check_draws(self._pgd, self._pgd_draws, {"steps": "pgd_steps", "step_size": "pgd_step_sizes"})
        if self.pgd_step_size is not None and self.pgd_step_sizes is not None:
            raise ValueError(
                f"pgd_step_sizes draws what pgd_step_size={self.pgd_step_size} fixes; leave one of them out"
            )

    @property
    def _fgsm(self) -> FGSM:
        return FGSM(norm=self.norm)

    @property
    def _pgd(self) -> PGD:
        return PGD(eps=self.eps, norm=self.norm, step_size=self.pgd_step_size, random_start=self.random_start)

    @property
    def _pgd_draws(self) -> Draws:
        return {"steps": self.pgd_steps, "step_size": self.pgd_step_sizes}

    def check(self, model: RoutedModel, num_classes: int) -> None:
        del num_classes
        pixels_per_unit(self.units, model)

    def within(self, threat: ThreatModel) -> Self:
        eps, norm = self.eps, self.norm
        return replace(self, eps=threat.eps if eps is None else eps, norm=threat.norm if norm is None else norm)

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        x, y, ids = batches["train"].x, batches["train"].y, batches["train"].ids
        fgsm, drawn_eps = draw(self._fgsm, {"eps": self.fgsm_eps}, rng, x.device)
        pgd, drawn_pgd = draw(self._pgd, self._pgd_draws, rng, x.device)
        scale = pixels_per_unit(self.units, model)
        streams = rng.fold("attack").samples(ids)
        found = [in_pixels(attack, scale).search(model, x, y, rng=streams) for attack in (fgsm, pgd)]
        kinds = [x, *(attacked.x_adv for attacked in found)]
        shown = [torch.cat(kinds)] if self.batch_norm == "together" else kinds

        def loss() -> Loss:
            return _mean_loss(model, shown, y, self.balance)

        zero_gradient = torch.cat([attacked.zero_gradient for attacked in found]).float().mean()
        yield Update(loss, logs={"zero_gradient": zero_gradient, **drawn_eps, **drawn_pgd})


def _mean_loss(model: RoutedModel, shown: Sequence[Tensor], y: Tensor, balance: float) -> Loss:
    """The mean loss of one pass for each of `shown`, the three kinds at once (3B, ...) or each alone (B, ...)."""
    passes = [model.routed(images) for images in shown]
    losses = [loss_of_pass(passed, y.repeat(len(passed.logits) // len(y)), balance) for passed in passes]
    logs = {name: torch.stack([loss.logs[name] for loss in losses]).mean(0) for name in losses[0].logs}
    logits = torch.cat([passed.logits for passed in passes])
    return Loss(
        torch.stack([loss.value for loss in losses]).mean(), {**logs, **_accuracies(logits, y.repeat(len(KINDS)))}
    )


def _accuracies(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """ "clean_accuracy", "fgsm_accuracy" and "pgd_accuracy" (), each of its third of logits (3B, C), and
    "adversarial_accuracy" (), of both attacks."""
    correct = (logits.detach().argmax(-1) == labels).float().chunk(len(KINDS))
    each = {f"{kind}_accuracy": own.mean() for kind, own in zip(KINDS, correct, strict=True)}
    return {**each, "adversarial_accuracy": torch.cat(correct[1:]).mean()}
