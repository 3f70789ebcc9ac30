"""The curves of a run, from its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phalanx.report.page import Curves, Rate, TrainPoint, ValidationPoint
from phalanx.report.records import Fields


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
