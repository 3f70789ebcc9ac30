"""Interval bounds: of every feature, and of every partial derivative, within the ball of each image.

The ball is {x': ||x' - x||_p <= radius, x' in [0, 1]}: what an attacker may show is an image.
"""

# N samples, R output rows, D pixels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.bounds.dual_norm import dual_norm
from phalanx.bounds.stages import Affine, ChannelScale, MaxPool, Relu, Residual, Stage
from phalanx.errors import InputError
from phalanx.threat import Norm


class Interval(NamedTuple):
    """Features (N, ...) lie between the two, entry by entry."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True, eq=False)
class Ball:
    """All images within `radius` (N,) of `x` (N, C, H, W) in `norm`, pixels in [0, 1]; float64."""

    x: Tensor
    radius: Tensor
    norm: Norm

    @property
    def wide(self) -> Tensor:
        """The radii, shaped to multiply images."""
        return self.radius.reshape(-1, *([1] * (self.x.dim() - 1)))

    @property
    def pixels(self) -> Interval:
        """Each pixel alone."""
        return Interval((self.x - self.wide).clamp_min(0), (self.x + self.wide).clamp_max(1))

    def least(self, slopes: Tensor) -> Tensor:
        """(N, R): at most the minimum of slopes . x' over the ball, slopes (N or 1, R, D)."""
        low, high = (side.flatten(1)[:, None] for side in self.pixels)
        x_N1D = self.x.flatten(1)[:, None]
        value_NR = (slopes * x_N1D).sum(2)
        drop_NR = (slopes.clamp_min(0) * (x_N1D - low) - slopes.clamp_max(0) * (high - x_N1D)).sum(2)
        if self.norm != "Linf":
            drop_NR = torch.minimum(drop_NR, self.radius[:, None] * dual_norm(slopes, self.norm))
        return value_NR - drop_NR


def interval_features(stages: Sequence[Stage], ball: Ball) -> list[Interval]:
    """Bounds of what goes into each stage, and last of what comes out: one more than there are stages."""
    found = [ball.pixels]
    near: tuple[Tensor, Tensor] | None = (ball.x, ball.wide)
    for stage in stages:
        bounds = through(stage, found[-1])
        if near is not None:
            near, bounds = _first(stage, near, bounds, ball.norm)
        found.append(bounds)
    return found


def _first(
    stage: Stage, near: tuple[Tensor, Tensor], bounds: Interval, norm: Norm
) -> tuple[tuple[Tensor, Tensor] | None, Interval]:
    """The first linear layer sees the ball itself, which an L2 or L1 ball's box does not tell: each output moves by at
    most the radius times its dual norm. A shift before it moves the ball."""
    centre, radius = near
    if isinstance(stage, ChannelScale) and bool((stage.scale == 1).all()):
        return (stage.forward(centre), radius), bounds
    rows = stage.row_norms(norm) if isinstance(stage, Affine) and norm != "Linf" else None
    if rows is None:
        return None, bounds
    middle = stage.forward(centre)
    spread = radius.reshape(-1, *([1] * (middle.dim() - 1))) * rows
    return None, Interval(torch.maximum(bounds.low, middle - spread), torch.minimum(bounds.high, middle + spread))


def through(stage: Stage, bounds: Interval) -> Interval:
    """Bounds of what comes out of a stage, given those of what goes in."""
    if isinstance(stage, Relu | MaxPool):
        return Interval(stage.forward(bounds.low), stage.forward(bounds.high))
    if isinstance(stage, Residual):
        sides = []
        for part in (stage.body, stage.shortcut):
            inner = bounds
            for each in part:
                inner = through(each, inner)
            sides.append(inner)
        return Interval(sides[0].low + sides[1].low, sides[0].high + sides[1].high)
    middle = stage.forward((bounds.low + bounds.high) / 2)
    spread = stage.absolute((bounds.high - bounds.low) / 2)
    return Interval(middle - spread, middle + spread)


def slopes_of(stages: Sequence[Stage], features: Sequence[Interval], rows: Tensor, norm: Norm) -> Tensor:
    """(N, R): a Lipschitz constant, valid within the ball of `features` alone, of each combination rows (N, R, outputs)
    of the outputs: the dual norm of what bounds its partial derivatives there.

    Within the ball a ReLU's derivative is 0, 1 or, where its input may change sign, anything between. Raises InputError
    for stages other than linear ones and ReLU.
    """
    samples, count = rows.shape[:2]
    middle, spread = rows.flatten(0, 1), torch.zeros_like(rows.flatten(0, 1))
    for stage, bounds in zip(reversed(stages), reversed(features[:-1]), strict=True):
        if isinstance(stage, Relu):
            middle, spread = _through_relu(middle, spread, bounds, count)
        elif isinstance(stage, Affine):
            shape = (-1, *stage.out_shape)
            middle = stage.transpose(middle.reshape(shape))
            spread = stage.absolute_transpose(spread.reshape(shape))
        else:
            raise InputError(f"no bound of the derivative is known for {type(stage).__name__}; use method lipschitz")
    return dual_norm((middle.abs() + spread).flatten(1), norm).reshape(samples, count)


def _through_relu(middle: Tensor, spread: Tensor, bounds: Interval, count: int) -> tuple[Tensor, Tensor]:
    low, high = (side.repeat_interleave(count, 0) for side in bounds)
    shape = low.shape
    below, above = (middle - spread).reshape(shape), (middle + spread).reshape(shape)
    on, off = low > 0, high < 0
    below = torch.where(on, below, below.clamp_max(0)).masked_fill(off, 0)
    above = torch.where(on, above, above.clamp_min(0)).masked_fill(off, 0)
    return (above + below) / 2, (above - below) / 2
