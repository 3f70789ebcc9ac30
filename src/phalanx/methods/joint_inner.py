"""An inner maximum over two terms at one point: an attack that climbs something besides its objective."""

# A samples given to the search

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeAlias

from torch import Tensor

from phalanx.attacks import AnyAttack, Attack, Found, Target
from phalanx.rng import SampleRng
from phalanx.routing import RoutedModel

Term: TypeAlias = Callable[[RoutedModel, Tensor, Tensor], Tensor]
"""(model, clean images, attacked images), both (A, C, H, W), to a gain (A,)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _JointTarget(Target):
    """A target whose gain is the objective's plus `term`'s."""

    term: Term

    def _gain(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        gain, logits = super()._gain(x_adv)
        assert isinstance(self.search, RoutedModel)
        return gain + self.term(self.search, self.x, x_adv), logits


@dataclass(frozen=True, kw_only=True)
class JointInner(Attack):
    """`attack`'s own search, step by step, with `term` added to what it climbs."""

    attack: AnyAttack
    term: Term

    @classmethod
    def of(cls, attack: AnyAttack, term: Term) -> Self:
        """In the ball of `attack`, and with its objective."""
        return cls(
            eps=attack.eps,
            norm=attack.norm,
            objective=attack.objective,
            targeted=attack.targeted,
            attack=attack,
            term=term,
        )

    @property
    def gradient_steps(self) -> int:
        return self.attack.gradient_steps

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        return self.attack.perturb(_JointTarget(**vars(target), term=self.term), rng)
