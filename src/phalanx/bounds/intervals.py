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
from phalanx.bounds.stages import Affine, ChannelScale, Dense, MaxPool, Relu, Residual, SortedPairs, Stage
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
    if isinstance(stage, Relu | MaxPool | SortedPairs):
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


def interval_lower(stages: Sequence[Stage], features: Sequence[Interval], rows: Tensor) -> Tensor:
    """(N, R): at most the minimum of rows . outputs within the ball of `features`, rows (N, R, outputs).

    A last linear layer counts by the combination of its rows, which keeps what two classes share.
    """
    last, bounds, slopes, offset = stages[-1], features[-1], rows, rows.new_zeros(rows.shape[:2])
    if isinstance(last, Dense):
        bounds, offset, slopes = features[-2], rows @ last.bias, rows @ last.weight
    low, high = (side.flatten(1)[..., None] for side in bounds)
    return (slopes @ ((low + high) / 2) - slopes.abs() @ ((high - low) / 2))[..., 0] + offset


def slopes_of(stages: Sequence[Stage], features: Sequence[Interval], rows: Tensor, norm: Norm) -> Tensor:
    """(N, R): a Lipschitz constant, valid within the ball of `features` alone, of each combination rows (N, R, outputs)
    of the outputs: the dual norm of what bounds its partial derivatives there.

    Within the ball a ReLU's derivative is 0, 1 or, where its input may change sign, anything between; a maximum's is
    that of an input which may be the largest. Raises InputError for a stage whose derivative is not known.
    """
    samples, count = rows.shape[:2]
    middle, spread = _derivatives(stages, features, rows.flatten(0, 1), torch.zeros_like(rows.flatten(0, 1)), count)
    return dual_norm((middle.abs() + spread).flatten(1), norm).reshape(samples, count)


def _derivatives(
    stages: Sequence[Stage], features: Sequence[Interval], middle: Tensor, spread: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Back through all stages: the derivatives of `count` rows for each sample lie within `spread` of `middle`."""
    for stage, bounds in zip(reversed(stages), reversed(features[: len(stages)]), strict=True):
        shape = (-1, *stage.out_shape)
        middle, spread = middle.reshape(shape), spread.reshape(shape)
        if isinstance(stage, Affine):
            middle, spread = stage.transpose(middle), stage.absolute_transpose(spread)
        elif isinstance(stage, Residual):
            sides = []
            for part in (stage.body, stage.shortcut):
                inner = [bounds]
                for each in part:
                    inner.append(through(each, inner[-1]))
                sides.append(_derivatives(part, inner, middle, spread, count))
            middle, spread = (sum(side.flatten(1) for side in pair) for pair in zip(*sides, strict=True))
        elif isinstance(stage, Relu):
            middle, spread = _switched(middle, spread, (bounds.low > 0), (bounds.high < 0), count)
        elif isinstance(stage, MaxPool):
            largest, never = largest_of(stage.windows(bounds.low), stage.windows(bounds.high))
            centre, width = (side[..., None].expand(*side.shape, largest.shape[-1]) for side in (middle, spread))
            middle, spread = (stage.from_windows(each) for each in _switched(centre, width, largest, never, count))
        elif isinstance(stage, SortedPairs):
            middle, spread = _sorted_derivatives(stage, middle, spread, bounds, count)
        else:
            raise InputError(f"no bound of the derivative is known for {type(stage).__name__}; use method lipschitz")
    return middle, spread


def largest_of(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(..., W) bool each, of W numbers between `low` and `high`: which is surely the largest, which surely is not."""
    if low.shape[-1] == 1:
        return torch.ones_like(low, dtype=torch.bool), torch.zeros_like(low, dtype=torch.bool)
    best = high.topk(2, -1).values
    others = torch.where(high == best[..., :1], best[..., 1:], best[..., :1])
    return low > others, high < low.amax(-1, keepdim=True)


def _sorted_derivatives(
    stage: SortedPairs, middle: Tensor, spread: Tensor, bounds: Interval, count: int
) -> tuple[Tensor, Tensor]:
    """Of each pair the larger feature takes the derivative of the first output, the smaller one that of the second;
    where it is not known which is which, each has one of the two or anything between."""
    lows, highs = (stage.pairs(side.repeat_interleave(count, 0)) for side in bounds)
    kept, turned = lows[0] > highs[1], highs[0] < lows[1]
    low_of_max, low_of_min = stage.pairs(middle - spread)
    high_of_max, high_of_min = stage.pairs(middle + spread)
    least, most = torch.minimum(low_of_max, low_of_min), torch.maximum(high_of_max, high_of_min)
    sides = []
    for low, high, swapped_low, swapped_high in (
        (low_of_max, high_of_max, low_of_min, high_of_min),
        (low_of_min, high_of_min, low_of_max, high_of_max),
    ):
        below = torch.where(kept, low, torch.where(turned, swapped_low, least))
        above = torch.where(kept, high, torch.where(turned, swapped_high, most))
        sides.append(((above + below) / 2, (above - below) / 2))
    return stage.from_pairs(sides[0][0], sides[1][0]), stage.from_pairs(sides[0][1], sides[1][1])


def _switched(middle: Tensor, spread: Tensor, on: Tensor, off: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Times a factor that is 1 where `on`, 0 where `off`, else anything between."""
    on, off = (side.repeat_interleave(count, 0) for side in (on, off))
    below, above = middle - spread, middle + spread
    below = torch.where(on, below, below.clamp_max(0)).masked_fill(off, 0)
    above = torch.where(on, above, above.clamp_min(0)).masked_fill(off, 0)
    return (above + below) / 2, (above - below) / 2
