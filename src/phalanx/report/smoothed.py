"""The smoothed classifier beside the model that it is made of: what smoothed.json says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.errors import CorruptError
from phalanx.report.records import Fields, read_record
from phalanx.report.table import Table
from phalanx.report.words import rated
from phalanx.runs import Binding
from phalanx.runs.rate import Rate

SMOOTHED_NAME = "smoothed.json"


@dataclass(frozen=True)
class SmoothedRow:
    """Of one model and one noise."""

    smoothed: str
    """What is averaged over noise: "whole", or a dual model's "robust" half."""
    sigma: float
    samples: int
    confidence: float
    correct: Rate
    """The smoothed classifier's clean accuracy; abstentions count as errors."""
    abstentions: int
    grid: tuple[tuple[float, Rate], ...]
    """L2 radii, and the images that are right and certified there."""

    def to_json(self) -> dict[str, Any]:
        """Counts by radius."""
        grid = [{"radius": at, "certified": rate.held, "interval": list(rate.interval)} for at, rate in self.grid]
        return {
            "smoothed": self.smoothed,
            "sigma": self.sigma,
            "samples": self.samples,
            "confidence": self.confidence,
            "n": self.correct.n,
            "correct": self.correct.held,
            "abstentions": self.abstentions,
            "grid": grid,
        }


def read_smoothed(run: Path | None, binding: Binding) -> tuple[SmoothedRow, ...]:
    """Those in a run's folder that are made of the evaluated model, weights and all; none without a run.

    Raises CorruptError naming the file and the key, InputError for a file of a newer version.
    """
    if run is None:
        return ()
    records = [read_record(path, missing="") for path in sorted(run.glob(f"certificates/*/{SMOOTHED_NAME}"))]
    return tuple(_read(record) for record in records if record.text("model_sha256") == binding.model_sha256)


def _read(record: Fields) -> SmoothedRow:
    n = record.integer("n")
    return SmoothedRow(
        smoothed=record.text("smoothed"),
        sigma=record.number("sigma") or 0.0,
        samples=record.integer("samples"),
        confidence=record.share("confidence"),
        correct=_rate(record, "correct", n),
        abstentions=_rate(record, "abstentions", n).held,
        grid=tuple((at.number("radius") or 0.0, _rate(at, "certified", n)) for at in record.items("grid")),
    )


def _rate(record: Fields, key: str, n: int) -> Rate:
    found = record.integer(key)
    if found > n:
        raise CorruptError(f"{record.where}: {key} should be at most {n:,}, got {found:,}; certify again")
    return Rate(found, n)


def smoothed_table(rows: Sequence[tuple[str, tuple[SmoothedRow, ...]]]) -> Table | None:
    """A line for each label's classifier and radius; None if nothing was smoothed."""
    lines = [
        (
            label,
            found.smoothed,
            f"{found.sigma:g}",
            f"{found.correct.n:,}",
            f"{found.samples:,}",
            f"{found.confidence:g}",
            rated(found.correct),
            f"{radius:g}",
            rated(rate),
        )
        for label, smoothed in rows
        for found in smoothed
        for radius, rate in found.grid
    ]
    if not lines:
        return None
    return Table(
        "Smoothed classifiers",
        "Another classifier than the model above: what the model answers to most noisy copies of an image. Certified: "
        "its answer does not change within that L2 radius, for each image with the probability in the column "
        "confidence over the noise that was drawn. Of the model without noise it says nothing.",
        ("model", "smoothed", "sigma", "n", "copies", "confidence", "right, %", "radius", "certified, %"),
        tuple(lines),
    )
