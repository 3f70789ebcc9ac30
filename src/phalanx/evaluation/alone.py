"""One expert of a mixture as a network by itself: what it answers, and what an attack on it alone finds."""

# B batch, E experts

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from phalanx.attacks import Attack
from phalanx.data import Batch
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.rng import SampleRng, derive_seed
from phalanx.routing import (
    MixtureOfExperts,
    Route,
    Routed,
    RoutedModel,
    RouteTree,
    SynergyOfExperts,
    map_route,
    only,
    routed,
)


@dataclass(frozen=True)
class ExpertCounts:
    """One expert, judged as a network by itself."""

    n: int
    """Images it was judged on."""
    clean: int
    """Of these, how many it answers correctly."""
    robust: int
    """Of these, how many it still answers correctly under an attack on it alone."""


class Alone(nn.Module):
    """Logits (B, C) with gates forced to one expert: the gate at place `leaf` of the route, any other deciding as it
    does without that, or for None every gate that has such an expert, as on the surface "expert-J".

    It has no route: attacks see a plain network. Where a mixture has one gate it is not asked: in a Synergy-of-Experts
    that would run every sub-model. Otherwise its scores are computed for nothing, for a definition that fits them all.
    """

    def __init__(self, model: RoutedModel, expert: int, leaf: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.expert = expert
        self.leaf = leaf

    def forward(self, x: Tensor) -> Tensor:
        return self.model.routed(x, self._route(x)).logits

    def _route(self, x: Tensor) -> RouteTree:
        if isinstance(self.model, MixtureOfExperts | SynergyOfExperts) and self.leaf in (0, None):
            undecided = x.new_zeros(len(x), len(self.model.experts))
            return only(Route(undecided, undecided.long(), undecided), self.expert)
        position = itertools.count()

        def force(route: Route) -> RouteTree:
            meant = self.leaf in (next(position), None) and self.expert < route.num_experts
            return only(route, self.expert) if meant else route

        return map_route(force, self.model.gate(x))


class AloneResult(NamedTuple):
    """One expert by itself on a batch, where the model is."""

    right: Tensor
    """(B,) bool: its answer to the clean image is right, and finite."""
    robust: Tensor
    """(B,) bool: under the attack on it alone, too."""
    x_adv: Tensor
    """(B, ...) what the attack returned."""


@torch.no_grad()
def answer(model: Callable[[Tensor], Any], x: Tensor) -> Routed:
    """The model's answer as a verdict asks for it: in evaluation mode, float32 without TF32, torch's random state kept;
    the model is left as it was."""
    with frozen(model), exact_fp32(), preserved_rng():
        return routed(model, x)


def right(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) bool: the answers (B, C) are finite, and right."""
    return (logits.argmax(-1) == y) & logits.isfinite().all(-1)


def attacked_alone(
    model: RoutedModel, num_experts: int, batch: Batch, attack: Attack, seed: int, *, leaf: int | None = None
) -> Iterator[AloneResult]:
    """Each expert in turn by itself, see `Alone`, under `attack`; each has random numbers of its own."""
    for expert in range(num_experts):
        network = Alone(model, expert, leaf)
        right_B = right(answer(network, batch.x).logits, batch.y)
        result = attack.run(network, batch.x, batch.y, rng=SampleRng(derive_seed(seed, expert), batch.ids))
        yield AloneResult(right_B, right_B & ~(result.broken | result.invalid), result.x_adv)


def expert_counts(judged_NE: Tensor, right_NE: Tensor, robust_NE: Tensor) -> tuple[ExpertCounts, ...]:
    """(E,) of the images (N, E) that each expert is judged on."""
    columns = ((judged_NE & counted_NE).sum(0).tolist() for counted_NE in (judged_NE, right_NE, robust_NE))
    return tuple(itertools.starmap(ExpertCounts, zip(*columns, strict=True)))
