"""A share of images, with how many they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from phalanx.runs.summary import wilson


class Mask(Protocol):
    """(N,) bool, of any array library: this package is read without torch."""

    def sum(self) -> Any: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Rate:
    """A share of images, never without how many they were."""

    held: int
    n: int

    @classmethod
    def of(cls, mask: Mask) -> Rate:
        """How many of a mask (N,) are true."""
        return cls(int(mask.sum()), len(mask))

    @property
    def share(self) -> float:
        """held / n, in [0, 1]."""
        return self.held / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the share, in [0, 1]."""
        return wilson(self.held, self.n)

    def to_json(self) -> dict[str, Any]:
        """Both counts and the interval."""
        return {"held": self.held, "n": self.n, "interval": list(self.interval)}
