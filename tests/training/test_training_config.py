from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from phalanx.training.config import AWP, SGD, Adam, Cosine, Cyclic, OneCycle, TrainingConfig


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SGD(lr=0), "lr must be positive, got 0"),
        (lambda: SGD(momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: SGD(weight_decay=-1), "weight_decay must be at least 0, got -1"),
        (lambda: SGD(momentum=0, nesterov=True), "nesterov needs momentum above 0"),
        (lambda: Adam(beta1=-0.1), r"beta1 must be in \[0, 1\), got -0.1"),
        (lambda: Adam(beta2=1), r"beta2 must be in \[0, 1\), got 1"),
        (lambda: Cosine(warmup=1.5), r"warmup must be in \[0, 1\), got 1.5"),
        (lambda: OneCycle(peak=1), r"peak must be in \[0, 1\), got 1"),
        (lambda: OneCycle(start=-1), r"start is a share of the peak and must be in \[0, 1\], got -1"),
        (lambda: Cosine(final=3.0), r"final is a share of the peak and must be in \[0, 1\], got 3.0"),
        (lambda: OneCycle(final=math.nan), "final is a share of the peak"),
        (lambda: Cyclic(low=1.5), "low is a share of the peak"),
        (lambda: SGD(lr=math.nan), "lr must be positive, got nan"),
        (lambda: Adam(lr=math.inf), "lr must be positive, got inf"),
        (lambda: TrainingConfig(clip_norm=math.nan), "clip_norm must be positive, got nan"),
        (lambda: TrainingConfig(checkpoint_seconds=math.nan), "checkpoint_seconds must be at least 0, got nan"),
        (lambda: Cyclic(steps_up=0), "steps_up must be positive, got 0"),
        (lambda: TrainingConfig(epochs=-1), "epochs must be at least 0, got -1"),
        (lambda: TrainingConfig(batch_size=-3), "batch_size must be positive, got -3"),
        (lambda: TrainingConfig(validate_every=0), "validate_every must be positive, got 0"),
        (lambda: TrainingConfig(ema_decay=1.0), r"ema_decay must be in \(0, 1\), got 1.0; leave it out"),
        (lambda: TrainingConfig(ema_start_epoch=3), "ema_start_epoch is 3, but there is no average; set ema_decay"),
        (
            lambda: TrainingConfig(epochs=5, ema_decay=0.9, ema_start_epoch=5),
            "ema_start_epoch must be at least 0 and below epochs=5, got 5",
        ),
        (lambda: AWP(gamma=0), "gamma must be positive, got 0"),
        (lambda: AWP(warmup_epochs=-1), "warmup_epochs must be at least 0, got -1"),
        (
            lambda: TrainingConfig(epochs=5, awp=AWP(warmup_epochs=5)),
            "awp.warmup_epochs must be at least 0 and below epochs=5, got 5",
        ),
        (lambda: TrainingConfig(clip_norm=0.0), "clip_norm must be positive, got 0.0"),
        (lambda: TrainingConfig(checkpoint_seconds=-1), "checkpoint_seconds must be at least 0, got -1"),
    ],
)
def test_a_bad_value_is_refused_by_name(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
