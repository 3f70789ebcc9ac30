"""Models that know nothing of Phalanx, for `--model foreign_models:NAME`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def linear() -> nn.Module:
    """Ten classes of digits, the same weights each time."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(10, 64, generator=generator))
        model[1].bias.zero_()
    return model


def probabilities() -> nn.Module:
    return nn.Sequential(linear(), nn.Softmax(-1))


def eleven() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 11))


def three_channels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))


def number() -> int:
    return 3


class Crowded(nn.Module):
    """Its answer to an image depends on how many it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x)
        return logits.roll(len(x) % 2, -1)
