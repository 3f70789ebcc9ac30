"""AdvMoE: the router and the experts of one mixture, trained in turn against an adversary each."""

# B batch, E experts

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from phalanx.attacks import PGD, AnyAttack, Found
from phalanx.methods.advmoe_router import RouterLoss, check_class_per_expert, check_players, with_scores
from phalanx.methods.base import (
    LabelledBatch,
    Loss,
    Stateless,
    Update,
    accuracy_of,
    check_weight,
    loss_of_pass,
    mean_kl,
    with_divergence,
)
from phalanx.methods.trades import check_divergence_attack
from phalanx.nn import frozen, frozen_except
from phalanx.rng import Rng
from phalanx.routing import Routed, RoutedModel, RouteTree
from phalanx.threat import ThreatModel

Player = Literal["experts", "router"]
Order = Literal["router_first", "experts_first"]
Batches = Literal["independent", "same"]
RouterObjective = Literal["labels", "end_to_end"]
CleanScores = Literal["evaluation", "training"]
Preset = Literal["released", "fixed", "paper"]


class Choices(NamedTuple):
    """The disputed points of the method, settled."""

    order: Order
    batches: Batches
    router_objective: RouterObjective
    attack_router: bool
    clean_scores: CleanScores
    extra_passes: bool


PRESETS: Mapping[Preset, Choices] = {
    "released": Choices("experts_first", "same", "labels", True, "training", True),
    "fixed": Choices("router_first", "independent", "labels", True, "evaluation", False),
    "paper": Choices("router_first", "independent", "end_to_end", False, "evaluation", False),
}


