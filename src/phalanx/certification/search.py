"""Search the largest ball around each image in which every margin's bound is positive."""

# N samples

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from phalanx.certification.moe import Certifiable, Seen
from phalanx.certification.networks import Method
from phalanx.threat import Norm

LEVEL = 1 / 255
"""The smallest change of an 8-bit image, in every norm: a ball of less holds no other image."""

_HALVINGS = 40
_COARSE = 7
"""Halvings where a bound is dear: the radius is then within 1 % of the largest that it certifies."""


def diameter(shape: tuple[int, ...], norm: Norm) -> float:
    """Of [0, 1]^D: the largest distance of two images (*shape)."""
    pixels = math.prod(shape)
    return {"Linf": 1.0, "L2": math.sqrt(pixels), "L1": float(pixels)}[norm]


def holds(read: Certifiable, seen: Seen, y: Tensor, radius: Tensor, method: Method) -> Tensor:
    """(N,) bool: every margin's bound is positive. A bound that is not a number holds nothing."""
    return (read.low(seen, y, radius, method).margins > 0).all(1)


@dataclass(frozen=True, eq=False)
class Search:
    """Samples that are right."""

    read: Certifiable
    seen: Seen
    y: Tensor
    most: float
    method: Method

    def radii(self) -> Tensor:
        """(N,): every radius returned has itself been certified, so that nothing rests on the bounds' monotony."""
        zero = torch.zeros(len(self.y), dtype=torch.float64, device=self.y.device)
        # cheap, and where the others begin
        low = self._halved(*self._doubled(zero, "lipschitz"), _HALVINGS, "lipschitz")
        if self.method == "lipschitz":
            return low
        if self.method != "auto":
            low = torch.where(holds(self.read, self.seen, self.y, low, self.method), low, zero)
        return self._halved(*self._doubled(low, self.method), _COARSE, self.method)

    def _doubled(self, low: Tensor, method: Method) -> tuple[Tensor, Tensor]:
        """Radii that are certified, and at most twice as large ones that are not, from certified ones; both are the
        diameter where that is certified."""
        low, high = low.clone(), (2 * low).clamp(LEVEL / 4, self.most)
        left = (low < self.most).nonzero()[:, 0]
        while len(left):
            left = left[holds(self.read, self.seen.select(left), self.y[left], high[left], method)]
            low[left] = high[left]
            left = left[high[left] < self.most]
            high[left] = (2 * high[left]).clamp_max(self.most)
        return low, high

    def _halved(self, low: Tensor, high: Tensor, rounds: int, method: Method) -> Tensor:
        for _ in range(rounds):
            middle = (low + high) / 2
            held = holds(self.read, self.seen, self.y, middle, method)
            low, high = torch.where(held, middle, low), torch.where(held, high, middle)
        return low

    def limits(self, radius: Tensor) -> list[str]:
        """What is no longer certified just beyond each radius."""
        found = self.read.low(self.seen, self.y, radius * 1.02 + 1e-9, self.method)
        classes = found.margins.argmin(1)
        parts = found.through.gather(1, classes[:, None])[:, 0]
        return [
            "nothing: it holds every image" if held >= self.most else f"class {klass} through {self.read.names[part]}"
            for held, klass, part in zip(radius.tolist(), classes.tolist(), parts.tolist(), strict=True)
        ]
