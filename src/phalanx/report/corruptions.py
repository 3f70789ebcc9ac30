"""Accuracy under common corruptions: what corruptions.json says, as a table and a line of the threat coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.errors import CorruptError
from phalanx.report.records import Fields, read_record
from phalanx.report.table import Table
from phalanx.report.words import percent, rated
from phalanx.runs.rate import Rate
from phalanx.runs.threats import Coverage

TITLE = "Common corruptions"
THREAT = "corruption"


@dataclass(frozen=True)
class Corruptions:
    """Of one evaluation."""

    clean: Rate
    by_name: Mapping[str, tuple[Rate, ...]]
    """By corruption, for severities 1, 2, ..."""

    @property
    def mean(self) -> float:
        """Accuracy in [0, 1] averaged over all corruptions and severities."""
        rates = [rate.share for rates in self.by_name.values() for rate in rates]
        return sum(rates) / len(rates)

    def to_json(self) -> dict[str, Any]:
        """For table.json, accuracies in [0, 1]."""
        return {
            "n": self.clean.n,
            "clean": self.clean.share,
            "mean": self.mean,
            "accuracy": {name: [rate.share for rate in rates] for name, rates in self.by_name.items()},
        }

    @property
    def coverage(self) -> Coverage:
        """The line of the threat-coverage table."""
        rates = [rate for rates in self.by_name.values() for rate in rates]
        severities = max(map(len, self.by_name.values()))
        return Coverage(
            THREAT,
            "measured",
            tuple(self.by_name),
            f"severities 1 to {severities}",
            n=self.clean.n,
            tried=sum(rate.n for rate in rates),
            broken=sum(rate.n - rate.held for rate in rates),
        )


def read_corruptions(path: Path) -> Corruptions | None:
    """What a file says, None if there is none. Raises CorruptError, and InputError for a newer version's file."""
    if not path.exists():
        return None
    record = read_record(path, missing="")
    n = record.integer("n")
    by_name = {item.text("name"): _rates(item, n) for item in record.items("corruptions")}
    if not by_name:
        raise CorruptError(f"{record.where}: corruptions should name at least one; restore it from a copy")
    return Corruptions(_rate(record, "clean", record.integer("clean"), n), by_name)


def covered(threats: Sequence[Coverage], found: Corruptions | None) -> tuple[Coverage, ...]:
    """The threat coverage of a ledger, with what was measured beside it."""
    return tuple(found.coverage if found is not None and line.threat == THREAT else line for line in threats)


def corruptions_table(rows: Sequence[tuple[str, Corruptions | None]]) -> Table | None:
    """A line for each model, by label, and corruption; None if no model was asked."""
    asked = [(label, found) for label, found in rows if found is not None]
    if not asked:
        return None
    most = max(len(rates) for _, found in asked for rates in found.by_name.values())
    return Table(
        TITLE,
        "Accuracy in percent on images that noise, blur and codecs have changed, made here after CIFAR-10-C; they are "
        "not its files, and nobody chose them to hurt, so that they count in no robust accuracy. In brackets 95 % "
        "Wilson intervals.",
        ("model", "corruption", *(f"severity {severity}" for severity in range(1, most + 1)), "mean"),
        tuple(line for label, found in asked for line in _lines(label, found, most)),
    )


def _lines(label: str, found: Corruptions, most: int) -> list[tuple[str, ...]]:
    empty = [""] * most
    lines = [(label, f"none (n = {found.clean.n:,})", *empty, rated(found.clean))]
    for name, rates in found.by_name.items():
        cells = [rated(rate) for rate in rates] + empty[len(rates) :]
        lines.append((label, name.replace("_", " "), *cells, percent(sum(rate.share for rate in rates) / len(rates))))
    return [*lines, (label, "mean of all", *empty, percent(found.mean))]


def _rates(item: Fields, n: int) -> tuple[Rate, ...]:
    counts = item.numbers("correct")
    if not counts:
        raise CorruptError(f"{item.where}.correct should hold a count for each severity; restore it from a copy")
    return tuple(_rate(item, "correct", count, n) for count in counts)


def _rate(fields: Fields, key: str, count: float | None, n: int) -> Rate:
    if count is None or count != int(count) or not 0 <= count <= n:
        raise CorruptError(f"{fields.where}.{key} should count some of {n:,} images, got {count}; restore it")
    return Rate(int(count), n)
