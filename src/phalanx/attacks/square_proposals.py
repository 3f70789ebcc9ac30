"""What the square attack tries next: a square of corners of the ball (Linf), or a window with a bump (L2, L1)."""

# A samples still attacked, C channels, H height, W width, S side of the square, R x K tiles, N random numbers

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.threat import ThreatModel

_TILES = 5
"""In L2 and L1 the start is a grid of so many bumps a side."""
_DECAY = {2: 2, 1: 4}
"""By the order of the norm: how fast a bump falls from its centre (that of L1 as released)."""


def _signs(uniform: Tensor) -> Tensor:
    """-1 or 1, for numbers uniform on [0, 1)."""
    return (uniform < 0.5) * 2 - 1


def _offsets(uniform_A: Tensor, length: int, side: int) -> Tensor:
    """(A, length) the position of each row (or column) within a square of this side, which is placed at random."""
    first_A1 = (uniform_A[:, None] * (length - side + 1)).long()
    return torch.arange(length, device=uniform_A.device) - first_A1


def _mask(rows_AH: Tensor, columns_AW: Tensor, side: int) -> Tensor:
    """(A, 1, H, W) which pixels are in the square."""
    inside_AH, inside_AW = (((line >= 0) & (line < side)) for line in (rows_AH, columns_AW))
    return (inside_AH[:, :, None] & inside_AW[:, None, :])[:, None]


@dataclass(frozen=True)
class Corners:
    """Linf (Andriushchenko et al. 2020, Algorithm 2): in a square every channel moves to one end of its range."""

    threat: ThreatModel

    def start_draws(self, shape: Sequence[int]) -> int:
        """Random numbers for the start of an image of `shape` (C, H, W)."""
        return shape[0] * shape[2]

    def draws(self, shape: Sequence[int]) -> int:
        """Random numbers for a proposal."""
        return 2 + shape[0]

    def start(self, x: Tensor, uniform_AN: Tensor) -> Tensor:
        """(A, C, H, W) vertical stripes one pixel wide, each channel at -eps or eps."""
        signs = _signs(uniform_AN).reshape(len(x), x.shape[1], 1, x.shape[3])
        return self.threat.project(x + self.threat.epsilon * signs, x)

    def moved(self, best: Tensor, x: Tensor, side: int, uniform_AN: Tensor) -> Tensor:
        """(A, C, H, W) the best points with one square of each at -eps or eps, a sign for each channel."""
        rows_AH = _offsets(uniform_AN[:, 0], x.shape[2], side)
        columns_AW = _offsets(uniform_AN[:, 1], x.shape[3], side)
        corner = x + self.threat.epsilon * _signs(uniform_AN[:, 2:])[:, :, None, None]
        return self.threat.project(torch.where(_mask(rows_AH, columns_AW, side), corner, best), x)


