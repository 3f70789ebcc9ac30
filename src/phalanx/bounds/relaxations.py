"""Linear functions on either side of a layer that is not linear, where its input is known to lie in an interval.

Each takes rows (N or 1, R, outputs) of the layer's outputs and gives rows of its inputs with constants (N, R): rows .
outputs >= new rows . inputs + constants for all inputs in the interval.
"""

# N samples, R rows (combinations of a layer's features), W inputs of a window

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.bounds.intervals import Interval, largest_of
from phalanx.bounds.stages import MaxPool, SortedPairs


def below_relu(rows: Tensor, bounds: Interval) -> tuple[Tensor, Tensor]:
    """relu(v) >= slope * v and <= (v - low) high / (high - low) on [low, high]; a row's positive entries need the
    first, its negative ones the second. The lower slope is 0 or 1, whichever leaves less room."""
    low, high = bounds.low.flatten(1), bounds.high.flatten(1)
    # bounds that rounding has crossed are one point
    high = torch.maximum(low, high)
    # no division by nothing, not even where its result is not taken: its derivative would be
    room = torch.where(high > low, high - low, torch.ones_like(high))
    chord = torch.where(high > low, high.clamp_min(0) / room, torch.ones_like(high))
    steady, dead = low >= 0, high <= 0
    upper = torch.where(steady, torch.ones_like(chord), chord.masked_fill(dead, 0))
    lower = torch.where(steady | ((high > -low) & ~dead), 1.0, 0.0).to(low)
    intercept = torch.where(steady | dead, torch.zeros_like(low), -low * upper)
    positive, negative = rows.clamp_min(0), rows.clamp_max(0)
    moved = (negative @ intercept[:, :, None])[..., 0]
    return positive * lower[:, None] + negative * upper[:, None], moved


def below_maximum(rows: Tensor, bounds: Interval, stage: MaxPool) -> tuple[Tensor, Tensor]:
    """max(v) >= v_j for every j, here the one with the highest lower bound; max(v) <= v_j where j surely is the
    largest, and elsewhere at most the highest upper bound."""
    low, high = (stage.windows(side) for side in bounds)
    high = torch.maximum(low, high)
    chosen = torch.nn.functional.one_hot(low.argmax(-1), low.shape[-1]).to(rows)
    sure = largest_of(low, high)[0].any(-1)
    ceiling = high.amax(-1).masked_fill(sure, 0).flatten(1)
    positive, negative = rows.clamp_min(0), rows.clamp_max(0)
    moved = (negative @ ceiling[:, :, None])[..., 0]
    passed = positive + negative * sure.flatten(1)[:, None]
    count = rows.shape[1]
    spread = passed.reshape(-1, count, *stage.out_shape, 1) * chosen[:, None]
    back = stage.from_windows(spread.flatten(0, 1))
    return back.reshape(-1, count, back[0].numel()), moved


def below_sorted(rows: Tensor, differences: Interval, stage: SortedPairs) -> tuple[Tensor, Tensor]:
    """max(v, w) = w + relu(v - w) and min(v, w) = v - relu(v - w), `differences` (N, P) being bounds of v - w."""
    count = rows.shape[1]
    larger, smaller = stage.pairs(rows.flatten(0, 1))
    larger, smaller = (side.reshape(len(rows), count, -1) for side in (larger, smaller))
    slopes, moved = below_relu(larger - smaller, differences)
    back = stage.from_pairs((smaller + slopes).flatten(0, 1), (larger - slopes).flatten(0, 1))
    return back.reshape(len(slopes), count, -1), moved
