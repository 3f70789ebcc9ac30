"""The curves of a run, from its metrics."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from phalanx.report.records import Fields
from phalanx.runs.rate import Rate

LATE = 10
"""So many validations tell how steady a run was in the end."""


@dataclass(frozen=True)
class TrainPoint:
    """An epoch of training; None where a number was not logged, or not finite."""

    epoch: int
    loss: float | None
    accuracy: float | None
    """Share of the images right as the method trained on them, attacked ones attacked."""
    load: tuple[float, ...] | None
    """Share of the epoch's images that each expert got; None without a router."""
    lr: float | None
    zero_gradient: float | None
    """Share of the images on which the training attack's first gradient was exactly zero."""


@dataclass(frozen=True)
class ValidationPoint:
    """A measurement on the validation split."""

    epoch: int
    clean: Rate
    robust: Rate


@dataclass(frozen=True)
class Curves:
    """How a run went, by epoch; both may be empty."""

    train: tuple[TrainPoint, ...]
    validation: tuple[ValidationPoint, ...]
    validation_attack: str
    """What the validation's robust accuracy was measured under."""

    @property
    def load(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """(epoch, share of each expert), where it was logged."""
        return tuple((point.epoch, point.load) for point in self.train if point.load is not None)

    @property
    def largest_drop(self) -> float | None:
        """Largest fall of the robust accuracy from one validation to the next, in [0, 1]; None for fewer than two."""
        return max((max(0.0, before - after) for before, after in pairwise(self._robust)), default=None)

    @property
    def late_deviation(self) -> float | None:
        """Sample standard deviation of the last `LATE` validations' robust accuracy; None for fewer than two."""
        late = self._robust[-LATE:]
        return statistics.stdev(late) if len(late) > 1 else None

    @property
    def _robust(self) -> list[float]:
        return [point.robust.share for point in self.validation]


NO_CURVES = Curves((), (), "")


def read_curves(path: Path, records: Sequence[Mapping[str, Any]], validation_attack: str) -> Curves:
    """The training and validation points among the records of `path`. Raises CorruptError naming line and key."""
    lines = [Fields(f"{path}, line {number}", record) for number, record in enumerate(records, start=1)]
    return Curves(
        train=tuple(_train_point(line) for line in lines if line.values.get("kind") == "train"),
        validation=tuple(_validation_point(line) for line in lines if line.values.get("kind") == "validation"),
        validation_attack=validation_attack,
    )


def _train_point(line: Fields) -> TrainPoint:
    return TrainPoint(
        epoch=line.integer("epoch"),
        loss=line.number("loss"),
        accuracy=line.number("accuracy"),
        load=line.shares("load"),
        lr=line.number("lr"),
        zero_gradient=line.number("zero_gradient"),
    )


def _validation_point(line: Fields) -> ValidationPoint:
    n = line.integer("n")
    # the shares were made by dividing whole numbers by n
    return ValidationPoint(
        epoch=line.integer("epoch"),
        clean=Rate(round(line.share("accuracy") * n), n),
        robust=Rate(round(line.share("robust_accuracy") * n), n),
    )
