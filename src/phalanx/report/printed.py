"""What the printed theorems claimed of a model, beside how much of it an attack broke: what printed.json says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phalanx.errors import CorruptError
from phalanx.report.records import Fields, read_record
from phalanx.report.table import Table
from phalanx.runs import Binding

PRINTED_NAME = "printed.json"


@dataclass(frozen=True)
class PrintedLine:
    """One way to come to a radius for every image; only a sound one is a certificate."""

    norm: str
    n: int
    radius: str
    """Its name."""
    slopes: str
    """What stands for Lipschitz constants in it."""
    sound: bool
    mean_radius: float
    claimed: int
    """Images with a radius above 0."""
    broken: int
    """Of these, answered wrongly inside it."""


def read_printed(run: Path | None, binding: Binding) -> tuple[PrintedLine, ...]:
    """Those in a run's folder that are of the evaluated model, weights and all; none without a run.

    Raises CorruptError naming the file and the key, InputError for a file of a newer version.
    """
    if run is None:
        return ()
    records = [read_record(path, missing="") for path in sorted(run.glob(f"certificates/*/{PRINTED_NAME}"))]
    return tuple(
        _line(line, record)
        for record in records
        if record.text("model_sha256") == binding.model_sha256
        for line in record.items("lines")
    )


def _line(line: Fields, record: Fields) -> PrintedLine:
    n, claimed, broken = record.integer("n"), line.integer("claimed"), line.integer("broken")
    if not broken <= claimed <= n:
        raise CorruptError(f"{line.where}: broken should be at most claimed, and that at most {n:,}; certify again")
    return PrintedLine(
        norm=record.text("norm"),
        n=n,
        radius=line.text("radius"),
        slopes=line.text("slopes"),
        sound=line.values.get("sound") is True,
        mean_radius=line.number("mean_radius") or 0.0,
        claimed=claimed,
        broken=broken,
    )


def printed_json(lines: Sequence[PrintedLine]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(line) for line in lines]


def printed_table(rows: Sequence[tuple[str, tuple[PrintedLine, ...]]]) -> Table | None:
    """A line for each radius; None where nothing was computed."""
    lines = [
        (
            label,
            line.norm,
            line.radius if line.sound else f"{line.radius} (unsound)",
            line.slopes,
            f"{line.mean_radius:.4g}",
            f"{line.claimed:,} of {line.n:,}",
            f"{line.broken:,}",
        )
        for label, found in rows
        for line in found
    ]
    if not lines:
        return None
    return Table(
        "Printed theorems, attacked inside their radii",
        "Theorems 5.4 and 5.5 of the dual-model paper are no certificates as printed. Claimed: images with a radius "
        "above 0. Broken: answered wrongly inside it. Gradients: those at the image stand for Lipschitz constants.",
        ("model", "norm", "radius", "constants", "mean radius", "claimed", "broken"),
        tuple(lines),
    )
