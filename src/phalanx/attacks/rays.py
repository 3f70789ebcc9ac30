"""RayS: search along sign directions for the nearest error, with nothing but labels."""

# L samples still attacked, D pixels of one image

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from phalanx.attacks.base import Attack
from phalanx.attacks.black_box import LabelSearch
from phalanx.attacks.target import Target
from phalanx.attacks.tracker import Found
from phalanx.rng import SampleRng
from phalanx.threat import per_image


class _Rays(NamedTuple):
    """Where the search of each sample is; every field has one row a sample."""

    sign: Tensor
    """(L, D) the best direction, each entry -1 or 1."""
    radius: Tensor
    """(L,) up to which it was searched; infinite as long as no direction led to an error."""
    trial: Tensor
    """(L, D) the direction being tried."""
    low: Tensor
    """(L,) a radius of it without an error."""
    high: Tensor
    """(L,) one with an error."""
    bisecting: Tensor
    """(L,) bool: between the two; otherwise it is still open whether the trial is any better."""
    level: Tensor
    """(L,) int64: the image is cut into 2 ** level blocks of pixels."""
    block: Tensor
    """(L,) int64 the block that the trial flips."""

    def kept(self, stay_L: Tensor) -> _Rays:
        return _Rays(*(field[stay_L] for field in self))


@dataclass(frozen=True, kw_only=True)
class RayS(Attack):
    """Ray searching (Chen & Gu 2020, Algorithms 1 to 3): the sign direction in which the nearest error lies.

    Blocks of the direction are flipped, the whole image first, then halves, quarters, ...; a flip is kept if it leads
    to an error at the radius found so far (the fast check), and a binary search then shortens the radius. Sees labels
    alone, of the deployed model, and draws no random numbers. Broken where an error is asked for within eps. The
    directions are made for Linf; in another norm the search is the same and less apt.
    """

    name: Literal["rays"] = "rays"
    objective: str = "margin"
    """Fixed: labels show no objective, and none is reported."""
    queries: int = 10_000
    """Images sent for each sample."""
    tolerance: float = 1e-3
    """The binary search ends where a radius is known up to this, in pixel units."""

    def __post_init__(self) -> None:
        self._check_fixed("RayS", targeted=False, objective="margin", surface="whole")
        super().__post_init__()
        if self.queries < 1:
            raise ValueError(f"queries must be at least 1, got {self.queries}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be between 0 and 1, in pixel units, got {self.tolerance}")

    @property
    def gradient_steps(self) -> int:
        """Queries: the steps of a search without gradients."""
        return self.queries

    def perturb(self, target: Target, rng: SampleRng) -> Found:
        del rng
        search, rays = LabelSearch(target, self.threat, self.queries), _begin(target.x)
        while len(search.rows):
            radius_L = torch.where(rays.bisecting, (rays.low + rays.high) / 2, rays.high)
            x = search.target.x
            point = (x + per_image(radius_L, x) * rays.trial.reshape(x.shape)).clamp(0, 1)
            error, _ = search.asked(point[:, None])
            rays = self._answered(rays, radius_L, error[:, 0])
            stay_L = search.narrowed()
            if stay_L is not None:
                rays = rays.kept(stay_L)
        return search.found

    def _answered(self, rays: _Rays, radius_L: Tensor, error_L: Tensor) -> _Rays:
        """After the answer at `radius_L` along the trial direction."""
        high = torch.where(error_L, radius_L, rays.high)
        low = torch.where(rays.bisecting & ~error_L, radius_L, rays.low)
        bisecting = (rays.bisecting | error_L) & (high - low > self.tolerance)
        # a trial that failed the check is as bad as the best; one that passed it ends no farther out
        better = ~bisecting & (rays.bisecting | error_L) & (high < rays.radius)
        radius = torch.where(better, high, rays.radius)
        sign = torch.where(better[:, None], rays.trial, rays.sign)
        flipped, level, block = _next_flip(rays, sign)
        return _Rays(
            sign=sign,
            radius=radius,
            trial=torch.where(bisecting[:, None], rays.trial, flipped),
            low=torch.where(bisecting, low, torch.zeros_like(low)),
            # 1 spans the pixel range
            high=torch.where(bisecting, high, radius.clamp_max(1)),
            bisecting=bisecting,
            level=torch.where(bisecting, rays.level, level),
            block=torch.where(bisecting, rays.block, block),
        )


def _begin(x: Tensor) -> _Rays:
    sign, zero_L = torch.ones_like(x).flatten(1), x.new_zeros(len(x))
    number_L = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return _Rays(
        sign=sign,
        radius=torch.full_like(zero_L, float("inf")),
        # the first block is the whole image
        trial=-sign,
        low=zero_L,
        high=torch.ones_like(zero_L),
        bisecting=zero_L.bool(),
        level=number_L,
        block=number_L,
    )


def _next_flip(rays: _Rays, sign_LD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The direction with the next block flipped, that block's level and its number."""
    pixels = sign_LD.shape[1]
    last_L = (rays.block + 1) * _size(rays.level, pixels) >= pixels
    level = rays.level + last_L
    block = torch.where(last_L, torch.zeros_like(rays.block), rays.block + 1)
    own_LD = torch.arange(pixels, device=sign_LD.device) // _size(level, pixels)[:, None] == block[:, None]
    return torch.where(own_LD, -sign_LD, sign_LD), level, block


def _size(level_L: Tensor, pixels: int) -> Tensor:
    """(L,) pixels of a block: ceil(D / 2 ** level), at least 1."""
    blocks_L = 2 ** level_L.clamp_max(40)
    return (pixels + blocks_L - 1) // blocks_L
