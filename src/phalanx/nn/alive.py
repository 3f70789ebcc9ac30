"""What a network with masked filters need not compute: its zeroed filters, and what reads only constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from phalanx.nn.masked import MaskedConv2d

_NORMS = nn.modules.batchnorm._BatchNorm
_SEEN = (MaskedConv2d, nn.Conv2d, nn.Linear, _NORMS)


class Spared(NamedTuple):
    """Of one pass of one image."""

    macs: int
    """Multiply-adds."""
    parameters: int
    """Parameters read."""


@torch.no_grad()
def spared(model: nn.Module, run: Callable[[Tensor], object], image: Tensor) -> Spared:
    """What `run`, a pass of one image (1, C, H, W) through `model`, does without need; nothing without masked layers.

    A channel is alive if it depends on the image. That of a zeroed filter does not: behind its BatchNorm it is a
    constant, and what the next layer makes of it is one, too, computed once and for all. A sum is alive where one of
    its terms is, so a residual stream keeps every channel that any layer writing to it keeps: independent masks hardly
    thin it. Needed are the live outputs of every convolution and linear layer, from its live inputs, and the live
    channels of a BatchNorm. Scores are no part of the answer.

    `model` must be in evaluation mode.
    """
    if not any(isinstance(module, MaskedConv2d) for module in model.modules()):
        return Spared(0, 0)
    counter = _Counter()
    hooks = [module.register_forward_hook(counter.see) for module in model.modules() if isinstance(module, _SEEN)]
    try:
        # what depends on the image is NaN, and nothing else is
        run(torch.full_like(image, torch.nan))
    finally:
        for hook in hooks:
            hook.remove()
    return Spared(counter.macs, sum(counter.parameters.values()))


class _Counter:
    def __init__(self) -> None:
        self.macs = 0
        self.parameters: dict[nn.Module, int] = {}

    def see(self, layer: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs = _alive(given[0], layer)
        if isinstance(layer, _NORMS):
            self.parameters[layer] = int((~inputs).sum()) * len([*layer.parameters()])
            return output
        scores = 0
        if isinstance(layer, MaskedConv2d):
            # its zeros times NaN are NaN
            output = output.masked_fill(~layer.selected().reshape(-1, 1, 1), 0)
            scores = 0 if layer.scores is None else layer.scores.numel()
        # a grouped convolution is left as it is
        outputs = _alive(output, layer)
        dead = _dead(layer.weight, inputs, outputs) if getattr(layer, "groups", 1) == 1 else 0
        self.macs += dead * (output.numel() // len(outputs))
        self.parameters[layer] = dead + scores
        return output


def _alive(features: Tensor, layer: nn.Module) -> Tensor:
    """(C,) bool: the channels, of a linear layer the features, that depend on the image."""
    return features.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1).isnan().any(1)


def _dead(weight: Tensor, inputs: Tensor, outputs: Tensor) -> int:
    """Elements of `weight` (out, in, ...) that lead to a dead output or from a dead input."""
    return weight.numel() - weight[0, 0].numel() * int(inputs.sum()) * int(outputs.sum())
