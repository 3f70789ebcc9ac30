"""CROWN (Zhang et al., NeurIPS 2018): linear bounds of a ReLU network's outputs, carried back to the pixels."""

# N samples, R rows (combinations of a layer's features)

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from phalanx.bounds.intervals import Ball, Interval, interval_features, through
from phalanx.bounds.stages import Affine, ChannelScale, Relu, Stage
from phalanx.errors import InputError

_CARRIED = 2**21
"""Numbers that the bounds of one sample's layer may take on their way back; a larger layer keeps its interval bounds,
as in CROWN-IBP (Zhang et al., ICLR 2020)."""

_TOGETHER = 2**23
"""Numbers that the samples looked at together may take: memory does not grow with their number."""


def crown_lower(stages: Sequence[Stage], rows: Tensor, ball: Ball) -> Tensor:
    """(N, R): at most the minimum over each image's ball of rows . outputs, rows (N, R, outputs).

    Raises InputError for stages other than linear ones and ReLU.
    """
    for stage in stages:
        if not isinstance(stage, Affine | Relu):
            raise InputError(f"CROWN is known for chains of linear layers and ReLU, not for {type(stage).__name__}")
    together = max(1, _TOGETHER // max(_carried(stages[:end]) for end in range(1, len(stages) + 1)))
    found = []
    for start in range(0, len(ball.x), together):
        part = slice(start, start + together)
        some = Ball(ball.x[part], ball.radius[part], ball.norm)
        found.append(_least(stages, crown_features(stages, some), rows[part], some))
    return torch.cat(found) if found else rows.new_zeros(rows.shape[:2])


def crown_features(stages: Sequence[Stage], ball: Ball) -> list[Interval]:
    """As `interval_features`, with what goes into each ReLU tightened by CROWN. Neither bound is always the tighter
    one: their intersection is taken."""
    found = interval_features(stages, ball)
    for index, stage in enumerate(stages):
        if isinstance(stage, Relu) and _worthwhile(stages[:index]):
            found[index] = _both(found[index], _bounds(stages[:index], found, ball))
        if index:
            found[index + 1] = _both(found[index + 1], through(stage, found[index]))
    return found


def _carried(stages: Sequence[Stage]) -> int:
    rows = math.prod(stages[-1].out_shape)
    size = rows * max(math.prod(stage.in_shape) for stage in stages if isinstance(stage, Affine))
    # what is too large is not carried
    return size if size <= _CARRIED else 1


def _worthwhile(stages: Sequence[Stage]) -> bool:
    # the bounds of a first linear layer are exact already
    linear = sum(isinstance(stage, Affine) and not isinstance(stage, ChannelScale) for stage in stages)
    return linear > 1 and _carried(stages) > 1


def _both(first: Interval, second: Interval) -> Interval:
    return Interval(torch.maximum(first.low, second.low), torch.minimum(first.high, second.high))


def _bounds(stages: Sequence[Stage], features: Sequence[Interval], ball: Ball) -> Interval:
    """Of everything that comes out of `stages`."""
    shape = stages[-1].out_shape
    # one set of rows for all samples, until a ReLU tells them apart
    rows_1RR = torch.eye(math.prod(shape), dtype=ball.x.dtype, device=ball.x.device)[None]
    low = _least(stages, features, rows_1RR, ball)
    high = -_least(stages, features, -rows_1RR, ball)
    return Interval(low.reshape(-1, *shape), high.reshape(-1, *shape))


def _least(stages: Sequence[Stage], features: Sequence[Interval], rows: Tensor, ball: Ball) -> Tensor:
    """(N, R): a lower bound of rows . outputs, rows (N or 1, R, outputs), given what goes into each stage."""
    count = rows.shape[1]
    constant = rows.new_zeros(rows.shape[:2])
    for index in reversed(range(len(stages))):
        stage = stages[index]
        if isinstance(stage, Relu):
            rows, moved = _through_relu(rows, features[index])
            constant = constant + moved
        else:
            assert isinstance(stage, Affine)
            flat = rows.reshape(-1, *stage.out_shape)
            constant = constant + stage.offset(flat).reshape(-1, count)
            rows = stage.transpose(flat).reshape(len(rows), count, -1)
    return ball.least(rows) + constant


def _through_relu(rows: Tensor, bounds: Interval) -> tuple[Tensor, Tensor]:
    """relu(v) >= slope * v and <= (v - low) high / (high - low) on [low, high]; a row's positive entries need the
    first, its negative ones the second. The lower slope is 0 or 1, whichever leaves less room."""
    low, high = bounds.low.flatten(1), bounds.high.flatten(1)
    # bounds that rounding has crossed are one point
    high = torch.maximum(low, high)
    chord = torch.where(high > low, high.clamp_min(0) / (high - low).clamp_min(1e-300), torch.ones_like(high))
    steady, dead = low >= 0, high <= 0
    upper = torch.where(steady, torch.ones_like(chord), chord.masked_fill(dead, 0))
    lower = torch.where(steady | ((high > -low) & ~dead), 1.0, 0.0).to(low)
    intercept = torch.where(steady | dead, torch.zeros_like(low), -low * upper)
    positive, negative = rows.clamp_min(0), rows.clamp_max(0)
    moved = (negative @ intercept[:, :, None])[..., 0]
    return positive * lower[:, None] + negative * upper[:, None], moved
