"""Two models on the same images: is the difference more than chance?"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from phalanx.runs import wilson


@dataclass(frozen=True)
class Paired:
    """How many of the same images two models are right about."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def of(cls, first: Collection[int], second: Collection[int], n: int) -> Paired:
        """From the ids that each is right about, of `n` images."""
        one, two = set(first), set(second)
        both = len(one & two)
        return cls(both, len(one) - both, len(two) - both, n - len(one | two))

    @property
    def n(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def first(self) -> float:
        """The first model's share."""
        return (self.both + self.only_first) / self.n if self.n else 0.0

    @property
    def second(self) -> float:
        return (self.both + self.only_second) / self.n if self.n else 0.0

    @property
    def difference(self) -> float:
        """Second minus first, in [-1, 1]."""
        return (self.only_second - self.only_first) / self.n if self.n else 0.0

    @property
    def p_value(self) -> float:
        """Two-sided exact McNemar test: of the images that only one is right about, each model is as likely that one.

        Twice the smaller tail of the binomial distribution with share 1/2, at most 1 (McNemar 1947).
        """
        differing = self.only_first + self.only_second
        tail, term = 0, 1
        for count in range(min(self.only_first, self.only_second) + 1):
            tail += term
            term = term * (differing - count) // (count + 1)
        return min(1.0, float(Fraction(2 * tail, 2**differing)))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference: Newcombe 1998, method 10, of two Wilson intervals and the correlation."""
        one, two = self.first, self.second
        low_one, high_one = wilson(self.both + self.only_first, self.n)
        low_two, high_two = wilson(self.both + self.only_second, self.n)
        phi = self._correlation()
        down = _side(two - low_two, high_one - one, phi)
        up = _side(high_two - two, one - low_one, phi)
        return max(-1.0, self.difference - down), min(1.0, self.difference + up)

    def _correlation(self) -> float:
        """Phi with Newcombe's correction for continuity; 0 where a margin is empty."""
        first, second = self.both + self.only_first, self.both + self.only_second
        margins = first * (self.n - first) * second * (self.n - second)
        if not margins:
            return 0.0
        cross = self.both * self.neither - self.only_first * self.only_second
        if cross > 0:
            return max(cross - self.n / 2, 0.0) / math.sqrt(margins)
        return cross / math.sqrt(margins)


def _side(one: float, two: float, phi: float) -> float:
    return math.sqrt(max(one * one - 2 * phi * one * two + two * two, 0.0))
