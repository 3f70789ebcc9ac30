"""A share of images."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.runs import wilson


@dataclass(frozen=True)
class Rate:
    """A share of images, never without how many they were."""

    held: int
    n: int

    @property
    def share(self) -> float:
        """held / n, in [0, 1]."""
        return self.held / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the share, in [0, 1]."""
        return wilson(self.held, self.n)