@dataclass(frozen=True)
class Windows:
    """L2 (Andriushchenko et al. 2020, Algorithm 3) and L1 (Croce & Hein 2021): a window gets a bump, and what another
    window held; what the ball leaves unused is spent too."""

    threat: ThreatModel
    order: int
    """Of the norm."""
    bumps: Mapping[int, Tensor]
    """By the side of the window, (S, S)."""

    def start_draws(self, shape: Sequence[int]) -> int:
        """Random numbers for the start of an image of `shape` (C, H, W)."""
        side = _tile_side(shape)
        return (shape[0] + 1) * (shape[1] // side) * (shape[2] // side)

    def draws(self, shape: Sequence[int]) -> int:
        """Random numbers for a proposal."""
        return 5 + shape[0]

    def start(self, x: Tensor, uniform_AN: Tensor) -> Tensor:
        """(A, C, H, W) bumps in tiles, as many as fit, their signs and directions at random."""
        channels, height, width = x.shape[1:]
        side = _tile_side(x.shape[1:])
        down, across = height // side, width // side
        drawn = uniform_AN.reshape(-1, channels + 1, down, across)
        bump_SS = self.bumps[side]
        tiles_ARKSS = torch.where(drawn[:, -1, :, :, None, None] < 0.5, bump_SS, bump_SS.T)
        tiles = tiles_ARKSS[:, None] * _signs(drawn[:, :-1])[..., None, None]
        grid = tiles.transpose(3, 4).reshape(-1, channels, down * side, across * side)
        top, left = (height - down * side) // 2, (width - across * side) // 2
        margins = (left, width - across * side - left, top, height - down * side - top)
        return self._placed(x, F.pad(grid, margins))

    def moved(self, best: Tensor, x: Tensor, side: int, uniform_AN: Tensor) -> Tensor:
        """(A, C, H, W) the best points with one window of each emptied into another."""
        height, width = x.shape[2:]
        delta = best - x
        rows_AH, columns_AW = (_offsets(uniform_AN[:, n], length, side) for n, length in ((0, height), (1, width)))
        emptied_rows_AH, emptied_columns_AW = (
            _offsets(uniform_AN[:, n], length, side) for n, length in ((2, height), (3, width))
        )
        window, emptied = _mask(rows_AH, columns_AW, side), _mask(emptied_rows_AH, emptied_columns_AW, side)
        # the bump where the window is; elsewhere the index is any, and masked
        row_AH1, column_A1W = rows_AH.clamp(0, side - 1)[:, :, None], columns_AW.clamp(0, side - 1)[:, None, :]
        bump_SS = self.bumps[side]
        upright_A11 = (uniform_AN[:, 4] < 0.5)[:, None, None]
        bump_AHW = torch.where(upright_A11, bump_SS[row_AH1, column_A1W], bump_SS[column_A1W, row_AH1])
        bump = bump_AHW[:, None] * _signs(uniform_AN[:, 5:])[:, :, None, None]
        held = torch.where(window, delta, 0)
        shape = torch.where(window, bump + held / _sizes(held, self.order), 0)
        new = shape / _sizes(shape, self.order) * self._budget(delta, window | emptied)
        return self._placed(x, torch.where(window, new, delta.masked_fill(emptied, 0)))

    def _budget(self, delta: Tensor, windows: Tensor) -> Tensor:
        """(A, C, 1, 1) the norm that a channel of the window may have: what both windows hold, and its part of what the
        ball leaves unused. In L1 times C: the projection that follows makes the image sparser instead."""
        order, channels = self.order, delta.shape[1]
        used = delta.abs().pow(order).sum((1, 2, 3), keepdim=True)
        unused = (self.threat.epsilon**order - used).clamp_min(0)
        held = torch.where(windows, delta, 0).abs().pow(order).sum((2, 3), keepdim=True)
        budget: Tensor = (unused / channels + held).pow(1 / order)
        return budget if order == 2 else budget * channels

    def _placed(self, x: Tensor, delta: Tensor) -> Tensor:
        """The images moved by `delta`: in L2 stretched to eps and clipped, in L1 projected."""
        if self.order == 2:
            delta = delta * (self.threat.epsilon / delta.flatten(1).norm(dim=1).clamp_min(1e-12))[:, None, None, None]
        return self.threat.project(x + delta, x)


def windows(threat: ThreatModel, x: Tensor, sides: Iterable[int]) -> Windows:
    """For images like `x` (A, C, H, W) and windows of these sides."""
    order = 2 if threat.norm == "L2" else 1
    return Windows(threat, order, {side: _bump(side, order, x) for side in {_tile_side(x.shape[1:]), *sides}})


def _tile_side(shape: Sequence[int]) -> int:
    """Of images of `shape` (C, H, W)."""
    return max(min(shape[1:]) // _TILES, 1)


def _sizes(values: Tensor, order: int) -> Tensor:
    """(..., 1, 1) the norm of each channel (..., H, W), kept from 0."""
    size: Tensor = torch.linalg.vector_norm(values, ord=order, dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    return size


def _bump(side: int, order: int, like: Tensor) -> Tensor:
    """(S, S) of norm 1: a rectangle above a negative one, each falling from its centre (eta of Algorithm 3)."""
    upper, lower = (_rectangle(rows, side, order, like) for rows in (side // 2, side - side // 2))
    bump_SS = torch.cat([upper, -lower])
    unit_SS: Tensor = bump_SS / _sizes(bump_SS, order)
    return unit_SS


def _rectangle(rows: int, columns: int, order: int, like: Tensor) -> Tensor:
    """(rows, columns) of norm 1: at ring r around the centre the sum of 1 / k^decay over k > r."""
    rings = max(rows, columns) // 2 + 1
    terms = torch.arange(1, rings + 1, dtype=like.dtype, device=like.device).pow(-_DECAY[order])
    tail = terms.flip(0).cumsum(0).flip(0)
    down, across = ((torch.arange(count, device=like.device) - count // 2).abs() for count in (rows, columns))
    values = tail[torch.maximum(down[:, None], across[None, :])]
    return values / _sizes(values, order)
