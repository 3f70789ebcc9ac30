"""RT-ER: adversarial training of the mixture, and of the experts that an attacker could send an image to."""

# B batch, E experts, K selected, R regularised, C classes

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from phalanx.attacks import PGD, AnyAttack
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
from phalanx.nn import frozen
from phalanx.rng import Rng
from phalanx.routing import Route, RoutedModel
from phalanx.threat import ThreatModel

Regularised = Literal["second", "all_others"]
ChosenOn = Literal["adversarial", "clean"]
KLPoint = Literal["shared", "own"]
Preset = Literal["paper", "code", "sound"]


class Choices(NamedTuple):
    """The disputed points of the method, settled."""

    regularised: Regularised
    chosen_on: ChosenOn
    kl_point: KLPoint


PRESETS: Mapping[Preset, Choices] = {
    "paper": Choices("second", "adversarial", "shared"),
    "code": Choices("second", "clean", "own"),
    "sound": Choices("all_others", "adversarial", "own"),
}


@dataclass(frozen=True, kw_only=True)
class RTER(Stateless):
    """CE(F(x + d), y) + beta mean_i KL(p_i(x) || p_i(x + d_i)), i over the regularised experts ("RT-ER").

    F is the whole mixture, d the attack on it; p_i is the softmax of expert i alone. The paper, its appendix and its
    released code disagree on i and on d_i: `preset` settles every point, and a field that is not None overrides it (a
    run's record shows both; `choices` is what holds). The KL is a mean over batch and regularised experts, so that
    `beta` weighs the same whatever E is, and both its branches carry gradient. The router learns from the
    cross-entropy and the balance loss.

    Every attack climbs its own objective (as in the released code); the paper's joint maximum over one d of
    cross-entropy plus beta KL is not offered, so its preset differs from the paper there. Attacks cost, in units of
    the attack on the mixture: "shared" 1, "own" with "second" 2, "own" with "all_others" 1 + E - K.
    """

    name: Literal["rt_er"] = "rt_er"
    attack: AnyAttack = field(default_factory=PGD)
    """On the mixture, and on each regularised expert by itself; its eps and norm are the recipe's threat unless set."""
    beta: float = 6.0
    """Weight of the KL term."""
    balance: float = 0.1
    """Weight of the load-balance loss; 0.5 keeps experts alive that 0.1 may lose."""
    preset: Preset = "sound"
    """Settles what is None below: as in the "paper", in its released "code", or as is "sound" against an attacker who
    chooses the route."""
    regularised: Regularised | None = None
    """The best expert that the gate did not select ("second"), or "all_others" that it did not select."""
    chosen_on: ChosenOn | None = None
    """The image whose route says which experts those are: x + d ("adversarial") or x ("clean")."""
    kl_point: KLPoint | None = None
    """d_i is the mixture's d ("shared"), or expert i's "own", the attack on that expert alone."""
    streams: ClassVar[tuple[str, ...]] = ("train",)

    def __post_init__(self) -> None:
        check_weight("beta", self.beta)
        check_weight("balance", self.balance)
        if self.attack.surface != "whole":
            raise ValueError(
                f"attack.surface must be 'whole', got {self.attack.surface!r}; rt_er itself aims at single experts"
            )
        if self.attack.name == "route_steering":
            raise ValueError("attack must be one that can aim at a single expert, got route_steering; use pgd")

    @property
    def choices(self) -> Choices:
        """The values that hold: the preset's, but for the fields that override them."""
        settled = PRESETS[self.preset]
        return Choices(
            self.regularised or settled.regularised,
            self.chosen_on or settled.chosen_on,
            self.kl_point or settled.kl_point,
        )

    def within(self, threat: ThreatModel) -> Self:
        return replace(self, attack=self.attack.within(threat))

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        batch, choices = batches["train"], self.choices
        x, y = batch.x, batch.y
        found = self.attack.search(model, x, y, rng=rng.fold("attack").samples(batch.ids))
        routes = _idle_routes(model, found.x_adv if choices.chosen_on == "adversarial" else x)
        if choices.regularised == "second":
            routes = routes[:1]
        points = [found.x_adv] * len(routes)
        if choices.kl_point == "own":
            points = [self._own_attack(model, batch, route, rng.fold("own", rank)) for rank, route in enumerate(routes)]
        # one dispatch for all ranks: each expert then runs once on all of its images
        stacked, points_RB = _stack(routes), torch.cat(points)
        x_RB = torch.cat([x] * len(routes))

        def loss() -> Loss:
            whole = classification_loss(model, found.x_adv, y, self.balance)
            kl = mean_kl(model.routed(x_RB, stacked).logits, model.routed(points_RB, stacked).logits)
            return with_divergence(whole, self.beta, kl)

        yield Update(loss, logs={"zero_gradient": found.zero_gradient.float().mean()})

    def _own_attack(self, model: RoutedModel, batch: LabelledBatch, route: Route, rng: Rng) -> Tensor:
        """(B, C, H, W): the attack on the one expert to which `route` sends each image."""
        attack = replace(self.attack, surface="experts")
        return attack.search(model, batch.x, batch.y, rng=rng.samples(batch.ids), route=route).x_adv


@torch.no_grad()
def _idle_routes(model: RoutedModel, x: Tensor) -> list[Route]:
    """E - K routes to one expert each: for every image, the experts that its gate leaves idle, best first.

    Raises InputError if there is none.
    """
    with frozen(model):
        route = model.gate(x)
    if not isinstance(route, Route):
        raise InputError("rt_er trains a mixture of whole networks, got a model with several gates; use another method")
    selected, num_experts = route.experts.shape[1], route.num_experts
    if selected == num_experts:
        raise InputError(
            f"rt_er needs a non-selected expert: top_k={selected} of {num_experts} experts; "
            + ("raise model.experts" if num_experts == 1 else "lower model.top_k")
        )
    others_BE = route.scores.scatter(-1, route.experts, float("-inf"))
    idle_BR = others_BE.sort(dim=-1, descending=True, stable=True).indices[:, : num_experts - selected]
    weights_B1 = torch.ones_like(route.scores[:, :1])
    return [Route(route.scores, expert_B1, weights_B1) for expert_B1 in torch.split(idle_BR, 1, dim=1)]


def _stack(routes: list[Route]) -> Route:
    """One route for the batch repeated R times."""
    parts = zip(*((route.scores, route.experts, route.weights) for route in routes), strict=True)
    return Route(*(torch.cat(part) for part in parts))
