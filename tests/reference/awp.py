"""Adversarial weight perturbation, one number at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def awp_gradients(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], moving: Sequence[str], gamma: float
) -> dict[str, Tensor]:
    """The gradient, by name, of `loss` at a copy of `model` whose weights `moving` have been perturbed."""
    there = copy.deepcopy(model)
    there.zero_grad()
    loss(there).backward()
    for name, parameter in there.named_parameters():
        if name not in moving or len(parameter.shape) < 2 or parameter.grad is None:
            continue
        weights, gradients = parameter.detach().flatten(), parameter.grad.flatten().tolist()
        length = math.sqrt(sum(w**2 for w in weights.tolist()))
        steepness = math.sqrt(sum(g**2 for g in gradients))
        for index, g in enumerate(gradients):
            weights[index] += gamma * length * g / steepness if steepness else 0.0
    there.zero_grad()
    loss(there).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in there.named_parameters()
    }
