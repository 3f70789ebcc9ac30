"""Paired differences, against published numbers and counts by hand."""

from __future__ import annotations

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.evaluation.compare import Paired

counts = st.integers(0, 60)


def test_newcombes_own_example() -> None:
    # Newcombe 1998, table II: 36, 12, 2, 0 by method 10
    paired = Paired(both=36, only_first=2, only_second=12, neither=0)
    assert paired.difference == pytest.approx(0.2)
    assert paired.interval == pytest.approx((0.0569, 0.3404), abs=5e-5)
    # 2 (C(14,0) + C(14,1) + C(14,2)) / 2^14
    assert paired.p_value == pytest.approx(2 * (1 + 14 + 91) / 2**14)


def test_from_the_images_that_each_is_right_about() -> None:
    assert Paired.of({1, 2, 3}, {3, 4}, 10) == Paired(both=1, only_first=2, only_second=1, neither=6)
    nothing = Paired.of((), (), 0)
    assert (nothing.difference, nothing.p_value, nothing.first) == (0, 1, 0)


@given(counts, counts, counts, counts)
def test_what_holds_of_every_table(both: int, one: int, two: int, neither: int) -> None:
    paired, other = Paired(both, one, two, neither), Paired(both, two, one, neither)
    low, high = paired.interval
    assert -1 <= low <= paired.difference <= high <= 1 and (paired.n == 0 or low < high)
    assert other.difference == -paired.difference and other.interval == pytest.approx((-high, -low))
    tail = sum(comb(one + two, k) for k in range(min(one, two) + 1))
    assert other.p_value == paired.p_value == pytest.approx(min(1.0, 2 * tail / 2 ** (one + two)))


def test_many_images_do_not_overflow() -> None:
    assert Paired(1000, 5000, 5200, 0).p_value == pytest.approx(0.0487, abs=1e-3)
    assert Paired(1000, 0, 5000, 0).p_value == 0
