"""Standard training: cross-entropy on clean images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from phalanx.methods.base import LabelledBatch, Stateless, Update, check_weight, classification_loss
from phalanx.rng import Rng
from phalanx.routing import RoutedModel
from phalanx.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class ST(Stateless):
    """Empirical risk minimisation, plus the router's load balance: the papers' "ST"."""

    name: Literal["st"] = "st"
    balance: float = 0.1
    """Weight of the load-balance loss; 0 lets a trained router send every image to one expert."""
    streams: ClassVar[tuple[str, ...]] = ("train",)

    def __post_init__(self) -> None:
        check_weight("balance", self.balance)

    def within(self, threat: ThreatModel) -> Self:
        del threat
        return self

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        del rng
        batch = batches["train"]
        yield Update(lambda: classification_loss(model, batch.x, batch.y, self.balance))
