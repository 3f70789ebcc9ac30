"""CROWN (Zhang et al., NeurIPS 2018): linear bounds of a network's outputs, carried back to the pixels."""

# N samples, R rows (combinations of a layer's features), D pixels

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.bounds.intervals import Ball, Interval, interval_features, through
from phalanx.bounds.relaxations import below_maximum, below_relu, below_sorted
from phalanx.bounds.stages import Affine, ChannelScale, MaxPool, Relu, Residual, SortedPairs, Stage
from phalanx.errors import InputError

_CARRIED = 2**21
"""Numbers that the bounds of one sample's layer may take on their way back; a larger layer keeps its interval bounds,
as in CROWN-IBP (Zhang et al., ICLR 2020)."""

_TOGETHER = 2**23
"""Numbers that the samples looked at together may take: memory does not grow with their number."""


class Planes(NamedTuple):
    """slopes . x' + constants is at most a function of x', everywhere in a ball."""

    slopes: Tensor
    """(N, R, D)."""
    constants: Tensor
    """(N, R)."""

    def least(self, ball: Ball) -> Tensor:
        """(N, R): at most the minimum over the ball."""
        return ball.least(self.slopes) + self.constants


@dataclass(frozen=True, eq=False)
class _Step:
    """A stage, and bounds of what goes into it."""

    stage: Stage
    bounds: Interval
    body: tuple[_Step, ...] = ()
    shortcut: tuple[_Step, ...] = ()
    """The branches of a residual block."""
    differences: Interval | None = None
    """Of sorted pairs: bounds (N, P) of the first less the second."""


def crown_ibp_lower(stages: Sequence[Stage], rows: Tensor, ball: Ball) -> Tensor:
    """(N, R): at most the minimum over each image's ball of rows . outputs, rows (N, R, outputs).

    With nothing but interval bounds of what goes into each layer: CROWN-IBP (Zhang et al., ICLR 2020), in one pass
    forwards and one backwards, for all samples at once. For chains without residual blocks; raises InputError for a
    stage that no linear bound is known for.
    """
    _check(stages)
    known = interval_features(stages, ball)
    steps = [_entered(stage, (), bounds, ball) for stage, bounds in zip(stages, known[:-1], strict=True)]
    return _back(steps, rows).least(ball)


