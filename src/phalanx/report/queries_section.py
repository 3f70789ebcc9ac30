"""The curve of robust accuracy against queries, and the tables of targeted success."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from phalanx.report.figures import Plot, banded
from phalanx.report.page import Page, Row
from phalanx.report.plots import line_plot
from phalanx.report.queries import QueryCurve, Targeted
from phalanx.report.table import Table
from phalanx.report.words import ABSENT, percent, rated
from phalanx.runs.rate import Rate

MOST_CLASSES = 20
"""A matrix of more is not shown."""


def query_plot(page: Page) -> Plot | None:
    """A line for each model and query attack; None if no row has any."""
    found = [(row, curve) for row in page.rows if row.queries for curve in row.queries.curves]
    if not found:
        return None
    names = [f"{row.label}, {curve.attack}" for row, curve in found]
    # 0 has no place on a logarithmic scale
    series = [
        banded(name, curve.points[1:], number)
        for number, (name, (_, curve)) in enumerate(zip(names, found, strict=True))
        if len(curve.points) > 1
    ]
    title = "Robust accuracy against queries"
    budgets = sorted({queries for _, curve in found for queries, _ in curve.points})
    drawn = line_plot("queries", series, "accuracy, %", title, across="queries for each image", percent=True, log=True)
    return Plot(
        title,
        "Attacks that see the model's answers alone: its scores (Square) or no more than its labels (RayS, "
        "HopSkipJump). In percent of all images; the bands are 95 % intervals. Counted are the images that the search "
        f"sent until its first error, without the two that judge it; 0 queries is the clean accuracy.{_left_out(page)}",
        Markup(drawn),
        ("queries", *(f"{name}, %" for name in names)),
        tuple((f"{budget:,}", *(_at(curve, budget) for _, curve in found)) for budget in budgets),
    )


def _at(curve: QueryCurve, budget: int) -> str:
    return rated(dict(curve.points).get(budget))


def _left_out(page: Page) -> str:
    told = [(row.label, name) for row in page.rows if row.queries for name in row.queries.left_out]
    if not told:
        return ""
    names = "; ".join(f"{name} on {label}" for label, name in told)
    return f" Left out, since they met only what other attacks had left standing: {names}."


def targeted_table(page: Page) -> Table | None:
    """How often exactly the class drawn was reached, row by row; None if no row was asked."""
    found = [(row, row.targeted) for row in page.rows if row.targeted]
    if not found:
        return None
    return Table(
        "Targeted success",
        "Share of all images that are answered with exactly one class, drawn at random among the wrong ones, under one "
        "run of an attack towards it; other attacks may reach more. Already: of these, answered so when clean.",
        ("model", "attack", "n", "reached, %", "already", "invalid"),
        tuple(
            (
                row.label,
                done.attack,
                f"{done.reached.n:,}",
                rated(done.reached),
                f"{done.already:,}",
                f"{done.invalid:,}",
            )
            for row, done in found
        ),
    )


def targeted_tables(row: Row) -> list[Table]:
    """The row's matrix from label to class, where it has few classes."""
    if row.targeted is None or len(row.class_names) > MOST_CLASSES:
        return []
    done, names = row.targeted, row.class_names
    return [
        Table(
            "Targeted success by class",
            f"Images answered with the class drawn for them under {done.attack}, of those that it was drawn for.",
            ("label", *(f"to {name}" for name in names), "all, %"),
            tuple((name, *_line(done, label, len(names))) for label, name in enumerate(names)),
        )
    ]


def _line(done: Targeted, label: int, classes: int) -> Iterator[str]:
    cells = [done.cells.get((label, target)) for target in range(classes)]
    yield from (ABSENT if cell is None else f"{cell.held:,} of {cell.n:,}" for cell in cells)
    drawn = [cell for cell in cells if cell is not None]
    whole = Rate(sum(cell.held for cell in drawn), sum(cell.n for cell in drawn))
    yield percent(whole.share) if whole.n else ABSENT
