"""TRADES: cross-entropy on clean images, and an answer that stays the same in the ball around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from phalanx.attacks import PGD, AnyAttack
from phalanx.methods.base import (
    LabelledBatch,
    Loss,
    Stateless,
    Update,
    accuracy_of,
    check_weight,
    loss_of_pass,
    mean_kl,
    with_divergence,
)
from phalanx.rng import Rng
from phalanx.routing import RoutedModel
from phalanx.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class TRADES(Stateless):
    """CE(f(x), y) + beta KL(p(x) || p(x')), x' the maximiser of that KL (Zhang et al. 2019, eq. 5; beta = 1 / lambda).

    f is the whole mixture, gate included; both terms are batch means and gradient flows through both branches. The
    balance loss is that of the clean pass. One deviation from the authors' code: the attack starts uniformly in the
    ball rather than at x + 0.001 N(0, 1), which is its `gaussian_start`; either leaves x, where the gradient of the KL
    is zero. On a network with routed layers, without balance loss, it is AdvMoE's baseline "AT (MoE)".
    """

    name: Literal["trades"] = "trades"
    attack: AnyAttack = field(default_factory=lambda: PGD(objective="kl"))
    """The inner maximisation, of objective "kl"; its eps and norm are the recipe's threat unless set here."""
    beta: float = 6.0
    """Weight of the KL term."""
    balance: float = 0.1
    """Weight of the load-balance loss."""
    streams: ClassVar[tuple[str, ...]] = ("train",)

    def __post_init__(self) -> None:
        check_weight("beta", self.beta)
        check_weight("balance", self.balance)
        check_divergence_attack(self.attack, self.name)

    def within(self, threat: ThreatModel) -> Self:
        return replace(self, attack=self.attack.within(threat))

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        x, y, ids = batches["train"].x, batches["train"].y, batches["train"].ids
        found = self.attack.search(model, x, y, rng=rng.fold("attack").samples(ids))

        def loss() -> Loss:
            clean = model.routed(x)
            adv_logits = model.routed(found.x_adv).logits
            whole = loss_of_pass(clean, y, self.balance)
            loss = with_divergence(whole, self.beta, mean_kl(clean.logits, adv_logits))
            return Loss(loss.value, {**loss.logs, "adversarial_accuracy": accuracy_of(adv_logits, y)})

        yield Update(loss, logs={"zero_gradient": found.zero_gradient.float().mean()})


def check_divergence_attack(attack: AnyAttack, method: str) -> None:
    """Raises ValueError unless `attack` climbs the KL, from where that has a gradient."""
    if attack.objective != "kl":
        raise ValueError(
            f"attack.objective must be 'kl', the term that {method} climbs, got {attack.objective!r}; "
            "set it, or use method at"
        )
    if not getattr(attack, "random_start", False):
        raise ValueError(
            f"attack must start at random, got {attack.name} from the clean image, "
            "where the KL has no gradient; use pgd with random_start"
        )
