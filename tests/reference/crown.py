"""CROWN's least values over a ball."""

# N samples, R rows

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from phalanx.bounds import Ball, Stage, crown_planes


def crown_lower(stages: Sequence[Stage], rows: Tensor, ball: Ball) -> Tensor:
    """(N, R): at most the minimum over each image's ball of rows . outputs, rows (N, R, outputs)."""
    return crown_planes(stages, rows, ball).least(ball)
