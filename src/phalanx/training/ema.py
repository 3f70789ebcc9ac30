"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """`model` is a copy that follows the trained one: parameters and floating buffers (BatchNorm's statistics) are
    averaged, integer buffers copied. Early steps use the smaller decay (1 + step) / (10 + step), so that the initial
    weights are forgotten."""

    def __init__(self, trained: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(trained).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, trained: nn.Module, step: int) -> None:
        """Moves towards the weights after the 0-based `step`."""
        decay = min(self._decay, (1 + step) / (10 + step))
        theirs = trained.state_dict()
        for name, mine in self.model.state_dict().items():
            if mine.is_floating_point():
                mine.lerp_(theirs[name], 1 - decay)
            else:
                mine.copy_(theirs[name])
