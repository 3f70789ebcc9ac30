"""Broken, certified or undecided: the rows of a page that have certificates, side by side."""

from __future__ import annotations

from phalanx.report.page import Page
from phalanx.report.table import Table
from phalanx.report.threefold import PARTS
from phalanx.report.words import rated

TITLE = "Broken, certified or undecided"
NOTE = (
    "Every image is one of three: an attack broke it or it is wrong when clean, a certificate proves it right in the "
    "whole ball, or neither. Robust accuracy lies between the certified share and all but the broken one."
)
HEAD = ("model", "threat", *(f"{part}, %" for part in PARTS), "n")


def threefold_table(page: Page) -> Table | None:
    """A line for each model; None where nothing is certified."""
    lines = [
        (
            row.label,
            f"{row.measurement['norm']} {row.measurement['eps']}",
            *map(rated, row.threefold.rates.values()),
            f"{row.n:,}",
        )
        for row in page.rows
        if row.threefold is not None
    ]
    return Table(TITLE, NOTE, HEAD, tuple(lines)) if lines else None
