"""Networks whose losses can be worked out by hand, and the one pixel they look at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phalanx.data import Batch


class LogOdds(nn.Module):
    """Logits (weight * sum of pixels, 0): the odds of class 0 are exp(weight * sum)."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        score = self.weight * x.flatten(1).sum(1)
        return torch.stack([score, torch.zeros_like(score)], 1)


def pixel(value: float = 0.5) -> Batch:
    """One image of one pixel, of class 0."""
    return Batch(torch.full((1, 1, 1, 1), value, dtype=torch.float64), torch.tensor([0]), torch.arange(1))
