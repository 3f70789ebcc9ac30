"""Adversarial training of a mixture and of its experts one by one: what RT-ER is, and JTDMoE's lower level."""

# B batch, E experts, K selected, R regularised, C classes

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from phalanx.attacks import OBJECTIVES, PGD, AnyAttack, Attack
from phalanx.attacks.surfaces import UNDECIDED
from phalanx.errors import InputError
from phalanx.methods.base import (
    LabelledBatch,
    Loss,
    Stateless,
    Update,
    check_weight,
    classification_loss,
    mean_kl,
    with_divergence,
)
from phalanx.methods.joint_inner import JointInner
from phalanx.nn import frozen
from phalanx.rng import Rng, SampleRng
from phalanx.routing import DualModel, LayerMixture, MixtureOfExperts, Route, Routed, RoutedModel
from phalanx.threat import ThreatModel

Regularised = Literal["second", "all_others", "all"]
ChosenOn = Literal["adversarial", "clean"]
KLPoint = Literal["shared", "own"]
KLReduction = Literal["mean", "sum"]
Inner = Literal["cross_entropy", "joint"]
Preset = Literal["paper", "code", "sound"]


class Choices(NamedTuple):
    """The disputed points of the loss, settled."""

    regularised: Regularised
    chosen_on: ChosenOn
    kl_point: KLPoint
    kl_reduction: KLReduction
    inner: Inner


class _Attacked(NamedTuple):
    """What the attacks of one step found."""

    x_adv: Tensor
    """(B, C, H, W) against the mixture."""
    routes: Route
    """The batch R times over, each time to another regularised expert."""
    points: Tensor
    """(R * B, C, H, W) where those experts' divergence is taken."""
    times: int
    """R."""
    zero_gradient: Tensor
    """(B,) bool, of the attack on the mixture."""