@dataclass(frozen=True, kw_only=True)
class AdvMoE(Stateless):
    """Two updates a step, each on images attacked anew (Zhang et al., ICCV 2023, arXiv 2308.10110).

    With logits f, router scores s and x' attacked in evaluation mode, climbing KL(f(x) || f(x')) + KL(s(x) || s(x')):

    - experts: CE(f(x), y) + beta KL(f(x) || f(x')), routed as the router decides in evaluation mode;
    - router, "labels": router_label_weight CE(s(x), y mod E) + router_beta KL(s(x) || s(x')), the mean over several
      gates; "end_to_end": the experts' loss, differentiated through the gate.

    Whoever does not move keeps its bits, BatchNorm's statistics included. Both branches of each KL carry gradient, and
    all are computed in log space: the released code's are not, and its router turns NaN once a probability underflows.

    Paper and released code disagree; see `preset`. With "labels" the router is a classifier of y mod E, each expert a
    specialist of every E-th class, and a wrong route nearly always a wrong answer: read the accuracy beside
    "router.route_accuracy". Nothing of the experts' loss reaches that router, as released.

    What a step costs per image, counted as for `RTER` in passes through one path, with K steps of PGD, routers that
    cost nothing and one gate: 1 + 2K + 6 for the experts' update, 1 + 2K for the router's (4 more "end_to_end", which
    needs no weight gradients). At K = 2: 11 + 5, where TRADES takes 11.
    """

    name: Literal["advmoe"] = "advmoe"
    attack: AnyAttack = field(
        default_factory=lambda: PGD(steps=2, step_size="5/255", gaussian_start=0.001, objective="kl")
    )
    """The inner maximisation of both updates, of objective "kl"; eps and norm are the recipe's threat unless set."""
    beta: float = 6.0
    """Weight of the KL of the classes."""
    router_label_weight: float = 6.0
    """Weight of the router's cross-entropy with y mod E; "end_to_end" has none."""
    router_beta: float = 6.0
    """Weight of the KL of the scores; "end_to_end" has none."""
    balance: float = 0.0
    """Weight of the load-balance loss in the router's update; neither paper nor code has one."""
    preset: Preset = "fixed"
    """Settles what is None below: as in the "released" code (but for its NaN), the same objectives with its errors
    "fixed", or as in the "paper", as far as we know it."""
    order: Order | None = None
    """Who moves first: "router_first" or "experts_first"."""
    batches: Batches | None = None
    """The router's images: "independent" of the experts', or the "same"."""
    router_objective: RouterObjective | None = None
    """"labels" or "end_to_end"; see above."""
    attack_router: bool | None = None
    """The attack also climbs the KL of the scores, 1 to 1."""
    clean_scores: CleanScores | None = None
    """The mode of the clean scores in that KL; the attacked ones are of "evaluation" mode. From "training" mode the
    two differ at x' = x already, so that part of the attack's direction is spurious."""
    extra_passes: bool | None = None
    """Training passes that only move BatchNorm's statistics: one of the whole model on the clean images before each
    attack, and the router's in the experts' update. The experts' statistics then see three clean images for one
    attacked, the router's four for two."""

    def __post_init__(self) -> None:
        for weight in ("beta", "router_label_weight", "router_beta", "balance"):
            check_weight(weight, getattr(self, weight))
        check_divergence_attack(self.attack, self.name)
        if self.attack.surface != "whole":
            raise ValueError(f"attack.surface must be 'whole', got {self.attack.surface!r}; leave it out")

    @property
    def choices(self) -> Choices:
        """The values that hold: the preset's, but for the fields that override them."""
        own = {point: getattr(self, point) for point in Choices._fields}
        return PRESETS[self.preset]._replace(**{point: value for point, value in own.items() if value is not None})

    @property
    def streams(self) -> tuple[str, ...]:
        """The experts' images and, if they are others, the router's."""
        return ("train", "router") if self.choices.batches == "independent" else ("train",)

    def check(self, model: RoutedModel, num_classes: int) -> None:
        check_players(self.name, model)
        if self.choices.router_objective == "labels":
            check_class_per_expert(self.name, model, num_classes)

    def within(self, threat: ThreatModel) -> Self:
        return replace(self, attack=self.attack.within(threat))

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        check_players(self.name, model)
        updates = {"experts": self._experts_update, "router": self._router_update}
        read = {"experts": self.streams[0], "router": self.streams[-1]}
        for player in updates if self.choices.order == "experts_first" else reversed(updates):
            yield updates[player](model, batches[read[player]], rng.fold("attack", player))

    def _experts_update(self, model: RoutedModel, batch: LabelledBatch, rng: Rng) -> Update:
        found = self._search(model, batch, rng)

        def loss() -> Loss:
            clean, adv = (self._experts_pass(model, x) for x in (batch.x, found.x_adv))
            return self._class_loss(clean, adv, batch.y, balance=0.0)

        return Update(loss, "experts", logs={"zero_gradient": found.zero_gradient.float().mean()})

    def _experts_pass(self, model: RoutedModel, x: Tensor) -> Routed:
        """One training pass of the experts, the route fixed."""
        if self.choices.extra_passes:
            # the gradient that the router gets here is thrown away
            return model.routed(x)
        with torch.no_grad(), frozen(model):
            route = model.gate(x)
        # under a given route no router is asked, so that none is moved
        return model.routed(x, route)

    def _router_update(self, model: RoutedModel, batch: LabelledBatch, rng: Rng) -> Update:
        found = self._search(model, batch, rng)
        terms = RouterLoss(self.router_label_weight, self.router_beta, self.balance)

        def loss() -> Loss:
            with frozen_except(model, model.players()["router"]):
                if self.choices.router_objective == "labels":
                    return terms(model.gate(batch.x), model.gate(found.x_adv), batch.y)
                clean, adv = model.routed(batch.x), model.routed(found.x_adv)
            assert clean.route is not None and adv.route is not None
            whole = self._class_loss(clean, adv, batch.y, self.balance)
            return Loss(whole.value, {**whole.logs, **terms.logs(clean.route, adv.route, batch.y)})

        return Update(loss, "router", logs={"zero_gradient": found.zero_gradient.float().mean()})

    def _class_loss(self, clean: Routed, adv: Routed, y: Tensor, balance: float) -> Loss:
        """TRADES of two passes, on images and on the same attacked, plus `balance` times the load-balance loss."""
        loss = with_divergence(loss_of_pass(clean, y, balance), self.beta, mean_kl(clean.logits, adv.logits))
        return Loss(loss.value, {**loss.logs, "adversarial_accuracy": accuracy_of(adv.logits, y)})

    def _search(self, model: RoutedModel, batch: LabelledBatch, rng: Rng) -> Found:
        """Attacks the images of `batch`; `extra_passes` first moves BatchNorm's statistics."""
        clean = self._clean_route(model, batch.x)
        attack = replace(self.attack, objective="kl_route") if self.choices.attack_router else self.attack
        return attack.search(model, batch.x, batch.y, rng=rng.samples(batch.ids), route=clean)

    @torch.no_grad()
    def _clean_route(self, model: RoutedModel, x: Tensor) -> RouteTree | None:
        """What the attack starts from: evaluation mode's decisions with training mode's scores, or None for its own."""
        choices = self.choices
        asked = choices.attack_router and choices.clean_scores == "training"
        trained: RouteTree | None = None
        if choices.extra_passes:
            trained = model.routed(x).route
        elif asked:
            with frozen_except(model, model.players()["router"]):
                trained = model.gate(x)
        if not asked:
            return None
        assert trained is not None
        with frozen(model):
            return with_scores(model.gate(x), trained)
