"""One part of an evaluation's images: several processes share a ledger, and together make the whole."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from phalanx.data import ImageSet
from phalanx.errors import InputError


@dataclass(frozen=True)
class Shard:
    """The images whose id leaves the remainder number - 1 when divided by count: whatever their order and number."""

    number: int
    """From 1."""
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise InputError(f"a shard is i/k with 1 <= i <= k, got {self}; write for example 2/5")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """ "2/5" is the second of five. Raises InputError."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        if found is None:
            raise InputError(f"a shard is i/k, the i-th of k parts of the images, got {text!r}; write for example 2/5")
        return cls(int(found[1]), int(found[2]))

    def of(self, images: ImageSet) -> ImageSet:
        """Its images. Raises InputError if there are none."""
        rows = np.flatnonzero(images.ids % self.count == self.number - 1)
        if not len(rows):
            raise InputError(f"shard {self} of {len(images)} images holds none; use fewer shards")
        return images.select(rows)

    @property
    def name(self) -> str:
        """For a lock: "shard-2-of-5"."""
        return f"shard-{self.number}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