def crown_planes(stages: Sequence[Stage], rows: Tensor, ball: Ball) -> Planes:
    """Linear functions of the pixels that are at most rows . outputs in each image's ball, rows (N, R, outputs).

    Raises InputError for a stage that no linear bound is known for.
    """
    _check(stages)
    together = max(1, _TOGETHER // max((_carried(chain) for chain in _prefixes(stages)), default=1))
    found = []
    for start in range(0, len(ball.x), together):
        part = slice(start, start + together)
        some = Ball(ball.x[part], ball.radius[part], ball.norm)
        planes = _back(_steps(stages, some), rows[part])
        found.append(Planes(planes.slopes.expand(len(some.x), -1, -1), planes.constants.expand(len(some.x), -1)))
    if not found:
        return Planes(rows.new_zeros(*rows.shape[:2], math.prod(ball.x.shape[1:])), rows.new_zeros(rows.shape[:2]))
    return Planes(torch.cat([each.slopes for each in found]), torch.cat([each.constants for each in found]))


def whole(stages: Sequence[Stage]) -> bool:
    """Whether the bounds of every layer can be carried back, so that none falls back on its interval."""
    return all(_carried(chain) > 1 for chain in _prefixes(stages) if any(_affine(chain)))


def _check(stages: Sequence[Stage]) -> None:
    for stage in stages:
        if isinstance(stage, Residual):
            _check(stage.body)
            _check(stage.shortcut)
        elif not isinstance(stage, Affine | Relu | MaxPool | SortedPairs):
            raise InputError(f"CROWN is not known for {type(stage).__name__}; use method lipschitz or ibp")


# -- what goes into each stage -------------------------------------------------------------------------------------


def _steps(stages: Sequence[Stage], ball: Ball) -> tuple[_Step, ...]:
    """Every stage with interval bounds of what goes into it, tightened by CROWN where that is not linear. Neither
    bound is always the tighter one: their intersection is taken."""
    known = interval_features(stages, ball)
    steps: tuple[_Step, ...] = ()
    for stage, plain in zip(stages, known[:-1], strict=True):
        bounds = _both(plain, _leaving(steps[-1])) if steps else plain
        steps = (*steps, _entered(stage, steps, bounds, ball))
    return steps


def _branch(stages: Sequence[Stage], before: tuple[_Step, ...], bounds: Interval, ball: Ball) -> tuple[_Step, ...]:
    """The steps of a residual block's branch. With those before the block they are a chain, as if there were no other
    branch."""
    steps = before
    for stage in stages:
        steps = (*steps, _entered(stage, steps, bounds, ball))
        bounds = _leaving(steps[-1])
    return steps[len(before) :]


def _entered(stage: Stage, before: tuple[_Step, ...], bounds: Interval, ball: Ball) -> _Step:
    if isinstance(stage, Relu | MaxPool | SortedPairs) and _worthwhile([step.stage for step in before]):
        bounds = _both(bounds, _bounds(before, ball))
    if isinstance(stage, SortedPairs):
        return _Step(stage, bounds, differences=_differences(stage, before, bounds, ball))
    if not isinstance(stage, Residual):
        return _Step(stage, bounds)
    body, shortcut = (_branch(part, before, bounds, ball) for part in (stage.body, stage.shortcut))
    return _Step(stage, bounds, body, shortcut)


def _leaving(step: _Step) -> Interval:
    if not isinstance(step.stage, Residual):
        return through(step.stage, step.bounds)
    body, shortcut = (_leaving(part[-1]) if part else step.bounds for part in (step.body, step.shortcut))
    return Interval(body.low + shortcut.low, body.high + shortcut.high)


def _both(first: Interval, second: Interval) -> Interval:
    return Interval(torch.maximum(first.low, second.low), torch.minimum(first.high, second.high))


def _bounds(steps: Sequence[_Step], ball: Ball) -> Interval:
    """Of everything that comes out of the last step."""
    shape = steps[-1].stage.out_shape
    # one set of rows for all samples, until a bound tells them apart
    rows_1RR = torch.eye(math.prod(shape), dtype=ball.x.dtype, device=ball.x.device)[None]
    low, high = _range(steps, rows_1RR, ball)
    return Interval(low.reshape(-1, *shape), high.reshape(-1, *shape))


def _range(steps: Sequence[_Step], rows: Tensor, ball: Ball) -> Interval:
    """(N, R): of rows (1, R, outputs) of what comes out of the last step."""
    return Interval(_back(steps, rows).least(ball), -_back(steps, -rows).least(ball))


def _differences(stage: SortedPairs, before: tuple[_Step, ...], bounds: Interval, ball: Ball) -> Interval:
    """Of the two features of each pair: not only what their own bounds leave, for they move together."""
    lows, highs = stage.pairs(bounds.low), stage.pairs(bounds.high)
    found = Interval(lows[0] - highs[1], highs[0] - lows[1])
    if not before or _carried([step.stage for step in before]) == 1:
        return found
    eye_RR = torch.eye(math.prod(stage.out_shape), dtype=ball.x.dtype, device=ball.x.device)
    first, second = stage.pairs(eye_RR)
    return _both(found, _range(before, (first - second).T[None], ball))


# -- what it costs -------------------------------------------------------------------------------------------------


def _prefixes(stages: Sequence[Stage], before: tuple[Stage, ...] = ()) -> Iterator[tuple[Stage, ...]]:
    """Every chain whose end may be bounded."""
    for stage in stages:
        if isinstance(stage, Residual):
            yield from _prefixes(stage.body, before)
            yield from _prefixes(stage.shortcut, before)
        before = (*before, stage)
        yield before


def _carried(stages: Sequence[Stage]) -> int:
    rows = math.prod(stages[-1].out_shape)
    size = rows * max((math.prod(stage.in_shape) for stage in _affine(stages)), default=1)
    # what is too large is not carried
    return size if size <= _CARRIED else 1


def _affine(stages: Sequence[Stage]) -> Iterator[Affine]:
    for stage in stages:
        if isinstance(stage, Affine):
            yield stage
        elif isinstance(stage, Residual):
            yield from _affine((*stage.body, *stage.shortcut))


def _worthwhile(stages: Sequence[Stage]) -> bool:
    # the bounds of a first linear layer are exact already
    linear = sum(not isinstance(stage, ChannelScale) for stage in _affine(stages))
    return linear > 1 and _carried(stages) > 1


# -- back to the pixels --------------------------------------------------------------------------------------------


def _back(steps: Sequence[_Step], rows: Tensor) -> Planes:
    """Planes, in what goes into the first step, below rows . outputs of the last, rows (N or 1, R, outputs)."""
    count = rows.shape[1]
    constant = rows.new_zeros(rows.shape[:2])
    for step in reversed(steps):
        stage = step.stage
        if isinstance(stage, Affine):
            flat = rows.reshape(-1, *stage.out_shape)
            moved = stage.offset(flat).reshape(-1, count)
            rows = stage.transpose(flat).reshape(len(rows), count, -1)
        elif isinstance(stage, Residual):
            body, shortcut = _back(step.body, rows), _back(step.shortcut, rows)
            rows, moved = body.slopes + shortcut.slopes, body.constants + shortcut.constants
        elif isinstance(stage, MaxPool):
            rows, moved = below_maximum(rows, step.bounds, stage)
        elif isinstance(stage, SortedPairs):
            assert step.differences is not None
            rows, moved = below_sorted(rows, step.differences, stage)
        else:
            assert isinstance(stage, Relu)
            rows, moved = below_relu(rows, step.bounds)
        constant = constant + moved
    return Planes(rows, constant)
