"""The attack on both halves of a dual model at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from phalanx.attacks.aims import AimedAttack
from phalanx.attacks.target import Target, wrong_classes


@dataclass(frozen=True, kw_only=True)
class JointMargin(AimedAttack):
    """For each wrong class k and weight L: drive the standard half to k, hold it there, and spend the rest of the
    budget on the robust half's margin against the same k (objective "joint-L" on surface "halves").

    The cheapest error of a mixture of probabilities puts all of S's mass on the class against which R's margin is
    closed. Cross-entropy lowers the label without agreeing on that class, a confident S has no gradient in the mixture,
    and one that has turned gets none to stay so. Verdicts are the dual model's.

    Costs `classes` (by default all C - 1) times the number of weights searches of `steps`, each gradient one pass of
    both halves, on whatever still stands. Raises InputError for a model that is not a `DualModel`.
    """

    name: Literal["joint_margin"] = "joint_margin"
    objective: str = "joint-1"
    """Fixed: the weights are `robust_weights`."""
    surface: str = "halves"
    """Fixed."""
    steps: int = 50
    """Gradient steps for each class and weight."""
    classes: int = 0
    """Aim at the most likely wrong classes of the clean image, so many, one after the other; 0 takes them all."""
    robust_weights: tuple[int, ...] = (1, 10)
    """Weights L of the robust half's margin, tried in this order for each class: 1..9999."""

    def __post_init__(self) -> None:
        self._check_fixed("the joint margin attack", objective="joint-1", surface="halves", targeted=False)
        super().__post_init__()
        distinct = set(self.robust_weights)
        if not distinct or len(distinct) < len(self.robust_weights) or not distinct <= set(range(1, 10_000)):
            raise ValueError(
                f"robust_weights must hold different whole numbers in 1..9999, got {self.robust_weights}; "
                "for example (1, 10)"
            )

    def _aims(self, target: Target) -> Iterator[Target]:
        for wanted, weight in itertools.product(wrong_classes(target, self.classes), self.robust_weights):
            yield replace(target, objective=f"joint-{weight}", wanted=wanted)
