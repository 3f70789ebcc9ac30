"""Methods that no recipe has: two players in turn, and faults on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.methods.base import LabelledBatch, Loss, Stateless, Update, classification_loss
from phalanx.rng import Rng
from phalanx.routing import RoutedModel
from phalanx.threat import ThreatModel


@dataclass(frozen=True)
class TurnByTurn:
    """The router moves on one stream, then the experts on another; its state, a count of steps, weighs the loss."""

    name: str = "turns"
    count: list[int] = field(default_factory=lambda: [0])
    streams: ClassVar[tuple[str, ...]] = ("router", "experts")

    def check(self, model: RoutedModel, num_classes: int) -> None:
        """Any model with these two players."""

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        weight = 1 / (1 + self.count[0])
        for player in self.streams:
            batch = batches[player]
            noise = rng.samples(batch.ids).normal(player, batch.x.shape[1:])
            x = (batch.x + 0.05 * noise).clamp(0, 1)
            yield Update(lambda x=x, y=batch.y: classification_loss(model, x, y, weight), player)
        self.count[0] += 1

    def within(self, threat: ThreatModel) -> Self:
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count[0]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count[0] = state["count"]


@dataclass(frozen=True)
class Loop(Stateless):
    """Cross-entropy, except that `change` may replace the loss; it is given the model, the step and the loss."""

    change: Callable[[RoutedModel, int, Tensor], Tensor]
    name: str = "loop"
    step: list[int] = field(default_factory=lambda: [0])
    streams: ClassVar[tuple[str, ...]] = ("train",)

    def updates(self, model: RoutedModel, batches: Mapping[str, LabelledBatch], rng: Rng) -> Iterator[Update]:
        batch, step = batches["train"], self.step[0]
        self.step[0] += 1
        yield Update(lambda: Loss(self.change(model, step, F.cross_entropy(model(batch.x), batch.y))))

    def within(self, threat: ThreatModel) -> Self:
        return self


def without_value_but_with_nan_gradient(parameter: Tensor) -> Tensor:
    """0, whose derivative in `parameter` is 0 * inf."""
    return (parameter * 0).sum().sqrt()


def nan() -> Tensor:
    return torch.tensor(float("nan"))
