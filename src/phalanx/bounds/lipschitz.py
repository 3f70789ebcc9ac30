"""Lipschitz constants of whole networks: per-layer bounds multiplied, through whichever norms come out smallest."""

# C classes, D features

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from phalanx.bounds.dual_norm import dual_norm, pairwise_lipschitz
from phalanx.bounds.spectral import ROUNDING
from phalanx.bounds.stages import Affine, Dense, Residual, Shape, Stage
from phalanx.threat import NORMS, Norm

Gains = Mapping[Norm, float]
"""By the norm that features are measured in: how far they move at most when the image moves by 1."""

_INVERSE_ORDER: dict[Norm, float] = {"Linf": 0.0, "L2": 0.5, "L1": 1.0}


def output_lipschitz(stages: Sequence[Stage], shape: Shape, norm: Norm) -> Tensor:
    """(C, C): for images (*shape) measured in `norm`, a Lipschitz constant of each difference of two outputs, the
    j-th less the k-th at [j, k]; symmetric, zero on the diagonal.

    The last linear layer counts by the differences of its rows, not by its norm. Exact for a linear network.
    """
    weight, gains = _head(stages, shape, norm)
    bounds = [gain * pairwise_lipschitz(weight, measured) for measured, gain in gains.items()]
    return torch.stack(bounds).amin(0) * (1 + ROUNDING)


def class_lipschitz(stages: Sequence[Stage], shape: Shape, norm: Norm) -> Tensor:
    """(C,): the same of each output alone. A margin is a difference of two: it needs `output_lipschitz`."""
    weight, gains = _head(stages, shape, norm)
    bounds = [gain * dual_norm(weight, measured) for measured, gain in gains.items()]
    return torch.stack(bounds).amin(0) * (1 + ROUNDING)


def _head(stages: Sequence[Stage], shape: Shape, norm: Norm) -> tuple[Tensor, Gains]:
    """The last layer's rows (C, D), and how far the features before it move."""
    last = stages[-1] if stages else None
    if isinstance(last, Dense):
        return last.weight, feature_gains(stages[:-1], shape, norm)
    outputs = math.prod(stages[-1].out_shape if stages else shape)
    return torch.eye(outputs, dtype=torch.float64), feature_gains(stages, shape, norm)


def feature_gains(stages: Sequence[Stage], shape: Shape, norm: Norm) -> Gains:
    """How far the features behind all stages move at most, in each norm, when an image moves by 1 in `norm`."""
    gains = _embedded({norm: 1.0}, math.prod(shape))
    for stage in stages:
        gains = _after(stage, gains)
    return gains


def _after(stage: Stage, gains: Gains) -> Gains:
    if isinstance(stage, Residual):
        # the triangle inequality, in each norm
        body, shortcut = gains, gains
        for inner in stage.body:
            body = _after(inner, body)
        for inner in stage.shortcut:
            shortcut = _after(inner, shortcut)
        return {measured: body[measured] + shortcut[measured] for measured in NORMS}
    if not isinstance(stage, Affine):
        return gains
    reached: dict[Norm, float] = {}
    for (source, target), bound in stage.operator_norms.items():
        reached[target] = min(reached.get(target, math.inf), gains[source] * bound)
    return _embedded(reached, math.prod(stage.out_shape))


def _embedded(gains: Gains, features: int) -> Gains:
    """||v||_t <= D^max(0, 1/t - 1/s) ||v||_s on D features: what is known in one norm says something in all."""
    return {
        target: min(
            gain * features ** max(0.0, _INVERSE_ORDER[target] - _INVERSE_ORDER[source])
            for source, gain in gains.items()
        )
        for target in NORMS
    }
