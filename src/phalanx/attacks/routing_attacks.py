"""Attacks that aim at the route."""

# A samples given to the search, E experts

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from phalanx.attacks.aims import AimedAttack, wrong_classes
from phalanx.attacks.target import Target
from phalanx.routing import leaves


@dataclass(frozen=True, kw_only=True)
class RouteSteering(AimedAttack):
    """For each expert j in turn: send the image to j and make j err (objective "steer" on surface "expert-J").

    A top-1 mixture is as robust as the weakest expert that an attacker can reach, and the gradient of the deployed
    model does not show the way there: it belongs to the expert that answers now. Costs E searches of `steps` on
    whatever still stands, times `classes` where that is set. On a model without a route it is PGD on the margin.
    """

    name: Literal["route_steering"] = "route_steering"
    objective: str = "steer"
    steps: int = 50
    """Gradient steps for each expert and class."""
    classes: int = 0
    """Aim at the most likely wrong classes of the clean image, so many, one after the other; 0 takes any error."""

    def __post_init__(self) -> None:
        self._check_fixed("route steering", objective="steer", surface="whole", targeted=False)
        super().__post_init__()

    def _aims(self, target: Target) -> Iterator[Target]:
        assert target.clean is not None
        route = target.clean.route
        if route is None:
            yield replace(target, objective="margin")
            return
        experts = range(max(leaf.num_experts for leaf in leaves(route)))
        errors: list[Tensor | None] = list(wrong_classes(target, self.classes)) if self.classes else [None]
        for wanted, expert in itertools.product(errors, experts):
            objective = "steer" if wanted is None else "steer_to"
            yield replace(target, surface=f"expert-{expert}", objective=objective, wanted=wanted)