@dataclass(frozen=True, kw_only=True)
class ExpertRobustness(Stateless, ABC):
    """CE(F(x + d), y) + beta mean_i KL(p_i(x) || p_i(x + d_i)), i over the regularised experts.

    F is the whole mixture, d the attack on it; p_i is the softmax of expert i alone. Both branches of the KL carry
    gradient; the router learns from the cross-entropy and the balance loss. `preset` settles what paper and released
    code dispute, and a field that is not None overrides it (a run's record shows both; `choices` is what holds).
    """

    attack: AnyAttack = field(default_factory=PGD)
    """On the mixture, and on each regularised expert by itself; its eps and norm are the recipe's threat unless set."""
    beta: float = 6.0
    """Weight of the KL term: 6 times mean, so it weighs the same whatever E is (unless `kl_reduction` is "sum")."""
    balance: float = 0.1
    """Weight of the load-balance loss; 0.5 keeps experts alive that 0.1 may lose."""
    preset: Preset = "sound"
    """Settles what is None below: as in the "paper", in its released "code", or as is "sound" against an attacker who
    chooses the route."""
    regularised: Regularised | None = None
    """The best expert that the gate did not select ("second"), "all_others" that it did not select, or "all" experts,
    selected or not, on the whole batch."""
    chosen_on: ChosenOn | None = None
    """The image whose route says which experts those are: x + d ("adversarial") or x ("clean"); "all" asks neither."""
    kl_point: KLPoint | None = None
    """d_i is the mixture's d ("shared"), or expert i's "own", the attack on that expert alone."""
    kl_reduction: KLReduction | None = None
    """"mean" or "sum" over the regularised experts; always a mean over the batch."""
    inner: Inner | None = None
    """d climbs the attack's objective ("cross_entropy"), or that plus beta KL at the same d ("joint"; `kl_point` is
    "shared" then)."""

    PRESETS: ClassVar[Mapping[Preset, Choices]]
    streams: ClassVar[tuple[str, ...]] = ("train",)

    @property
    @abstractmethod
    def name(self) -> str:
        """As in a recipe."""

    def __post_init__(self) -> None:
        check_weight("beta", self.beta)
        check_weight("balance", self.balance)
        if self.attack.surface != "whole":
            raise ValueError(
                f"attack.surface must be 'whole', got {self.attack.surface!r}; "
                f"{self.name} itself aims at single experts"
            )
        try:
            self._held("experts")
        except ValueError:
            raise ValueError(
                f"attack must be one that can aim at a single expert, got {self.attack.name}; use pgd"
            ) from None
        if self.choices.inner == "joint" and self.choices.kl_point == "own":
            raise ValueError(
                "kl_point must be 'shared' where inner is 'joint', one d for both terms, got 'own'; "
                "set kl_point to shared or inner to cross_entropy"
            )

    @property
    def choices(self) -> Choices:
        """The values that hold: the preset's, but for the fields that override them."""
        settled = self.PRESETS[self.preset]
        return Choices(
            self.regularised or settled.regularised,
            self.chosen_on or settled.chosen_on,
            self.kl_point or settled.kl_point,
            self.kl_reduction or settled.kl_reduction,
            self.inner or settled.inner,
        )

    def within(self, threat: ThreatModel) -> Self:
        return replace(self, attack=self.attack.within(threat))

    def check_mixture(self, model: RoutedModel) -> None:
        """Raises InputError if it shows without an image that `model` is no mixture with an expert to regularise."""
        if isinstance(model, DualModel):
            raise self._several_gates()
        if isinstance(model, LayerMixture):
            raise InputError(
                f"{self.name} trains a mixture of whole networks, got a network with routed layers; "
                "use advmoe, or trades or at"
            )
        if isinstance(model, MixtureOfExperts):
            self._check_idle(model.top_k, len(model.experts))

    def robust_update(self, model: RoutedModel, batch: LabelledBatch, rng: Rng, player: str = "all") -> Update:
        """Attacks `model`, a mixture, and its experts, on images (B, C, H, W); one update of `player` down the loss.

        Raises InputError unless the model has one gate and an expert to regularise.
        """
        x, y = batch.x, batch.y
        streams = rng.fold("attack").samples(batch.ids)
        attacked = self._side_by_side(model, x, y, streams) or self._one_after_the_other(model, x, y, streams)
        x_RB = torch.cat([x] * attacked.times)
        weight = attacked.times if self.choices.kl_reduction == "sum" else 1

        def loss() -> Loss:
            whole = classification_loss(model, attacked.x_adv, y, self.balance)
            clean, adv = (model.routed(images, attacked.routes).logits for images in (x_RB, attacked.points))
            both = with_divergence(whole, self.beta, weight * mean_kl(clean, adv))
            return Loss(both.value, {**both.logs, "adversarial_accuracy": whole.logs["accuracy"]})

        return Update(loss, player, logs={"zero_gradient": attacked.zero_gradient.float().mean()})

    def _one_after_the_other(self, model: RoutedModel, x: Tensor, y: Tensor, rng: SampleRng) -> _Attacked:
        """First the mixture, then the experts that its route at the perturbed images leaves to be regularised."""
        found = self._mixture_attack().search(model, x, y, rng=rng)
        routes = self._routes(model, x, found.x_adv)
        # one search for all ranks: each expert then runs once a step, on all of its images
        stacked, count = _stack(routes), len(routes)
        points = torch.cat([found.x_adv] * count)
        if self.choices.kl_point == "own":
            repeated = rng.fold("own").repeated(count)
            points = (
                self._held("experts")
                .search(model, torch.cat([x] * count), y.repeat(count), rng=repeated, route=stacked)
                .x_adv
            )
        return _Attacked(found.x_adv, stacked, points, count, found.zero_gradient)

    def _side_by_side(self, model: RoutedModel, x: Tensor, y: Tensor, rng: SampleRng) -> _Attacked | None:
        """The mixture and its experts in one search, where the clean images say which experts; else None."""
        choices = self.choices
        known = choices.chosen_on == "clean" or choices.regularised == "all"
        if not (known and choices.kl_point == "own" and choices.inner == "cross_entropy"):
            return None
        with torch.no_grad(), frozen(model):
            gate = model.gate(x)
        if not (isinstance(gate, Route) and gate.experts.shape[1] == 1):
            return None
        routes = self._regularised(gate)
        free = Route(gate.scores, torch.full_like(gate.experts, UNDECIDED), gate.weights)
        times = 1 + len(routes)
        found = self._held("held").search(
            model, torch.cat([x] * times), y.repeat(times), rng=rng.repeated(times), route=_stack([free, *routes])
        )
        return _Attacked(
            found.x_adv[: len(x)], _stack(routes), found.x_adv[len(x) :], len(routes), found.zero_gradient[: len(x)]
        )

    def _mixture_attack(self) -> Attack:
        return JointInner.of(self.attack, self._kl_gain) if self.choices.inner == "joint" else self.attack

    def _held(self, surface: str) -> AnyAttack:
        """The attack under a route that is given to it."""
        return replace(self.attack, surface=surface)

    def _kl_gain(self, model: RoutedModel, x: Tensor, x_adv: Tensor) -> Tensor:
        """(B,) beta KL of each image, over the experts that are regularised at this `x_adv`."""
        routes = self._routes(model, x, x_adv.detach())
        stacked = _stack(routes)
        clean, attacked = (model.routed(torch.cat([images] * len(routes)), stacked).logits for images in (x, x_adv))
        labels = stacked.experts[:, 0]  # the divergence reads none
        kl_RB = OBJECTIVES["kl"](Routed(attacked, None), Routed(clean, None), labels).reshape(len(routes), -1)
        return self.beta * (kl_RB.sum(0) if self.choices.kl_reduction == "sum" else kl_RB.mean(0))

    @torch.no_grad()
    def _routes(self, model: RoutedModel, x: Tensor, x_adv: Tensor) -> list[Route]:
        """R routes of the batch to one expert each, those regularised, the best first ("all": in their order)."""
        with frozen(model):
            route = model.gate(x_adv if self.choices.chosen_on == "adversarial" else x)
        if not isinstance(route, Route):
            raise self._several_gates()
        return self._regularised(route)

    def _regularised(self, route: Route) -> list[Route]:
        """The same from the gate's route."""
        if self.choices.regularised == "all":
            experts_BR = torch.arange(route.num_experts, device=route.scores.device).expand_as(route.scores)
        else:
            self._check_idle(route.experts.shape[1], route.num_experts)
            experts_BR = _idle_experts(route)
        if self.choices.regularised == "second":
            experts_BR = experts_BR[:, :1]
        weights_B1 = torch.ones_like(route.scores[:, :1])
        return [Route(route.scores, expert_B1, weights_B1) for expert_B1 in torch.split(experts_BR, 1, dim=1)]

    def _several_gates(self) -> InputError:
        return InputError(
            f"{self.name} trains a mixture of whole networks, got a model with several gates; use another method"
        )

    def _check_idle(self, selected: int, num_experts: int) -> None:
        if self.choices.regularised == "all" or selected < num_experts:
            return
        raise InputError(
            f"{self.name} needs a non-selected expert: top_k={selected} of {num_experts} experts; "
            + ("raise model.experts" if num_experts == 1 else "lower model.top_k")
        )


def _idle_experts(route: Route) -> Tensor:
    """(B, E - K) the experts that the gate leaves idle, best first."""
    others_BE = route.scores.scatter(-1, route.experts, float("-inf"))
    order_BE = others_BE.sort(dim=-1, descending=True, stable=True).indices
    return order_BE[:, : route.num_experts - route.experts.shape[1]]


def _stack(routes: list[Route]) -> Route:
    """One route for the batch repeated R times."""
    parts = zip(*((route.scores, route.experts, route.weights) for route in routes), strict=True)
    return Route(*(torch.cat(part) for part in parts))
