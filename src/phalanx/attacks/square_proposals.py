"""What the square attack tries next: a square of corners of the ball (Linf), or a window with a bump (L2, L1)."""

# A samples still attacked, C channels, H height, W width, P = H W, S side of the square, Q = S S, R x K tiles,
# N random numbers

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
        square = _Patch.drawn(uniform_AN[:, :2], x.shape[2:], side)
        clean_ACQ = square.read(x.flatten(2))
        corner_ACQ = clean_ACQ + self.threat.epsilon * _signs(uniform_AN[:, 2:])[..., None]
        return square.write(best.flatten(2), self.threat.project(corner_ACQ, clean_ACQ)).reshape(x.shape)


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
        """(A, C, H, W) the best points with one window of each emptied into another.

        Only the pixels of the two windows are computed: late squares are small.
        """
        delta = best - x
        delta_ACP, shape = delta.flatten(2), x.shape[2:]
        window, emptied = _Patch.drawn(uniform_AN[:, :2], shape, side), _Patch.drawn(uniform_AN[:, 2:4], shape, side)
        held_ACQ = window.read(delta_ACP)
        gone_ACQ = emptied.read(delta_ACP).masked_fill(emptied.inside(window)[:, None], 0)
        bump_SS = self.bumps[side]
        bump_AQ = torch.where(uniform_AN[:, 4:5] < 0.5, bump_SS.flatten(), bump_SS.T.flatten())
        shape_ACQ = bump_AQ[:, None] * _signs(uniform_AN[:, 5:])[:, :, None] + held_ACQ / _lengths(held_ACQ, self.order)
        new_ACQ = shape_ACQ / _lengths(shape_ACQ, self.order) * self._budget(delta_ACP, held_ACQ, gone_ACQ)
        moved_ACP = window.write(emptied.write(delta_ACP, torch.zeros_like(gone_ACQ)), new_ACQ)
        return self._placed(x, moved_ACP.reshape(x.shape))

    def _budget(self, delta_ACP: Tensor, held_ACQ: Tensor, gone_ACQ: Tensor) -> Tensor:
        """(A, C, 1) the norm that a channel of the window may have: what both windows hold, and its part of what the
        ball leaves unused. In L1 times C: the projection that follows makes the image sparser instead."""
        order, channels = self.order, delta_ACP.shape[1]
        used_A1 = torch.linalg.vector_norm(delta_ACP.flatten(1), ord=order, dim=1, keepdim=True).pow(order)
        unused_A11 = (self.threat.epsilon**order - used_A1).clamp_min(0)[..., None]
        both_ACQ = torch.cat([held_ACQ, gone_ACQ], -1)
        held_AC1 = torch.linalg.vector_norm(both_ACQ, ord=order, dim=-1, keepdim=True).pow(order)
        budget: Tensor = (unused_A11 / channels + held_AC1).pow(1 / order)
        return budget if order == 2 else budget * channels

    def _placed(self, x: Tensor, delta: Tensor) -> Tensor:
        """The images moved by `delta`: in L2 stretched to eps and clipped, in L1 projected."""
        if self.order == 1:
            return self.threat.project(x + delta, x)
        # clipping to a range that holds x leaves the ball to no pixel
        scale_A = self.threat.epsilon / delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        return torch.addcmul(x, delta, scale_A[:, None, None, None]).clamp_(0, 1)


def windows(threat: ThreatModel, x: Tensor, sides: Iterable[int]) -> Windows:
    """For images like `x` (A, C, H, W) and windows of these sides."""
    order = 2 if threat.norm == "L2" else 1
    return Windows(threat, order, {side: _bump(side, order, x) for side in {_tile_side(x.shape[1:]), *sides}})


def _tile_side(shape: Sequence[int]) -> int:
    """Of images of `shape` (C, H, W)."""
    return max(min(shape[1:]) // _TILES, 1)


@dataclass(frozen=True)
class _Patch:
    """A square of pixels of each image."""

    rows_AS: Tensor
    columns_AS: Tensor
    width: int
    """Of the images."""

    @classmethod
    def drawn(cls, uniform_A2: Tensor, shape: Sequence[int], side: int) -> _Patch:
        """Placed at random in images of `shape` (H, W)."""
        along_S = torch.arange(side, device=uniform_A2.device)
        rows_AS, columns_AS = (
            (uniform_A2[:, axis, None] * (length - side + 1)).long() + along_S for axis, length in enumerate(shape)
        )
        return cls(rows_AS, columns_AS, shape[1])

    @property
    def pixels_A1Q(self) -> Tensor:
        """Their places in a flattened channel."""
        return (self.rows_AS[:, :, None] * self.width + self.columns_AS[:, None, :]).flatten(1)[:, None]

    def read(self, image_ACP: Tensor) -> Tensor:
        """(A, C, Q) the square's pixels."""
        return image_ACP.gather(2, self.pixels_A1Q.expand(-1, image_ACP.shape[1], -1))

    def write(self, image_ACP: Tensor, values_ACQ: Tensor) -> Tensor:
        """(A, C, P) the images with these values in the square."""
        return image_ACP.scatter(2, self.pixels_A1Q.expand(-1, image_ACP.shape[1], -1), values_ACQ)

    def inside(self, other: _Patch) -> Tensor:
        """(A, Q) bool: which of its pixels are in the other's square, too."""
        row_AS, column_AS = (
            (mine >= theirs[:, :1]) & (mine <= theirs[:, -1:])
            for mine, theirs in ((self.rows_AS, other.rows_AS), (self.columns_AS, other.columns_AS))
        )
        return (row_AS[:, :, None] & column_AS[:, None, :]).flatten(1)


def _sizes(values: Tensor, order: int) -> Tensor:
    """(..., 1, 1) the norm of each channel (..., H, W), kept from 0."""
    size: Tensor = torch.linalg.vector_norm(values, ord=order, dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    return size


def _lengths(values_ACQ: Tensor, order: int) -> Tensor:
    """(A, C, 1) the norm of each channel's pixels, kept from 0."""
    return _sizes(values_ACQ[..., None], order)[..., 0]


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
