"""Attacks that aim at the route."""

# A samples given to the search, E experts, C classes

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from phalanx.attacks.base import Attack
from phalanx.attacks.pgd import PGD
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.rng import SampleRng
from phalanx.routing import leaves


@dataclass(frozen=True, kw_only=True)
class RouteSteering(Attack):
    """For each expert j in turn: send the image to j and make j err (objective "steer" on surface "expert-J").

    A top-1 mixture is as robust as the weakest expert that an attacker can reach, and the gradient of the deployed
    model does not show the way there: it belongs to the expert that answers now. Costs E searches of `steps` on
    whatever still stands, times `classes` where that is set. On a model without a route it is PGD on the margin.
    """

    name: Literal["route_steering"] = "route_steering"
    objective: str = "steer"
    steps: int = 50
    """Gradient steps for each expert and class."""
    step_size: float | str | None = None
    """Length of a step in pixel units; by default eps / 4."""
    classes: int = 0
    """Aim at the most likely wrong classes of the clean image, so many, one after the other; 0 takes any error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, fixed in (("objective", "steer"), ("surface", "whole"), ("targeted", False)):
            if getattr(self, field) != fixed:
                raise ValueError(f"{field} of route steering is fixed, got {getattr(self, field)!r}; leave it out")
        if self.classes < 0:
            raise ValueError(f"classes must be at least 0, got {self.classes}")
        # checks steps and step_size
        self._search()

    @property
    def reads_clean_pass(self) -> bool:
        return True

    @property
    def gradient_steps(self) -> int:
        return self.steps

    def _search(self) -> PGD:
        return PGD(
            eps=self.eps,
            norm=self.norm,
            steps=self.steps,
            step_size=self.step_size,
            keep="best",
            early_drop=True,
        )

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        assert target.clean is not None
        route = target.clean.route
        if route is None:
            return self._search().perturb(replace(target, objective="margin"), rng)
        experts = range(max(leaf.num_experts for leaf in leaves(route)))
        found: Found | None = None
        for attempt, (wanted, expert) in enumerate(itertools.product(self._aims(target), experts)):
            objective = "steer" if wanted is None else "steer_to"
            aim = replace(target, surface=f"expert-{expert}", objective=objective, wanted=wanted)
            found = self._once_more(attempt, aim, rng, found)
        assert found is not None
        return found

    def _aims(self, target: Target) -> list[Tensor | None]:
        """One (A,) tensor of classes per aim, likeliest first; [None] for any error."""
        if not self.classes:
            return [None]
        assert target.clean is not None
        logits_AC = target.clean.logits.scatter(-1, target.y[:, None], float("-inf"))
        order_AC = logits_AC.argsort(-1, descending=True)
        return [order_AC[:, rank] for rank in range(min(self.classes, logits_AC.shape[1] - 1))]

    def _once_more(self, attempt: int, aim: Target, rng: SampleRng, found: Found | None) -> Found:
        """One more search, of the samples that none before has lost; an error replaces what was there."""
        if found is None:
            return self._search().perturb(aim, rng)
        rows = (found.first_success < 0).nonzero().squeeze(1)
        if not len(rows):
            return found
        part = self._search().perturb(aim[rows], rng[rows].fold(attempt))
        queries = found.queries.index_add(0, rows, part.queries)
        won = part.first_success >= 0
        part = part._replace(
            restart=torch.full_like(part.restart, attempt),
            first_success=part.first_success + attempt * self.steps,
        )
        merged = (
            whole.index_copy(0, rows[won], new[won].to(whole.dtype)) for whole, new in zip(found, part, strict=True)
        )
        return Found(*merged)._replace(queries=queries)
