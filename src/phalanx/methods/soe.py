"""Synergy-of-Experts: sub-models that share out the neighbourhood of the data, and learn when to speak."""

# B batch, M sub-models, C classes

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.attacks import PGD, AnyAttack, Found
from phalanx.errors import InputError
from phalanx.methods.base import LabelledBatch, Loss, Stateless, Update, check_weight
from phalanx.rng import Rng
from phalanx.routing import Route, RoutedModel, SynergyOfExperts, load_per_expert
from phalanx.routing.soe import answer
from phalanx.threat import ThreatModel

Weighting = Literal["true_best", "predicted_best", "sum", "selected"]
AttackOn = Literal["together", "one_by_one"]


@dataclass(frozen=True, kw_only=True)
class SOE(Stateless):
    """L(x) + L(x'), x' attacked, with L(x) = mean_b sum_i w_bi CE(z_i, y) + lambda mean_bi BCE(R_i, T_i).

    Cui et al., NeurIPS 2022. R_i is the rectified confidence of sub-model i (see `SynergyOfExperts`) and T_i, its
    target, the probability that i gives the true class. T and w carry no gradient. Where i is right its largest
    probability is detached inside R_i, so that BCE only raises the confidence; where it is wrong BCE also lowers that
    probability.

    The paper wants the loss of the best sub-model and its released code weighs otherwise; see `weighting`. Deviations
    from that code: the attack runs in evaluation mode, so BatchNorm never sees its iterates; one temperature, the
    model's, holds in R, in T and at inference; the step length is eps / 4 unless set (there 0.01 at eps 0.02 or 0.03).

    What a step costs per image, in passes through one sub-model (forward 1, backward to the image 1 more, to the
    parameters 2 more), with K steps of PGD: 2MK for x', which runs every sub-model, and 6M for the two losses; for
    "one_by_one" 2MK and 3M + 3M^2. At K = 10 and M = 3: 78 and 96.
    """

    name: Literal["soe"] = "soe"
    attack: AnyAttack = field(default_factory=lambda: PGD(random_start=False))
    """The inner maximisation; its eps and norm are the recipe's threat unless set here."""
    attack_on: AttackOn = "together"
    """The whole model, which is the sub-model that it selects ("together"), or each sub-model by itself
    ("one_by_one"): x' is then M images for each x."""
    weighting: Weighting = "true_best"
    """Who learns from an image. "true_best": w = softmax_i(-CE_i), the gradient of -log sum_i exp(-CE_i), a smooth loss
    of the best sub-model. "predicted_best": softmax_i(R_i), as released; R lies in (0, 1), so that of three sub-models
    each gets between 0.155 and 0.576, nearly an average. "sum": 1 each. "selected": the one that answers, alone."""
    confidence_weight: float = 1.0
    """lambda, the weight of the confidence loss."""
    streams: ClassVar[tuple[str, ...]] = ("train",)

    def __post_init__(self) -> None:
        check_weight("confidence_weight", self.confidence_weight)
        if self.attack_on == "one_by_one" and self.attack.surface != "whole":
            raise ValueError(
                f"attack.surface must be 'whole' where attack_on is 'one_by_one', got {self.attack.surface!r}; "
                "a single sub-model has no route"
            )

    def check(self, model: RoutedModel, num_classes: int) -> None:
        del num_classes
        self._synergy(model)

    def within(self, threat: ThreatModel) -> Self:
        return replace(self, attack=self.attack.within(threat))

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        synergy, batch = self._synergy(model), batches["train"]
        found = self._attacked(synergy, batch, rng.fold("attack"))
        x_adv = torch.cat([part.x_adv for part in found])
        y_adv = batch.y.repeat(len(found))

        def loss() -> Loss:
            clean, adv = self._loss(synergy, batch.x, batch.y), self._loss(synergy, x_adv, y_adv)
            # what is logged is the mean of both, each half weighing the same as in the loss
            logs = {name: (log + adv.logs[name]) / 2 for name, log in clean.logs.items()}
            return Loss(clean.value + adv.value, {**logs, "adversarial_accuracy": adv.logs["accuracy"]})

        yield Update(loss, logs={"zero_gradient": torch.cat([part.zero_gradient for part in found]).float().mean()})

    def _attacked(self, model: SynergyOfExperts, batch: LabelledBatch, rng: Rng) -> list[Found]:
        """What the attack finds on the whole model, or on each sub-model."""
        if self.attack_on == "together":
            return [self.attack.search(model, batch.x, batch.y, rng=rng.samples(batch.ids))]
        return [
            self.attack.search(submodel, batch.x, batch.y, rng=rng.fold(number).samples(batch.ids))
            for number, submodel in enumerate(model.experts)
        ]

    def _loss(self, model: SynergyOfExperts, x: Tensor, y: Tensor) -> Loss:
        """L of images (B, C, H, W), and what is logged of them."""
        logits_BMC, confidence_BM = model.submodels(x)
        route = model.decide(logits_BMC, confidence_BM)
        ce_BM = -_of_class(logits_BMC.log_softmax(-1), y)
        weight_BM = self._weights(ce_BM.detach(), route)
        right_BM = logits_BMC.argmax(-1) == y[:, None]
        bce = _confidence_loss(model.log_probs(logits_BMC), confidence_BM, right_BM, y).mean()
        logs = {
            "accuracy": (answer(logits_BMC.detach(), route).argmax(-1) == y).float().mean(),
            "weight_entropy": _entropy(weight_BM).mean(),
            "load": load_per_expert(route)[0].detach(),
        }
        return Loss((weight_BM * ce_BM).sum(-1).mean() + self.confidence_weight * bce, logs)

    def _weights(self, ce_BM: Tensor, route: Route) -> Tensor:
        """(B, M) w, without gradient."""
        match self.weighting:
            case "true_best":
                return (-ce_BM).softmax(-1)
            case "predicted_best":
                return route.scores.detach().exp().softmax(-1)
            case "sum":
                return torch.ones_like(ce_BM)
            case "selected":
                return torch.zeros_like(ce_BM).scatter(-1, route.experts, 1)

    def _synergy(self, model: RoutedModel) -> SynergyOfExperts:
        if not isinstance(model, SynergyOfExperts):
            raise InputError(
                f"{self.name} trains a SynergyOfExperts, got {type(model).__name__}; "
                "set model.name to soe, or use another method"
            )
        return model


