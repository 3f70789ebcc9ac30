"""A count of images, never without how many there were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from phalanx.runs import wilson


@dataclass(frozen=True)
class Share:
    """`held` of `n` images."""

    held: int
    n: int

    @classmethod
    def of(cls, mask: Tensor) -> Share:
        """Of a mask (N,)."""
        return cls(int(mask.sum()), len(mask))

    def to_json(self) -> dict[str, Any]:
        """Both, and the 95 % Wilson interval of the share."""
        return {"held": self.held, "n": self.n, "interval": list(wilson(self.held, self.n))}
