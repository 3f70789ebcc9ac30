from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.training.config import Constant, Cosine, Cyclic, OneCycle, Schedule
from phalanx.training.schedules import lr_factor

R2 = math.sqrt(2)


@pytest.mark.parametrize(
    ("schedule", "total", "expected"),
    [
        (Constant(), 3, [1, 1, 1]),
        # (1 + cos(pi t/4)) / 2 at t = 0..4
        (Cosine(), 5, [1, (2 + R2) / 4, 0.5, (2 - R2) / 4, 0]),
        # the same, from 1 down to 0.2: 0.2 + 0.8 f
        (Cosine(final=0.2), 3, [1, 0.6, 0.2]),
        # 0.3 * 10 = 3 steps up (1/4, 2/4, 3/4), then 6 intervals down: cos(pi k/6)
        (Cosine(warmup=0.3), 10, [0.25, 0.5, 0.75, *((1 + math.cos(math.pi * k / 6)) / 2 for k in range(7))]),
        # peak at 0.5 * 4 = 2: start 0, half-way 0.5, 1, half-way down 0.5, final 0
        (OneCycle(peak=0.5, start=0.0, final=0.0), 5, [0, 0.5, 1, 0.5, 0]),
        (OneCycle(peak=0.5, start=0.2, final=0.4), 5, [0.2, 0.6, 1, 0.7, 0.4]),
        (OneCycle(peak=0.0, final=0.0), 3, [1, 0.5, 0]),
        # low 0.5: up in 2 (0.5, 0.75), down in 4 (1, 0.875, 0.75, 0.625), and again
        (Cyclic(steps_up=2, steps_down=4), 8, [0.5, 0.75, 1, 0.875, 0.75, 0.625, 0.5, 0.75]),
        # a run of one step trains at the peak
        (Cosine(), 1, [1]),
    ],
    ids=repr,
)
def test_by_hand(schedule: Schedule, total: int, expected: list[float]) -> None:
    assert [lr_factor(schedule, step, total) for step in range(total)] == pytest.approx(expected, abs=1e-12)


_SHARES = st.floats(0, 0.99)
_SCHEDULES = st.one_of(
    st.builds(Cosine, warmup=_SHARES, final=st.floats(0, 1)),
    st.builds(OneCycle, peak=_SHARES, start=st.floats(0, 1), final=st.floats(0, 1)),
    st.builds(Cyclic, low=st.floats(0, 1), steps_up=st.integers(1, 50), steps_down=st.integers(1, 50)),
)


@given(schedule=_SCHEDULES, total=st.integers(1, 200), data=st.data())
def test_never_above_the_peak_nor_below_zero(schedule: Schedule, total: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total - 1))
    assert -1e-12 <= lr_factor(schedule, step, total) <= 1 + 1e-12
