"""The lines of the first table as text, and what its columns mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from phalanx.report.headline import WORST, Column
from phalanx.report.page import Page, Row
from phalanx.report.words import ABSENT, listed, percent, rated
from phalanx.runs.rate import Rate

MEASURED = "measured"
REPORTED = "reported"


@dataclass(frozen=True)
class Line:
    """One line of the first table."""

    label: str
    """The row's."""
    kind: str
    """`MEASURED`, `REPORTED`, or a released attack's name."""
    cells: tuple[str, ...]
    """In the order of the page's columns, in percent."""


def headline_lines(row: Row, page: Page) -> list[Line]:
    """What was measured; on a page beside a paper's numbers also those, and what released attacks say.

    Elsewhere the released attacks keep to their own table: they have little to put into these columns.
    """
    measured = tuple(_cell(column, row.columns.get(column.key)) for column in page.columns)
    lines = [Line(row.label, MEASURED, measured)]
    if any(column.key in row.reported for column in page.columns):
        reported = tuple(printed(row.reported.get(column.key)) for column in page.columns)
        lines.append(Line(row.label, REPORTED, reported))
    if page.reported_source:
        for name, rates in row.released_columns.items():
            said = tuple(_cell(column, rates.get(column.key)) for column in page.columns)
            lines.append(Line(row.label, name, said))
    return lines


def _cell(column: Column, rate: Rate | None) -> str:
    return rated(rate) if rate is None or column.key == WORST else percent(rate.share)


def printed(value: float | None) -> str:
    """A paper's number with two decimals, as papers print them: that also tells it from one that was measured."""
    return ABSENT if value is None else f"{value:.2f}"


def legend(columns: Sequence[Column]) -> Iterator[tuple[str, str]]:
    """Each column and what it is, with the names of the attacks whose union it is."""
    for column in columns:
        under = f" ({', '.join(column.attacks)})" if column.attacks else ""
        yield column.head, column.says + under


def remarks(page: Page) -> Iterator[str]:
    """What holds for every line of the first table, in sentences."""
    threats = listed(list(dict.fromkeys(f"{row.measurement['norm']} {row.measurement['eps']}" for row in page.rows)))
    within = f", within {threats}; an attack's name says its steps" if page.attacks else ""
    yield (
        f"In percent of all images ({_sizes(page)}){within}. Every perturbation is judged on the whole real model; in "
        "brackets the 95 % Wilson interval."
    )
    if any(row.reported for row in page.rows):
        yield (
            f"Reported: what {page.reported_source or 'the paper'} printed, without an interval. "
            "Measured: what the runs of this page hold."
        )
    if page.released:
        names = listed(list(dict.fromkeys(name for row in page.rows for name in row.released_columns)))
        yield (
            f"Released attacks ({names}): run with the defects they were published with. They are no evidence of "
            "robustness, and are in no other number of this page."
        )


def _sizes(page: Page) -> str:
    """ "n = 450", or n row by row."""
    sizes = {row.n for row in page.rows}
    if len(sizes) == 1:
        return f"n = {sizes.pop():,}"
    return "n = " + listed([f"{row.n:,} of {row.label}" for row in page.rows])
