"""Closed Ranks: every expert is trained on every image that an attacker can send to it."""

# B batch, E experts, P pairs of an image and an expert, C classes

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.attacks import PGD, AnyAttack
from phalanx.errors import InputError
from phalanx.methods.base import LabelledBatch, Loss, Stateless, Update, check_weight
from phalanx.methods.trades import check_divergence_attack
from phalanx.nn import frozen
from phalanx.rng import Rng, SampleRng
from phalanx.routing import MixtureOfExperts, RobustRouter, Route, RoutedModel
from phalanx.threat import ThreatModel

Form = Literal["rand", "sum"]
Term = Literal["cross_entropy", "trades", "margin"]


class _Pairs(NamedTuple):
    """Images and the experts that learn from them."""

    rows: Tensor
    """(P,) int64 positions in the batch."""
    experts: Tensor
    """(P,) int64."""


@dataclass(frozen=True, kw_only=True)
class ClosedRanks(Stateless):
    """(1 / B) sum_x sum_{j in R(x)} l(f_j, x + d_j), R(x) the experts reachable from x, d_j the attack on f_j alone.

    The router is a `RobustRouter`, fitted before training and frozen; R(x) is its closed form, `reachable`.
    With l the cross-entropy the sum bounds the worst case of the deployed top-1 mixture whatever the attacker does to
    the route: max_d CE(f_{r(x + d)}(x + d)) <= max_{j in R} max_d CE(f_j(x + d)) <= the sum. d_j is not held to where
    the route is j, so it is no weaker than any attack that steers. Only experts move, and there is no balance loss.

    What a step costs per image, in forward + backward passes of one expert with K attack steps: K + 1 for "rand", mean
    reach times as much for "sum"; AT of one network K + 1. Term "trades" adds two forward passes.
    """

    name: Literal["closed_ranks"] = "closed_ranks"
    form: Form = "rand"
    """One expert drawn from R(x) for each image and step, all equally likely ("rand"), or all of them ("sum")."""
    term: Term = "cross_entropy"
    """What each expert goes down: the "cross_entropy" of its attacked images; "trades", clean cross-entropy + beta
    KL(clean, attacked); or "margin", log(1 + exp(max z_k - z_y)) of its attacked images."""
    attack: AnyAttack = field(default_factory=PGD)
    """On one expert by itself; its eps and norm are the recipe's threat unless set here. For term trades its objective
    must be "kl"; for margin, "margin" climbs what the experts go down."""
    beta: float = 6.0
    """Weight of the KL of term trades."""
    streams: ClassVar[tuple[str, ...]] = ("train",)

    def __post_init__(self) -> None:
        check_weight("beta", self.beta)
        if self.attack.surface != "whole":
            raise ValueError(
                f"attack.surface must be 'whole', got {self.attack.surface!r}; "
                f"{self.name} itself aims at single experts"
            )
        try:
            replace(self.attack, surface="experts")
        except ValueError:
            raise ValueError(
                f"attack must be one that can aim at a single expert, got {self.attack.name}; use pgd"
            ) from None
        if self.term == "trades":
            check_divergence_attack(self.attack, f"{self.name} with term trades")

    def within(self, threat: ThreatModel) -> Self:
        return replace(self, attack=self.attack.within(threat))

    def check(self, model: RoutedModel, num_classes: int) -> None:
        """Raises InputError unless `model` is a top-1 mixture behind a robust router fitted for the training threat."""
        del num_classes
        router = _router(model)
        if "router" in model.players():
            raise InputError("closed_ranks trains behind a frozen router; build the mixture with train_router=False")
        ours, theirs = self.attack.threat, router.threat
        if (ours.norm, ours.epsilon) != (theirs.norm, theirs.epsilon):
            raise InputError(
                f"the router was fitted for {theirs}, the training attack has {ours}; fit it for the same: "
                "leave out model.router.eps and norm, and method.attack.eps and norm"
            )

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        batch = batches["train"]
        streams = rng.fold("attack").samples(batch.ids)
        reach_BE = _router(model).reachable(batch.x, self.attack.threat)
        pairs = _all_of(reach_BE) if self.form == "sum" else _one_each(reach_BE, rng.fold("expert").samples(batch.ids))
        # the first expert's searches are those that AT of one network would make
        own = SampleRng(streams.seed, streams.keys[pairs.rows] + (pairs.experts << 48))
        x, y = batch.x[pairs.rows], batch.y[pairs.rows]
        route = _route(pairs, reach_BE)
        found = replace(self.attack, surface="experts").search(model, x, y, rng=own, route=route)
        logs = {
            "zero_gradient": found.zero_gradient.float().mean(),
            "reach": reach_BE.sum(1).float().mean(),
            "load": _load(model, batch.x),
        }

        def loss() -> Loss:
            return self._loss(model, route, x, found.x_adv, y, len(batch.x))

        yield Update(loss, logs=logs)

    def _loss(self, model: RoutedModel, route: Route, x: Tensor, x_adv: Tensor, y: Tensor, images: int) -> Loss:
        """The term of all pairs over the number of `images`."""
        attacked_PC = model.routed(x_adv, route).logits
        logs = {"adversarial_accuracy": (attacked_PC.detach().argmax(-1) == y).float().mean()}
        if self.term == "cross_entropy":
            value = F.cross_entropy(attacked_PC, y, reduction="sum")
        elif self.term == "margin":
            true_P1 = y[:, None]
            others_P = attacked_PC.scatter(-1, true_P1, float("-inf")).amax(-1)
            value = F.softplus(others_P - attacked_PC.gather(-1, true_P1)[:, 0]).sum()
        else:
            clean_PC = model.routed(x, route).logits
            log_p_PC, log_q_PC = clean_PC.log_softmax(-1), attacked_PC.log_softmax(-1)
            kl = F.kl_div(log_q_PC, log_p_PC, reduction="sum", log_target=True)
            value = F.cross_entropy(clean_PC, y, reduction="sum") + self.beta * kl
            logs["kl"] = kl.detach() / images
        return Loss(value / images, logs)


