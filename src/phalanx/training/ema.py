"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn


class Average:
    """`model` is a copy that follows the trained one: parameters and floating buffers (BatchNorm's statistics) are
    averaged, integer buffers copied. Up to step `start` it is a plain copy; from there early steps use the smaller
    decay (1 + steps since) / (10 + steps since), so that the weights it starts from are forgotten."""

    def __init__(self, trained: nn.Module, decay: float, *, start: int = 0) -> None:
        self.model = copy.deepcopy(trained).eval().requires_grad_(False)
        self._decay, self._start = decay, start

    @torch.no_grad()
    def update(self, trained: nn.Module, step: int) -> None:
        """Moves towards the weights after the 0-based `step`."""
        since = step - self._start
        decay = min(self._decay, (1 + since) / (10 + since)) if since >= 0 else 0.0
        for mine, theirs in zip(_tensors(self.model), _tensors(trained), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 1 - decay)
            else:
                mine.copy_(theirs)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, a shared one once: by name it would be averaged twice."""
    return chain(model.parameters(), model.buffers())
