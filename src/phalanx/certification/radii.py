"""What every certificate says: a radius for each image, and why."""

# N samples

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from phalanx.data import ImageSet
from phalanx.errors import InputError
from phalanx.runs import wilson


def require_images(images: ImageSet) -> None:
    """Raises InputError where there is nothing to certify."""
    if not len(images):
        raise InputError("there are no images to certify; give at least one")


@dataclass(frozen=True, eq=False)
class Radii:
    """Radii of images, and certified accuracy over them."""

    radius: Tensor
    """(N,) float64. 0 without a certificate."""
    reasons: tuple[str, ...]
    """Why, for each image: one of `kinds`."""
    kinds: ClassVar[tuple[str, ...]]

    def certified(self, radius: float) -> int:
        """How many images are right, and certified at `radius`; at 0 all that have a certificate."""
        if not radius >= 0:
            raise InputError(f"the radius must be at least 0, got {radius}")
        return sum(
            reason == "certified" and held >= radius
            for reason, held in zip(self.reasons, self.radius.tolist(), strict=True)
        )

    def accuracy_at(self, radius: float) -> float:
        """The share of images that are right and certified at `radius`."""
        return self.certified(radius) / len(self.reasons)

    def interval_at(self, radius: float) -> tuple[float, float]:
        """95 % Wilson interval of `accuracy_at`."""
        return wilson(self.certified(radius), len(self.reasons))

    @property
    def counts(self) -> dict[str, int]:
        """Images by reason."""
        found = Counter(self.reasons)
        return {kind: found[kind] for kind in self.kinds}
