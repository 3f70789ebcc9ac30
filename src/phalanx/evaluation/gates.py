"""The gates of a model that have a choice, by name, and what changes in their decisions."""

# B batch, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.routing import DualModel, Route, RoutedModel, RouteTree, leaves
from phalanx.routing.stats import weights_by_expert

_SAME_WEIGHT = 1e-6
"""Weights of one expert that differ by less are one: float32 rounds."""


class GateLook(NamedTuple):
    """What one gate decides, clean and attacked."""

    name: str
    """"" for a single gate, "standard" or "robust" for a half of a dual model; with several gates "gate-0", "gate-1",
    ... from left to right ("standard.gate-0" in a half)."""
    leaf: int
    """Its place among the leaves of the model's, or of the half's, route."""
    clean: Route
    attacked: Route


def gates_of_part(prefix: str, clean: RouteTree | None, attacked: RouteTree | None) -> Iterator[GateLook]:
    """Every gate that has a choice, of a model (prefix "") or of a half of a dual one; none without a route."""
    if clean is None or attacked is None:
        return
    pairs = list(zip(leaves(clean), leaves(attacked), strict=True))
    for leaf, (before, after) in enumerate(pairs):
        if before.num_experts > 1:
            number = f"gate-{leaf}" if len(pairs) > 1 else ""
            yield GateLook(".".join(part for part in (prefix, number) if part), leaf, before, after)


def gates_of(model: Any, clean: RouteTree | None, attacked: RouteTree | None) -> list[GateLook]:
    """The same of a whole model: a dual model's gates are those of its halves."""
    if not isinstance(model, DualModel):
        return list(gates_of_part("", clean, attacked))
    assert isinstance(clean, tuple) and isinstance(attacked, tuple)
    pairs = zip(("standard", "robust"), clean, attacked, strict=True)
    return [gate for half, before, after in pairs for gate in gates_of_part(half, before, after)]


def routed_parts(model: Callable[..., Any]) -> dict[str, RoutedModel]:
    """What has gates of its own: the model as "", of a dual model its halves as "standard" and "robust"; empty for a
    model without a route."""
    if isinstance(model, DualModel):
        return {"standard": model.standard, "robust": model.robust}
    return {"": model} if isinstance(model, RoutedModel) else {}


def first_choice(route: Route) -> Tensor:
    """(B,) int64 the selected expert that weighs most."""
    return route.experts.take_along_dim(route.weights.argmax(-1, keepdim=True), -1).squeeze(-1)


def flips(before: Route, after: Route) -> Tensor:
    """(B,) bool: another set of experts is selected or, by a gate that selects them all, another one weighs most."""
    if before.experts.shape[1] == before.num_experts:
        return first_choice(before) != first_choice(after)
    return (before.experts.sort(-1).values != after.experts.sort(-1).values).any(-1)


def reweighs(before: Route, after: Route) -> Tensor:
    """(B,) bool: some expert has another weight."""
    return ((weights_by_expert(before) - weights_by_expert(after)).abs() > _SAME_WEIGHT).any(-1)


def joined(routes: Sequence[Route]) -> Route:
    """The decisions of one gate for one batch after the other, as one."""
    return Route(
        torch.cat([route.scores for route in routes]),
        torch.cat([route.experts for route in routes]),
        torch.cat([route.weights for route in routes]),
    )
