"""What keeps a model off RobustBench's leaderboards, whatever its accuracy: found on a few clean images."""

# B batch

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phalanx.attacks import Target
from phalanx.evaluation.checks import is_random
from phalanx.nn import exact_fp32, frozen, preserved_rng
from phalanx.routing import DualModel, Ensemble, MixtureOfExperts, SynergyOfExperts, routed

LOOKED_AT = 64
"""Images, at most."""
ZERO_SHARE = 0.1
"""More images than this whose gradient vanishes speak against the model."""


def forward_passes(model: Callable[[Tensor], Any]) -> int:
    """Of whole networks, for one image: the selected experts of a mixture, 1 for what is no model of several."""
    match model:
        case MixtureOfExperts():
            return model.top_k
        case DualModel():
            return forward_passes(model.standard) + forward_passes(model.robust)
        case Ensemble():
            return sum(map(forward_passes, model.members))
        case SynergyOfExperts():
            return len(model.experts)
        case _:
            return 1


def model_reasons(model: Callable[[Tensor], Any], x: Tensor, y: Tensor) -> list[str]:
    """Each to be read after "not eligible because", for images (B, ...) in [0, 1] and labels (B,)."""
    x, y, found = x[:LOOKED_AT], y[:LOOKED_AT], []
    with frozen(model), exact_fp32(), preserved_rng():
        torch.manual_seed(0)
        with torch.no_grad():
            logits = routed(model, x).logits
        if is_random(model, x, logits):
            found.append("its answers are random: two passes over the same images differ")
        if _optimises(model, x):
            found.append("it computes gradients while it answers, an optimisation in the forward pass")
        zero = float((_gradient(model, x, y) == 0).flatten(1).all(1).float().mean())
    if zero > ZERO_SHARE:
        found.append(f"the gradient of the loss with respect to the image is zero for {zero:.0%} of the images")
    return found


def _gradient(model: Callable[[Tensor], Any], x: Tensor, y: Tensor) -> Tensor:
    gradient = Target(model, model, "whole", "cross_entropy", x, y).climb(x).gradient
    assert gradient is not None
    return gradient


def _optimises(model: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Whether the model fails where no gradient can be computed, though it has just answered."""
    try:
        with torch.inference_mode():
            model(x)
    except RuntimeError:
        return True
    return False
