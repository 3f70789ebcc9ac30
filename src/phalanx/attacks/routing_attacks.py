"""Attacks that aim at the route, or at the experts whatever the route."""

# A samples given to the search, E experts

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from phalanx.attacks.aims import AimedAttack
from phalanx.attacks.surfaces import named_experts
from phalanx.attacks.target import Target, wrong_classes
from phalanx.routing import ProvableRouter, Route, RouteTree, leaves, reachable

MOST_COMBINATIONS = 16
"""So many combinations of experts of several gates are tried one by one."""


@dataclass(frozen=True, kw_only=True)
class RouteSteering(AimedAttack):
    """For each expert j in turn: send the image to j and make j err (objective "steer" on surface "expert-J").

    A top-1 mixture is as robust as the weakest expert that an attacker can reach, and the gradient of the deployed
    model does not show the way there: it belongs to the expert that answers now. The expert that answers already is
    attacked as well. Costs E searches of `steps` on whatever still stands, times `classes` where that is set. On a
    model without a route it is PGD, or APGD, on the margin; with a robust router, experts that are proved out of reach
    are left out and the others searched again instead.
    """

    name: Literal["route_steering"] = "route_steering"
    objective: str = "steer"
    steps: int = 50
    """Gradient steps for each expert and class."""
    classes: int = 0
    """Aim at the most likely wrong classes of the clean image, so many, one after the other; 0 takes any error."""
    combine: bool = False
    """Of a model with several gates, try every combination of their experts where there are at most 16, else every
    expert at all gates at once and every expert at each gate alone, the other gates deciding (surface "forced");
    otherwise only every expert at all gates at once."""

    def __post_init__(self) -> None:
        self._check_fixed("route steering", objective="steer", surface="whole", targeted=False)
        super().__post_init__()

    def spec(self) -> dict[str, Any]:
        """Without `combine` where that is not asked for, as for the search."""
        found = super().spec()
        if not self.combine:
            del found["combine"]
        return found

    def _aims(self, target: Target) -> Iterator[Target]:
        assert target.clean is not None
        route = target.clean.route
        if route is None:
            yield replace(target, objective="margin")
            return
        errors: list[Tensor | None] = list(wrong_classes(target, self.classes)) if self.classes else [None]
        for wanted, sent in itertools.product(errors, self._sent(target, route)):
            yield replace(sent, objective="steer" if wanted is None else "steer_to", wanted=wanted)

    def _sent(self, target: Target, route: RouteTree) -> list[Target]:
        """The target on the surface of each expert, or combination of them, in turn."""
        proved = self._proved(target, route)
        if proved is not None:
            return proved
        sizes = [leaf.num_experts for leaf in leaves(route)]
        if not self.combine:
            return [replace(target, surface=f"expert-{expert}") for expert in range(max(sizes))]
        assert target.clean is not None
        named = [named_experts(route, choice) for choice in combinations(sizes)]
        return [replace(target, surface="forced", clean=target.clean._replace(route=tree)) for tree in named]

    def _proved(self, target: Target, route: RouteTree) -> list[Target] | None:
        """As many targets over the experts that are reachable, image by image, where the router proves which; an image
        with fewer than E of them meets each again, from another start, so that no search goes where it cannot end."""
        router = getattr(target.model, "router", None)
        found_AE = reachable(target.model, target.x, self.threat) if isinstance(router, ProvableRouter) else None
        if found_AE is None or not isinstance(route, Route):
            return None
        assert target.clean is not None
        first_AE = found_AE.int().argsort(dim=1, descending=True, stable=True)
        ones_A1 = torch.ones_like(route.scores[:, :1])
        sent = []
        for number in range(route.num_experts):
            experts_A1 = first_AE.gather(1, (number % found_AE.sum(1))[:, None])
            named = target.clean._replace(route=Route(route.scores, experts_A1, ones_A1))
            sent.append(replace(target, surface="forced", clean=named))
        return sent


def combinations(sizes: Sequence[int]) -> list[tuple[int | None, ...]]:
    """Which expert each of several gates is to choose, None for a gate that decides; `sizes` are their experts.

    All combinations, where there are at most `MOST_COMBINATIONS`. Else every number at all gates that have such an
    expert, and then every expert of each gate by itself: single layers and all of them together, not pairs.
    """
    if math.prod(sizes) <= MOST_COMBINATIONS:
        return list(itertools.product(*(range(size) for size in sizes)))
    together = [tuple(number if number < size else None for size in sizes) for number in range(max(sizes))]
    alone = [
        tuple(number if place == gate else None for place in range(len(sizes)))
        for gate, size in enumerate(sizes)
        for number in range(size)
        if size > 1
    ]
    return list(dict.fromkeys([*together, *alone]))


@dataclass(frozen=True, kw_only=True)
class ExpertTransfer(AimedAttack):
    """Each expert attacked by itself, wherever the image is sent (surfaces "expert-J"): what breaks one expert often
    breaks the one that answers, whose own gradient may show nothing.

    Costs E searches of `steps` on whatever still stands. On a model without a route it is one search on the whole.
    """

    name: Literal["expert_transfer"] = "expert_transfer"
    steps: int = 100
    """Gradient steps for each expert."""
    search_rule: Literal["pgd", "apgd"] = "apgd"
    """Fixed."""

    def __post_init__(self) -> None:
        self._check_fixed("expert transfer", surface="whole", targeted=False, classes=0, search_rule="apgd")
        super().__post_init__()

    def _aims(self, target: Target) -> Iterator[Target]:
        assert target.clean is not None
        route = target.clean.route
        if route is None:
            yield target
            return
        for expert in range(max(leaf.num_experts for leaf in leaves(route))):
            yield replace(target, surface=f"expert-{expert}")
