"""How far apart the classes lie in Linf, and the radius that this suggests.

Two images of different classes at distance d share a point of their balls as soon as eps >= d / 2: no classifier is
then robust at both (r-separation: Yang et al., "A Closer Look at Accuracy vs. Robustness", NeurIPS 2020).
"""

# Q images asked about, R images compared with, C channels, H height, W width

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.data.partition import shuffled
from phalanx.data.splits import ImageSet

RADII = (2, 4, 8, 16, 32)
"""Over 255, for images of 256 levels."""
COARSE_RADII = (1, 2, 3, 4)
"""In levels, for images of fewer."""
USUAL, USUAL_COARSE = 8, 3
"""The largest suggested of each: 8/255 is what benchmarks of small photographs use, 3/16 what is used on digits."""
CROWDED = 0.01
"""A radius is not suggested where more than this share of images have a neighbour of another class within twice it."""

_MOST_ASKED = 200
_MOST_COMPARED = 1 << 30  # pixels


@dataclass(frozen=True)
class Separation:
    """Distances to the nearest training image of another class."""

    levels: int
    distances: NDArray[np.int64]
    """(Q,) Linf, in levels."""
    nearest: NDArray[np.int64]
    """(Q,) position of that image in the split."""
    asked: NDArray[np.int64]
    """(Q,) positions of the images asked about."""
    compared: int
    """With so many images each, drawn from the split."""

    @property
    def radii(self) -> tuple[Fraction, ...]:
        """Those that are looked at, growing."""
        steps = RADII if self.levels == 255 else tuple(k for k in COARSE_RADII if k < self.levels)
        return tuple(Fraction(step, self.levels) for step in steps)

    @property
    def limit(self) -> Fraction:
        """Half the median distance: above it a typical image shares its ball with one of another class."""
        return Fraction(int(np.sort(self.distances)[len(self.distances) // 2]), 2 * self.levels)

    def crowded(self, eps: Fraction) -> float:
        """Share of the images with a neighbour of another class within 2 eps."""
        return float((self.distances <= float(2 * eps * self.levels)).mean())

    @property
    def suggested(self) -> Fraction:
        """The largest usual radius that leaves the classes apart; the smallest of all where none does."""
        usual = Fraction(USUAL if self.levels == 255 else USUAL_COARSE, self.levels)
        fitting = [eps for eps in self.radii if eps <= min(usual, self.limit) and self.crowded(eps) <= CROWDED]
        return max(fitting, default=self.radii[0])

    def reason(self) -> str:
        """Why, in two sentences."""
        eps, low = self.suggested, int(self.distances.min())
        shown = written(eps, self.levels)
        usual = USUAL if self.levels == 255 else USUAL_COARSE
        apart = (
            f"of {len(self.distances)} training images the nearest of another class, among {self.compared:,} drawn, is "
            f"{low}/{self.levels} away at least, {written(2 * self.limit, self.levels)} in the median, so that eps "
            f"must stay below {float(self.limit):.3f}"
        )
        if self.crowded(eps) > CROWDED:
            share = 100 * self.crowded(eps)
            return (
                f"{shown} is the smallest looked at, and already {share:.0f} % of the images have one of another class "
                f"within twice that: {apart}. Look for the same image under two labels."
            )
        if eps < Fraction(usual, self.levels):
            return f"{shown}, for at more the classes run into one another: {apart}."
        kind = "the usual radius for photographs" if self.levels == 255 else f"three of {self.levels} grey levels"
        return f"{shown} is {kind}, and leaves the classes apart: {apart}. Judge by eye whether a person is still sure."

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "suggested": written(self.suggested, self.levels),
            "reason": self.reason(),
            "limit": float(self.limit),
            "median_distance": float(2 * self.limit),
            "least_distance": int(self.distances.min()) / self.levels,
            "crowded": {written(eps, self.levels): self.crowded(eps) for eps in self.radii},
            "images": len(self.distances),
            "compared_with": self.compared,
        }


def written(eps: Fraction, levels: int) -> str:
    """As a fraction of `levels`, not in lowest terms: "8/255", "2/16"."""
    steps = eps * levels
    return f"{steps.numerator}/{levels}" if steps.denominator == 1 else f"{float(steps):g}/{levels}"


def separation(images: ImageSet, seed: int = 0) -> Separation:
    """Distances from at most 200 of `images` (two classes or more) to as many others as is quick, both drawn at random
    with `seed`."""
    order = shuffled(seed, "separation", len(images))
    asked = _one_of_each_first(images.labels, order)[:_MOST_ASKED]
    most = max(2, _MOST_COMPARED // (len(asked) * images.pixels[0].size))
    # at least one image of every class is among them
    compared = _one_of_each_first(images.labels, order[::-1])[: max(most, len(np.unique(images.labels)))]
    others, labels = images.pixels[compared].astype(np.int16), images.labels[compared]
    distances, nearest = [], []
    for row in asked.tolist():
        apart = np.abs(others - images.pixels[row].astype(np.int16)).max(axis=(1, 2, 3)).astype(np.int64)
        apart[labels == images.labels[row]] = 1 << 20
        nearest.append(int(compared[apart.argmin()]))
        distances.append(int(apart.min()))
    return Separation(images.levels, np.array(distances), np.array(nearest), asked, len(compared))


def _one_of_each_first(labels: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """`order` with the first image of every class in front."""
    _, first = np.unique(labels[order], return_index=True)
    return np.concatenate([order[first], np.delete(order, first)])