def _of_class(values_BMC: Tensor, y: Tensor) -> Tensor:
    """(B, M) the entries of class y (B,)."""
    values_BM: Tensor = values_BMC.take_along_dim(y[:, None, None], dim=-1).squeeze(-1)
    return values_BM


def _confidence_loss(log_p_BMC: Tensor, confidence_BM: Tensor, right_BM: Tensor, y: Tensor) -> Tensor:
    """(B, M) BCE(R, T) from log-probabilities and confidence logits.

    In logarithms throughout, 1 - R = (1 - p) + p (1 - h) for p the largest probability: the exact gradient is bounded,
    and here it stays so where p or h rounds to 1.
    """
    target_BM = _of_class(log_p_BMC, y).detach().exp()
    log_p_BMC = torch.where(right_BM[..., None], log_p_BMC.detach(), log_p_BMC)
    log_max_BM, top_BM = log_p_BMC.max(-1)
    log_rest_BM = log_p_BMC.scatter(-1, top_BM[..., None], float("-inf")).logsumexp(-1)
    log_r_BM = log_max_BM + F.logsigmoid(confidence_BM)
    log_not_r_BM = torch.logaddexp(log_rest_BM, log_max_BM + F.logsigmoid(-confidence_BM))
    return -(target_BM * log_r_BM + (1 - target_BM) * log_not_r_BM)


def _entropy(weight_BM: Tensor) -> Tensor:
    """(B,) in nats, of weights scaled to sum 1: log M is an average over the sub-models, 0 a single one."""
    entropy_B: Tensor = torch.special.entr(weight_BM / weight_BM.sum(-1, keepdim=True)).sum(-1)
    return entropy_B
