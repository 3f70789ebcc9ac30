"""Models and images whose every verdict can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from phalanx.data import ImageSet
from phalanx.routing import MixtureOfExperts, Routed, RouteTree
from phalanx.threat import ThreatModel

THREAT = ThreatModel("Linf", "2/16")
"""Two grey levels a pixel: four on the sum of two."""


class Bright(nn.Module):
    """Class 1 if two pixels are brighter than `threshold` sixteenths together."""

    def __init__(self, threshold: float = 16.0) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))
        self._passes = 0

    @property
    def passes(self) -> int:
        return self._passes

    def forward(self, x: Tensor) -> Tensor:
        self._passes += 1
        margin = 16 * x.flatten(1).sum(1) - self.threshold
        return torch.stack([-margin, margin], 1)


def images(*pairs: tuple[tuple[int, int], int]) -> ImageSet:
    """Two-pixel images of 16 grey levels, each with its label; ids from 100."""
    pixels = np.array([pair for pair, _ in pairs], dtype=np.uint8).reshape(-1, 1, 1, 2)
    labels = np.array([label for _, label in pairs], dtype=np.int64)
    return ImageSet(pixels, labels, np.arange(100, 100 + len(pairs)), 16)


FIVE = images(
    ((12, 12), 1),  # 8 above: 4 do not reach
    ((9, 9), 1),  # 2 above: broken
    ((9, 9), 0),  # wrong already
    ((7, 6), 0),  # 3 below: broken
    ((4, 4), 0),  # 8 below
)
CLEAN = ["held", "held", "broken", "held", "held"]
ATTACKED = {100: "held", 101: "broken", 103: "broken", 104: "held"}
"""By id; what is wrong already is not attacked."""


def two_experts() -> MixtureOfExperts:
    """Dark images go to expert 0, bright ones to expert 1; both are `Bright`."""
    router = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        router[1].weight.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
        router[1].bias.copy_(torch.tensor([1.0, -1.0]))
    return MixtureOfExperts(router, [Bright(), Bright()])


class Sum(nn.Module):
    """Two mixtures, added up: a route of two leaves."""

    def __init__(self, *parts: MixtureOfExperts) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x).logits

    def gate(self, x: Tensor) -> RouteTree:
        return tuple(part.gate(x) for part in self.parts)

    def routed(self, x: Tensor, route: RouteTree | None = None) -> Routed:
        route = self.gate(x) if route is None else route
        answers = [part.routed(x, leaf).logits for part, leaf in zip(self.parts, route, strict=True)]
        return Routed(answers[0] + answers[1], route)

    def players(self) -> dict[str, Sequence[nn.Parameter]]:
        return {"experts": list(self.parameters())}
