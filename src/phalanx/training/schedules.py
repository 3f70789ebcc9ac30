"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from phalanx.training.config import Constant, Cosine, Cyclic, OneCycle


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def lr_factor(schedule: Constant | Cosine | OneCycle | Cyclic, step: int, total: int) -> float:
    """What multiplies the peak learning rate at 0-based `step` of `total`."""
    last = max(total - 1, 1)
    match schedule:
        case Constant():
            return 1.0
        case Cosine():
            warmup = schedule.warmup * total
            if step < warmup:
                return (step + 1) / (math.floor(warmup) + 1)
            return _half_cosine(1.0, schedule.final, (step - warmup) / max(last - warmup, 1))
        case OneCycle():
            peak = schedule.peak * last
            if step < peak:
                return _half_cosine(schedule.start, 1.0, step / peak)
            return _half_cosine(1.0, schedule.final, (step - peak) / max(last - peak, 1))
        case Cyclic():
            position = step % (schedule.steps_up + schedule.steps_down)
            if position < schedule.steps_up:
                share = position / schedule.steps_up
            else:
                share = 1 - (position - schedule.steps_up) / schedule.steps_down
            return schedule.low + (1 - schedule.low) * share