def _router(model: RoutedModel) -> RobustRouter:
    """Raises InputError unless `model` is a top-1 mixture behind a robust router."""
    if not isinstance(model, MixtureOfExperts):
        raise InputError(f"closed_ranks trains a mixture of whole networks, got a {type(model).__name__}; use another")
    if not isinstance(model.router, RobustRouter):
        have = "a single network" if model.router is None else f"a {type(model.router).__name__}"
        raise InputError(
            f"closed_ranks needs a mixture behind a robust router, got {have}; "
            "set model.router.name=robust and model.experts to at least 2"
        )
    if model.top_k != 1:
        raise InputError(f"closed_ranks needs top_k=1, one expert for each image, got {model.top_k}; set model.top_k=1")
    return model.router


def _all_of(reach_BE: Tensor) -> _Pairs:
    rows, experts = reach_BE.nonzero(as_tuple=True)
    return _Pairs(rows, experts)


def _one_each(reach_BE: Tensor, rng: SampleRng) -> _Pairs:
    """One reachable expert for each image, all equally likely."""
    count_B = reach_BE.sum(1)
    chosen_B = (rng.uniform("reachable") * count_B).long().clamp_max(count_B - 1)
    # the expert at which so many have been passed
    experts_B = (reach_BE.cumsum(1) > chosen_B[:, None]).int().argmax(1)
    return _Pairs(torch.arange(len(reach_BE), device=reach_BE.device), experts_B)


def _route(pairs: _Pairs, reach_BE: Tensor) -> Route:
    """Every pair to its expert with weight 1."""
    scores_PE = torch.zeros(len(pairs.rows), reach_BE.shape[1], device=reach_BE.device)
    return Route(scores_PE, pairs.experts[:, None], torch.ones_like(scores_PE[:, :1]))


@torch.no_grad()
def _load(model: RoutedModel, x: Tensor) -> Tensor:
    """(E,) the share of images (B, ...) that each expert answers."""
    with frozen(model):
        route = model.gate(x)
    assert isinstance(route, Route)
    return (route.experts == torch.arange(route.num_experts, device=x.device)).float().mean(0)
