"""Standard training: cross-entropy on clean images, or on noisy ones for randomised smoothing."""

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
    noise: float = 0.0
    """Standard deviation of the Gaussian noise added to every training image, in pixel units of [0, 1]; what is then
    smoothed with the same (Cohen et al. 2019, section 3.3). As there nothing is clamped to [0, 1]."""
    streams: ClassVar[tuple[str, ...]] = ("train",)

    def __post_init__(self) -> None:
        check_weight("balance", self.balance)
        check_weight("noise", self.noise)

    def within(self, threat: ThreatModel) -> Self:
        del threat
        return self

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        batch = batches["train"]
        if not self.noise:
            yield Update(lambda: classification_loss(model, batch.x, batch.y, self.balance))
            return
        noise = self.noise * rng.samples(batch.ids).normal("noise", batch.x.shape[1:], dtype=batch.x.dtype)
        logs = {"noise": noise.square().mean().sqrt()}
        yield Update(lambda: classification_loss(model, batch.x + noise, batch.y, self.balance), logs=logs)
